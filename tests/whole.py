"""A tiny model all of whose parameters can be tracked, and its task."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from influence_core.losses import cross_entropy, linear_cross_entropy
from influence_core.task import EXAMPLE_INDEX
from tests.tiny import PAD, VOCABULARY, TinyTask

WIDTH, LONGEST = 4, 12
NAMES = {  # {how the head is: the layers}
    "tied": ["embedding", "positions", "first_norm", "first", "second_norm", "second"],
    "untied": ["embedding", "positions", "first_norm", "first", "second_norm", "second", "head"],
}
NAMES |= {f"{head}, with a bias": names for head, names in NAMES.items()}


class LessOne(nn.Module):
    """A norm that keeps its scale less one, as Gemma's does."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class WholeModel(nn.Module):
    """Token sequences -> logits; every parameter is of one of the kinds."""

    def __init__(self, head: str):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.positions = nn.Embedding(LONGEST, WIDTH)
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), LessOne(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 6), Conv1D(WIDTH, 6)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias="bias" in head)
        if "untied" not in head:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head

    def hidden(self, tokens, mask):
        places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)  # the same for all rows
        x = self.embedding(tokens) * mask.unsqueeze(-1) + self.positions(places)
        x = x + 0.5 * x.roll(1, dims=1) * (places > 0).unsqueeze(-1)
        x = x + self.second(torch.tanh(self.first(self.first_norm(x))))
        return self.second_norm(x)

    def forward(self, tokens, mask):
        return self.head(self.hidden(tokens, mask))


class WholeTask(TinyTask):
    """The tiny task with that model; `held`: its loss is of logits of the whole batch, else by chunks."""

    def __init__(self, head="tied", held=False):
        super().__init__(layers=NAMES[head])
        self.head, self.held = head, held

    def load_model(self, checkpoint_dir=None, shared=False):
        torch.manual_seed(0)
        model = WholeModel(self.head)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.7)
        return model.eval()

    def train_loss(self, model, batch, sample_labels=None):
        labels = batch["labels"]
        mask, uniforms = labels != PAD, None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        if self.held:
            return cross_entropy(model(batch["tokens"], mask), labels, uniforms)
        return linear_cross_entropy(model.hidden(batch["tokens"], mask), model.head.weight, labels, uniforms)

    def measurement(self, model, batch):
        return -0.5 * self.train_loss(model, batch)
