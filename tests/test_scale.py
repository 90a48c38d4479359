"The dial: recipes by name, and notebooks whose recipes agree"

import ast
import json

import pytest

from common import nbs, notebooks
from llmpapers.core.scale import Scale, scale_names


def picks(path):
    "Names of the recipes of every `pick(...)` with keywords in a notebook"
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] != "code" or ".pick(" not in source or source.startswith("%"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pick":
                names = {k.arg for k in node.keywords}
                if names:
                    yield frozenset(names)


@pytest.mark.parametrize("name", scale_names)
def test_a_recipe_is_what_its_name_says_or_an_error(name):
    sizes = dict(smoke=1, laptop=2, paper=5)
    if name in sizes:
        assert Scale(name).pick(sizes) == Scale(name).pick(**sizes) == sizes[name]
        return
    with pytest.raises(ValueError, match=f"'{name}' has no recipe here.*smoke, laptop, paper"):
        Scale(name).pick(sizes)


def test_no_recipe_at_all():
    with pytest.raises(ValueError, match="there are recipes for: none"):
        Scale("smoke").pick({})


ours = [p for p in notebooks() if p.as_posix() != "core/02_scale.ipynb"]


@pytest.mark.parametrize("rel", [p for p in ours if any(picks(nbs / p))], ids=str)
def test_all_sizes_of_a_notebook_have_the_same_recipes(rel):
    "A notebook that starts at a scale does not stop in its middle for want of a size"
    found = set(picks(nbs / rel))
    assert len(found) == 1, f"{rel} has {sorted(map(sorted, found))}"
    assert {"smoke", "laptop"} <= next(iter(found))
