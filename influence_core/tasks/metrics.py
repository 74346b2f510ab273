"""Metrics through the interface of the evaluate library, defined here, so that nothing is downloaded."""

import re

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

ROUGE_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


class Accuracy(evaluate.Metric):
    """The share of predictions that are the reference."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="share of predictions that are the reference",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Of class indices [examples]."""
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=predictions.long().tolist(), references=labels.long().tolist())["accuracy"]


class Rouge(evaluate.Metric):
    """F-measures of ROUGE with stemming, of each prediction; sentences for rougeLsum end at . ! or ?"""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="overlap of n-grams and of the longest common subsequence",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
        scores = [scorer.score(_by_line(reference), _by_line(text)) for text, reference in zip(predictions, references)]
        return {name: [score[name].fmeasure for score in scores] for name in ROUGE_TYPES}


def _by_line(text: str) -> str:
    """One sentence a line, as rougeLsum wants it."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


def rouge(predictions: list[str], references: list[str]) -> dict[str, list[float]]:
    """{"rouge1", "rouge2", "rougeL", "rougeLsum": [texts], from 0 to 1}"""
    return Rouge(keep_in_memory=True).compute(predictions=predictions, references=references)
