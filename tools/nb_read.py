"Which notebooks there are, and what is in them: read by the tests of style and by the report on it"

import ast
import functools
import json
import re
from pathlib import Path

from nb_filter import EXPORT, body, caption_call, directives, text

root = Path(__file__).parents[1]
nbs = root / "nbs"
TAG = re.compile(r"\\tag\{([^}]*)\}")
EQUATION = re.compile(r"\$\$.+?\$\$", flags=re.S)


def notebooks(folder=nbs):
    "All notebooks of the project, as paths relative to nbs/"
    found = (p.relative_to(folder) for p in folder.rglob("*.ipynb"))
    return sorted(p for p in found if not any(q.startswith((".", "_")) for q in p.parts))


def kind(rel):
    "index, paper (the 00 page of a room), results, core (core and rl), benchmarks or part"
    if len(rel.parts) == 1:
        return "index"
    room, name = rel.parts[0], rel.stem
    if room in ("core", "rl"):
        return "core"
    if room == "benchmarks":
        return "benchmarks"
    if name.startswith("00_"):
        return "paper"
    return "results" if name.endswith("results") else "part"


class Notebook:
    "A notebook, its cells sorted by what they are for"

    def __init__(self, rel, folder=nbs):
        self.rel, self.kind, self.path = rel, kind(rel), folder / rel
        self.nb = json.loads(self.path.read_text(encoding="utf-8"))
        self.cells = self.nb["cells"]
        for c in self.cells:
            c["source"] = text(c["source"])
        self.md = [c for c in self.cells if c["cell_type"] == "markdown"]
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.exports = [c for c in self.code if EXPORT & set(directives(c["source"]))]
        self.lessons = [c for c in self.code if not silent(c)]
        self.figures = [(c, n[0]) for c in self.code if (n := caption_call(body(c["source"])))]
        self.tags = [t for c in self.md for t in TAG.findall(c["source"])]

    @property
    def module(self):
        "The module that the notebook exports, `room.name`; its own name where it exports none"
        for c in self.code:
            if m := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", c["source"], flags=re.M):
                return m[1]
        return ".".join(self.rel.with_suffix("").parts)

    def where(self, c):
        "How a message names a cell"
        first = (c["source"].strip().splitlines() or ["empty"])[0]
        return f"cell {self.cells.index(c)} ({first[:50]})"


def silent(c):
    "Cells that have nothing to show: directives alone, hidden, parameters, imports, exports"
    names = set(directives(c["source"]))
    return (
        bool(names & (EXPORT | {"default_exp", "hide"}))
        or "parameters" in c["metadata"].get("tags", [])
        or only_imports(tree(c))
    )


def tree(c):
    "Syntax tree of a code cell, IPython magics left out"
    return parsed(body(c["source"]))


@functools.cache
def parsed(src):
    "Syntax tree of code, IPython magics left out"
    return ast.parse("\n".join(x for x in src.splitlines() if not re.match(r"\s*[%!]", x)))


def is_import(s):
    "Imports, those for annotations alone, and the one call that belongs with them: use_style()"
    if isinstance(s, ast.Import | ast.ImportFrom):
        return True
    if isinstance(s, ast.If) and ast.unparse(s.test) == "TYPE_CHECKING":
        return all(is_import(inner) for inner in s.body)
    if not isinstance(s, ast.Expr):
        return False
    return isinstance(s.value, ast.Call) and ast.unparse(s.value.func).endswith("use_style")


def only_imports(t):
    "Does a cell hold imports and nothing else?"
    return bool(t.body) and all(is_import(s) for s in t.body)


def prose(src):
    "Markdown without code and maths"
    src = re.sub(r"^(```|~~~).*?^\1", "", src, flags=re.S | re.M)
    src = EQUATION.sub("", src)
    src = re.sub(r"(`+).+?\1", "", src, flags=re.S)
    return re.sub(r"\$[^$\n]+\$", "", src)


def code_lines(c):
    "Lines of a code cell that are not empty"
    return sum(bool(line.strip()) for line in body(c["source"]).splitlines())


def asserting(c):
    "Does a cell check something?"
    checks = r"^\s*assert\b|\btest_[a-z_]+\(|\bassert_\w+\(|\bExceptionExpected\("
    return bool(re.search(checks, body(c["source"]), flags=re.M))
