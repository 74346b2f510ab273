"""analyze.py --compute_per_token_scores of the examples, adapters and several checkpoints: parts sum to the scores."""

import pytest
import torch
from safetensors.torch import load_file

from dailymail_t5.task import DailyMailTask
from influence_core.files import read_sealed_json
from swag_roberta.task import SwagTask
from tests.own_data import PAIRS, QUESTIONS, SIZES, TEXTS, write
from tests.scripts import run
from tests.test_exactness import relative_error
from wikitext_gpt2.task import WikiTextTask

EXAMPLES = {
    "texts": (WikiTextTask, [{"body": text} for text in TEXTS], ["--one_row_one_example"], []),
    "adapters": (WikiTextTask, [{"body": text} for text in TEXTS], ["--one_row_one_example"], ["--lora_rank", "2"]),
    "endings": (SwagTask, QUESTIONS, ["--text_column", "context", "--ending_columns", "A", "B", "C"], []),
    "summaries": (DailyMailTask, PAIRS, ["--prompt_column", "ask"], []),
    "several checkpoints": (
        WikiTextTask, [{"body": text} for text in TEXTS], ["--one_row_one_example"],
        ["--save_at", "1", "--num_train_epochs", "2"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("example", EXAMPLES)
def test_parts_sum_to_the_scores(example, tmp_path):
    task_class, rows, columns, training = EXAMPLES[example]
    path = write(tmp_path / "mine.jsonl", rows[:40])
    checkpoint, results = tmp_path / "checkpoint", tmp_path / "results"
    flags = ["--preset", "demo", "--vocab_size", 400, *SIZES[task_class], "--num_train_epochs", 1, *training]
    place = ["--dataset_name_or_path", path, "--checkpoint_dir", checkpoint]
    if example == "adapters":
        base = [*place[:2], "--checkpoint_dir", tmp_path / "base"]
        run("train", *flags[:-2], *columns, *base, task_class=task_class).ok()
        flags = ["--preset", "demo", "--model_name_or_path", tmp_path / "base", "--block_size", 32, *flags[-2:]]
    run("train", *flags, *columns, *place, task_class=task_class).ok()
    looking = ["--compute_per_token_scores", "--self_influence", "--report_queries", 2]
    looking += ["--checkpoints", "all"] if "checkpoints" in example else []
    common = ["--preset", "demo", "--num_queries", 3, "--track", "all", "--damping_factor", "heuristic"]
    common += ["--checkpoint_dir", checkpoint, "--output_dir", results, "--factor_strategy", "ekfac", "kfac"]
    run("analyze", *common, *looking, task_class=task_class).ok()
    for strategy in ("ekfac", "kfac"):
        directory = results / f"scores_{strategy}"
        scores = load_file(directory / "pairwise_scores.safetensors")["all_modules"]
        parts = load_file(directory / "score_parts.safetensors")
        expected = scores[parts["pairs"][:, 0], parts["pairs"][:, 1]]
        layers = read_sealed_json(directory / "score_parts.json")["counts"]["layers"]
        assert parts["by_layer"].shape == (len(expected), len(layers))
        assert relative_error(parts["by_layer"].sum(1), expected) < 1e-4
        for name in ("train_tokens", "query_tokens"):
            tokens = parts[name].split(parts[f"num_{name}"].tolist())
            assert relative_error(torch.stack([x.sum() for x in tokens]), expected) < 1e-4
            placed = torch.stack([x[:-1].abs().sum() for x in tokens])
            without = torch.stack([x[-1].abs() for x in tokens])
            assert (without < (5 if example == "endings" else 1e-5) * placed).all()  # a pooler sees no token
        assert (load_file(directory / "self_influence.safetensors")["all_modules"] > 0).all()
    if "checkpoints" in example:
        steps = [load_file(x)["all_modules"] for x in results.glob("step-*/scores_ekfac/self_influence.safetensors")]
        mean = load_file(results / "scores_ekfac" / "self_influence.safetensors")["all_modules"]
        assert len(steps) == 2 and relative_error(torch.stack(steps).mean(0), mean) < 1e-6
