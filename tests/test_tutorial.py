"""The tutorial: its notebook is made from docs/tutorial.py, every cell runs, and what its text claims is asserted."""

import ast
import os
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient.exceptions import CellExecutionError

BUILD = runpy.run_path(str(ROOT / "docs" / "build_tutorial.py"))
notebook, execute = BUILD["notebook"], BUILD["execute"]
SOURCE = (ROOT / "docs" / "tutorial.py").read_text(encoding="utf-8")
COMMITTED = ROOT / "docs" / "tutorial.ipynb"
SMALL = 'REPOSITORY = "https://github.com/someone/something"\n# %% [markdown]\n# in {repository}\n# %%\n'


def code_of(cells):
    return [cell.source for cell in cells.cells if cell.cell_type == "code"]


def test_the_committed_notebook_is_the_one_of_its_source():
    """Outputs are not compared: other processors round differently, and then other tokens are sampled."""
    committed, made = nbformat.read(COMMITTED, as_version=4), notebook(SOURCE)
    assert [(c.id, c.cell_type, c.source, c.metadata) for c in committed.cells] == [
        (c.id, c.cell_type, c.source, c.metadata) for c in made.cells
    ], "python docs/build_tutorial.py makes it"
    assert committed.metadata == made.metadata


def test_the_committed_notebook_has_outputs_and_is_small():
    nbformat.validate(committed := nbformat.read(COMMITTED, as_version=4))
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert COMMITTED.stat().st_size < 600_000 and len(committed.cells) <= 65


def test_every_cell_runs_and_every_claim_holds():
    """The claims are asserts in the cells: ratios of 1 before the update, a rising score, effects of the exercises."""
    made = execute(notebook(SOURCE))
    for cell in made.cells:
        assert not [output for output in cell.get("outputs", []) if output.get("name") == "stderr"], cell.source
    claims = [node for code in code_of(made) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert len(claims) >= 15


def test_a_claim_that_does_not_hold_fails():
    with pytest.raises(CellExecutionError):
        execute(notebook(SMALL + "assert 1 + 1 == 3\n"))


def test_a_build_gives_the_same_bytes_each_time():
    source = SMALL + "print(1)\n# %% [solution]\nimport sys\nprint(2, flush=True)\nprint(3)\n"
    first, second = (nbformat.writes(execute(notebook(source))) for _ in range(2))
    assert first == second


def test_cells_are_made_from_their_markers():
    text, code, solution = notebook(SMALL + "print(1)\n\n\n# %% [solution]\nprint(2)\n").cells
    assert (text.cell_type, text.source) == ("markdown", "in someone/something")
    assert (code.cell_type, code.source, code.metadata) == ("code", "print(1)", {})
    assert (solution.cell_type, solution.source) == ("code", "print(2)") and solution.metadata.jupyter.source_hidden


@pytest.fixture
def setup_cell(monkeypatch, tmp_path):
    """A function that runs the first cell in a folder; it returns the commands that the cell ran, and its names."""

    def run_in(folder):
        commands = []

        def fake_run(command, check):
            assert check
            commands.append(command)
            if command[0] == "git":
                command[-1].mkdir()
                (command[-1] / "ppo.py").touch()

        monkeypatch.setattr("subprocess.run", fake_run)
        monkeypatch.setattr(sys, "path", sys.path.copy())
        monkeypatch.chdir(folder)
        names = {}
        exec(code_of(notebook(SOURCE))[0], names)
        return commands, names

    return run_in


def test_the_first_cell_finds_the_clone_that_it_is_in(setup_cell):
    commands, names = setup_cell(ROOT / "docs")
    assert commands == [] and Path.cwd() == ROOT and sys.path[0] == str(ROOT)


def test_the_first_cell_clones_and_installs_what_the_scripts_need(setup_cell, tmp_path):
    """pip keeps the packages of Colab whose versions are in the ranges of requirements.txt."""
    (git, pip), names = setup_cell(tmp_path)
    root = tmp_path / names["REPOSITORY"].rpartition("/")[2]
    assert git == ["git", "clone", "--depth", "1", names["REPOSITORY"], root]
    assert pip == [sys.executable, "-m", "pip", "install", "-q", "-r", root / "requirements.txt"]
    assert os.getcwd() == str(root) and sys.path[0] == str(root)
