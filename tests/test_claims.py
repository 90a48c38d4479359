"Claims are read from the parts of a series; the page that gathers them is not a source"

import json

import pytest
from common import nbs

from llmpapers.core.claims import Claim, claims_in, claims_table


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
