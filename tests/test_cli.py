"The `llmpapers` command: what it prints, what it refuses and how, and how it stops"

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from common import notebooks, root

pytestmark = pytest.mark.xdist_group("cli")
ROOMS = sorted({p.parts[0] for p in notebooks() if len(p.parts) > 1} - {"core", "rl", "benchmarks"})
PAPER = "attention_rhythm" if "attention_rhythm" in ROOMS else next(iter(ROOMS), None)
CMD = [
    sys.executable,
    "-c",
    "import sys; from llmpapers.core.cli import main; sys.exit(main())",
]  # what the console script does
COMMANDS = ["list", "run", "claims", "bench", "lab"]
needs_paper = pytest.mark.skipif(PAPER is None, reason="no paper has notebooks yet")


def cli(*args, cwd=None, timeout=600, env=None):
    return subprocess.run(
        CMD + [str(a) for a in args],
        capture_output=True,
        text=True,
        cwd=cwd or root.parent,
        timeout=timeout,
        env=os.environ | (env or {}),
    )


def refused(r, *words):
    "Exit code 2, nothing on standard output, one line on stderr that names what is wrong"
    lines = r.stderr.strip().splitlines()
    assert r.returncode == 2, f"exit code {r.returncode}\n{r.stdout}\n{r.stderr}"
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{r.stderr}"
    assert not r.stdout.strip(), r.stdout
    for w in words:
        assert str(w) in lines[0], f"{w!r} is not named: {lines[0]}"


def numbers(paper):
    return [p.stem[:2] for p in notebooks() if p.parts[0] == paper]


# ---- help and listing ----------------------------------------------------------------------------
def test_help():
    r = cli("--help")
    assert r.returncode == 0 and not r.stderr, r
    for c in COMMANDS:
        assert re.search(rf"\b{c}\b", r.stdout), f"{c} is not in the help"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    r = cli(command, "--help")
    assert r.returncode == 0 and not r.stderr, r
    assert f"llmpapers {command}" in r.stdout
    for option in dict(
        run=["--nb", "--scale", "-p", "--out", "--every"],
        claims=["--json"],
        bench=["--json", "--every"],
        lab=["--port", "--no-browser"],
    ).get(command, []):
        assert option in r.stdout, f"{option} is not in the help of {command}"


def test_help_is_quick_to_load():
    "Help loads no framework"
    code = (
        CMD[2].replace("sys.exit(main())", "")
        + '\ntry: main(["--help"])\nexcept SystemExit: pass\n'
        + 'heavy = ("torch", "transformers", "papermill", "matplotlib")\n'
        + "print([m for m in heavy if m in sys.modules])"
    )
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root.parent
    )
    assert r.stdout.strip().splitlines()[-1] == "[]", r


def test_list():
    r = cli("list")
    assert r.returncode == 0 and not r.stderr, r
    for room in ROOMS:
        assert room in r.stdout


def test_list_has_titles_and_lines():
    "Each paper with its number, its exact title and what it is about"
    from llmpapers.core.cli import papers

    out = cli("list").stdout
    for slug, paper in papers.items():
        assert slug in out and paper.arxiv in out and paper.title in out and paper.line in out


@needs_paper
def test_list_of_a_paper_shows_minutes():
    r = cli("list", PAPER)
    assert r.returncode == 0 and not r.stderr, r
    kept = json.loads((root / "nbs" / "minutes.json").read_text(encoding="utf-8"))["laptop"]
    for p in notebooks():
        if p.parts[0] != PAPER:
            continue
        (line,) = [x for x in r.stdout.splitlines() if x.startswith(p.stem + " ")]
        assert (line.split()[1] == "-") == (f"{PAPER}/{p.stem}" not in kept), line
    refused(cli("list", "nopaper"), "nopaper")


def slow_series(tmp_path, seconds):
    "A paper of one notebook whose last cell sleeps"
    room = tmp_path / "nbs" / "smec"
    room.mkdir(parents=True)
    cells = [
        dict(source="scale = 'laptop'", metadata=dict(tags=["parameters"])),
        dict(source=f"#| hide\nimport time\ntime.sleep({seconds})", metadata={}),
    ]
    common = dict(cell_type="code", outputs=[], execution_count=None)
    nb = dict(
        cells=[c | common | dict(id=str(i)) for i, c in enumerate(cells)],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3")),
        nbformat=4,
        nbformat_minor=5,
    )
    (room / "01_slow.ipynb").write_text(json.dumps(nb))
    minutes = dict(smoke={"smec/01_slow": dict(minutes=2.5, cores=2)})
    (tmp_path / "nbs" / "minutes.json").write_text(json.dumps(minutes))
    return dict(LLMPAPERS_NBS=str(tmp_path / "nbs"))


@pytest.mark.slow
def test_a_log_hears_from_a_long_cell(tmp_path):
    "Plain lines, at the interval asked for: notebook, cell, first line, elapsed and expected time"
    env = slow_series(tmp_path, 4)
    args = ("run", "smec", "--scale", "smoke", "--out", tmp_path / "out", "--every", "0.5")
    r = cli(*args, env=env)
    assert r.returncode == 0, r.stderr
    heard = [x for x in r.stderr.splitlines() if x.endswith(": import time")]
    assert len(heard) >= 4 and "\r" not in r.stderr, r.stderr
    for line in heard:
        assert re.fullmatch(r"01_slow: cell 3 of 3, \d+:\d\d of about 2:30: import time", line), (
            line
        )
    assert "about 2.5 minutes" in r.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_one_line_that_changes(tmp_path):
    import pty

    env, (ours, theirs) = os.environ | slow_series(tmp_path, 4), pty.openpty()
    args = ["run", "smec", "--scale", "smoke", "--out", str(tmp_path / "out")]
    p = subprocess.Popen(
        CMD + args, stdout=subprocess.DEVNULL, stderr=theirs, env=env, cwd=root.parent
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert p.wait(60) == 0
    text = seen.decode()
    assert text.count("\r\x1b[K01_slow: cell 3 of 3") >= 2 and text.endswith("\r\x1b[K"), text


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_bad_interval_is_refused(command):
    args = [PAPER] if command == "run" else []
    refused(cli(command, *args, "--every", "0"), "--every")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_benchmark_on_record_runs_from_any_folder(tmp_path):
    "It shows what is on record though no checkout of the peer is given; progress goes to stderr"
    env = dict(LLMPAPERS_AUCTIONNET="")
    r = cli(
        "bench",
        "auctionnet",
        "--scale",
        "smoke",
        "--json",
        "--out",
        tmp_path,
        cwd=tmp_path,
        env=env,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    (row,) = json.loads(r.stdout)["auctionnet"]
    assert "on record" in row["peer"] and row["ours"] > 0 and row["theirs"] > 0


def test_no_command_points_to_the_help():
    refused(cli(), "COMMAND", "--help")


# ---- claims --------------------------------------------------------------------------------------
def claims_of_outputs():
    "Claims in the committed outputs, read without the library"
    found = {}
    for rel in notebooks():
        if rel.parts[0] not in ROOMS:
            continue
        for c in json.loads((root / "nbs" / rel).read_text(encoding="utf-8"))["cells"]:
            for o in c.get("outputs", []):
                for d in o.get("data", {}).get("application/vnd.llmpapers.claims+json", []):
                    found[d["paper"], d["key"]] = d
    return found


def test_claims_json():
    r = cli("claims", "--json")
    assert r.returncode == 0, r
    got = json.loads(r.stdout)
    assert {(c["paper"], c["key"]): c["verdict"] for c in got} == {
        k: c["verdict"] for k, c in claims_of_outputs().items()
    }


@needs_paper
def test_claims_of_a_paper():
    got = json.loads(cli("claims", PAPER, "--json").stdout)
    assert {c["paper"] for c in got} <= {PAPER}
    text = cli("claims", PAPER)
    assert text.returncode == 0, text
    for c in got:
        assert c["verdict"] in text.stdout


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "args, words",
    [
        (["nonsense"], ["nonsense"]),
        (["run", "nopaper"], ["nopaper"]),
        (["claims", "nopaper"], ["nopaper"]),
        (["bench", "nobench"], ["nobench"]),
        (["list", "extra"], ["extra"]),
        (["run"], ["PAPER"]),
        (["lab", "--port", "many"], ["many"]),
    ],
    ids=" ".join,
)
def test_bad_words(args, words):
    refused(cli(*args), *words)


@needs_paper
@pytest.mark.parametrize(
    "args, words",
    [
        (["--scale", "huge"], ["huge", "smoke"]),
        (["--nb", "99"], ["99"]),
        (["--nb", "x y"], ["x y"]),
        (["-p", "steps"], ["steps"]),
        (["-p", "=3"], ["=3"]),
        (["-p", "no_such_parameter=1"], ["no_such_parameter"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
    ids=" ".join,
)
def test_bad_options_of_run(tmp_path, args, words):
    r = cli(
        "run",
        PAPER,
        *(["--scale", "smoke"] if "--scale" not in args else []),
        "--out",
        tmp_path / "out",
        *args,
    )
    refused(r, *words)
    assert not list(tmp_path.rglob("*.ipynb")), "something was run before the input was checked"


@needs_paper
def test_bad_out(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused(cli("run", PAPER, "--scale", "smoke", "--out", tmp_path / "file"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


# ---- run -----------------------------------------------------------------------------------------
@pytest.mark.notebook
@needs_paper
@pytest.mark.timeout(600)
def test_run_one_notebook(tmp_path):
    "Executes it, writes the executed notebook and the report, and leaves the source as it is"
    (src,) = [p for p in notebooks() if p.parts[0] == PAPER and p.stem.startswith("01_")]
    before = (root / "nbs" / src).read_bytes()
    r = cli(
        "run", PAPER, "--nb", "01", "--scale", "smoke", "-p", "seed=1", "--out", tmp_path / "out"
    )
    assert r.returncode == 0, f"{r.stdout}\n{r.stderr[-3000:]}"
    (done,) = (tmp_path / "out").rglob(src.name)
    nb = json.loads(done.read_text(encoding="utf-8"))
    injected = [
        "".join(c["source"])
        for c in nb["cells"]
        if "injected-parameters" in c["metadata"].get("tags", [])
    ]
    assert len(injected) == 1 and '"smoke"' in injected[0] and "seed = 1" in injected[0], injected
    assert any(c.get("outputs") for c in nb["cells"]) and not [
        o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"
    ]
    assert list((tmp_path / "out").rglob("*.html")), "no HTML report"
    assert (root / "nbs" / src).read_bytes() == before


def children_of(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.notebook
@needs_paper
@pytest.mark.timeout(900)
def test_interrupt_and_rerun(tmp_path):
    """Ctrl-C ends a run at once with code 130 and one line, leaves no process behind, and the same
    command goes on where it was"""
    out, log = tmp_path / "out", tmp_path / "log"
    names = [p.name for p in notebooks() if p.parts[0] == PAPER and not p.stem.startswith("00_")][
        :2
    ]
    args = [
        "run",
        PAPER,
        *(x for n in names for x in ("--nb", n[:2])),
        "--scale",
        "smoke",
        "--out",
        str(out),
    ]
    with open(log, "w") as f:
        p = subprocess.Popen(
            CMD + args, stdout=f, stderr=subprocess.STDOUT, cwd=root.parent, start_new_session=True
        )
    seen, t0, ready = {}, time.time(), False
    while (
        p.poll() is None and time.time() - t0 < 400 and not ready
    ):  # until the last of them has a kernel
        seen |= {c.pid: c for c in children_of(p.pid)}
        ready = all((out / n).exists() for n in names[:-1]) and any(
            "ipykernel" in " ".join(cmdline(c)) for c in children_of(p.pid)
        )
        time.sleep(0.2)
    assert ready and p.poll() is None, (
        f"the run ended before it could be interrupted:\n{log.read_text()}"
    )
    time.sleep(2)  # in the middle of it
    seen |= {c.pid: c for c in children_of(p.pid)}
    os.killpg(p.pid, signal.SIGINT)  # what a terminal does
    try:
        code = p.wait(30)
    except subprocess.TimeoutExpired:
        p.kill()
        pytest.fail(f"still running 30 s after Ctrl-C\n{log.read_text()}")
    text = log.read_text()
    assert code == 130 and "Traceback" not in text and "interrupted" in text.splitlines()[-1], (
        f"exit code {code}\n{text[-3000:]}"
    )
    _, alive = psutil.wait_procs(list(seen.values()), timeout=10)
    alive = [c for c in alive if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"left running: {[' '.join(cmdline(c))[:150] for c in alive]}"
    assert not (out / names[-1]).exists(), "the notebook that was interrupted counts as finished"
    stamps = {n: (out / n).stat().st_mtime_ns for n in names[:-1]}
    r = cli(*args, timeout=600)
    assert r.returncode == 0, f"the rerun failed\n{r.stdout[-2000:]}\n{r.stderr[-3000:]}"
    assert all((out / n).exists() for n in names)
    assert {n: (out / n).stat().st_mtime_ns for n in stamps} == stamps, (
        "a notebook that was finished ran again"
    )


def cmdline(proc):
    try:
        return proc.cmdline()
    except psutil.Error:
        return []
