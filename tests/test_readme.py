"""The first page: its table is that of the committed run, its links lead somewhere, its commands are commands."""

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT

from config import BenchConfig, EvaluateConfig, FinetuneConfig, FrontierConfig, GenerateConfig, PPOConfig, RewardConfig
from evaluate import table_text
from runtime.cli import differing, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "finetune_gpt2.py": FinetuneConfig,
    "reward.py": RewardConfig,
    "ppo.py": PPOConfig,
    "evaluate.py": EvaluateConfig,
    "generate.py": GenerateConfig,
    "bench.py": BenchConfig,
}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
COMMANDS += [shlex.split(code) for code in re.findall(r"`(python [^`]*)`", README)]


def test_the_table_is_that_of_the_committed_results():
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    assert table_text(results) in README


def test_the_committed_results_are_of_the_preset_as_it_is():
    """Catches constants that were changed and a demo that was not run again."""
    assert (
        differing(parse(PPOConfig, ["--preset", "mini"]), json.loads((ROOT / "asset/run_config.json").read_text()))
        == []
    )


def test_the_committed_run_became_positive_and_stayed_near_its_start():
    """A rise by the judge of .35 at 8 nats at most, perplexity within a quarter either way, distinct-2 within 15 %."""
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    before, after = ({name: entry["value"] for name, entry in results[side].items()} for side in ("before", "after"))
    assert after["positive_by_judge"] - before["positive_by_judge"] >= 0.35
    assert after["kl"] <= 8
    assert 0.75 <= after["perplexity"] / before["perplexity"] <= 1.25
    assert after["distinct_2"] / before["distinct_2"] >= 0.85


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_into_the_repository_leads_to_a_file(link):
    assert link.startswith(("http://", "https://")) or (ROOT / link).is_file()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_its_program_takes(command):
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program in ("python", "torchrun"):
        script = next(argument for argument in arguments if argument.endswith(".py"))
        flags = arguments[arguments.index(script) + 1 :]
        assert (ROOT / script).is_file()
        if script in ("plot.py", "report.py"):  # a folder, no flags
            assert not any(flag.startswith("-") for flag in flags)
            return
        config = FrontierConfig if flags[:1] == ["frontier"] else CONFIGS[script]
        flags = [flag for flag in flags if flag != "frontier"]
        assert not flags or isinstance(parse(config, flags), config)
    else:
        assert program in ("pip", "tensorboard")


def test_every_function_file_and_test_that_the_page_names_is_there():
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", README):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
    names = re.findall(r"`(\w+)\.(\w+)`", README)
    functions = [(module, name) for module, name in names if name not in ("py", "txt", "jsonl", "json", "md", "html")]
    assert len(functions) > 5
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    files = {f"{module}.py" for module, name in names if name == "py"}
    assert {path.name for path in ROOT.glob("*.py")} == {file for file in files if not file.startswith("test_")}
    assert all((ROOT / "tests" / file).is_file() for file in files if file.startswith("test_"))
