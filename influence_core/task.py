"""What an example must say of itself: the contract between a task and the influence engine.

Symbols (Grosse et al. 2023, arXiv:2308.03296; TRAK, arXiv:2303.14186):

    L(z; theta)   train_loss     summed over positions and examples
    f(z; theta)   measurement    summed over examples, lower is better
    z             an example; one row of a batch unless the task says otherwise

Everything that the engine sums is additive over examples, and an example's part does not depend on what shares its
batch. check.py proves that on two examples before any work, and refuses what breaks it.

A model and a loss of one's own need nothing else. Say texts are judged by a BERT, rows padded on the right:

    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    from influence_core.layers import trackable_layer_names
    from influence_core.task import EXAMPLE_INDEX, InfluenceTask


    class Judgement(InfluenceTask):
        # An example is {"input_ids": [positions], "label": int}.
        def collate(self, examples):
            texts = [example["input_ids"] for example in examples]
            return {
                "input_ids": pad_sequence(texts, batch_first=True),
                "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
                "labels": torch.tensor([example["label"] for example in examples]),
            }

        def length(self, example):  # so that examples of like length share a batch
            return len(example["input_ids"])

        def logits(self, model, batch):
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

        def train_loss(self, model, batch, sample_labels=None):
            logits, labels = self.logits(model, batch), batch["labels"]
            if sample_labels is not None:  # one uniform for each example's one label
                labels = sample_labels.sample(logits, sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0])
            return cross_entropy(logits, labels, reduction="sum")

        def measurement(self, model, batch):
            return self.train_loss(model, batch)

        def tracked_layer_names(self, model):
            return trackable_layer_names(model)

        def position_mask(self, batch, layer_name):  # pooler and classifier see one position a row
            return batch["attention_mask"] if ".layer." in layer_name else None

    scores = analyze(Study(Judgement(), model, train_dataset, output_dir), ["ekfac"], query_dataset)["ekfac"]

A Hugging Face model of a usual kind says most of this itself: see influence_core/tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from influence_core.labels import LabelSampler

Batch = dict[str, Tensor]

ONLY_STREAM = "the only stream"
EXAMPLE_INDEX = "example_index"  # batch[EXAMPLE_INDEX]: [examples] int64, the index of each example in its dataset


class InfluenceTask(ABC):
    """All that is particular to one model, dataset and question; everything else is shared."""

    rows_per_example: int = 1
    """Rows of a batch that make one example whose gradient is the sum of theirs (the endings of a question).

    The engine then lays the rows of an example end to end along the position axis, so that the contraction over
    positions adds them up: the same sum as post_process_per_sample_gradient could make, without a gradient of each row.
    """

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """One batch of tensors on the CPU, the first axis of each counting examples (or rows of examples)."""

    @abstractmethod
    def train_loss(self, model: nn.Module, batch: Batch, sample_labels: LabelSampler | None = None) -> Tensor:
        """L: the training loss, summed over positions and examples, a scalar.

        With `sample_labels` the labels are drawn from the model's own distribution (the true Fisher), one for
        each position that carries loss; without, they are the data's own. The uniforms of an example go by its own
        positions, the first real one first: by the columns of the batch, padding on the left would move them.
        """

    @abstractmethod
    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """f: what is asked about a query, summed over examples, lower is better, a scalar."""

    @abstractmethod
    def tracked_layer_names(self, model: nn.Module) -> list[str]:
        """Names (as in model.named_modules()) of the layers whose parameters the influence is taken over."""

    def length(self, example: Any) -> int:
        """How many positions the example takes without padding: examples of like length share a batch.

        By default all are alike, which is right where nothing is padded. It changes time and memory, not results: where
        a task has lengths, positions without a gradient are looked for in each batch and left out of the work.
        """
        return 1

    def position_mask(self, batch: Batch, layer_name: str) -> Tensor | None:
        """[rows, positions] of the layer's own input stream, true at real positions; None: all are real.

        A layer that sees [rows * positions, features] is unfolded, so its mask is as any other's.
        """
        return None

    def token_rows(self, example: Any) -> Mapping[str, Sequence[Sequence[int]]]:
        """{stream: the token ids of each of the example's rows}, for scores by token; by default none are known."""
        return {}

    def token_mask(self, batch: Batch, stream: str) -> Tensor | None:
        """[rows, positions] of a stream, true at its tokens; None: they come first in each row."""
        return None

    def token_stream(self, site: str, call: int) -> str | None:
        """Whose positions a module saw when it was called (0, 1, …) in a forward pass; None: those of no stream.

        By default those of the only stream, or of none where there are several.
        """
        return ONLY_STREAM

    def post_process_per_sample_gradient(self, layer_name: str, gradient: Tensor) -> Tensor:
        """[rows, out, in(+1)] -> [examples, out, in(+1)], for tasks where several rows make one example.

        influence_core/tasks/multiple_choice.py is the worked example. Not called where `rows_per_example` says the same
        more cheaply.
        """
        return gradient

    @property
    def has_lengths(self) -> bool:
        """Whether examples differ in length, so that batches are padded."""
        return type(self).length is not InfluenceTask.length

    @property
    def post_processes(self) -> bool:
        """Whether gradients have to go through post_process_per_sample_gradient."""
        if self.rows_per_example > 1:
            return False
        return type(self).post_process_per_sample_gradient is not InfluenceTask.post_process_per_sample_gradient
