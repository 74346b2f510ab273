"""Data that is no preset's, in files of each kind, for the tests."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from dailymail_t5.task import DailyMailTask
from influence_core.experiments.arguments import parse
from influence_core.tasks.demo_corpus import demo_corpus, demo_questions
from swag_roberta.task import SwagTask
from wikitext_gpt2.task import WikiTextTask

TEXTS = [" ".join(part.split()) for text in demo_corpus().values() for part in text.split("\n\n")]
TEXTS = [text[:200] for text in TEXTS if len(text) > 60][:60]
PAIRS = [{"number": n, "ask": text[:30], "reply": text[30:70]} for n, text in enumerate(TEXTS)]
QUESTIONS = [
    {"context": row["sent1"], "A": row["ending0"], "B": row["ending1"], "C": row["ending2"],
     "gold": row["label"] % 3}
    for row in demo_questions("train")[:40]
]  # fmt: skip
BLOCKS = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32", "--block_size", "32"]
CHOICES = ["--config_overrides", "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=24"]
CHOICES += ["--max_length", "24"]
STREAMS = ["--config_overrides", "num_layers=1,d_model=16,d_ff=24,num_heads=2,d_kv=8"]
STREAMS += ["--max_source_length", "40", "--max_target_length", "12"]
SEVERAL = [{"title": text[:20], "body": text} for text in TEXTS]
SIZES = {WikiTextTask: BLOCKS, SwagTask: CHOICES, DailyMailTask: STREAMS}


def write(path, rows):
    """The rows as a file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("".join(row["body"] + "\n\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def documents(path):
    return write(path, [{"number": n, "body": text} for n, text in enumerate(TEXTS)])


def make_task(task_class, path, *flags):
    """As train.py makes it, with the demo's preset."""
    given = ["--preset", "demo", *SIZES[task_class], "--dataset_name_or_path", str(path), *flags]
    return task_class(**parse(task_class, "train", "", given).task)
