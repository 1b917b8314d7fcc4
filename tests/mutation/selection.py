"""Which tests run which lines, and how long each test takes: measured once by coverage.py and stored per test file.

Lines that a subprocess runs count for the test that started it, unless the process is killed before it can store them.
Lines that run while a fixture of a module or session is made count for all tests that use the fixture.

A test file is measured again when it changes. When a source changes, its lines keep their tests; a statement that has
none then has those of its function.
"""

import difflib
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

UNMEASURED = ("tests/test_full_size.py", "tests/test_gpu.py")  # too slow for any mutant, or skipped
STORE = ROOT / ".cache" / "mutation" / "coverage"


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
        self.tests[item.nodeid] = {"seconds": 0.0, "fixtures": fixtures, "failed": False}
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
        self.tests[report.nodeid]["failed"] |= report.failed


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
    run_pytest([test_file], plugins=[recorder], end=False)
    measured.stop()
    measured.save()
    measured.combine([str(settings.parent)])
    data, lines = measured.get_data(), {}
    for file in data.measured_files():
        found = {line: sorted(set(names) - {""}) for line, names in data.contexts_by_lineno(file).items()}
        lines[str(Path(file).relative_to(tree))] = {line: names for line, names in found.items() if names}
    store(json.dumps({"tests": recorder.tests, "fixtures": recorder.fixtures, "lines": lines}))
    return 0


class Coverage:
    """seconds: {test: its time with all fixtures}. lines: {file: {line: tests that run it}}."""

    def __init__(self, forks, fresh=False):
        self.seconds, self.lines = {}, defaultdict(lambda: defaultdict(set))
        self.texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in source_files()}
        measured = [file for file in all_test_files() if file not in UNMEASURED]
        stored = {file: json.loads(read(STORE / f"{Path(file).stem}.json") or "{}") for file in measured}
        todo = [file for file, found in stored.items() if fresh or found.get("stamp") != stamp(file)]
        print(f"measuring which tests run which lines: {len(todo)} of {len(stored)} test files", flush=True)
        for file, result in forks.run((file, {}, partial(record, file)) for file in todo):
            if result.verdict != "passed":
                sys.exit(f"error: {file} cannot be measured: {result.verdict}\n{result.output[-4000:]}")
            stored[file] = json.loads(result.stored) | {"stamp": stamp(file)}
            lines = stored[file]["lines"]
            stored[file]["sources"] = {source: keep(text) for source, text in self.texts.items() if source in lines}
            (STORE / f"{Path(file).stem}.json").write_text(json.dumps(stored[file]), encoding="utf-8")
        for found in stored.values():
            self.add(**found)

    def add(self, tests, fixtures, lines, sources, stamp):
        users = defaultdict(set)
        for test, about in tests.items():
            if about["failed"]:
                print(f"warning: {test} fails without any mutant, so it is not used", flush=True)
                continue
            self.seconds[test] = about["seconds"] + sum(fixtures.get(name, 0) for name in about["fixtures"])
            for name in (test, *about["fixtures"]):
                users[name].add(test)
        for file in lines.keys() & self.texts.keys():
            place = places(sources[file], self.texts[file])
            for line, names in lines[file].items():
                if int(line) in place:
                    self.lines[file][place[int(line)]].update(*(users[name] for name in names))

    def select(self, mutant):
        """The tests that may catch a mutant."""
        here = self.lines[mutant.file]
        tests = set().union(*(here[line] for line in mutant.lines))
        if mutant.function and not tests:
            tests = set().union(*(here[line] for line in mutant.function))
        if not mutant.function:
            pattern = re.compile(rf"\b({'|'.join(mutant.names) or '(?!)'})\b")
            for file, text in self.texts.items():
                found = [i for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
                tests.update(*(self.lines[file][line] for line in found))
            using = set().union(*here.values())
            tests.update(sorted(using, key=lambda test: (self.seconds[test], test))[:30])
            tests |= {test for test in using if f"/test_{Path(mutant.file).stem}.py::" in test}
        return tests


def keep(text):
    """Store a text under its hash; returns that."""
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    (STORE / "sources").mkdir(parents=True, exist_ok=True)
    (STORE / "sources" / name).write_text(text, encoding="utf-8")
    return name


@cache
def places(name, text):
    """{line of a text stored under this name: the same line's number in a newer text}."""
    old, new = read(STORE / "sources" / name).splitlines(), text.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {block.a + i + 1: block.b + i + 1 for block in blocks for i in range(block.size)}


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def source_files():
    found = [path for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)]
    found = [path.relative_to(ROOT) for path in found if not path.parent.name.startswith(".")]
    return sorted(str(path) for path in found if path.parts[0] != "tests")


def all_test_files():
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("**/test_*.py"))


@cache
def stamp(*files):
    """A hash of these files and of what the tests share."""
    shared = [path for path in sorted((ROOT / "tests").glob("*.py")) if not path.match("test_*.py")]
    texts = [path.read_bytes() for path in [*shared, *(ROOT / file for file in files)]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
