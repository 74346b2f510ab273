"""Which class is a text, or a pair of texts, of?"""

import re
from functools import cached_property

from transformers import AutoModelForSequenceClassification, PretrainedConfig, RobertaConfig

from influence_core.errors import UserError
from influence_core.tasks.classification import ClassificationTask
from influence_core.tasks.columns import Label, Text
from influence_core.tasks.example import Segment, is_main_process
from influence_core.tasks.transformer import topic_of

SECOND_TEXT = "second text"  # what a task calls it that has but one of its own
UNNAMED = re.compile(r"LABEL_\d+")  # what a config calls classes that nobody named


class SequenceClassificationTask(ClassificationTask):
    """`columns` names one or two columns of text, and one of labels.

    An example's "label" is the dataset's. The model's own numbers of the classes go by their names where both have
    them: a model trained elsewhere may count them in another order.
    """

    auto_model, config_class = AutoModelForSequenceClassification, RobertaConfig
    class_ids: list[int] | None = None  # the model's number of each class of the dataset; None: the same

    def __init__(self, text_column=None, **flags):
        super().__init__(**flags)
        names = [name for name, kind in self.columns.items() if isinstance(kind, Text)]
        given = text_column or [None] * len(names)
        if len(given) > 2:
            raise UserError(f"--text_column names one column, or the two of a pair, not {len(given)}")
        names = [*names, SECOND_TEXT][: len(given)]
        kinds = [self.columns.get(name, Text()) for name in names]
        self.columns = dict(zip(names, kinds)) | {self.label_column: self.label_kind}
        self.named_columns |= {name: ("--text_column", column) for name, column in zip(names, given)}

    @staticmethod
    def add_arguments(parser):
        ClassificationTask.add_arguments(parser)
        parser.add_argument("--text_column", nargs="+", help="the dataset's column of text, or the two of a pair")

    @property
    def label_kind(self) -> Label:
        return self.columns[self.label_column]

    @cached_property
    def class_names(self) -> list[str]:
        """Of the column's kind, or of the dataset itself; empty where neither knows them."""
        given = list(self.label_kind.names)
        if self.is_demo or self.dataset_source is None:
            return given
        stored = list(getattr(self.rows("train").features[self.label_column], "names", None) or [])
        if given and given != stored and sorted(given) == sorted(stored):
            raise UserError(f"the dataset's classes are {', '.join(stored)}, in this order: the task has them as "
                            f"{', '.join(given)}")  # fmt: skip
        return given or (stored if len(stored) == self.label_kind.num_classes else [])

    # --------------------------------------------------------------------------------------------------------- model

    def adapt_config(self, config, is_start):
        """A new head has the dataset's classes; a trained one must have as many."""
        super().adapt_config(config, is_start)
        num_classes = self.label_kind.num_classes
        if is_start and config.num_labels != num_classes:
            config.num_labels = num_classes
        if config.num_labels != num_classes or num_classes < 2:
            raise UserError(
                f"the model has {config.num_labels} classes, the column {self.label_column!r} {num_classes}: "
                "it takes as many, and two at least"
            )
        if config.problem_type not in (None, "single_label_classification"):
            raise UserError(f"the model's problem_type is {config.problem_type}: here each text is of one class")
        if self.class_names:
            self._match_classes(config)

    def _match_classes(self, config: PretrainedConfig) -> None:
        """Number the classes as the config does, or name them where it has no names."""
        self.class_ids = None
        theirs = [config.id2label[number] for number in range(config.num_labels)]
        if all(map(UNNAMED.fullmatch, theirs)):
            config.id2label = dict(enumerate(self.class_names))
            config.label2id = {name: number for number, name in enumerate(self.class_names)}
            theirs = self.class_names
        folded = [name.casefold() for name in theirs]
        ours = [name.casefold() for name in self.class_names]
        if sorted(folded) == sorted(ours):
            self.class_ids = [folded.index(name) for name in ours]
        elif is_main_process():
            both = f"{', '.join(theirs)}, the dataset's {', '.join(self.class_names)}"
            print(f"Note: the model's classes are {both}: they are taken to be the same in this order")

    # ---------------------------------------------------------------------------------------------------------- data

    def tokenized(self, rows):
        texts = [[row[name] for row in rows] for name, kind in self.columns.items() if isinstance(kind, Text)]
        encoded = self.encode(*texts)
        labels = list(map(self.label, rows))
        return [
            {name: column[number] for name, column in encoded.items()} | {"label": label} | topic_of(rows[number])
            for number, label in enumerate(labels)
        ]

    def class_of(self, example):
        label = example["label"]
        return label if self.class_ids is None else self.class_ids[label]

    def rows_of(self, field):
        return [field]

    def by_example(self, rows):
        return rows

    def segments(self, example):
        return [Segment(f"Labelled {self._label_name(example)}", "input_ids")]

    def describe(self, example):
        return f"[{self._label_name(example)}] {self.text(example['input_ids'])}"

    def _label_name(self, example) -> str:
        label = example["label"]
        return str(self.class_names[label] if self.class_names else label)
