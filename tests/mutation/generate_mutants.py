"""Generate mutants of a source file: small changes by the operators of mutmut, each with an id and the lines to test.

The operators and the visitor of the syntax tree are mutmut's. Its runner is not used: it skips decorated functions, its
trampolines break torch.compile, and it writes all mutants into one file, which tests that read the source would see.

As in mutmut, there are no mutants of type annotations, decorators, calls of len and isinstance, triple-quoted strings,
and default arguments that are expressions. Rules exclude further mutants:
    text      mutants of strings and arguments in a raise statement, in a call of TEXT, and in the options of tqdm;
              mutants of strings of eight words or more
    argument  mutants of the arguments flush= and encoding=
    case      the upper- and lower-case variants of a string; "XX...XX" is kept
    invalid   mutants that do not compile or that are equal to another one

An id consists of the file, the function, and a hash of the changed lines before and after, without comments. Edits of
other lines do not change it.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import libcst as cst
from forks import ROOT
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

DECORATORS = {
    "torch.no_grad()",
    "classmethod",
    "staticmethod",
    "property",
    "contextmanager",
}  # functions with other decorators have no mutants
TEXT = {"print", "sys.stderr.write", "progress.write", "progress.set_postfix", "warnings.warn"}
RULES = ("text", "argument", "case", "invalid")
WIDTH = 110  # characters of a line that are shown


@dataclass(frozen=True)
class Mutant:
    id: str
    file: str
    line: int
    operator: str
    before: str  # the changed lines
    after: str
    rule: str  # the rule that excludes it, or ""
    lines: frozenset  # of its statement, or of the whole function if it is in the signature; none outside of functions
    function: frozenset  # lines of the function
    names: tuple  # names assigned by the statement
    source: str = field(repr=False)  # of the whole mutated file

    def __str__(self):
        """Return the change as text, with an ellipsis for the start of long lines."""
        same = len(os.path.commonprefix([self.before, self.after]))
        first = max(0, min(same - 40, max(len(self.before), len(self.after)) - WIDTH))
        first = self.before.rfind(" ", 0, first) + 1  # the start of a word
        texts = (f"{'... ' * (first > 0)}{text[first:][:WIDTH]}" for text in (self.before, self.after))
        return "  ->  ".join(text or "(nothing)" for text in texts)


class Visitor(MutationVisitor):
    """mutations: (nodes from the module to the mutated one, new node, operator, number of its variant)."""

    def __init__(self):
        super().__init__(mutation_operators, IgnoredCode(set(), set(), set()))
        self.path, self.mutations = [], []

    def on_visit(self, node):
        self.path.append(node)
        return super().on_visit(node)

    def on_leave(self, node):
        self.path.pop()

    def _skip_node_and_children(self, node):
        if isinstance(node, cst.FunctionDef) and node.decorators:
            return not {code_of(one.decorator) for one in node.decorators} <= DECORATORS
        return super()._skip_node_and_children(node)

    def _create_mutations(self, node):
        for kind, operator in self._operators:
            if isinstance(node, kind):
                name = operator.__name__.removeprefix("operator_")
                self.mutations += [(tuple(self.path), new, name, i) for i, new in enumerate(operator(node))]


def generate(file):
    """Return all mutants of a file in the order of the source, including those that a rule excludes."""
    code = (ROOT / file).read_text(encoding="utf-8")
    wrapper, visitor = MetadataWrapper(cst.parse_module(code)), Visitor()
    module = wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    texts = [module.code_for_node(node) for node in module.body]
    head = code[: code.index("".join(texts))]
    statements = {id(node): i for i, node in enumerate(module.body)}
    seen, ids, mutants = set(enumerate(texts)), Counter(), []
    for path, new, operator, variant in visitor.mutations:
        i = statements[id(path[1])]
        text = module.code_for_node(replaced(path[1:], new))
        before = head + "".join(texts[:i])
        source = before + text + code[len(before + texts[i]) :]
        at, old_lines, new_lines = changed_lines(texts[i].splitlines(), text.splitlines())
        rule = rule_of(path, new, operator, variant)
        if not rule and ((i, text) in seen or not compiles(text)):
            rule = "invalid"
        scope = [node.name.value for node in path[:-1] if isinstance(node, (cst.FunctionDef, cst.ClassDef))]
        key = f"{'.'.join([Path(file).stem, *scope])}:{digest(old_lines, new_lines)[:8]}"
        if not rule:
            seen.add((i, text))
            ids[key] += 1
            key += f"-{ids[key]}" if ids[key] > 1 else ""
        line = before.count("\n") + at + 1
        place = *tested_lines(path, positions), assigned_names(path)
        mutants.append(Mutant(key, file, line, operator, old_lines, new_lines, rule, *place, source))
    return mutants


def replaced(path, new):
    """Return the first node of a path with its last node replaced. libcst's deep_replace would visit all nodes."""
    for parent, child in reversed(list(itertools.pairwise(path))):
        children = {field.name: getattr(parent, field.name) for field in fields(parent)}
        lists = {name: value for name, value in children.items() if isinstance(value, (list, tuple))}
        changed = {name: [new if one is child else one for one in value] for name, value in lists.items()}
        new = parent.with_changes(**changed, **{name: new for name, value in children.items() if value is child})
    return new


def rule_of(path, new, operator, variant):
    """Return the rule that excludes a mutant, or ""."""
    if operator == "string" and variant:
        return "case"
    if operator == "string" and len(path[-1].value.split()) >= 8:
        return "text"
    changes_text, inner = operator in ("string", "arg_removal", "dict_arguments"), None
    for node in reversed(path):
        if isinstance(node, cst.Call):
            if node is path[-1] and changes_text:  # the argument that is removed or replaced
                inner = next(one for one in node.args if not any(one is other for other in new.args))
            argument = inner if isinstance(inner, cst.Arg) else None
            if argument and argument.keyword and argument.keyword.value in ("flush", "encoding"):
                return "argument"
            called = code_of(node.func)
            if changes_text and (called in TEXT or called == "tqdm" and argument not in (None, node.args[0])):
                return "text"
        if isinstance(node, cst.Raise) and changes_text:
            return "text"
        inner = node
    return ""


def tested_lines(path, positions):
    """Return the lines of a mutant's statement (its function if it is in the signature) and those of the function."""

    def lines(node):
        return range(positions[node].start.line, positions[node].end.line + 1)

    pairs = list(itertools.pairwise(path))
    functions = [(node, child) for node, child in pairs if isinstance(node, cst.FunctionDef)]
    if not functions:
        return frozenset(), frozenset()
    function = frozenset(lines(functions[0][0].body))
    if not any(child is node.body for node, child in functions):
        return function, function
    kinds = (cst.SimpleStatementLine, cst.BaseCompoundStatement)
    node, child = [pair for pair in pairs if isinstance(pair[0], kinds)][-1]
    if isinstance(node, cst.SimpleStatementLine):
        return frozenset(lines(node)), function
    return frozenset([lines(node)[0], *lines(child)]), function


def assigned_names(path):
    assignments = [node for node in path if isinstance(node, (cst.Assign, cst.AnnAssign))]
    targets = [n.target if isinstance(n, cst.AnnAssign) else n.targets[0].target for n in assignments]
    return tuple(re.findall(r"\w+", " ".join(map(code_of, targets))))


def code_of(node):
    return cst.Module([]).code_for_node(node)


def changed_lines(old, new):
    """Return the index of the first changed line, and the changed lines of old and new as texts without comments."""
    old, new = ([re.sub(r"  # .*", "", line) for line in lines] for lines in (old, new))
    start = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new))))
    old, new = old[start:], new[start:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return start, *(" ".join(" ".join(lines).split()) for lines in (old, new))


def compiles(source):
    try:
        return bool(compile(source, "mutant", "exec"))
    except SyntaxError:
        return False


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
