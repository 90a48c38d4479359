"""Notebook filter for the site: our notebook in, a plain Quarto notebook out (standard input to
standard output).

A notebook reads right in JupyterLab as it stands: equations carry `\\tag{n}`, a figure's cell ends
with `caption(n, "...")`, and the prose says "Figure n" and "equation (n)". Here those become the
labels and references that Quarto links."""

import ast
import json
import re
import sys
import threading

DROP = {"hide", "default_exp", "default_cls_lvl"}  # cells that a page never shows
EXPORT = {"export", "exports", "exporti"}
OURS = (
    DROP | EXPORT | {"eval", "notest", "slow", "gpu", "filter_stream", "hide_input", "hide_output"}
)
OPTIONS = {
    "label",
    "fig-cap",
    "fig-alt",
    "tbl-cap",
    "code-fold",
    "code-summary",
    "echo",
    "include",
    "output",
    "classes",
}
SHOWN = (
    "text/markdown",
    "text/html",
    "text/latex",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/plain",
)
one_parses = threading.Lock()  # Python 3.11's parser counts the depth of all threads together
_directive = re.compile(r"^\s*#\s*\|\s*([\w-]+)")


def text(src):  # A cell's or output's text, stored as one string or as a list of lines
    "The text of a notebook field as one string"
    return src if isinstance(src, str) else "".join(src)


def _head(src: str):  # Numbers of the lines that are directives
    "Places of the `#|` lines that open a cell; magics and empty lines may stand before them"
    found = []
    for i, line in enumerate(src.split("\n")):
        if _directive.match(line):
            found.append(i)
        elif found or (line.strip() and not line.lstrip().startswith(("%", "!"))):
            break
    return found


def directives(src: str):  # Names of the `#|` lines that open a code cell
    "Names of the directives at the head of a code cell"
    lines = src.split("\n")
    return [_directive.match(lines[i])[1] for i in _head(src)]


def option(src: str, key: str):  # Value of `#| key: value`, or None
    "Value of one cell option"
    lines = src.split("\n")
    for line in (lines[i] for i in _head(src)):
        m = re.match(rf"^\s*#\s*\|\s*{re.escape(key)}\s*:\s*(.+?)\s*$", line)
        if m:
            val = m[1]
            if len(val) > 1 and val[0] == val[-1] and val[0] in "\"'":
                return val[1:-1].replace("''", "'") if val[0] == "'" else val[1:-1]
            return val
    return None


def body(src: str):  # The code below the directives
    "A code cell without its directives"
    head = _head(src)
    rest = [line for i, line in enumerate(src.split("\n")) if i not in head]
    return "\n".join(rest).strip("\n").rstrip()


def title_cell(src: str):  # (title, description, rest) or None
    "Split a title cell: `# Title`, a blank line, `> one sentence`, and whatever follows"
    m = re.match(r"#[ \t]+(\S[^\n]*?)[ \t]*(?:\n|$)\s*((?:>[^\n]*(?:\n|$))*)(.*)", src, flags=re.S)
    if not m:
        return None
    desc = " ".join(line.lstrip("> \t").rstrip() for line in m[2].splitlines())
    return m[1], desc, m[3].strip()


def caption_call(src: str):  # (number, the cell without it) or None
    "The `caption(number, text)` that ends a figure cell"
    if "caption(" not in src:
        return None
    try:
        with one_parses:
            last = ast.parse(re.sub(r"^(\s*)[%!]", r"\1#", src, flags=re.M)).body[-1]
    except (SyntaxError, IndexError):
        return None
    call = getattr(last, "value", None)
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "caption":
        return None
    if len(call.args) != 2 or not isinstance(call.args[0], ast.Constant):
        return None
    return call.args[0].value, "\n".join(src.splitlines()[: last.lineno - 1])


_apart = re.compile(
    r"(```.*?```|``.+?``|`[^`\n]+`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]+\$"  # maths
    r"|!?\[[^\]\n]*\]\([^)\n]*\)"  # links and images
    r"|^\#{1,6} [^\n]*)",  # headings
    flags=re.S | re.M,
)


def _prose(src, change):
    "Apply a function to Markdown outside of code, maths, links and headings"
    return "".join(p if i % 2 else change(p) for i, p in enumerate(_apart.split(src)))


def labelled(src: str):  # Markdown with `{#eq-n}` behind the equations that carry a tag
    "Tags of equations as labels"
    return re.sub(r"\s*\\tag\{(\d+)\}\s*\$\$", r" $$ {#eq-\1}", src)


def referring(src: str, numbers: dict):  # `numbers`: fig and eq -> numbers there are on the page
    "Words that name a figure or an equation of this page as references"

    def link(kind):
        def f(m):
            return f"{m[1]}@{kind}-{m[2]}" if int(m[2]) in numbers[kind] else m[0]

        return f

    def change(p):
        p = re.sub(r"(^|[\s(])Figure (\d+)\b", link("fig"), p)
        return re.sub(r"(^|[\s(])[Ee]quation \((\d+)\)", link("eq"), p)

    return _prose(src, change)


def _outputs(outs):
    """Outputs without forms that no page shows; Markdown wins over HTML, so that tables follow the
    theme"""
    res = []
    for o in outs:
        data = o.get("data")
        if data is not None:
            keep = {k: v for k, v in data.items() if k in SHOWN}
            if "text/markdown" in keep:
                keep.pop("text/html", None)
            o = {**o, "data": keep or data}
        res.append(o)
    return res


def convert(nb: dict):  # Notebook as read by `json`; changed in place and returned
    "Apply the filter to one notebook"
    sources = [(c["cell_type"], text(c["source"])) for c in nb["cells"]]
    captions = [caption_call(body(s)) for t, s in sources if t == "code"]
    tags = re.findall(r"\\tag\{(\d+)\}", "\n".join(s for t, s in sources if t == "markdown"))
    numbers = dict(fig={c[0] for c in captions if c}, eq={int(n) for n in tags})
    cells = []
    for c in nb["cells"]:
        src, tags = text(c["source"]), c.get("metadata", {}).get("tags", [])
        if c["cell_type"] == "code":
            names = directives(src)
            if not body(src).strip() or DROP & set(names) or "injected-parameters" in tags:
                continue
            lines = [src.split("\n")[i] for i in _head(src)]
            head = [line for line, name in zip(lines, names) if name not in OURS]
            if EXPORT & set(names):
                head.append("#| classes: exported")
            code, outputs = body(src), _outputs(c.get("outputs", []))
            if found := caption_call(code):
                number, code = found
                lead = f"**Figure {number}.** "
                shown = [text(o.get("data", {}).get("text/markdown", "")) for o in outputs]
                what = next((t.removeprefix(lead) for t in shown if t.startswith(lead)), "")
                quoted = " ".join(referring(what, numbers).split()).replace("'", "''")
                head += [f"#| label: fig-{number}", f"#| fig-cap: '{quoted}'"]
                outputs = [o for o, t in zip(outputs, shown) if not t.startswith(lead)]
            c["source"] = "\n".join(head + [code])
            c["outputs"] = outputs
        elif not cells and c["cell_type"] == "markdown" and (t := title_cell(src)):
            meta = dict(title=t[0]) | (dict(description=t[1]) if t[1] else {})
            front = (
                "---\n"
                + "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in meta.items())
                + "---\n"
            )
            cells.append(dict(cell_type="raw", metadata={}, source=front, id="front-matter"))
            if t[2]:
                cells.append(dict(cell_type="markdown", metadata={}, source=t[2], id="front-body"))
            continue
        elif c["cell_type"] == "markdown":
            c["source"] = referring(labelled(src), numbers)
        cells.append(c)
    for c in cells:
        c["source"] = text(c["source"]).splitlines(
            keepends=True
        )  # Quarto joins lines given as one string
    nb["cells"] = cells
    return nb


if __name__ == "__main__":
    json.dump(convert(json.load(sys.stdin)), sys.stdout)
