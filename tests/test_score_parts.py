"""What scores are made of, by layer and by token, against the dense reference; each part sums to the score."""

import pytest
import torch
import transformers as hf

from influence_core.analysis import analyze, explain
from influence_core.errors import UserError
from influence_core.precision import Precision
from influence_core.runtime import Runtime
from influence_core.scores.parts import shown_pairs
from influence_core.study import Study
from tests import models, reference
from tests.models import make_model
from tests.studies import BATCH_SIZES, STRATEGIES
from tests.test_any_model import CONFIGS, own_loss, own_measurement
from tests.test_exactness import DAMPING, FLOAT64, SEED, Reference, relative_error
from tests.tiny import PAD, TinyTask
from tests.whole import WholeTask

NUM_QUERIES, NUM_EACH = 2, 3
SIZES = {"query_batch_size": 2, "train_batch_size": 7}


class Told(TinyTask):
    """The tiny task, which tells its tokens."""

    def token_rows(self, example):
        return {"words": [example["tokens"]]}

    def token_mask(self, batch, stream):
        return batch["labels"] != PAD


class ToldWhole(Told, WholeTask):
    pass


def run(directory, task, model, strategies, precision=FLOAT64, num_train=None, **options):
    """({strategy: scores}, {strategy: their parts}, the study) of the first queries."""
    study = Study(
        task, model, task.load_dataset("train")[:num_train], directory, Runtime(precision=precision, seed=SEED)
    )
    queries = task.load_dataset("validation")
    scores = analyze(study, strategies, queries, DAMPING, **SIZES)
    pairs = {name: shown_pairs(matrix, NUM_QUERIES, NUM_EACH) for name, matrix in scores.items()}
    return scores, explain(study, pairs, queries, DAMPING, **SIZES | options), study


def scores_of(scores, parts):
    return torch.stack([scores[query, index] for query, index in parts.pairs]).double()


def require_sums(scores, parts, tolerance):
    expected = scores_of(scores, parts)
    assert relative_error(parts.by_layer.sum(1), expected) < tolerance
    for tokens in (parts.train_tokens, parts.query_tokens):
        assert relative_error(torch.stack([of_pair.sum() for of_pair in tokens]), expected) < tolerance


# ------------------------------------------------------------------------------------------------ the tiny task, dense


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "layer called twice"])
def test_each_part_equals_the_dense_reference(tmp_path, strategy, shared):
    """By layer the triple product of that layer; by token, the part of a gradient that comes through its position."""
    truth = Reference(shared)
    truth.task = task = Told()
    scores, parts, _ = run(tmp_path, task, truth.model, [strategy])
    parts = parts[strategy]
    require_sums(scores[strategy], parts, 1e-9)
    by_layer, train_tokens, query_tokens = [], [0] * len(parts.pairs), [0] * len(parts.pairs)
    for name in task.layers:
        fisher = truth.approximate_fisher(strategy, name)
        of_queries, of_train = (
            [truth.loss(x, x["labels"]) for x in examples] for examples in (truth.queries, truth.train)
        )
        of_layer = reference.scores(
            strategy, fisher, DAMPING, truth.gradients(name, of_queries), truth.gradients(name, of_train)
        )
        by_layer.append(scores_of(of_layer, parts))
        for number, (query, index) in enumerate(parts.pairs):
            for loss, other, totals in (
                (of_train[index], of_queries[query], train_tokens),
                (of_queries[query], of_train[index], query_tokens),
            ):
                (gradient,) = truth.gradients(name, [other])
                direction = reference.precondition(strategy, fisher, DAMPING, gradient)
                totals[number] = totals[number] + products(truth.model, name, loss, direction, name == "second")
    assert relative_error(parts.by_layer, torch.stack(by_layer, 1)) < 1e-9
    for actual, expected in ((parts.train_tokens, train_tokens), (parts.query_tokens, query_tokens)):
        for of_pair, wanted in zip(actual, expected):
            assert of_pair[-1] == 0
            assert (of_pair[:-1] - wanted).abs().max() < 1e-9 * max(x.abs().max() for x in expected)


def products(model, name, loss, direction, transposed):
    """[positions]: <part of the gradient, direction [out, in(+1)]>, all calls added up."""
    total = 0
    for call in reference.position_gradients(model, name, loss):
        weight = call["weight"].transpose(1, 2) if transposed else call["weight"]
        gradient = torch.cat([weight, call["bias"].unsqueeze(-1)], -1) if "bias" in call else weight
        total = total + (gradient * direction).sum((1, 2))
    return total


# ------------------------------------------------------------------------------------ every kind of layer, many models


def expected_tokens(model, layers, loss, other, rows_by_length, num_tokens):
    """[tokens + 1] of the identity strategy: <part of d loss, d other>, placed by how many positions a call has.

    Args:
        rows_by_length: {positions of a call: the first number of its tokens, for each call in turn}.
    """
    total = torch.zeros(num_tokens + 1, dtype=torch.float64)
    other(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.zero_grad()
    for layer in layers:
        for site, module in layer.sites.items():
            turns = {length: iter(firsts) for length, firsts in rows_by_length.items()}
            directions = {key: gradients[f"{site}.{key}"] for key, _ in module.named_parameters()}
            for call in reference.position_gradients(model, site, loss):
                parts = sum((x * directions[key]).flatten(1).sum(1) for key, x in call.items())
                first = next(turns.get(len(parts), iter(())), None)
                if first is None:
                    total[-1] += parts.sum()
                else:
                    total[first : first + len(parts)] += parts
    return total


@pytest.mark.parametrize("head, held", [("tied", False), ("tied", True), ("untied, with a bias", True)])
def test_every_kind_of_layer_is_split_by_token(tmp_path, head, held):
    """Tables that are looked up and that make logits, held or not, norms, positions and matrices."""
    task = ToldWhole(head, held)
    model = task.load_model().double()
    scores, parts, study = run(tmp_path, task, model, STRATEGIES, num_train=12)
    for strategy in STRATEGIES:
        require_sums(scores[strategy], parts[strategy], 1e-9)

    def loss(example, factor):
        tokens, mask = example["tokens"][None], torch.ones(1, len(example["tokens"]), dtype=torch.bool)
        return lambda model: (
            factor * torch.nn.functional.cross_entropy(model(tokens, mask)[0], example["labels"], reduction="sum")
        )

    for (query, index), tokens in zip(parts["identity"].pairs, parts["identity"].train_tokens):
        example, asked = study.train_dataset[index], task.load_dataset("validation")[query]
        size = len(example["tokens"])
        every_call = {size: [0] * 9}
        expected = expected_tokens(model, study.layers, loss(example, 1), loss(asked, -0.5), every_call, size)
        assert relative_error(tokens, expected) < 1e-9


CASES = [
    (models.RandomCausal, hf.AutoModelForCausalLM, "GPT-2"),
    (models.RandomCausalFromTheLeft, hf.AutoModelForCausalLM, "GPT-2"),
    (models.RandomClasses, hf.AutoModelForSequenceClassification, "BERT"),
    (models.RandomChoices, hf.AutoModelForMultipleChoice, "BERT"),
    (models.RandomPairs, hf.AutoModelForSeq2SeqLM, "T5"),
    (models.RandomPairs, hf.AutoModelForSeq2SeqLM, "T5 (gated, untied)"),
]


@pytest.mark.parametrize("kinds", ["blocks", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].kind} {case[2]}")
def test_positions_of_a_model_are_the_tokens_of_its_stream(tmp_path, case, kinds):
    """Each stream's layers go to its tokens, rows of an example to theirs, and a pooler to no token."""
    task_class, auto_model, name = case
    changes = {"num_labels": models.CLASSES} if task_class is models.RandomClasses else {}
    task, model = task_class(), make_model(auto_model, CONFIGS[name], **changes)
    task.tracked_kinds = kinds
    scores, parts, study = run(tmp_path, task, model, ["identity", "ekfac"])
    for strategy, of_strategy in parts.items():
        require_sums(scores[strategy], of_strategy, 1e-9)
    queries = task.load_dataset("validation")
    checked = 0
    for (query, index), tokens in zip(parts["identity"].pairs, parts["identity"].train_tokens):
        example = study.train_dataset[index]
        lengths = [len(row) for rows in task.token_rows(example).values() for row in rows]
        if task_class is models.RandomPairs and lengths[0] == lengths[1]:
            continue  # which is which could not be told by the number of positions
        firsts = [sum(lengths[:row]) for row in range(len(lengths))]
        by_length: dict = {}
        for length, first in zip(lengths, firsts):  # each call of a module that is called once a row
            by_length.setdefault(length, []).append(first)
        if task_class is models.RandomPairs:
            by_length = {length: first * 9 for length, first in by_length.items()}
        losses = own_loss(task, example), own_measurement(task, queries[query])
        expected = expected_tokens(model, study.layers, *losses, by_length, sum(lengths))
        assert relative_error(tokens, expected) < 1e-7
        has_pooler = task_class in (models.RandomClasses, models.RandomChoices)
        assert (tokens[-1].abs() > 1e-9) == has_pooler
        checked += 1
    assert checked > 2


@pytest.mark.parametrize("name", ["Qwen3", "ALBERT (one block, called twice)", "DeBERTa-v2 (own position layers)"])
def test_other_models_parts_sum_up(tmp_path, name):
    """Heads within a position, a block that is called twice, positions that all rows share."""
    is_causal = name in models.CAUSAL
    task = models.RandomCausal() if is_causal else models.RandomChoices()
    model = make_model(hf.AutoModelForCausalLM if is_causal else hf.AutoModelForMultipleChoice, CONFIGS[name])
    task.tracked_kinds = "all"
    scores, parts, _ = run(tmp_path, task, model, ["ekfac"])
    require_sums(scores["ekfac"], parts["ekfac"], 1e-6)
    without = [float(tokens[-1].abs() / tokens.abs().sum()) for tokens in parts["ekfac"].train_tokens]
    assert max(without) == 0 if is_causal else 0 < max(without) < 1


# ------------------------------------------------------------------------------------------------------------ promises


def test_parts_do_not_depend_on_batches_memory_or_processes(tmp_path):
    """Nor on how few layers and queries are at hand at once."""
    task = Told()
    expected = run(tmp_path / "one", task, task.load_model().double(), ["ekfac"])[1]["ekfac"]
    options = {"query_batch_size": 1, "train_batch_size": 1, "memory_budget": 1}
    actual = run(tmp_path / "other", task, task.load_model().double(), ["ekfac"], **options)[1]["ekfac"]
    assert actual.pairs == expected.pairs
    for one, other in zip(
        [expected.by_layer, *expected.train_tokens, *expected.query_tokens],
        [actual.by_layer, *actual.train_tokens, *actual.query_tokens],
    ):
        assert relative_error(one, other) < 1e-9


HALF = Precision.choose(torch.device("cpu"), True)


@pytest.mark.parametrize("precision, tolerance", [(Precision(), 2e-4), (HALF, 2e-2)], ids=["float32", "bfloat16"])
def test_parts_sum_to_the_score_in_fewer_digits(tmp_path, precision, tolerance):
    task = Told()
    scores, parts, _ = run(tmp_path, task, task.load_model(), STRATEGIES, precision)
    for strategy in STRATEGIES:
        require_sums(scores[strategy], parts[strategy], tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_of_a_sum_of_queries_are_the_sums_of_theirs(tmp_path, strategy):
    task = Told()
    model, train, queries = task.load_model().double(), task.load_dataset("train"), task.load_dataset("validation")
    runtime, found = Runtime(precision=FLOAT64, seed=SEED), []
    for sum_queries in (False, True):
        study = Study(task, model, train, tmp_path / str(sum_queries), runtime, sum_queries=sum_queries)
        scores = analyze(study, [strategy], queries, DAMPING, **SIZES)[strategy]
        pairs = [(query, index) for query in range(len(scores)) for index in (3, 0)]
        found.append(explain(study, {strategy: pairs}, queries, DAMPING, **SIZES)[strategy])
    each, of_sum = found
    assert of_sum.pairs == [(0, 3), (0, 0)] and of_sum.query_tokens is None
    assert relative_error(of_sum.by_layer, sum(each.by_layer.split(2))) < 1e-9
    for number, tokens in enumerate(of_sum.train_tokens):
        assert relative_error(tokens, sum(each.train_tokens[number::2])) < 1e-9


def test_parts_are_found_again_and_those_of_other_pairs_give_way(tmp_path, capsys):
    task = Told()
    scores, parts, study = run(tmp_path, task, task.load_model().double(), ["ekfac"])
    queries = task.load_dataset("validation")
    pairs = shown_pairs(scores["ekfac"], NUM_QUERIES, NUM_EACH)
    capsys.readouterr()
    again = explain(study, {"ekfac": pairs}, queries, DAMPING, **SIZES)["ekfac"]
    assert "score_parts.json" in capsys.readouterr().out
    assert again.pairs == pairs and torch.equal(again.by_layer, parts["ekfac"].by_layer)
    fewer = explain(study, {"ekfac": pairs[:-1]}, queries, DAMPING, **SIZES)["ekfac"]
    assert fewer.pairs == pairs[:-1] and torch.allclose(fewer.by_layer, again.by_layer[:-1])


def test_scores_that_are_not_there_are_not_explained(tmp_path):
    task = Told()
    study = Study(task, task.load_model(), task.load_dataset("train"), tmp_path)
    with pytest.raises(UserError, match="analyze first"):
        explain(study, {"ekfac": [(0, 0)]}, task.load_dataset("validation"))


def test_a_task_that_tells_no_tokens_has_parts_by_layer_alone(tmp_path):
    task = TinyTask()
    with pytest.raises(UserError, match="token_rows"):
        run(tmp_path, task, task.load_model().double(), ["ekfac"])
    scores, parts, _ = run(tmp_path, task, task.load_model().double(), ["ekfac"], by_token=False)
    assert parts["ekfac"].train_tokens is None
    assert relative_error(parts["ekfac"].by_layer.sum(1), scores_of(scores["ekfac"], parts["ekfac"])) < 1e-9


def test_a_task_whose_mask_is_not_of_its_tokens_is_refused(tmp_path):
    class Wrong(Told):
        def token_rows(self, example):
            return {"words": [example["tokens"][1:]]}

    with pytest.raises(UserError, match="token_mask marks"):
        run(tmp_path, Wrong(), Wrong().load_model().double(), ["ekfac"])


def test_shown_pairs_are_the_highest_and_the_lowest():
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    assert shown_pairs(scores, 1, 1) == [(0, 3), (0, 1)]
    assert shown_pairs(scores, 2, 2)[4:] == [(1, 4), (1, 3), (1, 1), (1, 0)]
    assert shown_pairs(scores, 1, 9) == [(0, 3), (0, 4), (0, 0), (0, 2), (0, 1)]


def test_batches_pad():
    """Else nothing above would say where the tokens of a padded batch lie."""
    assert len({len(example["tokens"]) for example in Told().load_dataset("train")}) > 3
    assert BATCH_SIZES["train_batch_size"] > 1
