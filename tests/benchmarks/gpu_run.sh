#!/usr/bin/env bash
# The GPU's share of the tests and benchmarks in one run of under nine minutes, without a network and installing nothing:
# first `python -m tests.benchmarks.gpu_inputs …` where there is one, then here, in the root of the repository:
#
#     bash tests/benchmarks/gpu_run.sh [OUT]        writes OUT/*.json and prints the tables
#
# GPT-2 small with random weights on WikiText-2: 4,656 x 481 scores of ours; the peer on a part, extrapolated linearly.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmark_results}
export PYTHONPATH="$PWD:$(printf '%s:' benchmark_inputs/wheels/*.whl)" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -m pytest -q tests/test_gpu.py || echo "GPU TESTS FAILED"
python3 -m tests.benchmarks.compare_with_kronfluence --setting GPU --half --out "$out/gpu_bfloat16.json"
python3 -m tests.benchmarks.compare_with_kronfluence --setting GPU --tf32 --skip_memory --out "$out/gpu_tf32.json"
