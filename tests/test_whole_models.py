"""Every parameter that can be tracked of the table of models: scores against plain autograd, example by example."""

import pytest
import torch

from influence_core.runtime import Runtime
from influence_core.study import Study
from tests.studies import score
from tests.test_any_model import CASES, build, own_loss, own_measurement, parameter
from tests.test_exactness import DAMPING, FLOAT64, SEED, relative_error


@pytest.fixture(scope="module", params=map(parameter, CASES))
def case(request):
    return build(request.param)


def own_gradients(model, parameters, losses):
    """[examples, numbers of all parameters]"""
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(rows)


def test_scores_of_all_parameters(case, tmp_path):
    name, task, model, is_partly_float32 = case
    task.tracked_kinds = "all"
    model = model.double()
    train, queries = task.load_dataset("train"), task.load_dataset("validation")
    study = Study(task, model, train, tmp_path, Runtime(precision=FLOAT64, seed=SEED))
    tracked = {id(p): p for layer in study.layers for p in layer.parameters}
    names = [n for n, p in model.named_parameters() if id(p) not in tracked]
    print(name, "left out:", names, task.observe(model).unfit)
    scores = score(study, ["identity", "diagonal"], query_batch_size=2, train_batch_size=7)
    parameters = list(tracked.values())
    of_train, of_queries, of_fisher = (
        own_gradients(model, parameters, losses)
        for losses in (
            [own_loss(task, x) for x in train],
            [own_measurement(task, x) for x in queries],
            [own_loss(task, x, index) for index, x in enumerate(train)],
        )
    )
    inverse = 1 / (of_fisher.square().mean(0) + DAMPING)
    bound = 1e-5 if is_partly_float32 else 1e-9
    for strategy, expected in (
        ("identity", of_queries @ of_train.T),
        ("diagonal", (of_queries * inverse) @ of_train.T),
    ):
        assert relative_error(scores[strategy], expected) < bound, strategy
    assert id(model.get_input_embeddings().weight) in tracked
    for part, own in model.named_parameters():
        if "norm" in part.lower() and "encoder.LayerNorm" not in part:  # DeBERTa's, applied once for all examples
            assert id(own) in tracked, part
