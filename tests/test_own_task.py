"""What README and docstrings say of a task of one's own, tried: the code as it stands."""

import json
import re
import shlex
import textwrap

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from influence_core import task
from influence_core.analysis import analyze
from influence_core.layers import trackable_layer_names
from influence_core.study import Study
from influence_core.tasks.demo_corpus import demo_questions
from tests.scripts import ROOT, run, run_process
from tests.test_exactness import relative_error

MODULES = {
    "analyze": "analysis",
    "evaluate_lds": "lds_evaluation",
    "run_counterfactual": "counterfactual",
}
MODEL = "n_layers=1,dim=16,hidden_dim=24,n_heads=2,dropout=0,attention_dropout=0,seq_classif_dropout=0"


@pytest.fixture
def place(tmp_path):
    """A directory with my_task/ as the README writes it, and data/ in the Hub's layout."""
    section = (ROOT / "README.md").read_text().split("## Add your own task\n")[1].split("\n## ")[0]
    task, train = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_task").mkdir()
    (tmp_path / "my_task" / "task.py").write_text(task)
    (tmp_path / "my_task" / "train.py").write_text(train)
    for script, module in MODULES.items():
        text = train.replace("training", module)
        assert text != train
        (tmp_path / "my_task" / f"{script}.py").write_text(text)
    (tmp_path / "data").mkdir()
    for split, number in (("train", 40), ("validation", 4)):
        with open(tmp_path / "data" / f"{split}.jsonl", "w") as file:
            for question in demo_questions(split)[:number]:
                for ending in (0, 1):  # does the text go on like this?
                    text = f"{question['sent1']} {question['sent2']} {question[f'ending{ending}']}"
                    label = int(question["label"] == ending)
                    file.write(json.dumps({"sentence": text, "label": label}) + "\n")
    return tmp_path


@pytest.mark.slow
def test_the_readme_s_task_through_all_scripts(place):
    """Outside the repository, with no argument but where the data is and how small the model."""

    def call(script, *flags):
        return run_process(["-m", f"my_task.{script}", *flags], place, HF_HOME=str(place / "cache")).ok()

    assert len((place / "my_task" / "task.py").read_text().splitlines()) < 25
    model = ["--model_name_or_path", "data", "--config_overrides", MODEL, "--vocab_size", "400"]
    out = call("train", *model, "--dataset_name_or_path", "data", "--num_train_epochs", "1")
    assert "80 training and 8 validation examples" in out and "accuracy" in out
    out = call("analyze", "--factor_strategy", "ekfac", "identity")
    assert "(8, 80) [queries, training examples]" in out and "tracked  8 layers" in out
    assert "Most influential training sequence (ekfac)" in out and "<s>" not in out and "<pad>" not in out
    out = call("evaluate_lds", "--num_masks", "4", "--num_repeats", "2", "--scores", "ekfac", "identity")
    assert "ekfac - identity" in out and (place / "figure" / "lds.png").exists()
    out = call("run_counterfactual", "--removal_sizes", "0", "10", "--num_repeats", "1")
    assert "Query accuracy" in out and "Mean measurement" in out and (place / "figure" / "counterfactual.png").exists()


def test_the_contract_s_own_example(tmp_path):
    """The docstring of influence_core/task.py, on a tiny BERT, against plain autograd."""
    code = textwrap.dedent(task.__doc__.split("padded on the right:\n")[1].split("\nA Hugging Face model")[0])
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes)).eval()
    texts = [torch.randint(1, 30, (length,)) for length in (5, 9, 3, 7, 6)]
    examples = [{"input_ids": text, "label": number % 2} for number, text in enumerate(texts)]
    given = {"model": model, "train_dataset": examples, "query_dataset": examples[:2], "output_dir": tmp_path}
    names = {"__name__": "docstring", "torch": torch, "analyze": analyze, "Study": Study, **given}
    exec(code.replace("ekfac", "identity"), names)

    def gradient(example):
        logits = model(input_ids=example["input_ids"][None]).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([example["label"]]))
        tracked = [p for name in trackable_layer_names(model) for p in model.get_submodule(name).parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tracked)])

    gradients = torch.stack([gradient(example) for example in examples])
    assert relative_error(names["scores"], gradients[:2] @ gradients.T) < 1e-5


@pytest.mark.slow
def test_the_readme_s_commands_for_a_model_and_data_of_one_s_own(tmp_path, monkeypatch):
    """Read out and run, small; the scripts after train.py need no more than its checkpoint."""
    section = (ROOT / "README.md").read_text().split("## Your own model and data\n")[1].split("\n## ")[0]
    commands = [
        shlex.split(line) for line in re.findall(r"^    python (wikitext_gpt2/train\.py .*)$", section, re.MULTILINE)
    ]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    small = [
        "--preset",
        "demo",
        "--num_train",
        "24",
        "--num_train_epochs",
        "1",
        "--config_overrides",
        "",
        "--block_size",
        "32",
    ]
    new = ["--vocab_size", "400", "--checkpoint_dir", "./my_model"]
    run("train", *small, *new, "--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32").ok()
    with open("my.jsonl", "w") as file:
        for question in demo_questions("train")[:40]:
            file.write(json.dumps({"question": question["sent1"], "answer": question["ending0"]}) + "\n")
    for _, *flags in commands:
        run("train", *small, "--model_name_or_path", "./my_model", *flags).ok()
        (directory,) = (flags[i + 1] for i, flag in enumerate(flags) if flag == "--checkpoint_dir")
        place = ["--checkpoint_dir", directory, "--output_dir", f"{directory}_results", "--num_queries", "3"]
        out = run("analyze", *place, "--factor_strategy", "identity").ok()
        assert "(3, 24) [queries, training examples]" in out
