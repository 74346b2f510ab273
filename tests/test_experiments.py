"""evaluate_lds.py, run_counterfactual.py and half_precision_analysis.py from end to end at tiny size."""

import json
import math
import re

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import linregress, spearmanr

from influence_core.experiments.arguments import parse
from influence_core.experiments.bank import Retraining
from influence_core.experiments.figures import COLOURS
from influence_core.experiments.retraining import Experiment, Retrainer
from influence_core.experiments.score_sources import tfidf_scores
from influence_core.storage import differences
from influence_core.tasks.example import MEASUREMENT
from tests.scripts import ANALYZE, NUM_QUERIES, NUM_TRAIN, ROOT, TRAIN, contents, run, run_process
from wikitext_gpt2.task import WikiTextTask

COMMON = ["--preset", "demo", "--num_queries", f"{NUM_QUERIES}"]
LDS = ["--num_masks", "6", "--num_repeats", "2"]
NO_DROPOUT = f"n_layer=1,n_embd=16,n_head=2,n_positions={32},resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory):
    """Flags that name a checkpoint, scores of three kinds, and a directory for figures."""
    directory = tmp_path_factory.mktemp("experiments")
    flags = ["--checkpoint_dir", checkpoint, "--output_dir", directory / "results"]
    run("analyze", *ANALYZE, *flags, "--factor_strategy", "ekfac", "identity").ok()
    run("analyze", *ANALYZE, *flags, "--factor_strategy", "ekfac", "--use_half_precision").ok()
    return [*COMMON, *flags, "--figure_dir", directory / "figure"]


@pytest.fixture(scope="module")
def evaluated(place):
    return run("evaluate_lds", *place, *LDS).ok()


def output_dir(place):
    return place[place.index("--output_dir") + 1]


def scores(place, name):
    return load_file(output_dir(place) / f"scores_{name}" / "pairwise_scores.safetensors")["all_modules"]


def stored(place, name):
    return json.loads((output_dir(place) / f"{name}.json").read_text())


def assert_drawn(path, num_colours):
    """The figure is there, of a size that a README shows well, with marks in so many of the palette's colours."""
    pixels = matplotlib.image.imread(path)[..., :3]
    assert 400 < pixels.shape[1] < 2000
    for number, colour in enumerate(COLOURS[:4]):
        near = np.abs(pixels - matplotlib.colors.to_rgb(colour)).max(-1) < 0.15
        assert (near.sum() > 100) == (number < num_colours), colour


def bank_files(place):
    return {path.name: path.stat().st_mtime_ns for path in (output_dir(place) / "retrainings").glob("*.safetensors")}


def test_lds_from_end_to_end(evaluated, place):
    """What is printed and stored are the figures of the bank's own measurements."""
    result = stored(place, "lds")
    assert set(result["methods"]) == {"ekfac", "identity", "ekfac_half", "tfidf"}
    assert (result["num_subsets"], result["num_repeats"], result["num_queries"]) == (6, 2, NUM_QUERIES)
    assert len(bank_files(place)) == 12
    masks, outcomes = {}, {}
    for path in (output_dir(place) / "retrainings").glob("*.safetensors"):
        entry = load_file(path)
        masks[entry["mask"].numpy().tobytes()] = entry["mask"].double()
        outcomes.setdefault(entry["mask"].numpy().tobytes(), []).append(entry["measurement"])
    assert len(masks) == 6 and all(mask.sum() == NUM_TRAIN // 2 for mask in masks.values())
    predicted = -torch.stack(list(masks.values())) @ scores(place, "ekfac").double().T
    actual = torch.stack([torch.stack(pair).mean(0) for pair in outcomes.values()])
    per_query = [spearmanr(a, b).statistic for a, b in zip(predicted.T, actual.T)]
    row = result["methods"]["ekfac"]
    assert row["per_query"] == pytest.approx(per_query)
    assert row["lds"] == pytest.approx(np.mean(per_query)) and row["min"] <= row["median"] <= row["max"]
    assert row["interval"][0] < row["interval"][1] and 0 <= result["ceiling"] <= 1
    assert f"{row['lds']:.3f} [" in evaluated and f"would score: {result['ceiling']:.3f}" in evaluated
    assert "ekfac - identity" in evaluated and "Query 0" in evaluated
    assert f"sequence (ekfac): {int(scores(place, 'ekfac')[0].argmax())} " in evaluated


def test_the_figures_are_drawn_from_what_is_stored(evaluated, place):
    """A second run trains nothing, and says the same; the figure is made again."""
    figure = place[-1] / "lds.png"
    assert_drawn(figure, 4)
    figure.unlink()
    before = bank_files(place)
    again = run("evaluate_lds", *place, *LDS).ok()
    assert again == evaluated and bank_files(place) == before
    assert_drawn(figure, 4)
    assert_drawn(place[-1] / "calibration.png", 2)


def test_calibration_is_of_the_scores_that_have_a_scale(evaluated, place):
    """By hand: the change is predicted to be the scores' sum over what was left out, by the number of examples."""
    result = stored(place, "lds")["calibration"]
    assert set(result) == {"ekfac", "ekfac_half"}
    row = result["ekfac"]
    masks, outcomes = {}, {}
    for path in (output_dir(place) / "retrainings").glob("*.safetensors"):
        entry = load_file(path)
        masks[entry["mask"].numpy().tobytes()] = entry["mask"].double()
        outcomes.setdefault(entry["mask"].numpy().tobytes(), []).append(entry["measurement"])
    left_out = 1 - torch.stack(list(masks.values()))
    predicted = (left_out @ scores(place, "ekfac").double().T / NUM_TRAIN).numpy()
    actual = torch.stack([torch.stack(pair).mean(0) for pair in outcomes.values()]).numpy()
    lines = [linregress(a, b) for a, b in zip(predicted.T, actual.T)]
    assert row["slope_per_query"] == pytest.approx([line.slope for line in lines], rel=1e-4)
    assert row["r_squared_per_query"] == pytest.approx([line.rvalue**2 for line in lines], rel=1e-4)
    assert f"slope {row['slope']:.3g}, R^2 {row['r_squared']:.3f}" in evaluated


def test_the_counterfactual_from_end_to_end(evaluated, place):
    """Removing the top of the summed scores; nothing removed is trained once a repeat; figures as the bank has them."""
    before = bank_files(place)
    flags = ["--scores", "ekfac", "identity", "--removal_sizes", "0", "4", "8", "--num_repeats", "2"]
    flags += ["--num_counterfactual_queries", "3"]
    out = run("run_counterfactual", *place, *flags).ok()
    new = set(bank_files(place)) - set(before)
    assert len(new) == 2 * (1 + 2 * 3)
    result = stored(place, "counterfactual")
    values = result["metrics"]["mean query perplexity"]
    assert list(values) == ["ekfac", "identity", "random"] and result["removal_sizes"] == [0, 4, 8]
    assert values["ekfac"]["values"][0] == values["identity"]["values"][0] == values["random"]["values"][0]
    top = scores(place, "ekfac")[:3].sum(0).topk(8).indices
    entries = [load_file(output_dir(place) / "retrainings" / name) for name in new]
    removed = [entry for entry in entries if entry["mask"].sum() == NUM_TRAIN - 8 and not entry["mask"][top].any()]
    perplexities = [float((e["measurement"][:3] / e["positions"][:3]).exp().mean()) for e in removed]
    assert sorted(perplexities) == pytest.approx(sorted(values["ekfac"]["values"][2]))
    mean, error = np.mean(perplexities), np.std(perplexities, ddof=1) / math.sqrt(2)
    assert (values["ekfac"]["mean"][2], values["ekfac"]["standard_error"][2]) == pytest.approx((mean, error))
    assert f"{mean:.4g} ± {error:.2g}" in out
    drawn = {tuple(np.flatnonzero(e["mask"].numpy() == 0)) for e in entries if e["mask"].sum() == NUM_TRAIN - 4}
    assert len(drawn) == 4  # two kinds of scores, and random ones drawn afresh for each repeat
    assert_drawn(place[-1] / "counterfactual.png", 3)


def test_half_precision_from_end_to_end(place):
    out = run("half_precision_analysis", *place, "--factor_strategy", "ekfac", "--show_query", "2").ok()
    result = stored(place, "half_precision")
    full, half = scores(place, "ekfac"), scores(place, "ekfac_half")
    expected = [spearmanr(a, b).statistic for a, b in zip(full, half)]
    assert result["per_query"] == pytest.approx(expected) and f"{np.mean(expected):.4f} (min" in out
    assert result["float32"] == full[2].tolist() and 0.5 < result["mean_spearman"] < 1
    assert_drawn(place[-1] / "half_precision.png", 1)


@pytest.mark.slow
def test_processes_fill_one_bank_under_torchrun(place, tmp_path):
    """`torchrun evaluate_lds.py`: both retrain, one reports, and measurements are those of one process."""
    flags = [*place[:-1], tmp_path / "figure", "--bank_dir", tmp_path / "bank", "--scores", "ekfac", *LDS]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_process([*launch, "wikitext_gpt2/evaluate_lds.py", *flags])
    assert done.ok().count("Linear datamodeling score") == 1
    run("evaluate_lds", *place, "--scores", "ekfac", *LDS).ok()
    names = set(bank_files(place)) & {path.name for path in (tmp_path / "bank").glob("*.safetensors")}
    assert len(names) == 12
    for name in names:
        one, other = load_file(output_dir(place) / "retrainings" / name), load_file(tmp_path / "bank" / name)
        torch.testing.assert_close(one["measurement"], other["measurement"], rtol=1e-6, atol=0)


def test_retraining_on_everything_is_the_training(tmp_path):
    """With the checkpoint's seed and all examples, a retraining ends with the checkpoint's weights, bit for bit."""
    directory = tmp_path / "checkpoint"
    run("train", *TRAIN, "--config_overrides", NO_DROPOUT, "--checkpoint_dir", directory, "--num_train", "70").ok()
    flags = [*map(str, [*COMMON, "--checkpoint_dir", directory, "--output_dir", tmp_path])]
    arguments = parse(WikiTextTask, "evaluate_lds", "", flags)
    experiment = Experiment(WikiTextTask, arguments)
    retrainer = Retrainer(experiment.task, arguments, experiment.train_dataset, experiment.query_dataset)
    for keep in (np.arange(70) < 40, np.ones(70)):  # the one before leaves no trace
        values = retrainer(Retraining(keep.astype(np.uint8).tobytes(), arguments.seed))
    expected = load_file(directory / "model.safetensors")
    state = retrainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    batch = experiment.task.collate(experiment.query_dataset)
    with torch.no_grad():
        measured = float(experiment.task.measurement(retrainer.model, batch))
    assert float(values[MEASUREMENT].sum()) == pytest.approx(measured)


def ground_truth(tmp_path, place, suffix, num_repeats=None):
    """Files of planted masks and measurements."""
    rng = np.random.default_rng(0)
    masks = rng.random((20, NUM_TRAIN)) < 0.5
    measurements = -masks.astype(float) @ scores(place, "ekfac").double().numpy().T
    if num_repeats:
        measurements = np.stack([measurements] * num_repeats, axis=1)
    files = []
    for name, value in (("masks", masks.astype(np.float32)), ("measurements", measurements)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "npy":
            np.save(path, value)
        elif suffix == "pt":
            torch.save(torch.from_numpy(value), path)
        else:
            save_file({name: torch.from_numpy(value)}, path)
        files += [f"--{name}", path]
    return files


@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_ground_truth_made_elsewhere(suffix, place, tmp_path):
    """Nothing is trained; planted outcomes give one; repeats give a ceiling."""
    before = bank_files(place)
    out = run("evaluate_lds", *place, *ground_truth(tmp_path, place, suffix), "--scores", "ekfac", "identity").ok()
    assert re.search(r"ekfac +1\.000 \[", out) and "No noise ceiling" in out
    out = run("evaluate_lds", *place, *ground_truth(tmp_path, place, suffix, 3), "--scores", "ekfac").ok()
    assert "perfect prediction would score: 1.000" in out
    assert bank_files(place) == before


def test_pickled_ground_truth_takes_a_deliberate_flag(place, tmp_path):
    files = ground_truth(tmp_path, place, "npy")
    torch.save(np.load(files[1]), tmp_path / "masks.pt")  # as others do: a pickled array
    files[1] = tmp_path / "masks.pt"
    run("evaluate_lds", *place, *files, "--scores", "ekfac").error("masks.pt", "--allow_pickle")
    assert "1.000" in run("evaluate_lds", *place, *files, "--scores", "ekfac", "--allow_pickle").ok()


@pytest.mark.parametrize(
    "flags, contains",
    [
        (["--scores", "nothing"], ["no scores 'nothing'", "ekfac, ekfac_half, identity"]),
        (["--scores", "ekfac", "ekfac"], ["names one twice"]),
        (["--scores", "ekfac", "--num_train", "60"], ["64 training examples", "and 60: give --num_queries"]),
        (["--scores", "ekfac", "--num_queries", "3"], ["are of 4 queries", "here are 3", "--num_queries"]),
        (["--scores", str(ROOT / "README.md")], ["README.md can't be read as scores"]),
        (["--masks", "x.npy"], ["--masks and --measurements go together"]),
        (["--num_masks", "1"], ["--num_masks 2 at least, not 1"]),
        (["--num_masks", "3", "--choose"], ["--num_masks 4 at least"]),
        (["--num_masks", "0"], ["--num_masks must be positive"]),
        (["--subset_fraction", "1.0"], ["--subset_fraction must be below 1"]),
        (["--subset_fraction", "0.001"], ["keeps all or none"]),
        (["--show_query", "4"], ["--show_query 4: there are 4 queries"]),
        (["--num_train_epochs", "2"], ["num_train_epochs (stored 1, now 2)", "--bank_dir"]),
        (["--checkpoint_dir", "nowhere"], ["no checkpoint in nowhere", "train.py"]),
    ],
)
def test_bad_input_of_evaluate_lds(flags, contains, evaluated, place):
    before = contents(output_dir(place))
    run("evaluate_lds", *place, *LDS, *flags).error(*contains)
    assert contents(output_dir(place)) == before


@pytest.mark.parametrize(
    "flags, contains",
    [
        (["--removal_sizes", "64"], ["leaves nothing of the training set", "64"]),
        (["--removal_sizes", "-1"], ["--removal_sizes must be at least 0"]),
        (["--removal_sizes", "4", "--num_counterfactual_queries", "9"], ["larger than the queries, which has 4"]),
        (["--num_repeats", "0"], ["--num_repeats must be positive"]),
    ],
)
def test_bad_input_of_run_counterfactual(flags, contains, evaluated, place):
    before = contents(output_dir(place))
    run("run_counterfactual", *place, *flags).error(*contains)
    assert contents(output_dir(place)) == before


def test_default_removals_are_those_that_leave_something(place):
    """Of 64 examples: 50 of 0, 50, 100, 150, 200."""
    flags = ["--scores", "identity", "--num_repeats", "1", "--num_counterfactual_queries", "2"]
    run("run_counterfactual", *place, *flags).ok()
    assert stored(place, "counterfactual")["removal_sizes"] == [0, 50]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_scores_by_a_path_without_a_name(name, place):
    run("evaluate_lds", *place, *LDS, "--scores", name).error("can't be read as scores")


def test_half_precision_says_which_scores_are_missing_or_made_otherwise(place, tmp_path):
    flags = [*place[: place.index("--output_dir") + 1], tmp_path]
    run("half_precision_analysis", *flags).error("no scores 'ekfac'", "analyze.py --factor_strategy ekfac")
    flags += ["--num_train", NUM_TRAIN, "--factor_strategy", "ekfac"]
    run("analyze", *flags, "--damping_factor", "1x").ok()
    run("analyze", *flags, "--damping_factor", "2x", "--use_half_precision").ok()
    run("half_precision_analysis", *flags).error("differ by more than their precision", "damping (stored 1x, now 2x)")


def test_scores_of_another_checkpoint_are_refused(place, tmp_path):
    """The same data, other weights: an LDS of these scores against that checkpoint would mean nothing."""
    run("train", *TRAIN, "--learning_rate", "0.01", "--checkpoint_dir", tmp_path / "other").ok()
    flags = ["--scores", "ekfac", "--checkpoint_dir", tmp_path / "other"]
    run("evaluate_lds", *place, *LDS, *flags).error("are not of the checkpoint", "model (stored", "analyze.py")


def test_retraining_otherwise_than_the_checkpoint_is_said(place, tmp_path):
    flags = ["--bank_dir", tmp_path, "--learning_rate", "0.001", "--scores", "ekfac"]
    out = run("evaluate_lds", *place, *LDS, *flags).ok()
    assert "Note: retraining is not as the checkpoint was trained: learning_rate (stored 0.002, now 0.001)" in out
    assert "Note" not in run("evaluate_lds", *place, *LDS, "--scores", "ekfac").ok()


def test_a_bank_of_a_model_with_other_dropout_is_refused(tmp_path):
    """The initial weights are the same; their digest alone would not tell."""
    settings = []
    for dropout in ("0", "0.5"):
        directory = tmp_path / dropout
        config = NO_DROPOUT.replace("resid_pdrop=0", f"resid_pdrop={dropout}")
        run("train", *TRAIN, "--config_overrides", config, "--checkpoint_dir", directory).ok()
        arguments = parse(WikiTextTask, "evaluate_lds", "", [*COMMON, "--checkpoint_dir", str(directory)])
        experiment = Experiment(WikiTextTask, arguments)
        settings.append(Retrainer(experiment.task, arguments, *experiment.datasets[::-1]).settings)
    assert differences(*settings).startswith("initial_model") and ";" not in differences(*settings)


def test_measurements_that_are_not_finite_are_refused(place, tmp_path):
    files = ground_truth(tmp_path, place, "npy")
    measurements = np.load(files[3])
    measurements[3, 1] = np.nan
    np.save(files[3], measurements)
    run("evaluate_lds", *place, *files, "--scores", "ekfac").error("measurements.npy holds numbers that are not finite")


@pytest.mark.parametrize("content", [None, b"", b"no array"])
def test_ground_truth_that_cannot_be_read(content, place, tmp_path):
    """No advice to unpickle what is no pickle."""
    files = ground_truth(tmp_path, place, "npy")
    files[1].unlink() if content is None else files[1].write_bytes(content)
    message = run("evaluate_lds", *place, *files, "--scores", "ekfac").error("masks.npy")
    assert "--allow_pickle" not in message or content == b"no array"  # to numpy, what is no array may be a pickle


def test_scores_made_elsewhere(place, tmp_path):
    """A file of another program, in bfloat16; two of one name are told apart by their paths."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        save_file({"all_modules": scores(place, "ekfac").bfloat16()}, tmp_path / name / "pairwise_scores.safetensors")
    paths = [f"{tmp_path}/{name}/pairwise_scores.safetensors" for name in ("one", "other")]
    run("evaluate_lds", *place, *LDS, "--scores", *paths).ok()
    assert list(stored(place, "lds")["methods"]) == paths


@pytest.mark.parametrize("shape", [(19, NUM_TRAIN), (20, NUM_TRAIN - 1)])
def test_ground_truth_that_does_not_fit_is_refused(shape, place, tmp_path):
    files = ground_truth(tmp_path, place, "npy")
    np.save(files[1], np.ones(shape))
    told = f"masks.npy must be [subsets, 64] of 0 and 1; it is {shape}" if shape[1] != NUM_TRAIN else "not (20, 1, 4)"
    run("evaluate_lds", *place, *files, "--scores", "ekfac").error(told)


def test_tfidf_by_hand():
    """Two of three documents share a word: its weight is log(3/2), of the others log 3."""
    result = tfidf_scores(["The cat"], ["the dog", "bird"])
    shared, own = math.log(3 / 2), math.log(3)
    assert result == pytest.approx(np.array([[shared**2 / (shared**2 + own**2), 0.0]]))
    assert tfidf_scores(["one two"], ["two, one!", ""])[0] == pytest.approx([1.0, 0.0])


@pytest.mark.slow
def test_the_scripts_run_by_their_names(place):
    """As a person runs them, from the folder and from the root."""
    assert "--num_masks" in run_process(["evaluate_lds.py", "--help"], ROOT / "wikitext_gpt2").ok()
    assert "--removal_sizes" in run_process(["wikitext_gpt2/run_counterfactual.py", "--help"]).ok()
    assert "mean Spearman" in run_process(["wikitext_gpt2/half_precision_analysis.py", *place]).ok()
