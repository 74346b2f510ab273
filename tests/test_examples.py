"""The three examples: the same scripts, whose code is shared, and tasks that have no passage in common."""

import importlib
import itertools
import re

import pytest

from influence_core.experiments.flags import SCRIPTS as FLAGS_OF
from tests.scripts import ROOT, run

EXAMPLES = {"wikitext_gpt2": "WikiTextTask", "swag_roberta": "SwagTask", "dailymail_t5": "DailyMailTask"}
SCRIPTS = ("train", "analyze", "evaluate_lds", "run_counterfactual")
LONGEST_RUN = 5  # lines that two folders may have in common


def lines_of(example):
    """{file: its lines that say something}"""
    files = sorted((ROOT / example).glob("*.py"))
    return {path: [line for line in path.read_text().splitlines() if line.strip()] for path in files}


@pytest.mark.parametrize("one, other", itertools.combinations(EXAMPLES, 2))
def test_no_two_examples_repeat_each_other(one, other):
    """No run of six equal lines, blank lines apart, between any two of their files."""
    for (path, lines), (other_path, other_lines) in itertools.product(lines_of(one).items(), lines_of(other).items()):
        size = LONGEST_RUN + 1
        runs = {tuple(lines[start : start + size]) for start in range(len(lines) - size + 1)}
        for start in range(len(other_lines) - size + 1):
            repeated = tuple(other_lines[start : start + size])
            assert repeated not in runs, (path, other_path, repeated)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_a_docstring_and_one_call(example, script):
    """And its docstring has the command that runs it."""
    text = (ROOT / example / f"{script}.py").read_text()
    docstring, code = re.fullmatch(r'"""(.+?)"""\n(.+)', text, re.DOTALL).groups()
    assert f"python {example}/{script}.py" in docstring
    assert len([line for line in code.splitlines() if line.strip()]) == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_examples_take_the_same_flags(script):
    """But for those of their own task."""
    flags = []
    for example, name in EXAMPLES.items():
        task_class = getattr(importlib.import_module(f"{example}.task"), name)
        shown = re.findall(r"^  (--\w+)", run(script, "--help", task_class=task_class).ok(), re.MULTILINE)
        own = {f"--{flag}" for flag in task_class.flag_names()}
        assert own <= set(shown)
        flags.append(set(shown) - own)
    assert flags[0] == flags[1] == flags[2] and len(flags[0]) >= len(FLAGS_OF[script])
