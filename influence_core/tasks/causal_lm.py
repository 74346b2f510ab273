"""Causal language models: each token is predicted from those before it."""

import itertools

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from influence_core.errors import UserError
from influence_core.task import EXAMPLE_INDEX
from influence_core.tasks.example import MEASUREMENT
from influence_core.tasks.head import IGNORED
from influence_core.tasks.language_model import LanguageModelTask
from influence_core.tasks.observed import undisturbed
from influence_core.tasks.pretrained import PretrainedTask
from influence_core.tasks.transformer import pad, topic_of


class CausalLMTask(LanguageModelTask):
    """Texts of at most `block_size` tokens, or texts joined and cut into blocks of so many.

    An example is {"input_ids", and "labels" of the same length where not every token carries loss}. The measurement is
    the summed cross-entropy.
    """

    auto_model, config_class = AutoModelForCausalLM, GPT2Config
    tokenizer_style, pads = "gpt2", False  # many have no pad token, and what is padding is masked whatever stands there
    one_example_a_row = False
    position_limits = {"input_ids": "block_size"}
    count_name = "positions"
    joins_rows = True  # the texts of `rows_at_once` rows, end to end; what remains after the last block is dropped

    def __init__(self, block_size, **flags):
        super().__init__(**flags)
        self.block_size = block_size
        if block_size < 2:
            raise UserError(f"--block_size must be at least 2, so that there is a next token, not {block_size}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--block_size", type=int, help="tokens of a sequence")

    # ---------------------------------------------------------------------------------------------------------- data

    def tokenized(self, rows):
        (column,) = self.columns
        texts = [row[column] for row in rows]
        if self.joins_rows:
            return [{"input_ids": block} for block in self.blocks(texts)]
        tokens = self.tokens(texts, self.block_size)
        for text, ids in zip(texts, tokens):
            if len(ids) < 2:
                raise UserError(f"the text {text[:40]!r} has {len(ids)} tokens, and it takes two to predict one: leave "
                                "such rows out")  # fmt: skip
        return [{"input_ids": torch.as_tensor(ids).long()} | topic_of(row) for ids, row in zip(tokens, rows)]

    def blocks(self, texts: list[str]) -> list[Tensor]:
        """The texts joined and cut into whole blocks."""
        tokens = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = torch.tensor(list(itertools.chain.from_iterable(tokens)))
        return list(tokens[: len(tokens) // self.block_size * self.block_size].view(-1, self.block_size))

    def make_examples(self, split):
        examples = super().make_examples(split)
        if self.joins_rows and not examples:
            raise UserError(f"the {split} split has not one block of {self.block_size} tokens: lower --block_size")
        return examples

    def collate(self, examples):
        """Padded on the right, where no token sees it; without a mask where nothing is padded."""
        rows = [example["input_ids"] for example in examples]
        batch = {"input_ids": pad(rows, 0)}
        if len(set(map(len, rows))) > 1:
            batch["attention_mask"] = pad([torch.ones(len(row), dtype=torch.long) for row in rows], 0)
        if any("labels" in example for example in examples):
            batch["labels"] = pad([example.get("labels", example["input_ids"]) for example in examples], IGNORED)
        return batch

    def length(self, example):
        return len(example["input_ids"])

    @property
    def has_lengths(self):
        return not self.joins_rows

    def resized(self, example, lengths, tokens):
        return {"input_ids": super().resized(example, lengths, tokens)["input_ids"]}

    def describe(self, example):
        return self.tokenizer.decode(example["input_ids"]).strip()

    # --------------------------------------------------------------------------------------------------------- model

    def streams(self, batch):
        return {"input_ids": batch["input_ids"]}

    def real_positions(self, batch, stream):
        return batch.get("attention_mask")

    def model_inputs(self, model, batch):
        mask = batch.get("attention_mask")
        # Told its positions, so that padding on the left moves no token.
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        return self.accepted(model, input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions)

    @torch.no_grad()
    def observe_head(self, model, batch, observed):
        """Also whether the model counts positions from zero, so that it can be told them, and sees no later token."""
        inputs = self.model_inputs(model, batch)
        tokens = batch["input_ids"].clone()
        tokens[:, -1] = (tokens[:, -1] - 1).abs()  # another of the vocabulary
        with undisturbed(model):
            before, after = (
                model(**inputs | {"input_ids": ids}).logits[:, :-1] for ids in (batch["input_ids"], tokens)
            )
        if (before - after).norm() > 1e-3 * before.norm():
            raise UserError(
                f"this {type(model).__name__} is no causal language model: what it says of a token depends on later "
                "ones (its config may lack is_decoder)"
            )
        if "position_ids" in observed.accepts:
            told = inputs | {
                "position_ids": torch.arange(batch["input_ids"].shape[1], device=model.device).unsqueeze(0)
            }
            with undisturbed(model):
                own, counted = (model(**each).logits for each in (inputs, told))
            if (own - counted).norm() > 1e-3 * own.norm():
                observed.accepts -= {"position_ids"}
        super().observe_head(model, batch, observed)

    def labels(self, batch):
        labels, mask = batch.get("labels", batch["input_ids"]), batch.get("attention_mask")
        if mask is None:
            return labels
        # What padding on the left would predict, the first token, is no target either.
        before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
        return labels.masked_fill((mask & before) == 0, IGNORED)

    def targets(self, batch):
        return torch.nn.functional.pad(self.labels(batch)[:, 1:], (0, 1), value=IGNORED)

    def target_uniforms(self, sample_labels, batch):
        uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], batch["input_ids"].shape[1])
        mask = batch.get("attention_mask")
        return uniforms if mask is None else uniforms.gather(1, (mask.cumsum(1) - 1).clamp(min=0))

    # ------------------------------------------------------------------------------------------------------- figures

    def metrics(self, values):
        return {"perplexity": float(self.mean_loss(values).exp())}

    def query_metrics(self, values):
        return {"mean query perplexity": float((values[MEASUREMENT] / values[self.count_name]).exp().mean())}
