"""What tasks share whose loss is the cross-entropy of tokens: causal language models, sequence to sequence."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from influence_core.labels import LabelSampler
from influence_core.layers.finding import output_head
from influence_core.losses import IGNORED
from influence_core.task import Batch
from influence_core.tasks.example import MEASUREMENT, is_main_process
from influence_core.tasks.head import TokenScores, head_is_matrix, token_scores
from influence_core.tasks.loading import overheard
from influence_core.tasks.observed import undisturbed
from influence_core.tasks.transformer import TransformerTask, unwrapped

MORE_THAN_TOKENS = (
    "Note: the model's own loss is more than the mean cross-entropy of its tokens (that of a mixture's router, say): "
    "training minimises it, the influence is that of the cross-entropy"
)


class LanguageModelTask(TransformerTask):
    """Losses and measurement: cross-entropy of the target tokens, summed.

    Logits are held by the chunk where the model was seen to make them by its head's matrix alone; else they are the
    model's own.
    """

    measured = "loss (the summed cross-entropy of its tokens)"
    aim = "say what the query says"
    count_name: ClassVar[str] = "tokens"  # of an example's number of targets, among the evaluation's values

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """[rows, positions], the token that each position has to predict; IGNORED where it carries no loss."""

    @abstractmethod
    def target_uniforms(self, sample_labels: LabelSampler, batch: Batch) -> Tensor:
        """[rows, positions], a uniform number for each target, by the example's own positions."""

    @torch.no_grad()
    def observe_head(self, model, batch, observed):
        # It warns of each model whose class is not named after its loss, such as GPT-2: what that gives is seen here.
        with undisturbed(model), overheard("transformers", lambda record: "`loss_type=" in record.getMessage()):
            inputs = self.model_inputs(model, batch)
            observed.head_is_matrix = "labels" not in inputs and head_is_matrix(model, inputs)
            targets = self.targets(batch)
            mean = self.scores(model, batch).loss(targets) / (targets != IGNORED).sum()
            # Some language models compare each position with its own label: they are given those of the next.
            of_labels = (model(**inputs | {"labels": labels}).loss for labels in (self.labels(batch), targets))
            rounding = 1e-5 if next(model.parameters()).itemsize >= 4 else 1e-2
            observed.loss_is_mean = any(bool((own - mean).abs() <= rounding * mean.abs()) for own in of_labels)
        if not observed.loss_is_mean and is_main_process():
            print(MORE_THAN_TOKENS)

    def scores(self, model: nn.Module, batch: Batch) -> TokenScores:
        """What the model, which may be wrapped, says of the targets."""
        inner = unwrapped(model)
        is_matrix = self.known(inner).head_is_matrix
        return token_scores(model, self.model_inputs(inner, batch), is_matrix, output_head(inner))

    def train_loss(self, model, batch, sample_labels=None):
        uniforms = None if sample_labels is None else self.target_uniforms(sample_labels, batch)
        return self.scores(model, batch).loss(self.targets(batch), uniforms)

    def measurement(self, model, batch):
        return self.train_loss(model, batch)

    def training_loss(self, model, batch):
        """The mean cross-entropy of the targets; the model's own loss where that is more."""
        if not self.known(unwrapped(model)).loss_is_mean:
            return super().training_loss(model, batch)
        targets = self.targets(batch)
        return self.scores(model, batch).loss(targets) / (targets != IGNORED).sum()

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        targets = self.targets(batch)
        losses = self.scores(model, batch).losses(targets)
        return {MEASUREMENT: losses, self.count_name: (targets != IGNORED).sum(1).double()}

    def mean_loss(self, values: dict[str, Tensor]) -> Tensor:
        """Of all targets, nats."""
        return values[MEASUREMENT].sum() / values[self.count_name].sum()
