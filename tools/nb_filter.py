"Notebook filter for the site: nbdev directives in, a plain Quarto notebook out (standard input to standard output)"

import json
import re
import sys

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
_directive = re.compile(r"^\s*#\s*\|\s*([\w-]+)")


def text(src):  # A cell's or output's text, stored as one string or as a list of lines
    "The text of a notebook field as one string"
    return src if isinstance(src, str) else "".join(src)


def directives(src: str):  # Names of the `#|` lines that open a code cell
    "Names of the directives at the head of a code cell"
    names = []
    for line in src.splitlines():
        m = _directive.match(line)
        if not m:
            break
        names.append(m[1])
    return names


def option(src: str, key: str):  # Value of `#| key: value`, or None
    "Value of one cell option"
    head = src.splitlines()[: len(directives(src))]
    for line in head:
        m = re.match(rf"^\s*#\s*\|\s*{re.escape(key)}\s*:\s*(.+?)\s*$", line)
        if m:
            val = m[1]
            return val[1:-1] if len(val) > 1 and val[0] == val[-1] and val[0] in "\"'" else val
    return None


def body(src: str):  # The code below the directives
    "A code cell without its directives"
    return "\n".join(src.splitlines()[len(directives(src)) :]).strip("\n").rstrip()


def title_cell(src: str):  # (title, description, rest) or None
    "Split a title cell: `# Title`, a blank line, `> one sentence`, and whatever follows"
    m = re.match(r"#[ \t]+(\S[^\n]*?)[ \t]*(?:\n|$)\s*((?:>[^\n]*(?:\n|$))*)(.*)", src, flags=re.S)
    if not m:
        return None
    desc = " ".join(line.lstrip("> \t").rstrip() for line in m[2].splitlines())
    return m[1], desc, m[3].strip()


def _outputs(outs):
    "Outputs without forms that no page shows; Markdown wins over HTML, so that tables follow the theme"
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
    cells = []
    for c in nb["cells"]:
        src, tags = text(c["source"]), c.get("metadata", {}).get("tags", [])
        if c["cell_type"] == "code":
            names = directives(src)
            if not body(src).strip() or DROP & set(names) or "injected-parameters" in tags:
                continue
            head = [l for l, n in zip(src.splitlines(), names) if n not in OURS]
            if EXPORT & set(names):
                head.append("#| classes: exported")
            c["source"] = "\n".join(head + [body(src)])
            c["outputs"] = _outputs(c.get("outputs", []))
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
        cells.append(c)
    for c in cells:
        c["source"] = text(c["source"]).splitlines(
            keepends=True
        )  # Quarto joins lines given as one string
    nb["cells"] = cells
    return nb


if __name__ == "__main__":
    json.dump(convert(json.load(sys.stdin)), sys.stdout)
