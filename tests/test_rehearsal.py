"""Every recipe of a larger scale is tried: what is no number in it stays, the numbers are those of
`smoke`"""

import ast
import json

import pytest

from common import nbs, notebooks

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(600)]


def recipes(path):
    "Scales that every lookup of a notebook has a size for"
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "pick(" not in source or source.startswith("%"):
            continue
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "pick":
                names = {k.arg for k in call.keywords if k.arg}
                found += [names] if names and not call.args else []
    return set.intersection(*found) if found else set()


# The numbers of these recipes sit where `pick` does not see them; their recipe is run by
# test_attention_train.py::test_the_gpu_recipe_runs
elsewhere = {"attention_rhythm/05_train.ipynb", "attention_rhythm/06_results.ipynb"}
larger = [
    pytest.param(rel, scale, id=f"{rel.as_posix()}-{scale}")
    for rel in sorted(notebooks())
    for scale in ("gpu", "paper")
    if rel.stem != "02_scale" and rel.as_posix() not in elsewhere
    if scale in recipes(nbs / rel)
]


@pytest.mark.parametrize("rel, scale", larger)
def test_recipe(rel, scale, kernel, tmp_path, monkeypatch):
    import papermill

    monkeypatch.setenv("LLMPAPERS_REHEARSE", "1")
    papermill.execute_notebook(
        nbs / rel,
        tmp_path / rel.name,
        parameters=dict(scale=scale, seed=0),
        kernel_name=kernel,
        cwd=(nbs / rel).parent,
        progress_bar=False,
        execution_timeout=500,
        start_timeout=180,
    )
