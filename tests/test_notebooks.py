"""Every notebook runs from top to bottom at smoke scale, offline, within its CPU time, and leaves
nothing behind"""

import json
import os
import re

import pytest

from common import (
    Processes,
    kind,
    machine_traces,
    nbs,
    needs_parameters,
    notebooks,
    output_text,
    root,
)
from nb_read import Notebook

CPU_LIMIT = float(os.environ.get("NOTEBOOK_CPU_LIMIT", 60))  # seconds, children included
# They start processes that each import torch: some twenty on Ray, one a run in the benchmark
CPU_LIMITS = {
    "rl/15_ray.ipynb": 240.0,
    "benchmarks/02_grpo_trl.ipynb": 150.0,
    "asyppo/05_train.ipynb": 90.0,
}
durations = root / "tests" / "durations.json"


def slowest_first():
    known = json.loads(durations.read_text()) if durations.exists() else {}
    return sorted(notebooks(), key=lambda p: (-known.get(p.as_posix(), 1e9), p.as_posix()))


def heavy(rel):
    "Notebooks that start Ray or vLLM run one at a time"
    starts = ("ray.init", "start_ray(", "RolloutPool(", "RayLearners(", "VLLMEngine(")
    return any(k in c["source"] for c in Notebook(rel).code for k in starts)


def files_beside(folder):
    return {
        p.relative_to(nbs).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)
    }


@pytest.mark.parametrize(
    "rel",
    [
        pytest.param(
            p, id=p.as_posix(), marks=[pytest.mark.xdist_group("heavy")] if heavy(p) else []
        )
        for p in slowest_first()
    ],
)
@pytest.mark.notebook
@pytest.mark.timeout(900)
def test_notebook(rel, kernel, record_property):
    import nbformat
    import papermill  # heavy, and other tests of this process need none of it

    path = nbs / rel
    nb = nbformat.read(path, as_version=4)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    if needs_parameters(rel):
        # without the tag papermill injects above the notebook's own default, which then wins
        assert len(tagged) == 1, (
            f"{rel} needs exactly one cell tagged `parameters`, found {len(tagged)}"
        )
    else:
        assert len(tagged) <= 1, f"{rel} has {len(tagged)} cells tagged `parameters`"
    params = dict(scale="smoke", seed=0) if tagged else {}
    out, before = root / "_executed" / rel, files_beside(path.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    procs = Processes()
    try:
        with procs:
            papermill.execute_notebook(
                path,
                out,
                parameters=params,
                kernel_name=kernel,
                cwd=path.parent,
                progress_bar=False,
                execution_timeout=600,
                start_timeout=180,
                request_save_on_cell_execute=False,
            )
    finally:
        for k, v in dict(notebook=rel.as_posix(), cpu=procs.cpu, wall=procs.wall).items():
            record_property(k, v)
    done = nbformat.read(out, as_version=4)
    for i, c in enumerate(done.cells):
        for o in c.get("outputs", []):
            assert o.output_type != "error", f"{rel} cell {i}: {o.ename}: {o.evalue}"
        if c.cell_type == "code" and re.search(r"^#\s*\|\s*label:\s*fig-", c.source, flags=re.M):
            assert any(k.startswith("image/") for o in c.outputs for k in o.get("data", {})), (
                f"{rel} cell {i}: no figure was drawn"
            )
        found = machine_traces(output_text(c))
        assert not found, (
            f"{rel} cell {i}: the output shows this machine: {found}\n{output_text(c)[:400]}"
        )
    left = procs.left()
    assert not left, f"{rel} left processes running: {left}"
    new = files_beside(path.parent) - before
    assert not new or kind(rel) == "index", f"{rel} wrote files beside the notebooks: {sorted(new)}"
    limit = CPU_LIMITS.get(rel.as_posix(), CPU_LIMIT)
    assert procs.cpu <= limit, (
        f"{rel} used {procs.cpu:.0f} s of CPU time at smoke scale, the limit is {limit:.0f} s "
        f"(CPU time of the kernel and its children, not wall time, which was {procs.wall:.0f} s)"
    )
    out.unlink()  # a notebook that failed stays in _executed/, its error in it


def test_time_of_all_notebooks_is_known():
    "tests/durations.json orders the run; notebooks that are gone must not stay in it"
    known = json.loads(durations.read_text()) if durations.exists() else {}
    gone = [k for k in known if not (nbs / k).exists()]
    assert not gone, (
        f"tests/durations.json names notebooks that are gone: {gone}; "
        "run pytest tests/test_notebooks.py --update-durations"
    )
