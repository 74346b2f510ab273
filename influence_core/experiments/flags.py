"""The flags of each script, by groups that scripts share."""

import argparse

from influence_core.errors import UserError
from influence_core.factors.strategies import HEURISTIC, HEURISTIC_SCALE, STRATEGIES

RECIPE_FLAGS = ("train_batch_size", "learning_rate", "weight_decay", "num_train_epochs", "use_half_precision")
TRACKED = ("blocks", "all")  # by --track
LAST, ALL = "last", "all"  # of a training's checkpoints


def damping(text: str) -> float | str:
    """A damping as the strategies take it: a number, or text that they understand."""
    try:
        return text if text == HEURISTIC or text.endswith("x") else float(text)
    except ValueError:
        message = f"{text!r} is neither a number nor a multiple such as 0.5x nor {HEURISTIC}"
        raise argparse.ArgumentTypeError(message) from None


def checkpoints(text: str) -> str | list[float]:
    """Which of a training's checkpoints: the last, all, or those after so many epochs.

    Raises:
        UserError: it is none of these.
    """
    try:
        return text if text in (LAST, ALL) else [float(part) for part in text.replace(",", " ").split() or [text]]
    except ValueError:
        raise UserError(f"--checkpoints is {LAST} or {ALL} or epochs, as in 1,2, not {text!r}") from None


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="full or demo: sets defaults only, any flag overrides it")
    parser.add_argument("--checkpoint_dir", help="where train.py leaves the model and analyze.py finds it")
    parser.add_argument("--num_train", type=int, help="use the first so many training examples (default: all)")
    parser.add_argument("--seed", type=int, help="of everything random")


def _add_pass_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--use_half_precision", action="store_true", help="bfloat16 model and products, float32 sums")
    parser.add_argument("--train_batch_size", type=int, help="training examples in one pass")


def _add_writer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="compute and store again what is stored already; what "
                        "this same command had finished before it was interrupted stays")  # fmt: skip
    parser.add_argument("--wait", action="store_true", help="if another process writes into the same directory, wait "
                        "until it has ended")  # fmt: skip


def _add_tracked_layers_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track", help="blocks: linear layers but the output head; all: embeddings, norms and head too"
    )
    parser.add_argument("--tracked_layers", metavar="REGEX", help="only layers in whose name this is found (default: "
                        "all that can be tracked but the output head)")  # fmt: skip


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval_batch_size", type=int, help="examples in one pass of evaluation")
    parser.add_argument("--learning_rate", type=float, help="of AdamW, fixed")
    parser.add_argument("--weight_decay", type=float, help="of AdamW")
    parser.add_argument("--num_train_epochs", type=int, help="passes over the training set")


def _add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save_at", type=float, nargs="+", metavar="EPOCH", help="also leave the model after so many "
                        "epochs, or parts of one, in <checkpoint_dir>/step-…")  # fmt: skip
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, help="keep the state after each epoch, and "
                        "go on from there when the same command is run again after it was killed [yes]")  # fmt: skip


def _add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", help="where factors, scores and the results of experiments lie")
    parser.add_argument("--num_queries", type=int, help="use the first so many validation examples, or of "
                        "--query_file (default: all)")  # fmt: skip


def _add_query_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query_text", nargs="+", metavar="TEXT", help="ask about texts of your own in place of the "
                        "validation set's, each a query, where an example is one text")  # fmt: skip
    parser.add_argument("--query_file", metavar="FILE", help="the same of JSON lines, each a query with the fields "
                        "that the dataset's rows have; several sets lie side by side, in "
                        "scores_<strategy>_queries-<digest>")  # fmt: skip
    parser.add_argument("--sum_queries", action="store_true", help="score the sum of the queries' gradients, "
                        "[1, training examples], at the price of one query; stored in "
                        "scores_<strategy>_sum")  # fmt: skip


def _add_analyze_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--factor_strategy", nargs="+", help=f"one or more of {', '.join(STRATEGIES)}; several share "
                        "the pass over the training set")  # fmt: skip
    parser.add_argument("--damping_factor", type=damping, help="an absolute number; or 0.5x: 0.5 x the layer's mean "
                        f"eigenvalue; or {HEURISTIC}, which is {HEURISTIC_SCALE}x")  # fmt: skip
    _add_tracked_layers_argument(parser)
    parser.add_argument("--checkpoints", nargs="+", metavar="WHICH", help="average the scores of several: last; all, "
                        "which are the last and those that --save_at left; or those after so many epochs, "
                        "as in 1,2")  # fmt: skip
    parser.add_argument("--scores_suffix", help="store the scores in scores_<strategy>_<suffix>, to keep those of "
                        "several dampings")  # fmt: skip
    parser.add_argument("--use_empirical_fisher", action="store_true", help="factors from the data's own labels")
    parser.add_argument(
        "--query_batch_size",
        type=int,
        help="queries in one forward and backward pass, at most: fewer where memory is short",
    )
    parser.add_argument("--factor_batch_size", type=int, help="the same of training examples, when fitting factors")
    parser.add_argument("--memory_budget_gb", type=float, help="memory to use at most (default: what is free)")
    parser.add_argument("--use_tf32", action="store_true", help="float32 products of a GPU in TF32: faster, less exact")
    parser.add_argument("--use_compile", action="store_true", help="torch.compile what the model does between its "
                        "tracked layers: for long analyses on a GPU")  # fmt: skip
    parser.add_argument("--use_ddp", action="store_true", help="several processes; launch with torchrun")
    _add_sharding_arguments(parser)
    parser.add_argument("--progress_interval", type=float, metavar="SECONDS", help="between two notes of progress, "
                        "from which a killed run goes on")  # fmt: skip
    _add_looking_arguments(parser)
    parser.add_argument("--show_queries", type=int, help="show so many queries with their most influential "
                        "sequence; of your own, 20 by default")  # fmt: skip


def _add_sharding_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--use_fsdp", action="store_true", help="several processes, each with its part of the model's "
                        "parameters, for models that one does not hold; launch with torchrun")  # fmt: skip
    parser.add_argument("--fsdp_shards", type=int, metavar="N", help="of --use_fsdp: processes that have a whole model "
                        "together, such as those of a node (default: all)")  # fmt: skip


def _add_looking_arguments(parser: argparse.ArgumentParser) -> None:
    yes_or_no = {"action": argparse.BooleanOptionalAction}
    parser.add_argument("--compute_per_token_scores", **yes_or_no, help="also split the scores of the first "
                        "--report_queries queries with their highest and lowest examples over the tokens of both, and "
                        "over the layers")  # fmt: skip
    parser.add_argument("--compute_per_layer_scores", **yes_or_no, help="the same over the layers alone")
    parser.add_argument("--self_influence", **yes_or_no, help="also each training example's own score, which is high "
                        "for what is mislabelled or odd")  # fmt: skip
    parser.add_argument("--report", **yes_or_no, help="write <output_dir>/report.html, a page to look at: queries, "
                        "their highest and lowest examples, and what these scores are made of, by token and layer "
                        "unless that is turned off")  # fmt: skip
    _add_report_queries_argument(parser)


def _add_report_queries_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report_queries", type=int, help="queries whose scores are looked into")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", nargs="+", help="what to show, a page each: NAME of <output_dir>/scores_NAME, or a "
                        "path (default: those that analyze.py made last)")  # fmt: skip
    _add_report_queries_argument(parser)


def _add_figure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure_dir", help="where the figure goes")


def _add_retraining_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", nargs="+", help="what to evaluate: NAME of <output_dir>/scores_NAME, a path, or "
                        "tfidf, a baseline that knows no model (default: all of --output_dir but sums and those of "
                        "your own queries, and tfidf)")  # fmt: skip
    parser.add_argument("--num_repeats", type=int, help="retrainings of each subset, with other seeds")
    parser.add_argument("--bank_dir", help="where retrainings are kept (default: <output_dir>/retrainings)")


def _add_lds_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_masks", type=int, help="random subsets of the training set")
    parser.add_argument("--subset_fraction", type=float, help="of the training set, in each subset")
    parser.add_argument("--masks", help="ground truth made elsewhere: a file [subsets, training examples] of 0 and 1")
    parser.add_argument("--measurements", help="with --masks: a file [subsets, queries] or [subsets, repeats, queries]")
    parser.add_argument("--allow_pickle", action="store_true", help="read such files also where they are pickles, that "
                        "may run any code: only your own")  # fmt: skip
    parser.add_argument("--choose", action="store_true", help="also choose the best of --scores on one half of the "
                        "subsets and report it on the other")  # fmt: skip
    parser.add_argument("--show_query", type=int, help="show this query with its most influential sequence")


def _add_counterfactual_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_counterfactual_queries", type=int, help="sum the scores over the first so many queries; "
                        "of --scores NAME_sum (analyze.py --sum_queries), as many as that is of")  # fmt: skip
    parser.add_argument("--removal_sizes", type=int, nargs="+", help="numbers of training examples to remove")


def _add_half_precision_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--factor_strategy", nargs=1, help="whose scores to compare")
    _add_tracked_layers_argument(parser)
    parser.add_argument("--scores_suffix", help="that of the scores, if they were stored with one")
    parser.add_argument("--show_query", type=int, help="the query whose scores are drawn")


SCRIPTS = {
    "train": [_add_pass_arguments, _add_recipe_arguments, _add_saving_arguments, _add_sharding_arguments,
              _add_writer_arguments],
    "analyze": [_add_result_arguments, _add_query_arguments, _add_pass_arguments, _add_analyze_arguments,
                _add_writer_arguments],
    "report": [_add_result_arguments, _add_report_arguments],
    "evaluate_lds": [_add_result_arguments, _add_retraining_arguments, _add_lds_arguments, _add_figure_arguments,
                     _add_pass_arguments, _add_recipe_arguments, _add_sharding_arguments],
    "run_counterfactual": [_add_result_arguments, _add_retraining_arguments, _add_counterfactual_arguments,
                           _add_figure_arguments, _add_pass_arguments, _add_recipe_arguments,
                           _add_sharding_arguments],
    "half_precision_analysis": [_add_result_arguments, _add_half_precision_arguments, _add_figure_arguments],
}  # fmt: skip


def trains(script: str) -> bool:
    """Whether a script takes the flags of a training recipe."""
    return _add_recipe_arguments in SCRIPTS[script]
