"""The examples' tasks as the benchmarks run them: labels sampled beforehand, and the same task as kronfluence has it.

Each class says of one example, beside our own contract: how to sample labels, and what the peer gets to see.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from kronfluence.task import Task
from safetensors.torch import load_file
from torch import Tensor

from dailymail_t5.task import DailyMailTask
from influence_core.labels import LabelSampler
from influence_core.losses import IGNORED
from influence_core.tasks.classification import negative_margin
from swag_roberta.task import SwagTask
from wikitext_gpt2.task import WikiTextTask

LABELS = "sampled_labels"


class BenchmarkedTask:
    """Added to a task: examples that carry LABELS use them in place of sampled ones."""

    peer_task: type[Task]

    def collate(self, examples):
        batch = super().collate(examples)
        if LABELS in examples[0]:
            batch[LABELS] = torch.stack([example[LABELS] for example in examples])
        return batch

    def sample_all_labels(self, model, examples, seed) -> list[dict]:
        """Each example with LABELS from the model's own distribution, drawn as our factors draw them."""
        sampler, labelled = LabelSampler(seed), []
        for index, example in enumerate(examples):
            batch = {key: value.to(model.device) for key, value in self.collate([example]).items()}
            with torch.no_grad():
                logits = self.all_logits(model, batch)
            uniforms = sampler.uniforms(torch.tensor([index]), logits[..., 0].numel()).view(logits.shape[:-1])
            labelled.append({**example, LABELS: sampler.sample(logits, uniforms.to(logits.device))[0].cpu()})
        return labelled

    def train_loss(self, model, batch, sample_labels=None):
        if sample_labels is None or LABELS not in batch:
            return super().train_loss(model, batch, sample_labels)
        return self.labelled_loss(model, batch)

    def labelled_loss(self, model, batch) -> Tensor:
        """The training loss against batch[LABELS]."""
        raise NotImplementedError

    def all_logits(self, model, batch) -> Tensor:
        """[examples, …, categories]: one row for each label that is sampled."""
        raise NotImplementedError

    def for_peer(self, example) -> dict[str, Tensor]:
        """The example as the peer's task takes it, all of one shape."""
        raise NotImplementedError


class PeerTask(Task):
    """A task of kronfluence whose labels are sampled online, or read from the batch."""

    def __init__(self, layer_names: list[str]):
        self.layer_names, self.online = layer_names, True

    def get_influence_tracked_modules(self):
        return self.layer_names

    def cross_entropy(self, logits, labels, batch, sample):
        """Summed; logits [rows, categories], labels [rows]."""
        if sample and self.online:
            with torch.no_grad():
                labels = torch.multinomial(F.softmax(logits.detach(), dim=-1), num_samples=1).flatten()
        elif sample:
            labels = batch[LABELS].reshape(-1)
        return F.cross_entropy(logits, labels, reduction="sum")


class LanguageModelPeer(PeerTask):
    """As kronfluence's WikiText example."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        labels = batch["input_ids"][:, 1:].reshape(-1)
        return self.cross_entropy(logits.reshape(-1, logits.size(-1)), labels, batch, sample)

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


class MultipleChoicePeer(PeerTask):
    """As kronfluence's SWAG example: every row padded to the full length, four rows made one by the hook."""

    enable_post_process_per_sample_gradient = True

    @staticmethod
    def logits(batch, model):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()

    def compute_train_loss(self, batch, model, sample=False):
        return self.cross_entropy(self.logits(batch, model), batch["labels"], batch, sample)

    def compute_measurement(self, batch, model):
        return negative_margin(self.logits(batch, model), batch["labels"]).sum()

    def get_attention_mask(self, batch):
        return batch["attention_mask"].flatten(0, 1)

    def post_process_per_sample_gradient(self, module_name, gradient):
        return gradient.unflatten(0, (-1, 4)).sum(dim=1)


class SummaryPeer(PeerTask):
    """As kronfluence's CNN/DailyMail example, but for its mask: nothing is padded here, so none is needed."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}, use_cache=False).logits
        return self.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), batch, sample)

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


class NoTokenizer:
    """Where tokens are read, none is needed."""

    pad_token_id = None

    def __len__(self):
        return 0


class BenchmarkedWikiText(BenchmarkedTask, WikiTextTask):
    """Next-token prediction on whole blocks; from text, or from a file of tokens where no tokenizer is at hand."""

    peer_task = LanguageModelPeer

    def __init__(self, tokens, **flags):
        super().__init__(**flags)
        self.tokens = tokens

    @staticmethod
    def add_arguments(parser):
        WikiTextTask.add_arguments(parser)
        parser.add_argument("--tokens", help="file of tests/benchmarks/gpu_inputs.py in place of dataset and tokenizer")

    @cached_property
    def tokenizer(self):
        return NoTokenizer() if self.tokens else super().tokenizer

    def config_values(self):
        return {} if self.tokens else super().config_values()

    def load_dataset(self, split, indices=None):
        if self.tokens and split not in self._splits:
            blocks = load_file(self.tokens)[split][:, : self.block_size]
            self._splits[split] = [{"input_ids": block.long()} for block in blocks]
        return super().load_dataset(split, indices)

    def labelled_loss(self, model, batch):
        return self.scores(model, batch).loss(F.pad(batch[LABELS], (0, 1), value=IGNORED))

    def all_logits(self, model, batch):
        return model(batch["input_ids"], use_cache=False).logits[:, :-1]

    def for_peer(self, example):
        return {key: example[key] for key in ("input_ids", LABELS) if key in example}


class BenchmarkedSwag(BenchmarkedTask, SwagTask):
    """Multiple choice; ours pads to the longest row of a batch."""

    peer_task = MultipleChoicePeer

    def labelled_loss(self, model, batch):
        return F.cross_entropy(self.logits(model, batch), batch[LABELS], reduction="sum")

    def all_logits(self, model, batch):
        return self.logits(model, batch)

    def for_peer(self, example):
        batch = {key: value[0] for key, value in self.collate([example]).items()}
        missing = self.max_length - batch["input_ids"].shape[-1]
        for key, value in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
            batch[key] = F.pad(batch[key], (0, missing), value=value)
        return batch


class BenchmarkedDailyMail(BenchmarkedTask, DailyMailTask):
    """Articles and summaries that fill their lengths: the peer is right on T5 only where nothing is padded."""

    peer_task = SummaryPeer

    def make_examples(self, split):
        lengths = {"input_ids": self.max_source_length, "labels": self.max_target_length}
        examples = super().make_examples(split)
        return [x for x in examples if all(len(x[key]) == length for key, length in lengths.items())]

    def labelled_loss(self, model, batch):
        return self.scores(model, batch).loss(batch[LABELS])

    def all_logits(self, model, batch):
        return model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}, use_cache=False).logits

    def for_peer(self, example):
        batch = {key: value[0] for key, value in self.collate([example]).items()}
        return batch | {LABELS: example[LABELS]} if LABELS in example else batch


BENCHMARKED = {
    "wikitext_gpt2": BenchmarkedWikiText,
    "swag_roberta": BenchmarkedSwag,
    "dailymail_t5": BenchmarkedDailyMail,
}
