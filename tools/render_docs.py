"""Build the site described by `_quarto.yml` with pandoc, where Quarto is not installed, and refuse
a site with faults.

    python tools/render_docs.py [--root DIR] [--out DIR]

Exit status 1 and one line per fault on: an unresolved or doubly defined reference, figures or
equations out of order, TeX that pandoc cannot parse, a dead link or anchor, a missing or remote
image, a page without a title, a directive or a cell option that nobody reads, an output that a page
cannot show, a warning or a progress bar left in an output, and pages and sidebar that disagree."""

import argparse
import ast
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from nb_filter import (
    EXPORT,
    OPTIONS,
    OURS,
    SHOWN,
    body,
    convert,
    directives,
    one_parses,
    option,
    text,
)  # noqa: E402

here = Path(__file__).parent
READER = "markdown"
SPLIT = "<!-- end of contents -->"
WORDS = dict(eq="Equation", fig="Figure", tbl="Table")
_ref = re.compile(r"(?:eq|fig|tbl|sec)-[\w-]+")
_bar = re.compile(r"\r(?!\n)|\d+%\||\d(?:it/s|s/it)\b|\x1b\[")


def pandoc_path():  # The pandoc of `pypandoc_binary`, else the one on the path
    "Where pandoc is"
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        pass
    found = shutil.which("pandoc")
    if not found:
        raise RuntimeError("pandoc is missing: pip install pypandoc_binary")
    return found


def run_pandoc(args, src):  # (standard output, warnings)
    "Run pandoc on a string"
    r = subprocess.run(
        [pandoc_path(), *args], input=src, capture_output=True, text=True, encoding="utf-8"
    )
    if r.returncode:
        raise RuntimeError(f"pandoc {' '.join(args)}: {r.stderr.strip()}")
    msgs = re.split(r"^(?=\[(?:WARNING|INFO)\])", r.stderr.strip(), flags=re.M)
    return r.stdout, [" ".join(m.split()) for m in msgs if m.startswith("[WARNING]")]


def settings(root):  # {} where there is no settings.ini
    "The project's settings.ini"
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def site_url(cfg):  # Without a closing slash; None when settings.ini gives none
    "Address of the published site"
    return (
        f"{cfg['doc_host']}{cfg.get('doc_baseurl', '')}".rstrip("/")
        if cfg.get("doc_host")
        else None
    )


# ---- a small walk over pandoc's tree -------------------------------------------------------------
def walk(node, f):
    """Rebuild a pandoc tree bottom-up; `f(element)` gives an element, a list of elements, or None
    to keep it"""
    if isinstance(node, list):
        res = []
        for x in node:
            y = walk(x, f)
            if isinstance(x, dict) and "t" in x:
                z = f(y)
                if isinstance(z, list):
                    res += z
                    continue
                y = y if z is None else z
            res.append(y)
        return res
    if isinstance(node, dict):
        return {k: walk(v, f) if k != "t" else v for k, v in node.items()}
    return node


def find(node, kinds):
    "All elements of the given kinds, in order"
    if isinstance(node, list):
        for x in node:
            yield from find(x, kinds)
    elif isinstance(node, dict):
        if node.get("t") in kinds:
            yield node
        for v in node.values():
            yield from find(v, kinds)


def plain(node):
    "Text of a tree"
    if isinstance(node, list):
        return "".join(plain(x) for x in node)
    if not isinstance(node, dict):
        return ""
    t = node.get("t")
    if t == "Str":
        return node["c"]
    if t in ("Space", "SoftBreak", "LineBreak"):
        return " "
    if t in ("Code", "Math"):
        return node["c"][1]
    if t == "Link" or t == "Image" or t == "Span":
        return plain(node["c"][1])
    if t == "Cite" or t == "Quoted":
        return plain(node["c"][1])
    return plain(node.get("c", []))


def Str(s):
    return dict(t="Str", c=s)


# ---- from a filtered notebook to Markdown --------------------------------------------------------
class Page:
    "One notebook on its way to a page"

    def __init__(self, path, raw):
        self.path, self.faults, self.links, self.n_out, self.n_tables = path, [], [], 0, 0
        self.module = self.symbols = None
        code = [text(c["source"]) for c in raw["cells"] if c["cell_type"] == "code"]
        found = [
            m[1] for s in code if (m := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", s, flags=re.M))
        ]
        self.module = found[0] if found else None
        self.symbols = [n for s in code if EXPORT & set(directives(s)) for n in defined(body(s))]
        self.nb = convert(raw)
        front = text(self.nb["cells"][0]["source"]) if self.nb["cells"] else ""
        self.title = self.description = None
        if (
            self.nb["cells"]
            and self.nb["cells"][0]["cell_type"] == "raw"
            and front.startswith("---")
        ):
            meta = yaml.safe_load(front.strip().strip("-"))
            self.title, self.description = meta.get("title"), meta.get("description")
        if not self.title:
            self.fault(
                "no title: the first cell must be `# Title`, an empty line and `> one sentence`"
            )

    @property
    def html(self):
        return self.path.with_suffix(".html")

    def fault(self, msg):
        self.faults.append(f"{self.path.as_posix()}: {msg}")


def defined(src):
    "Public functions and classes that a cell defines"
    try:
        with one_parses:
            tree = ast.parse(src)
    except SyntaxError:
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        n.name
        for n in tree.body
        if isinstance(n, kinds) and not n.name.startswith("_") and not patched(n)
    ]


def patched(node):
    "Is this a method that `@patch` adds to a class?"
    return any("patch" in ast.unparse(d) for d in node.decorator_list)


def fence(s, info):
    "A fenced block that no line of `s` can close"
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`+", s)), default=0))
    return f"{ticks} {info}\n{s}\n{ticks}"


def raw_html(s):
    "HTML that pandoc passes on as it is"
    return f"```{{=html}}\n{s}\n```"


def output_md(page, out, files, name):
    "Markdown of one output, as (kind, text); kind is image, block or None"
    kind = out["output_type"]
    if kind == "error":
        page.fault(f"cell {name}: the output is an error ({out.get('ename')})")
        return None, ""
    if kind == "stream":
        t = text(out["text"])
        if out.get("name") == "stderr":
            page.fault(f"cell {name}: an output on stderr was left: {t.strip()[:80]!r}")
        if _bar.search(t):
            page.fault(
                f"cell {name}: a progress bar or terminal code was left in an output: "
                f"{t.strip()[:60]!r}"
            )
        return ("block", fence(t.rstrip(), "{.output}")) if t.strip() else (None, "")
    data = out.get("data", {})
    for mime, ext in (("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")):
        if mime in data:
            files.mkdir(parents=True, exist_ok=True)
            page.n_images = n = getattr(page, "n_images", 0) + 1
            f, t = files / f"{n}.{ext}", text(data[mime])
            f.write_bytes(t.encode() if ext == "svg" else base64.b64decode(t))
            return "image", f"{files.name}/{f.name}"
    if "text/markdown" in data:
        t = text(data["text/markdown"])
        if re.search(r"^\s*\|?\s*:?-{2,}:?\s*\|", t, flags=re.M):
            page.n_tables += 1
        return "block", t
    if "text/html" in data:
        return "block", fence(text(data["text/html"]), "{=html}")
    if "text/latex" in data:
        return "block", f"$${text(data['text/latex']).strip().strip('$')}$$"
    if "text/plain" in data:
        t = text(data["text/plain"])
        if _bar.search(t):
            page.fault(
                f"cell {name}: a progress bar or terminal code was left in an output: "
                f"{t.strip()[:60]!r}"
            )
        return ("block", fence(t.rstrip(), "{.output}")) if t.strip() else (None, "")
    if data:
        page.fault(
            f"cell {name}: an output has only {', '.join(sorted(data))}, none of {', '.join(SHOWN)}"
        )
    return None, ""


def to_md(page, files):
    "Markdown of a filtered notebook; images are written into the folder `files`"
    md = []
    for i, c in enumerate(page.nb["cells"]):
        src = text(c["source"])
        if c["cell_type"] == "raw":
            continue
        if c["cell_type"] == "markdown":
            if "attachments" in c and c["attachments"]:
                page.fault(
                    f"cell {i}: an attachment; put the image in a folder beside the notebook"
                )
            md.append(src)
            continue
        names, label = directives(src), option(src, "label") or ""
        for n in names:
            if n in OURS:
                page.fault(f"cell {i}: directive {n} was left on the page")
            elif n not in OPTIONS:
                page.fault(f"cell {i}: unknown cell option {n!r}")
        if re.search(r"^\s*#\s*\|\s*[\w-]+", body(src), flags=re.M):
            page.fault(f"cell {i}: a directive below the first line of code")
        if option(src, "include") == "false":
            continue
        if option(src, "echo") != "false":
            code = fence(
                body(src),
                "{.python" + (" .exported" if option(src, "classes") == "exported" else "") + "}",
            )
            if option(src, "code-fold") in ("true", "show"):
                summary = html.escape(option(src, "code-summary") or "Code")
                opened = f'<details class="fold"><summary>{summary}</summary>'
                code = f"{raw_html(opened)}\n\n{code}\n\n{raw_html('</details>')}"
            md.append(code)
        if option(src, "output") == "false":
            continue
        shown = [output_md(page, o, files, i) for o in c.get("outputs", [])]
        images = [t for k, t in shown if k == "image"]
        for t in (t for k, t in shown if k == "block"):
            page.n_out += 1
            attr = f"#{label} " if label.startswith("tbl-") else ""
            cap = f"\n\n{option(src, 'tbl-cap') or ''}" if attr else ""
            md.append(f"::::: {{{attr}.cell-output}}\n{t}{cap}\n:::::")
        if images:
            page.n_out += len(images)
            cap = option(src, "fig-cap") or ""
            attr = f"#{label} " if label.startswith("fig-") else ""
            md.append(
                f"::::: {{{attr}.figure-cell}}\n"
                + "\n".join(f"![]({t})" for t in images)
                + f"\n\n{cap}\n:::::"
            )
        elif label.startswith("fig-"):
            page.fault(f"cell {i}: {label} has no image in its outputs")
    return "\n\n".join(md)


# ---- references, links, images -------------------------------------------------------------------
def number(page, doc):
    "Give equations, figures and tables their numbers; returns (tree, {label: text of a reference})"
    names, count = {}, dict(eq=0, fig=0, tbl=0)

    def new(label):
        if label in names:
            page.fault(f"{label} is defined twice")
        kind = label.split("-")[0]
        count[kind] += 1
        given = label.split("-")[1]
        if given.isdigit() and int(given) != count[kind]:
            page.fault(f"{WORDS[kind]} {given} is number {count[kind]} on the page")
        names[label] = f"{WORDS[kind]} {count[kind]}"
        return count[kind]

    def caption(label, blocks):
        n = new(label)
        if not blocks:
            page.fault(f"{label} has no caption")
        lead = [dict(t="Strong", c=[Str(f"{WORDS[label.split('-')[0]]} {n}.")]), dict(t="Space")]
        if blocks and blocks[0]["t"] in ("Para", "Plain"):
            return [dict(t="Plain", c=lead + blocks[0]["c"])] + blocks[1:]
        return [dict(t="Plain", c=lead)] + blocks

    def equations(inlines):
        res, i = [], 0
        while i < len(inlines):
            x = inlines[i]
            if x["t"] == "Math" and x["c"][0]["t"] == "DisplayMath":
                j = i + 1
                while j < len(inlines) and inlines[j]["t"] in ("Space", "SoftBreak"):
                    j += 1
                m = (
                    re.match(r"^\{#(eq-[\w-]+)\}(.*)$", inlines[j]["c"])
                    if j < len(inlines) and inlines[j]["t"] == "Str"
                    else None
                )
                x = dict(
                    t="Span", c=[["", ["display"], []], [x]]
                )  # scrolls by itself where the window is narrow
                if m:
                    n = dict(t="Span", c=[["", ["number"], []], [Str(f"({new(m[1])})")]])
                    res.append(dict(t="Span", c=[[m[1], ["equation"], []], [x, n]]))
                    if m[2]:
                        res.append(Str(m[2]))
                    i = j + 1
                    continue
            elif x["t"] == "Math" and len(x["c"][1]) > 24:
                x = dict(t="Span", c=[["", ["wide"], []], [x]])
            res.append(x)
            i += 1
        return res

    def visit(node):  # top-down, so that numbers follow the page
        if isinstance(node, list):
            return [visit(x) for x in node]
        if not isinstance(node, dict):
            return node
        t, c = node.get("t"), node.get("c")
        if t in ("Para", "Plain"):
            return dict(t=t, c=equations(c))
        if t == "Header" and c[1][0].startswith("sec-"):
            names[c[1][0]] = plain(c[2])
        if t == "Div" and "figure-cell" in c[0][1]:
            paras = [b for b in c[1] if b["t"] == "Para"]
            imgs = [b for b in paras if all(x["t"] in ("Image", "SoftBreak") for x in b["c"])]
            cap = [b for b in c[1] if b not in imgs]
            alt = [Str(plain(cap).strip() or "Figure")]
            pics = [
                dict(t="Image", c=[x["c"][0], alt, x["c"][2]])
                for b in imgs
                for x in b["c"]
                if x["t"] == "Image"
            ]
            if c[0][0]:
                cap = caption(c[0][0], cap)
            return dict(t="Figure", c=[[c[0][0], [], []], [None, cap], [dict(t="Plain", c=pics)]])
        if t == "Div" and c[0][0].startswith("tbl-"):
            tables = [b for b in c[1] if b["t"] == "Table"]
            rest = [b for b in c[1] if b["t"] != "Table"]
            cap = dict(t="Div", c=[["", ["caption"], []], caption(c[0][0], rest)])
            return dict(t="Div", c=[c[0], [cap] + visit(tables)])
        if t == "Table":
            cap = c[1][1]
            last = (
                cap[-1]["c"][-1]
                if cap and cap[-1]["t"] in ("Para", "Plain") and cap[-1]["c"]
                else {}
            )
            m = re.match(r"^\{#(tbl-[\w-]+)\}$", last["c"]) if last.get("t") == "Str" else None
            label = c[0][0] or (m[1] if m else "")
            if m:
                cap[-1]["c"] = cap[-1]["c"][:-1]
            if label.startswith("tbl-"):
                c[0][0], c[1][1] = label, caption(label, cap)
        return {k: visit(v) if k != "t" else v for k, v in node.items()}

    doc["blocks"] = visit(doc["blocks"])
    return doc, names


def resolve(page, doc, names, site):
    "Turn references into links, check links and images, tidy tables and callouts"

    def link(label):
        if label not in names:
            page.fault(f"unresolved reference @{label}")
            return Str(f"@{label}")
        return dict(t="Link", c=[["", ["ref"], []], [Str(names[label])], [f"#{label}", ""]])

    def f(x):
        t = x["t"]
        if t == "Cite":
            ids = [k["citationId"] for k in x["c"][0]]
            if not all(_ref.fullmatch(i) for i in ids):
                return x["c"][1]
            parts = [y for i in ids for y in (link(i), Str(", "))][:-1]
            return parts
        if t == "Link":
            x["c"][2][0] = site.target(page, x["c"][2][0])
        elif t == "Image":
            site.image(page, x["c"][2][0])
        elif (
            t == "Code" and (p := site.symbols.get(x["c"][1].removesuffix("()"))) and p is not page
        ):
            href = os.path.relpath(p.html, page.html.parent).replace(os.sep, "/")
            return dict(t="Link", c=[["", ["symbol"], []], [x], [href, p.module or ""]])
        elif t == "Table":
            x["c"][2] = [[align, dict(t="ColWidthDefault")] for align, _ in x["c"][2]]
            return dict(t="Div", c=[["", ["table"], []], [x]])
        elif t == "Div" and any(k.startswith("callout-") for k in x["c"][0][1]):
            blocks = x["c"][1]
            if blocks and blocks[0]["t"] == "Header":
                blocks[0] = dict(t="Para", c=[dict(t="Strong", c=blocks[0]["c"][2])])
        elif t in ("RawInline", "RawBlock") and x["c"][0] in ("tex", "latex"):
            page.fault(f"TeX outside of dollar signs: {x['c'][1].strip()[:60]!r}")
        return None

    doc["blocks"] = unnest(walk(doc["blocks"], f))
    return doc


def unnest(blocks):
    "A link inside a link (a symbol in the text of a link) keeps only the outer one"

    def f(x):
        if x["t"] in ("Link", "Header"):
            k = 1 if x["t"] == "Link" else 2
            x["c"][k] = walk(
                x["c"][k],
                lambda y: y["c"][1] if y["t"] == "Link" and "symbol" in y["c"][0][1] else None,
            )
        return None

    return walk(blocks, f)


def leftovers(page, doc):
    "Faults for Markdown that pandoc took as plain text"
    for x in find(doc["blocks"], {"Str"}):
        s = x["c"]
        if "$$" in s or s == "$":
            page.fault(
                f"maths that was not recognised near {s!r} (no space inside the dollar signs)"
            )
        elif re.search(r"\{#(eq|fig|tbl|sec)-", s):
            page.fault(f"label {s} belongs to nothing")
        elif re.match(r"^\|?:?(-{3,}|—|–)[-—–]*:?\|", s):
            page.fault("a table that was not recognised (it needs an empty line above)")
        elif s.startswith(":::"):
            page.fault("an unclosed ::: block")
    for x in find(doc["blocks"], {"Div"}):
        if "cell-output" in x["c"][0][1]:
            page.n_tables -= bool(list(find(x["c"][1], {"Table"})))
    if page.n_tables > 0:
        page.fault(f"{page.n_tables} Markdown table(s) in outputs were not recognised")


class Site:
    "Pages, their addresses, and the checks between them"

    def __init__(self, root, out):
        self.root, self.out = Path(root).resolve(), Path(out).resolve()
        self.cfg = yaml.safe_load((self.root / "_quarto.yml").read_text(encoding="utf-8"))
        self.ini, self.faults = settings(self.root), []
        self.url, self.git = site_url(self.ini), self.ini.get("git_url", "").rstrip("/")
        self.reader = self.cfg["format"]["html"].get("from", READER) + "-yaml_metadata_block"
        self.pages = {}
        for p in self.inputs():
            raw = json.loads((self.root / p).read_text(encoding="utf-8"))
            self.pages[p] = Page(p, raw)
        seen = {}
        for p in self.pages.values():
            for s in p.symbols or []:
                seen.setdefault(s, []).append(p)
        self.symbols = {s: ps[0] for s, ps in seen.items() if len(ps) == 1}
        self.anchors = {}

    def inputs(self):
        "Notebooks matched by `project.render`, in order, once"
        seen = {}
        for pattern in self.cfg["project"]["render"]:
            for p in sorted(self.root.glob(pattern)):
                rel = p.relative_to(self.root)
                if not any(q.startswith(("_", ".")) for q in rel.parts):
                    seen[rel] = None
        return list(seen)

    def target(self, page, url):
        "Address that a link of `page` has on the site; notes it for the check of anchors"
        m = re.match(r"^([^#?]*)([#?].*)?$", unquote(url))
        path, tail = m[1], m[2] or ""
        if self.url and path.startswith(self.url):
            rel = path[len(self.url) :].strip("/")
            if rel in ("", "index.html"):
                return url
            p = Path(rel).with_suffix(".ipynb")
            if p not in self.pages:
                page.fault(f"dead link {url}")
            elif tail.startswith("#"):
                page.links.append((p, tail[1:]))
            return url
        if self.git and (m := re.match(re.escape(self.git) + r"/(?:blob|tree)/[^/]+/(.+)$", path)):
            if not (self.root / m[1]).exists():
                page.fault(f"dead link {url}: no {m[1]} in the repository")
            return url
        if re.match(r"^[a-z][a-z0-9+.-]*:", path):
            return url
        if not path:
            page.links.append((page.path, tail[1:]))
            return url
        rel = Path(os.path.normpath(page.path.parent / path))
        if rel not in self.pages:
            why = "no page of the site" if (self.root / rel).exists() else "no such file"
            page.fault(f"dead link {url} ({why})")
            return url
        if tail.startswith("#"):
            page.links.append((rel, tail[1:]))
        return (
            os.path.relpath(rel.with_suffix(".html"), page.path.parent).replace(os.sep, "/")
            + tail.lower()
        )

    def image(self, page, url):
        "Copy an image that a Markdown cell shows"
        if re.match(r"^[a-z][a-z0-9+.-]*:", url):
            return page.fault(f"remote or embedded image {url[:80]}")
        rel = os.path.normpath(page.path.parent / unquote(url))
        if (self.out / rel).exists():
            return
        src = self.root / rel
        if rel.startswith("..") or not src.is_file():
            return page.fault(f"missing image {url}")
        (self.out / rel).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(src, self.out / rel)

    def sidebar(self):
        "Pages of the sidebar in order, as (path, section)"

        def items(xs, section):
            for it in xs:
                if isinstance(it, str):
                    yield Path(it), section
                elif "section" in it:
                    yield from items(it["contents"], it["section"])
                else:
                    yield Path(it["href"]), section

        return list(items(self.cfg["website"]["sidebar"]["contents"], None))

    def nav(self, page):
        "The sidebar as nested lists, the current page marked"

        def items(xs):
            res = "<ul>"
            for it in xs:
                if isinstance(it, str):
                    it = dict(href=it)
                if "section" in it:
                    open_ = (
                        " open"
                        if page.path in [p for p, _ in flat(it["contents"])] or len(self.pages) < 30
                        else ""
                    )
                    head = f"<details{open_}><summary>{html.escape(it['section'])}</summary>"
                    res += f"<li>{head}{items(it['contents'])}</details></li>"
                    continue
                p = Path(it["href"])
                if p not in self.pages:
                    continue  # a fault already
                t = it.get("text") or self.pages[p].title or p.stem
                rel = os.path.relpath(p.with_suffix(".html"), page.path.parent).replace(os.sep, "/")
                cur = ' aria-current="page"' if p == page.path else ""
                res += f'<li><a href="{rel}"{cur}>{html.escape(t)}</a></li>'
            return res + "</ul>"

        def flat(xs):
            for it in xs:
                if isinstance(it, str):
                    yield Path(it), None
                elif "section" in it:
                    yield from flat(it["contents"])
                else:
                    yield Path(it["href"]), None

        return items(self.cfg["website"]["sidebar"]["contents"])

    def render(self, page):
        "Write one page"
        dst = self.out / page.html
        dst.parent.mkdir(parents=True, exist_ok=True)
        md = to_md(page, dst.parent / f"{dst.stem}_files")
        tree, warn = run_pandoc(["-f", self.reader, "-t", "json"], md)
        doc, names = number(page, json.loads(tree))
        doc = resolve(page, doc, names, self)
        leftovers(page, doc)
        out, warn2 = run_pandoc(
            [
                "-f",
                "json",
                "-t",
                "html5",
                "--mathml",
                "--wrap=none",
                "--toc",
                "--toc-depth=3",
                "-M",
                "title=x",
                f"--template={self.out / '_template.html'}",
            ],
            json.dumps(doc),
        )
        for w in warn + warn2:
            page.fault(w.removeprefix("[WARNING] "))
        toc, _, content = out.partition(SPLIT)
        n = content.count('class="cell-output"') + content.count(f'src="{dst.stem}_files/')
        if n != page.n_out:
            page.fault(f"{page.n_out} outputs in the notebook, {n} on the page")
        dst.write_text(self.html_page(page, toc.strip(), content.strip()), encoding="utf-8")
        ids = re.findall(r'\sid="([^"]+)"', content)
        self.anchors[page.path] = set(ids)
        for i in sorted({i for i in ids if ids.count(i) > 1}):
            page.fault(f"two elements have the id {i}")
        page.text = search_text(doc["blocks"])

    def html_page(self, page, toc, content):
        "The page around its content"
        e, up = html.escape, "../" * (len(page.path.parts) - 1)
        order = [p for p, _ in self.sidebar() if p in self.pages]
        i = order.index(page.path) if page.path in order else None
        near = (
            []
            if i is None
            else [
                (order[i - 1] if i else None, "prev", "Previous"),
                (order[i + 1] if i + 1 < len(order) else None, "next", "Next"),
            ]
        )

        def link(p, side, word):
            href = os.path.relpath(p.with_suffix(".html"), page.path.parent)
            title = e(self.pages[p].title or p.stem)
            return f'<a class="{side}" rel="{side}" href="{href}"><small>{word}</small>{title}</a>'

        near = "".join(link(*n) for n in near if n[0])
        src = f"<code>{e(page.path.as_posix())}</code>"
        if self.git:
            blob = f"{self.git}/blob/{self.ini.get('branch', 'main')}/{page.path.as_posix()}"
            src = f'<a href="{e(blob)}">{src}</a>'
        if page.module:
            src += f" exports <code>{e(self.ini.get('lib_name', ''))}.{e(page.module)}</code>"
        site = self.cfg["website"]
        title, brand = e(page.title or page.path.stem), e(site["title"])
        about = e(page.description or site.get("description", ""))
        lead = f'<p class="description">{e(page.description)}</p>' if page.description else ""
        contents = "<strong>On this page</strong>" + toc if toc else ""
        return f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta name="description" content="{about}">
<title>{title} – {brand}</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="{up}site.css">
<script src="{up}site.js" defer></script></head>
<body data-up="{up}"><a class="skip" href="#content">Skip to the text</a>
<header>
<button id="menu" aria-label="Contents of the site" aria-expanded="false">☰</button>
<a class="brand" href="{up}index.html">{brand}</a>
<input id="search" type="search" placeholder="Search" aria-label="Search the site"
 autocomplete="off"><button id="theme" aria-label="Light or dark">◐</button>
<div id="found" hidden></div></header>
<div class="columns"><nav id="sidebar" aria-label="Site">{self.nav(page)}</nav>
<main id="content"><h1>{title}</h1>{lead}
<p class="source">{src}</p>
{content}
<nav class="near" aria-label="Neighbours">{near}</nav></main>
<aside id="toc" aria-label="On this page">{contents}</aside></div></body></html>
'''

    def check(self):
        "Checks that need all pages"
        side = [p for p, _ in self.sidebar()]
        for p in side:
            if p not in self.pages:
                self.faults.append(f"sidebar: {p.as_posix()} is not a page")
        for p in sorted({p for p in side if side.count(p) > 1}):
            self.faults.append(f"sidebar: {p.as_posix()} is listed twice")
        for p, page in self.pages.items():
            if p not in side:
                page.fault("missing from the sidebar of _quarto.yml")
            for q, anchor in page.links:
                if (
                    anchor
                    and not anchor.startswith("?")
                    and not {anchor, anchor.lower()} & self.anchors[q]
                ):
                    page.fault(f"dead anchor #{anchor} in {q.as_posix()}")
        titles = {}
        for p, page in self.pages.items():
            if page.title in titles and page.title:
                page.fault(f"has the title of {titles[page.title].as_posix()}: {page.title!r}")
            titles.setdefault(page.title, p)
        for f in sorted(self.out.rglob("*.html")):
            refs = References()
            refs.feed(f.read_text(encoding="utf-8"))
            for u in refs.urls:
                if re.match(r"^([a-z][a-z0-9+.-]*:|#|//)", u):
                    continue
                if not (f.parent / unquote(u).split("#")[0]).exists():
                    self.faults.append(f"{f.relative_to(self.out).as_posix()}: dead address {u}")

    def build(self):
        "Write the whole site; returns the faults"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        if not self.pages:
            return ["no page matches project.render in _quarto.yml"]
        (self.out / "_template.html").write_text(f"$if(toc)$$toc$$endif${SPLIT}$body$")
        css = [here / "docs.css", self.root / "nbs" / "styles.css"]
        (self.out / "site.css").write_text(
            "\n".join(f.read_text(encoding="utf-8") for f in css if f.exists()), encoding="utf-8"
        )
        with ThreadPoolExecutor(2) as ex:
            list(ex.map(self.render, self.pages.values()))
        (self.out / "_template.html").unlink()
        index = [
            dict(h=p.html.as_posix(), t=p.title or p.path.stem, s=s, i=i, x=x)
            for p in self.pages.values()
            for s, i, x in p.text
        ]
        script = (here / "docs.js").read_text(encoding="utf-8")
        (self.out / "site.js").write_text(
            f"const pages = {json.dumps(index, ensure_ascii=False)};\n{script}", encoding="utf-8"
        )
        home = self.sidebar()[0][0] if self.sidebar() else next(iter(self.pages))
        home = home if home in self.pages else next(iter(self.pages))
        title, first = html.escape(self.cfg["website"]["title"]), home.with_suffix(".html")
        (self.out / "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{title}</title><link rel="icon" '
            f'href="data:,"><meta http-equiv="refresh" content="0; url={first.as_posix()}">',
            encoding="utf-8",
        )
        self.check()
        return list(dict.fromkeys([m for p in self.pages.values() for m in p.faults] + self.faults))


class References(HTMLParser):
    "Collect what a page refers to"

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        self.urls += [v for k, v in attrs if k in ("href", "src") and v]


def search_text(blocks):
    "The text of a page by section: (heading, anchor, text)"
    res = [["", "", ""]]
    for b in blocks:
        if b["t"] == "Header" and b["c"][0] <= 3:
            res.append([plain(b["c"][2]), b["c"][1][0], ""])
        elif b["t"] in (
            "Para",
            "Plain",
            "BulletList",
            "OrderedList",
            "BlockQuote",
            "Table",
            "Div",
            "Figure",
        ):
            words = " ".join(plain(x) for x in find(b, {"Para", "Plain"}))
            res[-1][2] += " " + " ".join(words.split())
        elif b["t"] == "CodeBlock" and "exported" in b["c"][0][1]:
            res[-1][2] += " " + " ".join(defined(b["c"][1]))
    return [(s, i, x.strip()) for s, i, x in res if s or x.strip()]


def build(root, out):  # Faults, one string each; an empty list is a clean site
    "Build the site of the project in `root` into `out`"
    return Site(root, out).build()


def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description="Build the documentation with pandoc and check it")
    p.add_argument("--root", default=str(here.parent), help="the project (default: this one)")
    p.add_argument("--out", help="where the site goes (default: output-dir of _quarto.yml)")
    a = p.parse_args(argv)
    root = Path(a.root).resolve()
    out = (
        a.out
        or root
        / yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["project"][
            "output-dir"
        ]
    )
    site = Site(root, out)
    faults = site.build()
    print(f"{len(site.pages)} pages in {out}")
    for m in faults:
        print(f"fault: {m}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
