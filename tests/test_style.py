"The house style of notebooks and of the library, read from the files: no kernel is started"

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from common import kind, machine_traces, nbs, needs_parameters, notebooks, output_text, root

sys.path.insert(0, str(root / "tools"))
from nb_filter import EXPORT, body, directives, option, text, title_cell  # noqa: E402

lib = root / "llmpapers"
PAPERS = "attention_rhythm smec rere roll_flash vamo qagent mesh asyppo graph2eval dspnet".split()
ROOMS = {"core", "rl", "benchmarks", *PAPERS}
# Limits by the kind of notebook. None: no limit. Paper pages and the front page are text with few cells.
LIMITS = dict(
    part=dict(
        cells=(40, 90),
        share=(0.40, 0.55),
        words=(900, 2500),
        figures=(3, 8),
        equations=(3, 12),
        asserts=(6, 15),
    ),
    results=dict(
        cells=(25, 90),
        share=(0.40, 0.60),
        words=(600, 2500),
        figures=(3, 8),
        equations=(0, 12),
        asserts=(3, 15),
    ),
    core=dict(
        cells=(25, 90),
        share=(0.40, 0.55),
        words=(600, 2500),
        figures=(1, 8),
        equations=(0, 12),
        asserts=(6, 15),
    ),
    benchmarks=dict(
        cells=(8, 90),
        share=(0.25, 0.70),
        words=(200, 2500),
        figures=(1, 8),
        equations=(0, 12),
        asserts=(1, 15),
    ),
    paper=dict(
        cells=(5, 60),
        share=None,
        words=(300, 2500),
        figures=(1, 8),
        equations=(0, 12),
        asserts=(0, 15),
    ),
    index=dict(
        cells=(5, 60),
        share=None,
        words=(200, 2500),
        figures=(0, 8),
        equations=(0, 12),
        asserts=(0, 15),
    ),
)
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
CODE_LINES = dict(median=6, p90=20, max=45)
MAX_NOTEBOOK, MAX_FIGURE, MAX_OUTPUT_LINES, MAX_DATA, MAX_WIDTH = 600_000, 80_000, 60, 200_000, 160
all_nbs = notebooks()
all_modules = sorted(p for p in lib.rglob("*.py") if "_nbs" not in p.parts)


class Notebook:
    "A notebook, its cells sorted by what they are for"

    def __init__(self, rel):
        self.rel, self.kind = rel, kind(rel)
        self.nb = json.loads((nbs / rel).read_text(encoding="utf-8"))
        self.cells = self.nb["cells"]
        for c in self.cells:
            c["source"] = text(c["source"])
        self.md = [c for c in self.cells if c["cell_type"] == "markdown"]
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.exports = [c for c in self.code if EXPORT & set(directives(c["source"]))]
        self.lessons = [c for c in self.code if not self.silent(c)]

    def silent(self, c):
        "Cells that have nothing to show: directives alone, hidden, parameters, imports, exports"
        names = set(directives(c["source"]))
        return (
            bool(names & (EXPORT | {"default_exp", "hide"}))
            or "parameters" in c["metadata"].get("tags", [])
            or only_imports(tree(c))
        )

    def where(self, c):
        return f"cell {self.cells.index(c)} ({c['source'].strip().splitlines()[0][:50] if c['source'].strip() else 'empty'})"


def tree(c):
    "Syntax tree of a code cell, IPython magics left out"
    lines = [l for l in body(c["source"]).splitlines() if not re.match(r"\s*[%!]", l)]
    return ast.parse("\n".join(lines))


def is_import(s):
    "Imports, and the one call that belongs with them: use_style()"
    if isinstance(s, (ast.Import, ast.ImportFrom)):
        return True
    if not isinstance(s, ast.Expr):
        return False
    return isinstance(s.value, ast.Call) and ast.unparse(s.value.func).endswith("use_style")


def prints_text(call):
    "Printing one value that is a text of several lines, such as what a command wrote, is all right"
    return len(call.args) == 1 and isinstance(
        call.args[0], (ast.Name, ast.Call, ast.Attribute, ast.Subscript)
    )


def only_imports(t):
    return bool(t.body) and all(is_import(s) for s in t.body)


def prose(src):
    "Markdown without code and maths"
    src = re.sub(r"^(```|~~~).*?^\1", "", src, flags=re.S | re.M)
    src = re.sub(r"\$\$.*?\$\$", "", src, flags=re.S)
    src = re.sub(r"(`+).+?\1", "", src, flags=re.S)
    return re.sub(r"\$[^$\n]+\$", "", src)


def code_lines(c):
    return sum(bool(l.strip()) for l in body(c["source"]).splitlines())


def asserting(c):
    return bool(
        re.search(
            r"^\s*assert\b|\btest_[a-z_]+\(|\bassert_\w+\(|\bExceptionExpected\(",
            body(c["source"]),
            flags=re.M,
        )
    )


def between(value, limits, what, faults):
    if limits and not limits[0] <= value <= limits[1]:
        show = "{:.1%}" if isinstance(limits[0], float) else "{}"
        faults.append(
            f"{what}: {show.format(value)}, allowed {show.format(limits[0])} to {show.format(limits[1])}"
        )


@pytest.fixture(params=all_nbs, ids=lambda p: p.as_posix())
def nb(request):
    return Notebook(request.param)


def fail(nb, faults):
    assert not faults, f"nbs/{nb.rel}:\n  " + "\n  ".join(faults)


def test_there_are_notebooks():
    assert all_nbs and all_modules


# ---- form of a notebook ---------------------------------------------------------------------------------------------
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
                f"{nb.where(c)}: directive {d} means nothing to JupyterLab and papermill; test the scale instead"
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
        if vals.get("scale") != "laptop":
            faults.append('the parameters cell must say scale = "laptop"')
        if vals.get("seed") != 0:
            faults.append("the parameters cell must say seed = 0")
    fail(nb, faults)


def test_rhythm(nb):
    "How many cells, words, lines, figures, equations and checks"
    lim, faults = LIMITS[nb.kind], []
    between(len(nb.cells), lim["cells"], "cells", faults)
    between(round(len(nb.md) / len(nb.cells), 2), lim["share"], "share of Markdown cells", faults)
    between(sum(len(c["source"].split()) for c in nb.md), lim["words"], "words", faults)
    figures = [c for c in nb.code if (option(c["source"], "label") or "").startswith("fig-")]
    between(len(figures), lim["figures"], "figures", faults)
    n = sum(len(re.findall(r"\$\$.+?\$\$", c["source"], flags=re.S)) for c in nb.md)
    if n:
        between(n, lim["equations"], "display equations", faults)
    between(
        sum(asserting(c) for c in nb.code if c not in nb.exports),
        lim["asserts"],
        "asserting cells",
        faults,
    )
    sizes = [code_lines(c) for c in nb.code if "default_exp" not in directives(c["source"])]
    if sizes:
        p90 = sorted(sizes)[int(0.9 * (len(sizes) - 1))]
        if statistics.median(sizes) > CODE_LINES["median"]:
            faults.append(
                f"median of {statistics.median(sizes):g} lines a code cell, allowed {CODE_LINES['median']}"
            )
        if p90 > CODE_LINES["p90"]:
            faults.append(f"90 % quantile of {p90} lines a code cell, allowed {CODE_LINES['p90']}")
        faults += [
            f"{nb.where(c)}: {code_lines(c)} lines, allowed {CODE_LINES['max']}; split a class with @patch"
            for c in nb.code
            if code_lines(c) > CODE_LINES["max"]
        ]
    heads = [
        l.lstrip("# ").lower()
        for c in nb.md
        for l in c["source"].splitlines()
        if re.match(r"#{2,} ", l)
    ]
    for h in SKELETON.get(nb.kind, []):
        if not any(h.lower() in k for k in heads):
            faults.append(f'no section "{h}"')
    fail(nb, faults)


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
        width = max(
            (len(l) for l in body(c["source"]).splitlines()), default=0
        )  # captions are one line by their syntax
        if width > MAX_WIDTH:
            faults.append(f"{nb.where(c)}: a line of {width} characters")
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


def test_values_are_shown(nb):
    "At most three code cells in a row that show nothing, counted over lesson cells"
    faults, run = [], []
    for c in nb.lessons + [None]:
        if c is not None and not c["outputs"]:
            run.append(c)
            continue
        if len(run) > 3:
            faults.append(f"{len(run)} code cells in a row show nothing, from {nb.where(run[0])}")
        run = []
    fail(nb, faults)


def test_figures(nb):
    "Every figure has a label, a caption, an image and a semicolon"
    faults = []
    for c in nb.code:
        src, label = c["source"], option(c["source"], "label") or ""
        images = [
            (k, v)
            for o in c["outputs"]
            for k, v in o.get("data", {}).items()
            if k.startswith("image/")
        ]
        if label.startswith("fig-"):
            if not option(src, "fig-cap"):
                faults.append(f"{nb.where(c)}: {label} has no fig-cap")
            if not images:
                faults.append(
                    f"{nb.where(c)}: {label} has no image; save the outputs of a laptop run"
                )
            if not body(src).rstrip().endswith(";"):
                faults.append(f"{nb.where(c)}: a figure cell ends in ;")
        elif images:
            faults.append(f"{nb.where(c)}: a figure without `#| label: fig-...`")
        for k, v in images:
            size = len(text(v)) if k == "image/svg+xml" else len(text(v)) * 3 // 4
            if size > MAX_FIGURE:
                faults.append(
                    f"{nb.where(c)}: a figure of {size // 1000} kB, allowed {MAX_FIGURE // 1000}"
                )
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
                faults.append(
                    f"{nb.where(c)}: an output of {shown.count(chr(10))} lines, allowed {MAX_OUTPUT_LINES}"
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
        for c in Notebook(rel).code:
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


# ---- generated files ------------------------------------------------------------------------------------------------
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
    read = lambda d, n: (d / n).read_bytes() if (d / n).exists() else None
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


# ---- the library ----------------------------------------------------------------------------------------------------
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
        if not alone and (shared or not any(l in notes for l in span)):
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
                        l in notes for l in range(m.lineno, m.end_lineno + 1)
                    ) and not notes.get(m.lineno - 1):
                        faults.append(f"{node.name}.{m.target.id}: no comment beside the field")
    return faults


@pytest.mark.parametrize(
    "path",
    [p for p in all_modules if not p.name.startswith("_")],
    ids=lambda p: p.relative_to(lib).as_posix(),
)
def test_docments(path):
    "Every public function, method and field says what it is, each parameter and result beside its name"
    faults = docment_faults(path)
    assert not faults, f"{path.relative_to(root)}:\n  " + "\n  ".join(faults)


def test_docment_check_itself(tmp_path):
    "The check above sees what is missing and accepts what is there"
    good = tmp_path / "good.py"
    good.write_text(
        'def f(\n    a:int,   # first number\n    # the second one\n    b:int=2,\n)->int:      # their sum\n    "Sum"\n    return a + b\n\n'
        'class C:\n    "A thing"\n    def m(self,\n        x:str="a", # a name\n    ): "Do it"\n    @property\n    def p(self)->int: # a size\n        "Size"\n        return 1\n'
    )
    assert docment_faults(good) == []
    bad = tmp_path / "bad.py"
    bad.write_text(
        'from dataclasses import dataclass\ndef f(a, b): # both numbers\n    return a + b\n\ndef g(\n    x:int,\n)->int: # result of it\n    """One\n    two"""\n    return x\n\n'
        '@dataclass\nclass D:\n    "Data"\n    n:int\n    def _private(self, q): return q\n'
    )
    assert docment_faults(bad) == [
        "f: no docstring",
        "f: no comment beside parameter a",
        "f: returns something, but has no `-> type: # what`",
        "g: the docstring must be one line; explain in Markdown",
        "g: no comment beside parameter x",
        "D.n: no comment beside the field",
    ]


def room_imports(path):
    "Rooms of ours that a module imports, at any depth of its code"
    here, found = path.relative_to(root).with_suffix("").parts, set()
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(n, ast.Import):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(here[: len(here) - n.level]) if n.level else ""
            mod = ".".join(p for p in (base, n.module) if p)
            names = [mod] + [f"{mod}.{a.name}" for a in n.names]
        found |= {
            x.split(".")[1]
            for x in names
            if x.startswith("llmpapers.") and x.split(".")[1] in ROOMS
        }
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in all_modules if len(p.relative_to(lib).parts) > 1],
    ids=lambda p: p.relative_to(lib).as_posix(),
)
def test_arrows_point_down(path):
    "core imports nothing of ours but core, rl adds core, a paper adds core and rl and never another paper"
    room = path.relative_to(lib).parts[0]
    allowed = dict(core={"core"}, rl={"core", "rl"}, benchmarks=ROOMS).get(
        room, {"core", "rl", room}
    )
    assert room in ROOMS or room in ("data",), f"{room} is no room of the house"
    assert room_imports(path) <= allowed, (
        f"{path.relative_to(root)} imports {sorted(room_imports(path) - allowed)}"
    )


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
