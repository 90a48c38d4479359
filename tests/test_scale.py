"The dial: recipes by name, and notebooks whose recipes agree"

import ast
import json

import pytest
import torch

from common import nbs, notebooks, root
from llmpapers.core.scale import Scale, own_draws, scale_names


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


def test_own_draws_give_back_the_state_of_gpus_too(monkeypatch):
    gpus = {0: "state of 0", 1: "state of 1"}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(cuda, "get_rng_state", lambda i: gpus[i])
    monkeypatch.setattr(cuda, "set_rng_state", lambda state, i: gpus.update({i: state}))
    monkeypatch.setattr(
        cuda, "manual_seed_all", lambda seed: gpus.update(dict.fromkeys(gpus, f"seed {seed}"))
    )
    before = torch.get_rng_state()
    with pytest.raises(KeyError), own_draws(7):
        assert set(gpus.values()) == {"seed 7"}
        raise KeyError("planned")
    assert gpus == {0: "state of 0", 1: "state of 1"}
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_floor_forks_the_global_generators():
    found = {
        str(p.relative_to(root / "llmpapers"))
        for p in (root / "llmpapers").rglob("*.py")
        if "fork_rng" in p.read_text(encoding="utf-8")
    }
    assert found == {"core/scale.py", "core/train.py"}
