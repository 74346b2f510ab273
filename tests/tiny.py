"""Tiny tasks that the tests share."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from influence_core.losses import linear_cross_entropy
from influence_core.task import EXAMPLE_INDEX, InfluenceTask

VOCABULARY, WIDTH, PAD = 7, 3, -100


class TinyModel(nn.Module):
    """Token sequences -> logits. Neighbouring positions are mixed, so that positions matter to each other.

    Tracked: a Linear with bias, a Conv1D, a Linear without bias; `shared` calls the second one twice.
    """

    def __init__(self, shared: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, 5)
        self.second = Conv1D(5, 5)
        self.third = nn.Linear(5, 4, bias=False)
        self.head = nn.Linear(4, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.shared = shared

    def hidden(self, tokens, mask):
        x = self.embedding(tokens) * mask.unsqueeze(-1)
        x = x + 0.5 * x.roll(1, dims=1) * (torch.arange(x.shape[1], device=x.device) > 0).unsqueeze(-1)
        x = torch.tanh(self.first(x))
        x = self.dropout(torch.tanh(self.second(x)))
        if self.shared:
            x = torch.tanh(self.second(x))
        return torch.tanh(self.third(x))

    def forward(self, tokens, mask, has_head=True):
        hidden = self.hidden(tokens, mask)
        return self.head(hidden) if has_head else hidden


class TinyTask(InfluenceTask):
    """Predict the token at each position; rows padded on the right to the longest of the batch."""

    def __init__(self, masked: bool = True, layers=("first", "second", "third")):
        self.masked, self.layers = masked, list(layers)

    def load_model(self, checkpoint_dir=None, shared=False):
        torch.manual_seed(0)
        model = TinyModel(shared)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.7)
        return model.eval()

    def load_dataset(self, split, indices=None):
        generator = torch.Generator().manual_seed({"train": 1, "validation": 2}[split])
        examples = []
        for _ in range({"train": 40, "validation": 6}[split]):
            length = int(torch.randint(2, 9, (), generator=generator))
            tokens, labels = torch.randint(0, VOCABULARY, (2, length), generator=generator)
            examples.append({"tokens": tokens, "labels": labels})
        return examples if indices is None else [examples[i] for i in indices]

    def length(self, example):
        return len(example["tokens"])

    def collate(self, examples, longest=None):
        longest = longest or max(len(example["tokens"]) for example in examples)

        def pad(x, value):
            return F.pad(x, (0, longest - len(x)), value=value)

        return {
            "tokens": torch.stack([pad(example["tokens"], 0) for example in examples]),
            "labels": torch.stack([pad(example["labels"], PAD) for example in examples]),
        }

    def train_loss(self, model, batch, sample_labels=None):
        labels = batch["labels"]
        uniforms = None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        hidden = model(batch["tokens"], labels != PAD, has_head=False)
        return linear_cross_entropy(hidden, model.head.weight, labels, uniforms)

    def measurement(self, model, batch):
        return self.train_loss(model, batch)

    def tracked_layer_names(self, model):
        return self.layers

    def position_mask(self, batch, layer_name):
        return batch["labels"] != PAD if self.masked else None

    def describe(self, example):
        return " ".join(map(str, example["tokens"].tolist()))


class PaddedTinyTask(TinyTask):
    """The same, every row padded to 12 positions."""

    def collate(self, examples):
        return super().collate(examples, longest=12)


class OfModel(TinyTask):
    """The tiny task with another model."""

    def __init__(self, model_class, **options):
        super().__init__(**options)
        self.model_class = model_class

    def load_model(self, checkpoint_dir=None, shared=False):
        model = self.model_class()
        model.load_state_dict(TinyTask().load_model().state_dict())
        return model.eval()
