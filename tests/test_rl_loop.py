"The asynchronous controller: synchronous at ratio 0, bounded, lossless, clear about faults"

import asyncio
import json
import math
import random
import threading
import time
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import TinyLMConfig, tiny_lm, word_tokenizer
from llmpapers.rl import loop as loop_module
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.checkpoint import latest
from llmpapers.rl.engines import HFEngine, ScriptedEngine
from llmpapers.rl.loop import AsyncController, train_sync
from llmpapers.rl.losses import PolicyLossConfig
from llmpapers.rl.pools import EngineProxy, InProcessPool, RolloutPoolError
from llmpapers.rl.rollout import EpisodeRollout, GroupRollout, SingleTurn, StepResult
from llmpapers.rl.trainer import PolicyTrainer
from llmpapers.rl.types import Completion, Group, Request, Sample, SamplingConfig
from llmpapers.rl.weights import WeightSyncError

tok = word_tokenizer([*"abcdefgh"])


def source(i):
    return "abcdefgh"[i % 8]


def reward(prompt, response, info):
    return sum(w == prompt for w in response.split()) / 3


rollout = SingleTurn(tok, reward, SamplingConfig(3, seed=0))


def make(copy_model=True, loss="ppo"):
    m = tiny_lm(tok, TinyLMConfig(layers=1, width=16, head_dim=8, max_len=16), 0)
    return PolicyTrainer(
        m, torch.optim.AdamW(m.parameters(), lr=3e-3), PolicyLossConfig(loss)
    ), HFEngine(m, max_active=256, copy_model=copy_model)


class Fake:
    "A trainer without a model"

    def __init__(self, act=lambda n: {}):
        self.n, self.act = 0, act

    def step(self, batch):
        self.n += 1
        return self.act(self.n) or {}

    def weights(self):
        return {}

    def state_dict(self):
        return dict(model={}, counters=dict(n=self.n))

    def load_state_dict(self, state):
        self.n = state["counters"]["n"]


def speak(times=lambda g, k: 0.0, fail=lambda g, k, a: False):
    async def play(client, group, index):
        c = await client.generate([4], SamplingConfig(2))
        await asyncio.sleep(times(group.group_id, index))
        if fail(group.group_id, index, group.attempt):
            raise ValueError(f"planned {group.group_id}")
        return Sample(
            [4],
            c.token_ids,
            [True] * len(c.token_ids),
            c.logprobs,
            c.token_versions(),
            float(index),
        )

    return play


def controller(play, trainer, buffer, source=lambda i: i, slots=64, **kw):
    return AsyncController(
        source,
        play,
        trainer,
        InProcessPool(ScriptedEngine(lambda r: r.sampling.max_new_tokens), slots),
        buffer,
        **kw,
    )


@pytest.mark.parametrize("loss", ["reinforce", "ppo", "decoupled_ppo", "tis"])
def test_ratio_zero_is_the_synchronous_loop(loss):
    a, e = make(False, loss)
    train_sync(e, source, rollout, a, 3, batch_size=4, group_size=4)
    b, e = make(True, loss)
    c = AsyncController(source, rollout, b, InProcessPool(e, 256), SampleBuffer(4, 0.0, 4))
    c.run(3)
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values())
    )
    assert c.trained == list(range(12))


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_completion_order_does_not_matter(seed):
    rnd = random.Random(seed)

    class Jitter(SingleTurn):
        async def __call__(self, client, group, index):
            s = await super().__call__(client, group, index)
            await asyncio.sleep(rnd.random() * 0.01)
            return s

    def run(roll):
        t, e = make()
        AsyncController(source, roll, t, InProcessPool(e, 256), SampleBuffer(3, 0.0, 2)).run(2)
        return t.weights()

    a, b = run(rollout), run(Jitter(tok, reward, rollout.sampling))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([0, 0.5, 1, 1.5, 2, 3.25]),
    st.integers(0, 999),
    st.sampled_from(["keep", "abort", "wait"]),
)
def test_bound_and_no_loss_under_delays(alpha, seed, mode):
    rnd = random.Random(seed)
    delay = {}
    seen = []

    def times(g, k):
        drawn = rnd.lognormvariate(-6.5, 1.5) if rnd.random() < 0.9 else 0.05
        return delay.setdefault((g, k), drawn)

    class Watch(Fake):
        def step(self, batch):
            seen.append(
                (
                    self.n,
                    batch.versions.tolist(),
                    batch.token_versions[batch.response_mask].tolist(),
                )
            )
            return super().step(batch)

    c = controller(speak(times), Watch(), SampleBuffer(3, alpha, 2), slots=7, sync_mode=mode)
    c.run(8)
    assert (
        sorted(c.trained) == list(range(24))
        and c.buffer.staleness[2] <= math.ceil(alpha)
        and c.buffer.stats()["failures"] == 0
    )
    for v, starts, tokens in seen:
        assert (
            min(starts) >= v - math.ceil(alpha) and max(tokens) <= v and min(tokens) >= min(starts)
        )


def test_a_member_that_fails_once_is_repeated_and_one_that_always_fails_is_set_aside(tmp_path):
    def fail(g, k, a):
        return (g == 2 and a == 0) or (g == 5 and k == 1)

    c = controller(
        speak(fail=fail),
        Fake(),
        SampleBuffer(4, 1.0, 2),
        source=list(range(12)),
        checkpoint=tmp_path,
    )
    c.run(3)
    assert sorted(c.trained) == [i for i in range(12) if i != 5] and [
        f["group_id"] for f in c.failed
    ] == [5]
    line = json.loads((tmp_path / "failed.jsonl").read_text().splitlines()[0])
    assert line["group_id"] == 5 and "planned 5" in line["error"] and "Traceback" in line["error"]


def test_too_many_failures_stop_the_run():
    with pytest.raises(
        RuntimeError, match="failed 3 times within one batch; the last: ValueError: planned"
    ):
        controller(speak(fail=lambda g, k, a: True), Fake(), SampleBuffer(4, 1.0)).run(3)


def test_a_broken_engine_stops_the_run():
    c = AsyncController(
        lambda i: i,
        speak(),
        Fake(),
        InProcessPool(ScriptedEngine(lambda r: 1 // 0)),
        SampleBuffer(2),
    )
    with pytest.raises(RolloutPoolError, match="ZeroDivisionError"):
        c.run(1)


def test_a_trainer_that_raises_stops_the_run():
    def boom(n):
        raise FloatingPointError("loss is not finite")

    with pytest.raises(FloatingPointError, match="loss"):
        controller(speak(), Fake(boom), SampleBuffer(2, 1.0)).run(3)


def test_filtered_groups_free_their_places():
    def keep(g):
        return g.group_id % 3 != 0

    c = controller(speak(), Fake(), SampleBuffer(4, 1.0, 2), group_filter=keep)
    c.run(4)
    assert (
        len(c.trained) == 16
        and all(i % 3 for i in c.trained)
        and c.buffer.count["dropped/filtered"] > 0
    )


def test_nothing_passes_for_a_while_then_it_goes_on():
    c = controller(speak(), Fake(), SampleBuffer(2, 1.0), group_filter=lambda g: g.group_id >= 10)
    c.run(2)
    assert len(c.trained) == 4 and min(c.trained) >= 10


def test_nothing_ever_passes():
    with (
        warnings.catch_warnings(record=True) as w,
        pytest.raises(RuntimeError, match="rejected 100 batches"),
    ):
        warnings.simplefilter("always")
        controller(speak(), Fake(), SampleBuffer(2, 1.0), group_filter=lambda g: False).run(1)
    assert sum("groups rejected" in str(x.message) for x in w) >= 9


def test_the_end_of_the_data():
    c = controller(speak(), Fake(), SampleBuffer(4, 2.0), source=list(range(10)))
    c.run(100)
    assert sorted(c.trained) == list(range(10)) and [r["step"] for r in c.rows] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_stop_and_resume_trains_each_prompt_once(tmp_path, alpha):
    out = []
    for stop_at in (2, 4, None):
        t = Fake()
        c = controller(
            speak(lambda g, k: 0.002 * (g % 5)),
            t,
            SampleBuffer(3, alpha, 2),
            source=list(range(30)),
            checkpoint=tmp_path,
            slots=5,
        )
        if stop_at:

            def cut(tr, stop_at=stop_at):
                if tr.n == stop_at:
                    raise OSError("power cut")
                return {}

            c.eval_fn = cut
            c.eval_every = 1
            with pytest.raises(OSError, match="power cut"):
                c.run(10)
        else:
            c.run(10)
        out += c.trained
    assert sorted(out) == list(range(30)) and t.n == 10


@pytest.mark.slow
def test_resume_equals_the_run_that_was_not_interrupted(tmp_path):
    def run(folder, stop_at=None):
        t, e = make()

        def check(tr):
            if tr.n_steps == stop_at:
                raise OSError("power cut")
            return {}

        c = AsyncController(
            source,
            rollout,
            t,
            InProcessPool(e, 256),
            SampleBuffer(3, 0.0, 4),
            checkpoint=folder,
            eval_fn=check,
            eval_every=1,
        )
        try:
            c.run(5)
        except OSError:
            pass
        return t

    whole = run(tmp_path / "a")
    run(tmp_path / "b", 2)
    again = run(tmp_path / "b")
    assert all(
        torch.equal(x, y)
        for x, y in zip(whole.model.state_dict().values(), again.model.state_dict().values())
    )


def test_overlap_needs_a_copy_and_other_bad_input():
    t, e = make(False)
    with pytest.raises(ValueError, match="copy_model=True"):
        AsyncController(source, rollout, t, InProcessPool(e), SampleBuffer(2, 1.0, 2))
    with pytest.raises(ValueError, match="sync_mode"):
        controller(speak(), Fake(), SampleBuffer(2), sync_mode="drop")
    with pytest.raises(TypeError, match="source"):
        controller(speak(), Fake(), SampleBuffer(2), source=iter([1]))


def test_weights_travel_while_training_goes_on_and_rollouts_wait():
    events = []

    class Slow(InProcessPool):
        async def load_weights(self, weights, version, mode="keep"):
            events.append("load")
            await asyncio.sleep(0.06)
            await InProcessPool.load_weights(self, weights, version, mode)
            events.append("arrived")

        def submit(self, group, index, *more):
            events.append("submit")
            return InProcessPool.submit(self, group, index, *more)

    def act(n):
        events.append("train")
        time.sleep(0.03)

    pool = Slow(ScriptedEngine(lambda r: r.sampling.max_new_tokens), 64)
    c = AsyncController(lambda i: i, speak(), Fake(act), pool, SampleBuffer(2, 1.0))
    c.run(6)
    between, inside = [], False
    for e in events:
        if e in ("load", "arrived"):
            inside = e == "load"
        elif inside:
            between.append(e)
    assert (
        "train" in between
        and "submit" not in between
        and events.count("load") - events.count("arrived") <= 1
    )
    assert (
        c.trained == list(range(12))
        and c.buffer.staleness[2] <= 1
        and [x[3] for x in c.timeline if x[0] == "sync"]
        == [1, 2, 3, 4, 5, 6][: events.count("arrived")]
    )


def test_weights_that_do_not_arrive_end_the_run():
    class Broken(InProcessPool):
        async def load_weights(self, weights, version, mode="keep"):
            await asyncio.sleep(0.01)
            if version == 2:
                raise RolloutPoolError("lost on the way")
            await InProcessPool.load_weights(self, weights, version, mode)

    pool = Broken(ScriptedEngine(lambda r: r.sampling.max_new_tokens), 64)
    with pytest.raises(RolloutPoolError, match="on the way"):
        AsyncController(lambda i: i, speak(), Fake(), pool, SampleBuffer(2, 1.0)).run(6)


def test_an_engine_with_other_weights_is_noticed():
    t, e = make()
    e.load_weights = lambda w, v: None
    with torch.no_grad():
        next(e.model.parameters()).add_(0.1)
    with pytest.raises(WeightSyncError):
        AsyncController(source, rollout, t, InProcessPool(e), SampleBuffer(2, 0.0, 2)).run(1)


def test_a_sample_of_unknown_weights_is_an_error():
    async def liar(client, group, index):
        return Sample([4], [5], [True], [0.0], [7], 0.0)

    with pytest.raises(RuntimeError, match="unknown weights"):
        controller(liar, Fake(), SampleBuffer(2)).run(1)


def test_a_rollout_beyond_its_deadline_is_repeated():
    late = {}

    async def play(client, group, index):
        if group.group_id == 1 and not late:
            late[1] = True
            await asyncio.sleep(60)
        return Sample([4], [5], [True], [0.0], [group.version], 0.0)

    c = AsyncController(
        lambda i: i,
        play,
        Fake(),
        InProcessPool(ScriptedEngine(lambda r: 1), timeout_s=0.2),
        SampleBuffer(2),
    )
    c.run(2)
    assert sorted(c.trained) == [0, 1, 2, 3] and c.buffer.stats()["failures"] == 1


def test_abort_policy_starts_old_ones_again_and_loses_none():
    c = controller(
        speak(lambda g, k: 0.15 if g == 0 else 0.001),
        Fake(),
        SampleBuffer(2, 1.0, on_stale="abort"),
        slots=8,
    )
    c.run(12)
    assert (
        len(set(c.trained)) == 24 and c.buffer.stats()["aborted"] > 0 and c.buffer.staleness[2] <= 1
    )


def test_controller_is_cheap_in_calls():
    "Work per group does not grow with the number of groups: counted in buffer calls, not seconds"
    calls = {}

    class Counted(SampleBuffer):
        def take(self, *a, **k):
            calls["take"] = calls.get("take", 0) + 1
            return SampleBuffer.take(self, *a, **k)

        def pending(self, *a):
            calls["pending"] = calls.get("pending", 0) + 1
            return SampleBuffer.pending(self, *a)

    controller(speak(), Fake(), Counted(8, 1.0, 4), slots=128).run(20)
    assert calls["pending"] == 1 and calls["take"] <= 20 * 8 * 4 + 40


def completion(ids):
    return Completion("x", ids, [-0.1] * len(ids), "stop", [(0, 0, len(ids))])


def test_environments_overlap():
    "A fast environment plays all five of its turns while a slow one is in its first"
    delay, order = [[0.3 if e == 0 and k == 0 else 0.005 for k in range(5)] for e in range(8)], []

    class Slow:
        def __init__(self, d, e):
            self.d, self.e = d, e

        def reset(self, prompt, seed):
            self.k = 0
            return "a"

        async def step(self, action):
            await asyncio.sleep(self.d[self.k])
            self.k += 1
            order.append((self.e, self.k))
            return StepResult("b", 0.0, self.k == 5)

    class C:
        async def generate(self, ids, sampling):
            return completion([9])

    async def free():
        return await asyncio.gather(
            *(
                EpisodeRollout(partial(Slow, d, e), tok, SamplingConfig(1))(
                    C(), Group(e, None, 0), 0
                )
                for e, d in enumerate(delay)
            )
        )

    asyncio.run(free())
    turns = [k for _, k in order]
    assert sorted(order) == [(e, k) for e in range(8) for k in range(1, 6)]
    assert turns != sorted(turns) and turns.index(5) < len(turns) - 1 - turns[::-1].index(
        1
    )  # somebody ended before somebody's first turn did


def test_proxy_survives_a_cancelled_request():
    async def main():
        p = EngineProxy(ScriptedEngine(lambda r: 50, step_time=0.001))
        t = asyncio.ensure_future(p.generate(Request("a", [1], SamplingConfig(64))))
        await asyncio.sleep(0.01)
        t.cancel()
        c = await p.generate(Request("b", [1], SamplingConfig(64)))
        return len(c.token_ids), p.engine.num_active

    assert asyncio.run(main()) == (50, 0)


def test_a_wait_cancelled_while_the_engine_steps_does_not_kill_the_proxy():
    "The response of the step is there, and nobody waits for it"

    class Cancels(ScriptedEngine):
        def step(self):
            out = super().step()
            if out and out[0].request_id == "a":
                loop.call_soon_threadsafe(task.cancel)
                cancelled.wait(10)
            return out

    async def main():
        nonlocal loop, task
        loop = asyncio.get_running_loop()
        proxy = EngineProxy(Cancels(lambda r: 2))
        task = asyncio.ensure_future(proxy.generate(Request("a", [1], SamplingConfig(2))))
        task.add_done_callback(lambda _: cancelled.set())
        await asyncio.wait([task])
        c = await proxy.generate(Request("b", [1], SamplingConfig(2)))
        return task.cancelled(), len(c.token_ids), proxy.dead

    loop = task = None
    cancelled = threading.Event()
    assert asyncio.run(main()) == (True, 2, None)


def test_a_deadline_of_every_length_leaves_the_engine_alive():
    "Deadlines that coincide with the end of a response, in all orders"

    async def main():
        pool = InProcessPool(ScriptedEngine(lambda r: 4, step_time=0.001), 64)
        pool.timeout_s = None
        await pool.start(speak(), None, 0)
        for k in range(60):
            pool.timeout_s = 0.0002 * k
            jobs = [pool.submit(Group(k, None, 0), i) for i in range(4)]
            await asyncio.gather(*jobs, return_exceptions=True)
        pool.timeout_s = 30
        last = await pool.submit(Group(99, None, 0), 0)
        free = pool.num_free()
        await pool.close()
        return len(last.response_ids), free, pool.proxy.dead

    n, free, dead = asyncio.run(main())
    assert n == 4 and free >= 63 and (dead is None or "closed" in str(dead))


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit]
)
@pytest.mark.parametrize("loop", ["sync", "async"])
def test_whatever_a_rollout_raises_is_a_failure_of_its_member(error, loop):
    def fail(g, k, a):
        if (g == 1 and k == 0 and a == 0) or g == 6:
            raise error("no more")

    t = Recorder()
    if loop == "async":
        c = controller(speak(fail=fail), t, SampleBuffer(4, 1.0, 2), source=list(range(12)))
        c.run(3)
        assert [f["group_id"] for f in c.failed] == [6] and "no more" in c.failed[0]["error"]
        assert c.buffer.stats()["failures"] >= 4
    else:
        engine = ScriptedEngine(lambda r: 2)
        with pytest.warns(UserWarning, match="no more"):
            train_sync(engine, list(range(12)), speak(fail=fail), t, 3, batch_size=4, group_size=2)
    assert sorted(set(t.groups)) == [i for i in range(12) if i != 6]


class Recorder(Fake):
    def __init__(self, act=lambda n: {}):
        super().__init__(act)
        self.groups, self.sizes = [], []

    def step(self, batch):
        self.groups += batch.group_ids.tolist()
        self.sizes.append(len(batch))
        return super().step(batch)


def test_rollouts_without_a_sample_and_too_many_failures_in_the_synchronous_loop():
    async def nothing(client, group, index):
        return None

    with pytest.raises(RuntimeError, match="2 groups failed 3 times .* must return a Sample"):
        train_sync(ScriptedEngine(lambda r: 2), list("abcd"), nothing, Fake(), 1, batch_size=2)
    with pytest.raises(RuntimeError, match="rejected 100 batches"):
        train_sync(
            ScriptedEngine(lambda r: 2),
            lambda i: i,
            speak(),
            Fake(),
            1,
            batch_size=2,
            group_filter=lambda g: False,
        )


def test_a_start_that_fails_closes_what_was_started():
    closed = []

    class Fails(InProcessPool):
        async def start(self, *args):
            await super().start(*args)
            raise OSError("no memory")

        async def close(self):
            closed.append(True)
            await super().close()

    pool = Fails(ScriptedEngine(lambda r: 2))
    with pytest.raises(OSError, match="no memory"):
        AsyncController(lambda i: i, speak(), Fake(), pool, SampleBuffer(2)).run(1)
    assert closed == [True]


def test_more_data_after_a_partial_batch(tmp_path):
    "The end of the data leaves a batch of two; later there are more prompts"
    seen = []
    for n in (6, 18):
        t = Recorder()
        c = controller(speak(), t, SampleBuffer(4, 1.0), source=list(range(n)), checkpoint=tmp_path)
        c.run(5)
        seen += c.trained
    assert sorted(seen) == list(range(18)) and c.buffer.version == 5 and t.sizes == [4, 4, 4]


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1.0, 2.0]))
def test_abort_trains_every_group_whatever_was_ready(seed, alpha):
    "Groups that were ready and became too old begin again, and the run reaches its last step"
    rnd, times = random.Random(seed), {}

    def delay(g, k):
        return times.setdefault((g, k), rnd.choice([0, 0.001, 0.002, 0.03]))

    c = controller(
        speak(delay), Fake(), SampleBuffer(3, alpha, 2, on_stale="abort"), list(range(30)), slots=5
    )
    c.run(10)
    assert sorted(c.trained) == list(range(30)) and len(c.rows) == 10
    assert c.buffer.staleness[2] <= alpha


class Band(GroupRollout):
    "Members of a group in one call, each from its own request; fails as planned"

    def __init__(self, times=lambda g: 0.0, fail=lambda g, a: False, drawn=True):
        self.times, self.fail, self.drawn, self.calls = times, fail, drawn, []

    async def group(self, client, group, n):
        self.calls.append((group.group_id, group.attempt))
        asks = (client.member(k).generate([4], SamplingConfig(2)) for k in range(n))
        found = await asyncio.gather(*asks)
        await asyncio.sleep(self.times(group.group_id))
        if self.fail(group.group_id, group.attempt):
            raise ValueError(f"planned {group.group_id}")
        return [
            Sample(
                [4],
                c.token_ids,
                [True] * 2,
                c.logprobs,
                c.token_versions(),
                float(k),
                drawn=self.drawn,
            )
            for k, c in enumerate(found)
        ]


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0, 0.5, 1, 2]), st.integers(0, 999), st.sampled_from(["wait", "abort"]))
def test_groups_in_one_call_bound_no_loss_and_retries(alpha, seed, on_stale):
    "Every admitted group is trained once, its members together; a failed one is made again"
    if on_stale == "abort" and alpha < 1:
        alpha = 1
    rnd, planned = random.Random(seed), {}

    def fail(g, a):
        return a == 0 and planned.setdefault(g, rnd.random() < 0.3)

    times = {g: rnd.choice([0, 0.001, 0.01]) for g in range(24)}
    arrived = []

    class Watch(SampleBuffer):
        def commit(self, group_id, index, attempt, sample):
            ok = SampleBuffer.commit(self, group_id, index, attempt, sample)
            if ok:
                arrived.append((group_id, index, len(sample)))
            return ok

    band, t = Band(times.get, fail), Recorder()
    c = controller(band, t, Watch(3, alpha, 4, on_stale), list(range(24)), slots=4)
    c.run(8)
    assert sorted(c.trained) == list(range(24)) and t.sizes == [12] * 8
    assert all(index is None and n == 4 for _, index, n in arrived)
    assert c.buffer.staleness[2] <= math.ceil(alpha) and not c.failed
    again = {g for g, a in band.calls if a > 0}
    assert {g for g in planned if planned[g]} <= again
    if on_stale == "wait":
        assert len(arrived) == 24 and len(band.calls) == 24 + sum(planned.values())
        assert c.buffer.stats()["failures"] == sum(planned.values())


def test_a_group_that_always_fails_is_set_aside_and_undrawn_samples_pass():
    drawn = []

    class Look(Fake):
        def step(self, batch):
            drawn.append(None if batch.drawn is None else batch.drawn.tolist())
            return super().step(batch)

    c = controller(
        Band(fail=lambda g, a: g == 2, drawn=False), Look(), SampleBuffer(4, 0.0, 2), list(range(9))
    )
    c.run(2)
    assert [f["group_id"] for f in c.failed] == [2] and c.trained == [0, 1, 3, 4, 5, 6, 7, 8]
    assert drawn == [[False] * 8] * 2

    t = Recorder()
    with pytest.warns(UserWarning, match="planned 2"):
        train_sync(
            ScriptedEngine(lambda r: 2),
            list(range(9)),
            Band(fail=lambda g, a: g == 2),
            t,
            2,
            batch_size=4,
            group_size=2,
        )
    assert sorted(set(t.groups)) == [0, 1, 3, 4, 5, 6, 7, 8]

    class Short(Band):
        async def group(self, client, group, n):
            return (await super().group(client, group, n))[1:]

    with pytest.raises(RuntimeError, match="must return 2 samples for a group, got 1"):
        controller(Short(), Fake(), SampleBuffer(2, 0.0, 2)).run(1)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_groups_in_one_call_stop_and_resume(tmp_path, alpha):
    out = []
    for stop_at in (2, None):
        t = Fake()
        c = controller(
            Band(lambda g: 0.002 * (g % 5)),
            t,
            SampleBuffer(3, alpha, 2),
            source=list(range(18)),
            checkpoint=tmp_path,
            slots=4,
        )
        if stop_at:

            def power_cut(tr, at=stop_at):
                if tr.n == at:
                    raise OSError("power cut")
                return {}

            c.eval_fn, c.eval_every = power_cut, 1
            with pytest.raises(OSError, match="power cut"):
                c.run(6)
        else:
            c.run(6)
        out += c.trained
    assert sorted(out) == list(range(18)) and t.n == 6


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_when_the_data_end_the_last_batches_are_saved(tmp_path, loop):
    data, how = list(range(10)), dict(checkpoint=tmp_path, save_every=4)
    if loop == "sync":
        engine = ScriptedEngine(lambda r: 2)
        rows = train_sync(engine, data, speak(), Fake(), 100, batch_size=2, **how)
    else:
        rows = controller(speak(), Fake(), SampleBuffer(2, 0.0), data, **how).run(100)
    assert len(rows) == 5 and latest(tmp_path).name == "step_000005"


def test_a_checkpoint_is_written_once(tmp_path, monkeypatch):
    steps, whole = [], loop_module.save
    monkeypatch.setattr(
        loop_module, "save", lambda out, step, **kw: steps.append(step) or whole(out, step, **kw)
    )
    data = list(range(10))
    controller(speak(), Fake(), SampleBuffer(2, 0.0), data, checkpoint=tmp_path / "a").run(3)
    train_sync(
        ScriptedEngine(lambda r: 2), data, speak(), Fake(), 3, batch_size=2, checkpoint=tmp_path
    )
    assert steps == 2 * [1, 2, 3]


def test_a_controller_that_was_stopped_runs_on():
    late = speak(lambda g, k: 0.01 if g < 4 else 0.3)
    c = controller(late, Fake(lambda n: time.sleep(0.05)), SampleBuffer(2, 1.0))
    c.metrics = lambda row: c.stop() if row["step"] == 2 else None
    with pytest.raises(KeyboardInterrupt):
        c.run(4)
    assert any(any(e.out) for e in c.buffer.groups.values())
    c.metrics = None
    c.run(4)
    assert sorted(c.trained) == list(range(8))


def test_what_json_cannot_hold_is_refused_where_it_comes_in(tmp_path):
    async def scored(client, group, index):
        sample = await speak()(client, group, index)
        return replace(sample, info=dict(score=float("nan")))

    c = controller(scored, Fake(), SampleBuffer(2, 0.0), checkpoint=tmp_path / "nan")
    assert len(c.run(2)) == 2 and not c.failed
    wrong = controller(
        speak(), Fake(), SampleBuffer(2, 0.0), lambda i: {i: "a"}, checkpoint=tmp_path / "keys"
    )
    with pytest.raises(TypeError, match="source: prompt 0 cannot be saved as JSON .*text"):
        wrong.run(2)
