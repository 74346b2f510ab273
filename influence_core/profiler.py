"""The stage table: how long each action took, and how often it ran."""

import time
from contextlib import contextmanager

from influence_core.runtime import Runtime

ACTIONS = (
    "Fit Covariance",
    "Save Covariance",
    "Load Covariance",
    "Perform Eigendecomposition",
    "Save Eigendecomposition",
    "Load Eigendecomposition",
    "Fit Lambda",
    "Save Lambda",
    "Load Lambda",
    "Compute Pairwise Score",
    "Save Pairwise Score",
    "Load Pairwise Score",
)
OPTIONAL = ("Compute Self-Influence", "Compute Score Parts")  # in the table where they ran


class Profiler:
    """`with profiler("Fit Covariance"): …` adds one call to the table; actions do not nest."""

    def __init__(self, runtime: Runtime | None = None):
        self.runtime = runtime or Runtime()
        self.durations: dict[str, list[float]] = {action: [] for action in (*ACTIONS, *OPTIONAL)}

    @contextmanager
    def __call__(self, action: str):
        """Time a block, the device's pending work included; raises KeyError for an unknown action."""
        durations = self.durations[action]
        self.runtime.synchronize()
        start = time.perf_counter()
        yield
        self.runtime.synchronize()
        durations.append(time.perf_counter() - start)

    def total(self, action: str) -> float:
        """Seconds spent in an action, all calls."""
        return sum(self.durations[action])

    def table(self) -> str:
        """Every action with its mean duration, calls, total time and share of the whole."""
        whole = sum(map(sum, self.durations.values()))
        rows = [("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")]
        rows.append(("Total", "-", str(sum(map(len, self.durations.values()))), f"{whole:.4g}", "100"))
        for action, durations in self.durations.items():
            if action in OPTIONAL and not durations:
                continue
            total = sum(durations)
            mean = f"{total / len(durations):.4g}" if durations else "-"
            share = f"{100 * total / whole:.1f}" if whole else "0"
            rows.append((action, mean, str(len(durations)), f"{total:.4g}", share))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])
