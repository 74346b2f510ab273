# make demo   train a small GPT-2 on a corpus that every Python has, and show which sequences made it say what it says
# make test   all tests but the slow ones: under 10 minutes on 2 cores
# make test-slow   those: torch.compile, torchrun, the README's own task, all scripts on other models, near relatives of models
# make test-exhaustive   runs killed at every write, files damaged everywhere: where the storage of results was changed
# make browser-test   the report page in a real browser: needs chromium and chromedriver, which it does not install
# make lint   style and formatting
# make benchmark   agreement and time beside kronfluence 1.0.1
# Each makes .venv and installs requirements.txt into it where that has not been done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-exhaustive browser-test lint benchmark clean

demo: $(VENV)/.installed
	$(BIN)/python wikitext_gpt2/train.py --preset demo
	$(BIN)/python wikitext_gpt2/analyze.py --preset demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not exhaustive and not browser"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not browser"

test-exhaustive: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m exhaustive

browser-test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -rs -m browser

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The peer is for comparison only. Its own requirements would replace what this project pins, hence --no-deps.
benchmark: $(VENV)/.installed
	$(BIN)/pip install --no-deps kronfluence==1.0.1 einops==0.8.2 einconv==0.1.0 opt_einsum==3.4.0
	$(BIN)/python -m tests.benchmarks.compare_with_kronfluence

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) demo
