"""report.py of every example: the page that shows stored scores."""

from pathlib import Path

from influence_core.errors import UserError
from influence_core.experiments.analysis_record import read_record
from influence_core.experiments.arguments import parse
from influence_core.experiments.pages import write_pages
from influence_core.experiments.running import run_script
from influence_core.experiments.score_sources import FILE, TFIDF, directory_of, load_all_scores
from influence_core.experiments.stored_results import StoredResults
from influence_core.files import require_writable
from influence_core.tasks.example import ExampleTask


def main(task_class: type[ExampleTask], description: str, argv: list[str] | None = None) -> None:
    """Write the page of scores that analyze.py stored."""
    run_script(lambda: _report(task_class, parse(task_class, "report", description, argv)))


def _report(task_class: type[ExampleTask], arguments) -> None:
    stored = StoredResults(task_class, arguments)
    if not stored.is_main:
        return
    names = arguments.scores or _last_run(stored.output_dir)
    if TFIDF in (names or ()):
        raise UserError(f"--scores {TFIDF}: a baseline that knows no model has no page")
    scores = load_all_scores(names, stored, baseline=False)
    require_writable(stored.output_dir)
    directories = {label: directory_of(name, stored.output_dir) for label, name in zip(scores, names or scores)}
    matrices = {label: each.matrix for label, each in scores.items()}
    paths = write_pages(
        stored.task, stored.query_dataset, stored.train_dataset, stored.output_dir, directories, matrices, arguments,
        read_record(stored.output_dir),
    )  # fmt: skip
    for path in paths:
        print(f"Report: {path}")


def _last_run(output_dir: Path) -> list[str] | None:
    """The scores that analyze.py made last, if they are all there; None: whichever there are."""
    names = list(read_record(output_dir).get("scores", ()))
    there = names and all((output_dir / f"scores_{name}" / FILE).exists() for name in names)
    return names if there else None
