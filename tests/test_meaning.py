"""What a score means: on a least-squares problem it is the change that leaving an example out makes.

One layer y = w.x + b with loss (y - y_t)^2 / 2, trained to the optimum. With a = (x, 1) and one position per example:

* The Hessian of an example's loss is a a^T. So is its Fisher, if the residuals of sampled labels have mean square 1.
  Here they are +1 or -1, with equal chances: then g^2 = 1 in every draw, KFAC's G is 1, its A is E[a a^T], and EKFAC's
  Lambda are A's eigenvalues. Both are the mean Hessian H exactly, with no noise from sampling.
* Leaving example t out moves the optimum by exactly H^-1 grad L(t) / N / (1 - h_t), with the leverage
  h_t = a_t^T H^-1 a_t / N. For a measurement that is linear in the parameters (the prediction) the change is therefore
  exactly  score / N / (1 - h_t); for another (the query's loss) it is that to first order.
* Influence as such leaves 1 / (1 - h_t) out: a first-order answer, whose error is the leverage.
* Identity and diagonal are not exact, where features are correlated: the control.

The refits are independent: torch.linalg.lstsq on the remaining examples.
"""

import pytest
import torch
from torch import nn

from influence_core.analysis import analyze
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX, InfluenceTask
from tests.studies import STRATEGIES
from tests.test_exactness import FLOAT64

NUM_TRAIN, NUM_QUERIES, FEATURES = 30, 8, 4


def least_squares(examples):
    """The optimal (w, b), [features + 1]."""
    inputs = torch.stack([torch.cat([x, x.new_ones(1)]) for x, _ in examples])
    targets = torch.stack([y for _, y in examples])
    return torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]


class RegressionTask(InfluenceTask):
    """Correlated features, a nonlinear truth and noise; `measured` is "prediction" or "loss"."""

    def __init__(self, measured):
        self.measured = measured

    def load_model(self, checkpoint_dir=None):
        model = nn.Sequential(nn.Linear(FEATURES, 1)).double()
        optimum = least_squares(self.load_dataset("train"))
        with torch.no_grad():
            model[0].weight.copy_(optimum[None, :-1])
            model[0].bias.copy_(optimum[-1:])
        return model

    def load_dataset(self, split, indices=None):
        generator = torch.Generator().manual_seed({"train": 4, "validation": 5}[split])
        count = {"train": NUM_TRAIN, "validation": NUM_QUERIES}[split]
        mixing = torch.eye(FEATURES) + 0.8 * torch.ones(FEATURES, FEATURES).triu(1)
        inputs = torch.randn(count, FEATURES, generator=generator) @ mixing + 0.5
        noise = torch.randn(count, generator=generator)
        targets = inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3 * inputs[:, 0] ** 2 + noise
        return list(zip(inputs.double(), targets.double()))

    def collate(self, examples):
        return {"x": torch.stack([x for x, _ in examples]), "y": torch.stack([y for _, y in examples])}

    def train_loss(self, model, batch, sample_labels=None):
        predictions = model(batch["x"])[:, 0]
        targets = batch["y"]
        if sample_labels is not None:
            heads = sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0] < 0.5
            targets = predictions.detach() + torch.where(heads, 1.0, -1.0)
        return (predictions - targets).square().sum() / 2

    def measurement(self, model, batch):
        return model(batch["x"]).sum() if self.measured == "prediction" else self.train_loss(model, batch)

    def tracked_layer_names(self, model):
        return ["0"]

    def describe(self, example):
        return str(example)

    def measure(self, parameters, query):
        """The measurement by hand, with (w, b) as one vector."""
        x, y = query
        prediction = torch.cat([x, x.new_ones(1)]) @ parameters
        return prediction if self.measured == "prediction" else (prediction - y).square() / 2


class Truth:
    """Exact changes of every measurement when each training example is left out, and the leverages."""

    def __init__(self, task):
        self.train, self.queries = task.load_dataset("train"), task.load_dataset("validation")
        optimum = least_squares(self.train)
        refits = [least_squares(self.train[:t] + self.train[t + 1 :]) for t in range(NUM_TRAIN)]
        self.changes = torch.stack(
            [
                torch.stack([task.measure(refit, query) - task.measure(optimum, query) for refit in refits])
                for query in self.queries
            ]
        )
        inputs = torch.stack([torch.cat([x, x.new_ones(1)]) for x, _ in self.train])
        self.leverages = (inputs @ torch.linalg.inv(inputs.T @ inputs) * inputs).sum(-1)


def influence(directory, task, strategies, damping=1e-12):
    """{strategy: scores} by the core, float64."""
    study = Study(task, task.load_model(), task.load_dataset("train"), directory, Runtime(precision=FLOAT64))
    sizes = {"query_batch_size": 3, "train_batch_size": 7, "factor_batch_size": 11}
    return analyze(study, strategies, task.load_dataset("validation"), damping, **sizes)


def correlation_and_slope(predicted, actual):
    """Pearson correlation, and the slope of the line of least squares actual = slope * predicted."""
    p, a = predicted.flatten(), actual.flatten()
    correlation = torch.corrcoef(torch.stack([p, a]))[0, 1]
    return float(correlation), float((p @ a) / (p @ p))


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_score_is_the_exact_change_of_a_prediction(tmp_path, strategy):
    """score / N / (1 - leverage) against refits, for a measurement linear in the parameters: equal."""
    task = RegressionTask("prediction")
    truth = Truth(task)
    scores = influence(tmp_path, task, [strategy])[strategy]
    predicted = scores / NUM_TRAIN / (1 - truth.leverages)
    torch.testing.assert_close(predicted, truth.changes, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
@pytest.mark.parametrize("measured", ["prediction", "loss"])
def test_score_is_to_first_order_the_change_of_any_measurement(tmp_path, measured, strategy):
    """score / N against refits, uncorrected: right sign, right scale, nearly right order.

    Positive: without t the measurement rises, so training on t had lowered it. The slope is that of 1 / (1 - leverage)
    on the average, with a mean leverage of 5 / 30; corrected for it, the loss's slope is 1 but for second order.
    """
    task = RegressionTask(measured)
    truth = Truth(task)
    scores = influence(tmp_path, task, [strategy])[strategy]
    assert truth.leverages.sum().item() == pytest.approx(FEATURES + 1)
    correlation, slope = correlation_and_slope(scores / NUM_TRAIN, truth.changes)
    assert correlation > 0.99
    assert slope == pytest.approx((1 / (1 - truth.leverages)).mean().item(), abs=0.05)
    correlation, slope = correlation_and_slope(scores / NUM_TRAIN / (1 - truth.leverages), truth.changes)
    assert correlation > 0.995
    assert slope == pytest.approx(1.0, abs=0.03)


def test_other_approximations_are_not_exact(tmp_path):
    """The control: identity and diagonal on correlated features, and heavy damping, are clearly worse."""
    task = RegressionTask("prediction")
    truth = Truth(task)
    scores = influence(tmp_path / "light", task, STRATEGIES)
    scores["heavily damped"] = influence(tmp_path / "heavy", task, ["kfac"], damping=10.0)["kfac"]
    correlations = {}
    for name, block in scores.items():
        corrected = block / NUM_TRAIN / (1 - truth.leverages)
        correlations[name], _ = correlation_and_slope(corrected, truth.changes)
    assert correlations["kfac"] > 0.999999 and correlations["ekfac"] > 0.999999
    for name in ("identity", "diagonal", "heavily damped"):
        assert 0.3 < correlations[name] < 0.8, name
