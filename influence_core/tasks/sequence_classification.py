"""Which class is a text, or a pair of texts, of?"""

from typing import ClassVar

from transformers import AutoModelForSequenceClassification, RobertaConfig

from influence_core.errors import UserError
from influence_core.tasks.classification import ClassificationTask
from influence_core.tasks.columns import Label, Text
from influence_core.tasks.transformer import topic_of


class SequenceClassificationTask(ClassificationTask):
    """`columns` names one or two columns of text and one of labels."""

    auto_model, config_class = AutoModelForSequenceClassification, RobertaConfig
    class_names: ClassVar[tuple[str, ...]] = ()  # to show; else those of the dataset's rows are numbers

    @property
    def text_columns(self) -> list[str]:
        return [name for name, kind in self.columns.items() if isinstance(kind, Text)]

    @property
    def label_column(self) -> str:
        (column,) = (name for name, kind in self.columns.items() if isinstance(kind, Label))
        return column

    @property
    def num_classes(self) -> int:
        return self.columns[self.label_column].num_classes

    # --------------------------------------------------------------------------------------------------------- model

    def adapt_config(self, config, is_start):
        """A new head has as many classes as the dataset; a trained one must."""
        super().adapt_config(config, is_start)
        if is_start and config.num_labels != self.num_classes:
            config.num_labels = self.num_classes
        if config.num_labels != self.num_classes or config.num_labels < 2:
            raise UserError(
                f"the model has {config.num_labels} classes, the column {self.label_column!r} {self.num_classes}: "
                "it takes as many, and two at least"
            )
        if config.problem_type not in (None, "single_label_classification"):
            raise UserError(f"the model's problem_type is {config.problem_type}: here each text is of one class")

    # ---------------------------------------------------------------------------------------------------------- data

    def tokenized(self, rows):
        texts = [[row[column] for row in rows] for column in self.text_columns]
        encoded = self.encode(*texts)
        return [
            {name: column[number] for name, column in encoded.items()}
            | {"label": row[self.label_column]}
            | topic_of(row)
            for number, row in enumerate(rows)
        ]

    def rows_of(self, field):
        return [field]

    def by_example(self, rows):
        return rows

    def describe(self, example):
        label = example["label"]
        return f"[{self.class_names[label] if self.class_names else label}] {self.text(example['input_ids'])}"
