"""What an analysis takes on a card, by a model of it: operation by operation, without one.

    python -m tests.benchmarks.roofline --card H100 --precision bf16
    python -m tests.benchmarks.roofline --card A100 --precision float32 --track all --operations 10

Every figure is modelled, see README.md; what is assumed is in cards.py.
"""

import argparse
import contextlib
import io
import time
from dataclasses import fields

from tests.benchmarks.roofline.analysis import Size, model_analysis
from tests.benchmarks.roofline.cards import CARDS
from tests.benchmarks.roofline.clock import Clock, Spent
from tests.benchmarks.roofline.evaluation import model_evaluation


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    arguments = parse(argv)
    size = Size(**{field.name: getattr(arguments, field.name) for field in fields(Size)})
    start, printed = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        clock, study = model_analysis(CARDS[arguments.card], arguments.precision, size)
    took = time.perf_counter() - start
    print(f"Modelled in {took:.0f} s: {CARDS[arguments.card].name}, {arguments.precision}, {size}")
    print(printed.getvalue())
    print(table(clock))
    if arguments.operations:
        print(operations(clock, arguments.operations))
    if arguments.evaluation:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            clock = model_evaluation(CARDS[arguments.card], arguments.precision, size)
        print(f"\n{table(clock)}")
        if arguments.operations:
            print(operations(clock, arguments.operations))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--precision", choices=("bf16", "float32", "tf32"), default="bf16")
    parser.add_argument("--operations", type=int, default=0, help="that take the longest, of each stage")
    parser.add_argument("--evaluation", action="store_true", help="train.py's as well, in a table of its own")
    for field in fields(Size):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def table(clock: Clock) -> str:
    """A row for each part of each stage, and their sum, which is the time from the first operation to the last."""
    rows = [("stage", "PFLOP", "TB", "device s", "host s", "seconds")]
    whole = Spent()
    for (stage, part), places in clock.account.items():
        spent = Spent()
        for each in places.values():
            spent.add(each)
        whole.add(spent)
        rows.append((f"{stage}{', ' * bool(part)}{part}", *_cells(spent)))
    rows.append(("Total", *_cells(whole)))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)


def _cells(spent: Spent) -> tuple[str, ...]:
    numbers = spent.flops / 1e15, spent.bytes / 1e12, spent.device, spent.host, spent.wall
    return tuple(f"{number:.2f}" if number >= 1 else f"{number:.3g}" for number in numbers)


def operations(clock: Clock, count: int) -> str:
    """The most expensive of each part, with the function of the project that called them."""
    lines = []
    for (stage, part), places in clock.account.items():
        lines.append(f"-- {stage}{', ' * bool(part)}{part}")
        ranked = sorted(places.items(), key=lambda pair: -max(pair[1].device, pair[1].host))
        for (where, operation, sizes), spent in ranked[:count]:
            seconds = max(spent.device, spent.host)
            counts = f"{spent.flops / 1e15:7.3f} PFLOP {spent.bytes / 1e12:6.2f} TB"
            rate = f"{spent.flops / seconds / 1e12:4.0f} TFLOP/s"
            lines.append(f"   {seconds:7.3f} s {counts} {rate} x{spent.calls:<6} {operation} {sizes}  {where}")
    return "\n".join(lines)
