"""Select the tests of a mutant: coverage.py measures which tests run which lines, and how long each test takes.

Lines run by a subprocess count for the test that started it, unless the process is killed before it stores them. Lines
run during the setup of a fixture of module or session scope count for all tests that use the fixture.

A test file is measured again when it changes. If a source changes, unchanged lines keep their tests; a changed
statement has the tests of its function.
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

UNMEASURED = ("tests/test_full_size.py", "tests/test_gpu.py")  # too slow for mutants, and skipped without a GPU
STORE = ROOT / ".cache" / "mutation" / "coverage"


class Recorder:
    """A pytest plugin: set the context of coverage.py to the current test or shared fixture, and measure times."""

    def __init__(self, coverage):
        self.coverage, self.tests, self.fixtures, self.context = coverage, {}, {}, ""

    def enter(self, context):
        self.context = os.environ["MUTATION_TEST"] = context  # read by subprocesses
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        defined = item._fixtureinfo.name2fixturedefs.items()
        fixtures = [name for name, definitions in defined if definitions[-1].scope != "function"]
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
    """Run a test file with coverage.py; store the times of tests and fixtures, and the lines that they run."""
    import coverage

    tree, settings = Path.cwd(), Path(tempfile.gettempdir(), "coveragerc")
    settings.write_text(
        f"[run]\nsource = {tree}\nomit = {tree}/tests/*\ndata_file = {settings.parent}/data\nparallel = true\n"
        "core = ctrace\ncontext = ${MUTATION_TEST-}\n",
        encoding="utf-8",
    )
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    measurement = coverage.Coverage(config_file=str(settings))
    measurement.start()
    recorder = Recorder(measurement)
    run_pytest([test_file], plugins=[recorder], exit_at_failure=False)
    measurement.stop()
    measurement.save()
    measurement.combine([str(settings.parent)])
    data, lines = measurement.get_data(), {}
    for file in data.measured_files():
        contexts = {line: sorted(set(names) - {""}) for line, names in data.contexts_by_lineno(file).items()}
        lines[str(Path(file).relative_to(tree))] = {line: names for line, names in contexts.items() if names}
    store(json.dumps({"tests": recorder.tests, "fixtures": recorder.fixtures, "lines": lines}))
    return 0


class Coverage:
    """seconds: {test: its time including its fixtures}. lines: {file: {line: tests that run it}}."""

    def __init__(self, forks, fresh=False):
        self.seconds, self.lines = {}, defaultdict(lambda: defaultdict(set))
        self.texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in source_files()}
        test_files = [file for file in all_test_files() if file not in UNMEASURED]
        stored = {file: json.loads(read(STORE / f"{Path(file).stem}.json") or "{}") for file in test_files}
        todo = [file for file, results in stored.items() if fresh or results.get("stamp") != stamp(file)]
        print(f"measuring which tests run which lines: {len(todo)} of {len(stored)} test files", flush=True)
        for file, result in forks.run((file, {}, partial(record, file)) for file in todo):
            if result.verdict != "passed":
                sys.exit(f"error: {file} cannot be measured: {result.verdict}\n{result.output[-4000:]}")
            stored[file] = json.loads(result.stored) | {"stamp": stamp(file)}
            lines = stored[file]["lines"]
            stored[file]["sources"] = {source: keep(text) for source, text in self.texts.items() if source in lines}
            (STORE / f"{Path(file).stem}.json").write_text(json.dumps(stored[file]), encoding="utf-8")
        for results in stored.values():
            self.add(**results)

    def add(self, tests, fixtures, lines, sources, stamp):
        users = defaultdict(set)
        for test, result in tests.items():
            if result["failed"]:
                print(f"warning: {test} fails without a mutant, so it is not used", flush=True)
                continue
            self.seconds[test] = result["seconds"] + sum(fixtures.get(name, 0) for name in result["fixtures"])
            for name in (test, *result["fixtures"]):
                users[name].add(test)
        for file in lines.keys() & self.texts.keys():
            numbers = new_line_numbers(sources[file], self.texts[file])
            for line, names in lines[file].items():
                if int(line) in numbers:
                    self.lines[file][numbers[int(line)]].update(*(users[name] for name in names))

    def select(self, mutant):
        """Return the tests that may catch a mutant."""
        here = self.lines[mutant.file]
        tests = set().union(*(here[line] for line in mutant.lines))
        if mutant.function and not tests:
            tests = set().union(*(here[line] for line in mutant.function))
        if not mutant.function:
            pattern = re.compile(rf"\b({'|'.join(mutant.names) or '(?!)'})\b")
            for file, text in self.texts.items():
                numbers = [i for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
                tests.update(*(self.lines[file][number] for number in numbers))
            users = set().union(*here.values())
            tests.update(sorted(users, key=lambda test: (self.seconds[test], test))[:30])
            own = f"/test_{Path(mutant.file).stem}.py::", "/test_layout.py::"  # the last one runs the scripts
            tests |= {test for test in users if any(name in test for name in own)}
        return tests


def keep(text):
    """Store a text under its hash; return the hash."""
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    (STORE / "sources").mkdir(parents=True, exist_ok=True)
    (STORE / "sources" / name).write_text(text, encoding="utf-8")
    return name


@cache
def new_line_numbers(name, text):
    """Return {number of a line in the stored text: number of the same line in a newer text}."""
    old, new = read(STORE / "sources" / name).splitlines(), text.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {block.a + i + 1: block.b + i + 1 for block in blocks for i in range(block.size)}


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def source_files():
    paths = [path.relative_to(ROOT) for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)]
    return sorted(str(path) for path in paths if path.parts[0] != "tests" and not path.parts[0].startswith("."))


def all_test_files():
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("**/test_*.py"))


@cache
def stamp(*files):
    """Return a hash of these files and of the modules that tests share."""
    shared = [path for path in sorted((ROOT / "tests").glob("*.py")) if not path.match("test_*.py")]
    texts = [path.read_bytes() for path in [*shared, *(ROOT / file for file in files)]]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
