"""Execute notebooks, write their outputs back into nbs/ and note their minutes; all by default.

    python tools/save_outputs.py [--scale laptop] [--jobs 2] [notebook ...]

A notebook that fails keeps its old outputs; the others go on, and the failures are listed at the
end (exit code 1)."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import nbformat

from llmpapers.core.cli import execute, keep_minutes, parameters_of, this_kernel
from llmpapers.core.scale import scale_names

root = Path(__file__).resolve().parents[1]


def places(folder):
    "Folders of this machine and what stands for them in outputs, the longest first"
    site = next((p for p in sys.path if p.endswith("site-packages")), None)
    found = {str(folder): "RUN", str(root): "CHECKOUT", str(Path.home()): "~"}
    if site:
        found[site] = "site-packages"
    found[str(Path(sys.prefix).resolve())] = found[sys.prefix] = "ENV"
    found[tempfile.gettempdir()] = "TMP"
    return sorted(found.items(), key=lambda item: -len(item[0]))


def scrubbed(value, names):
    "A value of an output without paths of this machine; images are left alone"
    if isinstance(value, str):
        for path, name in names:
            value = re.sub(rf"(?<![\w.:]){re.escape(path)}(?=[/\s'\"):,]|$)", name, value)
        return value
    if isinstance(value, list):
        return [scrubbed(v, names) for v in value]
    if isinstance(value, dict):
        return {
            k: v if k.startswith("image/") and k != "image/svg+xml" else scrubbed(v, names)
            for k, v in value.items()
        }
    return value


def executed(path, scale, kernel, folder):
    "The executed notebook and its minutes; ValueError with its first line if it fails"
    params = {}
    if any("parameters" in c.metadata.get("tags", []) for c in nbformat.read(path, 4).cells):
        params = dict(scale=scale) if "scale" in parameters_of(path) else {}
    out, start = Path(folder) / path.name, time.monotonic()
    if error := execute(path, out, params, kernel):
        raise ValueError(error)
    return nbformat.read(out, as_version=4), (time.monotonic() - start) / 60


def save(path, scale, kernel):
    "Take over outputs whose cells ran; everything else of the notebook stays as it is. Minutes"
    with tempfile.TemporaryDirectory() as folder:
        ran, minutes = executed(path, scale, kernel, folder)
        names = places(folder)
    cells = [c for c in ran.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    nb = nbformat.read(path, as_version=4)
    if [c.source for c in nb.cells] != [c.source for c in cells]:
        raise ValueError("the notebook changed while it ran")
    for old, new in zip(nb.cells, cells, strict=True):
        if old.cell_type == "code":
            old.outputs = [nbformat.from_dict(scrubbed(dict(o), names)) for o in new.outputs]
    tmp = path.with_name(f".{path.name}.tmp")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)
    clean = Path(sys.executable).with_name("nbdev_clean")
    subprocess.run([clean, "--fname", str(path)], check=True)
    keep_minutes(path, scale, minutes)
    return minutes


def attempt(path, scale, kernel):
    "Name and error of a notebook, None if it was saved: one that fails must not stop the others"
    name, error = os.path.relpath(path, root), None
    try:
        minutes = save(path, scale, kernel)
        print(f"{name}: {minutes:.1f} minutes", flush=True)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
        print(f"{name}: FAILED, {error}", flush=True)
    return name, error


def main(argv=None):
    "Command line"
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--scale", choices=scale_names, default="laptop", help="default: laptop")
    ap.add_argument("--jobs", type=int, default=1, help="notebooks at a time (default: 1)")
    ap.add_argument("notebooks", nargs="*", type=Path)
    args = ap.parse_args(argv)
    if args.jobs < 1:
        ap.error(f"--jobs {args.jobs} must be at least 1")
    found = (p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    paths = [p.resolve() for p in args.notebooks] or sorted(found)
    # pages 00 and the index gather what the others found, so they come last
    last = [p for p in paths if p.name.startswith(("00_", "index"))]
    failed = []
    with this_kernel() as kernel:
        for group in ([p for p in paths if p not in last], last):
            # processes, because papermill changes the working folder of its own
            with ProcessPoolExecutor(args.jobs) as pool:
                for name, error in pool.map(attempt, group, repeat(args.scale), repeat(kernel)):
                    failed += [f"{name}: {error}"] if error else []
    if failed:
        print(f"\n{len(failed)} of {len(paths)} failed:", *failed, sep="\n  ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
