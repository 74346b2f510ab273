"""The preconditioners of some layers, from stored factors."""

from collections.abc import Mapping, Sequence

from influence_core.factors.strategies import Damping, Preconditioner, find_strategy
from influence_core.files import Tensors
from influence_core.layers import TrackedLayer
from influence_core.storage import StageStore
from influence_core.study import Study


def load_preconditioners(
    study: Study,
    factor_stores: Mapping[str, Mapping[str, StageStore]],
    strategy_names: Sequence[str],
    layers: Sequence[TrackedLayer],
    damping: Damping,
) -> dict[str, Preconditioner]:
    """By layer, for these strategies at once. A file that several have in common (by its checksum) is read once.

    Args:
        factor_stores: {strategy: {stage: store}}, what fit_factors returned.
    """
    names, runtime = {layer.name for layer in layers}, study.runtime
    read: dict[str | int, dict[str, Tensors]] = {}
    kinds: list[dict[str, Tensors]] = []  # for each strategy: {kind: {layer: tensor}}
    for strategy_name in strategy_names:
        kinds.append({})
        for stage, action in (("eigendecomposition", "Load Eigendecomposition"), ("lambda", "Load Lambda")):
            store = factor_stores[strategy_name].get(stage)
            if store is None:
                continue
            # A Lambda is a strategy's own, and may be on its way to the disk still.
            key = id(store) if stage == "lambda" else store.checksum()
            if key not in read:
                with study.profiler(action):
                    tensors = store.load(names)
                    read[key] = {
                        kind: {name: tensor.to(runtime.device) for name, tensor in by_layer.items()}
                        for kind, by_layer in tensors.items()
                    }
            kinds[-1] |= read[key]
    strategies = [find_strategy(name) for name in strategy_names]
    return {
        layer.name: Preconditioner(
            layer,
            [
                (
                    strategy,
                    {kind: by_layer[layer.name] for kind, by_layer in factors.items() if layer.name in by_layer},
                )
                for strategy, factors in zip(strategies, kinds)
            ],
            damping,
            runtime.precision.sum_dtype,
            layer.name in study.live,
        )
        for layer in layers
    }
