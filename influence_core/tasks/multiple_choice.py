"""Which of several endings follows? The rows of all endings make one example."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoModelForMultipleChoice, RobertaConfig

from influence_core.tasks.classification import ClassificationTask


class MultipleChoiceTask(ClassificationTask):
    """An example is a question: a row of the dataset, with a row of token ids for each of `num_choices` endings."""

    auto_model, config_class = AutoModelForMultipleChoice, RobertaConfig
    num_choices: ClassVar[int]

    def __init_subclass__(cls, **options):
        # The endings' gradients add up, so the engine may lay their rows end to end; post_process_per_sample_gradient
        # below says the same in full, for tasks where they do not just add up.
        super().__init_subclass__(**options)
        if "num_choices" in vars(cls) and "rows_per_example" not in vars(cls):
            cls.rows_per_example = cls.num_choices

    @abstractmethod
    def choices(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(question, ending) for each ending, as the tokenizer takes a pair of texts."""

    def tokenized(self, rows):
        pairs = [pair for row in rows for pair in self.choices(row)]
        encoded = self.encode(*zip(*pairs))
        return [
            {**row, "label": self.label(row)}
            | {name: x[self.num_choices * number : self.num_choices * (number + 1)] for name, x in encoded.items()}
            for number, row in enumerate(rows)
        ]

    def rows_of(self, field):
        return field

    def by_example(self, rows):
        return rows.unflatten(0, (-1, self.num_choices))

    def post_process_per_sample_gradient(self, layer_name, gradient):
        """[choices * examples, out, in(+1)] -> [examples, out, in(+1)]: the sum over the endings."""
        return gradient.unflatten(0, (-1, self.num_choices)).sum(1)

    def describe(self, example):
        choices = self.choices(example)
        lines = [choices[0][0]]
        for number, (_, ending) in enumerate(choices):
            lines.append(f"  {'->' if number == example['label'] else '  '} {ending}")
        return "\n".join(lines)
