"The test suite's own machinery: groups, order, the summary, and the measure of CPU time"

import re
import shutil
import subprocess
import sys
import time

import pytest

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
