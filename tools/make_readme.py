"""README.md from `nbs/index.ipynb`: the filter of the site, pandoc's GitHub Markdown, links made
absolute to the site.

    python tools/make_readme.py [--root DIR] [--check]

`--check` writes nothing and exits 1 when README.md or one of its images differs from what it should
be."""

import argparse
import base64
import difflib
import json
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).parent))
from nb_filter import body, convert, option, text, title_cell  # noqa: E402
from render_docs import READER, fence, find, run_pandoc, settings, site_url, walk  # noqa: E402

HEADER = (
    "<!-- Made from nbs/index.ipynb by tools/make_readme.py: "
    "change the notebook, then run that. -->"
)


def as_words(md):  # GitHub knows no references: the filter's are words again, and labels go
    "Markdown of the filter with `Figure 1` for `@fig-1`"
    md = re.sub(r"@fig-(\d+)", r"Figure \1", md)
    md = re.sub(r"@eq-(\d+)", r"equation (\1)", md)
    return re.sub(r" *\$\$ \{#eq-(\d+)\}", r" \\tag{\1} $$", md)


def outputs(c, files, folder):  # `files` collects {path in the repository: bytes} of figures
    "Markdown of the outputs of one code cell"
    res, src = [], text(c["source"])
    for o in c.get("outputs", []):
        if o["output_type"] == "stream":
            if o.get("name") != "stderr" and text(o["text"]).strip():
                res.append(fence(text(o["text"]).rstrip(), "{.output}"))
            continue
        data = o.get("data", {})
        for mime, ext in (("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")):
            if mime in data:
                path, t = f"{folder}/index-{len(files) + 1}.{ext}", text(data[mime])
                files[path] = t.encode() if ext == "svg" else base64.b64decode(t)
                res.append(f"![{as_words(option(src, 'fig-cap') or '')}]({path})")
                break
        else:
            if "text/markdown" in data:
                res.append(text(data["text/markdown"]))
            elif "text/plain" in data:
                res.append(fence(text(data["text/plain"]).rstrip(), "{.output}"))
    return res


def readme(root):  # (text of README.md, {path: bytes} of its images)
    "What README.md should be"
    root, files = Path(root), {}
    src = root / "nbs" / "index.ipynb"
    cfg = settings(root)
    raw = json.loads(src.read_text(encoding="utf-8"))
    first = text(raw["cells"][0]["source"])
    t = title_cell(first)
    if not t:
        raise SystemExit(
            "nbs/index.ipynb: the first cell must be `# Title`, an empty line and `> one sentence`"
        )
    md = [f"# {t[0]}", t[1]]
    for c in convert(raw)["cells"]:
        if c["cell_type"] == "markdown":
            md.append(as_words(text(c["source"])))
        elif c["cell_type"] == "code":
            s = text(c["source"])
            if option(s, "include") == "false":
                continue
            if option(s, "echo") != "false":
                md.append(fence(body(s), "{.python}"))
            if option(s, "output") != "false":
                md += outputs(c, files, "nbs/images")
    tree, _ = run_pandoc(
        [
            "-f",
            READER
            + "+lists_without_preceding_blankline-blank_before_header-example_lists-fancy_lists"
            "-yaml_metadata_block-citations-simple_tables-multiline_tables",
            "-t",
            "json",
        ],
        "\n\n".join(md),
    )
    doc, url, git = json.loads(tree), site_url(cfg), cfg.get("git_url", "").rstrip("/")

    def absolute(x):
        if x["t"] == "Link":
            m = re.match(r"^([^#?:]*)([#?].*)?$", x["c"][2][0])
            if m and m[1]:
                rel = Path(os.path.normpath(Path("nbs") / unquote(m[1])))
                if not (root / rel).exists():
                    raise SystemExit(f"nbs/index.ipynb: dead link {x['c'][2][0]}")
                page = f"{url}/{rel.with_suffix('.html').as_posix()}"
                x["c"][2][0] = (
                    page
                    if rel.suffix == ".ipynb"
                    else f"{git}/blob/{cfg.get('branch', 'main')}/{rel.as_posix()}"
                ) + (m[2] or "")
        elif (
            x["t"] == "Image"
            and x["c"][2][0] not in files
            and not re.match(r"^[a-z]+:", x["c"][2][0])
        ):
            rel = os.path.normpath(Path("nbs") / unquote(x["c"][2][0])).replace(os.sep, "/")
            if not (root / rel).is_file():
                raise SystemExit(f"nbs/index.ipynb: missing image {x['c'][2][0]}")
            x["c"][2][0] = rel
        elif x["t"] == "Figure":  # GitHub has no figures: an image, and its caption as a paragraph
            imgs = list(find(x["c"][2], {"Image"}))
            cap = [
                dict(t="Para", c=[dict(t="Emph", c=b["c"])])
                for b in x["c"][1][1]
                if b["t"] in ("Plain", "Para") and b["c"]
            ]
            return [dict(t="Para", c=imgs)] + cap
        elif x["t"] == "CodeBlock" and x["c"][0][1] == ["output"]:
            x["c"][0] = ["", ["text"], []]
        elif x["t"] == "Header":
            x["c"][1] = ["", [], []]
        elif x["t"] == "Table":
            x["c"][2] = [[align, dict(t="ColWidthDefault")] for align, _ in x["c"][2]]
        elif x["t"] == "Div":
            return x["c"][1]
        return None

    doc["blocks"] = walk(doc["blocks"], absolute)
    out, warn = run_pandoc(["-f", "json", "-t", "gfm", "--wrap=preserve"], json.dumps(doc))
    for w in warn:
        raise SystemExit(f"nbs/index.ipynb: {w}")
    return f"{HEADER}\n\n{out.strip()}\n", files


def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description="Write README.md from nbs/index.ipynb")
    p.add_argument("--root", default=str(Path(__file__).parents[1]))
    p.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when something differs"
    )
    a = p.parse_args(argv)
    root, (new, files) = Path(a.root), readme(a.root)
    dst, differ = root / "README.md", []
    old = dst.read_text(encoding="utf-8") if dst.exists() else ""
    if old != new:
        differ.append("README.md")
    differ += [
        f for f, b in files.items() if not (root / f).exists() or (root / f).read_bytes() != b
    ]
    if a.check:
        if old != new:
            sys.stdout.writelines(
                list(
                    difflib.unified_diff(
                        old.splitlines(True),
                        new.splitlines(True),
                        "README.md",
                        "from nbs/index.ipynb",
                    )
                )[:40]
            )
        for f in differ:
            print(f"{f} differs from nbs/index.ipynb: run python tools/make_readme.py")
        return int(bool(differ))
    dst.write_text(new, encoding="utf-8")
    for f, b in files.items():
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        (root / f).write_bytes(b)
    print("\n".join(["README.md", *files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
