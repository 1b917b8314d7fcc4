# demo: a GPT-2 learns to write positive reviews, offline on a CPU, from the models in asset/mini. It replaces the run
# in ppo_checkpoints/mini.
# test: the linter and all tests.
# mutants: the tests against known mistakes and a sample of generated mutants, which they must all catch.
# mutation: against all generated mutants, more than an hour; writes tests/mutation/report.md.
# A test that hangs for a quarter of an hour ends the tests, with a traceback of where.
# soak: 50 kills of saves and 50 of a run, at random moments; minutes.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test mutants mutation soak clean

demo: .venv/installed
	$(BIN)/python ppo.py --preset mini --force
	$(BIN)/python evaluate.py --preset mini

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

mutants: .venv/installed
	$(BIN)/python tests/mutation/mutants.py
	$(BIN)/python tests/mutation/mutation.py --sample 60

mutation: .venv/installed
	$(BIN)/python tests/mutation/mutation.py

soak: .venv/installed
	$(BIN)/python tests/soak.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
