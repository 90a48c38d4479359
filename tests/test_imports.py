"Importing the library is cheap and pulls in nothing heavy or optional"

import json
import subprocess
import sys

import pytest

from common import root

pytestmark = pytest.mark.slow

lib = root / "llmpapers"
modules = sorted(
    ".".join(("llmpapers", *p.relative_to(lib).with_suffix("").parts))
    for p in lib.rglob("*.py")
    if "_nbs" not in p.parts and not p.name.startswith("_")
)
OPTIONAL = {"vllm", "ray", "datasets", "playwright", "jupyterlab", "fastapi", "bm25s", "networkx"}
HEAVY = OPTIONAL | {"torch", "matplotlib", "transformers", "scipy", "pandas"}
MAX_BARE, MAX_MODULES = 200, 6000  # modules loaded; torch and transformers alone are some 2500

# What many modules load is loaded once; each module is then imported in a process of its own,
# forked from that
PROBE = """
import json, os, sys
import scipy.stats
import torch
import transformers.models.qwen3.modeling_qwen3

early = set(sys.modules)
for name in json.load(sys.stdin):
    r, w = os.pipe()
    if not os.fork():
        try:
            __import__(name)
            res = dict(n=len(sys.modules), loaded=sorted({m.split(".")[0] for m in sys.modules}))
        except BaseException as e:
            res = dict(error=f"{type(e).__name__}: {e}")
        with os.fdopen(w, "w") as f:
            json.dump(res, f)
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as f:
        print(json.dumps([name, json.load(f)]), flush=True)
    os.wait()
print(json.dumps(["before", dict(loaded=sorted({m.split(".")[0] for m in early}))]))
"""


def python(code, stdin=""):
    r = subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=root.parent,
        timeout=600,
    )
    assert r.returncode == 0, r.stderr
    return r.stdout


def test_bare_import_is_small():
    "`import llmpapers` loads no framework and few modules"
    n, loaded = json.loads(
        python(
            "import sys, json; before = set(sys.modules); import llmpapers; "
            "n = len(set(sys.modules) - before); "
            'print(json.dumps([n, sorted({m.split(".")[0] for m in sys.modules})]))'
        )
    )
    assert not HEAVY & set(loaded), f"import llmpapers loads {sorted(HEAVY & set(loaded))}"
    assert n <= MAX_BARE, f"import llmpapers loads {n} modules"


def test_version():
    out = python("import llmpapers; print(llmpapers.__version__)").strip()
    assert out and f"version = {out}\n" in (root / "settings.ini").read_text()


@pytest.fixture(scope="module")
def imported():
    return dict(json.loads(line) for line in python(PROBE, json.dumps(modules)).splitlines())


@pytest.mark.slow
@pytest.mark.xdist_group("imports")
def test_probe_starts_clean(imported):
    "The forked probe can see a module that loads something optional: nothing of it is there before"
    assert not OPTIONAL & set(imported["before"]["loaded"])


@pytest.mark.parametrize("name", modules)
@pytest.mark.xdist_group("imports")
def test_module(imported, name):
    res = imported[name]
    assert "error" not in res, f"import {name}: {res['error']}"
    bad = OPTIONAL & set(res["loaded"])
    assert not bad, (
        f"import {name} loads {sorted(bad)}: import it where it is used, through core.scale.need"
    )
    assert res["n"] <= MAX_MODULES, f"import {name} loads {res['n']} modules"
