"""The overview's last part: the run that made the scores, by its own record, and the settings in their manifest."""

from collections.abc import Mapping
from typing import Any

from influence_core.report.analysed import Analysed
from influence_core.report.codes import rounded
from influence_core.report.content import Section, Table
from influence_core.report.texts import short
from influence_core.units import gigabytes

ACTIONS = {  # that the plan counts, by its names of the stages
    "covariance": "Fit Covariance",
    "eigendecomposition": "Perform Eigendecomposition",
    "lambda": "Fit Lambda",
    "pairwise": "Compute Pairwise Score",
}


def asked(analysed: Analysed, flags: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, data, strategy and sizes, by name."""
    settings = analysed.settings
    num_queries, num_train = analysed.scores.shape
    model = flags.get("model_name_or_path") or "from scratch"
    data = " ".join(str(flags[key]) for key in ("dataset_name_or_path", "dataset_config") if flags.get(key))
    layers = settings.get("tracked_layers")
    checkpoints = settings.get("checkpoints")
    rows = {
        "Model": f"{model}, checkpoint {flags.get('checkpoint_dir')}",
        "Config": flags.get("config_overrides") or None,
        "Data": data or None,
        "Scores": f"{analysed.name}, {num_queries:,} x {num_train:,}",
        "Damping": settings.get("damping"),
        "Tracked": analysed.record.get("tracked") or (layers and f"{len(layers)} layers"),
        "Checkpoints": checkpoints and f"mean over {', '.join(checkpoints)}",
        "Numbers": settings.get("dtype"),
    }
    return [(name, short(str(value))) for name, value in rows.items() if value is not None]


def run_sections(analysed: Analysed) -> list[Section]:
    record = analysed.record
    sections = []
    if record:
        sections += [_plan(record), _stages(record)]
    else:
        note = "There is no record of the run that made these scores: analyze.py keeps that of its last one."
        sections.append(Section("The run", [note]))
    if analysed.settings:
        rows = [[short(key), short(_value(value))] for key, value in analysed.settings.items()]
        sections.append(Section("Settings, as stored with the scores", tables=[Table(["setting", "value"], rows)]))
    return sections


def _plan(record: Mapping[str, Any]) -> Section:
    rows = []
    for stage, flops in record["planned_flops"].items():
        calls, seconds = record["stages"].get(ACTIONS.get(stage, ""), (0, 0.0))
        rate = f"{rounded(flops / seconds / 1e9):,g}" if calls and seconds else ""
        rows.append([stage, f"{flops / 1e12:.4g}", f"{seconds:.4g}" if calls else "", rate])
    planned, peak = record["planned_memory"], record["peak_memory"]
    notes = []
    if planned and peak:
        notes.append(f"Peak memory: {gigabytes(planned)} planned, {gigabytes(peak)} measured.")
    where = f"{short(record['device'])} x {record['num_processes']}, {short(record['precision'])}"
    notes.append(f"Run on {where}, {short(record['date'])}: {short(' '.join(record['command']))}")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    notes.append(short(versions))
    heads = ["stage", "planned TFLOP", "seconds", "GFLOP/s"]
    return Section("Plan against measured", notes, [Table(heads, rows)] if rows else [])


def _stages(record: Mapping[str, Any]) -> Section:
    whole = sum(seconds for _, seconds in record["stages"].values())
    rows = [["Total", "", f"{whole:.4g}", "100"]]
    for action, (calls, seconds) in record["stages"].items():
        if calls:
            rows.append([action, str(calls), f"{seconds:.4g}", f"{100 * seconds / whole:.1f}" if whole else "0"])
    return Section("Stages", tables=[Table(["action", "calls", "seconds", "%"], rows)])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value))}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return "none" if value is None else str(value)
