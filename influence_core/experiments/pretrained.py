"""Model, tokenizer and rows of an example: from the Hub, from directories in its layout, or from scratch."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from influence_core.errors import UserError
from influence_core.experiments.columns import Kind, Text, check_columns
from influence_core.experiments.demo_corpus import DEMO_CORPUS, demo_corpus, train_tokenizer
from influence_core.experiments.example import ExampleTask, is_main_process, parse_overrides, take
from influence_core.experiments.loading import load_from, load_rows
from influence_core.experiments.weights import load_weights, require_a_start, require_whole

if TYPE_CHECKING:
    from datasets import Dataset


# What the demos of the examples have in common: two kinds of scores to compare, and few retrainings.
DEMO_DEFAULTS = {
    "dataset_name_or_path": DEMO_CORPUS,
    "vocab_size": 2048,
    "factor_strategy": ["ekfac", "identity"],
    "num_masks": 10,
    "num_repeats.evaluate_lds": 2,
}

MODEL_FLAG = "--model_name_or_path"


class _Parts(Sequence):
    """The examples of some rows, a part of them made when one of its examples is first asked for."""

    def __init__(self, rows, rows_at_once: int, make: Callable[[list[dict]], list[Any]]):
        self.rows, self.rows_at_once, self.make = rows, rows_at_once, make
        self.made: dict[int, list[Any]] = {}
        self.num_parts = -(-len(rows) // rows_at_once)

    def part(self, number: int) -> list[Any]:
        if number not in self.made:
            rows = self.rows[number * self.rows_at_once : (number + 1) * self.rows_at_once]
            if not isinstance(rows, list):  # a Dataset gives columns
                rows = [dict(zip(rows, values)) for values in zip(*rows.values())]
            self.made[number] = self.make(rows)
        return self.made[number]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if isinstance(index, range):  # of a slice
            return [self[each] for each in index]
        return self.part(index // self.rows_at_once)[index % self.rows_at_once]


class PretrainedTask(ExampleTask):
    """An example whose flags name a model, a tokenizer and a dataset; what is left is what the task is about."""

    auto_model: ClassVar[type]  # such as AutoModelForCausalLM
    config_class: ClassVar[type[PretrainedConfig]]  # of models from scratch
    columns: ClassVar[dict[str, Kind]]  # that the dataset must have: {"sentence": Text(), "label": Label(2)}
    follows: ClassVar[dict[str, str]] = {}  # {field of a stored config: the field whose override it follows}
    tokenizer_style: ClassVar[str]  # whose special tokens a new tokenizer gets, see train_tokenizer
    pads: ClassVar[bool] = True  # whether `collate` needs the tokenizer's padding
    one_example_a_row: ClassVar[bool] = True
    rows_at_once: ClassVar[int] = 1000  # of the dataset, that are made into examples together

    def __init__(
        self, model_name_or_path, tokenizer_name_or_path, config_overrides, dataset_name_or_path, dataset_config,
        train_split, validation_split, vocab_size,
    ):  # fmt: skip
        self.model_source, self.tokenizer_source = model_name_or_path, tokenizer_name_or_path
        self.config_overrides = parse_overrides(config_overrides or "")
        self.dataset_source, self.dataset_config = dataset_name_or_path, dataset_config
        self.split_sources = {"train": train_split or "train", "validation": validation_split or "validation"}
        self.vocab_size = vocab_size
        self._splits: dict[str, Sequence[Any]] = {}  # the examples, by split

    @staticmethod
    def add_arguments(parser):
        parser.add_argument(MODEL_FLAG, help="model to start from: a Hub id or a directory; a directory "
                            "with only a config starts from scratch")  # fmt: skip
        parser.add_argument("--tokenizer_name_or_path", help="where it is not with the model")
        parser.add_argument("--config_overrides", help="key=value,… of the model's config: trains that from scratch")
        parser.add_argument("--dataset_name_or_path", help="a Hub id or a directory in the Hub's layout")
        parser.add_argument("--dataset_config", help="configuration of the dataset, such as wikitext-2-v1")
        parser.add_argument("--train_split", help="what to train on: train, or a part such as 'train[:20%%]'")
        parser.add_argument("--validation_split", help="where queries come from: validation, test, or a part of one")
        parser.add_argument("--vocab_size", type=int, help="from scratch: train a byte-level BPE of that size on the "
                            "training text")  # fmt: skip

    # -------------------------------------------------------------------------------------------- what the task says

    @abstractmethod
    def tokenized(self, rows: list[dict]) -> list[Any]:
        """The examples of some rows of the dataset."""

    def demo_rows(self, split: str) -> list[dict]:
        """What the demo has in place of the dataset's rows."""
        raise UserError(f"--dataset_name_or_path {DEMO_CORPUS} is not for this example")

    def tokenizer_texts(self) -> list[str]:
        """The text that a new tokenizer is trained on; by default, what the training set's columns of text hold."""
        if self.is_demo:
            return list(demo_corpus().values())
        rows = self.rows("train")
        return [text for column, kind in self.columns.items() if isinstance(kind, Text) for text in rows[column]]

    def config_values(self) -> dict[str, Any]:
        """What the config of a model from scratch takes from the tokenizer and the task."""
        ids = {f"{which}_token_id": getattr(self.tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
        return {"vocab_size": len(self.tokenizer)} | {key: value for key, value in ids.items() if value is not None}

    def adapt_config(self, config: PretrainedConfig) -> None:
        """Change the config of any model before it is made, where the task knows better."""

    # ------------------------------------------------------------------------------------------------- what is shared

    @property
    def is_demo(self) -> bool:
        """Whether the data is the corpus that every Python carries."""
        return self.dataset_source == DEMO_CORPUS

    @cached_property
    def tokenizer(self):
        if self.checkpoint_dir is None and self._trains_tokenizer:
            origin = "the tokenizer that --vocab_size trains"
            tokenizer = train_tokenizer(self.tokenizer_texts(), self.vocab_size, self.tokenizer_style)
        else:
            source, flag = self.tokenizer_source or self.model_source, "--tokenizer_name_or_path"
            if self.checkpoint_dir is not None:
                source, flag = self.checkpoint_dir, "--checkpoint_dir"
            if source is None:
                raise UserError("no tokenizer: name one with --tokenizer_name_or_path")
            origin = f"the tokenizer of {flag} {source}"
            tokenizer = load_from(source, flag, lambda: AutoTokenizer.from_pretrained(source))
            num_special = len(tokenizer.all_special_tokens)
            if len(tokenizer) <= num_special:  # what transformers makes of a directory without a tokenizer
                raise UserError(f"there is no tokenizer in {flag} {source}")
        if self.pads and tokenizer.pad_token_id is None:
            raise UserError(f"{origin} has no pad token, which {self.name} needs: give it one, or name another")
        return tokenizer

    def load_model(self, checkpoint_dir):
        self.checkpoint_dir = checkpoint_dir or self.checkpoint_dir
        if checkpoint_dir is None and self._starts_from_scratch:
            model = self._from_scratch()
        else:
            model = self._from_weights(checkpoint_dir)
        num_words, num_embeddings = len(self.tokenizer), model.get_input_embeddings().num_embeddings
        if num_words > num_embeddings:
            remedy = "name the model's own with --tokenizer_name_or_path, or let --config_overrides set no vocab_size"
            if self.checkpoint_dir is not None:
                remedy = f"the tokenizer's files in {self.checkpoint_dir} are not those of the model's training"
            raise UserError(
                f"the tokenizer has {num_words} words, the model only {num_embeddings} embeddings: {remedy}"
            )
        return model

    def _from_weights(self, checkpoint_dir: str | None) -> nn.Module:
        """A checkpoint, which has to be whole; or the initial model, whose head may be new."""
        source, flag = checkpoint_dir or self.model_source, "--checkpoint_dir" if checkpoint_dir else MODEL_FLAG

        def load():
            config = AutoConfig.from_pretrained(source)
            self.adapt_config(config)
            return load_weights(self.auto_model, source, config)

        model, differences = load_from(source, flag, load)
        if checkpoint_dir:
            require_whole(model, differences, f"{flag} {source}")
        else:
            note = require_a_start(model, differences, f"{flag} {source}")
            if note and is_main_process():
                print(note)
        return model

    def _from_scratch(self) -> nn.Module:
        unknown = [key for key in self.config_overrides if not hasattr(self.config_class(), key)]
        if unknown:
            raise UserError(f"--config_overrides: a {self.config_class.__name__} has no {', '.join(unknown)}")
        values = {**self.config_values(), **self.config_overrides}
        try:
            config_class, stored = self.config_class, {}
            if self.model_source and Path(self.model_source, "config.json").is_file():
                config_class = type(AutoConfig.from_pretrained(self.model_source))
                stored, _ = config_class.get_config_dict(self.model_source)
                stored = {key: value for key, value in stored.items() if self.follows.get(key) not in values}
            config = config_class(**{**stored, **values})
            self.adapt_config(config)
            model = self.auto_model.from_config(config)
        except Exception as error:  # transformers checks a config in many ways
            raise UserError(f"no model can be made with this config: {' '.join(str(error).split())}") from None
        if is_main_process():
            print(
                f"Training from scratch: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary "
                f"{config.vocab_size}"
            )
        return model

    @property
    def _starts_from_scratch(self) -> bool:
        """With --config_overrides, or from a local directory without weights."""
        is_local = self.model_source is None or Path(self.model_source).is_dir()
        return bool(self.config_overrides) or (is_local and not self._has_weights)

    @property
    def _trains_tokenizer(self) -> bool:
        return bool(self.tokenizer_source is None and self._starts_from_scratch and self.vocab_size)

    @property
    def _has_weights(self) -> bool:
        directory = Path(self.model_source or "/nowhere")
        return any(itertools.chain(directory.glob("*.safetensors*"), directory.glob("pytorch_model*")))

    def load_dataset(self, split, indices=None):
        if split not in self._splits:
            self._splits[split] = self.make_examples(split)
        if not self._splits[split]:
            raise UserError(f"the {split} split has no example")
        return take(self._splits[split], indices)

    def make_examples(self, split: str) -> Sequence[Any]:
        """All examples of a split; made when they are asked for, where each row gives one."""
        parts = _Parts(self.demo_rows(split) if self.is_demo else self.rows(split), self.rows_at_once, self.tokenized)
        if self.one_example_a_row:
            return parts
        return [example for number in range(parts.num_parts) for example in parts.part(number)]

    def rows(self, split: str) -> "Dataset":
        """The dataset's rows of "train" or "validation", or of the part that stands for it."""
        config = f" --dataset_config {self.dataset_config}" if self.dataset_config else ""
        rows = load_from(
            self.dataset_source,
            "--dataset_name_or_path",
            lambda: load_rows(self.dataset_source, self.dataset_config, self.split_sources[split]),
            f" (--{split}_split {self.split_sources[split]}{config})",
        )
        check_columns(rows, self.columns, self.dataset_source, self.split_sources[split])
        return rows
