"""Rollout actors on Ray: killed in the middle of a sentence, killed while loading weights, the
driver killed, Ctrl-C"""

import json
import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("heavy"), pytest.mark.timeout(600)]

common = r"""
import json, os, signal, sys, threading, time
import torch
from pathlib import Path
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.loop import AsyncController
from llmpapers.rl.engines import ScriptedEngine
from llmpapers.rl.ray import RolloutPool, start_ray
from llmpapers.rl.types import Sample, SamplingConfig


class Engine(ScriptedEngine):
    "Dies while it loads the weights of a given version, the first time"

    def __init__(self, length, step_time, die_at=None, flag=None):
        super().__init__(lambda r: length, step_time=step_time)
        self.die_at, self.flag = die_at, flag

    def load_weights(self, weights, version):
        if version == self.die_at:
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
                os._exit(9)
            except FileExistsError:
                self.die_at = None
        super().load_weights(weights, version)


async def speak(client, group, index):
    c = await client.generate([4], SamplingConfig(64))
    return Sample(
        [4],
        c.token_ids,
        [True] * len(c.token_ids),
        c.logprobs,
        c.token_versions(),
        0.0,
        info=dict(pid=os.getpid()),
    )


class Trainer:
    "Counts; `act(n)` may do harm"

    def __init__(self, act=lambda n: None, seconds=0.05):
        self.n, self.act, self.seconds, self.seen = 0, act, seconds, []

    def step(self, batch):
        self.n += 1
        self.seen += sorted(set(batch.group_ids.tolist()))
        time.sleep(self.seconds)
        self.act(self.n)
        return {}

    def weights(self):
        return {"w": torch.tensor([float(self.n)])}

    def state_dict(self):
        return dict(model=self.weights(), counters=dict(n=self.n, seen=self.seen))

    def load_state_dict(self, s):
        self.n, self.seen = s["counters"]["n"], s["counters"]["seen"]
"""

faults = (
    common
    + r"""
def killer(pool, at):
    def act(n):
        if n in at:
            import ray

            os.kill(
                ray.get([a for a in pool.actors if a is not None][0].pid.remote()), signal.SIGKILL
            )

    return act


def run(n, factory, kill_at=(), alpha=1.0):
    pool = RolloutPool(
        factory, n_actors=2, max_inflight_per_actor=4, ray_options=dict(num_cpus=0.5)
    )
    t = Trainer(killer(pool, kill_at))
    c = AsyncController(lambda i: i, speak, t, pool, SampleBuffer(4, alpha, 2))
    c.run(n)
    return dict(
        trained=sorted(c.trained),
        respawned=pool.respawned,
        failures=c.buffer.stats()["failures"],
        failed=len(c.failed),
        staleness=c.buffer.staleness[2],
        seen=sorted(t.seen),
    )


if __name__ == "__main__":
    start_ray(2)
    flag = sys.argv[2]
    out = dict(
        mid=run(10, lambda: Engine(20, 0.01), (2, 6)), load=run(6, lambda: Engine(5, 0.01, 3, flag))
    )
    Path(sys.argv[1]).write_text(json.dumps(out))
"""
)

driver = (
    common
    + r"""
if __name__ == "__main__":
    folder, n = sys.argv[1], int(sys.argv[2])
    pool = RolloutPool(
        lambda: Engine(10, 0.01),
        n_actors=2,
        max_inflight_per_actor=4,
        ray_options=dict(num_cpus=0.5),
    )
    t = Trainer(seconds=0.15)
    c = AsyncController(
        list(range(4 * n)),
        speak,
        t,
        pool,
        SampleBuffer(4, 1.0, 2),
        checkpoint=folder,
        metrics=lambda r: print("step", r["step"], flush=True),
    )
    c.run(n)
    Path(folder, "done.json").write_text(json.dumps(dict(seen=t.seen, n=t.n)))
"""
)


def script(tmp_path, text):
    p = tmp_path / "job.py"
    p.write_text(text)
    return p


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    d = tmp_path_factory.mktemp("faults")
    r = subprocess.run(
        [sys.executable, script(d, faults), d / "out.json", d / "flag"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads((d / "out.json").read_text())


def test_two_actors_killed_in_the_middle_of_a_sentence(outcome):
    "The run ends, no prompt is lost, none is trained twice, replacements are counted"
    o = outcome["mid"]
    assert o["trained"] == list(range(40)) and o["seen"] == list(range(40))
    assert o["respawned"] == 2 and o["failures"] > 0 and o["failed"] == 0 and o["staleness"] <= 1


def test_an_actor_that_dies_while_it_loads_weights(outcome):
    o = outcome["load"]
    assert o["trained"] == list(range(24)) and o["respawned"] == 1 and o["failed"] == 0


def children(pid):
    return psutil.Process(pid).children(recursive=True)


def start(job, folder, n, until):
    "Start the driver and wait until it has trained some steps"
    p = subprocess.Popen(
        [sys.executable, job, folder, str(n)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    for line in p.stdout:
        if line.startswith("step") and int(line.split()[1]) >= until:
            return p
    raise AssertionError(f"the driver ended early with code {p.wait()}")


def gone(procs, seconds=30):
    "Wait for processes to end; those left are ended and returned"
    _, alive = psutil.wait_procs(procs, timeout=seconds)
    for q in alive:
        q.kill()
    return alive


def test_driver_killed_and_resumed_then_interrupted(tmp_path):
    """SIGKILL of the driver, then Ctrl-C, then the rest: the union of trained prompts is
    everything, once"""
    job, folder = script(tmp_path, driver), tmp_path / "run"
    p = start(job, folder, 16, 4)
    kids = children(p.pid)
    p.send_signal(signal.SIGKILL)
    p.wait()
    for q in kids:
        if q.is_running():
            q.kill()  # the machine went down: nothing of the old session is left
    p = start(job, folder, 16, 9)
    kids = children(p.pid)
    assert kids
    p.send_signal(signal.SIGINT)
    p.stdout.read()
    code = p.wait(timeout=60)
    assert code != 0 and not (folder / "done.json").exists()
    assert not gone(kids), "Ctrl-C left child processes"
    assert (folder / "latest").exists()
    r = subprocess.run(
        [sys.executable, job, folder, "16"], capture_output=True, text=True, timeout=300
    )
    assert r.returncode == 0, r.stderr[-3000:]
    done = json.loads((folder / "done.json").read_text())
    assert sorted(done["seen"]) == list(range(64)) and done["n"] == 16
