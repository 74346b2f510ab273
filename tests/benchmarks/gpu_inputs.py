"""What the benchmark needs on a machine with a GPU and without a network: the text as tokens, and the peer as wheels.

    python -m tests.benchmarks.gpu_inputs --dataset_name_or_path DIR --tokenizer_name_or_path DIR

writes benchmark_inputs/ (ignored by git): wikitext2.safetensors, {"train" [4656, 512], "validation" [481, 512]} of
token indices (more where the text is longer), and wheels/. Copy the folder along, and run tests/benchmarks/gpu_run.sh
there, which refuses fewer training sequences than it is to measure.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from wikitext_gpt2.task import WikiTextTask

WHEELS = ("kronfluence==1.0.1", "einops==0.8.2", "einconv==0.1.0", "opt_einsum==3.4.0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    WikiTextTask.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("benchmark_inputs"))
    full = WikiTextTask.presets["full"]
    parser.set_defaults(**{flag: full[flag] for flag in WikiTextTask.flag_names() if flag in full})
    arguments = parser.parse_args()
    task = WikiTextTask(**{flag: getattr(arguments, flag) for flag in WikiTextTask.flag_names()})
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = {
        split: torch.stack([example["input_ids"] for example in task.load_dataset(split)]).to(torch.int32)
        for split in ("train", "validation")
    }
    save_file(splits, arguments.out / "wikitext2.safetensors")
    print({split: tuple(blocks.shape) for split, blocks in splits.items()})
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", arguments.out / "wheels"]
    subprocess.run([*download, *WHEELS], check=True)


if __name__ == "__main__":
    main()
