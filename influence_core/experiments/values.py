"""What a flag's value may be: refused here are those that no run could work with, in one line each."""

import argparse
import math
import re
from typing import Any

from influence_core.errors import UserError
from influence_core.experiments.flags import TRACKED
from influence_core.factors.strategies import STRATEGIES, damping_scale

AT_LEAST_ZERO = {"weight_decay", "show_queries", "num_train_epochs", "show_query", "removal_sizes", "label_smoothing"}
LARGEST = {  # beyond these, work would not end, or memory not do, on any machine
    "seed": 2**32 - 1,
    "vocab_size": 2**20,
    "num_train_epochs": 10**5,
    "block_size": 2**24,
    "max_length": 2**24,
    "max_source_length": 2**24,
    "max_target_length": 2**24,
    "lora_rank": 2**16,
    "num_masks": 10**5,
    "num_repeats": 10**4,
    "memory_budget_gb": 10**6,
    "progress_interval": 10**9,
}
LARGEST_INT, LARGEST_FLOAT = 2**40, 1e30  # of other flags
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of a file system
LONGEST_SUFFIX = 200  # there is more in the name
_NAMES = (
    "masks",
    "measurements",
    "scores",
    "scores_suffix",
    "query_file",
)  # flags that say where files are, beside ..._dir, ..._path
_OTHERS_SUFFIX = re.compile(r"half$|sum(_|$)|queries-")  # by which directories of other scores are known
_MAY_BE_EMPTY = ("separator", "source_prefix", "config_overrides")


def check_values(arguments: argparse.Namespace) -> None:
    """Raise UserError for the first value that can't be worked with."""
    for flag, given in vars(arguments).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_number(flag, value)
            elif isinstance(value, str):
                _check_text(flag, value)
    if (getattr(arguments, "subset_fraction", None) or 0.5) >= 1:
        raise UserError(f"--subset_fraction must be below 1, not {arguments.subset_fraction}")
    suffix = getattr(arguments, "scores_suffix", None)
    if suffix is not None and (not re.fullmatch(r"[\w.-]+", suffix) or _OTHERS_SUFFIX.match(suffix)):
        raise UserError(
            f"--scores_suffix is a word of letters, digits and -_. other than half, sum or queries-…, not {suffix!r}"
        )
    if getattr(arguments, "query_text", None) and arguments.query_file:
        raise UserError("--query_text and --query_file are both given: put all queries into the file")
    if getattr(arguments, "fsdp_shards", None) and not arguments.use_fsdp:
        raise UserError("--fsdp_shards says how --use_fsdp shares out parameters: give both, or leave it out")
    last = max(getattr(arguments, "save_at", None) or [0])
    if last and last > arguments.num_train_epochs:
        raise UserError(f"--save_at {last:g} is after the end of a training of {arguments.num_train_epochs} epochs")
    track = getattr(arguments, "track", None)
    if track not in (None, *TRACKED):
        raise UserError(f"--track is {' or '.join(TRACKED)}, not {track!r}")
    damping_scale(getattr(arguments, "damping_factor", None))
    strategies = getattr(arguments, "factor_strategy", None) or []
    if len(set(strategies)) < len(strategies):
        raise UserError(f"--factor_strategy names one twice: {' '.join(strategies)}")
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown:
        raise UserError(f"unknown factor strategy {unknown[0]!r}: choose from {', '.join(STRATEGIES)}")


def _check_number(flag: str, value: float) -> None:
    if flag == "seed" and not 0 <= value <= LARGEST[flag]:
        raise UserError(f"--seed must be from 0 to 2^32 - 1, not {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{flag} must be a finite number, not {value}")
    least_is_zero = flag in (*AT_LEAST_ZERO, "seed")
    if not (value >= 0 if least_is_zero else value > 0):
        raise UserError(f"--{flag} must be {'at least 0' if least_is_zero else 'positive'}, not {_short(value)}")
    largest = LARGEST.get(flag, LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT)
    if value > largest:
        raise UserError(f"--{flag} must be at most {largest:,}, not {_short(value)}")


def _check_text(flag: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{flag} {value} holds bytes that are no text in UTF-8") from None
    if not value.strip() and flag not in _MAY_BE_EMPTY:
        raise UserError(f"--{flag} is empty")
    if flag in _NAMES or flag.endswith(("_dir", "_path")):
        most = LONGEST_SUFFIX if flag == "scores_suffix" else LONGEST_NAME
        longest = max(len(part.encode()) for part in value.split("/"))
        if longest > most or len(value.encode()) > LONGEST_PATH:
            raise UserError(f"--{flag} is too long for the name of a file: {longest} bytes, at most {most}")


def _short(value: Any) -> str:
    """A number as it was given, unless it has hundreds of digits."""
    return str(value) if abs(value) < 10**30 or isinstance(value, float) else f"one of {len(str(value))} digits"
