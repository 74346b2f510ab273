"""dailymail_t5: every layer is masked by the stream that it reads, and padding of either stream changes nothing."""

import json

import datasets
import pytest
import torch
from torch import nn

from dailymail_t5.task import DailyMailTask
from influence_core import analysis
from influence_core.errors import UserError
from influence_core.labels import LabelSampler
from influence_core.losses import IGNORED
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.tasks.demo_corpus import DEMO_CORPUS, demo_summaries
from influence_core.tasks.example import MEASUREMENT
from influence_core.tasks.metrics import rouge
from tests import reference
from tests.scripts import SHARED, run
from tests.studies import STRATEGIES, score
from tests.test_exactness import FLOAT64, SEED, load, relative_error

ARTICLES, TOKENIZER = SHARED / "data" / "cnn_dailymail", SHARED / "models" / "t5-tokenizer"
TINY = "num_layers=1,d_model=16,d_ff=24,num_heads=2,d_kv=8,dropout_rate=0"
MODELS = {"relu": TINY, "gated": TINY + ",feed_forward_proj=gated-gelu,tie_word_embeddings=False"}
NUM_TRAIN, NUM_QUERIES = 14, 4


def flags(**changes):
    tiny = {"config_overrides": TINY, "vocab_size": 400, "max_source_length": 60, "max_target_length": 20}
    return dict.fromkeys(DailyMailTask.flag_names()) | tiny | {"dataset_name_or_path": DEMO_CORPUS} | changes


class WidePadding(DailyMailTask):
    """Both streams padded to the same length, however long they are."""

    def collate(self, examples):
        batch = super().collate(examples)
        padding = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {key: nn.functional.pad(x, (0, 70 - x.shape[1]), value=padding[key]) for key, x in batch.items()}


class ArticleMask(WidePadding):
    """The control, and what the known peer does: the encoder's mask for all layers, where its shape happens to fit."""

    def position_mask(self, batch, layer_name):
        return batch["attention_mask"]


class NarrowArticleMask(DailyMailTask):
    """The same where it does not fit: the summary is shorter than the article."""

    def position_mask(self, batch, layer_name):
        return batch["attention_mask"]


def make_model(config):
    torch.manual_seed(0)
    model = DailyMailTask(**flags(config_overrides=config)).load_model(None).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def analyzed(task_class, model, directory, empirical=False, **options):
    task = task_class(**flags())
    train = task.load_dataset("train", range(NUM_TRAIN))
    runtime = Runtime(precision=FLOAT64, seed=SEED)
    study = Study(task, model, train, directory, runtime, use_empirical_fisher=empirical)
    sizes = {"query_batch_size": 3, "train_batch_size": 4, "factor_batch_size": 5}
    return score(study, num_queries=NUM_QUERIES, **{**sizes, **options})


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(MODELS[request.param])


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    """(directory, scores) by class of task."""

    def run_analysis(task_class):
        directory = tmp_path_factory.mktemp(task_class.__name__)
        return directory, analyzed(task_class, model, directory)

    return {task_class: run_analysis(task_class) for task_class in (DailyMailTask, WidePadding)}


def loss_of(task, example, index=0, sampler=None):
    """The loss of one example by itself, without any padding, as a function of the model."""
    batch = task.collate([example]) | {"example_index": torch.tensor([index])}
    return lambda model: task.train_loss(model, batch, sampler)


def test_identity_scores_are_products_of_whole_gradients(model, scored):
    """Each example alone, its gradient by plain autograd, against the engine's scores from padded batches."""
    task = DailyMailTask(**flags())
    parameters = [model.get_parameter(f"{name}.weight") for name in task.tracked_layer_names(model)]

    def gradients(split, number):
        for example in task.load_dataset(split, range(number)):
            grads = torch.autograd.grad(loss_of(task, example)(model), parameters)
            yield torch.cat([gradient.flatten() for gradient in grads])

    train, queries = (
        torch.stack(list(gradients(*each))) for each in (("train", NUM_TRAIN), ("validation", NUM_QUERIES))
    )
    assert relative_error(scored[DailyMailTask][1]["identity"], queries @ train.T) < 1e-11


def test_covariances_are_those_of_unpadded_examples(model, scored):
    """Sampled labels, every layer: of the encoder, of the decoder, and those that read one from the other."""
    task, sampler = DailyMailTask(**flags()), LabelSampler(SEED)
    examples = task.load_dataset("train", range(NUM_TRAIN))
    losses = [loss_of(task, example, index, sampler) for index, example in enumerate(examples)]
    stored = {kind: load(scored[DailyMailTask][0] / "factors_ekfac", f"{kind}_covariance")
              for kind in ("activation", "gradient")}  # fmt: skip
    for name in task.tracked_layer_names(model):
        all_real = [torch.ones(100, dtype=torch.bool)] * NUM_TRAIN
        expected = reference.covariances(model, name, losses, all_real)
        for kind, matrix in zip(stored, expected):
            assert relative_error(stored[kind][name], matrix) < 1e-11, (name, kind)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_changes_no_score(strategy, scored):
    """Trimmed, or both streams padded to 70 positions."""
    assert relative_error(scored[WidePadding][1][strategy], scored[DailyMailTask][1][strategy]) < 1e-8


def test_the_other_stream_s_mask_is_refused_where_it_fits(model, scored, tmp_path, monkeypatch):
    """The control for the test above, and what the known peer does: the scores would be others."""
    with pytest.raises(UserError, match=r"layer decoder\S+ counts .* of padding"):
        analyzed(ArticleMask, model, tmp_path / "checked", strategies=["kfac"])
    monkeypatch.setattr(analysis, "check_contract", lambda *_: "not at all")
    scores = analyzed(ArticleMask, model, tmp_path / "unchecked", strategies=["kfac", "ekfac"])
    for strategy, matrix in scores.items():
        assert relative_error(matrix, scored[DailyMailTask][1][strategy]) > 1e-4


def test_the_mask_of_the_other_stream_is_refused(model, tmp_path):
    """Where its shape does not fit: never skipped, as the peer does."""
    with pytest.raises(UserError, match="position mask of layer decoder.*mask of its own input stream"):
        analyzed(NarrowArticleMask, model, tmp_path, strategies=["kfac"])


def test_batches_change_no_score(model, scored, tmp_path):
    """Sampled labels belong to the example, whatever batch it is in."""
    sizes = {"query_batch_size": 1, "train_batch_size": 9, "factor_batch_size": 2}
    scores = analyzed(DailyMailTask, model, tmp_path, **sizes)
    for strategy in STRATEGIES:
        assert relative_error(scores[strategy], scored[DailyMailTask][1][strategy]) < 1e-8


def test_the_loss_is_that_of_the_model(model):
    """Summed over tokens; -100 carries none. Encoder, decoder and head by hand, against the model's own."""
    task = DailyMailTask(**flags())
    batch = WidePadding(**flags()).collate(task.load_dataset("train", range(5))) | {"example_index": torch.arange(5)}
    num_tokens = (batch["labels"] != IGNORED).sum()
    expected = model(**{key: value for key, value in batch.items() if key != "example_index"}).loss * num_tokens
    torch.testing.assert_close(task.train_loss(model, batch), expected)
    values = task.evaluation_values(model, batch)
    torch.testing.assert_close(values[MEASUREMENT].sum(), expected.detach())
    assert values["tokens"].sum() == num_tokens


@pytest.mark.parametrize("config, in_feed_forward", [("", 2), (",feed_forward_proj=gated-gelu", 3)])
def test_what_is_tracked(config, in_feed_forward):
    """Attention and feed-forward layers of all 2 + 2 blocks, neither head nor position biases."""
    task = DailyMailTask(**flags(config_overrides=TINY.replace("num_layers=1", "num_layers=2") + config))
    names = task.tracked_layer_names(task.load_model(None))
    assert len(names) == 2 * (4 + in_feed_forward) + 2 * (4 + 4 + in_feed_forward)
    assert all(name.split(".")[-1] in ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo") for name in names)


def test_rouge_by_hand():
    """Overlap of words, and of the longest common subsequence; sentences apart for rougeLsum."""
    scores = rouge(["the cat sat", "b. a."], ["the cat ran", "a. b."])
    assert scores["rouge1"] == pytest.approx([2 / 3, 1])
    assert scores["rouge2"] == pytest.approx([1 / 2, 0])
    assert scores["rougeL"] == pytest.approx([2 / 3, 1 / 2])
    assert scores["rougeLsum"] == pytest.approx([2 / 3, 1])


def test_rouge_of_what_the_model_writes(model):
    """Values of each article, each from 0 to 1; a model that writes the reference gets 1."""
    task = DailyMailTask(**flags())
    batch = task.collate(task.load_dataset("validation", range(3)))
    values = task.generation_values(model, batch)
    assert set(values) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert all(value.shape == (3,) and ((value >= 0) & (value <= 1)).all() for value in values.values())

    class Perfect:
        @staticmethod
        def generate(**options):
            return batch["labels"].masked_fill(batch["labels"] == IGNORED, task.tokenizer.pad_token_id)

    assert all((value == 1).all() for value in task.generation_values(Perfect, batch).values())


def test_the_demo_s_summaries():
    """The heading and the first sentence of the passage; both splits, nothing in common."""
    train, validation = demo_summaries("train"), demo_summaries("validation")
    assert len(train) > 500 and len(validation) > 50
    for row in (*train, *validation):
        heading, first = row["highlights"].split(": ", 1)
        assert heading and row["article"].startswith(first) and len(first) < len(row["article"])
    assert not {row["article"] for row in train} & {row["article"] for row in validation}


def test_a_stored_config_follows_its_overrides(tmp_path):
    """What T5Config derives from a field is derived anew: blocks of the decoder, the feed-forward's kind, the scale."""
    stored = DailyMailTask(**flags()).load_model(None).config
    stored.save_pretrained(tmp_path)
    overrides = "num_layers=3,feed_forward_proj=gated-gelu,tie_word_embeddings=False"
    changed = flags(model_name_or_path=str(tmp_path), config_overrides=overrides)
    config = DailyMailTask(**changed).load_model(None).config
    assert (config.num_layers, config.num_decoder_layers, config.d_model) == (3, 3, 16)
    assert config.is_gated_act and config.dense_act_fn == "gelu_new" and not config.scale_decoder_outputs


def test_only_the_articles_that_are_used_are_tokenised():
    """CNN/DailyMail has 287,113; a part of them needs no more than the parts that hold it."""
    task, made = DailyMailTask(**flags()), []
    tokenized = task.tokenized
    task.tokenized = lambda rows: made.append(len(rows)) or tokenized(rows)
    task.rows_at_once = 100
    assert len(task.load_dataset("train")) == len(demo_summaries("train")) and not made
    examples = task.load_dataset("train", [5, 7, 250, 8])
    assert made == [100, 100]
    expected = DailyMailTask(**flags()).load_dataset("train")
    assert all((x["labels"] == expected[i]["labels"]).all() for x, i in zip(examples, (5, 7, 250, 8)))
    assert len(list(task.load_dataset("train"))) == len(expected)


def test_lengths_that_hold_nothing():
    with pytest.raises(UserError, match="--max_target_length must be at least 2"):
        DailyMailTask(**flags(max_target_length=1))


@pytest.mark.skipif(not ARTICLES.exists(), reason="no CNN/DailyMail in ../shared/data")
def test_real_articles():
    """In the Hub's layout, with T5's own tokenizer and config: cut, prefixed, and shown without special tokens."""
    source = {"dataset_name_or_path": str(ARTICLES), "dataset_config": "3.0.0", "model_name_or_path": str(TOKENIZER)}
    lengths = {"max_source_length": 1024, "max_target_length": 128}
    task = DailyMailTask(**flags(**source, **lengths, config_overrides=None, vocab_size=None))
    examples = task.load_dataset("validation")
    assert len(examples) == 100 and len(task.load_dataset("train")) == 1100
    assert max(len(x["input_ids"]) for x in examples) == 1024 and max(len(x["labels"]) for x in examples) <= 128
    assert all(x["input_ids"][-1] == x["labels"][-1] == task.tokenizer.eos_token_id for x in examples)
    rows = datasets.load_dataset(str(ARTICLES), "3.0.0", split="validation")
    shown = task.describe(examples[0])
    assert shown.startswith("Summary: ") and "<" not in shown and "summarize:" not in shown
    assert " ".join(rows[0]["highlights"].split())[:40] in " ".join(shown.split())
    assert len(task.tracked_layer_names(task.load_model(None))) == 6 * 6 + 6 * 10  # t5-small


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint, and flags that name it and its results."""
    directory = tmp_path_factory.mktemp("dailymail")
    common = ["--preset", "demo", "--checkpoint_dir", directory / "checkpoint", "--num_train", "48"]
    train = [
        "--config_overrides",
        TINY,
        "--vocab_size",
        "400",
        "--max_source_length",
        "40",
        "--max_target_length",
        "12",
    ]
    out = run("train", *common, *train, "--num_train_epochs", "1", task_class=DailyMailTask).ok()
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith(("train", "validation"))}
    assert "rouge" not in lines["train"]
    assert all(name in lines["validation"] for name in ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum"))
    return [*common, "--output_dir", directory / "results", "--num_queries", "6"]


@pytest.mark.slow
def test_the_scripts_from_end_to_end(place, tmp_path):
    """As for every example: scores, then LDS and the counterfactual from one bank, with a figure each."""
    out = run("analyze", *place, "--factor_strategy", "ekfac", "identity", task_class=DailyMailTask).ok()
    assert "(6, 48) [queries, training examples]" in out and "Summary: " in out and "</s>" not in out
    place = [*place, "--figure_dir", tmp_path]
    out = run("evaluate_lds", *place, "--num_masks", "5", "--num_repeats", "2", task_class=DailyMailTask).ok()
    assert "ekfac - identity" in out and "Article: " in out and (tmp_path / "lds.png").exists()
    sizes = ["--removal_sizes", "0", "9", "--num_repeats", "2", "--num_counterfactual_queries", "6"]
    out = run("run_counterfactual", *place, *sizes, task_class=DailyMailTask).ok()
    assert "Mean query loss" in out and "ROUGE-L" in out and (tmp_path / "counterfactual.png").exists()
    result = json.loads((place[place.index("--output_dir") + 1] / "counterfactual.json").read_text())
    assert set(result["metrics"]) == {"mean query loss", "ROUGE-L"}
