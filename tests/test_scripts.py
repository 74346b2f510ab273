"""train.py, then analyze.py, from end to end at tiny size: what they print and leave, and that it is true."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.scripts import ANALYZE, BLOCK_SIZE, NUM_QUERIES, NUM_TRAIN, ROOT, TRAIN, contents, run, run_process
from wikitext_gpt2.task import WikiTextTask

SHAPE = (NUM_QUERIES, NUM_TRAIN)

COLUMNS = ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
ACTIONS = [
    "Fit Covariance", "Save Covariance", "Load Covariance",
    "Perform Eigendecomposition", "Save Eigendecomposition", "Load Eigendecomposition",
    "Fit Lambda", "Save Lambda", "Load Lambda",
    "Compute Pairwise Score", "Save Pairwise Score", "Load Pairwise Score",
]  # fmt: skip


@pytest.fixture(scope="module")
def task(checkpoint):
    """The task as the fixtures' checkpoint has it, with its tokenizer."""
    flags = WikiTextTask.flag_names()
    task = WikiTextTask(**{key: value for key, value in record(checkpoint).items() if key in flags})
    task.load_model(str(checkpoint))
    return task


def record(checkpoint):
    return json.loads((checkpoint / "training.json").read_text())


def table(out):
    """{row: cells} of the stage table, the header under "Action"."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows if not row[0].startswith("---")}


def stored_scores(directory, strategy="ekfac"):
    return load_file(directory / f"scores_{strategy}" / "pairwise_scores.safetensors")["all_modules"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["root", "folder"])
def test_both_scripts_as_a_person_runs_them(place, tmp_path, checkpoint, results):
    """`python wikitext_gpt2/train.py` from the root, `python train.py` in the folder: results as in process."""
    directory, prefix = (ROOT, "wikitext_gpt2/") if place == "root" else (ROOT / "wikitext_gpt2", "")
    new, out = tmp_path / "checkpoint", tmp_path / "out"
    trained = run_process([f"{prefix}train.py", *TRAIN, "--checkpoint_dir", new], directory).ok()
    assert "Training from scratch" in trained and str(new) in trained
    flags = [*ANALYZE, "--checkpoint_dir", new, "--output_dir", out, "--factor_strategy", "ekfac"]
    analyzed = run_process([f"{prefix}analyze.py", *flags], directory)
    assert analyzed.ok().startswith("Plan\n") and "warning" not in analyzed.err.lower()
    assert f"{SHAPE} [queries, training examples] in {out}/scores_ekfac/pairwise_scores.safetensors" in analyzed.out
    assert record(new) == record(checkpoint)
    torch.testing.assert_close(stored_scores(out), stored_scores(results[1]), rtol=1e-3, atol=1e-3)


def test_the_plan_comes_first(results):
    """Before the work: layers, passes, memory, disk and work."""
    lines = results[0].splitlines()
    assert lines[0] == "Plan"
    plan = {line.split()[0]: line for line in lines[1:8]}
    assert "4 layers" in plan["tracked"] and "3,216 parameters" in plan["tracked"]
    assert f"{NUM_QUERIES} queries x {NUM_TRAIN} training examples" in plan["scores"]
    assert "1 over the training set" in plan["passes"]
    assert re.search(r"[\d.]+ [MG]B", plan["memory"]) and re.search(r"[\d.]+ [MG]B", plan["disk"])


def test_the_stage_table(results):
    """Its columns and rows; EKFAC runs each stage once; times are calls times means and shares of the whole."""
    rows = table(results[0])
    assert rows.pop("Action") == COLUMNS
    total = rows.pop("Total")
    assert list(rows) == ACTIONS
    assert all(row[2] == "1" for name, row in rows.items() if name.split()[0] in ("Fit", "Perform", "Compute", "Save"))
    assert all(int(row[2]) >= 1 for row in rows.values())
    for row in rows.values():
        assert float(row[1]) * int(row[2]) == pytest.approx(float(row[3]), rel=1e-2)
        assert 100 * float(row[3]) / float(total[3]) == pytest.approx(float(row[4]), abs=0.11)
    assert sum(float(row[3]) for row in rows.values()) == pytest.approx(float(total[3]), rel=1e-2)


def test_the_query_and_its_top_sequence(results, task):
    """The texts shown are those of the query and of the highest score in its row, with that score."""
    out, directory = results
    scores = stored_scores(directory)
    assert scores.shape == SHAPE and scores.isfinite().all()
    shown = re.findall(
        r"Query (\d+) .*?\n((?:  \|.*\n)+)"
        r"  Most influential training sequence \(ekfac\): (\d+) .*?score (\S+)\n((?:  \|.*\n)+)",
        out,
    )
    assert [int(query) for query, *_ in shown] == [0, 1, 2]  # the preset shows three
    for query, query_text, best, score, train_text in shown:
        row = scores[int(query)]
        assert int(best) == int(row.argmax()) and float(score) == pytest.approx(float(row.max()), rel=1e-3)
        for split, index, text in (("validation", query, query_text), ("train", best, train_text)):
            example = task.load_dataset(split)[int(index)]
            expected = task.tokenizer.decode(example["input_ids"])
            assert len(expected.split()) > 3
            text = re.sub(r"^  \|", "", text, flags=re.MULTILINE)  # of each line, the margin
            assert "".join(text.split()) == "".join(expected.split())


def test_the_topic_figure(results, task):
    """The share of a query's top five of its own topic, and chance, counted here again from the stored scores."""
    train = [example["topic"] for example in task.load_dataset("train")[:NUM_TRAIN]]
    queries = [example["topic"] for example in task.load_dataset("validation")[:NUM_QUERIES]]
    assert len(set(train)) > 1
    hits = 0
    for query, row in zip(queries, stored_scores(results[1]).tolist()):
        top = sorted(range(NUM_TRAIN), key=lambda index: -row[index])[:5]
        hits += sum(train[index] == query for index in top)
    chance = sum(train.count(query) for query in queries) / (NUM_QUERIES * NUM_TRAIN)
    assert f"own topic: ekfac {hits / (5 * NUM_QUERIES):.0%} (chance {chance:.1%}; {NUM_QUERIES} queries)" in results[0]


def test_a_second_analysis_finds_everything_finished(checkpoint, results):
    """Nothing is fitted or computed again, and nothing on disk changes."""
    before = contents(results[1])
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", results[1], "--factor_strategy", "ekfac"]
    out = run("analyze", *flags).ok()
    assert out.count("Found finished") == 4
    rows = table(out)
    made = [name for name in ACTIONS if name.split()[0] in ("Fit", "Perform", "Compute", "Save")]
    assert all(rows[name][2] == "0" for name in made)
    assert contents(results[1]) == before
    tail = "Most influential"
    assert out[out.index(tail) :] == results[0][results[0].index(tail) :]


def test_half_precision_has_results_of_its_own(checkpoint, results, tmp_path):
    """scores_ekfac_half beside scores_ekfac: near the float32 scores, but not those."""
    flags = [*ANALYZE, "--checkpoint_dir", checkpoint, "--output_dir", tmp_path, "--use_half_precision"]
    out = run("analyze", *flags, "--factor_strategy", "ekfac", "identity").ok()
    assert {path.name for path in tmp_path.iterdir()} == {
        "analysis.json",
        "factors_ekfac_half",
        "scores_ekfac_half",
        "scores_identity_half",
    }
    assert f"{tmp_path}/scores_ekfac_half/pairwise_scores.safetensors" in out
    half, full = stored_scores(tmp_path, "ekfac_half"), stored_scores(results[1])
    assert half.shape == SHAPE and half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert torch.corrcoef(torch.stack([half.flatten(), full.flatten()]))[0, 1] > 0.9


def test_a_second_training_finds_the_checkpoint(checkpoint):
    """The same flags: found, said, and left as it is."""
    before = contents(checkpoint)
    assert "Found finished" in run("train", *TRAIN, "--checkpoint_dir", checkpoint).ok()
    assert contents(checkpoint) == before


OTHER_FLAGS = {
    "seed": "7",
    "num_train": "32",
    "learning_rate": "0.5",
    "num_train_epochs": "2",
    "train_batch_size": "16",
    "block_size": "16",
    "config_overrides": "n_layer=1,n_embd=8,n_head=2,n_positions=32",
    "use_half_precision": None,
}


@pytest.mark.parametrize("flag", OTHER_FLAGS)
def test_training_with_another_flag_is_refused(flag, checkpoint):
    """A checkpoint made with another value of anything that changes the weights: named, and left as it is."""
    before = contents(checkpoint)
    value = [] if OTHER_FLAGS[flag] is None else [OTHER_FLAGS[flag]]
    outcome = run("train", *TRAIN, "--checkpoint_dir", checkpoint, f"--{flag}", *value)
    outcome.error(flag, "--overwrite", str(checkpoint))
    assert contents(checkpoint) == before


def test_the_checkpoint_is_one_that_transformers_loads(checkpoint, tmp_path):
    """AutoModelForCausalLM takes it whole, and has the perplexity that train.py printed."""
    model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == model.config.vocab_size
    flags = WikiTextTask.flag_names()
    task = WikiTextTask(**{key: value for key, value in record(checkpoint).items() if key in flags})
    blocks = torch.stack([example["input_ids"] for example in task.load_dataset("train")[:NUM_TRAIN]])
    assert blocks.shape == (NUM_TRAIN, BLOCK_SIZE)
    with torch.no_grad():
        perplexity = float(model.eval()(blocks, labels=blocks).loss.exp())
    out = run("train", *TRAIN, "--checkpoint_dir", tmp_path / "again").ok()
    printed = {split: float(value) for split, value in re.findall(r"^(\w+) +perplexity (\S+)$", out, re.MULTILINE)}
    assert printed["train"] == pytest.approx(perplexity, rel=1e-3)
    assert printed["validation"] > 0
    assert contents(tmp_path / "again")["model.safetensors"] == contents(checkpoint)["model.safetensors"]


# Every flag that both scripts, train.py alone, and analyze.py alone promise.
BOTH = ["preset", "model_name_or_path", "dataset_name_or_path", "checkpoint_dir", "train_batch_size"]
BOTH += ["use_half_precision", "num_train", "seed", "overwrite"]
ONLY_TRAIN = ["eval_batch_size", "learning_rate", "weight_decay", "num_train_epochs"]
ONLY_ANALYZE = ["output_dir", "factor_strategy", "query_batch_size", "factor_batch_size", "use_compile", "use_ddp"]

ONLY_ANALYZE += ["use_fsdp", "damping_factor", "use_empirical_fisher", "memory_budget_gb", "num_queries"]


RETRAINING = [*BOTH[:-1], *ONLY_TRAIN, "output_dir", "num_queries", "scores", "num_repeats", "bank_dir", "figure_dir"]
LDS = [*RETRAINING, "num_masks", "subset_fraction", "masks", "measurements", "show_query"]
COUNTERFACTUAL = [*RETRAINING, "num_counterfactual_queries", "removal_sizes"]


@pytest.mark.parametrize(
    "script, own",
    [
        ("train", [*BOTH, *ONLY_TRAIN]),
        ("analyze", [*BOTH, *ONLY_ANALYZE]),
        ("evaluate_lds", LDS),
        ("run_counterfactual", COUNTERFACTUAL),
        ("half_precision_analysis", ["preset", "checkpoint_dir", "output_dir", "factor_strategy", "figure_dir"]),
    ],
)
def test_help_lists_every_flag(script, own):
    """Each with a word on what it does."""
    outcome = run(script, "--help")
    listed = dict(re.findall(r"^  --(\w+)((?:.|\n   )*)", outcome.ok(), re.MULTILINE))
    assert {*own} <= listed.keys()
    assert all(len(text.split()) > 3 for text in listed.values()), listed
