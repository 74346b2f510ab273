"""A part of gpu_run.py that measures, in a process of its own: `gpu_parts PART DIR FLAGS` writes DIR/PART.json.

DIR holds what the parts of a call share: `peer` takes the peer's eigenvectors that `agreement` left there.
"""

import json
import sys
from pathlib import Path

import torch

from influence_core.runtime import Runtime
from tests.benchmarks.compare_with_kronfluence import compare_scores, make_peer, parse, peer_seconds
from tests.benchmarks.systems import make_setting, matrix_product_peak, run_ours


def ours(arguments, setting):
    """Our whole analysis, once; --compile: that alone, as the passes and the peak are those of without."""
    run = run_ours(arguments, setting, setting.train, time_passes=not arguments.compile)
    print(run.table)
    result = {name: value for name, value in vars(run).items() if name != "scores"}
    result = {"run": result, "peak_bytes": Runtime(setting.device).peak_memory()}
    if not arguments.compile:
        result["gflops"] = matrix_product_peak(setting.device, arguments.half)
    return result


def agreement(arguments, setting):
    return {"agreement": compare_scores(arguments, setting, make_peer(arguments, setting))}


def peer(arguments, setting):
    """The peer's seconds for all of the data, from parts of it; its peak memory is that of the parts."""
    peer, device = make_peer(arguments, setting), setting.device
    setting.model = None  # it has a copy, and memory is to be that of one model, as ours is
    return {"stages": peer_seconds(arguments, setting, peer), "peak_bytes": Runtime(device).peak_memory()}


PARTS = {"ours": ours, "agreement": agreement, "peer": peer, "compile": ours}


def main():
    part, directory, *flags = sys.argv[1:]
    arguments = parse(["--setting", "GPU", *flags])
    result = PARTS[part](arguments, make_setting(arguments, Path(directory)))
    Path(directory, f"{part}.json").write_text(json.dumps({"torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
