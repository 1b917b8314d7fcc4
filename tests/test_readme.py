"""The README: its tables are those of committed runs, its links, commands, names and quoted messages are right."""

import ast
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT

from analysis.tables import table_text
from config import BenchConfig, EvaluateConfig, FinetuneConfig, FrontierConfig, GenerateConfig, PPOConfig, RewardConfig
from runtime.cli import differing, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {  # None: the command takes a folder and no flags
    "finetune_gpt2.py": FinetuneConfig,
    "reward.py": RewardConfig,
    "ppo.py": PPOConfig,
    "evaluate.py": EvaluateConfig,
    "generate.py": GenerateConfig,
    "analysis.frontier": FrontierConfig,
    "analysis.bench": BenchConfig,
    "analysis.plot": None,
    "analysis.report": None,
}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
COMMANDS += [shlex.split(code) for code in re.findall(r"`(python [^`]*)`", README)]
SOURCES = [
    path
    for pattern in ("*.py", "runtime/*.py", "analysis/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
]
TROUBLESHOOTING = README.partition("## Troubleshooting\n")[2].partition("\n## ")[0]
MESSAGES = [code for code in re.findall(r"`([^`]*)`", TROUBLESHOOTING) if len(code.split()) > 5]


def test_the_table_is_that_of_the_committed_results():
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    assert table_text(results) in README


def test_the_committed_results_are_of_the_current_preset():
    """Catches constants that were changed without running the demo again."""
    saved = json.loads((ROOT / "asset" / "run_config.json").read_text())
    assert differing(parse(PPOConfig, ["--preset", "mini"]), saved) == []


def test_the_committed_run_became_positive_and_stayed_near_its_start():
    """By the judge, a rise of at least 0.35; KL at most 8 nats; perplexity within a quarter, distinct-2 within 15 %."""
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
def test_every_command_has_a_program_that_accepts_its_flags(command):
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program in ("python", "torchrun"):
        script = next(argument for argument in arguments if argument in CONFIGS)
        flags = arguments[arguments.index(script) + 1 :]
        assert script.endswith(".py") or arguments[0] == "-m"
        if CONFIGS[script]:
            assert isinstance(parse(CONFIGS[script], flags), CONFIGS[script])
        else:
            assert len(flags) == 1
    else:
        assert program in ("pip", "tensorboard")


def test_every_test_that_the_page_names_exists():
    names = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", README)
    assert len(names) > 20
    for file, test in names:
        (path,) = (ROOT / "tests").rglob(file)
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), test


def test_every_function_that_the_page_names_exists():
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    modules["torch"] = "torch"
    names = re.findall(r"`(\w+)\.(\w+)`", README)
    functions = [name for name in names if name[1] not in ("py", "txt", "jsonl", "json", "md", "html", "toml")]
    assert len(functions) > 15
    for module, name in functions:
        assert hasattr(importlib.import_module(modules[module]), name), f"{module}.{name}"


def test_the_page_describes_every_file_of_the_source():
    described = set(re.findall(r"^\| `([\w/]+\.py)` \|", README, re.MULTILINE))
    assert described == {path.relative_to(ROOT).as_posix() for path in SOURCES}


def templates():
    """Return the texts of the source as regular expressions, with a group for each value that is filled in."""
    patterns = [r"unrecognized arguments: (.+)"]  # of argparse
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(part, (ast.FormattedValue, ast.Constant)) for part in parts):
                texts = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(text) for text in texts if text) > 5:
                    patterns.append("".join("(.*?)" if text is None else re.escape(text) for text in texts))
    return patterns


def is_message(text, patterns):
    """Return whether text fits a pattern, and each of its values has at most four words or is itself a message."""
    matches = (re.fullmatch(pattern, text) for pattern in patterns)
    return any(
        match and all(len(value.split()) <= 4 or is_message(value, patterns) for value in match.groups())
        for match in matches
    )


@pytest.mark.parametrize("message", MESSAGES)
def test_every_quoted_message_is_one_of_the_source(message):
    assert is_message(message, templates())


def test_a_message_that_was_reworded_is_no_longer_one_of_the_source():
    message = next(message for message in MESSAGES if "kl_ceiling" in message)
    assert len(MESSAGES) > 5 and not is_message(message.replace("KL is", "the KL is"), templates())
