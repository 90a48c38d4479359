"""Notebooks, folders and values as people have them: one line that names the file, exit status 1
or 2, nothing left behind"""

import json
import os

import pytest

from llmpapers.core.bench import bench_in
from llmpapers.core.claims import claims_in, read_cells
from llmpapers.core.cli import (
    execute,
    fingerprint,
    main,
    parameters_of,
    run_series,
    series_table,
    this_kernel,
)

pytestmark = pytest.mark.xdist_group("cli")


def written(path, *sources, parameters="scale = 'laptop'\nseed = 0"):
    "A notebook with a cell of parameters and others"
    cells = [dict(source=parameters, metadata=dict(tags=["parameters"]))]
    cells += [dict(source=s, metadata={}) for s in sources]
    form = dict(cell_type="code", outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name="python3", display_name="python3"))
    nb = dict(
        cells=[c | form | dict(id=f"c{i}") for i, c in enumerate(cells)],
        metadata=kernel,
        nbformat=4,
        nbformat_minor=5,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    "Two papers of one short notebook each, in a folder with braces and a number sign in its name"
    root = tmp_path / "my {x} #1" / "nbs"
    monkeypatch.setenv("LLMPAPERS_NBS", str(root))
    monkeypatch.chdir(tmp_path)
    for room in ("smec", "vamo"):
        written(root / room / "01_part.ipynb", "seed + 1")
    return root


def told(capsys, *args):
    "Exit status and the lines on both streams"
    status = main([str(a) for a in args])
    out = capsys.readouterr()
    assert "Traceback" not in out.err + out.out
    return status, out.out.splitlines(), out.err.strip().splitlines()


# ---- parameters ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source, want",
    [
        ('scale: str = "laptop"\nn: int = 3', dict(scale="laptop", n=3)),
        ("x = -1.5  # note\ny = None\nz = a = [1, (2, 3)]", dict(x=-1.5, y=None, z=0, a=0)),
        ("%matplotlib inline\nimport os\nfrom a import b\n!ls\nn = 1", dict(n=1)),
        ("", {}),
    ],
)
def test_parameters_in_the_forms_people_write(tmp_path, source, want):
    found = parameters_of(written(tmp_path / "01_a.ipynb", parameters=source))
    assert found.keys() == want.keys()
    assert all(found[k] == v for k, v in want.items() if v != 0)


@pytest.mark.parametrize(
    "source, what",
    [
        ("n = 2*3", "`n = 2 * 3` is not a literal"),
        ("a, b = 1, 2", "`a, b = (1, 2)` is not of the form"),
        ("n: int", "`n: int` is not of the form"),
        ("n = 1\nn += 1", "`n += 1` is not of the form"),
        ("if True:\n    n = 1", "is not of the form"),
        ("a.b = 1", "`a.b = 1` is not of the form"),
        ("n = (", "was never closed"),
    ],
)
def test_other_parameters_name_the_notebook(tmp_path, source, what):
    path = written(tmp_path / "01_a.ipynb", parameters=source)
    with pytest.raises(ValueError, match="01_a.ipynb, cell of the parameters") as e:
        parameters_of(path)
    assert what in str(e.value)


@pytest.mark.parametrize(
    "given, words",
    [
        (["-p", "scale=smoke"], "use --scale"),
        (["-p", "scale="], "use --scale"),
        (["-p", "seed="], "-p seed= must be a whole number"),
        (["-p", "seed=one"], "-p seed=one must be a whole number"),
        (["-p", "seed=1.5"], "-p seed=1.5 must be a whole number"),
        (["-p", "seed=True"], "-p seed=True must be a whole number"),
        (["-p", "seed=1", "-p", "seed=2"], "-p seed=... is given twice"),
        (["-p", "model=7"], "-p model=7 must be text"),
        (["-p", "rate=fast"], "-p rate=fast must be a number"),
        (["-p", "on=1"], "-p on=1 must be True or False"),
        (["-p", "x={[]: 1}"], "-p x=... is not a parameter"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_runs(rooms, capsys, given, words):
    source = "scale = 'laptop'\nseed = 0\nmodel = 'm'\nrate = 0.1\non = True\nfree = None"
    written(rooms / "smec" / "01_part.ipynb", parameters=source)
    status, out, err = told(capsys, "run", "smec", "--out", "out", *given)
    assert status == 2 and not out and len(err) == 1 and words in err[0]
    assert not os.path.exists("out")


# ---- damaged notebooks ---------------------------------------------------------------------------
BAD = {
    "empty": "",
    "cut": '{"cells": [{"cell_type": "code", ',
    "no cells": "{}",
    "not a table": "[]",
    "cells of another kind": '{"cells": [3]}',
    "a cell without source": '{"cells": [{"cell_type": "code"}]}',
}


@pytest.mark.slow
@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_a_damaged_notebook_is_named(rooms, capsys, text):
    "By every way in: the command's verbs and the functions below them"
    path = rooms / "smec" / "01_part.ipynb"
    path.write_text(text)
    for args in (
        ("list",),
        ("list", "smec"),
        ("claims", "smec"),
        ("run", "smec", "--scale", "smoke", "--out", "out"),
    ):
        status, _, err = told(capsys, *args)
        assert status == 2 and len(err) == 1 and "01_part.ipynb is not a notebook" in err[0], args
    assert not os.path.exists("out")
    for f in (
        read_cells,
        bench_in,
        claims_in,
        parameters_of,
        lambda p: fingerprint(p, {}),
        lambda p: series_table("smec", {"01_part": "?"}),
        lambda p: execute(p, rooms / "x.ipynb", {}, "none"),
    ):
        with pytest.raises(ValueError, match="smec/01_part.ipynb is not a notebook"):
            f(path)


def test_damaged_minutes_and_records_are_named(rooms, capsys):
    from llmpapers.core.artifacts import load_record

    (rooms / "minutes.json").write_text("{")
    status, _, err = told(capsys, "list", "smec")
    assert status == 2 and len(err) == 1 and "minutes.json is damaged" in err[0]
    record = rooms / "smec" / "recorded" / "study.json"
    record.parent.mkdir()
    for text in ("", "[1]", "3"):
        record.write_text(text)
        with pytest.raises(ValueError, match="the record study.json of smec"):
            load_record("smec", "study")


@pytest.mark.slow
# ---- runs ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_in_a_folder_with_braces_and_number_signs(rooms, capsys):
    out = rooms.parent / "out {scale} {} #2"
    status, lines, _ = told(capsys, "run", "smec", "--scale", "smoke", "-p", "seed=4", "--out", out)
    assert status == 0
    assert {p.name for p in out.iterdir()} == {
        ".lock",
        "01_part.ipynb",
        "01_part.html",
        "report.html",
        "run.json",
    }
    (value,) = [
        c["outputs"] for c in read_cells(out / "01_part.ipynb") if c["source"] == "seed + 1"
    ]
    assert "".join(value[0]["data"]["text/plain"]) == "5"
    status, lines, _ = told(capsys, "run", "smec", "--scale", "smoke", "-p", "seed=4", "--out", out)
    assert status == 0 and "01_part: unchanged, kept" in lines
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    status, _, err = told(capsys, "run", "vamo", "--scale", "smoke", "--out", out)
    assert status == 2 and len(err) == 1 and "holds a run of smec" in err[0]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, words, kept",
    [
        ("import os; os._exit(9)", "DeadKernelError", False),
        ("raise ValueError('first line\\nsecond')", "ValueError: first line", True),
        ("class E(Exception): pass\nraise E", "E: no message", True),
    ],
)
def test_a_notebook_that_fails_is_one_line(rooms, capsys, source, words, kept):
    written(rooms / "smec" / "01_part.ipynb", source)
    status, _, err = told(capsys, "run", "smec", "--scale", "smoke", "--out", "out")
    (line,) = [x for x in err if x.startswith("llmpapers:")]
    assert status == 1 and words in line and "01_part" in line
    left = {p for p in os.listdir("out") if p != ".lock"}
    assert left == ({"01_part.failed.ipynb"} if kept else set())


def test_a_notebook_that_nbformat_refuses_is_one_line(tmp_path):
    path = written(tmp_path / "01_a.ipynb", "1")
    nb = json.loads(path.read_text())
    path.write_text(json.dumps(nb | dict(nbformat="four")))
    (tmp_path / "out").mkdir()
    with this_kernel() as kernel:
        error = execute(path, tmp_path / "out" / "01_a.ipynb", {}, kernel)
    assert error and "\n" not in error and "01_a.ipynb" in error
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written(rooms, capsys):
    "A folder that exists and takes no files; and one below a file"
    (rooms.parent / "file").write_text("")
    for out in ("/proc/self", rooms.parent / "file" / "out"):
        status, _, err = told(capsys, "run", "smec", "--scale", "smoke", "--out", out)
        assert status == 2 and len(err) == 1 and str(out) in err[0]


def test_other_faults_of_the_disk_are_one_line(rooms, capsys, monkeypatch):
    import llmpapers.core.cli as module

    def full(*args):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(module, "run_series", full)
    status, _, err = told(capsys, "run", "smec", "--out", "out")
    assert status == 2 and err == ["llmpapers: report.html: No space left on device"]


def test_two_runs_at_once_on_one_folder(rooms):
    from filelock import FileLock

    out = rooms.parent / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        with pytest.raises(ValueError, match="is in use by another run"):
            run_series([rooms / "smec" / "01_part.ipynb"], out, "smoke")
