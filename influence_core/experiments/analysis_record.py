"""What analyze.py notes of its run in the output directory: what was planned, and what it took."""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from influence_core.coverage import describe_coverage
from influence_core.files import Damaged, read_sealed_json, write_sealed_json
from influence_core.fingerprints import digest
from influence_core.profiler import ACTIONS, OPTIONAL
from influence_core.storage import StageStore
from influence_core.study import Study

RECORD = "analysis.json"
_FACTORS = ("Fit", "Perform")  # how the names of actions begin that make factors
_WORK = ("Fit", "Perform", "Compute")  # how the names of actions begin that are no reading or writing


def write_record(study: Study, scores: Mapping[str, StageStore]) -> Mapping[str, Any]:
    """Note the run of a study, unless it only read what was there; returns what is known of the run.

    A run for queries of the user's own, or for a sum, is not noted: the directory is that of the data's. Stages that it
    found finished keep the seconds of the run that computed them: those of factors, if it was of the same model and
    data, and the others if it made the very same scores.

    Args:
        scores: where those lie that it made, by name.
    """
    stages = {name: [len(times), sum(times)] for name, times in study.profiler.durations.items() if times}
    before = read_record(study.output_dir)
    if not any(name.startswith(_WORK) for name in stages):
        return before
    made = {name: store.checksum() for name, store in scores.items()}
    made_of = digest([repr(study.settings).encode()])
    earlier = before["stages"] if before.get("made_of") == made_of else {}
    if before.get("scores") != made:
        earlier = {name: stage for name, stage in earlier.items() if name.startswith(_FACTORS)}
    stages = earlier | stages
    runtime = study.runtime
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "scores": made,
        "made_of": made_of,
        "tracked": describe_coverage(study.model, study.layers),
        "device": _device(runtime.device),
        "precision": runtime.precision.description,
        "num_processes": runtime.world_size,
        "versions": versions,
        "planned_flops": study.planned_flops,
        "planned_memory": study.planned_memory,
        "peak_memory": runtime.peak_memory(),
        "stages": {name: stages[name] for name in (*ACTIONS, *OPTIONAL) if name in stages},
    }
    if not (study.own_queries or study.sum_queries):
        write_sealed_json(study.output_dir / RECORD, record)
    return record


def read_record(output_dir: Path) -> Mapping[str, Any]:
    """What the last run noted, {"scores": {name: checksum}, …}; empty where there is nothing that can be believed."""
    try:
        return read_sealed_json(Path(output_dir) / RECORD)
    except (FileNotFoundError, Damaged):
        return {}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
