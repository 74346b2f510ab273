"""Which pages report.py and analyze.py --report write, and what of the stored results each of them shows."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_core.errors import UserError
from influence_core.experiments.score_sources import is_for_itself
from influence_core.files import link_or_copy, write_whole
from influence_core.report.analysed import Analysed
from influence_core.report.page import write_page
from influence_core.scores import parts, self_influence
from influence_core.scores.stored import SCORES
from influence_core.storage import StageStore
from influence_core.tasks.example import ExampleTask

PAGE, FIRST = "report", "report.html"
EXPERIMENTS = ("lds", "counterfactual")  # whose results lie in the output directory


def write_pages(
    task: ExampleTask,
    query_dataset: Sequence[Any],
    train_dataset: Sequence[Any],
    output_dir: Path,
    directories: Mapping[str, Path],
    matrices: Mapping[str, np.ndarray],
    arguments,
    record: Mapping[str, Any],
    origins: Sequence[str] | None = None,
) -> list[Path]:
    """Write a page for each kind of scores, report_<name>.html, with links to each other; report.html is the first's.

    Not that of the user's own queries, or of a sum, which stands beside those of the data's.

    Args:
        directories: {name: where the scores lie, and what was made of them}.
        matrices: {name: [queries, training examples]}.
        arguments: of the script, with `report_queries`.
        record: of the run that made them.
        origins: where each query is from, if not of the validation split.
    Returns:
        the files, in the order of the scores.
    Raises:
        UserError: one can't be written.
    """
    results = read_results(output_dir)
    first = next((name for name in matrices if not is_for_itself(directories[name])), None)
    files = {name: page_name(name) for name in matrices}
    for name, matrix in matrices.items():
        analysed = load_analysed(name, directories[name], matrix, record, results)
        others = [(other, file) for other, file in files.items() if other != name]
        if is_for_itself(directories[name]) and (output_dir / FIRST).exists():
            others.append(("of the data’s queries", FIRST))
        write_page(
            output_dir / files[name], task, query_dataset, train_dataset, analysed, arguments.report_queries,
            vars(arguments), others, origins,
        )  # fmt: skip
    paths = {name: output_dir / file for name, file in files.items()}
    if first is not None:
        write_whole(output_dir / FIRST, lambda temporary: link_or_copy(paths[first], temporary))
        paths[first] = output_dir / FIRST
    return list(paths.values())


def page_name(name: str) -> str:
    """Of the page of these scores."""
    return f"{PAGE}_{re.sub(r'[^a-zA-Z0-9.-]', '_', name)}.html"


def load_analysed(
    name: str, directory: Path, matrix: np.ndarray, record: Mapping[str, Any], results: Mapping[str, dict]
) -> Analysed:
    """The scores, with what lies beside them and is of them."""
    scores = StageStore(directory, "pairwise_scores", {})
    manifest = scores.manifest()
    if manifest is None:  # made elsewhere
        return Analysed(name, matrix, record=dict(record), results=dict(results))
    if record.get("scores", {}).get(name) != scores.checksum():
        record = {}  # of others
    return Analysed(
        name,
        matrix,
        manifest["settings"],
        manifest["counts"].get("scale"),
        _parts(directory, scores.checksum()),
        _self_influence(directory, manifest["settings"]),
        dict(record),
        dict(results),
    )


def _parts(directory: Path, checksum: str) -> parts.ScoreParts | None:
    """Of these very scores, where there are any."""
    try:
        return parts.load_score_parts(StageStore(directory, parts.STAGE, {"scores": checksum}))
    except UserError:  # of scores that were there before
        return None


def _self_influence(directory: Path, settings: Mapping[str, Any]) -> np.ndarray | None:
    """Of the same model and training set as the scores, where it was computed."""
    shared = ("model", "train_dataset", "tracked_layers", "dtype", "strategy", "damping", "checkpoints")
    try:
        stored = StageStore(directory, self_influence.STAGE, {key: settings[key] for key in shared}).load()
    except UserError:
        return None
    return None if stored is None else stored[self_influence.STAGE][SCORES].double().numpy()


def read_results(output_dir: Path) -> dict[str, dict]:
    """{experiment: what it stored}, of those that were made and can be read."""
    found = {}
    for name in EXPERIMENTS:
        try:
            result = json.loads((Path(output_dir) / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(result, dict):
            found[name] = result
    return found
