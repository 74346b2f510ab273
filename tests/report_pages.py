"""Pages for the tests: a task whose examples are given texts, and scores, with parts or without, made up."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from influence_core.report.analysed import Analysed
from influence_core.scores.parts import SHOWN_EACH, ScoreParts, shown_pairs
from influence_core.tasks.example import Segment

LAYERS = ["model.wte (table)"]
LAYERS += [f"model.h.{block}.{name}" for block in range(2) for name in ("attn.c_attn", "mlp.c_fc")]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: whatever a text holds comes through."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class TextTask:
    """What the page asks of a task: an example is a text, or a list of them, each a row."""

    name, measured, aim = "texts", "loss", "say it"

    def __init__(self, tokenizer=None, titles=None):
        self.tokenizer, self.titles = tokenizer or byte_tokenizer(), titles

    def token_rows(self, example):
        rows = [example] if isinstance(example, str) else example
        return {"input_ids": [self.tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in rows]}

    def segments(self, example):
        if self.titles is None:
            return [Segment("", "input_ids", row) for row in range(len(self.token_rows(example)["input_ids"]))]
        return [Segment(title, "input_ids", row, is_right=row == 1) for row, title in enumerate(self.titles)]

    def describe(self, example):
        return example if isinstance(example, str) else "\n".join(map(str, example))

    def origin(self, split, index):
        return f"row {index}" if split == "train" else None

    def topic(self, example):
        return None


def made_up(task, queries, train, has_parts=True, scores=None, name="ekfac", **known) -> Analysed:
    """Scores of these examples, drawn at random if not given, and parts that sum to them."""
    rng = np.random.default_rng(0)
    if scores is None:
        scores = rng.standard_normal((len(queries), len(train))).astype(np.float32) * 1000
    settings = {"model": "m", "train_dataset": "t", "query_dataset": "q", "damping": 0.1, "dtype": "float32"}
    parts = parts_of(task, queries, train, scores, rng) if has_parts else None
    return Analysed(name, scores, settings, 100.0, parts, **known)


def parts_of(task, queries, train, scores, rng) -> ScoreParts:
    pairs = shown_pairs(torch.from_numpy(scores), len(queries), SHOWN_EACH)

    def split(total, count):
        values = rng.standard_normal(count) * 100
        return torch.tensor(values + (total - values.sum()) / count, dtype=torch.float32)

    def num_tokens(example):
        return sum(map(len, task.token_rows(example)["input_ids"])) + 1

    totals = [float(scores[pair]) for pair in pairs]
    return ScoreParts(
        pairs,
        LAYERS,
        torch.stack([split(total, len(LAYERS)) for total in totals]),
        [split(total, num_tokens(train[index])) for total, (_, index) in zip(totals, pairs)],
        [split(total, num_tokens(queries[query])) for total, (query, _) in zip(totals, pairs)],
    )
