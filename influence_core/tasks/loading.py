"""Models, tokenizers and datasets from a local directory or the Hub; why one can't be had is said in a line."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub

from influence_core.errors import UserError

STOCK_PHRASE = "An error occurred while generating the dataset"  # of datasets, whatever the error
SHOWN_CHARACTERS = 400  # of a reason


def load_from(source: str, flag: str, load: Callable[[], Any], details: str = "", local: str = "directory") -> Any:
    """Load a model, tokenizer or dataset from this machine or the Hub; UserError with advice otherwise.

    Args:
        details: the other flags that say what is loaded, for the message.
        local: what it may be on this machine.
    """
    is_local = Path(source).exists()
    if not is_local:
        _work_offline_if_unreachable()
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # loaders of other libraries raise what they like
        reason = _reason(error, source)
    if is_local:
        raise UserError(f"can't load {flag} {source}{details}: {reason}")
    raise UserError(
        f"can't load {flag} {source}{details}: it is no local {local}, and it could not be had from the Hub (no "
        f"network, or no such name): give a local {local} with {flag} ({reason})"
    )


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
    if any(isinstance(each, UnicodeDecodeError) for each in chain):
        reason += ": save it as UTF-8"
    if "because column names don't match" in reason:
        reason += ": its files have different columns, take those of one dataset"
    if unknown := re.match(r"Unrecognized configuration class .*\.(\w+)Config'> .* AutoModel: (\w+)", reason):
        reason = f"it is a {unknown[1]}, of which there is no {unknown[2]}: another folder's scripts may take it"
    file = re.search(r"'([^']+)' with error", "".join(getattr(error, "__notes__", [])))
    if file and file[1] not in reason:
        reason += f" ({file[1]})"
    globs = (sorted(Path(source).glob(f"{pattern}[!._]*.*")) for pattern in ("", "*/"))
    files = [Path(source), *itertools.chain.from_iterable(globs)]
    empty = next((path for path in files if path.is_file() and not path.stat().st_size), None)
    if empty:
        return f"{empty} is empty" + (f" ({reason})" if " " in reason else "")
    return reason


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


def pattern_of(flag: str, text: str | None) -> re.Pattern:
    """The regular expression that a flag gives; without one, that which is found everywhere.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(text or "")
    except re.error as error:
        raise UserError(f"{flag} {text!r} is no regular expression: {error}") from None
