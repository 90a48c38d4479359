"Studies on record, the minutes of notebooks, and what a long cell says while it runs"

import io
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import nbs, root
from llmpapers.core.artifacts import Record, load_record, record, recorded_names, within
from llmpapers.core.cli import Minutes, Progress, keep_minutes, minutes_of, papers, series

STUDY = dict(scale="desk", command="llmpapers run demo", seeds=[0, 1, 2], sizes=dict(steps=3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_NBS", str(tmp_path))
    return tmp_path


def test_a_record_comes_back_as_it_was_written(folder):
    made = record("demo", "study", dict(gain=[1.0, 2.0, 4.0]), **STUDY)
    assert load_record("demo", "study") == made and recorded_names("demo") == ["study"]
    assert made.hardware["processor"] and made.hardware["cores"] and made.commit and made.made
    assert not list((folder / "demo" / "recorded").glob("*.tmp"))


def test_records_are_found_from_any_folder(tmp_path):
    "The committed records load from wherever a command is started"
    code = (
        "from llmpapers.core.artifacts import load_record, recorded_names\n"
        "assert [load_record('benchmarks', n) for n in recorded_names('benchmarks')]"
    )
    env = {k: v for k, v in os.environ.items() if k != "LLMPAPERS_NBS"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(nbs.glob("*/recorded/*.json")), ids=lambda p: p.stem)
def test_committed_records_are_whole(path):
    kept = load_record(path.parents[1].name, path.stem)
    assert isinstance(kept, Record) and kept.paper in {*papers, "benchmarks"}
    assert kept.results and kept.command and kept.commit and kept.hardware


@given(st.lists(st.floats(-10, 10, allow_nan=False), min_size=3, max_size=9))
def test_every_recorded_seed_is_within_its_record(values):
    kept = Record("demo", "s", "desk", "x", [], {}, dict(gain=values), "", {}, "")
    assert all(within(kept, v, "gain") for v in values)
    far = max(values) + 0.2 * (max(values) - min(values)) + 1e-3
    assert not within(kept, far, "gain") and not within(kept, float("nan"), "gain")


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: record("demo", "../x", dict(a=1), **STUDY), "lower case"),
        (lambda: record("../demo", "x", dict(a=1), **STUDY), "lower case"),
        (lambda: record("demo", "x", {}, **STUDY), "must hold something"),
        (lambda: record("demo", "x", dict(a=[1, [float("inf")]]), **STUDY), "finite"),
        (lambda: load_record("demo", "x"), "it has: none"),
    ],
)
def test_bad_records_are_refused(folder, bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


def test_a_record_that_lacks_a_field_says_which(folder):
    record("demo", "study", dict(gain=[1.0]), **STUDY)
    path = folder / "demo" / "recorded" / "study.json"
    data = json.loads(path.read_text())
    del data["commit"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="lacks commit"):
        load_record("demo", "study")


def _keep(folder, i):
    os.environ["LLMPAPERS_NBS"] = str(folder)
    keep_minutes(folder / "demo" / f"{i:02d}_x.ipynb", "laptop", i)


def test_minutes_of_several_processes_all_arrive(folder):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(_keep, [(folder, i) for i in range(1, 7)])
    found = [minutes_of(folder / "demo" / f"{i:02d}_x.ipynb") for i in range(1, 7)]
    assert [m.minutes for m in found] == [1, 2, 3, 4, 5, 6] and all(m.cores >= 1 for m in found)
    assert minutes_of(folder / "demo" / "07_x.ipynb") is None
    assert minutes_of(folder / "demo" / "01_x.ipynb", "gpu") is None


class Log(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_the_cell_that_runs(terminal):
    log = Log(terminal)
    with Progress("01_demo", 9, Minutes(2.0, 2), every=0.1, stream=log) as progress:
        progress.cell(3, "#| hide\n\nmodel = train(x)\nmodel")
        time.sleep(0.55)
    text = log.getvalue()
    assert text.count("01_demo: cell 4 of 9, 0:00 of about 2:00: model = train(x)") >= 3
    assert text.endswith("\r\x1b[K") if terminal else ("\r" not in text and text.endswith("\n"))
    time.sleep(0.3)
    assert log.getvalue() == text, "it still talks after its end"


def test_progress_refuses_a_bad_interval():
    with pytest.raises(ValueError, match="every=0"):
        Progress("x", 1, every=0)


@pytest.mark.slow
def test_save_outputs_goes_on_after_a_failure(tmp_path):
    "One notebook fails: it keeps its outputs, the others are saved and measured, paths are hidden"
    room = tmp_path / "nbs" / "demo"
    room.mkdir(parents=True)
    sources = dict(
        a="import os, tempfile\nprint(os.getcwd(), tempfile.gettempdir() + '/x')",
        b="1 / 0",
        c="'third'",
    )
    for name, source in sources.items():
        cell = dict(cell_type="code", id=name, metadata={}, source=source, outputs=[])
        nb = dict(cells=[cell | dict(execution_count=None)], metadata={}, nbformat=4)
        (room / f"0{name}.ipynb").write_text(json.dumps(nb | dict(nbformat_minor=5)))
    env = os.environ | dict(LLMPAPERS_NBS=str(tmp_path / "nbs"))
    command = [sys.executable, root / "tools" / "save_outputs.py", "--jobs", "2"]
    paths = sorted(room.glob("*.ipynb"))
    done = subprocess.run([*command, *paths], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "1 of 3 failed" in done.stdout, done.stdout + done.stderr
    assert "ZeroDivisionError" in done.stdout
    first, second, third = (json.loads(p.read_text())["cells"][0]["outputs"] for p in paths)
    assert "".join(first[0]["text"]) == "RUN TMP/x\n" and second == [] and third
    kept = json.loads((tmp_path / "nbs" / "minutes.json").read_text())["laptop"]
    assert sorted(kept) == ["demo/0a", "demo/0c"]


def test_paper_pages_show_the_minutes_that_were_measured():
    "The series table of a page holds every notebook, with the minutes of `minutes.json`"
    for slug in papers:
        for page in series(slug)[:1]:
            cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
            texts = [
                "".join(o["data"]["text/markdown"])
                for c in cells
                for o in c.get("outputs", [])
                if "text/markdown" in o.get("data", {})
            ]
            (table,) = [t for t in texts if t.startswith("| notebook | question |")]
            for p in series(slug)[1:]:
                (row,) = [line for line in table.splitlines() if f"({p.name})" in line]
                known = minutes_of(p)
                text = "" if known is None else f"{known.minutes:.1f}"
                text = "< 0.1" if known and known.minutes < 0.1 else text
                assert row.split("|")[-2].strip() == text, f"run {page} again: {row}"
