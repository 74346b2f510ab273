"""Which of several endings follows? The rows of all endings make one example."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForMultipleChoice, RobertaConfig

from influence_core.errors import UserError
from influence_core.tasks.classification import ClassificationTask
from influence_core.tasks.columns import Ending, Text
from influence_core.tasks.example import Segment
from influence_core.tasks.prompts import Prompt


class MultipleChoiceTask(ClassificationTask):
    """An example is a question: a row of the dataset, with a row of token ids for each of its endings.

    `columns` names texts of the question, the endings, and the right one.
    """

    auto_model, config_class = AutoModelForMultipleChoice, RobertaConfig
    endings: tuple[str, ...]  # of the columns, in the order of their classes

    def __init__(self, text_column=None, ending_columns=None, **flags):
        super().__init__(**flags)
        question = [name for name in self.columns if name not in (*self.endings, self.label_column)]
        if ending_columns is not None:  # then the data is of another shape than the task's own
            ending_columns = [column for name in ending_columns for column in _numbered(name)]
            if len(ending_columns) < 2:
                raise UserError("--ending_columns names the column of each ending, two at least; of endings in a list "
                                "they are called endings.0 endings.1 …")  # fmt: skip
            question, label = ["question"], {self.label_column: Ending(len(ending_columns))}
            self.endings = tuple(f"ending {number}" for number in range(len(ending_columns)))
            self.columns = dict.fromkeys(self.endings, Text(may_be_blank=False)) | label
        self.prompt = Prompt("--text_column", question, text_column)
        others = {name: kind for name, kind in self.columns.items() if name not in question}
        self.columns = self.prompt.columns | others
        self.named_columns |= {
            ending: ("--ending_columns", column)
            for ending, column in zip(self.endings, ending_columns or [None] * len(self.endings))
        }
        self.named_columns |= self.prompt.named_columns

    @staticmethod
    def add_arguments(parser):
        ClassificationTask.add_arguments(parser)
        parser.add_argument("--text_column", nargs="+", help="the dataset's column of questions, or the columns that "
                            "make one")  # fmt: skip
        parser.add_argument("--ending_columns", nargs="+", help="its columns of endings, in the order of their "
                            "classes, or the parts of one (endings.0 endings.1): a question is then --text_column "
                            "alone")  # fmt: skip

    @property
    def num_choices(self) -> int:
        """Rows of an example."""
        return len(self.endings)

    @property
    def rows_per_example(self) -> int:
        """The endings' gradients add up, so the engine may lay their rows end to end.

        post_process_per_sample_gradient below says the same in full, for tasks where they do not just add up.
        """
        return self.num_choices

    def choices(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(question, ending) for each ending, as the tokenizer takes a pair of texts."""
        question = self.prompt.text(row, " ")
        return [(question, row[ending]) for ending in self.endings]

    def tokenized(self, rows):
        self.prompt.texts(rows, " ")  # none is blank altogether
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

    def segments(self, example):
        return [
            Segment(f"Ending {number + 1}", "input_ids", number, is_right=number == example["label"])
            for number in range(self.num_choices)
        ]

    def describe(self, example):
        lines = [f"{self.prompt.text(example, ' ')} …"]
        for number, ending in enumerate(self.endings):
            lines.append(f"  {'->' if number == example['label'] else '  '} {example[ending]}")
        return "\n".join(lines)


def _numbered(name: str) -> list[str]:
    """endings.{0..3} as a shell has it, where none did."""
    span = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", name)
    if span is None:
        return [name]
    before, first, last, after = span.groups()
    return [f"{before}{number}{after}" for number in range(int(first), int(last) + 1)]
