"""Which tests run which lines, and how long each test takes: measured once by coverage.py and stored per test file.

Lines that a subprocess runs count for the test that started it, unless the process is killed before it can store them.
Lines that run while a fixture of a module or session is made count for all tests that use the fixture.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import pytest
from forks import ROOT, run_pytest, store

STORE = ROOT / ".cache" / "mutation" / "coverage"
NOT_STAMPED = {"forks.py", "selection.py", "generate_mutants.py", "mutation.py", "mutants.py"}


class Recorder:
    """A pytest plugin: tell coverage.py which test runs, or which shared fixture is made; store the tests' times."""

    def __init__(self, coverage):
        self.coverage, self.tests, self.fixtures, self.context = coverage, {}, {}, ""

    def enter(self, context):
        self.context = os.environ["MUTATION_TEST"] = context  # which subprocesses read
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        fixtures = [name for name, found in item._fixtureinfo.name2fixturedefs.items() if found[-1].scope != "function"]
        self.tests[item.nodeid] = {"seconds": 0.0, "fixtures": fixtures}
        self.enter(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        test, start = self.context, time.monotonic()
        self.enter(fixturedef.argname)
        try:
            return (yield)
        finally:
            self.enter(test)
            self.fixtures[fixturedef.argname] = time.monotonic() - start
            self.tests[test]["seconds"] -= time.monotonic() - start

    def pytest_runtest_logreport(self, report):
        self.tests[report.nodeid]["seconds"] += report.duration


def record(test_file):
    """Run a test file with coverage.py; store the times of tests and fixtures, and which of them run which lines."""
    import coverage

    tree, settings = Path.cwd(), Path(tempfile.gettempdir(), "coveragerc")
    settings.write_text(
        f"[run]\nsource = {tree}\nomit = {tree}/tests/*\ndata_file = {settings.parent}/data\nparallel = true\n"
        "core = ctrace\ncontext = ${MUTATION_TEST-}\n",
        encoding="utf-8",
    )
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    measured = coverage.Coverage(config_file=str(settings))
    measured.start()
    recorder = Recorder(measured)
    status = run_pytest([test_file], plugins=[recorder])
    measured.stop()
    measured.save()
    measured.combine([str(settings.parent)])
    data, lines = measured.get_data(), {}
    for file in data.measured_files():
        found = {line: sorted(set(names) - {""}) for line, names in data.contexts_by_lineno(file).items()}
        lines[str(Path(file).relative_to(tree))] = {line: names for line, names in found.items() if names}
    store(json.dumps({"tests": recorder.tests, "fixtures": recorder.fixtures, "lines": lines}))
    return status


class Coverage:
    """seconds: {test: its time with all fixtures}. lines: {file: {line: tests that run it}}."""

    def __init__(self, forks):
        self.seconds, self.lines = {}, defaultdict(lambda: defaultdict(set))
        STORE.mkdir(parents=True, exist_ok=True)
        stored = {f"tests/{path.name}": None for path in sorted((ROOT / "tests").glob("test_*.py"))}
        for file in stored:
            path = STORE / f"{Path(file).stem}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            stored[file] = found if found.get("stamp") == stamp(file) else None
        todo = [file for file in stored if stored[file] is None]
        print(f"measuring which tests run which lines: {len(todo)} of {len(stored)} test files", flush=True)
        for file, result in forks.run((file, {}, partial(record, file)) for file in todo):
            if result.verdict != "passed":
                sys.exit(
                    f"error: without any mutant {result.stored or file}: {result.verdict}\n{result.output[-4000:]}"
                )
            stored[file] = json.loads(result.stored) | {"stamp": stamp(file)}
            path = STORE / f"{Path(file).stem}.json"
            path.write_text(json.dumps(stored[file]), encoding="utf-8")
        for found in stored.values():
            self.add(**found)

    def add(self, tests, fixtures, lines, stamp):
        users = defaultdict(set)
        for test, about in tests.items():
            self.seconds[test] = about["seconds"] + sum(fixtures.get(name, 0) for name in about["fixtures"])
            for name in (test, *about["fixtures"]):
                users[name].add(test)
        for file, contexts in lines.items():
            for line, names in contexts.items():
                self.lines[file][int(line)].update(*(users[name] for name in names))

    def select(self, mutant):
        """The tests that may catch a mutant."""
        here = self.lines[mutant.file]
        tests = set().union(*(here[line] for line in mutant.lines))
        if not mutant.lines:
            pattern = re.compile(rf"\b({'|'.join(mutant.names) or '(?!)'})\b")
            for file, lines in list(self.lines.items()):
                text = (ROOT / file).read_text(encoding="utf-8").splitlines()
                tests.update(*(lines[i] for i, line in enumerate(text, 1) if pattern.search(line)))
            using = set().union(*here.values())
            tests.update(sorted(using, key=lambda test: (self.seconds[test], test))[:30])
            tests |= {test for test in using if test.startswith(f"tests/test_{Path(mutant.file).stem}.py::")}
        return tests


@cache
def stamp(*test_files):
    """A hash of all sources, of what tests share, and of these test files."""
    shared = [path for pattern in ("*.py", "*.jinja", "*/*.py", "*/*.jinja") for path in ROOT.glob(pattern)]
    shared = [
        p for p in shared if p.name not in NOT_STAMPED and not (p.parent.name == "tests" and p.match("test_*.py"))
    ]
    texts = [path.read_bytes() for path in [*sorted(shared), *(ROOT / file for file in sorted(test_files))]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
