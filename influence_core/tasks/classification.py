"""What tasks share that choose one of several classes: of a text, or of the endings of a question."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX, Batch
from influence_core.tasks.columns import Label
from influence_core.tasks.example import MEASUREMENT
from influence_core.tasks.pretrained import PretrainedTask
from influence_core.tasks.small_batches import resize
from influence_core.tasks.transformer import TransformerTask, pad


class ClassificationTask(TransformerTask):
    """Cross-entropy of the right class; the measurement is its negative margin.

    An example is {"input_ids", "label", and "token_type_ids" where the tokenizer tells two texts of a row apart}. Rows
    are padded on the right, whatever the tokenizer's side, so that no model has to be told its positions.
    """

    measured = "negative margin (how much surer the model is of the other classes than of the right one)"
    aim = "choose the right one"
    tokenizer_style = "roberta"
    position_limits = {"input_ids": "max_length"}

    def __init__(self, max_length, label_column=None, **flags):
        super().__init__(**flags)
        self.max_length = max_length
        self.named_columns[self.label_column] = ("--label_column", label_column)
        if max_length < 8:
            raise UserError(f"--max_length must be at least 8, so that there are words, not {max_length}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--max_length", type=int, help="tokens of a row; longer ones are cut")
        parser.add_argument("--label_column", help="the dataset's column of classes; of a query, it is the class "
                        "asked about: the measurement is its margin, its logit less the logsumexp of the others', "
                        "negative")  # fmt: skip

    @property
    def label_column(self) -> str:
        """The column of labels."""
        (column,) = (name for name, kind in self.columns.items() if isinstance(kind, Label))
        return column

    def label(self, row: Mapping[str, Any]) -> int:
        """The class of a row, as the dataset counts them."""
        return self.columns[self.label_column].index(row[self.label_column])

    def config_values(self):
        # Some count positions from the padding's index on.
        return super().config_values() | {"max_position_embeddings": self.max_length + self.tokenizer.pad_token_id + 1}

    # ---------------------------------------------------------------------------------------------------------- data

    @abstractmethod
    def rows_of(self, field: Sequence) -> list[np.ndarray]:
        """The rows in an example's field: one, or one for each choice."""

    @abstractmethod
    def by_example(self, rows: Tensor) -> Tensor:
        """[rows, positions] -> what the model takes, the first axis counting examples."""

    def encode(self, firsts: Sequence[str], seconds: Sequence[str] | None = None) -> dict[str, list[np.ndarray]]:
        """Texts, or pairs of them, as rows of token ids and, where any is not zero, of the tokens' types."""
        pairs = None if seconds is None else list(seconds)
        encoded = self.tokenizer(list(firsts), pairs, truncation=True, max_length=self.max_length, verbose=False)
        fields = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        rows = {name: [np.array(row, dtype=np.int32) for row in column] for name, column in fields.items()}
        return {name: column for name, column in rows.items() if name == "input_ids" or any(x.any() for x in column)}

    def class_of(self, example: dict) -> int:
        """The example's class, as the model counts them."""
        return example["label"]

    def resized(self, example, lengths, tokens):
        resized = super().resized(example, lengths, tokens)
        if "token_type_ids" in example:
            resized["token_type_ids"] = resize(example["token_type_ids"], lengths["input_ids"])
        return resized

    def num_tokens(self, example, stream):
        return max(map(len, self.rows_of(example[stream])))

    def token_rows(self, example):
        return {"input_ids": self.rows_of(example["input_ids"])}

    def length(self, example):
        return self.num_tokens(example, "input_ids")

    def collate(self, examples):
        """Padded to the longest row of the batch: what is padding changes no score."""
        rows = [row for example in examples for row in self.rows_of(example["input_ids"])]
        batch = {
            "input_ids": pad(rows, self.tokenizer.pad_token_id),
            "attention_mask": pad([np.ones_like(row) for row in rows], 0),
        }
        if "token_type_ids" in examples[0]:
            types = [row for example in examples for row in self.rows_of(example["token_type_ids"])]
            batch["token_type_ids"] = pad(types, 0)
        labels = torch.tensor(list(map(self.class_of, examples)))
        return {name: self.by_example(tensor) for name, tensor in batch.items()} | {"labels": labels}

    # --------------------------------------------------------------------------------------------------------- model

    def streams(self, batch):
        return {"input_ids": batch["input_ids"].flatten(0, -2)}

    def real_positions(self, batch, stream):
        return batch["attention_mask"].flatten(0, -2)

    def model_inputs(self, model, batch):
        return self.accepted(model, **{key: value for key, value in batch.items() if key != "labels"})

    def labels(self, batch):
        return batch["labels"]

    # -------------------------------------------------------------------------------------------------------- losses

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[examples, classes], in float32 at least."""
        logits = self.run(model, batch).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def train_loss(self, model, batch, sample_labels=None):
        logits, labels = self.logits(model, batch), batch["labels"]
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0]
            labels = sample_labels.sample(logits.detach(), uniforms.to(logits.device))
        return cross_entropy(logits, labels, reduction="sum")

    def measurement(self, model, batch):
        return negative_margin(self.logits(model, batch), batch["labels"]).sum()

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        logits, labels = self.logits(model, batch), batch["labels"]
        return {
            MEASUREMENT: negative_margin(logits, labels).double(),
            "loss": cross_entropy(logits, labels, reduction="none").double(),
            "prediction": logits.argmax(-1).double(),
            "label": labels.double(),
        }

    def metrics(self, values):
        return {"loss": float(values["loss"].mean()), "accuracy": self._accuracy(values)}

    def query_metrics(self, values):
        return {"query accuracy": self._accuracy(values), "mean measurement": float(values[MEASUREMENT].mean())}

    @staticmethod
    def _accuracy(values) -> float:
        from influence_core.tasks.metrics import accuracy  # only where it is needed: it takes long to import

        return accuracy(values["prediction"], values["label"])


def negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[examples], -(logit of the right class - logsumexp of the others), as in TRAK (Park et al. 2023)."""
    right = logits.gather(-1, labels[:, None])[:, 0]
    others = logits.scatter(-1, labels[:, None], float("-inf"))
    return others.logsumexp(-1) - right
