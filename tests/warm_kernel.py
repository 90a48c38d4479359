"""Kernels that start at once: a process that has imported torch and transformers forks one for each
notebook, so that a hundred notebooks do not each wait for the same imports.

    python warm_kernel.py serve SOCKET            import, listen, fork; ends with its parent
    python warm_kernel.py launch CONNECTION_FILE  what Jupyter starts: asks the server named by
                                                  LLMPAPERS_WARM_KERNELS for a kernel and stands in
                                                  for it; without a server it becomes one itself

A kernel has the environment, the folder and the outputs of its launcher, its own session and its
own draws of NumPy; it gets the launcher's interrupts, and dies with it. Nothing is defined in it
that a kernel of its own would lack, only `sys.modules` is filled."""

import json
import os
import selectors
import signal
import socket
import sys
import time

KERNEL = ("--log-level=ERROR", "--HistoryManager.enabled=False", "-f")
HEAVY = (
    "numpy",
    "pandas",
    "scipy.stats",
    "matplotlib.figure",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "IPython.core.interactiveshell",
    "ipykernel.kernelapp",
)


def become_kernel(connection_file):
    "Run a kernel in this process"
    import runpy

    sys.argv = ["ipykernel_launcher.py", *KERNEL, connection_file]
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


# ---- the process that Jupyter starts


def launch(connection_file):
    "Ask for a kernel, forward signals to it, and end as it ends"
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(os.environ.get("LLMPAPERS_WARM_KERNELS", ""))
    except OSError:
        command = [sys.executable, "-m", "ipykernel_launcher", *KERNEL, connection_file]
        os.execv(sys.executable, command)
    asked = dict(env=dict(os.environ), cwd=os.getcwd(), connection_file=connection_file)
    data = json.dumps(asked).encode()
    socket.send_fds(link, [len(data).to_bytes(4, "big")], [0, 1, 2])
    link.sendall(data)
    answers = link.makefile("r")
    pid = int(answers.readline())

    def forward(signum, frame):
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass  # it has just ended

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, forward)
    status = answers.readline()
    os._exit(int(status) if status else 1)


# ---- the process that forks


def read_exactly(link, n):
    "n bytes of a socket"
    data = b""
    while len(data) < n:
        if not (piece := link.recv(n - len(data))):
            raise ConnectionError("the launcher has gone")
        data += piece
    return data


def receive(link):
    "What a launcher asks for, and its standard streams"
    size, fds, _, _ = socket.recv_fds(link, 4, 3)
    return json.loads(read_exactly(link, int.from_bytes(size, "big"))), fds


def settle(asked, fds):
    "In the child: take the launcher's place"
    os.setsid()
    for standard, fd in enumerate(fds):
        os.dup2(fd, standard)
        os.close(fd)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    import numpy as np

    np.random.seed()


def kill(pid):
    "End a kernel and what is in its session's group"
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended


def serve(path):
    "Fork kernels until the parent has gone; returns only in a kernel, with its connection file"
    import gc
    import importlib

    parent = os.getppid()
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path + ".tmp")
    listener.listen(16)
    os.rename(path + ".tmp", path)  # who finds it can connect
    loop = selectors.DefaultSelector()
    loop.register(listener, selectors.EVENT_READ)
    kernels = {}  # process id -> the connection of its launcher
    while os.getppid() == parent:
        for key, _ in loop.select(0.05):
            if key.fileobj is listener:
                link, _ = listener.accept()
                try:
                    asked, fds = receive(link)
                except (OSError, ValueError):
                    link.close()
                    continue
                pid = os.fork()
                if not pid:
                    loop.close()
                    listener.close()
                    for other in (*kernels.values(), link):
                        other.close()
                    settle(asked, fds)
                    return asked["connection_file"]
                for fd in fds:
                    os.close(fd)
                kernels[pid] = link
                link.sendall(f"{pid}\n".encode())
                loop.register(link, selectors.EVENT_READ, pid)
            elif key.data in kernels:  # the launcher was killed
                kill(key.data)
                loop.unregister(key.fileobj)
        for pid, link in list(kernels.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                try:
                    link.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
                except OSError:
                    pass  # the launcher was killed before its kernel
                if link in {k.fileobj for k in loop.get_map().values()}:
                    loop.unregister(link)
                link.close()
                del kernels[pid]
    for pid in kernels:
        kill(pid)
    os._exit(0)


def start_server(path, env):
    "In a test process: start the server and wait until it listens; returns its process"
    import subprocess

    server = subprocess.Popen([sys.executable, __file__, "serve", path], env=env)
    end = time.monotonic() + 600
    while not os.path.exists(path):
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no server of kernels at {path}: exit code {server.poll()}")
        time.sleep(0.05)
    return server


if __name__ == "__main__":
    action, target = sys.argv[1:3]
    become_kernel(serve(target)) if action == "serve" else launch(target)
