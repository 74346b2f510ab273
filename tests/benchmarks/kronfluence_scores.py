"""kronfluence's EKFAC scores of a checkpoint, stored where evaluate_lds.py finds them: `--scores ekfac kronfluence`.

    python -m tests.benchmarks.kronfluence_scores --checkpoint_dir DIR --output_dir DIR --num_queries 64

Same weights, tokens and sampled labels as our analyze.py with the same seed; its damping is a number, or heuristic.
"""

import argparse
import tempfile
from pathlib import Path

from influence_core.experiments.arguments import COMMON_DEFAULTS
from influence_core.experiments.checkpoints import read_training_record
from influence_core.factors.strategies import HEURISTIC
from influence_core.files import write_tensors
from tests.benchmarks.peer import Peer
from tests.benchmarks.tasks import BENCHMARKED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=BENCHMARKED, default="wikitext_gpt2")
    parser.add_argument("--checkpoint_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_queries", type=int, required=True)
    parser.add_argument("--damping", default=HEURISTIC)
    parser.add_argument("--seed", type=int, default=COMMON_DEFAULTS["seed"])
    arguments = parser.parse_args()
    record = read_training_record(arguments.checkpoint_dir)
    task_class = BENCHMARKED[arguments.task]
    task = task_class(**{flag: record.get(flag) for flag in task_class.flag_names()})
    model = task.load_model(arguments.checkpoint_dir).eval()
    train = task.load_dataset("train")[: record["num_train"]]
    train = task.sample_all_labels(model, train, arguments.seed)
    queries = task.load_dataset("validation", range(arguments.num_queries))
    peer_damping = None if arguments.damping == HEURISTIC else float(arguments.damping)  # None is its word for it
    with tempfile.TemporaryDirectory() as directory:
        peer = Peer(task, model, Path(directory), "ekfac", peer_damping, False, False)
        peer.task.online = False
        peer.fit(train, batch_size=64)
        _, scores = peer.score(queries, train, query_batch_size=64, train_batch_size=64)
    path = arguments.output_dir / "scores_kronfluence" / "pairwise_scores.safetensors"
    write_tensors(path, {"all_modules": scores})
    print(f"kronfluence's scores {tuple(scores.shape)} in {path}")


if __name__ == "__main__":
    main()
