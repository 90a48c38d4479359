"""The site is built without a fault, every kind of fault is seen, and README.md is what
nbs/index.ipynb makes of it"""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest

from common import notebooks, root

sys.path.insert(0, str(root / "tools"))
import make_readme  # noqa: E402
import nb_filter  # noqa: E402
import render_docs  # noqa: E402

pytestmark = [pytest.mark.build, pytest.mark.xdist_group("docs")]
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9"
    "i18U1AAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    return out, render_docs.build(root, out)


@pytest.mark.build
def test_site_has_no_fault(site):
    out, faults = site
    assert not faults, "\n".join(faults)


@pytest.mark.build
def test_every_notebook_is_a_page_with_its_code_and_outputs(site):
    out, _ = site
    for rel in notebooks():
        page = (out / "nbs" / rel).with_suffix(".html").read_text(encoding="utf-8")
        nb = json.loads((root / "nbs" / rel).read_text(encoding="utf-8"))
        shown = [c for c in nb_filter.convert(nb)["cells"] if c["cell_type"] == "code"]
        assert page.count("<pre") >= len(shown), (
            f"{rel}: {len(shown)} code cells, {page.count('<pre')} on the page"
        )
        images = sum(
            any(k.startswith("image/") for k in o.get("data", {}))
            for c in shown
            for o in c.get("outputs", [])
        )
        assert page.count("<img") >= images, (
            f"{rel}: {images} figures, {page.count('<img')} on the page"
        )
        assert not re.search(r"(?m)^(?:<[^>]+>)*#\|\s*(export|hide|default_exp)", page), (
            f"{rel}: a directive is on the page"
        )
        assert "@eq-" not in page and "@fig-" not in page, f"{rel}: an unresolved reference"


def test_readme_is_current(capsys):
    rc = make_readme.main(["--root", str(root), "--check"])
    assert rc == 0, capsys.readouterr().out


# ---- a small site to plant faults in -------------------------------------------------------------
def md(s):
    return dict(cell_type="markdown", metadata={}, source=s)


def code(s, *outputs):
    return dict(
        cell_type="code", metadata={}, execution_count=None, source=s, outputs=list(outputs)
    )


def data(**kw):
    return dict(
        output_type="display_data",
        metadata={},
        data={k.replace("__", "/"): v for k, v in kw.items()},
    )


def stream(s, name="stdout"):
    return dict(output_type="stream", name=name, text=s)


def write(folder, name, cells):
    cells = [c | dict(id=f"c{i}") for i, c in enumerate(cells)]
    p = folder / "nbs" / name
    p.parent.mkdir(parents=True, exist_ok=True)
    p.write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(kernelspec=dict(name="python3")),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )


def figure(n, caption="A line rises with $n$.", call=True):
    "A cell as a notebook of ours has it: the image, and below it the caption"
    src = f'plot()\ncaption({n}, f"A {{what}} rises with $n$.")' if call else "plot();"
    return code(
        src,
        data(image__png=PNG, text__plain="<Figure>"),
        data(text__markdown=f"**Figure {n}.** {caption}", text__plain="<Markdown object>"),
    )


FIGURE = figure(1)
TABLE = (
    "| claim | verdict |\n|---|---|\n"
    "| a long claim that is wider than the usual seventy-two columns of a text | direction |"
)
GOOD = [
    md("# Part\n\n> What it does"),
    code("#| default_exp core.part"),
    code("#| hide\nimport secret_helper"),
    md(
        "See equation (1), Figure 1 and [the front](../index.ipynb#start).\n\n"
        "$$\n\\sum_i x_i \\tag{1}\n$$\n\n![a picture](pic.png)"
    ),
    code("#| export\ndef total(x): return sum(x)"),
    FIGURE,
    code("claims", data(text__markdown=TABLE, text__html="<table><tr><td>old</td></tr></table>")),
    code(
        "frame",
        data(text__html="<table><tr><td>cell of a frame</td></tr></table>", text__plain="frame"),
    ),
    code('print("hi")', stream("hi\n")),
]


def project(tmp, cells=GOOD, sidebar=("nbs/index.ipynb", "nbs/core/01_part.ipynb")):
    tmp.mkdir(parents=True, exist_ok=True)
    for f in ("settings.ini",):
        shutil.copy(root / f, tmp / f)
    write(
        tmp,
        "index.ipynb",
        [md("# Front\n\n> The door"), md("## Start\n\n[Part](core/01_part.ipynb) has `total`.")],
    )
    write(tmp, "core/01_part.ipynb", cells)
    (tmp / "nbs" / "core" / "pic.png").write_bytes(base64.b64decode(PNG))
    quarto = (root / "_quarto.yml").read_text(encoding="utf-8").split("    contents:\n")[0]
    (tmp / "_quarto.yml").write_text(
        quarto + "    contents:\n" + "".join(f"      - {s}\n" for s in sidebar)
    )
    return tmp


def build(tmp):
    return render_docs.build(tmp, tmp / "_docs")


def test_clean_project(tmp_path):
    assert build(project(tmp_path)) == []
    page = (tmp_path / "_docs" / "nbs" / "core" / "01_part.html").read_text()
    assert page.count("<strong>Figure 1.</strong>") == 1 and "A line rises with" in page
    assert "caption(" not in page and "{what}" not in page  # the caption as it came out
    for ref, word in (("eq-1", "Equation 1"), ("fig-1", "Figure 1")):
        assert re.search(rf'<a[^>]*href="#{ref}"[^>]*>{word}</a>', page), f"no link to {ref}"
        assert f'id="{ref}"' in page
    assert re.search(r'<span class="number">\(1\)</span>', page) and "\\tag" not in page
    assert (
        "cell of a frame" in page and ">old<" not in page and "direction" in page and ">hi" in page
    )
    assert "secret_helper" not in page and "#| export" not in page and "<math" in page
    front = (tmp_path / "_docs" / "nbs" / "index.html").read_text()
    assert re.search(r'href="core/01_part.html"[^>]*><code>total</code></a>', front), (
        "a symbol in backticks is not linked to its page"
    )


def plus(*cells):
    return GOOD + list(cells)


FAULTS = {
    "unresolved equation": (plus(md("As in @eq-7.")), "unresolved reference @eq-7"),
    "unresolved figure": (plus(md("As in (@fig-line).")), "unresolved reference @fig-line"),
    "tag twice": (plus(md("$$ x \\tag{1} $$")), "eq-1 is defined twice"),
    "tag out of order": (plus(md("$$ x \\tag{3} $$")), "Equation 3 is number 2 on the page"),
    "caption twice": (plus(figure(1)), "fig-1 is defined twice"),
    "caption out of order": (plus(figure(3)), "Figure 3 is number 2 on the page"),
    "caption that did not come out": (
        plus(code('plot()\ncaption(2, "It rises")', data(image__png=PNG))),
        "fig-2 has no caption",
    ),
    "caption of another figure": (
        plus(
            code(
                'plot()\ncaption(2, "It rises")',
                data(image__png=PNG),
                data(text__markdown="**Figure 1.** It rises"),
            )
        ),
        "fig-2 has no caption",
    ),
    "figure that did not come out": (
        plus(code('plot()\ncaption(2, "It rises")', data(text__markdown="**Figure 2.** It rises"))),
        "fig-2 has no image",
    ),
    "label of an equation nobody knows": (plus(md("$$ x $$ {#eq-sum}, {#fig-x}")), "belongs to"),
    "dead link to a notebook": (
        plus(md("[gone](../core/09_gone.ipynb)")),
        "dead link ../core/09_gone.ipynb",
    ),
    "dead link to the site": (
        plus(md("[gone](https://llmpapers.github.io/llmpapers/nbs/core/77_gone.html)")),
        "dead link https://llmpapers.github.io",
    ),
    "dead anchor": (plus(md("[gone](../index.ipynb#nothing)")), "dead anchor #nothing"),
    "file that is not on the site": (plus(md("[raw](pic.png)")), "dead link pic.png"),
    "missing image": (plus(md("![gone](gone.png)")), "missing image gone.png"),
    "image outside of the project": (plus(md("![up](../../../up.png)")), "missing image"),
    "remote image": (plus(md("![far](https://example.org/x.png)")), "remote or embedded image"),
    "bad TeX": (plus(md("$$\n\\frac{a}{\n$$")), "Could not convert TeX math"),
    "bad TeX in a line": (
        plus(md("Here $\\undefinedmacro{x}$ stands.")),
        "Could not convert TeX math",
    ),
    "maths not recognised": (plus(md("Here $ x + 1 $ stands.")), "maths that was not recognised"),
    "TeX without dollars": (
        plus(md("\\begin{align}a &= b\\end{align}")),
        "TeX outside of dollar signs",
    ),
    "page without a title": ([md("Just text")] + GOOD[1:], "no title"),
    "two pages of one title": ([md("# Front\n\n> Again")] + GOOD[1:], "has the title of"),
    "directive below code": (
        plus(code("x = 1\n#| export\ny = 2")),
        "a directive below the first line",
    ),
    "unknown option": (plus(code("#| fig_cap: typo\nx")), "unknown cell option 'fig_cap'"),
    "stderr": (
        plus(code("x", stream("UserWarning: careful\n", "stderr"))),
        "an output on stderr was left",
    ),
    "progress bar": (
        plus(code("x", stream(" 40%|████      | 2/5 [00:01<00:02,  1.9it/s]\n"))),
        "a progress bar or terminal code",
    ),
    "terminal colours": (
        plus(code("x", data(text__plain="\x1b[31mred\x1b[0m"))),
        "a progress bar or terminal code",
    ),
    "error output": (
        plus(code("x", dict(output_type="error", ename="ValueError", evalue="no", traceback=[]))),
        "the output is an error",
    ),
    "output nobody can show": (
        plus(code("x", data(application__x_widget="{}"))),
        "an output has only",
    ),
    "table not recognised": (
        plus(md("A table:\n|a|b|\n|---|---|\n|1|2|")),
        "a table that was not recognised",
    ),
    "attachment": (
        plus(md("![a](attachment:a.png)") | dict(attachments={"a.png": {"image/png": PNG}})),
        "an attachment",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(tmp_path, name):
    cells, message = FAULTS[name]
    faults = build(project(tmp_path, cells))
    assert any(message in f for f in faults), faults


def test_sidebar_and_pages_disagree(tmp_path):
    faults = build(project(tmp_path, sidebar=["nbs/index.ipynb", "nbs/core/02_other.ipynb"]))
    assert any("02_other.ipynb is not a page" in f for f in faults) and any(
        "missing from the sidebar" in f for f in faults
    ), faults


def test_command_exits_with_1_on_a_fault(tmp_path):
    project(tmp_path / "bad", FAULTS["missing image"][0])
    project(tmp_path / "good")

    def run(d):
        return subprocess.run(
            [sys.executable, root / "tools" / "render_docs.py", "--root", d, "--out", d / "_docs"],
            capture_output=True,
            text=True,
        )

    bad, good = run(tmp_path / "bad"), run(tmp_path / "good")
    assert (
        bad.returncode == 1
        and "fault: nbs/core/01_part.ipynb: missing image gone.png" in bad.stdout
    ), bad
    assert good.returncode == 0 and "2 pages" in good.stdout, good


def test_readme_follows_the_front_page(tmp_path):
    project(tmp_path)
    args = ["--root", str(tmp_path)]
    assert make_readme.main(args + ["--check"]) == 1 and not (tmp_path / "README.md").exists()
    assert make_readme.main(args) == 0 and make_readme.main(args + ["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert (
        "(https://llmpapers.github.io/llmpapers/nbs/core/01_part.html)" in text
        and "# Front\n\nThe door" in text
    )
    write(tmp_path, "index.ipynb", [md("# Front\n\n> The door"), FIGURE])
    assert make_readme.main(args + ["--check"]) == 1
    assert make_readme.main(args) == 0 and (tmp_path / "nbs" / "images" / "index-1.png").exists()
    (tmp_path / "nbs" / "images" / "index-1.png").write_bytes(b"old")
    assert make_readme.main(args + ["--check"]) == 1


# ---- the filter ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "src, want",
    [
        ("See Figure 1 and equation (2).", "See @fig-1 and @eq-2."),
        ("Figure 1 shows it (Figure 2).", "@fig-1 shows it (@fig-2)."),
        ("Equation (1) says so.", "@eq-1 says so."),
        ("**Figure 1** in bold", "**Figure 1** in bold"),
        ("the paper's Fig. 1, Eq. 1", "the paper's Fig. 1, Eq. 1"),
        ("Figure 3 and equation (3)", "Figure 3 and equation (3)"),  # none of this page
        ("Figure 10", "Figure 10"),
        ("`see Figure 1`, ``see ` Figure 1``", "`see Figure 1`, ``see ` Figure 1``"),
        (
            "```\nsee Figure 1\n\nFigure 2\n```\nFigure 1",
            "```\nsee Figure 1\n\nFigure 2\n```\n@fig-1",
        ),
        ("$x = $ Figure 1 $= y$", "$x = $ @fig-1 $= y$"),
        ("$$ a \\text{ of Figure 1} $$", "$$ a \\text{ of Figure 1} $$"),
        ("[as Figure 1](a.ipynb) and Figure 1", "[as Figure 1](a.ipynb) and @fig-1"),
        ("![of Figure 1](a.png)", "![of Figure 1](a.png)"),
        ("## The same as Figure 1\n\nFigure 1", "## The same as Figure 1\n\n@fig-1"),
    ],
)
def test_words_become_references(src, want):
    assert nb_filter.referring(src, dict(fig={1, 2}, eq={1, 2})) == want


@pytest.mark.parametrize(
    "src, want",
    [
        ("$$ x \\tag{1} $$", "$$ x $$ {#eq-1}"),
        ("$$\nx\n\\tag{12}\n$$ and so on", "$$\nx $$ {#eq-12} and so on"),
        ("$$ x $$", "$$ x $$"),
        ("a $x$, then $$ y \\tag{2}$$", "a $x$, then $$ y $$ {#eq-2}"),
    ],
)
def test_tags_become_labels(src, want):
    assert nb_filter.labelled(src) == want


@pytest.mark.parametrize(
    "src, want",
    [
        ('plot()\ncaption(2, "It rises")', (2, "plot()")),
        ('%time plot()\ncaption(\n    2,\n    f"It {x}",\n)', (2, "%time plot()")),
        ('caption(2, "It rises")\nplot()', None),
        ("def caption(number, text):\n    pass", None),
        ('caption("a")', None),
        ("caption(n, text)", None),
        ("figures.caption(", None),
    ],
)
def test_the_caption_call_is_taken_off(src, want):
    assert nb_filter.caption_call(src) == want


def test_a_figure_cell_gets_label_and_caption_from_its_output():
    rest = data(text__markdown="**Note.** a table")
    cell = figure(1, "It's 40 % higher, as Figure 1 and\nequation (1) say: `Figure 1`.")
    cell["outputs"].append(rest)
    nb = nb_filter.convert(dict(cells=[md("$$ x \\tag{1} $$"), cell]))
    label, option, *source = nb["cells"][1]["source"]
    assert label == "#| label: fig-1\n" and source == ["plot()"]
    assert nb_filter.option(label + option, "fig-cap") == (
        "It's 40 % higher, as @fig-1 and @eq-1 say: `Figure 1`."
    )
    assert [list(o["data"]) for o in nb["cells"][1]["outputs"]][1:] == [["text/markdown"]]
    assert nb["cells"][1]["outputs"][1] == rest and len(nb["cells"][1]["outputs"]) == 2


@pytest.mark.parametrize("magic", ["%%time", "%%capture out", "%matplotlib inline", "!ls", "", " "])
@pytest.mark.parametrize("directive", ["hide", "default_exp a.b", "export", "echo: false"])
def test_a_directive_counts_behind_magics_and_empty_lines(magic, directive):
    source = f"{magic}\n#| {directive}\nsecret = 1"
    name = directive.split()[0].rstrip(":")
    assert nb_filter.directives(source) == [name]
    assert nb_filter.body(source) == f"{magic}\nsecret = 1".strip("\n")
    assert nb_filter.option(source, "echo") == ("false" if name == "echo" else None)
    cell = dict(cell_type="code", metadata={}, source=source, outputs=[])
    shown = nb_filter.convert(dict(cells=[cell]))["cells"]
    assert len(shown) == (name in ("export", "echo"))
    for c in shown:
        assert "secret = 1" in "".join(c["source"])


@pytest.mark.parametrize("first", ["x = 1", "# a remark", "f()  %2"])
def test_a_directive_below_code_is_code(first):
    source = f"{first}\n#| hide\ny = 2"
    assert nb_filter.directives(source) == [] and nb_filter.body(source) == source


def test_readme_has_words_again():
    given = "By @eq-1, @fig-2: $$ x $$ {#eq-1}"
    assert make_readme.as_words(given) == "By equation (1), Figure 2: $$ x \\tag{1} $$"


def test_filter_is_a_program():
    "Quarto calls the filter with the notebook on standard input"
    nb = dict(
        cells=[c | dict(id=str(i)) for i, c in enumerate(GOOD)],
        metadata={},
        nbformat=4,
        nbformat_minor=5,
    )
    r = subprocess.run(
        [sys.executable, root / "tools" / "nb_filter.py"],
        input=json.dumps(nb),
        capture_output=True,
        text=True,
    )
    cells = json.loads(r.stdout)["cells"]
    assert cells[0]["cell_type"] == "raw" and cells[0]["source"][1] == 'title: "Part"\n'
    assert not [c for c in cells if "secret_helper" in "".join(c["source"])]
    assert all(isinstance(c["source"], list) for c in cells)
