"""swag_roberta: four rows make one example, whichever way they are put together; padding changes nothing."""

import json

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModelForMultipleChoice, RobertaConfig

from influence_core import analysis
from influence_core.errors import UserError
from influence_core.fingerprints import dataset_fingerprint
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.tasks.classification import negative_margin
from influence_core.tasks.demo_corpus import demo_corpus, demo_questions
from influence_core.tasks.example import MEASUREMENT
from influence_core.tasks.metrics import accuracy
from swag_roberta.task import ENDINGS, SwagTask
from tests.scripts import SHARED, run
from tests.studies import STRATEGIES, score
from tests.test_exactness import FLOAT64, SEED, load, relative_error

SWAG, TOKENIZER = SHARED / "data" / "swag", SHARED / "models" / "roberta-tokenizer"
TINY = "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=24"
NUM_TRAIN, NUM_QUERIES = 18, 4


def flags(**changes):
    tiny = {"config_overrides": TINY, "vocab_size": 400, "max_length": 90, "dataset_name_or_path": "pydoc_data.topics"}
    return dict.fromkeys(SwagTask.flag_names()) | tiny | changes


class WholeRows(SwagTask):
    """Every row's gradient is made, and the hook adds four of them up."""

    rows_per_example = 1


class WidePadding(SwagTask):
    """Padded to max_length, as others do."""

    def collate(self, examples):
        batch = super().collate(examples)
        missing = self.max_length - batch["input_ids"].shape[-1]
        for key, value in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
            batch[key] = nn.functional.pad(batch[key], (0, missing), value=value)
        return batch


class Unmasked(WidePadding):
    """The control: covariances over padding."""

    def position_mask(self, batch, layer_name):
        return None


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SwagTask(**flags()).load_model(None).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # from a config, its biases are zero and its logits nearly equal
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    """(directory, scores) by class of task."""

    def run_analysis(task_class, **options):
        directory = tmp_path_factory.mktemp(task_class.__name__)
        return directory, analyzed(task_class, model, directory, **options)

    return {task_class: run_analysis(task_class) for task_class in (SwagTask, WholeRows, WidePadding)}


def analyzed(task_class, model, directory, **options):
    task = task_class(**flags())
    train = task.load_dataset("train", range(NUM_TRAIN))
    study = Study(task, model, train, directory, Runtime(precision=FLOAT64, seed=SEED))
    return score(study, num_queries=NUM_QUERIES, **options)


def gradient(model, task, example, loss):
    """Of one question, over the tracked layers, by plain autograd."""
    names = [f"{name}.{kind}" for name in task.tracked_layer_names(model) for kind in ("weight", "bias")]
    parameters = [model.get_parameter(name) for name in names]
    batch = task.collate([example]) | {"example_index": torch.tensor([0])}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, batch), parameters)])


def test_identity_scores_are_products_of_whole_gradients(model, scored):
    """Each question's gradient by plain autograd, four rows at once, against the engine's scores."""
    task = SwagTask(**flags())
    train = [gradient(model, task, x, task.train_loss) for x in task.load_dataset("train", range(NUM_TRAIN))]
    queries = [gradient(model, task, x, task.measurement) for x in task.load_dataset("validation", range(NUM_QUERIES))]
    expected = torch.stack(queries) @ torch.stack(train).T
    assert relative_error(scored[SwagTask][1]["identity"], expected) < 1e-11


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_end_to_end_or_summed_by_the_hook(strategy, scored):
    """The engine's way and the task's hook give the same factors and scores."""
    (one, scores), (other, hooked) = scored[SwagTask], scored[WholeRows]
    assert relative_error(scores[strategy], hooked[strategy]) < 1e-9
    for kind in ("activation_covariance", "gradient_covariance", "lambda_matrix"):
        expected = load(other / "factors_ekfac", kind)
        for name, matrix in load(one / "factors_ekfac", kind).items():
            if kind != "lambda_matrix":  # in whose basis a sign or an order may differ
                assert relative_error(matrix, expected[name]) < 1e-11
            assert matrix.sum() == pytest.approx(float(expected[name].sum()), rel=1e-9)


def test_the_hook_is_called_where_rows_are_whole(model, tmp_path):
    """Without the hook four rows would count as four examples; the engine cannot tell which is which, and says so."""

    class NoHook(SwagTask):
        rows_per_example = 1

        def post_process_per_sample_gradient(self, layer_name, gradient):
            return gradient

    with pytest.raises(UserError, match="rows"):
        analyzed(NoHook, model, tmp_path, strategies=["identity"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_changes_no_score(strategy, scored):
    """Trimmed to the longest of the batch, or padded to max_length."""
    assert relative_error(scored[WidePadding][1][strategy], scored[SwagTask][1][strategy]) < 1e-8


def test_covariances_over_padding_are_refused(model, scored, tmp_path, monkeypatch):
    """The control for the test above: they would be others."""
    with pytest.raises(UserError, match="counts .* of padding"):
        analyzed(Unmasked, model, tmp_path / "checked", strategies=["kfac"])
    monkeypatch.setattr(analysis, "check_contract", lambda *_: "not at all")
    scores = analyzed(Unmasked, model, tmp_path / "unchecked", strategies=["kfac", "ekfac"])
    for strategy, matrix in scores.items():
        assert relative_error(matrix, scored[SwagTask][1][strategy]) > 1e-4


def test_batches_change_no_score(model, scored, tmp_path):
    """Sampled labels belong to the question, whatever batch it is in."""
    sizes = {"query_batch_size": 1, "train_batch_size": 5, "factor_batch_size": 9}
    scores = analyzed(SwagTask, model, tmp_path, **sizes)
    for strategy in STRATEGIES:
        assert relative_error(scores[strategy], scored[SwagTask][1][strategy]) < 1e-8


def test_the_negative_margin_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 3.0]])
    others = torch.tensor([1.0, 0.0, -1.0]).exp().sum().log(), torch.tensor([0.0, 0.0, 3.0]).exp().sum().log()
    expected = torch.stack([others[0] - 2.0, others[1] - 0.0])
    torch.testing.assert_close(negative_margin(logits, torch.tensor([0, 1])), expected)


def test_the_evaluation_values_add_up_to_the_losses(model):
    task = SwagTask(**flags())
    examples = task.load_dataset("validation", range(5))
    batch = task.collate(examples) | {"example_index": torch.arange(5)}
    values = task.evaluation_values(model, batch)
    with torch.no_grad():
        assert float(values[MEASUREMENT].sum()) == pytest.approx(float(task.measurement(model, batch)))
        assert float(values["loss"].sum()) == pytest.approx(float(task.train_loss(model, batch)))
    assert accuracy(torch.tensor([0.0, 1, 2, 3]), torch.tensor([0.0, 1, 1, 3])) == 0.75


def test_the_demo_questions_hold_their_promise():
    """The right ending is the corpus's own next sentence; the others are of other topics; splits do not meet."""
    splits = {split: demo_questions(split) for split in ("train", "validation")}
    assert len(splits["train"]) > 500 and len(splits["validation"]) > 50
    assert splits["train"] == demo_questions("train")
    texts = {topic: " ".join(text.split()) for topic, text in demo_corpus().items()}
    for question in splits["validation"]:
        right = f"{question['sent1']} {question['sent2']} {question[ENDINGS[question['label']]]}"
        assert right in texts[question["topic"]]
    labels = torch.tensor([question["label"] for question in splits["train"]])
    assert labels.bincount().min() > 0.2 * len(labels)
    train, validation = ({dataset_fingerprint([question]) for question in split} for split in splits.values())
    assert not train & validation


def test_all_linear_layers_of_roberta_base_are_tracked():
    """12 layers of 6, the pooler and the classifier."""
    with torch.device("meta"):
        model = AutoModelForMultipleChoice.from_config(RobertaConfig())
    names = SwagTask(**flags()).tracked_layer_names(model)
    assert len(names) == 12 * 6 + 2
    assert set(names) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.skipif(not (SWAG.is_dir() and TOKENIZER.is_dir()), reason=f"no SWAG in {SWAG} or tokenizer in {TOKENIZER}")
def test_real_questions(tmp_path, monkeypatch):
    """The Hub's columns; sent1 against sent2 + ending, with RoBERTa's tokens; read as text without them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = SwagTask(**flags(
        dataset_name_or_path=str(SWAG), dataset_config="regular", tokenizer_name_or_path=str(TOKENIZER), max_length=128,
    ))  # fmt: skip
    train = task.load_dataset("train")
    assert (len(train), len(task.load_dataset("validation"))) == (560, 100)
    example = train[7]
    row = task.tokenizer.decode(example["input_ids"][2])
    assert row == f"<s>{example['sent1']}</s></s>{example['sent2']} {example['ending2']}</s>"
    text = task.describe(example)
    assert "<" not in text and f"-> {example[ENDINGS[example['label']]]}" in text


def test_more_tokens_than_the_model_has_positions_for_are_refused():
    """RoBERTa counts positions from the padding's index on: 40 of them are fewer for tokens."""
    task = SwagTask(**flags(config_overrides=TINY + ",max_position_embeddings=40", max_length=39))
    with pytest.raises(UserError, match="--max_length 39 is more than the model's 3. positions"):
        task.load_model(None)
    task = SwagTask(**flags(config_overrides=TINY + ",max_position_embeddings=40", max_length=30))
    batch = {**task.collate(task.load_dataset("train", range(2))), "example_index": torch.arange(2)}
    assert task.train_loss(task.load_model(None), batch).isfinite()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint, and flags that name it and its results."""
    directory = tmp_path_factory.mktemp("swag")
    common = ["--preset", "demo", "--checkpoint_dir", directory / "checkpoint", "--num_train", "48"]
    train = ["--config_overrides", TINY, "--vocab_size", "400", "--max_length", "24", "--num_train_epochs", "1"]
    out = run("train", *common, *train, task_class=SwagTask).ok()
    assert "accuracy" in out and "loss" in out
    return [*common, "--output_dir", directory / "results", "--num_queries", "6"]


@pytest.mark.slow
def test_the_scripts_from_end_to_end(place, tmp_path):
    """As for every example: scores, then LDS and the counterfactual from one bank, with a figure each."""
    out = run("analyze", *place, "--factor_strategy", "ekfac", "identity", task_class=SwagTask).ok()
    assert "(6, 48) [queries, training examples]" in out and "-> " in out and "<pad>" not in out
    place = [*place, "--figure_dir", tmp_path]
    out = run("evaluate_lds", *place, "--num_masks", "5", "--num_repeats", "2", task_class=SwagTask).ok()
    assert "ekfac - identity" in out and (tmp_path / "lds.png").exists()
    sizes = ["--removal_sizes", "0", "9", "--num_repeats", "2", "--num_counterfactual_queries", "6"]
    out = run("run_counterfactual", *place, *sizes, task_class=SwagTask).ok()
    assert "Query accuracy" in out and "Mean measurement" in out and (tmp_path / "counterfactual.png").exists()
    result = json.loads((place[place.index("--output_dir") + 1] / "counterfactual.json").read_text())
    assert set(result["metrics"]) == {"query accuracy", "mean measurement"}
