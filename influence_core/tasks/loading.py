"""Models, tokenizers and datasets from a local directory or the Hub; why one can't be had is said in a line."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub

from influence_core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

STOCK_PHRASE = "An error occurred while generating the dataset"  # of datasets, whatever the error
SHOWN_CHARACTERS = 400  # of a reason


def load_from(source: str, flag: str, load: Callable[[], Any], details: str = "") -> Any:
    """Load a model, tokenizer or dataset from a local directory or the Hub; UserError with advice otherwise.

    Args:
        details: the other flags that say what is loaded, for the message.
    """
    is_local = Path(source).is_dir()
    if not is_local:
        _work_offline_if_unreachable()
    try:
        return load()
    except Exception as error:  # loaders of other libraries raise what they like
        reason = _reason(error, source)
    if is_local:
        raise UserError(f"can't load {flag} {source}{details}: {reason}")
    raise UserError(
        f"can't load {flag} {source}{details}: it is no local directory, and it could not be had from the Hub (no "
        f"network, or no such name): give a local directory with {flag} ({reason})"
    )


def load_rows(source: str, config: str | None, split: str) -> "Dataset":
    """The rows of a split, or of parts such as "train[:10%]+test", of a directory or a dataset of the Hub."""
    from datasets import load_dataset, load_dataset_builder  # only where they are needed: they take long to import

    # Which file it is stands in what datasets logs of an error, not in the error.
    with overheard("datasets", lambda record: record.levelno >= logging.ERROR) as logged:
        try:
            files = None
            if Path(source).is_dir():
                # Else datasets reads all splits, and casts their cells to the types of the first one's: 7 to "7", and
                # a text beside a 7 to one in quotation marks.
                found = load_dataset_builder(source, config).config.data_files or {}
                names = re.findall(r"(?:^|\+)\s*(\w+)", split)
                files = {name: found[name] for name in names if name in found} or None
            return load_dataset(source, config, data_files=files, split=split)
        except Exception as error:
            for message in logged:
                error.add_note(message)
            raise


class Examples(Sequence):
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


@contextmanager
def overheard(library: str, is_meant: Callable[[logging.LogRecord], bool]) -> Iterator[list[str]]:
    """The messages that are meant, of those that a library logs meanwhile; they don't get to the screen."""
    messages: list[str] = []

    def is_for_the_screen(record: logging.LogRecord) -> bool:
        if is_meant(record):
            messages.append(record.getMessage())
            return False
        return True

    handlers = list(logging.getLogger(library).handlers)
    for handler in handlers:
        handler.addFilter(is_for_the_screen)
    try:
        yield messages
    finally:
        for handler in handlers:
            handler.removeFilter(is_for_the_screen)


def _reason(error: Exception, source: str) -> str:
    """The outermost message of an error and its causes that tells something, and the file that is to blame."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    messages = (f"no such key {each}" if isinstance(each, KeyError) else _first_sentence(str(each)) for each in chain)
    reason = next((text for text in messages if text and not text.startswith(STOCK_PHRASE)), type(error).__name__)
    file = re.search(r"'([^']+)' with error", "".join(getattr(error, "__notes__", [])))
    if file and file[1] not in reason:
        reason += f" ({file[1]})"
    files = (
        path for pattern in ("", "*/") for path in sorted(Path(source).glob(f"{pattern}[!._]*.*")) if path.is_file()
    )
    empty = next((path for path in files if not path.stat().st_size), None)
    return f"{empty} is empty ({reason})" if empty else reason


def _first_sentence(text: str) -> str:
    """In one line, though it may have run over several: what comes after it is mostly how to report a bug."""
    lines = []
    for line in map(str.strip, text.strip().splitlines()):
        lines.append(line)
        if line.endswith("."):
            break
    sentence = " ".join(lines)
    if len(sentence) <= SHOWN_CHARACTERS:
        return sentence
    return f"{sentence[: SHOWN_CHARACTERS // 2]} … {sentence[-SHOWN_CHARACTERS // 2 :]}"


@cache
def _work_offline_if_unreachable() -> None:
    """One quick look whether the Hub answers; if not, only its cache on disk is used, without minutes of retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the session's library raises: there is no way to the Hub
        import datasets  # only where it is needed: it takes long to import

        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
