#!/usr/bin/env bash
# The GPU's share of the tests and benchmarks, without a network and installing nothing: first
# `python -m tests.benchmarks.gpu_inputs …` where there is one, then here, in the root of the repository:
#
#     bash tests/benchmarks/gpu_run.sh [bf16|tf32] [OUT] [flags]      (neither word: both, in turn)
#
# GPT-2 small with random weights on WikiText-2: 4,656 x 481 scores of ours; the peer on a part, extrapolated linearly.
# Runs in parts, writes OUT/<precision>/<part>.json after each, and prints the tables of what there is. The same command
# again goes on where an earlier one was stopped, if OUT still has its files. gpu_run.py has the flags; others are
# compare_with_kronfluence.py's. The peer's eigendecomposition is timed once, in the agreement, on its factors.
#
# Each precision is to take less than nine minutes of an H100. How they divide is an estimate, not run on a GPU yet:
#
#     seconds   gpu tests   ours   agreement   peer   roofline   sum           compile, if there is time left
#     bf16             60    130         130    140         20   8 minutes     150
#     tf32              -    170         140    180         20   8.5 minutes     -
#
# Of each about 15 are a process's start; one eigendecomposition is thought to take 45: ours in ours and compile, both
# systems' in agreement, none in peer.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$(printf '%s:' benchmark_inputs/wheels/*.whl)${PYTHONPATH:-}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m tests.benchmarks.gpu_run "$@"
