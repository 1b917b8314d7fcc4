# demo: train a GPT-2 with PPO to write positive reviews, offline on a CPU, from the models in asset/mini, and evaluate
#   it. Replaces the run in ppo_checkpoints/mini.
# full: preset gpt2 from fine-tuning to the report page and the card, after a preflight that states what it needs. Run
#   again, it resumes what was interrupted and keeps what is finished. Flags for all commands, --device or --dtype:
#   FLAGS="--device cuda"; for one of them: FINETUNE="--epochs 2", PPO, EVALUATE.
# test: run the linter and all tests. A test that hangs for 15 minutes ends the run with a traceback of where it hangs.
# mutants: run the tests against known mistakes and a sample of generated mutants. Each must make a test fail.
# mutation: run the tests against all generated mutants, which takes more than an hour. Writes tests/mutation/report.md.
# docs: redraw the figures, execute the tutorial, fill README.md and docs/ from the committed results, check all links.
# results: run the commands of the README from a clean clone of HEAD, and keep their results in asset/ for docs.
# soak: kill a save 50 times and a run 50 times at random moments, which takes minutes.
# clean: delete .venv and all caches.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo full test mutants mutation docs results soak clean

demo: .venv/run-time
	$(BIN)/python ppo.py --preset mini --force
	$(BIN)/python evaluate.py --preset mini

full: .venv/run-time
	$(BIN)/python -m runtime.preflight $(FLAGS) --finetune='$(FINETUNE)' --ppo='$(PPO)' --evaluate='$(EVALUATE)'
	$(BIN)/python finetune_gpt2.py --resume $(FLAGS) $(FINETUNE)
	$(BIN)/python ppo.py --resume $(FLAGS) $(PPO)
	$(BIN)/python evaluate.py --resume $(FLAGS) $(EVALUATE)

test: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

mutants: .venv/tests
	$(BIN)/python tests/mutation/mutants.py
	$(BIN)/python tests/mutation/mutation.py --sample 60

mutation: .venv/tests
	$(BIN)/python tests/mutation/mutation.py

docs: .venv/tests
	$(BIN)/python -m docs.build

results: .venv/run-time
	$(BIN)/python -m docs.record

soak: .venv/tests
	$(BIN)/python tests/soak.py

.venv/run-time: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c constraints.txt
	touch $@

.venv/tests: .venv/run-time requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
