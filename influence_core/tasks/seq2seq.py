"""Sequence to sequence: a target text is written from a source text."""

from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

from influence_core.errors import UserError
from influence_core.losses import IGNORED
from influence_core.task import EXAMPLE_INDEX
from influence_core.tasks.example import MEASUREMENT, Segment
from influence_core.tasks.language_model import LanguageModelTask
from influence_core.tasks.pretrained import PretrainedTask
from influence_core.tasks.prompts import PROMPT_FLAG, Prompt
from influence_core.tasks.transformer import pad, topic_of

SEPARATOR = "\n"  # between the parts of a source


class Seq2SeqTask(LanguageModelTask):
    """`columns` names two texts, source and target. An example is {"input_ids", "labels"}; the measurement is the
    target's summed cross-entropy.

    Both are padded on the right, so that no model has to be told its positions.
    """

    auto_model, config_class = AutoModelForSeq2SeqLM, T5Config
    tokenizer_style = "t5"
    measured = "loss (the summed cross-entropy of its target)"
    aim = "write the query’s target"
    position_limits = {"input_ids": "max_source_length", "labels": "max_target_length"}
    source_name: ClassVar[str] = "Source"  # as a person reads it
    target_name: ClassVar[str] = "Target"
    own_prefix: ClassVar[str] = ""  # before every source, where the columns are the task's own

    def __init__(
        self, max_source_length, max_target_length, source_prefix=None, prompt_column=None, answer_column=None, **flags
    ):
        super().__init__(**flags)
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        source, self.target = self.columns
        self.prompt = Prompt(PROMPT_FLAG, [source], prompt_column)
        self.columns = self.prompt.columns | {self.target: self.columns[self.target]}
        has_own_columns = self.prompt.is_own and answer_column in (None, self.target)
        self.source_prefix = self.own_prefix if source_prefix is None and has_own_columns else source_prefix or ""
        self.named_columns = self.prompt.named_columns | {self.target: ("--answer_column", answer_column)}
        for name, length, least in (("source", max_source_length, 3), ("target", max_target_length, 2)):
            if length < least:
                raise UserError(f"--max_{name}_length must be at least {least}, a token and the end, not {length}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--max_source_length", type=int, help="tokens of a source; longer ones are cut")
        parser.add_argument("--max_target_length", type=int, help="tokens of a target; longer ones are cut")
        parser.add_argument("--source_prefix", help="before every source, such as the 'summarize: ' of T5 "
                            "[the example's own, for data with its columns]")  # fmt: skip
        parser.add_argument(
            PROMPT_FLAG, nargs="+", help="the dataset's column of sources, or the columns that make one"
        )
        parser.add_argument("--answer_column", help="the dataset's column of targets")

    # ---------------------------------------------------------------------------------------------------------- data

    def tokenized(self, rows):
        texts = [self.source_prefix + text for text in self.prompt.texts(rows, SEPARATOR)]
        sources = self.tokens(texts, self.max_source_length)
        encoded = self.tokenizer(
            text_target=[row[self.target] for row in rows], truncation=True, max_length=self.max_target_length
        )
        targets = (np.array(ids, dtype=np.int32) for ids in encoded["input_ids"])
        return [
            {"input_ids": source, "labels": target, **topic_of(row)}
            for source, target, row in zip(sources, targets, rows)
        ]

    def length(self, example):
        return len(example["input_ids"]) + len(example["labels"])

    def collate(self, examples):
        """Sources and targets, each padded to the longest of the batch."""
        sources = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad(sources, self.tokenizer.pad_token_id),
            "attention_mask": pad([np.ones_like(source) for source in sources], 0),
            "labels": pad([example["labels"] for example in examples], IGNORED),
        }

    def segments(self, example):
        return [Segment(self.target_name, "labels"), Segment(self.source_name, "input_ids")]

    def describe(self, example):
        source = self.text(example["input_ids"]).removeprefix(self.source_prefix)
        return f"{self.target_name}: {self.text(example['labels'])}\n{self.source_name}: {source}"

    # --------------------------------------------------------------------------------------------------------- model

    def adapt_config(self, config, is_start):
        super().adapt_config(config, is_start)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = self.tokenizer.pad_token_id

    def streams(self, batch):
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def real_positions(self, batch, stream):
        return batch["attention_mask"] if stream == "input_ids" else batch["labels"] != IGNORED

    def model_inputs(self, model, batch):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        # Without that, the model shifts them only as labels.
        target = {"labels": batch["labels"]} if shift is None else {"decoder_input_ids": shift(labels=batch["labels"])}
        return self.accepted(model, input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), **target)

    def labels(self, batch):
        return batch["labels"]

    def targets(self, batch):
        return batch["labels"]

    def target_uniforms(self, sample_labels, batch):
        return sample_labels.uniforms(batch[EXAMPLE_INDEX], batch["labels"].shape[1])

    # ------------------------------------------------------------------------------------------------------- figures

    @torch.no_grad()
    def generation_values(self, model, batch):
        """ROUGE of targets that the model writes, taking the likeliest token each time."""
        from influence_core.tasks.metrics import rouge  # only where it is needed: it takes long to import

        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_target_length,
            do_sample=False,
            num_beams=1,
        )
        references = [self.text(labels[labels != IGNORED]) for labels in batch["labels"]]
        scores = rouge([self.text(tokens) for tokens in written], references)
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}

    def metrics(self, values):
        scores = {name: float(each.mean()) for name, each in values.items() if name.startswith("rouge")}
        return {"loss": float(self.mean_loss(values)), **scores}

    def query_metrics(self, values):
        return {
            "mean query loss": float((values[MEASUREMENT] / values[self.count_name]).mean()),
            "ROUGE-L": float(values["rougeL"].mean()),
        }
