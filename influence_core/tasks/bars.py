"""Progress bars of other libraries: on a terminal those of what takes long, else none.

What a user set in the environment holds.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from influence_core.progress import is_terminal
from influence_core.tasks.example import is_main_process

LONG_BYTES = 500_000_000  # files of so many are some ten seconds of reading
MOST_FILES = 10_000  # of a directory, that are looked at


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """None of transformers, whose work is short; those of downloads on a terminal."""
    were_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # of both libraries
        yield
        return
    transformers_logging.disable_progress_bar()  # of both
    if were_shown[1] and is_terminal() and is_main_process():
        enable_progress_bars()
    try:
        yield
    finally:
        if were_shown[0]:
            transformers_logging.enable_progress_bar()
        if were_shown[1]:
            enable_progress_bars()


@contextmanager
def bars_of_datasets(place: str) -> Iterator[None]:
    """Those of the datasets library, which reads a file, a directory or a dataset of the Hub meanwhile."""
    import datasets  # only where it is needed: it takes long to import

    were_shown = not datasets.are_progress_bars_disabled()
    is_set = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if is_set or not were_shown or (is_terminal() and is_main_process() and _is_long(Path(place))):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _is_long(place: Path) -> bool:
    """Whether reading it takes long; a download does."""
    if not place.exists():
        return True
    files = (path for path in itertools.islice(place.rglob("*"), MOST_FILES)) if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.is_file()) >= LONG_BYTES
