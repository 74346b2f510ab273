"""Layers by depth and by kind, as their labels say: no architecture's names are known here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$|\s)")


@dataclass(frozen=True)
class LayerGroups:
    """Names of groups of layers, and which one each layer is in."""

    names: list[str]
    of_layer: list[int]

    def sums(self, by_layer: np.ndarray) -> np.ndarray:
        """[pairs, layers] -> [pairs, groups]"""
        sums = np.zeros((len(by_layer), len(self.names)))
        np.add.at(sums, (slice(None), self.of_layer), by_layer)
        return sums


def by_depth(labels: Sequence[str]) -> LayerGroups:
    """A label's part up to its first number ("h.3" of "transformer.h.3.attn.c_attn"); without one, the label."""
    return _groups([_depth(label) for label in without_common_start(labels)])


def by_kind(labels: Sequence[str]) -> LayerGroups:
    """A label without its numbers ("h.attn.c_attn")."""
    names = without_common_start(labels)
    kinds = [_NUMBER.sub("", name) for name in names]
    kinds = [re.sub(r"\.{2,}", ".", kind).strip(".") for kind in kinds]
    return _groups(kinds)


def without_common_start(labels: Sequence[str]) -> list[str]:
    """Labels without the modules that all are in, and without the kind of parameter in brackets."""
    parts = [label.split(" (")[0].split(".") for label in labels]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts) and parts:
        if parts[0][common].isdecimal():
            break
        common += 1
    return [".".join(part[common:]) for part in parts]


def _depth(name: str) -> str:
    number = _NUMBER.search(name)
    return name[: number.end()] if number else name


def _groups(of_layers: list[str]) -> LayerGroups:
    names = list(dict.fromkeys(of_layers))
    return LayerGroups(names, [names.index(name) for name in of_layers])
