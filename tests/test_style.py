"The house style of notebooks and of the library, read from the files: no kernel is started"

import ast
import functools
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from common import machine_traces, nbs, needs_parameters, notebooks, output_text, root
from nb_filter import EXPORT, body, directives, text, title_cell
from nb_read import TAG, Notebook, only_imports, prose, tree

lib = root / "llmpapers"
PAPERS = "attention_rhythm smec rere roll_flash vamo qagent mesh asyppo graph2eval dspnet".split()
ROOMS = {"core", "rl", "benchmarks", *PAPERS}
SKELETON = dict(
    part=[
        "In one paragraph",
        "What differs from the paper",
        "Notation",
        "Check",
        "Experiment",
        "At scale",
        "Pitfalls",
        "Exercises",
    ],
    results=["In one paragraph", "Pitfalls"],
    core=["In one paragraph", "Pitfalls", "Exercises"],
)
MAX_NOTEBOOK, MAX_FIGURE, MAX_DATA = 600_000, 80_000, 200_000  # bytes
MAX_OUTPUT_LINES = 60
RAW = re.compile(r"@(?:fig|eq|tbl|sec)-|\{#(?:eq|fig|tbl)-|#\s*\|\s*(?:label|fig-cap)\s*:")
all_nbs = notebooks()
all_modules = sorted(p for p in lib.rglob("*.py") if "_nbs" not in p.parts)


def prints_text(call):
    "Printing one value that is a text of several lines, such as what a command wrote, is all right"
    return len(call.args) == 1 and isinstance(
        call.args[0], ast.Name | ast.Call | ast.Attribute | ast.Subscript
    )


@functools.cache
def read(rel):
    "A notebook, read once"
    return Notebook(rel)


@pytest.fixture(params=all_nbs, ids=lambda p: p.as_posix())
def nb(request):
    return read(request.param)


def fail(nb, faults):
    assert not faults, f"nbs/{nb.rel}:\n  " + "\n  ".join(faults)


def test_there_are_notebooks():
    assert all_nbs and all_modules


# ---- form of a notebook --------------------------------------------------------------------------
def test_form(nb):
    "Title, default_exp, kernel, cell ids, no counts, no directives that only nbdev_test reads"
    faults, cells = [], nb.cells
    t = title_cell(cells[0]["source"]) if cells[0]["cell_type"] == "markdown" else None
    if not t or not t[1] or t[2]:
        faults.append(
            "the first cell must be `# Title`, an empty line, `> one sentence`, and nothing else"
        )
    if nb.nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        faults.append("kernelspec must be python3")
    if (nb.nb["nbformat"], nb.nb["nbformat_minor"] >= 5) != (4, True):
        faults.append("nbformat must be 4.5 or later")
    ids = [c.get("id") for c in cells]
    if None in ids or len(set(ids)) < len(ids):
        faults.append("cells need an id each, all different")
    exp = [
        m[1]
        for c in nb.code
        for m in re.finditer(r"^#\s*\|\s*default_exp\s+(\S+)", c["source"], flags=re.M)
    ]
    if nb.kind in ("part", "core") or nb.exports:
        room, name = nb.rel.parts[0], re.sub(r"^\d+_", "", nb.rel.stem)
        if exp != [f"{room}.{name}"]:
            faults.append(f"default_exp is {exp}, must be {room}.{name}")
        elif cells[1].get("cell_type") != "code" or "default_exp" not in directives(
            cells[1]["source"]
        ):
            faults.append("default_exp must be in the second cell")
    for c in nb.code:
        if c.get("execution_count") is not None or any(
            o.get("execution_count") is not None for o in c["outputs"]
        ):
            faults.append(f"{nb.where(c)}: an execution count is saved; run nbdev_clean")
        if "nbdev_export(" in c["source"]:
            faults.append(f"{nb.where(c)}: no cell may call nbdev_export")
        for d in set(directives(c["source"])) & {"eval", "slow", "notest", "exporti", "gpu"}:
            faults.append(
                f"{nb.where(c)}: directive {d} means nothing to JupyterLab and papermill; "
                "test the scale instead"
            )
    if nb.rel.parent.name and (nb.rel.parts[0] not in ROOMS or len(nb.rel.parts) != 2):
        faults.append(f"{nb.rel} is in no room of the house")
    if nb.kind != "index" and not re.match(r"^\d\d_[a-z0-9_]+$", nb.rel.stem):
        faults.append("the file must be named NN_module.ipynb")
    if any(re.match(r"\d", part) for part in nb.rel.parts[:-1]):
        faults.append("no numbered folder")
    fail(nb, faults)


def test_parameters(nb):
    "One cell tagged `parameters`, literals only, laptop scale and seed 0"
    tagged, faults = [c for c in nb.code if "parameters" in c["metadata"].get("tags", [])], []
    if len(tagged) > 1 or (needs_parameters(nb.rel) and not tagged):
        faults.append(f"{len(tagged)} cells tagged `parameters`")
    for c in tagged:
        vals = {}
        for s in tree(c).body:
            ok = (
                isinstance(s, ast.Assign)
                and len(s.targets) == 1
                and isinstance(s.targets[0], ast.Name)
            )
            try:
                vals[s.targets[0].id] = (
                    ast.literal_eval(s.value)
                    if ok
                    else faults.append(f"not a plain assignment: {ast.unparse(s)}")
                )
            except ValueError:
                faults.append(f"not a literal: {ast.unparse(s)}")
        if not re.search(r'^scale = "laptop"', "".join(c["source"]), re.M):
            faults.append('the parameters cell must say scale = "laptop", on one line')
        if vals.get("seed") != 0:
            faults.append("the parameters cell must say seed = 0")
    fail(nb, faults)


@pytest.mark.slow
def test_scales_that_are_named_have_recipes(nb):
    "The comment beside `scale` names no scale for which a lookup of this notebook has no size"
    lines = [s for c in nb.code for s in c["source"].splitlines() if s.startswith("scale = ")]
    named = set(re.findall(r'"(\w+)"', lines[0].partition("#")[2])) if lines else set()
    faults = []
    for c in nb.code:
        for call in ast.walk(tree(c)) if nb.rel.stem != "02_scale" else ():
            sizes = isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "pick"
            given = {k.arg for k in call.keywords} if sizes and not call.args else set()
            if given and (lost := named - given):
                faults.append(f"{nb.where(c)}: {', '.join(sorted(lost))} has no recipe here")
    fail(nb, faults)


def test_skeleton(nb):
    "The sections that every notebook of its kind has"
    heads = [
        line.lstrip("# ").lower()
        for c in nb.md
        for line in c["source"].splitlines()
        if re.match(r"#{2,} ", line)
    ]
    missing = [h for h in SKELETON.get(nb.kind, []) if not any(h.lower() in k for k in heads)]
    fail(nb, [f'no section "{h}"' for h in missing])


def test_cells(nb):
    "Imports apart, values rather than prints, nothing defined twice, no raw HTML"
    faults, made = [], {}
    for c in nb.code:
        if not body(c["source"]).strip():
            continue
        t = tree(c)
        imports = [s for s in t.body if isinstance(s, (ast.Import, ast.ImportFrom))]
        if imports and not only_imports(t):
            faults.append(f"{nb.where(c)}: imports mixed with other code")
        last = t.body[-1] if t.body else None
        if (
            isinstance(last, ast.Expr)
            and isinstance(last.value, ast.Call)
            and ast.unparse(last.value.func) == "print"
            and not prints_text(last.value)
        ):
            faults.append(f"{nb.where(c)}: end the cell with a value, not with print")
        for s in t.body:
            if not isinstance(s, (ast.FunctionDef, ast.ClassDef)) or s.name == "_":
                continue
            patched = any("patch" in ast.unparse(d) for d in s.decorator_list)
            name = (
                f"{ast.unparse(s.args.args[0].annotation)}.{s.name}"
                if patched and s.args.args and s.args.args[0].annotation
                else s.name
            )
            if name in made:
                faults.append(f"{nb.where(c)}: {name} is defined again (first in {made[name]})")
            made[name] = nb.where(c)
    for c in nb.md:
        p = prose(c["source"])
        if m := re.search(
            r"</?(?:div|span|img|br|p|b|i|a|table|details|center|font|sup|sub|h\d)\b[^>]*>",
            p,
            flags=re.I,
        ):
            faults.append(f"{nb.where(c)}: raw HTML {m[0]}")
        if m := re.search(r"!\[[^\]]*\]\(\s*(?:https?:)?//[^)]*", p):
            faults.append(f"{nb.where(c)}: remote image {m[0][:60]}")
        if m := re.search("[\U0001f300-\U0001faff\u2600-\u27bf\ufe0f]", p):
            faults.append(f"{nb.where(c)}: emoji {m[0]!r}")
    fail(nb, faults)


def images_of(c):
    "Images in the outputs of a cell, as (type, size in bytes)"
    found = [
        (k, text(v))
        for o in c["outputs"]
        for k, v in o.get("data", {}).items()
        if k.startswith("image/")
    ]
    return [(k, len(v) if k == "image/svg+xml" else len(v) * 3 // 4) for k, v in found]


def caption_lines(c):
    "Outputs of a cell that begin as a caption does"
    shown = [text(o.get("data", {}).get("text/markdown", "")) for o in c["outputs"]]
    return [t for t in shown if t.startswith("**Figure ")]


def figure_faults(nb):
    "A figure is an image, its caption below it, from a cell that ends with `caption(n, ...)`"
    faults = []
    numbers = dict((id(c), n) for c, n in nb.figures)
    for c in nb.code:
        images, captions = images_of(c), caption_lines(c)
        for _, size in images:
            if size > MAX_FIGURE:
                faults.append(
                    f"{nb.where(c)}: a figure of {size // 1000} kB, allowed {MAX_FIGURE // 1000}"
                )
        if id(c) not in numbers:
            if images or captions:
                faults.append(
                    f"{nb.where(c)}: a figure whose cell does not end with caption(n, ..)"
                )
            continue
        n = numbers[id(c)]
        if not images:
            faults.append(f"{nb.where(c)}: Figure {n} has no image; save the outputs at laptop")
        last = text(c["outputs"][-1].get("data", {}).get("text/markdown", "")) if images else ""
        if images and not re.match(rf"\*\*Figure {n}\.\*\* \S", last):
            faults.append(f"{nb.where(c)}: the last output is not the caption of Figure {n}")
    return faults


def number_faults(nb):
    """Figures and equations are numbered 1, 2, ... and the prose names those that exist; no raw
    marker"""
    faults, figures = [], [n for _, n in nb.figures]
    for what, found in (("captions", figures), ("tags of equations", nb.tags)):
        want = list(range(1, len(found) + 1))
        if [str(n) for n in found] != [str(n) for n in want]:
            faults.append(f"{what} are numbered {found}, must be {want}")
    for c in nb.cells:
        if m := RAW.search(c["source"]) or RAW.search(output_text(c)):
            faults.append(f"{nb.where(c)}: raw marker {m[0]!r}")
        shown = "\n".join(caption_lines(c)) if c["cell_type"] == "code" else c["source"]
        if c["cell_type"] == "code" and TAG.search(shown):
            faults.append(f"{nb.where(c)}: a tag in an output")
        for m in re.finditer(r"\b([Ff]igures?|[Ee]quations?)\s+\(?(\d+)", prose(shown)):
            known = figures if m[1][0] in "fF" else [int(t) for t in nb.tags if t.isdigit()]
            if int(m[2]) not in known:
                faults.append(f"{nb.where(c)}: {m[0]!r} names nothing in this notebook")
    return faults


def test_figures(nb):
    "Every figure has an image and a caption below it, and is small"
    fail(nb, figure_faults(nb))


def test_notation(nb):
    "Numbers of figures and equations run in order, references name one that exists, no raw marker"
    fail(nb, number_faults(nb))


def test_links(nb):
    "Links to files of the project lead somewhere (anchors are checked where the site is built)"
    faults = []
    for c in nb.md:
        for url in re.findall(r"\]\(([^)\s]+)\)", prose(c["source"])):
            path = url.split("#")[0]
            if path and not re.match(r"[a-z][a-z0-9+.-]*:", path):
                if not (nb.path.parent / path).exists():
                    faults.append(f"{nb.where(c)}: dead link {url}")
    fail(nb, faults)


def test_outputs(nb):
    "Outputs are saved, small, without errors, warnings, addresses or traces of a machine"
    faults = []
    size = (nbs / nb.rel).stat().st_size
    if size > MAX_NOTEBOOK:
        faults.append(f"{size // 1000} kB, allowed {MAX_NOTEBOOK // 1000}")
    if nb.lessons and sum(bool(c["outputs"]) for c in nb.lessons) < len(nb.lessons) / 3:
        faults.append("most cells have no output; save the outputs of a laptop run")
    for c in nb.code:
        s = "\n".join(
            text(v)
            for o in c["outputs"]
            for k, v in [("text", o.get("text", ""))] + list(o.get("data", {}).items())
            if not k.startswith("image/") and not isinstance(v, dict | list) or k == "text"
        )
        s += "\n" + output_text(c)
        for o in c["outputs"]:
            if o["output_type"] == "error":
                faults.append(f"{nb.where(c)}: an error is saved: {o['ename']}")
            if o.get("name") == "stderr":
                faults.append(f"{nb.where(c)}: stderr is saved: {text(o['text'])[:60]!r}")
            shown = text(o.get("text", o.get("data", {}).get("text/plain", "")))
            if shown.count("\n") > MAX_OUTPUT_LINES:
                lines = shown.count("\n")
                faults.append(
                    f"{nb.where(c)}: an output of {lines} lines, allowed {MAX_OUTPUT_LINES}"
                )
        if re.search(r"\r(?!\n)|\d+%\|", s):
            faults.append(f"{nb.where(c)}: a progress bar is saved")
        if m := re.search(r"\bat 0x[0-9a-f]{6,}", s):
            faults.append(f"{nb.where(c)}: the output shows an address ({m[0]}), not a value")
        if found := machine_traces(s):
            faults.append(f"{nb.where(c)}: the output shows this machine: {found}")
    for c in nb.cells:
        if found := machine_traces(c["source"]):
            faults.append(f"{nb.where(c)}: the source names a machine: {found}")
    fail(nb, faults)


def test_no_two_notebooks_export_one_module():
    made = {}
    for rel in all_nbs:
        for c in read(rel).code:
            for m in re.finditer(r"^#\s*\|\s*default_exp\s+(\S+)", c["source"], flags=re.M):
                made.setdefault(m[1], []).append(rel.as_posix())
    assert not {k: v for k, v in made.items() if len(v) > 1}
    modules = {
        ".".join(p.relative_to(lib).with_suffix("").parts)
        for p in all_modules
        if not p.name.startswith("_")
    }
    assert modules == set(made), (
        f"modules without a notebook, or notebooks not exported: {sorted(modules ^ set(made))}"
    )


# ---- ruff ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff(command):
    "Notebooks, tests and tools are formatted, and without a finding"
    exe = Path(sys.executable).parent / "ruff"
    paths = ["nbs", "tests", "tools", "setup.py"]
    r = subprocess.run(
        [exe, *command.split(), *paths, "--no-cache", "--output-format", "concise"]
        if command == "check"
        else [exe, *command.split(), *paths, "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, f"ruff {command}\n{r.stdout[-6000:]}{r.stderr[-2000:]}"


# ---- generated files -----------------------------------------------------------------------------
def copy_of_tree(dst):
    "The files git knows or would add, copied"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    files = (
        names.stdout.split("\0")
        if names.returncode == 0
        else [
            p.relative_to(root).as_posix()
            for d in ("nbs", "llmpapers")
            for p in (root / d).rglob("*")
            if p.is_file()
        ]
        + ["settings.ini", "pyproject.toml"]
    )
    for f in files:
        if f and (root / f).is_file():
            (dst / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / f, dst / f)


def differences(a, b, pattern):
    names = {
        p.relative_to(d).as_posix()
        for d in (a, b)
        for p in d.rglob(pattern)
        if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
    }

    def read(d, n):
        return (d / n).read_bytes() if (d / n).exists() else None

    return sorted(n for n in names if read(a, n) != read(b, n))


@pytest.mark.parametrize(
    "command, folder, pattern",
    [("nbdev_export", "llmpapers", "*.py"), ("nbdev_clean", "nbs", "*.ipynb")],
)
def test_generated_files_are_current(tmp_path, command, folder, pattern):
    "`nbdev_export` and `nbdev_clean` leave the tree as it is"
    copy_of_tree(tmp_path)
    copy_of_tree(before := tmp_path / "_before")
    exe = Path(sys.executable).parent / command
    r = subprocess.run(
        [str(exe)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(tmp_path)),
    )
    assert r.returncode == 0, r.stderr
    changed = differences(before / folder, tmp_path / folder, pattern)
    assert not changed, f"run {command} and commit: {changed}"


# ---- the library ---------------------------------------------------------------------------------
def comments(path):
    "{line: True if the line holds nothing else} of all comments"
    res = {}
    with tokenize.open(path) as f:
        for t in tokenize.generate_tokens(f.readline):
            if t.type == tokenize.COMMENT and len(t.string.strip("# ")) > 2:
                res[t.start[0]] = not t.line[: t.start[1]].strip()
    return res


def decorated(node, name):
    return any(name in ast.unparse(d) for d in node.decorator_list)


def returns_value(fn):
    "Does the function itself return or yield something?"

    def inner(n):
        for child in ast.iter_child_nodes(n):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
                continue
            if (
                isinstance(child, ast.Return)
                and child.value is not None
                and ast.unparse(child.value) != "None"
            ):
                return True
            if isinstance(child, (ast.Yield, ast.YieldFrom)):
                return True
            if inner(child):
                return True
        return False

    return inner(fn)


def function_faults(fn, notes, name, method):
    faults, dunder = [], fn.name.startswith("__")
    args = [
        *fn.args.posonlyargs,
        *fn.args.args,
        *([fn.args.vararg] if fn.args.vararg else []),
        *fn.args.kwonlyargs,
        *([fn.args.kwarg] if fn.args.kwarg else []),
    ]
    if (method and not decorated(fn, "staticmethod")) or decorated(fn, "patch"):
        args = args[1:]
    if not dunder:
        doc = ast.get_docstring(fn)
        if not doc:
            faults.append(f"{name}: no docstring")
        elif "\n" in doc:
            faults.append(f"{name}: the docstring must be one line; explain in Markdown")
    ends = [a.end_lineno for a in args]
    ret = fn.returns.end_lineno if fn.returns else None
    for i, a in enumerate(args):
        line = a.lineno
        shared = (
            line in ends[i + 1 :] or any(b.lineno == line for b in args[i + 1 :]) or ret == line
        )
        above = line - 1
        alone = notes.get(above) and (not i or args[i - 1].end_lineno < above)
        span = range(
            a.lineno, (args[i + 1].lineno if i + 1 < len(args) else (ret or fn.body[0].lineno))
        )  # a default may run over lines
        if not alone and (shared or not any(line in notes for line in span)):
            faults.append(f"{name}: no comment beside parameter {a.arg}")
    if decorated(fn, "contextmanager"):
        return faults
    if returns_value(fn) or (fn.returns and ast.unparse(fn.returns) != "None"):
        if fn.returns is None:
            faults.append(f"{name}: returns something, but has no `-> type: # what`")
        elif (
            ast.unparse(fn.returns) not in ("None", "NoReturn")
            and not decorated(fn, "property")
            and ret not in notes
        ):
            faults.append(f"{name}: no comment beside the return")
    return faults


def docment_faults(path):
    src = path.read_text(encoding="utf-8")
    notes, faults = comments(path), []
    for node in ast.parse(src).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name.startswith("_") or decorated(node, "overload"):
                continue
            if (
                decorated(node, "patch")
                and node.args.args
                and (
                    ast.unparse(node.args.args[0].annotation)
                    if node.args.args[0].annotation
                    else ""
                ).startswith("_")
            ):
                continue
            faults += function_faults(node, notes, node.name, False)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                faults.append(f"{node.name}: no docstring")
            fields = decorated(node, "dataclass") or any(
                "NamedTuple" in ast.unparse(b) for b in node.bases
            )
            for m in node.body:
                if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    if m.name == "__init__" or not m.name.startswith("_"):
                        faults += function_faults(m, notes, f"{node.name}.{m.name}", True)
                elif (
                    fields
                    and isinstance(m, ast.AnnAssign)
                    and isinstance(m.target, ast.Name)
                    and not m.target.id.startswith("_")
                ):
                    if not any(
                        line in notes for line in range(m.lineno, m.end_lineno + 1)
                    ) and not notes.get(m.lineno - 1):
                        faults.append(f"{node.name}.{m.target.id}: no comment beside the field")
    return faults


@pytest.mark.parametrize(
    "path",
    [p for p in all_modules if not p.name.startswith("_")],
    ids=lambda p: p.relative_to(lib).as_posix(),
)
def test_docments(path):
    """Every public function, method and field says what it is, each parameter and result beside its
    name"""
    faults = docment_faults(path)
    assert not faults, f"{path.relative_to(root)}:\n  " + "\n  ".join(faults)


GOOD = """def f(
    a:int,   # first number
    # the second one
    b:int=2,
)->int:      # their sum
    "Sum"
    return a + b

class C:
    "A thing"
    def m(self,
        x:str="a", # a name
    ): "Do it"
    @property
    def p(self)->int: # a size
        "Size"
        return 1
"""
BAD = '''from dataclasses import dataclass
def f(a, b): # both numbers
    return a + b

def g(
    x:int,
)->int: # result of it
    """One
    two"""
    return x

@dataclass
class D:
    "Data"
    n:int
    def _private(self, q): return q
'''


def test_docment_check_itself(tmp_path):
    "The check above sees what is missing and accepts what is there"
    good = tmp_path / "good.py"
    good.write_text(GOOD)
    assert docment_faults(good) == []
    bad = tmp_path / "bad.py"
    bad.write_text(BAD)
    assert docment_faults(bad) == [
        "f: no docstring",
        "f: no comment beside parameter a",
        "f: returns something, but has no `-> type: # what`",
        "g: the docstring must be one line; explain in Markdown",
        "g: no comment beside parameter x",
        "D.n: no comment beside the field",
    ]


# ---- imports -------------------------------------------------------------------------------------
def imported(syntax, package):
    "Modules that a syntax tree imports at any depth, as dotted names; `package` resolves the dots"
    names = set()
    for n in ast.walk(syntax):
        if isinstance(n, ast.Import):
            names |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            base = package[: len(package) + 1 - n.level] if n.level else ()
            module = ".".join([*base, *([n.module] if n.module else [])])
            names |= {module} | {f"{module}.{a.name}" for a in n.names}
        elif isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant):
            if ast.unparse(n.func).split(".")[-1] in ("import_module", "__import__", "need"):
                names.add(str(n.args[0].value))
    return names


def module_imports(path):
    "What a module of the library imports"
    package = path.relative_to(root).with_suffix("").parts[:-1]
    return imported(ast.parse(path.read_text(encoding="utf-8")), package)


def rooms_of(names):
    "Rooms of ours among the modules that are imported"
    found = [n.split(".") for n in names if n.startswith("llmpapers.")]
    return {n[1] for n in found if n[1] in ROOMS}


def room_imports(path):
    "Rooms of ours that a module imports, at any depth of its code"
    return rooms_of(module_imports(path))


@pytest.mark.parametrize(
    "path",
    [p for p in all_modules if len(p.relative_to(lib).parts) > 1],
    ids=lambda p: p.relative_to(lib).as_posix(),
)
def test_arrows_point_down(path):
    """core imports nothing of ours but core, rl adds core, a paper adds core and rl and never
    another paper"""
    room = path.relative_to(lib).parts[0]
    allowed = dict(core={"core"}, rl={"core", "rl"}, benchmarks=ROOMS).get(
        room, {"core", "rl", room}
    )
    assert room in ROOMS or room in ("data",), f"{room} is no room of the house"
    assert room_imports(path) <= allowed, (
        f"{path.relative_to(root)} imports {sorted(room_imports(path) - allowed)}"
    )


def order_faults(books):
    "Notebooks that import one of their room with the same or a larger number"
    places = {f"llmpapers.{nb.module}": nb.rel for nb in books}
    faults = []
    for nb in books:
        if nb.kind in ("index", "paper"):  # these gather what others made
            continue
        room = nb.rel.parts[0]
        for c in nb.code:
            names = imported(tree(c), ("llmpapers", room))
            later = [places[n] for n in names if n in places and places[n].parts[0] == room]
            if not EXPORT & set(directives(c["source"])):  # a lesson may import what it exported
                later = [p for p in later if p != nb.rel]
            faults += [
                f"{nb.rel.as_posix()}, {nb.where(c)}: imports {p.name}"
                for p in later
                if p.name[:2] >= nb.rel.name[:2]
            ]
    return faults


def test_reading_order_is_import_order():
    "In every room a notebook imports only notebooks with a smaller number, wherever the import is"
    faults = order_faults([read(rel) for rel in all_nbs])
    assert not faults, "\n  ".join(["a reader meets these too late:", *faults])


def test_lessons_import_down(nb):
    "The cells of a notebook, lessons too, import what its room may import"
    room = nb.rel.parts[0]
    if nb.kind == "index" or room == "benchmarks":
        return
    allowed = dict(core={"core"}, rl={"core", "rl"}).get(room, {"core", "rl", room})
    fail(
        nb,
        [
            f"{nb.where(c)}: imports {sorted(bad)}"
            for c in nb.code
            if (bad := rooms_of(imported(tree(c), ("llmpapers", room))) - allowed)
        ],
    )


def circles(edges):
    "A circle of imports, as a list of names, or None"
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return None


def test_no_circle_of_imports():
    names = {".".join(p.relative_to(root).with_suffix("").parts): p for p in all_modules}
    edges = {n: {m for m in module_imports(p) if m in names and m != n} for n, p in names.items()}
    assert circles(edges) is None, f"imports run in a circle: {circles(edges)}"


def module_getattrs(syntax):
    "Module-level `__getattr__`, which hides an import from a reader"
    return [n for n in syntax.body if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"]


def test_no_module_getattr():
    found = [
        p.relative_to(root).as_posix()
        for p in all_modules
        if module_getattrs(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert not found, f"module-level __getattr__ hides imports in {found}"


def planted(folder, name, *sources, outputs=()):
    "A small notebook: Markdown where a source begins with a letter and a space, code else"
    cells = []
    for src in sources:
        kind = "markdown" if src.startswith("md ") else "code"
        cell = dict(cell_type=kind, metadata={}, source=src.removeprefix("md "))
        cells.append(cell | (dict(outputs=list(outputs)) if kind == "code" else {}))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return Notebook(path.relative_to(folder), folder)


@pytest.mark.parametrize(
    "code, found",
    [
        ("from llmpapers.rl.late import x", 1),
        ("def f():\n    from llmpapers.rl import late", 1),
        ("#| export\ndef f():\n    from .late import x", 1),
        ("#| export\nfrom . import late", 1),
        ("import llmpapers.rl.late as late", 1),
        ('importlib.import_module("llmpapers.rl.late")', 1),
        ("#| export\nfrom llmpapers.rl.mid import x", 1),
        ("from llmpapers.rl.mid import x", 0),
        ("from llmpapers.rl.early import x", 0),
        ("from llmpapers.core.late import x", 0),
        ("late = 'llmpapers.rl.late'", 0),
    ],
)
def test_the_check_of_order_sees(tmp_path, code, found):
    early, mid, late = (
        planted(tmp_path, f"rl/{n}_{name}.ipynb", f"#| default_exp rl.{name}", src)
        for n, name, src in (("01", "early", "1"), ("02", "mid", code), ("03", "late", "1"))
    )
    assert len(order_faults([early, mid, late])) == found


def test_the_page_of_a_paper_gathers_its_room(tmp_path):
    code = "from llmpapers.asyppo.late import x"
    late = planted(tmp_path, "asyppo/03_late.ipynb", "#| default_exp asyppo.late")
    page = planted(tmp_path, "asyppo/00_paper.ipynb", code)
    part = planted(tmp_path, "asyppo/01_part.ipynb", code)
    assert order_faults([page, late]) == [] and len(order_faults([part, late])) == 1


def test_the_check_of_circles_sees():
    assert circles(dict(a={"b"}, b={"c"}, c={"d"})) is None
    assert set(circles(dict(a={"b"}, b={"c"}, c={"a"}))) == {"a", "b", "c"}
    hiding = ast.parse("def __getattr__(name):\n    return 1\n")
    assert module_getattrs(hiding)
    assert not module_getattrs(ast.parse("class A:\n    def __getattr__(self, n):\n        pass"))


IMAGE = dict(output_type="display_data", metadata={}, data={"image/png": "AAAA"})


def under(s):
    "A caption as an output"
    return dict(output_type="display_data", metadata={}, data={"text/markdown": s})


@pytest.mark.parametrize(
    "sources, outputs, message",
    [
        (["md $$ x \\tag{1} $$", "md As equation (1) says."], [], None),
        (['plot()\ncaption(1, "It rises")'], [IMAGE, under("**Figure 1.** It rises")], None),
        (["md $$ x \\tag{2} $$"], [], "tags of equations"),
        (["md $$ x \\tag{1} $$", "md $$ y \\tag{1} $$"], [], "tags of equations"),
        (["md See equation (3)."], [], "names nothing"),
        (["md See Figure 1 and `Figure 7`."], [], "'Figure 1' names nothing"),
        (["md See @fig-line."], [], "raw marker"),
        (["md $$ x $$ {#eq-sum}"], [], "raw marker"),
        (["#| label: fig-line\nplot();"], [IMAGE], "raw marker"),
        (["plot();"], [IMAGE], "does not end with caption"),
        (['caption(1, "It rises")\nx'], [IMAGE, under("**Figure 1.** a")], "does not end with"),
        (['caption(1, "It rises")'], [under("**Figure 1.** It rises")], "has no image"),
        (['caption(1, "It rises")'], [IMAGE], "not the caption of Figure 1"),
        (['caption(1, "It rises")'], [IMAGE, under("**Figure 2.** a")], "not the caption of"),
        (['caption(1, "It rises")'], [under("**Figure 1.** a"), IMAGE], "not the caption of"),
        (['caption(2, "It rises")'], [IMAGE, under("**Figure 2.** a")], "captions are numbered"),
        (['caption(1, "It rises")'], [IMAGE, under("**Figure 1.** as Figure 9")], "'Figure 9'"),
    ],
)
def test_the_check_of_notation_sees(tmp_path, sources, outputs, message):
    nb = planted(tmp_path, "rl/01_a.ipynb", *sources, outputs=outputs)
    faults = figure_faults(nb) + number_faults(nb)
    assert any(message in f for f in faults) if message else not faults, faults


def test_no_machine_in_the_library():
    "No module, README or data file names a folder of one machine"
    files = [
        p
        for p in [*all_modules, root / "README.md", *(lib / "data").rglob("*")]
        if p.is_file() and p.suffix in (".py", ".md", ".json", ".csv", ".txt", ".jsonl")
    ]
    found = {
        p.relative_to(root).as_posix(): t
        for p in files
        if (t := machine_traces(p.read_text(encoding="utf-8")))
    }
    assert not found, found


def test_data_files_are_small():
    big = {
        p.relative_to(root).as_posix(): p.stat().st_size
        for p in (lib / "data").rglob("*")
        if p.is_file() and p.stat().st_size > MAX_DATA
    }
    assert not big, f"data files above {MAX_DATA // 1000} kB: {big}"
