"""Wrong calls of the scripts: the rows of test_misuse.py's table, (script, flags, a part of the line that is told).

{…} stands for a path that its fixtures make.
"""

LONG = "x" * 300
HUGE = "1" + "0" * 30
NO_INT, NO_FLOAT = "invalid int value", "invalid float value"
TINY = "n_layer=1,n_embd=16,n_head=2,n_positions=32"


def rows_of(script, flag, pairs):
    """Of one flag, by (value or values, part of the line)."""
    return [(script, [flag, *([value] if isinstance(value, str) else value)], told) for value, told in pairs]


NUMBERS_THAT_ARE_NONE = [
    *(row for flag in ("train_batch_size", "eval_batch_size", "num_train", "vocab_size", "block_size", "lora_rank")
      for row in rows_of("train", f"--{flag}", [("0", f"--{flag} must be positive"), ("-1", "must be positive"),
                                                 ("x", NO_INT), ("1.5", NO_INT), (HUGE, f"--{flag} must be at most")])),
    *rows_of("train", "--num_train_epochs", [("-1", "at least 0"), ("nan", NO_INT), (HUGE, "at most 100,000")]),
    *rows_of("train", "--learning_rate", [("-1", "positive"), ("0", "positive"), ("inf", "finite"), ("nan", "finite"),
                                          ("1e400", "finite"), ("x", NO_FLOAT), ("", NO_FLOAT), ("1e300", "at most")]),
    *rows_of("train", "--weight_decay", [("-1", "at least 0"), ("nan", "finite"), ("x", NO_FLOAT)]),
    *rows_of("train", "--seed", [("-1", "from 0 to 2^32 - 1"), ("4294967296", "2^32"), ("x", NO_INT), (HUGE, "2^32")]),
    *rows_of("train", "--save_at", [("0", "positive"), ("-1", "positive"), ("5", "after the end"), ("nan", "finite"),
                                    ("x", NO_FLOAT)]),
    *(row for flag in ("query_batch_size", "train_batch_size", "factor_batch_size")
      for row in rows_of("analyze", f"--{flag}", [("x", NO_INT), ("1.5", NO_INT), (HUGE, "must be at most")])),
    *rows_of("analyze", "--memory_budget_gb", [("nan", "finite"), ("inf", "finite"), ("1e30", "at most 1,000,000"),
                                               ("x", NO_FLOAT), ("1e-9", "of memory is too little")]),
    *rows_of("analyze", "--progress_interval", [("0", "positive"), ("nan", "finite"), ("x", NO_FLOAT)]),
    *rows_of("analyze", "--show_queries", [("-1", "at least 0"), ("x", NO_INT)]),
    *rows_of("analyze", "--num_queries", [("0", "positive"), ("1000000", "larger than the validation set")]),
    *rows_of("analyze", "--num_train", [("100000", "larger than the training set")]),
    *rows_of("evaluate_lds", "--num_masks", [("0", "positive"), ("1", "--num_masks 2 at least"), ("x", NO_INT),
                                             ("1000000000", "at most 100,000")]),
    *rows_of("evaluate_lds", "--subset_fraction", [("0", "positive"), ("1", "below 1"), ("nan", "finite"),
                                                   ("1e-9", "keeps all or none"), ("x", NO_FLOAT)]),
    *rows_of("evaluate_lds", "--num_repeats", [("0", "positive"), ("1.5", NO_INT), (HUGE, "at most 10,000")]),
    *rows_of("evaluate_lds", "--show_query", [("-1", "at least 0"), ("4", "with numbers from 0 to 3"), ("x", NO_INT)]),
    *rows_of("evaluate_lds", "--num_train_epochs", [("0", "a retraining that does not train"), ("-1", "at least 0")]),
    *rows_of("run_counterfactual", "--removal_sizes", [("-1", "at least 0"), ("64", "leaves nothing"), ("x", NO_INT),
                                                       ("1000000", "leaves nothing"), ([], "at least one argument")]),
    *rows_of("run_counterfactual", "--num_counterfactual_queries", [("0", "positive"), ("1000000", "larger than")]),
    *rows_of("run_counterfactual", "--num_train_epochs", [("0", "a retraining that does not train")]),
    *rows_of("half_precision_analysis", "--show_query", [("100000", "with numbers from 0 to")]),
]  # fmt: skip

WORDS_THAT_ARE_NONE = [
    *rows_of("train", "--preset", [("nope", "choose from full, demo"), ("", "choose from")]),
    ("train", ["--nope"], "unrecognized arguments: --nope"),
    ("train", ["extra"], "unrecognized arguments: extra"),
    ("train", ["--seed"], "expected one argument"),
    *rows_of("train", "--frozen_parameters", [("(", "no regular expression"), ("", "is empty"),
                                              (".", "nothing would")]),
    *rows_of("train", "--train_split", [("", "is empty")]),
    *rows_of("analyze", "--factor_strategy", [("nope", "choose from identity"), ("", "is empty"),
                                              (["ekfac", "ekfac"], "names one twice"), ([], "at least one argument")]),
    *rows_of("analyze", "--damping_factor", [("-1", "positive"), ("nan", "finite"), ("x1", "neither a number"),
                                             ("heuristics", "neither a number"), ("", "neither a number"),
                                             ("1e300x", "outside float32's range")]),
    *rows_of("analyze", "--track", [("none", "blocks or all"), ("", "is empty")]),
    *rows_of("analyze", "--tracked_layers", [("(", "no regular expression"), ("*", "nothing to repeat"),
                                             ("no_such_layer", "no layer that --tracked_layers")]),
    *rows_of("analyze", "--checkpoints", [("9", "no checkpoints but the last"), ("x", "last or all or epochs"),
                                          ("", "is empty"), ("all", "--save_at")]),
    *rows_of("analyze", "--scores_suffix", [("../x", "is a word"), ("half", "other than half"), ("a b", "is a word"),
                                            ("", "is empty"), (LONG, "too long for the name of a file")]),
    ("analyze", ["--use_ddp"], "works under torchrun only"),
    *rows_of("analyze", "--use_fsdp", [([], "works under torchrun only"), (["--use_ddp"], "say one of them"),
                                       (["--use_compile"], "leave one of them out")]),
    ("train", ["--use_fsdp"], "works under torchrun only"),
    ("train", ["--fsdp_shards", "2"], "give both"),
    ("evaluate_lds", ["--use_fsdp"], "works under torchrun only"),
    ("run_counterfactual", ["--use_fsdp"], "works under torchrun only"),
    *rows_of("analyze", "--fsdp_shards", [("2", "give both"), (["0", "--use_fsdp"], "positive")]),
    *rows_of("evaluate_lds", "--scores", [("nope", "no scores 'nope'"), ("", "is empty"), (LONG, "too long"),
                                          (["tfidf", "tfidf"], "names one twice"), ([], "at least one argument")]),
    ("run_counterfactual", ["--scores", "nope"], "no scores 'nope'"),
    ("half_precision_analysis", [], "--use_half_precision"),
    ("analyze", ["--output_dir", "s\udcff"], "no text in UTF-8"),
    ("train", ["--dataset_name_or_path", "t\udcff.txt"], "no text in UTF-8"),
    ("analyze", ["--tracked_layers", "x" * 100_000], "no layer that"),
    ("train", ["--seed", "9" * 4000], "2^32"),
]  # fmt: skip

PLACES = [
    *(("train", ["--checkpoint_dir", place], told) for place, told in (
        ("{file}", "File exists"), ("{file}/x", "Not a directory"), ("{tmp}/" + LONG, "too long"), ("", "is empty"),
        ("/proc/x", "can't be written"), ("/dev/null", "can't be written"), ("{foreign}", "did not make"))),
    *(("analyze", ["--output_dir", place], told) for place, told in (
        ("{file}", "File exists"), ("{file}/x", "Not a directory"), (LONG, "too long"), ("", "is empty"),
        ("/dev/null", "can't be written"))),
    *(("analyze", ["--checkpoint_dir", place], told) for place, told in (
        ("{file}", "no checkpoint in"), ("/nonexistent", "no checkpoint in"), ("{empty}", "no checkpoint in"),
        (LONG, "too long"), ("", "is empty"))),
    *(("evaluate_lds", [flag, place], told) for flag in ("--bank_dir", "--figure_dir") for place, told in (
        ("{file}", "can't be written"), (LONG, "too long"), ("", "is empty"))),
    *(("train", [flag, place], told) for flag in ("--model_name_or_path", "--tokenizer_name_or_path")
      for place, told in (("/nonexistent", "can't load"), (LONG, "too long"), ("", "is empty"),
                          ("{file}", "can't load"))),
]  # fmt: skip

OVERRIDES = [
    ("train", ["--config_overrides", f"{TINY},{each}"], told) for each, told in (
        ("n_layer=0", "num_hidden_layers is 0"), ("n_layer=-1", "num_hidden_layers is -1"), ("n_embd=0", "hidden_size"),
        ("n_head=0", "num_attention_heads is 0"), ("n_head=3", "divisible"), ("n_embd=17", "divisible"),
        ("nope=3", "has no nope"), ("n_layer", "takes key=value"), ("=3", "takes key=value"), ("n_layer=x", "int"),
        ("n_layer=1.5", "int"), ("n_positions=0", "max_position_embeddings is 0"), ("n_positions=-1", "-1"),
        ("vocab_size=5", "only 5 embeddings"), ("vocab_size=0", "vocab_size is 0"), ("n_inner=0", "n_inner is 0"),
        ("activation_function=nope", "it knows no 'nope'"), ("resid_pdrop=2", "between 0 and 1"),
        ("n_layer=1000000000", "at most 10,000"), ("n_embd=1000000000", "no model can be made"),
        ("n_positions=1000000000000", "more than there is memory"), ("layer_norm_epsilon=x", "float"),
        ("layer_norm_epsilon=nan", "finite"), ("to_dict=3", "has no to_dict"),
    )
]  # fmt: skip

DATA = [
    ("train", ["--dataset_name_or_path", place], told) for place, told in (
        ("/nonexistent", "no local directory or file"), ("{empty}", "doesn't contain any data files"),
        (LONG, "too long"), ("", "is empty"), ("/dev/null", "can't load"), ("{fifo}.txt", "can't load"),
        ("{file}", "is no file of .txt"),
        ("{tmp}/empty.txt", "is empty"), ("{tmp}/empty.jsonl", "empty.jsonl is empty"), ("{tmp}/garbage.jsonl", "JSON"),
        ("{tmp}/garbage.parquet", "parquet"), ("{tmp}/bytes.txt", "save it as UTF-8"),
        ("{tmp}/bytes.jsonl", "save it as UTF-8"), ("{tmp}/numbers.jsonl", "has to be a text"),
        ("{tmp}/nulls.jsonl", "nothing (null) as 'text'"), ("{tmp}/lists.jsonl", "has to be a text"),
        ("{tmp}/mappings.jsonl", "has to be a text"), ("{tmp}/booleans.jsonl", "has to be a text"),
        ("{tmp}/mixed.jsonl", "row 50"), ("{tmp}/other.jsonl", "no column 'text'"), ("{tmp}/blank.txt", "--block_size"),
        ("{tmp}/scalar.json", "JSON"), ("{tmp}/deep.json", "can't load"), ("{tmp}/latin.csv", "save it as UTF-8"),
        ("{tmp}/ragged.csv", "more cells"), ("{tmp}/word.txt", "too few rows"),
    )
]  # fmt: skip
DATA += [
    ("train", ["--dataset_name_or_path", "{tmp}/plain.txt", *flags], told) for flags, told in (
        (["--text_column", "nope"], "no column 'nope'"), (["--train_split", "nope"], "nope"),
        (["--train_split", "train["], "train["), (["--train_split", "train[:0%]"], "no data"),
        (["--train_split", "train[-1:]"], "too few rows"), (["--block_size", "1"], "at least 2"),
    )
]  # fmt: skip

TRUTH = [
    ("evaluate_lds", ["--scores", "tfidf", *(part for flag, name in zip(("--masks", "--measurements"), names) if name
                                             for part in (flag, name))], told)
    for names, told in (
        (("{tmp}/masks.npy", None), "go together"), ((None, "{tmp}/measured.npy"), "go together"),
        (("{tmp}/nope.npy", "{tmp}/measured.npy"), "not there"), (("{fifo}.npy", "{tmp}/measured.npy"), "is no file"),
        (("{empty}", "{tmp}/measured.npy"), "no .npy"), (("{tmp}/garbage.npy", "{tmp}/measured.npy"), "is a pickle"),
        (("{tmp}/narrow.npy", "{tmp}/measured.npy"), "must be [subsets, 64]"),
        (("{tmp}/twos.npy", "{tmp}/measured.npy"), "of 0 and 1"), (("{tmp}/flat.npy", "{tmp}/measured.npy"), "must be"),
        (("{tmp}/masks.npy", "{tmp}/complex.npy"), "complex"), (("{tmp}/masks.npy", "{tmp}/nan.npy"), "not finite"),
        (("{tmp}/masks.npy", "{tmp}/none.npy"), "holds no numbers"), (("{tmp}/masks.npy", "{fifo}.npy"), "is no file"),
        (("{tmp}/masks.npy", "{tmp}/strings.npy"), "can't be read"),
        (("{tmp}/masks.npy", "{tmp}/short.npy"), "must be"),
        (("{tmp}/masks.npy", "{tmp}/constant.npy"), "the same for every retraining"),
        (("{tmp}/masks.npy", "{tmp}/pickled.npy"), "--allow_pickle"),
        (("{tmp}/mapping.pt", "{tmp}/short.npy"), "one array"),
        (("{tmp}/two.safetensors", "{tmp}/short.npy"), "one array"),
    )
]  # fmt: skip
TRUTH += [
    ("evaluate_lds", ["--scores", place], told) for place, told in (
        ("{file}", "can't be read as scores"), ("{empty}", "can't be read as scores"), ("/dev/null", "is no file"),
        ("{fifo}.npy", "is no file"), ("{tmp}/two.safetensors", "all_modules"), ("{tmp}/scores_0.safetensors", "0 dim"),
        ("{tmp}/scores_1.safetensors", "1 dimensions"), ("{tmp}/scores_3.safetensors", "3 dimensions"),
        ("{tmp}/scores_nan.safetensors", "not finite"), ("{tmp}/scores_complex.safetensors", "complex64"),
        ("{tmp}/scores_small.safetensors", "are of 2 queries"),
    )
]  # fmt: skip

TABLE = [*NUMBERS_THAT_ARE_NONE, *WORDS_THAT_ARE_NONE, *PLACES, *OVERRIDES, *DATA, *TRUTH]
