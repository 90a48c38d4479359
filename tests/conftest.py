"""What all tests share: a quiet, offline environment, a kernel for this interpreter, and a summary
of times and skips"""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
durations_file = root / "tests" / "durations.json"
KERNEL = "llmpapers-test"
GROUPS = ("package", "browser", "lab")  # started first: each is one long job


def pytest_addoption(parser):
    parser.addoption(
        "--update-durations",
        action="store_true",
        default=bool(os.environ.get("UPDATE_DURATIONS")),
        help="write the CPU seconds of the notebooks that passed to tests/durations.json",
    )


def is_worker(config):
    return hasattr(config, "workerinput")


def pytest_configure(config):
    """One private folder per run for the cache, the kernel and the configuration of Jupyter;
    workers inherit it"""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # nohup and background jobs ignore Ctrl-C, which some tests send
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "xdist_group(name): tests of one group run on one worker"
    )  # without xdist too
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # keep the order made below
    if is_worker(config):
        return
    config.run_folder = Path(tempfile.mkdtemp(prefix="llmpapers-tests-"))
    os.environ["LLMPAPERS_TEST_FOLDER"] = str(config.run_folder)
    kernel = config.run_folder / "jupyter" / "kernels" / KERNEL
    kernel.mkdir(parents=True)
    launcher = str(root / "tests" / "warm_kernel.py")
    argv = [sys.executable, "-I", "-S", launcher, "launch", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps(dict(argv=argv, display_name=KERNEL, language="python"))
    )
    for k in ("jupyter_config", "ipython"):
        (config.run_folder / k).mkdir()
    paths = [str(root)] + [
        p
        for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if p and os.path.isabs(p) and Path(p) != root
    ]
    os.environ.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        VLLM_NO_USAGE_STATS="1",
        RAY_USAGE_STATS_ENABLED="0",
        PYTHONPATH=os.pathsep.join(paths),
        JUPYTER_CONFIG_DIR=str(config.run_folder / "jupyter_config"),
        IPYTHONDIR=str(config.run_folder / "ipython"),
        LLMPAPERS_CACHE=os.environ.get("LLMPAPERS_TEST_CACHE") or str(config.run_folder / "cache"),
        JUPYTER_PATH=os.pathsep.join(
            [str(config.run_folder / "jupyter")]
            + [p for p in [os.environ.get("JUPYTER_PATH")] if p]
        ),
    )
    for k in ("PYTHONSTARTUP", "MPLBACKEND"):
        os.environ.pop(k, None)  # kernels draw inline, as they do for a reader


def pytest_collection_finish(session):
    """What test modules imported stays until the end, so collections need not walk through it:
    statsmodels collects at every call, a controller at every run"""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()
    if not is_worker(config) and hasattr(config, "run_folder"):
        shutil.rmtree(config.run_folder, ignore_errors=True)


def group_of(item):
    "Name in `@pytest.mark.xdist_group(name)`, or None"
    mark = item.get_closest_marker("xdist_group")
    return None if mark is None else mark.args[0] if mark.args else mark.kwargs["name"]


def pytest_collection_modifyitems(config, items):
    "Long groups first, then notebooks from the slowest to the fastest, then the rest"

    def place(item):
        if group_of(item) in GROUPS:
            return 0, GROUPS.index(group_of(item))
        return (1, 0) if item.module.__name__.endswith("test_notebooks") else (2, 0)

    items.sort(key=place)  # stable: test_notebooks.py orders its own
    if is_worker(config):  # for the scheduler below, in the process that starts the workers
        dst = Path(os.environ["LLMPAPERS_TEST_FOLDER"]) / "groups.json"
        tmp = dst.with_suffix(f".{os.getpid()}")
        tmp.write_text(json.dumps({i.nodeid: g for i in items if (g := group_of(i))}))
        os.replace(tmp, dst)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` with its groups taken from a file: pytest 9.2 ignores the suffix by which
    xdist 3.8 passes them"""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Groups(LoadGroupScheduling):
        known = None

        def _split_scope(self, nodeid):
            if self.known is None:
                self.known = json.loads((config.run_folder / "groups.json").read_text())
            return self.known.get(nodeid) or super()._split_scope(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session")
def kernel():
    """Name of a kernel that runs this interpreter, whatever is installed on the machine; it is
    forked from a process that has done the heavy imports"""
    from warm_kernel import start_server

    path = os.path.join(os.environ["LLMPAPERS_TEST_FOLDER"], f"kernels-{os.getpid()}")
    server = start_server(path, dict(os.environ))
    os.environ["LLMPAPERS_WARM_KERNELS"] = path
    yield KERNEL
    del os.environ["LLMPAPERS_WARM_KERNELS"]
    server.terminate()
    server.wait()


def pytest_terminal_summary(terminalreporter, config):
    "Times of the ten slowest notebooks, and every skip with its reason"
    tr, rows, skips = terminalreporter, {}, []
    for kind in ("passed", "failed", "skipped", "error"):
        for rep in tr.stats.get(kind, []):
            props = dict(getattr(rep, "user_properties", []))
            if "notebook" in props and rep.when == "call":
                rows[props["notebook"]] = (props["cpu"], props["wall"], kind)
            if kind == "skipped":
                why = rep.longrepr[2] if isinstance(rep.longrepr, tuple) else str(rep.longrepr)
                skips.append(f"{rep.nodeid}: {why.removeprefix('Skipped: ')}")
    if rows:
        total = sum(c for c, _, _ in rows.values())
        tr.section(f"{len(rows)} notebooks, {total:.0f} s of CPU time; the slowest")
        tr.write_line(f"{'CPU s':>7} {'wall s':>7}  notebook")
        for nb, (cpu, wall, kind) in sorted(rows.items(), key=lambda r: -r[1][0])[:10]:
            tr.write_line(
                f"{cpu:7.1f} {wall:7.1f}  {nb}" + ("" if kind == "passed" else f"  ({kind})")
            )
    tr.section(f"{len(skips)} skipped" if skips else "nothing skipped")
    for s in skips:
        tr.write_line(s)
    if rows and config.getoption("--update-durations"):
        old = json.loads(durations_file.read_text()) if durations_file.exists() else {}
        new = old | {nb: round(cpu, 1) for nb, (cpu, _, kind) in rows.items() if kind == "passed"}
        new = {nb: new[nb] for nb in sorted(new) if (root / "nbs" / nb).exists()}
        durations_file.write_text(json.dumps(new, indent=1) + "\n")
        tr.write_line(f"wrote {durations_file.relative_to(root)}")
