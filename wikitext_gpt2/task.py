"""WikiText-2 with GPT-2: a causal language model on blocks of text; the measurement is the summed cross-entropy."""

import itertools
import re
from functools import cached_property
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from influence_core.errors import UserError
from influence_core.experiments.demo_corpus import demo_corpus, train_tokenizer
from influence_core.experiments.example import (
    MEASUREMENT,
    ExampleTask,
    is_main_process,
    load_from,
    parse_overrides,
    take,
)
from influence_core.layers import trackable_layer_names
from influence_core.losses import linear_cross_entropy
from influence_core.task import EXAMPLE_INDEX

ROWS_PER_GROUP = 1000  # rows of text joined before they are cut into blocks; the rest of each group is dropped
HELD_OUT = 8  # of the blocks of a topic in the demo, every eighth is for validation
TRACKED = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
DEMO_CORPUS = "pydoc_data.topics"  # as --dataset_name_or_path: the corpus of the demo


class WikiTextTask(ExampleTask):
    """Blocks of `block_size` tokens; tracked are the attention and MLP layers of every block of GPT-2."""

    name = "wikitext_gpt2"
    presets = {
        "full": {
            "model_name_or_path": "openai-community/gpt2",
            "dataset_name_or_path": "Salesforce/wikitext",
            "dataset_config": "wikitext-2-raw-v1",
            "block_size": 512,
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
            "num_train_epochs": 3,
            "train_batch_size.train": 8,
            "eval_batch_size": 16,
            "damping_factor": "0.01x",  # the best by LDS, see README.md
            "query_batch_size": 32,
            "train_batch_size.analyze": 64,
            "factor_batch_size": 64,
        },
        "demo": {
            "checkpoint_dir": "demo/wikitext_gpt2/checkpoint",
            "output_dir": "demo/wikitext_gpt2/influence_results",
            "dataset_name_or_path": DEMO_CORPUS,
            "config_overrides": "n_layer=2,n_embd=192,n_head=6,n_positions=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
            "vocab_size": 2048,
            "block_size": 64,
            "learning_rate": 2e-3,
            "num_train_epochs": 5,
            "factor_strategy": ["ekfac", "identity"],
            "damping_factor": "0.01x",
            "show_queries": 3,
            "num_masks": 10,
            "num_repeats.evaluate_lds": 2,
            "figure_dir": "demo/wikitext_gpt2/figure",
        },
    }

    def __init__(
        self, model_name_or_path, tokenizer_name_or_path, config_overrides, dataset_name_or_path, dataset_config,
        train_split, validation_split, block_size, vocab_size,
    ):  # fmt: skip
        self.model_source, self.tokenizer_source = model_name_or_path, tokenizer_name_or_path
        self.config_overrides = parse_overrides(config_overrides or "")
        self.dataset_source, self.dataset_config = dataset_name_or_path, dataset_config
        self.split_sources = {"train": train_split or "train", "validation": validation_split or "validation"}
        self.block_size, self.vocab_size = block_size, vocab_size
        if block_size < 2:
            raise UserError(f"--block_size must be at least 2, so that there is a next token, not {block_size}")
        self.is_demo = dataset_name_or_path == DEMO_CORPUS

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--model_name_or_path", help="model to start from: a Hub id or a directory; a directory "
                            "with only a config starts from scratch")  # fmt: skip
        parser.add_argument("--tokenizer_name_or_path", help="where it is not with the model")
        parser.add_argument("--config_overrides", help="key=value,… of a GPT2Config: trains that model from scratch")
        parser.add_argument("--dataset_name_or_path", help="a Hub id or a directory in the Hub's layout")
        parser.add_argument("--dataset_config", help="configuration of the dataset, such as wikitext-2-v1")
        parser.add_argument("--train_split", help="what to train on: train, or a part such as 'train[:20%%]'")
        parser.add_argument("--validation_split", help="where queries come from: validation, test, or a part of one")
        parser.add_argument("--block_size", type=int, help="tokens of a sequence")
        parser.add_argument("--vocab_size", type=int, help="from scratch: train a byte-level BPE of that size on the "
                            "training text")  # fmt: skip

    # ------------------------------------------------------------------------------------------ model and tokenizer

    @cached_property
    def tokenizer(self):
        source, flag = self.tokenizer_source or self.model_source, "--tokenizer_name_or_path"
        if self.checkpoint_dir is not None:
            source, flag = self.checkpoint_dir, "--checkpoint_dir"
        elif self.tokenizer_source is None and self._starts_from_scratch and self.vocab_size:
            texts = list(demo_corpus().values()) if self.is_demo else self._rows("train")["text"]
            return train_tokenizer(texts, self.vocab_size)
        if source is None:
            raise UserError("no tokenizer: name one with --tokenizer_name_or_path")
        tokenizer = load_from(source, flag, lambda: AutoTokenizer.from_pretrained(source))
        num_special = len(tokenizer.all_special_tokens)
        if len(tokenizer) <= num_special:  # what transformers makes of a directory without a tokenizer
            raise UserError(f"there is no tokenizer in {flag} {source}")
        return tokenizer

    def load_model(self, checkpoint_dir):
        self.checkpoint_dir = checkpoint_dir or self.checkpoint_dir
        model = self._load_model(checkpoint_dir)
        num_positions = getattr(model.config, "max_position_embeddings", self.block_size)
        if self.block_size > num_positions:
            raise UserError(f"--block_size {self.block_size} is more than the model's {num_positions} positions")
        return model

    def _load_model(self, checkpoint_dir) -> nn.Module:
        if checkpoint_dir is not None:
            return load_from(checkpoint_dir, "--checkpoint_dir", lambda: _load_causal_lm(checkpoint_dir))
        if not self._starts_from_scratch:
            source = self.model_source
            return load_from(source, "--model_name_or_path", lambda: _load_causal_lm(source))
        unknown = [key for key in self.config_overrides if not hasattr(GPT2Config(), key)]
        if unknown:
            raise UserError(f"--config_overrides: a GPT2Config has no {', '.join(unknown)}")
        overrides = {"vocab_size": len(self.tokenizer), "activation_function": FUSED_GELU, **self.config_overrides}
        overrides |= {f"{which}_token_id": self.tokenizer.eos_token_id for which in ("bos", "eos")}
        try:
            if self.model_source and Path(self.model_source, "config.json").is_file():
                config = AutoConfig.from_pretrained(self.model_source, **overrides)
            else:
                config = GPT2Config(**overrides)
            model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # transformers checks a config in many ways
            raise UserError(f"no model can be made with this config: {' '.join(str(error).split())}") from None
        if is_main_process():
            print(f"Training from scratch: {config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}")
        return model

    @property
    def _starts_from_scratch(self) -> bool:
        """With --config_overrides, or from a local directory without weights."""
        is_local = self.model_source is None or Path(self.model_source).is_dir()
        return bool(self.config_overrides) or (is_local and not self._has_weights)

    @property
    def _has_weights(self) -> bool:
        directory = Path(self.model_source or "/nowhere")
        return any(itertools.chain(directory.glob("*.safetensors*"), directory.glob("pytorch_model*")))

    def tracked_layer_names(self, model):
        return [name for name in trackable_layer_names(model) if TRACKED.fullmatch(name)]

    # ------------------------------------------------------------------------------------------------------- data

    @cached_property
    def _splits(self) -> dict[str, list[dict]]:
        return self._demo_splits() if self.is_demo else {}

    def load_dataset(self, split, indices=None):
        if split not in self._splits:
            self._splits[split] = [{"input_ids": block} for block in self._blocks(split)]
        if not self._splits[split]:
            raise UserError(f"the {split} split has not one block of {self.block_size} tokens: lower --block_size")
        return take(self._splits[split], indices)

    def _rows(self, split):
        rows = load_from(
            self.dataset_source,
            "--dataset_name_or_path",
            lambda: load_dataset(self.dataset_source, self.dataset_config, split=self.split_sources[split]),
        )
        if "text" not in rows.column_names:
            raise UserError(f"{self.dataset_source} has no column 'text', only {', '.join(rows.column_names)}")
        return rows

    def _blocks(self, split) -> list[Tensor]:
        rows, blocks = self._rows(split), []
        for start in range(0, len(rows), ROWS_PER_GROUP):
            texts = rows[start : start + ROWS_PER_GROUP]["text"]
            blocks += self._cut(self.tokenizer(texts, verbose=False)["input_ids"])
        return blocks

    def _cut(self, tokenized: list[list[int]]) -> list[Tensor]:
        """Join token lists and cut them into whole blocks."""
        tokens = torch.tensor(list(itertools.chain.from_iterable(tokenized)))
        return list(tokens[: len(tokens) // self.block_size * self.block_size].view(-1, self.block_size))

    def _demo_splits(self):
        """Blocks of each topic by itself, so that a block has one topic; every eighth is held out."""
        splits = {"train": [], "validation": []}
        for topic, text in sorted(demo_corpus().items()):
            blocks = self._cut([self.tokenizer(text, verbose=False)["input_ids"]])
            for number, block in enumerate(blocks):
                split = "validation" if number % HELD_OUT == HELD_OUT - 1 else "train"
                splits[split].append({"input_ids": block, "topic": topic})
        return splits

    def collate(self, examples):
        return {"input_ids": torch.stack([example["input_ids"] for example in examples])}

    def describe(self, example):
        return self.tokenizer.decode(example["input_ids"]).strip()

    def topic(self, example):
        return example.get("topic")

    # ----------------------------------------------------------------------------------------------------- losses

    def train_loss(self, model, batch, sample_labels=None):
        tokens = batch["input_ids"]
        uniforms = None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], tokens.shape[1] - 1)
        return self.next_token_loss(model, tokens, tokens[:, 1:], uniforms)

    @staticmethod
    def next_token_loss(model, tokens, labels, uniforms=None) -> Tensor:
        """Summed cross-entropy of each position against labels [examples, positions - 1], given or sampled."""
        hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
        return linear_cross_entropy(hidden, model.lm_head.weight, labels, uniforms)

    def measurement(self, model, batch):
        return self.train_loss(model, batch)

    def training_loss(self, model, batch):
        # Through model(…), which may be wrapped for several processes; it makes the logits of one position at least.
        tokens = batch["input_ids"]
        output = model(tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = getattr(model, "module", model).lm_head
        return (
            linear_cross_entropy(output.hidden_states[-1][:, :-1], head.weight, tokens[:, 1:]) / tokens[:, 1:].numel()
        )

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        tokens = batch["input_ids"]
        hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
        head = model.lm_head.weight
        losses = [linear_cross_entropy(states, head, labels) for states, labels in zip(hidden, tokens[:, 1:])]
        losses = torch.stack(losses).double()
        return {MEASUREMENT: losses, "positions": torch.full_like(losses, tokens.shape[1] - 1)}

    def metrics(self, values):
        return {"perplexity": float((values[MEASUREMENT].sum() / values["positions"].sum()).exp())}

    def query_metrics(self, values):
        return {"mean query perplexity": float((values[MEASUREMENT] / values["positions"]).exp().mean())}


FUSED_GELU = "gelu_pytorch_tanh"  # the function that GPT-2's config calls gelu_new, as one kernel instead of eight


def _load_causal_lm(source) -> nn.Module:
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = FUSED_GELU
    return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
