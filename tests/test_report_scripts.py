"""report.py and analyze.py --report at tiny size: the same page, from what is stored; what is refused."""

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from influence_core.files import read_sealed_json
from tests.scripts import ANALYZE, NUM_QUERIES, NUM_TRAIN, NUMBERS, contents, run

LOOK = ["--compute_per_token_scores", "--self_influence", "--report"]


def page(path):
    """A page's text without the line that tells when it was written."""
    text, count = re.subn(r"<p>Written .*?</p>", "", path.read_text())
    assert count == 1
    return text


@pytest.fixture(scope="module")
def reported(checkpoint, tmp_path_factory):
    """(what analyze.py --report printed, its directory, the flags that name both)."""
    directory = tmp_path_factory.mktemp("reported") / "results"
    places = ["--checkpoint_dir", checkpoint, "--output_dir", directory]
    return run("analyze", *ANALYZE, *places, *LOOK).ok(), directory, [*NUMBERS, *places]


@pytest.fixture
def copied(reported, checkpoint, tmp_path):
    """A copy of the results, and the flags that name it."""
    directory = shutil.copytree(reported[1], tmp_path / "results")
    return directory, [*NUMBERS, "--checkpoint_dir", checkpoint, "--output_dir", directory]


def test_analyze_writes_the_page(reported):
    """One for each strategy, with links to each other; where they are stands at the end."""
    out, directory, _ = reported
    assert out.splitlines()[-2:] == [f"Report: {directory}/report.html", f"Report: {directory}/report_identity.html"]
    first, second = page(directory / "report.html"), page(directory / "report_identity.html")
    assert 'href="report_identity.html"' in first and 'href="report_ekfac.html"' in second
    assert first == page(directory / "report_ekfac.html")
    assert first.count('class="query"') == NUM_QUERIES and "Self-influence outliers" in first
    assert "add --compute_per_token_scores" not in first and "Plan against measured" in first


def test_report_writes_the_same(copied, reported):
    """From what is stored, without a look at the training: the same bytes but for the date."""
    directory, flags = copied
    for name in ("report.html", "report_identity.html"):
        (directory / name).unlink()
    assert run("report", *flags).ok().splitlines()[-1] == f"Report: {directory}/report_identity.html"
    for name in ("report.html", "report_identity.html"):
        assert page(directory / name).replace(str(directory), str(reported[1])) == page(reported[1] / name)


def test_fewer_queries_and_one_kind_of_scores(copied):
    directory, flags = copied
    before = contents(directory)
    run("report", *flags, "--scores", "identity", "--report_queries", 2).ok()
    text = page(directory / "report.html")
    assert text.count('class="query"') == 2 and "influence by identity" in text and "Other scores" not in text
    changed = {name for name, content in contents(directory).items() if before.get(name) != content}
    assert changed == {"report.html", "report_identity.html"}
    assert "influence by ekfac" in page(directory / "report_ekfac.html")


def test_without_parts_the_page_says_how_to_get_them(copied):
    """Also where those that lie there are of other scores."""
    directory, flags = copied
    for suffix in ("json", "safetensors"):
        (directory / f"scores_ekfac/score_parts.{suffix}").unlink()
        source = directory / f"scores_identity/score_parts.{suffix}"
        shutil.copy(source, directory / f"scores_ekfac/score_parts.{suffix}")
    run("report", *flags).ok()
    assert "add --compute_per_token_scores" in page(directory / "report.html")
    assert "add --compute_per_token_scores" not in page(directory / "report_identity.html")


def test_scores_made_elsewhere(copied, tmp_path):
    """A file of the right shape is shown; nothing is known of it."""
    directory, flags = copied
    matrix = load_file(directory / "scores_ekfac" / "pairwise_scores.safetensors")
    save_file(matrix, tmp_path / "mine.safetensors")
    run("report", *flags, "--scores", tmp_path / "mine.safetensors").ok()
    assert "only their order means something" in page(directory / "report.html")


def test_the_record_of_a_run(reported):
    """What analyze.py leaves for the page: every stage's seconds and planned FLOPs, memory, versions."""
    record = read_sealed_json(reported[1] / "analysis.json")
    assert set(record["planned_flops"]) == {"covariance", "eigendecomposition", "lambda", "pairwise"}
    assert all(calls >= 1 and seconds >= 0 for calls, seconds in record["stages"].values())
    assert {"Fit Covariance", "Fit Lambda", "Compute Pairwise Score", "Compute Score Parts"} <= record["stages"].keys()
    assert (
        record["planned_memory"] > 0 and record["peak_memory"] > 0 and list(record["scores"]) == ["ekfac", "identity"]
    )
    assert len((reported[1] / "analysis.json").read_bytes()) < 10_000


def test_what_was_computed_before_keeps_its_seconds(copied):
    """A run that finds a stage finished adds what it computes; one that computes nothing changes nothing."""
    directory, flags = copied
    places = flags[len(NUMBERS) :]
    before = read_sealed_json(directory / "analysis.json")
    run("analyze", *ANALYZE, *places, "--factor_strategy", "ekfac", "identity").ok()
    assert read_sealed_json(directory / "analysis.json") == before
    run("analyze", *ANALYZE, *places, "--factor_strategy", "kfac").ok()
    after = read_sealed_json(directory / "analysis.json")
    assert list(after["scores"]) == ["kfac"] and after["stages"]["Fit Covariance"] == before["stages"]["Fit Covariance"]
    assert after["stages"]["Compute Pairwise Score"] != before["stages"]["Compute Pairwise Score"]
    assert "Compute Score Parts" not in after["stages"]
    assert "There is no record of the run" in page_of(directory, flags, "ekfac")


def page_of(directory, flags, name):
    run("report", *flags, "--scores", name).ok()
    return page(directory / "report.html")


def test_refusals(copied, checkpoint, tmp_path):
    """One line each, and no page."""
    directory, flags = copied
    for path in directory.glob("*.html"):
        path.unlink()
    run("report", *flags, "--scores", "tfidf").error("has no page")
    run("report", *flags, "--scores", "nope").error("no scores 'nope'", "ekfac")
    run("report", *flags, "--scores", "ekfac", "ekfac").error("names one twice")
    run("report", *flags, "--report_queries", 0).error("--report_queries must be positive")
    run("report", *flags[:-1], tmp_path / "empty").error("no scores in", "analyze.py")
    run("report", *flags, "--num_train", NUM_TRAIN - 1).error("are of", "and here are")
    run("report", *flags, "--checkpoint_dir", tmp_path / "nope").error("no checkpoint in")
    assert not list(directory.glob("*.html")) and not (tmp_path / "empty").exists()
    scores = directory / "scores_ekfac" / "pairwise_scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-1])
    run("report", *flags).error("truncated or altered")
    assert not list(directory.glob("*.html"))


def test_a_page_that_cannot_be_written(copied):
    """It is said in one line, and nothing is left of it."""
    directory, flags = copied
    (directory / "report.html").unlink()
    (directory / "report.html").mkdir()
    run("report", *flags).error("report.html can't be written")
    assert not list(directory.glob(".*part"))
