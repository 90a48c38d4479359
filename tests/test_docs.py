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

pytestmark = pytest.mark.xdist_group("docs")
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4z8AARAwQCgAf7gP9"
    "i18U1AAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    return out, render_docs.build(root, out)


def test_site_has_no_fault(site):
    out, faults = site
    assert not faults, "\n".join(faults)


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
        assert not re.search(r"#\|\s*(export|hide|default_exp)", page), (
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


FIGURE = code(
    "#| label: fig-line\n#| fig-cap: A line rises with $n$.\nplot();",
    data(image__png=PNG, text__plain="<Figure>"),
)
TABLE = "| claim | verdict |\n|---|---|\n| a long claim that is wider than the usual seventy-two columns of a text | direction |"
GOOD = [
    md("# Part\n\n> What it does"),
    code("#| default_exp core.part"),
    code("#| hide\nimport secret_helper"),
    md(
        "See @eq-sum, @fig-line and [the front](../index.ipynb#start).\n\n$$\n\\sum_i x_i\n$$ {#eq-sum}\n\n![a picture](pic.png)"
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
    assert "<strong>Figure 1.</strong>" in page and 'href="#eq-sum"' in page and "(1)" in page
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
    "unresolved equation": (plus(md("As in @eq-nowhere.")), "unresolved reference @eq-nowhere"),
    "unresolved figure": (plus(md("As in (@fig-nowhere).")), "unresolved reference @fig-nowhere"),
    "label twice": (plus(md("$$\nx\n$$ {#eq-sum}")), "eq-sum is defined twice"),
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
    "figure without an image": (
        plus(code("#| label: fig-empty\n#| fig-cap: Nothing.\nplot();")),
        "fig-empty has no image",
    ),
    "figure without a caption": (
        plus(code("#| label: fig-bare\nplot();", data(image__png=PNG))),
        "fig-bare has no caption",
    ),
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
