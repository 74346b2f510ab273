"""Causal language models: each token is predicted from those before it."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from influence_core.errors import UserError
from influence_core.losses import IGNORED
from influence_core.task import EXAMPLE_INDEX
from influence_core.tasks.columns import Text
from influence_core.tasks.example import MEASUREMENT
from influence_core.tasks.language_model import LanguageModelTask
from influence_core.tasks.observed import undisturbed
from influence_core.tasks.pretrained import PretrainedTask
from influence_core.tasks.prompts import PROMPT_FLAG, Prompt
from influence_core.tasks.rows import UnfitRow
from influence_core.tasks.transformer import pad, topic_of

SEPARATOR = "\n"  # between a prompt and its answer


# What later tokens may change of the logits, relative to these: rounding. Attention that is hardly trained, which is
# about the same wherever it looks, changes a few times as much.
UNSEEN, UNSEEN_BY_16_BITS = 1e-5, 1e-3


class CausalLMTask(LanguageModelTask):
    """Texts joined and cut into blocks of `block_size` tokens; or texts, or prompts and answers, of at most so many.

    An example is {"input_ids", and "labels" of the same length where not every token carries loss}: of prompts and
    answers, the answers' tokens do. The measurement is the summed cross-entropy.
    """

    auto_model, config_class = AutoModelForCausalLM, GPT2Config
    tokenizer_style, pads = "gpt2", False  # many have no pad token, and what is padding is masked whatever stands there
    position_limits = {"input_ids": "block_size"}
    count_name = "positions"
    joins_rows = True  # the texts of `rows_at_once` rows, end to end; what remains after the last block is dropped
    has_answers = False  # prompts and their answers, in place of texts

    def __init__(
        self, block_size, text_column=None, prompt_column=None, answer_column=None, separator=None,
        one_row_one_example=None, **flags,
    ):  # fmt: skip
        super().__init__(**flags)
        self.block_size = block_size
        self.separator = SEPARATOR if separator is None else separator
        self.has_answers = bool(prompt_column or answer_column)
        if self.has_answers:
            if text_column:
                raise UserError("--text_column is for whole texts, --prompt_column and --answer_column for two parts")
            self.prompt = Prompt(PROMPT_FLAG, ["prompt"], prompt_column)
            self.columns = self.prompt.columns | {"answer": Text(may_be_blank=False)}
            self.named_columns = self.prompt.named_columns | {"answer": ("--answer_column", answer_column)}
        else:
            (name,) = self.columns
            self.named_columns = {name: ("--text_column", text_column)}
            if one_row_one_example:
                self.columns = {name: Text(may_be_blank=False)}
        self._rows_of: dict[str, list[tuple[int, int]]] = {}  # the first and the last of each block, by split
        self.joins_rows = self.joins_rows and not (one_row_one_example or self.has_answers)
        if block_size < 2:
            raise UserError(f"--block_size must be at least 2, so that there is a next token, not {block_size}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--block_size", type=int, help="tokens of a sequence")
        parser.add_argument("--text_column", help="the dataset's column of text, where it has several")
        parser.add_argument(PROMPT_FLAG, nargs="+", help="with --answer_column: two texts a row, of which only the "
                            "answer carries loss; where both are too long, the prompt loses its beginning; it may be "
                            "of several columns, such as an instruction and its input")  # fmt: skip
        parser.add_argument("--answer_column", help="its column of answers, see --prompt_column")
        parser.add_argument("--separator", help="between a prompt, its parts and its answer [a line break]")
        parser.add_argument("--one_row_one_example", action="store_true", help="each row is an example of its own, cut "
                            "to --block_size, in place of rows joined and cut into blocks")  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- data

    @property
    def holds_out_the_end(self):
        return self.joins_rows

    def tokenized(self, rows):
        """Of rows that are an example each."""
        if self.has_answers:
            return [answered | topic_of(row) for answered, row in zip(self._answered(rows), rows)]
        (column,) = self.columns
        texts = [row[column].rstrip("\n") for row in rows]
        tokens = self.tokens(texts, self.block_size)
        for index, (text, ids) in enumerate(zip(texts, tokens)):
            if len(ids) < 2:
                raise UnfitRow(
                    index, f"has {text[:40]!r}, a text of {len(ids)} tokens, and it takes two to predict one"
                )
        return [{"input_ids": torch.as_tensor(ids).long()} | topic_of(row) for ids, row in zip(tokens, rows)]

    def _answered(self, rows: list[dict]) -> Iterator[dict[str, Tensor]]:
        """Prompt, answer and the end's token, as one sequence."""
        texts = [text + self.separator for text in self.prompt.texts(rows, self.separator)]
        prompts = self.tokenizer(texts, verbose=False)["input_ids"]
        answers = self.tokenizer([row["answer"] for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        for index, (prompt, answer) in enumerate(zip(prompts, answers)):
            if prompt and prompt[-1] == end and len(prompt) > 1:
                prompt = prompt[:-1]
            answer = (answer + [end] * (end is not None))[: self.block_size - 1]
            room = self.block_size - len(answer)
            if len(prompt) > room:  # its end is nearest to the answer
                kept = [begin] if prompt[0] == begin and room > 1 else []
                prompt = kept + prompt[len(prompt) - room + len(kept) :]
            if not prompt:
                raise UnfitRow(index, "has no prompt that is a token, and nothing predicts its answer's first")
            tokens = torch.tensor(prompt + answer)
            yield {"input_ids": tokens, "labels": tokens.clone().index_fill(0, torch.arange(len(prompt)), IGNORED)}

    def blocks(self, texts: list[str]) -> list[Tensor]:
        """The texts joined and cut into whole blocks."""
        return [block for block, _, _ in self._blocks(texts)]

    def _blocks(self, texts: list[str]) -> list[tuple[Tensor, int, int]]:
        """(block, the first and the last text that it has tokens of)"""
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = torch.tensor(list(itertools.chain.from_iterable(rows)))
        whole = tokens[: len(tokens) // self.block_size * self.block_size].view(-1, self.block_size)
        of_text = torch.arange(len(rows)).repeat_interleave(torch.tensor(list(map(len, rows)), dtype=torch.long))
        return [
            (block, int(of_text[number * self.block_size]), int(of_text[(number + 1) * self.block_size - 1]))
            for number, block in enumerate(whole)
        ]

    def make_examples(self, split):
        if not self.joins_rows or self.is_demo:
            examples = super().make_examples(split)
        else:
            (column,) = self.columns
            texts, examples, self._rows_of[split] = self.rows(split)[column][:], [], []
            # A row does not run into the next: WikiText's end with their lines, others get an end.
            texts = [text if text.endswith("\n") or not text else f"{text}\n" for text in texts]
            for start in range(0, len(texts), self.rows_at_once):
                for block, first, last in self._blocks(texts[start : start + self.rows_at_once]):
                    examples.append({"input_ids": block})
                    self._rows_of[split].append((start + first, start + last))
        if self.joins_rows and not examples:
            raise UserError(f"the {split} split has not one block of {self.block_size} tokens: lower --block_size, or "
                            "take --one_row_one_example")  # fmt: skip
        return examples

    def origin(self, split, index):
        if split not in self._rows_of:
            return super().origin(split, index)
        return self.row_source.name(split, *self._rows_of[split][index])

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
        tokens, first = batch["input_ids"].clone(), (batch["input_ids"].shape[1] + 1) // 2
        tokens[:, first:] = (tokens[:, first:] - 1).abs()  # others of the vocabulary
        with undisturbed(model):
            before, after = (
                model(**inputs | {"input_ids": ids}).logits[:, :first] for ids in (batch["input_ids"], tokens)
            )
        unseen = UNSEEN if before.dtype.itemsize > 2 else UNSEEN_BY_16_BITS
        if (before - after).norm() > unseen * before.norm():
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
