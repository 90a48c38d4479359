"The test suite's own machinery: groups, order, the summary, and the measure of CPU time"

import os
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from jupyter_client.manager import KernelManager

from common import Processes, machine_traces, root

pytestmark = pytest.mark.slow

SAMPLE = """
import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(6))
def test_one(i):
    pass


@pytest.mark.parametrize("i", range(4))
def test_free(i, record_property):
    for k, v in dict(notebook=f"room/{i:02}.ipynb", cpu=float(i), wall=2.0 * i).items():
        record_property(k, v)


@pytest.mark.skip(reason="no such thing here")
def test_skipped():
    pass


@pytest.mark.xdist_group("package")
def test_last_in_the_file():
    pass
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small suite with this one's conftest, on two workers"
    tests = tmp_path_factory.mktemp("suite") / "tests"
    tests.mkdir()
    shutil.copy(root / "tests" / "conftest.py", tests)
    (tests / "test_sample.py").write_text(SAMPLE)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "loadgroup",
            "-v",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "--rootdir",
            tests.parent,
            tests,
        ],
        capture_output=True,
        text=True,
        cwd=tests.parent,
        env=dict(os.environ, PYTEST_ADDOPTS=""),
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("suite")
def test_a_group_stays_on_one_worker(run):
    workers = re.findall(r"\[(gw\d)\].*PASSED \S*test_one\[", run)
    assert len(workers) == 6 and len(set(workers)) == 1, run


@pytest.mark.xdist_group("suite")
def test_long_groups_start_first(tmp_path):
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ, PYTEST_ADDOPTS=""),
    )
    assert r.stdout.splitlines()[0].endswith("::test_last_in_the_file"), r.stdout


@pytest.mark.xdist_group("suite")
def test_summary(run):
    assert "test_skipped: no such thing here" in run
    assert "4 notebooks, 6 s of CPU time" in run
    order = re.findall(r"room/(\d\d)\.ipynb", run)
    assert order == ["03", "02", "01", "00"], run


@pytest.mark.slow
def test_cpu_time_of_children_counts():
    "A child's child that burns two seconds is seen; one that is left behind is named and ended"
    burn = "import time\nwhile time.process_time() < 2: pass"
    with Processes() as p:
        subprocess.run(
            [
                sys.executable,
                "-c",
                f'import subprocess, sys; subprocess.run([sys.executable, "-c", {burn!r}])',
            ],
            check=True,
        )
        subprocess.run(
            [
                sys.executable,
                "-c",
                'import subprocess; subprocess.Popen(["sleep", "61"], start_new_session=True)',
            ],
            check=True,
        )
    assert 1.8 <= p.cpu <= 4, p.cpu
    assert p.left(wait=0.5) == ["sleep 61"]
    time.sleep(0.2)
    assert p.left(wait=0.5) == []


def test_machine_traces():
    assert machine_traces("see /home/ann/x and /tmp/abc.py") == ["/home/ann", "/tmp/abc.py"]
    assert machine_traces(str(root / "nbs")) and machine_traces("C:\\Users\\ann")
    assert machine_traces("a/b, 1/2, https://x.org/home/page, runs/home/x, and/or") == []


@pytest.fixture
def started(kernel):
    "Starts kernels as the notebooks do; they are ended with the test"
    kept = []

    def start(**env):
        manager = KernelManager(kernel_name=kernel)
        manager.start_kernel(env=dict(os.environ, **env))
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        kept.append((manager, client))
        return manager, client

    yield start
    for manager, client in kept:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client, code):
    "What a cell prints, and how it ended"
    said = []

    def hear(message):
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=60, output_hook=hear)
    return "".join(said).strip(), reply["content"].get("ename", "ok")


def test_a_forked_kernel_is_one_of_its_own(started):
    "Heavy modules are there, names are not; environment and draws are the kernel's own"
    _, one = started(FRUIT="pear")
    _, two = started(FRUIT="plum")
    look = "import os, sys; print('torch' in sys.modules, 'torch' in dir(), os.environ['FRUIT'])"
    assert [printed(k, look)[0] for k in (one, two)] == ["True False pear", "True False plum"]
    draws = [printed(k, "import numpy as np; print(np.random.rand())")[0] for k in (one, two)]
    assert draws[0] != draws[1]
    printed(one, "planted = 1")
    assert printed(two, "planted")[1] == "NameError"


def test_a_forked_kernel_is_interrupted_and_killed(started):
    "An interrupt ends the cell and not the kernel; the kernel dies with its launcher"
    manager, client = started()
    pid = int(printed(client, "import os, time; print(os.getpid())")[0])
    assert pid != manager.provisioner.pid
    sent = client.execute("time.sleep(600)")
    time.sleep(1)
    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != sent:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert printed(client, "print(1 + 1)") == ("2", "ok")
    process = psutil.Process(pid)
    manager.shutdown_kernel(now=True)
    process.wait(30)


def test_without_a_server_a_launcher_is_a_kernel(started, monkeypatch):
    "The same kernel, only slower"
    monkeypatch.delenv("LLMPAPERS_WARM_KERNELS")
    manager, client = started()
    assert int(printed(client, "import os; print(os.getpid())")[0]) == manager.provisioner.pid
