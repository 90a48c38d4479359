"""Helpers of several test files: which notebooks there are, what must not be in them, processes and
their CPU time"""

import contextlib
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from nb_read import kind, nbs, notebooks, root

__all__ = [
    "Processes",
    "kind",
    "machine_traces",
    "nbs",
    "needs_parameters",
    "notebooks",
    "open_chromium",
    "output_text",
    "root",
]


def needs_parameters(rel):
    return kind(rel) not in ("index", "paper")


# Folders of one machine. Words are put together here so that this file does not contain them.
machine_path = re.compile(
    r"(?<![\w.:/])/(?:root|home|Users|tmp|var/folders|opt|mnt|wo"
    r"rk|workspace)/[\w.-]+|\b[A-Z]:\\\\?Users\b"
)


def machine_traces(s):
    "Paths and names of the machine in a text"
    found = {m[0] for m in machine_path.finditer(s)}
    for place in (str(root), tempfile.gettempdir(), str(Path.home())):
        if len(place) > 4 and place + "/" in s:
            found.add(place)
    host = socket.gethostname()
    if len(host) > 5 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", s):
        found.add(host)
    return sorted(found)


def output_text(cell):
    "All text in the outputs of a code cell, images left out"
    res = []
    for o in cell.get("outputs", []):
        res.append(o.get("text", ""))
        res += o.get("traceback", [])
        res += [
            v if isinstance(v, str) else str(v)
            for k, v in o.get("data", {}).items()
            if not k.startswith("image/")
        ]
    return "\n".join("".join(r) for r in res)


class Processes:
    """CPU time of the processes started inside a `with` block, dead ones included.

    A thread samples the descendants, so that processes that outlive their parent stay in view; the
    kernel's own account of children that were waited for covers what dies between two samples. The
    larger of the two counts. A mark in the environment finds processes that left the tree."""

    def __init__(self, every=0.5):
        self.every, self.seen, self.stop, self.mark = every, {}, threading.Event(), uuid.uuid4().hex

    def __enter__(self):
        os.environ["LLMPAPERS_TEST_MARK"] = self.mark
        self.me, self.t0, self.start = psutil.Process(), os.times(), time.time()
        self.before = {(p.pid, p.create_time()) for p in self.me.children(recursive=True)}
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(self.every):
            self.sample()

    def sample(self):
        todo = {p.pid: p for p in self.me.children(recursive=True)}
        todo |= {p.pid: p for p, _ in self.seen.values() if p.pid not in todo}
        for p in todo.values():
            try:
                key = p.pid, p.create_time()
                if key in self.before or not p.is_running():
                    continue
                c = p.cpu_times()
                self.seen[key] = p, c.user + c.system
            except psutil.Error:
                pass

    def __exit__(self, *exc):
        for p in psutil.process_iter():
            self.strayed(p)
        self.sample()
        os.environ.pop("LLMPAPERS_TEST_MARK", None)
        self.stop.set()
        self.thread.join()
        t1 = os.times()
        waited = (
            t1.children_user + t1.children_system - self.t0.children_user - self.t0.children_system
        )
        self.cpu, self.wall = (
            max(waited, sum(c for _, c in self.seen.values())),
            time.time() - self.start,
        )

    def strayed(self, p):
        "Take note of a process that carries the mark"
        try:
            key = p.pid, p.create_time()
            if (
                p.pid != self.me.pid
                and key not in self.seen
                and p.environ().get("LLMPAPERS_TEST_MARK") == self.mark
            ):
                self.seen[key] = p, 0.0
        except psutil.Error:
            pass

    def left(self, wait=20):
        "Processes that still run after `wait` seconds; they are ended"
        procs = [p for p, _ in self.seen.values() if p.is_running()]
        _, alive = psutil.wait_procs(procs, timeout=wait)
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        names = []
        for p in alive:
            try:
                names.append(" ".join(p.cmdline())[:120] or p.name())
                p.kill()
            except psutil.Error:
                pass
        return names


@contextlib.contextmanager
def open_chromium(**how):
    "Chromium for a fixture; without one the tests are skipped, but fail where CI=true"
    from llmpapers.graph2eval.browser import Chromium, find_chromium

    if not find_chromium():
        why = "no Chromium on the path (Debian, Ubuntu: apt-get install chromium)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(why)
        pytest.skip(why)
    with Chromium(**how) as c:
        yield c
