"""The policy loop in the hands of its users: every way in which a rollout can end, numbers that are
none, checkpoints of other runs, optimisers of other models, adapters, half precision"""

import asyncio
import os
import random
import sys
import threading

import numpy as np
import pytest
import torch

from hub import hub_folder
from llmpapers.core.lm import LM, TinyLMConfig, load_lm, tiny_lm, word_tokenizer
from llmpapers.rl import checkpoint as ck
from llmpapers.rl.advantages import discounted_returns, gae, group_advantages
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.engines import HFEngine, ScriptedEngine, generate
from llmpapers.rl.logprobs import masked_whiten, token_logprobs
from llmpapers.rl.loop import AsyncController, train_sync
from llmpapers.rl.losses import PolicyLossConfig, policy_loss, value_loss
from llmpapers.rl.pools import EngineProxy, InProcessPool
from llmpapers.rl.rollout import EngineClient, EpisodeRollout, SingleTurn, StepResult
from llmpapers.rl.run import RunConfig, train_policy
from llmpapers.rl.trainer import PolicyTrainer
from llmpapers.rl.types import (
    Batch,
    ContextExceeded,
    Group,
    Request,
    Sample,
    SamplingConfig,
    collate,
)
from llmpapers.rl.weights import checkpoint_weights, copy_weights, merged, model_logprobs

tok = word_tokenizer([*"abcdefgh"])
sampling = SamplingConfig(4, seed=0)
BAD = 1  # the group whose members end badly


def lm(**kw):
    return tiny_lm(tok, TinyLMConfig(layers=1, width=16, head_dim=8, max_len=32, **kw), 0)


def trainer(model, **kw):
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return PolicyTrainer(model, adam, PolicyLossConfig("ppo"), **kw)


def source(i):
    return "abcdefgh"[i % 8]


def reward(prompt, response, info):
    return float(len(set(response.split())))


def sample(c, value, prompt=(4,), **kw):
    n = len(c.token_ids)
    return Sample(
        list(prompt), c.token_ids, [True] * n, c.logprobs, c.token_versions(), value, **kw
    )


class Ways:
    "A rollout whose members of one group end in a given way, whatever is tried"

    def __init__(self, how):
        self.how = how

    async def __call__(self, client, group, index):
        bad = group.group_id == BAD
        c = await client.generate([999] if bad and self.how == "prompt id" else [4], sampling)
        value = float(index)
        if bad:
            value, kw = self.end(c, value)
            return sample(c, value, **kw) if isinstance(kw, dict) else kw
        return sample(c, value)

    def end(self, c, value):
        match self.how:
            case "raise":
                raise OSError("no more disk")
            case "cancel":
                raise asyncio.CancelledError
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "stop":
                raise StopIteration
            case "generator exit":
                raise GeneratorExit
            case "none":
                return value, None
            case "text":
                return value, "a sample"
            case "nan" | "inf" | "-inf":
                return float(self.how), {}
            case "no reward":
                return None, {}
            case "beyond float32":
                return 1e39, {}
            case "response id":
                object.__setattr__(c, "token_ids", [7, 7, 7, 10**6])
            case "negative id":
                object.__setattr__(c, "token_ids", [7, 7, 7, -1])
            case "oversized":
                return value, dict(prompt=[4] * 60)
            case "unpicklable":
                return value, dict(info=dict(lock=threading.Lock()))
        return value, {}


ways = [
    "raise",
    "cancel",
    "exit",
    "stop",
    "generator exit",
    "none",
    "text",
    "nan",
    "inf",
    "-inf",
    "no reward",
    "beyond float32",
    "prompt id",
    "response id",
    "negative id",
    "oversized",
]


def controller(rollout, timeout=None, alpha=1.0, model=None, **kw):
    model = model or lm()
    pool = InProcessPool(HFEngine(model, copy_model=True), 64, timeout)
    return AsyncController(source, rollout, trainer(model), pool, SampleBuffer(4, alpha, 2), **kw)


@pytest.mark.parametrize("how", ways)
@pytest.mark.slow
def test_a_rollout_that_ends_badly_costs_its_group(how):
    """Asynchronously, in process: the run goes on and names the group"""
    c = controller(Ways(how))
    c.run(3)
    assert len(c.rows) == 3 and [f["group_id"] for f in c.failed] == [BAD]
    assert sorted(c.trained) == [i for i in range(13) if i != BAD]


@pytest.mark.parametrize("how", ways)
def test_a_rollout_that_ends_badly_in_turns(how):
    """The same in the synchronous loop, with a warning"""
    m = lm()
    with pytest.warns(UserWarning, match="1 groups failed 3 times"):
        rows = train_sync(HFEngine(m), source, Ways(how), trainer(m), 3, batch_size=4, group_size=2)
    assert len(rows) == 3


def fragile(seen):
    "Seeded answers; the judge fails at the first two of each member of group BAD"

    async def play(client, group, index):
        c = await client.generate([4], sampling)
        seen.setdefault((group.group_id, index), []).append(list(c.token_ids))
        if group.group_id == BAD and len(seen[group.group_id, index]) < 3:
            raise ValueError("this answer cannot be judged")
        return sample(c, float(index))

    return play


@pytest.mark.parametrize("together", [False, True])
def test_a_seeded_retry_is_another_answer(together):
    """A judge that fails at one answer sees another; two runs are equal"""
    runs = []
    for _ in range(2):
        seen = {}
        if together:
            c = controller(fragile(seen), alpha=0.0)
            c.run(1)
            assert not c.failed
        else:
            m = lm()
            train_sync(
                HFEngine(m), source, fragile(seen), trainer(m), 1, batch_size=4, group_size=2
            )
        for index in range(2):
            tries = seen[BAD, index]
            assert len(tries) == 3 and len({tuple(t) for t in tries}) > 1
        runs.append(seen)
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_a_rollout_that_hangs():
    """A deadline ends it; the others go on"""

    async def play(client, group, index):
        c = await client.generate([4], sampling)
        if group.group_id == BAD:
            await asyncio.sleep(1000)
        return sample(c, float(index))

    c = controller(play, timeout=0.5)
    c.run(3)
    assert [f["group_id"] for f in c.failed] == [BAD] and "timeout_s" in c.failed[0]["error"]


@pytest.mark.slow
def test_what_cannot_be_saved_fails_when_it_arrives(tmp_path):
    """With a checkpoint folder, info that JSON does not hold, or would change, is a failed member;
    NumPy numbers are numbers"""
    for how in ("unpicklable",):
        c = controller(Ways(how), checkpoint=tmp_path / how)
        c.run(2)
        assert [f["group_id"] for f in c.failed] == [BAD] and "info" in c.failed[0]["error"]

    async def play(client, group, index):
        c = await client.generate([4], sampling)
        info = dict(score=np.float32(0.5), parts=[np.int64(3), (torch.tensor(2), 1)])
        return sample(c, np.float32(index), info=info)

    c = controller(play, checkpoint=tmp_path / "numpy")
    c.run(2)
    assert not c.failed and ck.latest(tmp_path / "numpy") is not None

    async def keys(client, group, index):
        return sample(await client.generate([4], sampling), float(index), info={1: "a"})

    with pytest.raises(RuntimeError, match="keys must be text"):
        controller(keys, checkpoint=tmp_path / "keys").run(2)


@pytest.mark.ray
@pytest.mark.xdist_group("ray-faults")
def test_every_end_on_ray():
    """All ways in one run over two actors, hanging and unpicklable ones and one that kills its
    process among them: those groups are named, all others are trained once"""
    from ray import cloudpickle

    from llmpapers.rl.ray import RolloutPool

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    names = [*ways, "unpicklable", "hang", "kill"]
    bad = {25 * i + 5: how for i, how in enumerate(names)}

    async def play(client, group, index):
        how = bad.get(group.group_id)
        c = await client.generate([999] if how == "prompt id" else [4], sampling)
        if how == "hang":
            await asyncio.sleep(1000)
        if how == "kill":
            os._exit(9)
        value = float(index)
        if how:
            value, kw = Ways(how).end(c, value)
            return sample(c, value, **kw) if isinstance(kw, dict) else kw
        return sample(c, value)

    m = lm()
    pool = RolloutPool(lambda: HFEngine(lm()), 2, 4, dict(num_cpus=0.5), timeout_s=8.0)
    c = AsyncController(source, play, trainer(m), pool, SampleBuffer(40, 1.0, 2))
    steps = 25 * len(names) // 40
    c.run(steps)
    done = sorted(c.trained)
    failed = sorted(f["group_id"] for f in c.failed)
    assert len(c.rows) == steps
    assert set(failed) <= set(bad) and len(failed) >= len(names) - 3
    assert not set(done) & set(bad) and len(done) == 40 * steps
    early = max(done) - 80  # what was admitted before the last two batches is done or failed
    assert set(range(early)) <= set(done + failed)


class Steps:
    "A trainer that takes a random time"

    def __init__(self, seed):
        self.random = random.Random(seed)

    def step(self, batch):
        if self.random.random() < 0.5:
            import time

            time.sleep(self.random.random() * 2e-3)
        return {}

    def weights(self):
        return {}


@pytest.mark.slow
def test_abort_trains_every_prompt_once():
    """`on_stale="abort"` in 200 random schedules through the controller"""

    def play(seed):
        async def rollout(client, group, index):
            c = await client.generate([4], SamplingConfig(64, seed=0))
            return sample(c, float(index))

        return rollout

    aborted = 0
    for seed in range(200):
        g = random.Random(seed)
        size, members, steps = g.randint(1, 4), g.randint(1, 3), g.randint(2, 8)
        lengths = {}

        def length(request, g=g, lengths=lengths):
            return lengths.setdefault(request.request_id, g.choice([1, 1, 2, 5, 30]))

        pool = InProcessPool(ScriptedEngine(length, max_active=g.randint(1, 16)), g.randint(1, 16))
        buffer = SampleBuffer(size, g.choice([0.5, 1.0, 2.0, 3.0]), members, "abort")
        prompts = [str(i) for i in range(size * steps)]
        c = AsyncController(prompts, play(seed), Steps(seed), pool, buffer)
        c.run(steps)
        assert sorted(c.trained) == list(range(size * steps)), seed
        aborted += buffer.count["aborted"]
    assert aborted > 50, "the schedules did not make anything old"


def test_the_policy_that_samples_is_the_one_that_trains():
    """Temperatures, groups of one, the optimiser of a copy: refused before anything is sampled"""
    m = lm()
    hot = SingleTurn(tok, reward, SamplingConfig(4, 0.5, seed=0))
    plain = SingleTurn(tok, reward, sampling)
    args = dict(batch_size=2, group_size=2)
    with pytest.raises(ValueError, match="temperature: the rollout samples at 0.5"):
        train_sync(HFEngine(m), source, hot, trainer(m), 1, **args)
    with pytest.raises(ValueError, match="temperature"):
        controller(hot)
    with pytest.raises(ValueError, match="group_size=1"):
        train_sync(HFEngine(m), source, plain, trainer(m), 1, batch_size=2)
    with pytest.raises(ValueError, match="none of the model's"):
        PolicyTrainer(m, torch.optim.AdamW(lm().parameters()), PolicyLossConfig())
    rows = train_sync(HFEngine(m), source, hot, trainer(m, temperature=0.5), 2, **args)
    assert abs(rows[0]["kl/behavior"]) < 1e-6

    async def hidden(client, group, index):
        c = await client.generate([4], SamplingConfig(8, 0.2, seed=0))
        return sample(c, float(index))

    with pytest.warns(UserWarning, match="kl/behavior"):
        train_sync(HFEngine(m), source, hidden, trainer(m), 1, **args)


def test_weights_that_are_not_contiguous_come_back(tmp_path):
    a, b = trainer(lm(tied=False)), trainer(lm(tied=False))
    w = a.model.lm_head.weight
    w.data = torch.randn_like(w).t().contiguous().t()
    ck.save(tmp_path, 1, trainer=a)
    ck.load(tmp_path, trainer=b)
    assert torch.equal(a.model.lm_head.weight, b.model.lm_head.weight)


def test_a_save_that_is_killed_between_its_two_renames(tmp_path, monkeypatch):
    """The checkpoint it was replacing is still found, by readers at once and by the next save for
    good; unfinished folders go"""
    t = trainer(lm())
    ck.save(tmp_path, 3, trainer=t)
    real = os.replace

    def dies(a, b):
        real(a, b)
        if str(b).endswith(".old"):
            raise SystemExit

    with monkeypatch.context() as m:
        m.setattr(ck.os, "replace", dies)
        with pytest.raises(SystemExit):
            ck.save(tmp_path, 3, trainer=t)
    assert ck.latest(tmp_path).name == "step_000003.old"
    assert ck.load(tmp_path, trainer=trainer(lm()))["step"] == 3
    ck.save(tmp_path, 4, trainer=t)
    names = sorted(p.name for p in tmp_path.glob("step_*"))
    assert names == ["step_000003", "step_000004"]


def test_groups_in_flight_are_not_lost_by_the_other_loop(tmp_path):
    """A checkpoint of the asynchronous loop with groups in flight is refused by `train_sync`"""
    c = controller(SingleTurn(tok, reward, sampling), checkpoint=tmp_path, alpha=2.0)
    c.metrics = lambda row: c.stop() if row["step"] == 2 else None
    with pytest.raises(KeyboardInterrupt):
        c.run(6)
    assert ck.outstanding(ck.latest(tmp_path)) > 0
    m = lm()
    with pytest.raises(ValueError, match="groups in flight"):
        train_sync(
            HFEngine(m),
            source,
            SingleTurn(tok, reward, sampling),
            trainer(m),
            6,
            batch_size=4,
            group_size=2,
            checkpoint=tmp_path,
        )


def test_a_second_interrupt_does_not_kill_the_process():
    """It cancels; a kernel lives on"""
    c = controller(SingleTurn(tok, reward, sampling))

    def twice(row):
        c.stop()
        c.stop()

    c.metrics = twice
    with pytest.raises(KeyboardInterrupt):
        c.run(6)


@pytest.mark.parametrize("ids", [[96], [-1], [4, 10**9]])
def test_one_bad_request_is_refused(ids):
    e = HFEngine(lm())
    with pytest.raises(ValueError, match="is none of the"):
        e.add(Request("a", ids, sampling))
    assert len(generate(e, [Request("b", [4], sampling)])) == 1


class Wild:
    "A constraint that fails, or allows what there is not, after some tokens"

    def __init__(self, at, what):
        self.at, self.what = at, what

    def allowed(self, ids):
        if len(ids) < self.at:
            return None
        if self.what == "raise":
            raise KeyError("no such item")
        return [5, 10**6]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("what", ["raise", "beyond"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_constraint_that_fails_ends_its_request_only(at, what, cache):
    e = HFEngine(lm(), use_cache=cache)
    e.add(Request("bad", [4], SamplingConfig(6, seed=0), constraint=Wild(at, what)))
    e.add(Request("good", [4], SamplingConfig(6, seed=0)))
    done = []
    while e.num_active:
        done += e.step()
    assert [c.request_id for c in done] == ["good"] and set(e.errors) == {"bad"}
    (want,) = generate(
        HFEngine(lm(), use_cache=cache), [Request("good", [4], SamplingConfig(6, seed=0))]
    )
    assert done[0].token_ids == want.token_ids


def test_a_constraint_that_fails_is_a_failed_member():
    class Play:
        async def __call__(self, client, group, index):
            limits = {"constraint": Wild(2, "raise")} if group.group_id == BAD else {}
            c = await client.generate([4], sampling, **limits)
            return sample(c, float(index))

    c = controller(Play())
    c.run(3)
    assert [f["group_id"] for f in c.failed] == [BAD] and "no such item" in c.failed[0]["error"]


class Talker:
    "An environment that never ends"

    def reset(self, prompt, seed):
        return "a b"

    def step(self, action):
        return StepResult("c d e f", reward=1.0)


@pytest.mark.parametrize("room", [None, 20])
def test_an_episode_that_outgrows_the_model_keeps_its_turns(room):
    """Whether the rollout knows the context or only the engine: "length", whole turns, no reward
    lost; an episode whose first prompt does not fit fails by name"""
    rollout = EpisodeRollout(
        Talker, tok, SamplingConfig(3, seed=0), max_turns=50, max_context=room, in_thread=False
    )
    c = controller(rollout)
    rows = c.run(2)
    assert not c.failed and rows[-1]["rollout/truncated"] == 1

    async def one(prompt_room):
        proxy = EngineProxy(HFEngine(lm()), threaded=False)
        client = EngineClient(proxy.generate, 0, 0)
        return await EpisodeRollout(
            Talker, tok, SamplingConfig(prompt_room, seed=0), max_turns=50, max_context=room
        )(client, Group(0, "x", 0), 0)

    s = asyncio.run(one(3))
    assert s.finish_reason == "length" and s.info["ended"] == "max_context"
    assert len(s.turns) == s.reward >= 2 and len(s.prompt_ids) + len(s.response_ids) <= (room or 32)
    if room is None:
        with pytest.raises(ContextExceeded, match="the engine takes 32"):
            asyncio.run(one(31))


def test_two_controllers_do_not_share_a_pool():
    c = controller(SingleTurn(tok, reward, sampling))
    other = AsyncController(source, c.rollout, c.trainer, c.pool, SampleBuffer(4, 1.0, 2))

    async def both():
        return await asyncio.gather(c.arun(2), other.arun(2), return_exceptions=True)

    got = asyncio.run(both())
    assert len(got[0]) == 2 and "serves another controller" in str(got[1])


@pytest.mark.ray
@pytest.mark.xdist_group("ray-faults")
def test_resources_that_cannot_be_had_are_named():
    from ray import cloudpickle

    from llmpapers.rl.pools import RolloutPoolError
    from llmpapers.rl.ray import RolloutPool

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = RolloutPool(lambda: HFEngine(lm()), 2, ray_options=dict(num_gpus=1))
    m = lm()
    c = AsyncController(
        source, SingleTurn(tok, reward, sampling), trainer(m), pool, SampleBuffer(2, 1.0, 2)
    )
    with pytest.raises(RolloutPoolError, match="2 GPU, this machine has 0"):
        c.run(1)


# ---- numbers that are none, modes, dtypes


@pytest.mark.parametrize(
    "name", ["reinforce", "ppo", "decoupled_ppo", "tis", "cispo", "topr", "gspo"]
)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_padding_may_hold_anything(name, junk):
    """Values and gradients of every loss are those without it"""
    g = torch.Generator().manual_seed(0)
    m = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    lp, old, A, H = (torch.randn(2, 4, generator=g) - 1 for _ in range(4))
    cfg = PolicyLossConfig(name, kl_coef=0.1, entropy_coef=0.1)

    def run(fill):
        def dirty(x):
            return torch.where(m, x, fill).clone()

        z = dirty(lp).requires_grad_()
        batch = Batch(
            input_ids=torch.zeros(2, 4, dtype=torch.long),
            attention_mask=torch.ones(2, 4, dtype=torch.bool),
            response_mask=m,
            behavior_logprobs=dirty(old),
            advantages=dirty(A),
            rewards=torch.tensor([1.0, 0.0]),
            group_ids=torch.zeros(2, dtype=torch.long),
            versions=torch.zeros(2, dtype=torch.long),
            token_versions=torch.zeros(2, 4, dtype=torch.long),
        )
        others = dict(proximal_logprobs=dirty(old), ref_logprobs=dirty(old), entropy=dirty(H))
        loss, seen = policy_loss(cfg, batch, z, **others)
        loss.backward()
        return loss.item(), z.grad, seen

    clean, got = run(0.0), run(junk)
    assert clean[0] == got[0] and torch.equal(clean[1], got[1]) and clean[2] == got[2]


def test_values_on_padding_do_not_reach_the_gradient():
    m = torch.tensor([[0, 1, 1, 0]], dtype=torch.bool)
    v = torch.tensor([[float("nan"), 1.0, 2.0, float("inf")]], requires_grad=True)
    value_loss(v, v.detach(), torch.zeros(1, 4), m, clip=0.5).backward()
    assert v.grad.isfinite().all() and (v.grad[~m] == 0).all()
    gae(torch.zeros(1, 40), torch.zeros(1, 40, requires_grad=True), torch.ones(1, 40) > 0)
    r = discounted_returns(torch.tensor([[0, 0, 1]]), torch.ones(1, 3) > 0, gamma=0.5)
    assert r.dtype == torch.float32 and r.tolist() == [[0.25, 0.5, 1.0]]
    half = (
        torch.full((1, 4), 300.0, dtype=torch.float16) * torch.tensor([[1.0, 2.0, 3.0, 4.0]]).half()
    )
    assert masked_whiten(half, torch.ones(1, 4) > 0).isfinite().all()


@pytest.mark.parametrize("baseline", ["mean", "loo", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_groups_without_a_difference_have_no_advantage(baseline, dtype):
    ids = torch.tensor([0, 0, 0, 1])
    A = group_advantages(torch.ones(4).to(dtype), ids, baseline=baseline)
    assert A.dtype == torch.float32 and (A == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_changed_default_dtype_changes_nothing(dtype):
    def run():
        m = lm()
        rows = train_sync(
            HFEngine(m, use_cache=True),
            source,
            SingleTurn(tok, reward, sampling),
            trainer(m, watch_entropy=True),
            2,
            batch_size=2,
            group_size=4,
        )
        keep = ("train/loss", "entropy", "rollout/reward", "ratio/mean", "train/grad_norm")
        return [[r[k] for k in keep] for r in rows]

    want, before = run(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert run() == want
    finally:
        torch.set_default_dtype(before)


def test_a_model_in_training_mode_samples_and_scores_without_dropout():
    m = tiny_lm(tok, TinyLMConfig("gpt_neox", 2, 2, 1, 32, max_len=32, dropout=0.4), 0)
    engine, t = HFEngine(m, use_cache=True), trainer(m)
    m.train()
    requests = [Request(str(i), [4, 5], SamplingConfig(8, seed=i)) for i in range(4)]
    got = generate(engine, requests)
    group = Group(0, None, 0)
    group.samples.extend(sample(c, float(i % 2), (4, 5)) for i, c in enumerate(got))
    batch = collate([group], 0)
    m.train()
    ids = [4, 5, 6, 7]
    assert t.probe()[1] == pytest.approx(t.probe()[1], abs=0) and m.training
    assert engine.logprobs(ids) == pytest.approx(model_logprobs(m, ids), abs=1e-4)
    gap = (t.score(batch) - batch.behavior_logprobs)[batch.response_mask].abs().max()
    assert gap < 1e-4 and abs(t.step(batch)["kl/behavior"]) < 1e-6


@pytest.mark.parametrize(
    "field, value",
    [
        ("batch_size", 0),
        ("group_size", 1.5),
        ("slots", True),
        ("async_ratio", float("nan")),
        ("async_ratio", -1),
        ("timeout_s", 0),
        ("on_stale", "drop"),
        ("engine", "sglang"),
        ("loop", "both"),
        ("actors", -1),
        ("dtype", "int8"),
        ("gpus_per_actor", -1),
        ("save_every", 0),
    ],
)
def test_an_arrangement_is_checked_when_it_is_made(field, value):
    with pytest.raises(ValueError, match=field):
        RunConfig(**{field: value})


# ---- adapters and half precision


def adapted(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_lm(tok, TinyLMConfig(layers=2, width=32, head_dim=8, max_len=32), 0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if kind == "injected":
        model.add_adapter(lora)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        return model.eval()
    if kind == "saved modules":
        lora = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["up_proj"], init_lora_weights=False
        )
    return peft.get_peft_model(model, lora).eval()


def lora_trainer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return PolicyTrainer(model, torch.optim.AdamW(trained, lr=3e-2), PolicyLossConfig("ppo"))


def plain_logprobs(model, r, c):
    ids = torch.tensor([r.prompt_ids + c.token_ids])
    with torch.no_grad():
        return token_logprobs(model(input_ids=ids).logits, ids)[0, len(r.prompt_ids) :]


@pytest.mark.parametrize("copy_model", [False, True], ids=["shared", "own copy"])
@pytest.mark.parametrize("kind", ["peft model", "injected", "saved modules"])
def test_adapters_are_sampled_trained_and_sent(kind, copy_model):
    """The log-probabilities of the engine equal the trainer's before and after an update"""
    model = adapted(kind)
    t = lora_trainer(model)
    engine = HFEngine(model, use_cache=True, copy_model=copy_model)
    before = checkpoint_weights(model)
    assert not [k for k in before if "lora" in k or "base_layer" in k or "modules_to_save" in k]
    for version in (1, 2):
        requests = [
            Request(f"{version}.{i}", [4, 5, 6], SamplingConfig(8, seed=i)) for i in range(4)
        ]
        got = generate(engine, requests)
        for r, c in zip(requests, got):
            gap = plain_logprobs(model, r, c) - torch.tensor(c.logprobs)
            assert gap.abs().max() < 1e-4
        group = Group(0, None, 0)
        group.samples.extend(sample(c, float(i % 2), (4, 5, 6)) for i, c in enumerate(got))
        res = t.step(collate([group], 0))
        assert abs(res["ratio/mean"] - 1) < 1e-4
        engine.load_weights(t.weights() if copy_model else None, version)
    after = checkpoint_weights(model)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", ["peft model", "injected", "saved modules"])
def test_adapters_are_checkpointed(kind, tmp_path):
    """What is loaded goes on as what was saved; what was merged is the model"""
    a, b = lora_trainer(adapted(kind)), lora_trainer(adapted(kind))
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        for p in a.model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        want = a.model(input_ids=ids).logits
        assert not torch.equal(b.model(input_ids=ids).logits, want)
    ck.save(tmp_path, 1, trainer=a)
    ck.load(tmp_path, trainer=b)
    with torch.no_grad():
        assert torch.equal(b.model(input_ids=ids).logits, want)
        assert (merged(a.model)(input_ids=ids).logits - want).abs().max() < 1e-4
    fresh = tiny_lm(tok, TinyLMConfig(layers=2, width=32, head_dim=8, max_len=32), 5)
    copy_weights(fresh, a.weights())
    with torch.no_grad():
        assert (fresh(input_ids=ids).logits - want).abs().max() < 1e-4


def test_adapters_travel_to_actors_as_a_plain_model(tmp_path):
    """The folder that actors read holds the merged model under its own names"""
    model = adapted("peft model")
    policy = LM(model, tok, "policy")
    cfg = RunConfig(batch_size=2, group_size=2, loop="async", slots=8)
    run = train_policy(
        policy,
        lora_trainer(model),
        SingleTurn(tok, reward, sampling),
        source,
        2,
        cfg,
        folder=tmp_path,
    )
    assert len(run.rows) == 2
    saved = load_lm(str(tmp_path / "model"), device="cpu").model
    assert set(checkpoint_weights(saved)) == set(checkpoint_weights(model))


kinds = [("llama", True), ("llama", False), ("qwen3", True), ("gpt_neox", False), ("gemma3", True)]
kinds += [("mistral", False)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, tied", kinds, ids=[f"{k}-{t}" for k, t in kinds])
def test_a_bf16_checkpoint_learns(kind, tied, tmp_path):
    """From a folder like the hub's, in both loops: what is rewarded becomes more likely, weights in
    float32 take small steps, and sampler and trainer stay one policy"""
    policy = load_lm(hub_folder(tmp_path / "hub", kind, tied), device="cpu")
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    chat = SingleTurn(
        policy.tokenizer,
        lambda p, r, i: float(sum(ch in "aeiou" for ch in r)),
        SamplingConfig(6, stop_token_ids=(policy.tokenizer.eos_token_id,), seed=0),
        chat_template=True,
    )
    adam = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    t = PolicyTrainer(policy.model, adam, PolicyLossConfig())
    assert t.autocast_dtype == torch.bfloat16

    def run(steps, loop):
        cfg = RunConfig(4, 8, loop, slots=32)
        return train_policy(policy, t, chat, lambda i: f"add {i}", steps, cfg).rows

    rows = run(12, "sync")
    assert abs(rows[0]["ratio/mean"] - 1) < 0.1 and not rows[-1]["train/skipped"]
    first, last = (sum(r["rollout/reward"] for r in part) for part in (rows[:2], rows[-2:]))
    assert last > first, (first, last)
    before = t.weights()
    adam.param_groups[0]["lr"] = 1e-6
    assert len(run(2, "async")) == 2
    moved = sum((before[k] != v).float().mean() for k, v in t.weights().items()) / len(before)
    assert moved > 0.5
