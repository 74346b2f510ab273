"""What an analysis of a model of eight billion parameters takes on eight cards, on paper: bytes, FLOPs, hours.

    python -m tests.benchmarks.sharding_on_paper

Nothing is run: the planner (scores/plan.py) is given Llama-3-8B's shapes on the meta device, and what an example takes
by formulas. The assumptions are the constants below.
"""

import torch
import transformers as hf

from influence_core.layers import find_tracked_layers, trackable_layer_names
from influence_core.probing import Probe
from influence_core.scores.cost import Work
from influence_core.scores.plan import make_plan, plan_flops
from influence_core.sharded_units import largest_unit_bytes
from influence_core.units import gigabytes

CARDS, CARD_BYTES = 8, 0.9 * 80e9  # H100, of which a tenth is left to the libraries
FLOPS, EFFICIENCY = 990e12, 0.4  # bfloat16, dense; the share of it that passes and products reach together
EIGENDECOMPOSITION_FLOPS = 1e12  # float64, of one card, about
LINK_BYTES = 300e9  # a second that a card sends and gets at the same time, of NVLink's 450e9 each way
EXAMPLES, QUERIES, POSITIONS = 10_000, 100, 2_048
BATCH = 1  # examples of a process in one pass
KEPT = 2.2  # bytes between forward and backward, over those that the tracked layers capture
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


def main():
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**LLAMA_8B), dtype=torch.float32)
    layers = find_tracked_layers(model, [name for name in trackable_layer_names(model) if name != "lm_head"])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    captured = {layer.name: 2 * POSITIONS * (layer.in_features + layer.out_features) for layer in layers}
    num_bytes = int(KEPT * sum(captured.values()))
    attention = 2 * POSITIONS**2 * LLAMA_8B["hidden_size"] * LLAMA_8B["num_hidden_layers"]  # causal: half of 4 T^2 d
    forward = 2 * POSITIONS * num_parameters + attention
    positions = {layer.name: float(POSITIONS) for layer in layers}
    probe = Probe(num_bytes, 0, sum(captured.values()), forward, forward + attention, positions, positions, 1, captured)
    work = Work(
        num_train=EXAMPLES, num_queries=QUERIES, num_strategies=1, train_batch_size=BATCH, query_batch_size=BATCH,
        factor_batch_size=BATCH, train=probe, query=probe, operand_bytes=2, product_bytes=2, num_in_eigenbasis=1,
        num_with_lambda=1, num_preconditioned=1, device_type="cuda", num_processes=CARDS, num_shares=CARDS,
        gathered_bytes=3 * largest_unit_bytes(model),
    )  # fmt: skip
    in_use = num_parameters * 4 // CARDS
    plan = make_plan(layers, work, int(CARD_BYTES - in_use), in_use)
    flops = plan_flops(plan, layers, work)
    rounds = -(-EXAMPLES // (CARDS * BATCH))
    gathered = 2 * 4 * num_parameters * (CARDS - 1) // CARDS  # each card sends its part to the others, twice a batch
    exchanged = BATCH * sum(captured.values()) * (CARDS - 1) // CARDS
    print(f"{num_parameters:,} parameters, {gigabytes(in_use)} of {gigabytes(4 * num_parameters)} on a card")
    print(f"{len(plan.layer_groups)} groups of layers x {len(plan.query_tiles)} tiles of queries")
    print(f"{gigabytes(plan.resident_bytes)} of query gradients on a card in each pass")
    print("| stage | GB a card | PFLOP | TB sent by a card: parameters, captured | hours |\n|---|---|---|---|---|")
    sums = {"covariance": 1, "lambda": 1, "pairwise": plan.num_passes}
    total = 0.0
    for stage, count in flops.items():
        passes, peaks = sums.get(stage, 0), plan.peak_bytes
        peak = peaks[stage] if stage in peaks else max(peaks["query gradients"], peaks["training pass"])
        of_parameters = passes * rounds * gathered / 1e12
        of_captured = (len(plan.query_tiles) if stage == "pairwise" else passes) * rounds * exchanged / 1e12
        if stage == "eigendecomposition":
            seconds = count / CARDS / EIGENDECOMPOSITION_FLOPS
        else:
            seconds = count / CARDS / FLOPS / EFFICIENCY + 1e12 * (of_parameters + of_captured) / LINK_BYTES
        total += seconds / 3600
        print(f"| {stage} | {(in_use + peak) / 1e9:.0f} | {count / 1e15:,.0f} | {of_parameters:.0f}, {of_captured:.0f} "
              f"| {seconds / 3600:.2f} |")  # fmt: skip
    print(f"{total:.1f} hours")


if __name__ == "__main__":
    main()
