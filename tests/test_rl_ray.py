"""Rollout actors on Ray: killed in the middle of a sentence, killed while loading weights, the
driver killed, Ctrl-C"""

import json
import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("heavy"), pytest.mark.timeout(900)]

common = r"""
import asyncio, json, os, signal, sys, threading, time
import torch
from functools import partial
from pathlib import Path
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.loop import AsyncController
from llmpapers.rl.engines import ScriptedEngine
from llmpapers.core.lm import char_tokenizer
from llmpapers.rl.ray import RolloutPool, SharedTool, start_ray
from llmpapers.rl.rollout import EpisodeRollout, GroupRollout, StepResult
from llmpapers.rl.types import Sample, SamplingConfig


class Engine(ScriptedEngine):
    "Dies while it loads the weights of a given version, the first time"

    def __init__(self, length, step_time, die_at=None, flag=None):
        super().__init__(lambda r: length, step_time=step_time)
        self.die_at, self.flag = die_at, flag

    def load_weights(self, weights, version):
        if version == self.die_at and first(self.flag):
            os._exit(9)
        super().load_weights(weights, version)

    def logprobs(self, ids):
        if self.die_at == "scoring" and self.version == 1 and first(self.flag):
            os._exit(9)
        return [0.0] * (len(ids) - 1)


def first(flag):
    "Whether nobody has asked with this flag before"
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


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
        self.n = 0
        self.act = act
        self.seconds = seconds
        self.seen = []
        self.rewards = []
        self.sizes = []

    def step(self, batch):
        self.n += 1
        self.seen += sorted(set(batch.group_ids.tolist()))
        time.sleep(self.seconds)
        self.act(self.n)
        self.rewards += batch.rewards.tolist()
        self.sizes.append(len(batch))
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

            pid = ray.get([a for a in pool.actors if a is not None][0].pid.remote())
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    return act


killed = []


class Probing(Trainer):
    "Compares the engines with itself"

    def probe(self):
        return [1, 2, 3], [0.0, 0.0]


def run(n, factory, kill_at=(), alpha=1.0, kind=Trainer):
    pool = RolloutPool(
        factory, n_actors=2, max_inflight_per_actor=4, ray_options=dict(num_cpus=0.5)
    )
    t = kind(killer(pool, kill_at))
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


class Env:
    "Asks a tool each turn, keeps a log of what is opened and closed, and hangs once"

    def __init__(self, tool, log):
        self.tool, self.log = tool, log
        self.note("open")

    def note(self, what):
        with open(self.log, "a") as f:
            f.write(f"{os.getpid()} {what}\n")

    def reset(self, prompt, seed):
        self.prompt, self.k = prompt, 0
        return "a"

    async def step(self, action):
        answer = await self.tool((self.prompt, self.k))
        self.k += 1
        if self.prompt == 3 and self.log.endswith(".log") and first(self.log + ".hang"):
            await asyncio.sleep(600)
        return StepResult("b", answer, self.k == 3)

    async def aclose(self):
        self.note("close")


def ones(items):
    return [1.0] * len(items)


def episodes(n, log, kill_at=(), max_wait_s=0.02, B=4, slots=8, act=None):
    "Episodes in two actors that share a tool"
    tool = SharedTool(ones, max_items=64, max_wait_s=max_wait_s)
    roll = EpisodeRollout(
        partial(Env, tool, log), char_tokenizer("ab"), SamplingConfig(4), step_timeout_s=10.0
    )
    pool = RolloutPool(
        lambda: Engine(4, 0.01),
        n_actors=2,
        max_inflight_per_actor=slots,
        ray_options=dict(num_cpus=0.5),
    )
    t = Trainer(act(tool) if act else killer(pool, kill_at), 0.01)
    c = AsyncController(lambda i: i, roll, t, pool, SampleBuffer(B, 1.0 if B == 4 else 0.0, 2))
    out = dict(error="")
    try:
        c.run(n)
    except RuntimeError as e:
        out["error"] = str(e)
    out |= dict(
        trained=sorted(c.trained),
        seen=sorted(t.seen),
        rewards=t.rewards,
        failures=c.buffer.stats()["failures"],
        errors=[k for k in c.buffer.count if k.startswith("error/")],
        respawned=pool.respawned,
        killed=list(killed),
    )
    if not out["error"]:
        out["tool"] = tool.counts()
        tool.close()
    return out


class Band(GroupRollout):
    "Members together; the first attempts of some groups fail in their own ways"

    async def group(self, client, group, n):
        found = await asyncio.gather(
            *(client.member(k).generate([4], SamplingConfig(64)) for k in range(n))
        )
        bad = group.group_id if group.attempt == 0 else None
        if bad == 2:
            raise SystemExit("leaves")
        if bad == 3:
            raise asyncio.CancelledError
        if bad == 5:
            raise GeneratorExit
        info = dict(lock=threading.Lock()) if bad == 6 else {}
        samples = [
            Sample(
                [4],
                c.token_ids,
                [True] * len(c.token_ids),
                c.logprobs,
                c.token_versions(),
                1.0,
                info=info,
                drawn=False,
            )
            for c in found
        ]
        return samples[1:] if bad == 7 else samples


def groups(n, kill_at=()):
    pool = RolloutPool(
        lambda: Engine(8, 0.01),
        n_actors=2,
        max_inflight_per_actor=2,
        ray_options=dict(num_cpus=0.5),
    )
    t = Trainer(killer(pool, kill_at))
    c = AsyncController(lambda i: i, Band(), t, pool, SampleBuffer(4, 1.0, 3))
    c.run(n)
    return dict(
        trained=sorted(c.trained),
        seen=sorted(t.seen),
        sizes=t.sizes,
        errors=[k for k in c.buffer.count if k.startswith("error/")],
        respawned=pool.respawned,
        failed=len(c.failed),
        staleness=c.buffer.staleness[2],
    )


def tool_killer(tool):
    def act(n):
        if n == 2:
            tool.close()

    return act


if __name__ == "__main__":
    start_ray(2)
    flag = sys.argv[2]
    log = sys.argv[1] + ".log"
    out = dict(
        mid=run(10, lambda: Engine(20, 0.01), (2, 6)), load=run(6, lambda: Engine(5, 0.01, 3, flag))
    )
    out["probe"] = run(
        4, lambda: Engine(5, 0.01, "scoring", flag + " of scoring"), kind=Probing
    )
    out["episodes"] = episodes(5, log, (3,))
    out["crowd"] = episodes(2, log + "2", max_wait_s=3.0, B=32, slots=32)
    out["lost"] = episodes(9, log + "3", act=tool_killer)
    out["groups"] = groups(6, (4,))
    for k in ("", "2"):
        out["log" + k] = Path(log + k).read_text().split("\n")[:-1]
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
        timeout=1300,
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


def test_an_actor_that_dies_while_it_is_compared(outcome):
    o = outcome["probe"]
    assert o["trained"] == list(range(16)) and o["respawned"] == 1 and o["failed"] == 0


def test_episodes_with_a_shared_tool_lose_nothing(outcome):
    "An actor is killed, an environment hangs once: each prompt is trained once, all is closed"
    o = outcome["episodes"]
    assert o["error"] == "" and o["trained"] == o["seen"] == list(range(20))
    assert o["respawned"] == 1 and o["rewards"] == [3.0] * 40
    assert any("step 0 of the environment took longer" in e for e in o["errors"])
    assert o["tool"]["items"] >= 120 and o["tool"]["calls"] < o["tool"]["items"]
    log = [line.split() for line in outcome["log"]]
    living = [what for pid, what in log if int(pid) not in o["killed"]]
    assert living.count("open") == living.count("close") > 0


def test_a_turn_of_64_episodes_in_two_actors_is_one_call_or_two(outcome):
    o = outcome["crowd"]
    assert o["trained"] == list(range(64)) and o["tool"]["items"] == 2 * 3 * 64
    assert 6 <= o["tool"]["calls"] <= 12
    log = [line.split() for line in outcome["log2"]]
    assert [what for _, what in log].count("close") == 128 == len(log) // 2
    assert len({pid for pid, _ in log}) == 2


def test_nothing_is_trained_on_answers_of_a_tool_that_died(outcome):
    "The run ends and names the reason; what was trained had all of its answers"
    o = outcome["lost"]
    assert "ToolLost: the shared tool is gone" in o["error"] and o["respawned"] == 0
    assert o["rewards"] and set(o["rewards"]) == {3.0}
    assert o["trained"] == list(range(len(o["trained"])))


def test_groups_in_one_call_are_retried_and_lose_nothing(outcome):
    "Errors of five kinds and a killed actor; only the last is a death"
    o = outcome["groups"]
    assert o["trained"] == o["seen"] == list(range(24)) and o["sizes"] == [12] * 6
    assert o["respawned"] == 1 and o["failed"] == 0 and o["staleness"] <= 1
    for text in (
        "RolloutError: SystemExit: leaves",
        "RolloutError: CancelledError",
        "RolloutError: GeneratorExit",
        "TypeError: sample: it cannot be sent, look at its info",
        "ValueError: rollout must return 3 samples for a group, got 2",
    ):
        assert any(text in e for e in o["errors"]), (text, o["errors"])


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
