"""The README's 'Add your own task', tried: its code as it stands, on texts of our own, through all four scripts."""

import json
import re

import pytest

from influence_core.experiments.demo_corpus import demo_questions
from tests.scripts import ROOT, run_process

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

    model = ["--model_name_or_path", "data", "--config_overrides", MODEL, "--vocab_size", "400"]
    out = call("train", *model, "--dataset_name_or_path", "data", "--num_train_epochs", "1")
    assert "80 training and 8 validation examples" in out and "accuracy" in out
    out = call("analyze", "--factor_strategy", "ekfac", "identity")
    assert "(8, 80) [queries, training examples]" in out and "tracked  8 layers" in out
    assert "Most influential training sequence (ekfac)" in out and "<s>" not in out and "<pad>" not in out
    out = call("evaluate_lds", "--num_masks", "4", "--num_repeats", "2", "--scores", "ekfac", "identity")
    assert "ekfac - identity" in out and (place / "figure" / "lds.png").exists()
    out = call("run_counterfactual", "--removal_sizes", "0", "10", "--num_repeats", "1")
    assert "Accuracy" in out and "Loss" in out and (place / "figure" / "counterfactual.png").exists()
