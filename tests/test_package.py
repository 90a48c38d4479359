"The wheel and the source archive are complete, and the wheel works where no extra is installed"

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from common import notebooks, root

pytestmark = [pytest.mark.xdist_group("package"), pytest.mark.build, pytest.mark.timeout(1500)]
ABSENT = "ray vllm jupyterlab playwright bm25s fastapi nbdev pytest".split()


def clean_env(**kw):
    "An environment in which nothing of this checkout can be imported"
    return {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    } | kw


def run(cmd, **kw):
    r = subprocess.run(
        [str(c) for c in cmd], capture_output=True, text=True, **{"env": clean_env(), **kw}
    )
    assert r.returncode == 0, (
        f"{' '.join(str(c) for c in cmd)}\n{r.stdout[-3000:]}\n{r.stderr[-3000:]}"
    )
    return r.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Source archive, and the wheel made from it, of a copy of the tree"
    from test_style import copy_of_tree

    tmp = tmp_path_factory.mktemp("build")
    copy_of_tree(tmp / "src")
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", tmp / "src"],
        cwd=tmp,
    )
    (wheel,) = (tmp / "dist").glob("*.whl")
    (sdist,) = (tmp / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_wheel_has_notebooks_and_data(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    missing = [p.as_posix() for p in notebooks() if f"llmpapers/_nbs/{p.as_posix()}" not in names]
    assert not missing, f"notebooks missing from the wheel: {missing}"
    files = [
        p.relative_to(root).as_posix()
        for d in ("llmpapers",)
        for p in (root / d).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    missing = [f for f in files if f not in names]
    assert not missing, f"files missing from the wheel: {missing}"
    extra = [
        n
        for n in names
        if n.split("/")[0] not in ("llmpapers",) and ".dist-info" not in n.split("/")[0]
    ]
    assert not extra, f"the wheel installs more than the package: {extra}"
    assert not [n for n in names if ".ipynb_checkpoints" in n or n.endswith(".pyc")]


def test_sdist_is_complete(built):
    "A wheel can be built from the archive alone (it was), and the archive has what that needs"
    names = {"/".join(n.split("/")[1:]) for n in tarfile.open(built[1]).getnames()}
    kept = {p.relative_to(root).as_posix() for p in (root / "nbs").glob("*/recorded/*.json")}
    need = {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "nbs/minutes.json"} | kept
    need |= {f"nbs/{p.as_posix()}" for p in notebooks()}
    assert need <= names, sorted(need - names)


def test_metadata(built):
    z = zipfile.ZipFile(built[0])
    meta = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    points = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "llmpapers = llmpapers.core.cli:main" in points
    for extra in ("ray", "vllm", "lab", "search", "web", "dev", "all"):
        assert f"Provides-Extra: {extra}\n" in meta, extra
    base = [
        line
        for line in meta.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert base and not [
        line for line in base for a in ABSENT if line.split()[1].lower().startswith(a)
    ], base
    assert not [line for line in base if "==" in line], (
        f"the wheel pins a version; pins belong into constraints.txt: {base}"
    )


@pytest.fixture(scope="module")
def venv(built, tmp_path_factory):
    "A fresh environment with torch, the wheel and its base requirements, and nothing else"
    dst = tmp_path_factory.mktemp("env") / "venv"
    run([sys.executable, root / "tools" / "setup_env.py", "--torch-only", "--venv", dst])
    py = dst / "bin" / "python"
    run([py, "-m", "pip", "install", "-q", "-c", root / "constraints.txt", built[0]])
    yield dst
    import shutil

    shutil.rmtree(dst, ignore_errors=True)


def test_extras_are_absent_and_modules_import(venv, tmp_path):
    "Every module imports without any extra, from the installed package"
    code = (
        "import importlib.util, json, pkgutil, llmpapers\n"
        'found = pkgutil.walk_packages(llmpapers.__path__, "llmpapers.")\n'
        'names = [m.name for m in found if "_nbs" not in m.name]\n'
        "for n in names: __import__(n)\n"
        f"there = [m for m in {ABSENT} if importlib.util.find_spec(m)]\n"
        "print(json.dumps([llmpapers.__file__, names, there]))"
    )
    where, names, present = json.loads(
        run([venv / "bin" / "python", "-c", code], cwd=tmp_path).splitlines()[-1]
    )
    assert Path(where).is_relative_to(venv), where
    assert present == [], f"the environment is not bare: {present}"
    ours = {
        ".".join(("llmpapers", *p.relative_to(root / "llmpapers").with_suffix("").parts))
        for p in (root / "llmpapers").rglob("*.py")
        if p.name not in ("__init__.py",)
    }
    assert ours <= set(names), sorted(ours - set(names))


def test_pip_check(venv):
    run([venv / "bin" / "python", "-m", "pip", "check"])


def test_list_works_from_the_wheel(venv, tmp_path):
    rooms = sorted(
        {p.parts[0] for p in notebooks() if len(p.parts) > 1} - {"core", "rl", "benchmarks"}
    )
    out = run([venv / "bin" / "llmpapers", "list"], cwd=tmp_path)
    for r in rooms:
        assert r in out, f"{r} is not in the output of llmpapers list\n{out}"


def test_records_and_minutes_are_in_the_wheel(venv, tmp_path):
    "What was recorded is found inside the installed package, from any folder"
    code = (
        "from llmpapers.core.artifacts import load_record, recorded_names\n"
        "from llmpapers.core.cli import minutes_of, series\n"
        "print([load_record('benchmarks', n).name for n in recorded_names('benchmarks')])\n"
        "print(any(minutes_of(p) for p in series('core')))"
    )
    env = clean_env()
    names, measured = run([venv / "bin" / "python", "-c", code], cwd=tmp_path, env=env).splitlines()
    expected = sorted(p.stem for p in (root / "nbs/benchmarks/recorded").glob("*.json"))
    assert names == str(expected) and measured == "True"


def test_lab_names_its_extra(venv, tmp_path):
    "Without JupyterLab the command says in one line which extra to install"
    r = subprocess.run(
        [venv / "bin" / "llmpapers", "lab", "--no-browser"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_env(),
        timeout=120,
    )
    assert r.returncode == 2, r
    lines = r.stderr.strip().splitlines()
    assert len(lines) == 1 and "llmpapers[lab]" in lines[0], r.stderr


def test_a_notebook_runs_from_the_wheel(venv, tmp_path):
    "`llmpapers run` executes the notebooks that the wheel carries"
    rooms = sorted(
        {p.parts[0] for p in notebooks() if len(p.parts) > 1} - {"core", "rl", "benchmarks"}
    )
    if not rooms:
        pytest.skip("no paper has notebooks yet")
    nb = next(p for p in notebooks() if p.parts[0] == rooms[0] and p.stem.startswith("01_"))
    run(
        [
            venv / "bin" / "llmpapers",
            "run",
            rooms[0],
            "--nb",
            "01",
            "--scale",
            "smoke",
            "--out",
            tmp_path / "out",
        ],
        cwd=tmp_path,
        env=clean_env(LLMPAPERS_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1"),
        timeout=600,
    )
    assert list((tmp_path / "out").rglob(nb.name)), f"no {nb.name} under --out"
