"""What is stored is whole, says what made it, is used again for just that, and is refused by name for anything else."""

import hashlib
import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from influence_core.analysis import analyze
from influence_core.errors import UserError
from influence_core.files import file_checksum
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.scripts import contents
from tests.tiny import TinyTask

FLOAT64 = Precision(torch.float64, torch.float64)
NUM_BATCHES = 7  # of each pass over the training set, 40 examples in sixes

pytestmark = pytest.mark.usefixtures("file_unchecked")  # what is counted here is what the stages run


class CountingTask(TinyTask):
    """Counts batches: "fisher" for the factors, "pairwise" for the scores, "query" for measurements."""

    def __init__(self, layers=("first", "second", "third"), die_at=None):
        super().__init__(layers=layers)
        self.calls = {"fisher": 0, "pairwise": 0, "query": 0}
        self.die_at = die_at

    def _count(self, kind):
        if (kind, self.calls[kind]) == self.die_at:
            raise KeyboardInterrupt
        self.calls[kind] += 1

    def train_loss(self, model, batch, sample_labels=None):
        self._count("pairwise" if sample_labels is None else "fisher")
        return super().train_loss(model, batch, sample_labels)

    def measurement(self, model, batch):
        self._count("query")
        return TinyTask.train_loss(self, model, batch)

    @property
    def did_nothing_expensive(self):
        """Nothing but what the plan is made from: an example each, by itself and beside itself."""
        return self.calls["fisher"] + self.calls["pairwise"] <= 2 and self.calls["query"] <= 2


def run(directory, strategies=("ekfac",), task=None, damping=1e-3, seed=11, precision=FLOAT64, change=None, **options):
    """(task with its counts, scores); `change(task, model, train, queries)` returns other data."""
    task = task or CountingTask()
    model = task.load_model().to(precision.operand_dtype)
    train, queries = task.load_dataset("train"), task.load_dataset("validation")
    if change is not None:
        train, queries = change(model, train, queries) or (train, queries)
    study = Study(task, model, train, directory, Runtime(precision=precision, seed=seed), **options)
    return task, analyze(study, list(strategies), queries, damping, 6, 6, 6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (directory, task, scores)."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, *run(directory)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to spoil."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_finished_stages_are_loaded(finished, copy, capsys):
    """The second run computes nothing, says so, and has the same scores to the bit."""
    _, task, scores = finished
    assert task.calls["fisher"] >= 2 * NUM_BATCHES and task.calls["pairwise"] == NUM_BATCHES
    before = contents(copy)
    again, loaded = run(copy)
    assert again.did_nothing_expensive, again.calls
    assert torch.equal(loaded["ekfac"], scores["ekfac"])
    assert contents(copy) == before
    assert capsys.readouterr().out.count("Found finished") == 4


def test_only_the_missing_stage_is_computed(finished, copy):
    """Finished factors are used for scores that are not there, and give the same scores."""
    (copy / "scores_ekfac" / "pairwise_scores.json").unlink()
    task, scores = run(copy)
    assert task.calls["fisher"] <= 2 and task.calls["pairwise"] == NUM_BATCHES
    assert torch.equal(scores["ekfac"], finished[2]["ekfac"])


def other_weights(model, train, queries):
    with torch.no_grad():
        model.first.bias[0] += 1e-6


OTHER_SETTINGS = {
    "model": {"change": other_weights},
    "train_dataset": {"change": lambda model, train, queries: (train[1:] + train[:1], queries)},
    "num_train": {"change": lambda model, train, queries: (train[:-1], queries)},
    "query_dataset": {"change": lambda model, train, queries: (train, queries[::-1])},
    "num_queries": {"change": lambda model, train, queries: (train, queries[:-1])},
    "seed": {"seed": 12},
    "damping": {"damping": 1e-4},
    "dtype": {"precision": Precision()},
    "tracked_layers": {"task": CountingTask(layers=("first", "third"))},
    "fisher": {"use_empirical_fisher": True},
}


@pytest.mark.parametrize("field", OTHER_SETTINGS)
def test_another_setting_is_refused_by_name_before_the_work(copy, field):
    """The differing field is named with both values; nothing is computed, and nothing on disk is touched."""
    before = contents(copy)
    task = OTHER_SETTINGS[field].get("task") or CountingTask()
    with pytest.raises(UserError, match=rf"\b{field} \(stored .+, now .+\)") as refusal:
        run(copy, **(OTHER_SETTINGS[field] | {"task": task}))
    assert "--overwrite" in str(refusal.value) and str(copy) in str(refusal.value)
    assert task.did_nothing_expensive, task.calls
    assert contents(copy) == before


def test_settings_that_do_not_matter_are_not_compared(tmp_path):
    """Identity has neither factors nor damping, so another seed, damping or batch size finds the same scores."""
    run(tmp_path, ["identity"])
    task, _ = run(tmp_path, ["identity"], damping=1.0, seed=99, use_empirical_fisher=True)
    assert task.did_nothing_expensive


def test_the_last_strategy_is_checked_before_the_first_is_fitted(tmp_path):
    """Of several strategies none is fitted when the stored factors of one will be refused anyway."""
    run(tmp_path, ["diagonal"], seed=12)
    before, task = contents(tmp_path), CountingTask()
    with pytest.raises(UserError, match=r"seed \(stored 12, now 11\)"):
        run(tmp_path, ["ekfac", "diagonal"], task=task, seed=11)
    assert task.did_nothing_expensive, task.calls
    assert contents(tmp_path) == before


def test_overwrite_computes_again(finished, copy):
    """With overwrite, all stages run again and what lies there afterwards is of the new settings."""
    task, _ = run(copy, overwrite=True)
    assert task.calls == finished[1].calls
    task, scores = run(copy, seed=12, damping=1e-2, overwrite=True)
    assert task.calls == finished[1].calls
    assert not torch.equal(scores["ekfac"], finished[2]["ekfac"])
    assert json.loads((copy / "factors_ekfac" / "lambda.json").read_text())["settings"]["seed"] == 12
    assert run(copy, seed=12, damping=1e-2)[0].did_nothing_expensive


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# A file, and the stages that must be made again for the file to be needed.
FILES = {
    "scores_ekfac/pairwise_scores": [],
    "factors_ekfac/lambda_matrix": ["scores_ekfac/pairwise_scores"],
    "factors_ekfac/activation_eigenvectors": ["factors_ekfac/lambda", "scores_ekfac/pairwise_scores"],
    "factors_ekfac/gradient_covariance": ["factors_ekfac/eigendecomposition"],
}


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()], ids=["cut", "bit", "gone"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(copy, file, damage):
    """Truncated, altered in one bit, or missing: never read as if it were whole; --overwrite makes it again."""
    path = copy / f"{file}.safetensors"
    damage(path)
    for stage in FILES[file]:
        (copy / f"{stage}.json").unlink()
    with pytest.raises(UserError, match="--overwrite") as refusal:
        run(copy)
    assert str(path) in str(refusal.value)
    run(copy, overwrite=True)


GARBAGE = {
    "empty": b"",
    "cut": b'{"stage": "lambda", "settings": {"mod',
    "binary": b"\xff\x00\x80",
    "list": b"[]",
    "null": b"null",
    "no settings": b"{}",
    "settings are no object": b'{"settings": []}',
    "no files": None,
    "no checksum": None,
}


@pytest.mark.parametrize("stage", ["factors_ekfac/covariance", "scores_ekfac/pairwise_scores"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_a_garbage_manifest_is_named(copy, stage, kind):
    """Whatever stands in the manifest, the answer is one line that names it; overwrite gets past it."""
    path = copy / f"{stage}.json"
    manifest = json.loads(path.read_text())
    if kind == "no files":
        del manifest["files"]
    for entry in manifest.get("files", {}).values():
        del entry["sha256"]
    content = GARBAGE[kind]
    path.write_bytes(json.dumps(manifest).encode() if content is None else content)
    with pytest.raises(UserError) as refusal:
        run(copy)
    assert str(path) in str(refusal.value)
    run(copy, overwrite=True)


def test_manifests_say_what_is_there(finished):
    """Settings, counts with their unit, versions, and checksums and sizes that are those of the files."""
    directory, task, scores = finished
    paths = [*directory.rglob("*.json")]
    names = ["covariance", "eigendecomposition", "lambda", "pairwise_scores"]
    assert sorted(path.stem for path in paths) == names
    manifests = {path.stem: json.loads(path.read_text()) for path in paths}
    for path in paths:
        manifest = manifests[path.stem]
        assert manifest["files"]
        for name, entry in manifest["files"].items():
            data = (path.parent / name).read_bytes()
            assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert manifest["versions"]["torch"] == torch.__version__
        assert {"transformers", "safetensors", "python"} <= manifest["versions"].keys()
        assert {"model", "train_dataset", "num_train", "tracked_layers", "dtype"} <= manifest["settings"].keys()
        assert manifest["settings"]["dtype"] == "float64"
    train = task.load_dataset("train")
    num_positions = sum(len(example["labels"]) for example in train)  # real ones, no padding
    counts = manifests["covariance"]["counts"]
    assert counts == {"num_examples": 40, "num_positions": dict.fromkeys(task.layers, num_positions)}
    assert manifests["lambda"]["counts"]["num_examples"] == 40
    assert manifests["lambda"]["settings"]["seed"] == 11
    assert manifests["pairwise_scores"]["settings"]["damping"] == 1e-3
    stored = load_file(directory / "scores_ekfac" / "pairwise_scores.safetensors")
    assert list(stored) == ["all_modules"] and stored["all_modules"].shape == (6, 40)
    assert torch.equal(stored["all_modules"], scores["ekfac"])


@pytest.mark.parametrize("die_at", [("fisher", 5), ("fisher", 12), ("pairwise", 4)])
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(finished, tmp_path, die_at, capsys):
    """Killed in the covariance, Lambda or pairwise pass: the rest alone is done, and the files are the same bytes."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task=CountingTask(die_at=die_at), progress_interval=0)
    assert [*tmp_path.rglob("*.progress.*")]
    task, _ = run(tmp_path, progress_interval=0)
    assert "going on after" in capsys.readouterr().out
    full = finished[1].calls
    assert task.calls[die_at[0]] < full[die_at[0]]
    assert not [*tmp_path.rglob("*.progress.*")], "progress is dropped when the stage is finished"
    assert contents(tmp_path) == contents(finished[0])


def test_progress_of_other_settings_is_not_gone_on_with(finished, tmp_path):
    """Half a run of another seed, or a progress file that is cut short, is no start for this one."""
    for seed, spoil in ((12, False), (11, True)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(seed), task=CountingTask(die_at=("fisher", 5)), seed=seed, progress_interval=0)
        (progress,) = (tmp_path / str(seed)).rglob("*.progress.*")
        if spoil:
            truncate(progress)
        task, _ = run(tmp_path / str(seed))
        assert task.calls == finished[1].calls
        assert contents(tmp_path / str(seed)) == contents(finished[0])


def test_a_file_is_hashed_once_by_a_process_and_again_when_it_was_touched(tmp_path, monkeypatch):
    path, hashed = tmp_path / "file", []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    path.write_bytes(b"a" * 100)
    old = time.time() - 1
    os.utime(path, (old, old))
    first = file_checksum(path)
    assert file_checksum(path) == first and len(hashed) == 1
    path.write_bytes(b"b" * 100)
    os.utime(path, (old, old))  # whoever sets a file's time back is found out all the same
    assert file_checksum(path) == hashlib.sha256(b"b" * 100).hexdigest()
    path.write_bytes(b"c" * 100)  # just now: another change could leave its time as it is
    file_checksum(path)
    path.write_bytes(b"d" * 100)
    assert file_checksum(path) == hashlib.sha256(b"d" * 100).hexdigest()
