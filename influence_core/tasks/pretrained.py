"""Model, tokenizer and rows of an example: from the Hub, from directories in its layout, or from scratch."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.constants import DEFAULT_REVISION
from transformers import AutoTokenizer, PretrainedConfig

from influence_core.errors import UserError
from influence_core.tasks.adapters import Lora, adapted_model, add_adapter, base_of, is_adapter, save
from influence_core.tasks.columns import Kind, Text, Wanted
from influence_core.tasks.demo_corpus import DEMO_CORPUS, demo_corpus, train_tokenizer
from influence_core.tasks.example import ExampleTask
from influence_core.tasks.loading import load_from
from influence_core.tasks.models import MODEL_FLAG, checkpoint_model, freeze, has_weights, new_model, start_model
from influence_core.tasks.rows import Examples, RowSource

if TYPE_CHECKING:
    from datasets import Dataset


TOKENIZER_CONFIG = "tokenizer_config.json"
DROPOUT = "drop"  # in the name of each field of a config that is one
# What the demos of the examples have in common: two kinds of scores to compare, and few retrainings.
DEMO_DEFAULTS = {
    "dataset_name_or_path": DEMO_CORPUS,
    "vocab_size": 2048,
    "factor_strategy": ["ekfac", "identity"],
    "num_masks": 10,
    "num_repeats.evaluate_lds": 2,
    "self_influence": True,
    "report_queries": 20,
    "report": True,
}


class PretrainedTask(ExampleTask):
    """An example whose flags name a model, a tokenizer and a dataset; what is left is what the task is about."""

    auto_model: ClassVar[type]  # such as AutoModelForCausalLM
    config_class: ClassVar[type[PretrainedConfig]]  # of models from scratch
    columns: dict[str, Kind]  # that the dataset must have: {"sentence": Text(), "label": Label(2)}; see named_columns
    tokenizer_style: ClassVar[str]  # whose special tokens a new tokenizer gets, see train_tokenizer
    pads: ClassVar[bool] = True  # whether `collate` needs the tokenizer's padding
    rows_at_once: ClassVar[int] = 1000  # of the dataset, that are made into examples together
    holds_out_the_end: bool = False  # where the dataset has nothing for validation: the last rows, not some of all
    # Columns are not among them: which of them there are decides what carries loss, so a checkpoint's stay.
    belonging = {
        "dataset_name_or_path": ("dataset_config", "train_split", "validation_split"),
        "model_name_or_path": ("config_overrides",),
    }
    flags_of_a_start = ("model_name_or_path", "tokenizer_name_or_path", "config_overrides", "vocab_size")

    def __init__(
        self, model_name_or_path, tokenizer_name_or_path, config_overrides, dataset_name_or_path, dataset_config,
        train_split, validation_split, vocab_size, lora_rank=None, lora_alpha=None, lora_target_modules=None,
        frozen_parameters=None,
    ):  # fmt: skip
        self.lora = Lora(lora_rank, lora_alpha, lora_target_modules) if lora_rank else None
        if self.lora is None and (lora_alpha or lora_target_modules):
            raise UserError("--lora_alpha and --lora_target_modules are of an adapter: give --lora_rank as well")
        self.columns = dict(self.columns)
        self.named_columns: dict[str, tuple] = {}  # {column: (flag, the dataset's name by that flag, …)}, see Wanted
        self.model_source, self.tokenizer_source = model_name_or_path, tokenizer_name_or_path
        self.config_overrides = parse_overrides(config_overrides or "")
        self.dataset_source, self.dataset_config = dataset_name_or_path, dataset_config
        self.split_sources = {"train": train_split, "validation": validation_split}
        self.vocab_size = vocab_size
        self.frozen_parameters = frozen_parameters
        self._splits: dict[str, Sequence[Any]] = {}  # the examples, by split

    @staticmethod
    def add_arguments(parser):
        parser.add_argument(MODEL_FLAG, help="model to start from: a Hub id or a directory; a directory "
                            "with only a config starts from scratch")  # fmt: skip
        parser.add_argument("--tokenizer_name_or_path", help="where it is not with the model")
        parser.add_argument("--config_overrides", help="key=value,… of the model's config: trains that from "
                            "scratch, or from the weights where only dropouts are named")  # fmt: skip
        parser.add_argument("--dataset_name_or_path", help="a Hub id, a directory in the Hub's layout, or a file "
                            "(.txt, .jsonl, .csv, .parquet)")  # fmt: skip
        parser.add_argument("--dataset_config", help="configuration of the dataset, such as wikitext-2-v1")
        parser.add_argument("--train_split", help="what to train on: train, or a part such as 'train[:20%%]'")
        parser.add_argument("--validation_split", help="where queries come from: validation, test, or a part of one "
                            "(default: validation, or a tenth of the rows where there is none)")  # fmt: skip
        parser.add_argument("--vocab_size", type=int, help="from scratch: train a byte-level BPE of that size on the "
                            "training text")  # fmt: skip

        parser.add_argument("--frozen_parameters", metavar="REGEX", help="leave parameters in whose name this is found "
                            "as they are: 'wte|wpe', say")  # fmt: skip
        parser.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank, and no other "
                            "weights of the model but a new head")  # fmt: skip
        parser.add_argument("--lora_alpha", type=float, help="their scale, times the rank [2 x --lora_rank]")
        parser.add_argument("--lora_target_modules", nargs="+", help="names of the layers that get one, or all-linear "
                            "[those that peft has for the model]")  # fmt: skip

    # -------------------------------------------------------------------------------------------- what the task says

    @abstractmethod
    def tokenized(self, rows: list[dict]) -> list[Any]:
        """The examples of some rows of the dataset."""

    def demo_rows(self, split: str) -> list[dict]:
        """What the demo has in place of the dataset's rows."""
        raise UserError(f"--dataset_name_or_path {DEMO_CORPUS} is not for this example")

    def demo_examples(self, split: str) -> Sequence[Any]:
        """All examples of the demo."""
        return Examples(self.demo_rows(split), self.rows_at_once, self.tokenized)

    def tokenizer_texts(self) -> list[str]:
        """The text that a new tokenizer is trained on; by default, what the training set's columns of text hold."""
        if self.is_demo:
            return list(demo_corpus().values())
        rows = self.rows("train")
        texts = (text for column, kind in self.columns.items() if isinstance(kind, Text) for text in rows[column])
        return [text for text in texts if text]

    def config_values(self) -> dict[str, Any]:
        """What the config of a model from scratch takes from the tokenizer and the task."""
        ids = {f"{which}_token_id": getattr(self.tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
        return {"vocab_size": len(self.tokenizer)} | {key: value for key, value in ids.items() if value is not None}

    def adapt_config(self, config: PretrainedConfig, is_start: bool) -> None:
        """Change or refuse the config of any model before it is made; `is_start`: of one that is to be trained."""
        if not is_start or self._starts_from_scratch:
            return
        unknown = [key for key in self.config_overrides if callable(getattr(config, key, len))]
        if unknown:
            raise UserError(f"--config_overrides: a {type(config).__name__} has no {', '.join(unknown)}")
        for key, value in self.config_overrides.items():
            setattr(config, key, value)

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
            revision = None
            if self.checkpoint_dir is not None:
                source, flag = self.checkpoint_dir, "--checkpoint_dir"
                if is_adapter(source) and not Path(source, TOKENIZER_CONFIG).is_file():
                    source, revision = (self.tokenizer_source, None) if self.tokenizer_source else base_of(source)
            if source is None:
                raise UserError("no tokenizer: name one with --tokenizer_name_or_path")
            origin = f"the tokenizer of {flag} {source}"
            tokenizer = load_from(
                source, flag, lambda: AutoTokenizer.from_pretrained(source, revision=revision or DEFAULT_REVISION)
            )
            num_special = len(tokenizer.all_special_tokens)
            if len(tokenizer) <= num_special:  # what transformers makes of a directory without a tokenizer
                raise UserError(f"there is no tokenizer in {flag} {source}")
        if self.pads and tokenizer.pad_token_id is None:
            raise UserError(f"{origin} has no pad token, which {self.name} needs: give it one, or name another")
        return tokenizer

    def load_model(self, checkpoint_dir):
        self.checkpoint_dir = checkpoint_dir or self.checkpoint_dir
        if is_adapter(self.checkpoint_dir):
            is_fresh = checkpoint_dir is None
            model = adapted_model(
                self.auto_model,
                self.checkpoint_dir,
                self.model_source,
                self.lora,
                self.adapt_config,
                is_fresh,
                self.shard_on,
            )
        elif self.lora and self.checkpoint_dir:
            raise UserError(f"--lora_rank: {self.checkpoint_dir} holds a whole model and no adapter")
        elif checkpoint_dir is None and self._starts_from_scratch:
            if self.lora:
                raise UserError(f"--lora_rank adapts a model that has weights: name one with {MODEL_FLAG}")
            values, overrides = self.config_values(), self.config_overrides
            model = new_model(
                self.auto_model, self.config_class, self.model_source, values, overrides, self.adapt_config
            )
        elif checkpoint_dir is None:
            if is_adapter(self.model_source):
                raise UserError(f"{MODEL_FLAG} {self.model_source} is an adapter, not a model: name its base model, "
                                f"{base_of(self.model_source)[0]}, or merge the two")  # fmt: skip
            model, new_weights = start_model(
                self.auto_model, self.model_source, MODEL_FLAG, self.adapt_config, shard_on=self.shard_on
            )
            if self.lora:
                model = add_adapter(model, self.lora, new_weights)
        else:
            model = checkpoint_model(self.auto_model, checkpoint_dir, self.adapt_config, self.shard_on)
        num_words, num_embeddings = len(self.tokenizer), len(model.get_input_embeddings().weight)
        if num_words > num_embeddings:
            remedy = "name the model's own with --tokenizer_name_or_path, or let --config_overrides set no vocab_size"
            if self.checkpoint_dir is not None:
                remedy = f"the tokenizer's files in {self.checkpoint_dir} are not those of the model's training"
            raise UserError(
                f"the tokenizer has {num_words} words, the model only {num_embeddings} embeddings: {remedy}"
            )
        if self.frozen_parameters is not None:
            freeze(model, self.frozen_parameters, "--frozen_parameters")
        return model

    @property
    def _starts_from_scratch(self) -> bool:
        """With --config_overrides of more than dropouts, which no weights are made for; or where there are none."""
        is_local = self.model_source is None or Path(self.model_source).is_dir()
        is_another = not all(DROPOUT in key for key in self.config_overrides)
        return is_another or (is_local and not has_weights(self.model_source))

    @property
    def _trains_tokenizer(self) -> bool:
        return bool(self.tokenizer_source is None and self._starts_from_scratch and self.vocab_size)

    def found_flags(self):
        return {} if self.is_demo or not self.dataset_source else {"dataset_config": self.row_source.config}

    def save_model(self, model, directory):
        save(model, directory)

    def load_dataset(self, split, indices=None):
        if split not in self._splits:
            self._splits[split] = self.make_examples(split)
        if not self._splits[split]:
            raise UserError(f"the {split} split has no example")
        examples = self._splits[split]
        return examples if indices is None else [examples[index] for index in indices]

    def make_examples(self, split: str) -> Sequence[Any]:
        """All examples of a split, made when they are asked for."""
        if self.is_demo:
            return self.demo_examples(split)
        return Examples(self.rows(split), self.rows_at_once, self.tokenized, partial(self._row_name, split))

    def _row_name(self, split: str, index: int) -> str:
        return f"{self.row_source.name(split, index)} of {self.dataset_source}"

    def rows(self, split: str) -> "Dataset":
        """The dataset's rows for "train" or "validation", their columns called as `columns` does."""
        return self.row_source.part(split).rows

    @cached_property
    def row_source(self) -> RowSource:
        """Where the rows come from."""
        wanted = {name: Wanted(kind, *self.named_columns.get(name, ())) for name, kind in self.columns.items()}
        usual = self.presets.get("full", {}).get("dataset_config")
        return RowSource(
            self.dataset_source, self.dataset_config, usual, self.split_sources, wanted, self.holds_out_the_end
        )

    def row_fields(self):
        """Columns as the dataset calls them: by their flags, or as they were found there."""
        if not self.is_demo:
            self.row_source.part("train")  # which finds them
        return {name: (each.given or name, each.kind) for name, each in self.row_source.wanted.items()}

    def examples_of(self, rows, name):
        return Examples(rows, self.rows_at_once, self.tokenized, name)[:]

    def origin(self, split, index):
        if self.is_demo:
            return None
        return self.row_source.name(split, index)


def parse_overrides(text: str) -> dict[str, Any]:
    """ "n_layer=4,n_embd=256" -> {"n_layer": 4, "n_embd": 256}; raises UserError for anything else."""
    overrides = {}
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--config_overrides takes key=value,key=value, not {part!r}")
        overrides[key.strip()] = number = _number(value.strip())
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"--config_overrides {part}: it must be a finite number")
    return overrides


def _number(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
