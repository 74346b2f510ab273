"""Scores that are not finite although every gradient is: which layer, query and example is to blame."""

from torch import Tensor

from influence_core.errors import UserError
from influence_core.layers import Parts, TrackedLayer
from influence_core.scores.gradients import PerSampleGradients
from influence_core.study import Study

REMEDY = "nothing is stored: raise --damping_factor, or look at the checkpoint (a diverged training run?)"


def overflow(
    study: Study,
    gradients: PerSampleGradients,
    group: list[TrackedLayer],
    tile: range,
    resident: dict[str, Parts],
    scores: Tensor,
    columns: range,
) -> UserError:
    """What to tell the user.

    Args:
        group, tile: layers and queries (rows of the scores) of the pass.
        resident: preconditioned query gradients of the pass, see pairwise.py.
        scores: [strategies, queries of the tile, columns], some of them not finite.
        columns: the training examples that these are.
    """
    for layer in study.own(group):
        for part in resident[layer.name]:
            rows = (~part.isfinite().all(1)).nonzero()
            if len(rows):
                whose = _whose(study, tile[int(rows[0]) % len(tile)])
                return UserError(
                    f"the preconditioned gradient of {whose} at layer {layer.name} is beyond the range of the number "
                    f"format; {REMEDY}"
                )
    query, column = (int(index) for index in (~scores.isfinite()).any(0).nonzero()[0])
    pair = f"{_whose(study, tile[query])} with training example {columns[column]}"
    if study.runtime.sharded:  # the passes of one process alone would wait for the others
        return UserError(f"the score of {pair} is beyond the range of the number format; {REMEDY}")
    with study.gradient_pass(study.task.train_loss, group) as run:
        ((_, captured),) = study.captures(run, study.train_dataset, [columns[column]], 1, "training loss")
    where = ", summed over layers,"
    for layer in reversed(group):
        ((_, of_example),) = gradients.parts(layer, [captured.pop(layer.name)])
        products = map(study.runtime.precision.matmul, resident[layer.name], [part.t() for part in of_example])
        if not sum(products).isfinite().all():
            where = f" at layer {layer.name}"
    return UserError(f"the score of {pair}{where} is beyond the range of the number format; {REMEDY}")


def _whose(study: Study, row: int) -> str:
    """What a row of the scores is of."""
    return "the sum of the queries" if study.sum_queries else f"query {row}"
