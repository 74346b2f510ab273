"""The driver of gpu_run.sh, on parts that are one line of Python each: what it runs, keeps, leaves and refuses."""

import json
import subprocess
import sys
import time

import pytest

from tests.benchmarks import gpu_run

MADE_BY = {"device": "CPU", "flags": ["--num_train", "4"]}
MEASURES = "Path(work, f'{part}.json').write_text('{\"value\": 1}')"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run({part: what it does}) -> (whether all are there, what the directory has)."""

    def run(parts: dict[str, str], seconds: float = 60, made_by: dict = MADE_BY):
        def command(part, precision, work, made_by):
            setting = f"from pathlib import Path; part, work = {part!r}, {work!r}; "
            return [sys.executable, "-c", setting + parts[part]]

        monkeypatch.setattr(gpu_run, "PARTS", {"bf16": dict.fromkeys(parts, 1)})
        monkeypatch.setattr(gpu_run, "command", command)
        complete = gpu_run.run_parts("bf16", tmp_path / "out", made_by, time.monotonic() + seconds)
        return complete, {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*")}

    return run


def test_a_part_that_fails_costs_no_other_one_and_only_it_is_run_again(run, capsys):
    complete, files = run({"ours": MEASURES, "peer": "1 / 0", "agreement": MEASURES})
    assert not complete
    assert set(files) == {"ours.json", "agreement.json"}
    assert "bf16 peer: FAILED with exit status 1\n" in capsys.readouterr().out
    complete, again = run({"ours": "1 / 0", "peer": MEASURES, "agreement": "1 / 0"})
    assert complete
    assert again["peer.json"]["value"] == 1
    assert {name: again[name] for name in files} == files


def test_what_the_tests_print_is_kept(run):
    complete, files = run({"tests": "print('4 passed')"})
    assert complete
    assert files["tests.json"]["output"] == ["4 passed"]


def test_without_its_module_a_part_is_left_out(run, monkeypatch):
    monkeypatch.setitem(gpu_run.PRINTING, "tests", "no_such_module")
    assert run({"tests": "1 / 0", "ours": MEASURES})[0]


def test_what_hangs_is_stopped_and_what_would_take_too_long_not_begun(run, capsys):
    complete, files = run({"ours": "import time; time.sleep(60)", "peer": MEASURES}, seconds=2)
    assert not complete
    assert not files
    out = capsys.readouterr().out
    assert "ours: FAILED: stopped after" in out
    assert "peer: left for another call" in out


def test_only_what_is_run_if_time_is_left_may_be_missing(run):
    assert run({"ours": MEASURES})[0]
    assert run({"ours": MEASURES, "compile": MEASURES}, seconds=0)[0]


def test_figures_of_other_flags_are_refused_or_overwritten(run, tmp_path, capsys):
    run({"ours": MEASURES})
    gpu_run.prepare(tmp_path / "out", ["ours"], MADE_BY, overwrite=False)
    for other in ({**MADE_BY, "device": "a GPU"}, {**MADE_BY, "flags": []}):
        with pytest.raises(SystemExit) as stopped:
            gpu_run.prepare(tmp_path / "out", ["ours"], other, overwrite=False)
        assert stopped.value.code == 2
    assert capsys.readouterr().err.count("ours.json is of other flags or another GPU") == 2
    gpu_run.prepare(tmp_path / "out", ["ours"], {}, overwrite=True)
    assert not (tmp_path / "out" / "ours.json").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "gpu_name", str)
    monkeypatch.setattr(sys, "argv", ["gpu_run", "bf16"])
    with pytest.raises(SystemExit) as stopped:
        gpu_run.main()
    assert stopped.value.code == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_gpu_name_is_of_nvidia_smi(monkeypatch):
    monkeypatch.setattr(gpu_run.shutil, "which", lambda _: "nvidia-smi")
    for status, name in ((0, "NVIDIA H100"), (9, "")):
        done = subprocess.CompletedProcess([], status, stdout="NVIDIA H100\n")
        monkeypatch.setattr(gpu_run.subprocess, "run", lambda *_, done=done, **__: done)
        assert gpu_run.gpu_name() == name
