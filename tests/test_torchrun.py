"""The scripts under torchrun, as a person launches them: all three examples, and a process that dies on the way."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dailymail_t5.task import DailyMailTask
from swag_roberta.task import SwagTask
from tests.scripts import ROOT, run, run_process
from wikitext_gpt2.task import WikiTextTask

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
# The seed's command; what is left of it is where things are.
SEED_COMMAND = [
    "--factor_batch_size",
    "128",
    "--query_batch_size",
    "100",
    "--train_batch_size",
    "128",
    "--use_half_precision",
]
SEED_COMMAND += ["--factor_strategy", "ekfac", "--use_ddp"]
NUM_TRAIN, NUM_QUERIES = 51, 7  # shares are uneven
ENDS_WITHIN = 60  # seconds, a job of which one process was killed

EXAMPLES = {
    "wikitext_gpt2": (WikiTextTask, "n_layer=1,n_embd=16,n_head=2,n_positions=32", ["--block_size", "32"]),
    "swag_roberta": (
        SwagTask,
        "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=24",
        ["--max_length", "24"],
    ),
    "dailymail_t5": (
        DailyMailTask,
        "num_layers=1,d_model=16,d_ff=24,num_heads=2,d_kv=8,dropout_rate=0",
        ["--max_source_length", "40", "--max_target_length", "12"],
    ),
}


def train_flags(example):
    _, config, lengths = EXAMPLES[example]
    flags = ["--preset", "demo", "--config_overrides", config, "--vocab_size", "400", *lengths]
    return [*flags, "--num_train", f"{NUM_TRAIN}", "--num_train_epochs", "1"]


def scores(directory):
    return load_file(directory / "scores_ekfac_half" / "pairwise_scores.safetensors")["all_modules"]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_train_and_analyze_under_torchrun(example, tmp_path):
    """train.py and analyze.py in two processes with the seed's flags; scores are those of one process."""
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    out = run_process([*TORCHRUN, f"{example}/train.py", *train_flags(example), *place]).ok()
    assert out.count("Checkpoint:") == 1 and "2 x cpu" in out
    analyze = ["--preset", "demo", "--num_queries", NUM_QUERIES, *place]
    two = [*TORCHRUN, f"{example}/analyze.py", *SEED_COMMAND, *analyze, "--output_dir", tmp_path / "two"]
    out = run_process(two).ok()
    assert out.count(f"({NUM_QUERIES}, {NUM_TRAIN}) [queries, training examples]") == 1  # only the first one prints
    one = [*SEED_COMMAND[:-1], *analyze, "--output_dir", tmp_path / "one"]
    run("analyze", *one, task_class=EXAMPLES[example][0]).ok()
    pair = torch.stack([scores(tmp_path / name).flatten() for name in ("one", "two")])
    assert torch.corrcoef(pair)[0, 1] > 0.99  # emulated bfloat16: sampled labels may differ at a boundary


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_sharded_under_torchrun(example, tmp_path):
    """analyze.py in two processes with a part of the model each: the scores of one process, and the plan says how."""
    task_class = EXAMPLES[example][0]
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    run("train", *train_flags(example), *place, task_class=task_class).ok()
    analyze = ["--preset", "demo", "--num_queries", NUM_QUERIES, *place, "--track", "all", "--factor_strategy", "ekfac"]
    two = [*TORCHRUN, f"{example}/analyze.py", "--use_fsdp", *analyze, "--output_dir", tmp_path / "two"]
    outcome = run_process(two)
    assert re.search(r"sharded +a part of .* in each of 2 processes, gathered by units", outcome.ok())
    assert "Warning" not in outcome.err
    run("analyze", *analyze, "--output_dir", tmp_path / "one", task_class=task_class).ok()
    file = "scores_ekfac/pairwise_scores.safetensors"
    pair = torch.stack([load_file(tmp_path / name / file)["all_modules"].flatten() for name in ("one", "two")])
    assert torch.corrcoef(pair)[0, 1] > 0.999
    again = [*two[:-1], tmp_path / "one"]  # the model is known to be the same one
    assert f"Found finished {tmp_path}/one/scores_ekfac/pairwise_scores.json" in run_process(again).ok()


@pytest.mark.slow
def test_several_checkpoints_and_all_parameters_under_torchrun(tmp_path):
    """Two processes leave and average the same checkpoints as one does."""
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    train = [*TORCHRUN, "wikitext_gpt2/train.py", *train_flags("wikitext_gpt2"), *place]
    run_process([*train, "--num_train_epochs", "2", "--save_at", "1", "2"]).ok()
    analyze = ["--preset", "demo", "--num_queries", NUM_QUERIES, *place, "--checkpoints", "all", "--track", "all"]
    run_process([*TORCHRUN, "wikitext_gpt2/analyze.py", *analyze, "--use_ddp", "--output_dir", tmp_path / "two"]).ok()
    run("analyze", *analyze, "--output_dir", tmp_path / "one").ok()
    file = "scores_ekfac/pairwise_scores.safetensors"
    pair = torch.stack([load_file(tmp_path / name / file)["all_modules"].flatten() for name in ("one", "two")])
    assert torch.corrcoef(pair)[0, 1] > 0.999
    assert len(list((tmp_path / "two").glob(f"step-*/{file}"))) == 2


def process_of_rank(rank: int, launcher: int) -> int | None:
    """The process that torchrun (of this process id) started as that rank."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                return int(directory.name)
        except (OSError, ValueError):
            continue
    return None


def killed_when_there(path, command, rank, log):
    """Launch a job, kill one of its processes when a file is there, and see that it ends; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        job = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 200
        while not path.exists() and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.005)
        assert path.exists(), log.read_text()
        os.kill(process_of_rank(rank, job.pid), signal.SIGKILL)
        job.wait(timeout=ENDS_WITHIN)
    finally:
        job.kill()
    assert job.returncode != 0
    return log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc to find the process in")
@pytest.mark.parametrize("rank, how", [(0, "--use_ddp"), (1, "--use_ddp"), (1, "--use_fsdp")])
def test_a_process_that_dies_ends_the_job_and_a_rerun_goes_on(rank, how, tmp_path):
    """Killed after the covariances: no hang, told which and why; the rerun keeps what was finished, same scores."""
    place = ["--checkpoint_dir", tmp_path / "checkpoint"]
    run("train", *train_flags("wikitext_gpt2"), "--num_train", "1000", *place).ok()
    output_dir = tmp_path / "results"
    flags = ["--preset", "demo", "--factor_strategy", "ekfac", "--factor_batch_size", "2", how]
    command = [*TORCHRUN, "wikitext_gpt2/analyze.py", *flags, *place, "--output_dir", output_dir]
    covariance = output_dir / "factors_ekfac" / "covariance.json"
    out = killed_when_there(covariance, command, rank, tmp_path / "log")
    assert "SIGKILL" in out and f"rank      : {rank}" in out
    assert not (output_dir / "scores_ekfac" / "pairwise_scores.json").exists()

    out = run_process(command).ok()
    assert f"Found finished {covariance}" in out
    run("analyze", *flags[:-1], *place, "--output_dir", tmp_path / "one").ok()
    file = "scores_ekfac/pairwise_scores.safetensors"
    pair = torch.stack([load_file(tmp_path / name / file)["all_modules"].flatten() for name in ("results", "one")])
    assert torch.corrcoef(pair)[0, 1] > 0.999


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc to find the process in")
@pytest.mark.parametrize("how", [[], ["--use_fsdp"]])
def test_a_killed_training_of_two_processes_ends_in_the_same_bytes(how, tmp_path):
    """Each process draws its own dropout, and both share the order of the examples."""
    flags = [*train_flags("wikitext_gpt2"), *how, "--num_train", "400", "--num_train_epochs", "3", "--checkpoint_dir"]
    command = [*TORCHRUN, "wikitext_gpt2/train.py", *flags]
    run_process([*command, tmp_path / "whole"]).ok()
    states = tmp_path / "killed" / ".training"
    killed_when_there(states / "epoch-1.process-1.safetensors", [*command, tmp_path / "killed"], 1, tmp_path / "log")
    assert not (tmp_path / "killed" / "config.json").exists()
    assert "Going on after epoch" in run_process([*command, tmp_path / "killed"]).ok()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1] and not states.exists()


@pytest.mark.slow
def test_a_process_that_refuses_its_input_ends_the_job(tmp_path):
    """Its line is shown, whichever process comes to it first, and no other waits for it."""
    place = ["--checkpoint_dir", tmp_path / "none", "--output_dir", tmp_path / "results"]
    start = time.monotonic()
    outcome = run_process([*TORCHRUN, "swag_roberta/analyze.py", "--preset", "demo", "--use_ddp", *place])
    assert outcome.code != 0 and re.search(r"^error( \(process 1\))?: no checkpoint in", outcome.err, re.MULTILINE)
    assert time.monotonic() - start < ENDS_WITHIN
