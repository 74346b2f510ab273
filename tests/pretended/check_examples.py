"""The scripts of the three examples on the pretended device: train.py, then analyze.py against itself on the CPU."""

import pytest
from safetensors.torch import load_file

from dailymail_t5.task import DailyMailTask
from swag_roberta.task import SwagTask
from tests.own_data import PAIRS, QUESTIONS, SIZES, TEXTS, write
from tests.pretended.__main__ import main
from tests.pretended.device import pretended_cuda
from tests.scripts import ROOT, run
from tests.test_exactness import relative_error
from tests.test_invariance import spearman
from wikitext_gpt2.task import WikiTextTask

EXAMPLES = {  # rows, and the flags that name their columns
    WikiTextTask: ([{"body": text} for text in TEXTS], ["--one_row_one_example"]),
    SwagTask: (QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"]),
    DailyMailTask: (PAIRS, ["--prompt_column", "ask"]),
}
STRATEGIES = ["identity", "diagonal", "kfac", "ekfac"]
# RoBERTa's pooler and classifier see so few vectors that many eigenvalues nearly coincide; rounding decides how their
# eigenvectors are turned. EKFAC's Lambda depends on that: another batch size changes its scores by as much as this.
EKFAC_BY_ROUNDING = 0.1


def trained(task_class, directory):
    """The checkpoint that train.py leaves, as `python -m tests.pretended` runs it."""
    rows, columns = EXAMPLES[task_class]
    path = write(directory / "mine.jsonl", rows[:40])
    flags = ["--preset", "demo", "--vocab_size", 400, *SIZES[task_class], "--num_train_epochs", 1]
    place = ["--dataset_name_or_path", path, "--checkpoint_dir", directory / "checkpoint"]
    main(list(map(str, [ROOT / task_class.name / "train.py", *flags, *columns, *place])))
    return directory / "checkpoint"


def analyzed(task_class, device, directory, checkpoint, flags):
    """{strategy: scores} as analyze.py leaves them, on that device."""
    common = ["--preset", "demo", "--num_queries", 4, "--track", "all", "--damping_factor", "heuristic"]
    place = ["--checkpoint_dir", checkpoint, "--output_dir", directory, "--factor_strategy", *STRATEGIES]
    assert f"on {device}" in run("analyze", *common, *place, *flags, task_class=task_class).ok()
    files = {strategy: next(directory.glob(f"scores_{strategy}*/*.safetensors")) for strategy in STRATEGIES}
    return {strategy: load_file(file)["all_modules"] for strategy, file in files.items()}


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("task_class", EXAMPLES)
def test_an_example_gives_what_it_gives_on_the_cpu(task_class, tmp_path, capsys):
    checkpoint = trained(task_class, tmp_path)
    said = capsys.readouterr().out
    assert "1 x cuda" in said and "fitting.py" in said.partition("The host waited for the device")[2]
    for dtype, flags in {"float32": [], "bfloat16": ["--use_half_precision"]}.items():
        expected = analyzed(task_class, "cpu", tmp_path / f"cpu-{dtype}", checkpoint, flags)
        with pretended_cuda():
            actual = analyzed(task_class, "cuda", tmp_path / f"cuda-{dtype}", checkpoint, flags)
        for strategy in STRATEGIES:
            if dtype == "float32":
                allowed = EKFAC_BY_ROUNDING if (task_class, strategy) == (SwagTask, "ekfac") else 1e-4
                assert relative_error(actual[strategy], expected[strategy]) < allowed, strategy
            else:
                assert spearman(actual[strategy], expected[strategy]).mean() > 0.95, strategy
