"""How a script begins and ends: what it prints is safe to look at, and every end but success is one line.

exit code 2     bad input, a full disk, an output that nobody reads any more
130, 143        interrupted (Ctrl-C), terminated (SIGTERM): what was finished is stored
"""

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch.distributed as dist

from influence_core.errors import UserError, first_line
from influence_core.experiments.output import OutputError, safe_output
from influence_core.memory import is_out_of_memory
from influence_core.tasks.bars import quiet_libraries
from influence_core.tasks.example import is_main_process
from influence_core.text import visible
from influence_core.units import gigabytes

LONGEST_LINE = 900  # characters
LEAST_MEMORY = 2_000_000_000  # bytes of address space
GRACE_SECONDS = 5.0  # for a product in hand to end after a signal; then the process ends in its midst
INTERRUPTED = "what was finished is stored; the same command goes on from there"
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _Signalled(KeyboardInterrupt):
    """SIGTERM, as Ctrl-C is KeyboardInterrupt."""


def run_script(script: Callable[[], None]) -> None:
    """Run a script's main function; bad input ends it with one line (of each process that meets it) and exit code 2."""
    with safe_output(), quiet_libraries(), _signals():
        try:
            _refuse_little_memory()
            script()
            sys.stdout.flush()
        except UserError as error:
            _end(_error_line(str(error)), 2)
        except _Signalled:
            _end(f"{WORDS[signal.SIGTERM]}; {INTERRUPTED}" if is_main_process() else None, 128 + signal.SIGTERM)
        except KeyboardInterrupt:
            _end(f"{WORDS[signal.SIGINT]}; {INTERRUPTED}" if is_main_process() else None, 128 + signal.SIGINT)
        except OutputError as error:
            _end(_error_line(f"the output can't be written: {error}"), 2)
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if _is_of_another_process(error):
                _end(_error_line("another process of this job ended, whose own message says why"), 2)
            if not _is_short_of_memory(error):
                raise
            line = (
                f"out of memory ({first_line(error)}): give less data, smaller batches, or a higher limit (ulimit -v)"
            )
            _end(_error_line(line), 2)


def _is_of_another_process(error: Exception) -> bool:
    """Whether it is what a collective says when somebody left it."""
    told_by = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return dist.is_available() and dist.is_initialized() and any(text in str(error) for text in told_by)


def _refuse_little_memory() -> None:
    """With less, libraries abort the process where nobody can catch it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise UserError(f"this process may take {gigabytes(limit)} of address space (ulimit -v): give it "
                        f"{gigabytes(LEAST_MEMORY)} at least")  # fmt: skip


def _is_short_of_memory(error: Exception) -> bool:
    """Whether it is what a limit on a process's memory does to it, of which there are many kinds."""
    told_by = ("can't start new thread", "Cannot allocate memory", "failed to map segment")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and is_out_of_memory(error))
        or any(text in str(error) for text in told_by)
    )


def _error_line(text: str) -> str:
    whose = "" if is_main_process() else f" (process {os.environ['RANK']})"
    text = visible(" ".join(text.split()))
    if len(text) > LONGEST_LINE:  # it quotes what was given
        text = f"{text[: LONGEST_LINE // 2]} … {text[-LONGEST_LINE // 3 :]}"
    return f"error{whose}: {text}"


def _end(line: str | None, code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        if line:
            print(line, file=sys.stderr, flush=True)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM raises as Ctrl-C does; where the process is held up in a long product, it ends without coming back."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    was_signalled = False

    def raise_it(number, frame):
        nonlocal was_signalled
        was_signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun forwards what its whole group got already
        raise _Signalled

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    old_handler = signal.signal(signal.SIGTERM, raise_it)
    old_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    ended = threading.Event()
    threading.Thread(target=_end_in_time, args=(read_end, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(old_descriptor)
        if not was_signalled:
            signal.signal(signal.SIGTERM, old_handler)
        os.close(write_end)


def _end_in_time(descriptor: int, ended: threading.Event) -> None:
    """Wait for a signal that ends the process, and see that it does. All that is stored is whole at any time."""
    with open(descriptor, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in WORDS and not ended.wait(GRACE_SECONDS):
                if is_main_process():
                    os.write(2, f"{WORDS[number[0]]}; {INTERRUPTED}\n".encode())
                os._exit(128 + number[0])
