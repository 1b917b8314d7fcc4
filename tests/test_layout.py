"""The layout of the repository: imports go in one direction, and the top folder has only what people run or read."""

import ast
import runpy

import pytest
from conftest import ROOT

import config
from runtime import cli

TOP = {"finetune_gpt2", "reward", "ppo", "dpo", "evaluate", "generate", "config", "data", "model"}
LAYERS = (  # a module imports only from its own layer and those before it
    ("runtime.errors", "runtime.linear"),
    ("config",),
    ("runtime.cli", "runtime.device", "runtime.distributed"),
    ("runtime.decoding", "runtime.passes"),
    ("model", "runtime.checkpoint", "runtime.optimizer"),
    ("runtime.hub", "runtime.self_check", "runtime.log"),
    ("runtime.preflight",),
    ("data",),
    ("runtime.monitor", "runtime.linear_classifier"),
    ("reward", "finetune_gpt2"),
    ("ppo",),
    ("dpo",),
    (
        "analysis.plot",
        "analysis.tables",
        "analysis.metrics",
        "analysis.responses",
        "analysis.limit",
        "analysis.report",
        "analysis.card",
        "analysis.frontier_tables",
        "analysis.frontier",
        "analysis.bench",
        "analysis.quality",
    ),
    ("evaluate", "generate"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in ("*.py", "runtime/*.py", "analysis/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
}


def imports(module):
    """The modules of this repository that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def test_the_top_folder_has_only_the_scripts_and_what_they_share():
    assert {name for name in MODULES if "." not in name} == TOP


def test_every_module_is_in_a_layer():
    assert {name for layer in LAYERS for name in layer} == MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_layer_and_those_before_it(module):
    allowed = set()
    for layer in LAYERS:
        allowed |= set(layer)
        if module in layer:
            break
    assert imports(module) <= allowed


def test_no_modules_import_each_other():
    """Neither directly nor through other modules."""
    unresolved = {module: imports(module) for module in MODULES}
    while ready := [module for module, needed in unresolved.items() if not needed & unresolved.keys()]:
        for module in ready:
            del unresolved[module]
    assert not unresolved, f"in or above a cycle: {', '.join(unresolved)}"


def test_ppo_fits_on_a_few_screens():
    lines = (ROOT / "ppo.py").read_text(encoding="utf-8").splitlines()
    functions = {node.name: node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)}
    assert len(lines) <= 300
    assert functions["main"].end_lineno - functions["main"].lineno + 1 <= 45


def test_dpo_fits_on_two_screens():
    assert len((ROOT / "dpo.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_processes_take_at_most_a_twentieth_of_the_lines_of_ppo():
    """Lines that a version for a single process would not have."""
    lines = (ROOT / "ppo.py").read_text(encoding="utf-8").splitlines()
    added = [line for line in lines if "ranks." in line or "runtime.distributed" in line or "ranks = " in line]
    assert 0 < len(added) <= len(lines) / 20


SCRIPTS = {
    "finetune_gpt2": config.FinetuneConfig,
    "reward": config.RewardConfig,
    "ppo": config.PPOConfig,
    "dpo": config.DPOConfig,
    "evaluate": config.EvaluateConfig,
    "generate": config.GenerateConfig,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_its_main_with_its_config(script, monkeypatch):
    calls = []
    monkeypatch.setattr("sys.stdin", None)  # generate.py configures it
    monkeypatch.setattr(cli, "run", lambda main, cls: calls.append((main.__module__, main.__name__, cls)))
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert calls == [("__main__", "main", SCRIPTS[script])]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="imported")
    assert len(calls) == 1
