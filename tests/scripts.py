"""Run the scripts of wikitext_gpt2 at tiny size, in this process or as a person would, and read what they print."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from influence_core import progress
from influence_core.experiments import analysis, counterfactual, half_precision, lds_evaluation, reporting, training
from influence_core.files import read_sealed_json, write_sealed_json
from wikitext_gpt2.task import WikiTextTask

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data and tokenizers, which the project does not carry

NUM_TRAIN, NUM_QUERIES, BLOCK_SIZE = 64, 4, 32

TRAIN = ["--preset", "demo", "--config_overrides", f"n_layer=1,n_embd=16,n_head=2,n_positions={BLOCK_SIZE}"]
TRAIN += ["--vocab_size", "400", "--block_size", f"{BLOCK_SIZE}", "--num_train", f"{NUM_TRAIN}"]
TRAIN += ["--num_train_epochs", "1", "--eval_batch_size", "16"]
NUMBERS = ["--preset", "demo", "--num_train", f"{NUM_TRAIN}", "--num_queries", f"{NUM_QUERIES}"]
ANALYZE = [*NUMBERS, "--track", "blocks"]
NO_LOOKING = ["--no-report", "--no-compute_per_token_scores", "--no-self_influence"]  # that the demo does

SCRIPTS = {
    "train": training,
    "analyze": analysis,
    "evaluate_lds": lds_evaluation,
    "run_counterfactual": counterfactual,
    "half_precision_analysis": half_precision,
    "report": reporting,
}


@dataclass
class Outcome:
    """How a script ended."""

    code: int
    out: str
    err: str

    def error(self, *contains: str) -> str:
        """The one line of a refusal, checked: exit code 2, and nothing else on stderr."""
        lines = self.err.splitlines()
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert "Traceback" not in self.out
        for part in contains:
            assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
        return lines[0]

    def ok(self) -> str:
        """What a script that worked printed."""
        assert self.code == 0, self.err
        return self.out


def change_record(checkpoint: Path, **values) -> None:
    """Let train.py's record of a checkpoint say something else, as if it had written that."""
    path = checkpoint / "training.json"
    write_sealed_json(path, read_sealed_json(path) | values)


def run(script: str, *flags, task_class=WikiTextTask) -> Outcome:
    """The script's main function in this process; an exception other than SystemExit fails the test, as it should.

    Scores are looked into, and a page is written, where flags ask for it.
    """
    if script == "analyze":
        flags = (*NO_LOOKING, *flags)
    main = SCRIPTS[script].main
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: more threads would only wait for each other
    progress._Lines._last = None  # as in a process of its own: lines are half a minute apart from its beginning
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(task_class, "a description", list(map(str, flags)))
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_process(command: list, directory: Path = ROOT, **environment: str) -> Outcome:
    """`python <command>` in a directory, offline, as a process of its own."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=directory,
        env=inherited | offline | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def contents(directory: Path) -> dict[str, bytes]:
    """{path: bytes} of every file below a directory, to see that nothing was changed or left behind."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(script, *flags, contains=(), directory=None, **options):
    """Run a script, expect the refusal, and no file in the directory that it was to write to."""
    common = {"train": [*TRAIN, "--checkpoint_dir"], "analyze": [*ANALYZE, "--output_dir"]}[script]
    error = run(script, *common, directory, *flags, **options).error(*contains)
    assert not contents(directory)
    return error
