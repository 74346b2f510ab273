"""What a score is made of, for the pairs that are shown, and where that is stored: each layer's share of it, and each
token's; computed in explaining.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.errors import UserError
from influence_core.fingerprints import digest
from influence_core.storage import StageStore
from influence_core.study import Study

STAGE = "score_parts"
SHOWN_EACH = 10  # highest and lowest training examples of a query whose scores are looked into

Pair = tuple[int, int]  # query, training example


@dataclass(frozen=True)
class ScoreParts:
    """Of some pairs; each part sums to the pair's score, but for rounding."""

    pairs: list[Pair]
    layers: list[str]  # labels of the tracked layers
    by_layer: Tensor  # [pairs, layers]
    train_tokens: list[Tensor] | None  # of each pair [tokens of the training example + 1], see tokens.py
    query_tokens: list[Tensor] | None  # of each pair [tokens of the query + 1]

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the labels, to be stored."""
        tensors = {"pairs": torch.tensor(self.pairs, dtype=torch.int64).view(-1, 2), "by_layer": self.by_layer}
        for name in ("train_tokens", "query_tokens"):
            if (of_pairs := getattr(self, name)) is not None:
                tensors[name] = torch.cat(of_pairs) if of_pairs else torch.zeros(0)
                tensors[f"num_{name}"] = torch.tensor(list(map(len, of_pairs)), dtype=torch.int64)
        return tensors

    @classmethod
    def mean(cls, several: Sequence["ScoreParts"]) -> "ScoreParts":
        """Of parts of the same pairs."""

        def of(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(tensors)).double().mean(0).to(tensors[0].dtype)

        first = several[0]
        sides = [[parts.train_tokens for parts in several], [parts.query_tokens for parts in several]]
        tokens = [None if side[0] is None else [of(of_pair) for of_pair in zip(*side)] for side in sides]
        return cls(first.pairs, first.layers, of([parts.by_layer for parts in several]), *tokens)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: list[str]) -> "ScoreParts":
        """From what `tensors` gave."""
        tokens = [
            list(tensors[name].split(tensors[f"num_{name}"].tolist())) if name in tensors else None
            for name in ("train_tokens", "query_tokens")
        ]
        return cls([(q, t) for q, t in tensors["pairs"].tolist()], layers, tensors["by_layer"], *tokens)


def shown_pairs(scores: Tensor, num_queries: int, num_each: int) -> list[Pair]:
    """The pairs of the first queries with the training examples of their highest and their lowest scores.

    Args:
        scores: [queries, training examples].
        num_each: highest, and as many lowest ones.
    """
    pairs: list[Pair] = []
    for query, row in enumerate(scores[:num_queries]):
        order = row.argsort(descending=True, stable=True).tolist()
        shown = order if len(order) <= 2 * num_each else order[:num_each] + order[-num_each:]
        pairs += [(query, index) for index in shown]
    return pairs


def parts_store(study: Study, score_store: StageStore, pairs: Sequence[Pair], by_token: bool) -> StageStore:
    """Where the parts of these scores lie: beside them, and of no others."""
    settings = {
        "scores": score_store.checksum(),
        "pairs": digest([str(list(pairs)).encode()]),
        "by_token": by_token,
    }
    return StageStore(score_store.directory, STAGE, settings, study.made_by, study.writer)


def drop_parts_of_others(store: StageStore) -> None:
    """Of other pairs, or of earlier scores: they are made of the scores that are there, so nothing is lost."""
    try:
        store.manifest()
    except UserError:
        store.discard()


def load_score_parts(store: StageStore) -> ScoreParts | None:
    """Those that are stored, if any are."""
    manifest = store.manifest()
    return None if manifest is None else ScoreParts.of(store.load()[STAGE], manifest["counts"]["layers"])
