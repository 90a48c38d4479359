"""Execute notebooks and write their outputs back into nbs/: `save_outputs.py [--scale laptop]
[notebook ...]`, all of them by default"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from llmpapers.core.cli import execute, parameters_of, this_kernel
from llmpapers.core.scale import scale_names

root = Path(__file__).resolve().parents[1]


def executed(path, scale, kernel, folder):
    "The executed notebook, or an exit with its error"
    try:
        params = dict(scale=scale) if "scale" in parameters_of(path) else {}
    except ValueError:
        params = {}
    out = Path(folder) / path.name
    if error := execute(path, out, params, kernel):
        sys.exit(f"{path}: {error}")
    return nbformat.read(out, as_version=4)


def save(path, scale, kernel):
    "Take over outputs whose cells ran; everything else of the notebook stays as it is"
    with tempfile.TemporaryDirectory() as d:
        ran = executed(path, scale, kernel, d)
    ran = [c for c in ran.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    nb = nbformat.read(path, as_version=4)
    assert [c.source for c in nb.cells] == [c.source for c in ran], f"{path} changed while it ran"
    for a, b in zip(nb.cells, ran):
        if a.cell_type == "code":
            a.outputs = b.outputs
    nbformat.write(nb, path)
    subprocess.run(
        [Path(sys.executable).with_name("nbdev_clean"), "--fname", str(path)], check=True
    )


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--scale", choices=scale_names, default="laptop")
    ap.add_argument("notebooks", nargs="*", type=Path)
    args = ap.parse_args()
    with this_kernel() as kernel:
        for p in args.notebooks or sorted(
            p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
        ):
            print(p, flush=True)
            save(p.resolve(), args.scale, kernel)
