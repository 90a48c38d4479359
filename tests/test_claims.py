"The rule of verdicts, and the tables that are collected from executed notebooks"

import ast
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import nbs, root
from llmpapers.core.claims import (
    Claim,
    Gate,
    _from_json,
    claims_in,
    claims_table,
    mime,
    tally,
    verdict,
)
from llmpapers.core.cli import papers, series


def claim(key, **kw):
    return Claim(
        **dict(
            paper="vamo",
            key=key,
            statement="It gains",
            source="Table 1",
            published=None,
            unit="share",
            measured=1.0,
            low=0.5,
            high=1.5,
            n=3,
            scale="smoke",
            kind="paper",
        )
        | kw
    )


def notebook(path, *claims):
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                cells=[
                    dict(
                        cell_type="code",
                        source=[],
                        outputs=[
                            dict(
                                output_type="execute_result",
                                data=claims_table(claims)._repr_mimebundle_(),
                            )
                        ],
                    )
                ]
            )
        )
    )


def test_a_renamed_claim_does_not_live_on_in_the_gathered_page(tmp_path):
    "Gather, rename in the part, gather again: the old row is gone, though the page still shows it"
    notebook(tmp_path / "vamo" / "01_part.ipynb", claim("old"))
    notebook(tmp_path / "vamo" / "00_paper.ipynb", *claims_in(tmp_path / "vamo"))
    notebook(tmp_path / "vamo" / "01_part.ipynb", claim("new"))
    assert [c.key for c in claims_in(tmp_path / "vamo" / "00_paper.ipynb")] == ["old"]
    assert (
        [c.key for c in claims_in(tmp_path / "vamo")]
        == [c.key for c in claims_in(tmp_path)]
        == ["new"]
    )


def test_other_pages_of_a_folder_are_read_in_order(tmp_path):
    notebook(tmp_path / "01_a.ipynb", claim("x"), claim("y"))
    notebook(tmp_path / "10_b.ipynb", claim("x", scale="gpu"))
    notebook(tmp_path / ".hidden" / "02_c.ipynb", claim("z"))
    assert [(c.key, c.scale) for c in claims_in(tmp_path)] == [("x", "gpu"), ("y", "smoke")]


@pytest.mark.parametrize("page", sorted(nbs.glob("*/00_*.ipynb")), ids=lambda p: p.parent.name)
def test_paper_pages_claim_nothing_of_their_own(page):
    """Every row of a paper's page comes from a part of its series, so that leaving the page out
    loses nothing"""
    own = {(c.paper, c.key) for c in claims_in(page)} - {
        (c.paper, c.key) for c in claims_in(page.parent)
    }
    assert not own, (
        f"{page.parent.name}: no part makes these claims (renamed? then run the page again): "
        f"{sorted(own)}"
    )


# ---- the rule ------------------------------------------------------------------------------------
finite = st.floats(-5, 5, allow_nan=False)


def naive(low, high, band, null, better, simulated):
    "The rule, said again in its slow form: move everything so that the claim is 'above 0'"
    flip = (lambda x: x - null) if better == "greater" else (lambda x: null - x)
    ends = sorted([flip(low), flip(high)])
    if ends[1] < 0:
        return "contradicted"
    if ends[0] <= 0 <= ends[1]:
        return "not shown"
    if simulated or band is None:
        return "direction"
    target = sorted(map(flip, band))
    if ends[0] > target[1]:
        return "larger"
    meets = ends[0] <= target[1] and target[0] <= ends[1]
    return "reproduced" if meets else "direction"


@given(
    st.tuples(finite, finite).map(sorted),
    st.none() | st.tuples(finite, finite).map(sorted).map(tuple),
    finite,
    st.sampled_from(["greater", "less"]),
    st.booleans(),
)
def test_verdict_equals_the_slow_rule(ends, band, null, better, simulated):
    found = verdict(*ends, band=band, null=null, better=better, simulated=simulated)
    assert found == naive(*ends, band, null, better, simulated)
    if simulated:
        assert found not in ("reproduced", "larger")


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_gate_is_not_tested(passed):
    gate = Gate("an oracle arm gains 0.1", 0.2 if passed else 0.01, passed)
    c = claim("x", published=1.0, band=1.5, gate=gate)
    assert c.verdict == ("reproduced" if passed else "not tested")
    row = claims_table([c]).rows()[0]
    assert ("gate failed" in row["note"]) == (not passed) and "an oracle arm" in row["note"]


def test_a_factor_is_a_band_on_the_effect():
    c = claim("x", published=3.0, null=1.0, band=2.0, measured=2.0, low=1.9, high=2.1)
    assert c.limits == (2.0, 5.0) and c.verdict == "reproduced"
    less = claim(
        "y", published=0.5, null=1.0, band=2.0, measured=0.2, low=0.1, high=0.3, better="less"
    )
    assert less.limits == (0.0, 0.75) and less.verdict == "reproduced"


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(published=math.nan), "published of the claim 'x' is NaN"),
        (dict(kind="ours"), "kind='ours'"),
        (dict(band=1.5), "needs a published figure"),
        (dict(published=1.0, band=0.5), "a factor must exceed 1"),
        (dict(published=0.0, band=2.0), "give the two ends"),
        (dict(published=1.0, band=(2.0, 3.0)), "leaves out published"),
        (dict(measured=2.0), "does not contain"),
        (dict(n=0), "at least 1"),
    ],
)
def test_bad_claims_are_refused(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        claim("x", **bad)


def test_a_claim_without_kind_is_refused():
    with pytest.raises(TypeError, match="kind"):
        Claim("vamo", "x", "It gains", "Table 1", None, "share", 1.0, 0.5, 1.5, 3, "smoke")


def test_claims_survive_json(tmp_path):
    "All fields, an infinite interval and a gate with several values come back from a notebook"
    full = claim(
        "x",
        published=1.0,
        band=(0.5, 2.0),
        gate=Gate("two arms gain", (0.2, 0.3), True),
        simulated=True,
        sizes=dict(steps=3),
        recorded="study",
        chosen_after="the width",
    )
    wide = claim("y", low=-math.inf, high=math.inf, n=1)
    notebook(tmp_path / "vamo" / "01_a.ipynb", full, wide)
    assert list(claims_in(tmp_path)) == [full, wide]


def test_claims_of_an_older_form_name_their_notebook(tmp_path):
    notebook(tmp_path / "vamo" / "01_a.ipynb", claim("x"))
    text = (tmp_path / "vamo" / "01_a.ipynb").read_text().replace('"kind": "paper", ', "")
    (tmp_path / "vamo" / "01_a.ipynb").write_text(text)
    with pytest.raises(ValueError, match="vamo/01_a.ipynb.*run its notebook"):
        claims_in(tmp_path)


def test_only_statements_of_the_paper_are_counted():
    found = claims_table(
        [claim("a"), claim("b", kind="control"), claim("c", kind="identity"), claim("d", low=-1)]
    )
    assert tally(found) == {"direction": 1, "not shown": 1}
    paper, _, rest = found.markdown().partition("*Controls: ours, not counted*")
    assert paper.count("It gains") == 2 and rest.count("It gains") == 2


# ---- collected tables are as old as their notebooks ----------------------------------------------
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def outputs(path, kind="text/markdown"):
    "Outputs of one kind in a notebook, as text"
    found = (o for c in cells(path) for o in c.get("outputs", []))
    return ["".join(o["data"][kind]) for o in found if kind in o.get("data", {})]


@pytest.mark.parametrize("page", sorted(nbs.glob("*/00_*.ipynb")), ids=lambda p: p.parent.name)
def test_paper_pages_show_what_the_notebooks_found(page):
    "The table of a paper's page is not older than the notebooks it is collected from"
    source, shown = claims_in(page.parent), claims_in(page)
    assert {c.key: c for c in shown} == {c.key: c for c in source}, (
        f"run {page.parent.name}/{page.name} again: python tools/save_outputs.py"
    )
    data = [d for c in cells(page) for o in c.get("outputs", []) for d in o["data"].get(mime, [])]
    assert {d["key"]: d["verdict"] for d in data} == {c.key: c.verdict for c in source}
    lines = {line for text in outputs(page) for line in text.splitlines()}  # one table, or parts
    assert any(set(t.markdown().splitlines()) <= lines for t in (source, shown))


def text_of(slug):
    return ", ".join(f"{n} {v}" for v, n in tally(claims_in(nbs / slug)).items())


@pytest.mark.parametrize("slug", papers)
def test_front_page_and_readme_show_what_the_notebooks_found(slug):
    (table,) = [t for t in outputs(nbs / "index.ipynb") if "| paper | what it is about |" in t]
    (row,) = [line for line in table.splitlines() if f"abs/{papers[slug].arxiv}" in line]
    assert papers[slug].title in row
    expected = (text_of(slug) or f"{len(series(slug))} notebooks") if series(slug) else "planned"
    assert row.rstrip("| ").endswith(expected), f"run index.ipynb again: {row}"
    readme = (root / "README.md").read_text(encoding="utf-8")
    (line,) = [x for x in readme.splitlines() if f"abs/{papers[slug].arxiv}" in x]
    assert re.sub(r"\s+", " ", line).rstrip("| ").endswith(expected), f"make readme: {line}"


def test_tables_inside_series_are_as_old_as_their_sources():
    "Results notebooks that repeat claims of earlier parts show the current ones"
    analysis = claims_in(nbs / "attention_rhythm" / "03_analysis.ipynb")
    (table,) = [
        t
        for t in outputs(nbs / "attention_rhythm" / "06_results.ipynb")
        if t.startswith("| statement | source | paper | ours | verdict |")
    ]
    assert [line.split(" | ")[-1].rstrip(" |") for line in table.splitlines()[2:]] == [
        c.verdict for c in analysis
    ]
    flash = nbs / "roll_flash" / "08_results.ipynb"
    parts = [c for p in series("roll_flash") if "01" <= p.stem[:2] <= "07" for c in claims_in(p)]
    shown = [t for t in outputs(flash, "text/plain") if t.startswith("{'reproduced'")]
    assert shown and ast.literal_eval(shown[0]) == tally(parts)


# ---- what is saved comes back --------------------------------------------------------------------
def back(c):
    return _from_json(json.loads(json.dumps(claims_table([c]).json()[0], allow_nan=False)))


@pytest.mark.parametrize(
    "kw",
    [
        dict(high=math.inf),
        dict(low=-math.inf, high=math.inf),
        dict(measured=math.inf, high=math.inf),
        dict(measured=-math.inf, low=-math.inf, high=-math.inf),
        dict(low=math.inf, measured=math.inf, high=math.inf),
        dict(published=math.inf),
        dict(published=-math.inf, band=(-math.inf, 3.0)),
        dict(published=2.0, band=(1.0, math.inf)),
        dict(published=2.0, band=1.5),
        dict(null=-math.inf),
        dict(measured=None, low=None, high=None),
        dict(gate=Gate("a > 1", (2.0, 3.0), True), simulated=1, sizes=dict(steps=3, rates=[0.1])),
    ],
    ids=str,
)
def test_a_claim_survives_its_table(kw):
    c = claim("x", **kw)
    assert back(c) == c and type(back(c).simulated) is bool


@pytest.mark.parametrize("field", ["published", "measured", "low", "high", "null"])
def test_nan_is_no_figure(field):
    with pytest.raises(ValueError, match=f"{field}.* of the claim 'x' is NaN"):
        claim("x", **{field: math.nan})


@pytest.mark.parametrize("sizes", [{3: 1}, {"n": {1, 2}}, {"n": math.nan}, {"n": object()}])
def test_sizes_that_json_does_not_have_are_refused(sizes):
    with pytest.raises(TypeError, match="sizes of 'x'"):
        claim("x", sizes=sizes)
