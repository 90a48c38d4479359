"What a cached result is known by: the text of all modules behind the function that makes it"

import functools
from pathlib import Path

import pytest

import llmpapers
from llmpapers.core.artifacts import artifact, code_behind


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A library of four modules: `a` needs `b` and `b` needs `c`; nobody needs `d`"
    texts = {
        "core/c.py": "number = 1\n",
        "core/d.py": "number = 1\n",
        "rl/b.py": "from ..core import c, nothing\nfrom . import nowhere\n",
        "paper/a.py": "import json\n\ndef f():\n    from llmpapers.rl.b import c\n    return c\n",
    }
    for name, text in texts.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    monkeypatch.setattr(llmpapers, "__file__", str(tmp_path / "house" / "__init__.py"))
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "cache"))
    code_behind.cache_clear()
    yield tmp_path / "house"
    code_behind.cache_clear()


def test_imports_are_followed_through_the_library(house):
    names = ["llmpapers.core.c", "llmpapers.paper.a", "llmpapers.rl.b"]
    assert list(code_behind("llmpapers.paper.a")) == names
    assert list(code_behind("llmpapers.core.d")) == ["llmpapers.core.d"]
    with pytest.raises(ValueError, match="module='llmpapers.core.gone' is none"):
        code_behind("llmpapers.core.gone")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_change_behind_the_maker_makes_anew(house, wrapped):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "x").write_text("1")

    build.__module__ = "llmpapers.paper.a"
    make = functools.partial(build) if wrapped else build
    first = artifact("thing", {}, make)
    assert artifact("thing", {}, make) == first and len(calls) == 1
    for file, made in (("core/d.py", 1), ("core/c.py", 2)):
        (house / file).write_text("number = 2\n")
        code_behind.cache_clear()
        artifact("thing", {}, make)
        assert len(calls) == made


def test_a_maker_that_is_none_of_ours_counts_with_its_text(house):
    def build(folder):
        (folder / "x").write_text("1")

    def other(folder):
        (folder / "x").write_text("2")

    typed = {}
    exec("def typed(folder):\n    (folder / 'x').write_text('3')", typed)
    made = {artifact("thing", {}, f) for f in (build, other, typed["typed"])}
    assert len(made) == 3 and artifact("thing", {}, build) in made


def test_no_room_keeps_a_list_of_its_modules_by_hand():
    "What makes a result in the library is known by `code_behind`; one says more, for one function"
    root = Path(llmpapers.__file__).parent
    calls = [
        f"{p.parent.name}/{p.name}"
        for p in root.rglob("*.py")
        if "artifact(" in p.read_text(encoding="utf-8") and "code=" in p.read_text("utf-8")
    ]
    assert sorted(calls) == ["core/artifacts.py", "smec/data.py"]
