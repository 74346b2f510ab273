"""kronfluence 1.0.1, run stage by stage: the peer that the benchmarks compare with."""

import copy
import json
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from torch import nn
from transformers.pytorch_utils import Conv1D

STAGES = {
    "Fit Covariance": "fit_covariance_matrices",
    "Perform Eigendecomposition": "perform_eigendecomposition",
    "Fit Lambda": "fit_lambda_matrices",
}


def with_linear_layers(model: nn.Module) -> nn.Module:
    """A copy with nn.Linear in place of Conv1D, which kronfluence does not track."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.t().contiguous(), child.bias.data
                setattr(module, name, linear)
    return model


class Peer:
    """Runs kronfluence on one of the tasks in tasks.py."""

    def __init__(self, task, model, directory: Path, strategy: str, damping: float | None, half: bool, compile: bool):
        """`damping`: None is its word for the heuristic."""
        self.for_peer = task.for_peer
        self.task = task.peer_task(task.tracked_layer_names(model))
        model = prepare_model(with_linear_layers(model), self.task)
        if compile:
            model = torch.compile(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.analyzer = Analyzer(
            "peer", model, self.task, cpu=on_cpu, profile=True, disable_tqdm=True, output_dir=str(directory)
        )
        self.strategy, self.damping, self.half = strategy, damping, half
        self.record = directory / "seconds.json"  # beside the factors: what the last fit took

    def fit(self, train_dataset, batch_size: int, decompose: bool = True) -> dict[str, float]:
        """Seconds of each factor stage, by the peer's own profiler.

        `decompose=False`: Lambda is fitted in the eigenvectors that an earlier fit left in this directory, where one
        did, and the decomposition's seconds are those of that fit; what it takes does not depend on the data.
        """
        arguments = FactorArguments(strategy=self.strategy)
        if self.half:
            arguments = all_low_precision_factor_arguments(strategy=self.strategy, dtype=torch.bfloat16)
        self.analyzer.profiler.recorded_durations.clear()
        train_dataset = list(map(self.for_peer, train_dataset))
        earlier = {} if decompose or not self.record.exists() else json.loads(self.record.read_text())
        common = {"factors_name": "factors", "factor_args": arguments, "overwrite_output_dir": True}
        data = {"dataset": train_dataset, "per_device_batch_size": batch_size}
        self.analyzer.fit_covariance_matrices(**common, **data)
        if not earlier:
            self.analyzer.perform_eigendecomposition(**common)
        self.analyzer.fit_lambda_matrices(**common, **data)
        recorded = self.analyzer.profiler.recorded_durations
        seconds = earlier | {stage: sum(recorded[stage]) for stage in STAGES if stage in recorded}
        self.record.write_text(json.dumps(seconds))
        return seconds

    def score(self, query_dataset, train_dataset, query_batch_size: int, train_batch_size: int):
        """(seconds, [queries, training examples])"""
        arguments = ScoreArguments(damping_factor=self.damping)
        if self.half:
            arguments = all_low_precision_score_arguments(damping_factor=self.damping, dtype=torch.bfloat16)
        self.analyzer.profiler.recorded_durations.clear()
        self.analyzer.compute_pairwise_scores(
            "scores",
            factors_name="factors",
            query_dataset=list(map(self.for_peer, query_dataset)),
            train_dataset=list(map(self.for_peer, train_dataset)),
            per_device_query_batch_size=query_batch_size,
            per_device_train_batch_size=train_batch_size,
            score_args=arguments,
            overwrite_output_dir=True,
        )
        seconds = sum(self.analyzer.profiler.recorded_durations["Compute Pairwise Score"])
        return seconds, self.analyzer.load_pairwise_scores("scores")["all_modules"].float()

    def factors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Covariances and Lambda, normalised to means."""
        covariances = self.analyzer.load_covariance_matrices("factors")
        factors = {
            f"{kind}_covariance": {
                name: matrix.float() / covariances[f"num_{kind}_covariance_processed"][name]
                for name, matrix in covariances[f"{kind}_covariance"].items()
            }
            for kind in ("activation", "gradient")
        }
        lambdas = self.analyzer.load_lambda_matrices("factors")
        factors["lambda_matrix"] = {
            name: matrix.float() / lambdas["num_lambda_processed"][name]
            for name, matrix in lambdas["lambda_matrix"].items()
        }
        return factors
