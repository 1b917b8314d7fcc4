"""README.md and docs/: numbers are those of the committed results; links, commands, names and messages hold."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from config import (
    BenchConfig,
    DPOConfig,
    EvaluateConfig,
    FinetuneConfig,
    FrontierConfig,
    GenerateConfig,
    PPOConfig,
    PreflightConfig,
    QualityConfig,
    RewardConfig,
)
from docs import build
from runtime.cli import differing, parse
from runtime.errors import BadInput

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in build.PAGES}
CONFIGS = {  # None: the command takes no flags
    "finetune_gpt2.py": FinetuneConfig,
    "reward.py": RewardConfig,
    "ppo.py": PPOConfig,
    "dpo.py": DPOConfig,
    "evaluate.py": EvaluateConfig,
    "generate.py": GenerateConfig,
    "analysis.frontier": FrontierConfig,
    "analysis.bench": BenchConfig,
    "analysis.quality": QualityConfig,
    "runtime.preflight": PreflightConfig,
    "analysis.plot": None,
    "analysis.report": None,
    "docs.build": None,
    "docs.record": None,
}
SOURCES = [
    path
    for pattern in ("*.py", "runtime/*.py", "analysis/*.py", "docs/*.py")
    for path in ROOT.glob(pattern)
    if path.name not in ("__init__.py", "tutorial.py")
]


def commands(text):
    """Return the commands in the bash blocks and code spans of a page, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^\$ (.*)", text, re.MULTILINE)
    lines += re.findall(r"`((?:python|make|torchrun) [^`]*)`", text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = sorted({(page, shlex.join(words)) for page, text in TEXTS.items() for words in commands(text)})
MESSAGES = [code for code in re.findall(r"`([^`]*)`", TEXTS["docs/troubleshooting.md"]) if len(code.split()) > 5]


# ---- numbers and tables


@pytest.fixture(scope="module")
def sources():
    return build.sources(), build.blocks(), build.read("asset/recorded.json")


@pytest.mark.parametrize("page", TEXTS)
def test_numbers_tables_and_outputs_are_those_of_the_committed_results(page, sources):
    """Otherwise: make docs."""
    assert build.fill(TEXTS[page], *sources) == TEXTS[page]


def test_a_number_that_was_changed_by_hand_is_noticed(sources):
    text = TEXTS["README.md"] + TEXTS["docs/results.md"]
    numbers = list(build.NUMBER.finditer(text))
    assert len(numbers) > 20
    for match in numbers:
        start = match.start(1)
        digit = next(i for i in range(start, match.end(1)) if text[i].isdigit())
        changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
        assert build.fill_numbers(changed, sources[0]) == text
    assert build.fill_blocks(text.replace("| score", "| scare", 1), *sources[1:]) == text


def test_numbers_have_intervals_decimals_separators_and_percent_as_the_page_has_them():
    data = {"a b": {"c, 1": {"value": 0.12345, "low": -0.1, "high": 0.5, "half": 0.25}}, "n": 12345.6}
    for old, new in {
        "9.99": "0.12",
        "-9.999 ± 1.0": "0.123 ± 0.250",
        "9.9 [0.0, 0.0]": "0.1 [-0.1, 0.5]",
        "9 %": "12 %",
        "9.9 [1.0, 2.0] %": "12.3 [-10.0, 50.0] %",
    }.items():
        assert build.fill_numbers(f"is {old}<!-- a b/c, 1 --> x", data) == f"is {new}<!-- a b/c, 1 --> x"
    assert build.fill_numbers("1<!-- n -->", data) == "12,346<!-- n -->"
    with pytest.raises(BadInput, match="'d' is not one of c, 1"):
        build.fill_numbers("1<!-- a b/d -->", data)


def test_a_run_has_its_command_its_time_and_the_lines_that_the_page_names():
    recorded = {"runs": {"ppo": {"command": "ppo.py", "seconds": 90.4, "output": "a\nb\nc\nd\ne\n"}}}
    page = "<!-- begin: run ppo 0:1 2:4 -1: -->\nold\n<!-- end -->"
    lines = "$ python ppo.py    # 90 s\na\n...\nc\nd\ne"
    filled = f"<!-- begin: run ppo 0:1 2:4 -1: -->\n```console\n{lines}\n```\n<!-- end -->"
    assert build.fill_blocks(page, {}, recorded) == build.fill_blocks(filled, {}, recorded) == filled
    empty = "<!-- begin: run ppo 0:1 2:4 -1: -->\n<!-- end -->\ntext\n"
    assert build.fill_blocks(empty + page, {}, recorded) == f"{filled}\ntext\n{filled}"


def test_the_committed_results_are_of_the_current_preset():
    """Catches constants that were changed without running the demo again."""
    saved = json.loads((ROOT / "asset" / "run_config.json").read_text())
    assert differing(parse(PPOConfig, ["--preset", "mini"]), saved) == []


def test_the_committed_run_became_positive_and_stayed_near_its_start():
    """By the judge, a rise of at least 0.35; KL at most 8 nats; perplexity within a quarter, distinct-2 within .15."""
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    before, after = ({name: entry["value"] for name, entry in results[side].items()} for side in ("before", "after"))
    assert after["positive_by_judge"] - before["positive_by_judge"] >= 0.35
    assert after["kl"] <= 8
    assert 0.75 <= after["perplexity"] / before["perplexity"] <= 1.25
    assert after["distinct_2"] / before["distinct_2"] >= 0.85


# ---- links, commands and names


def test_every_link_into_the_repository_leads_to_a_file_and_a_heading():
    assert build.broken_links() == []


def test_a_link_to_a_file_or_heading_that_does_not_exist_is_broken(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(
        '# A heading, `code`\n[a](page.md#a-heading-code) [b](#b) [c](c.md) <img src="d.png">'
    )
    monkeypatch.setattr(build, "PAGES", [tmp_path / "page.md"])
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.broken_links() == ["page.md: #b", "page.md: c.md", "page.md: d.png"]


def test_the_readme_is_short_and_leads_to_every_page_which_leads_back():
    assert len(TEXTS["README.md"].splitlines()) <= 180
    for page in TEXTS.keys() - {"README.md"}:
        assert f"({page})" in TEXTS["README.md"] and "(../README.md)" in TEXTS[page].partition("\n## ")[0], page


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_every_command_has_a_program_that_accepts_its_flags(page, command):
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "python" and arguments[0].startswith(("tests/", "docs/")):
        assert (ROOT / arguments[0]).is_file()
    elif program in ("python", "torchrun") and arguments[:2] != ["-m", "venv"]:
        script = next(argument for argument in arguments if argument in CONFIGS)
        flags = arguments[arguments.index(script) + 1 :]
        assert script.endswith(".py") or arguments[0] == "-m"
        if CONFIGS[script]:
            assert isinstance(parse(CONFIGS[script], flags), CONFIGS[script])
        else:
            assert len(flags) <= 1
    else:
        assert program in ("python", "pip", "tensorboard", "git", "cd", "source", "hf")


def test_every_test_that_a_page_names_exists():
    names = [name for text in TEXTS.values() for name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)]
    assert len(names) > 40
    for file, test in names:
        (path,) = (ROOT / "tests").rglob(file)
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), test


def test_every_function_that_a_page_names_exists():
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    names = [name for text in TEXTS.values() for name in re.findall(r"`(\w+)\.(\w+(?:\.\w+)?)(?:\(\))?`", text)]
    suffixes = ("py", "json", "jsonl", "safetensors", "html")
    functions = [(module, name) for module, name in names if module in modules and name not in suffixes]
    assert len(functions) > 40
    for module, name in functions:
        thing = importlib.import_module(modules[module])
        for part in name.split("."):
            fields = getattr(thing, "__dataclass_fields__", {})
            assert hasattr(thing, part) or part in fields, f"{module}.{name}"
            thing = getattr(thing, part, None)


# ---- messages


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


def test_the_script_of_a_page_runs_and_prints_what_the_page_says():
    """docs/kl.md: the mean ratio if responses are sampled by top-p and scored by the full softmax."""
    text = TEXTS["docs/kl.md"]
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    ratio = float(re.search(r"prints (\d\.\d+),", text)[1])
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(ratio, abs=0.003)  # on another CPU, other samples
