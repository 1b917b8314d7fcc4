# demo: a GPT-2 learns to write positive reviews, offline on a CPU, from the models in asset/mini.
# test: the linter and all tests.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python ppo.py --preset mini
	$(BIN)/python evaluate.py --preset mini

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
