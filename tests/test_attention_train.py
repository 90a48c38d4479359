"Token credit in training: equivalences, engines and loops by argument, cost, and the tabular world"

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmpapers.attention_rhythm import train as T
from llmpapers.attention_rhythm.train import (
    CountdownLMConfig,
    Problems,
    RhythmConfig,
    RhythmCredit,
    RhythmScale,
    TabularConfig,
    chain_problems,
    countdown_lm,
    countdown_problems,
    countdown_trace,
    load_policy,
    planted_rhythm,
    rhythm_maps,
    rhythm_outcome,
    success_rate,
    tabular_grpo,
    tabular_world,
    train_rhythm,
)
from llmpapers.core.lm import LM, TinyLMConfig, load_lm, save_lm, tiny_lm
from llmpapers.core.scale import rng
from llmpapers.core.tasks import ChainTask, Countdown
from llmpapers.core.train import TrainConfig
from llmpapers.rl.decoder import Decoder
from llmpapers.rl.engines import HFEngine

task = ChainTask(n_steps=2, names="abcd", max_filler=0)
few = RhythmConfig(steps=2, prompts=2, group_size=3, max_new_tokens=8, lr=1e-2, h_lo=1, h_hi=6)


@pytest.fixture(scope="module")
def lm():
    return LM(
        tiny_lm(task.tokenizer, TinyLMConfig(layers=2, width=32, head_dim=8, max_len=96), 0),
        task.tokenizer,
        "tiny",
    )


@pytest.fixture(scope="module")
def problems():
    "Reward by length and content, so that an untrained model has groups with different rewards"
    return Problems(
        chain_problems(task).prompt,
        lambda prompt, response, info: float(sum(map(ord, response)) % 7),
    )


def flat(lm):
    return torch.cat([p.detach().flatten() for p in lm.model.parameters()])


def test_amp_one_is_grpo_and_the_plug_acts(lm, problems):
    """Bit for bit the weights of plain GRPO with amp = 1, whatever the strategy; other weights with
    1.5; the given model is untouched"""
    before = flat(lm).clone()
    plain = flat(train_rhythm(lm, problems, replace(few, strategy="none")).lm)
    assert not torch.equal(plain, before) and torch.equal(flat(lm), before)
    for s in ("uniform", "random", "entropy", "local", "global", "coupled"):
        assert torch.equal(
            flat(train_rhythm(lm, problems, replace(few, strategy=s, amp=1.0)).lm), plain
        )
        assert not torch.equal(flat(train_rhythm(lm, problems, replace(few, strategy=s)).lm), plain)


def test_signals_in_parts_use_one_head_split(lm, problems):
    """Rows of one forward pass: parts after the first use its heads, and the model's attention is
    what it was"""
    run = train_rhythm(lm, problems, few)
    seen, credit = [], RhythmCredit(run.trainer, replace(few, signal_rows=2))
    real, T.rhythm_signals = (
        T.rhythm_signals,
        lambda *a, **k: (seen.append(k["heads"]), real(*a, **k))[1],
    )
    try:
        batch = batch_of(lm, problems)
        sig = credit.signals(batch)
    finally:
        T.rhythm_signals = real
    assert seen[0] is None and all(h is not None for h in seen[1:]) and len(seen) == 3
    assert (
        sig["waad"].shape == batch.input_ids.shape
        and run.lm.model.config._attn_implementation == "sdpa"
    )


def batch_of(lm, problems):
    "A batch as the trainer sees it"
    kept = []

    class Stop(Exception):
        pass

    def advantages(self, batch):
        kept.append(batch)
        raise Stop

    old, RhythmCredit.__call__ = RhythmCredit.__call__, advantages
    try:
        with pytest.raises(Stop):
            train_rhythm(lm, problems, few)
    finally:
        RhythmCredit.__call__ = old
    return kept[0]


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_loops(lm, problems, loop):
    "Both loops give one finite row a batch, with the cost of the signals as a share of the step"
    run = train_rhythm(lm, problems, replace(few, loop=loop, steps=3))
    assert [r["step"] for r in run.rows] == [1, 2, 3]
    for r in run.rows:
        assert all(math.isfinite(v) for v in r.values())
        assert (
            0 < r["rhythm/share"] < 1
            and 1 <= r["rhythm/gamma_mean"] <= 1.5
            and r["train/skipped"] == 0
        )


def test_checkpoint_goes_on(lm, problems, tmp_path):
    "A run that was saved goes on where it was and ends with the same weights"
    whole = train_rhythm(lm, problems, replace(few, steps=3))
    train_rhythm(lm, problems, few, out=tmp_path / "run")
    rest = train_rhythm(lm, problems, replace(few, steps=3), out=tmp_path / "run")
    assert len(rest.rows) == 1 and torch.equal(flat(rest.lm), flat(whole.lm))


def test_vllm_path(lm, problems, monkeypatch, tmp_path):
    """engine='vllm' hands vLLM a folder with the policy, and the same loop trains; nothing of it is
    imported otherwise"""
    from llmpapers.rl import run as arrangements

    made = []

    class Stand(HFEngine):
        "Takes what VLLMEngine takes, samples with a copy in PyTorch"

        def __init__(self, model, max_active, dtype, seed, **args):
            made.append((model, dtype, args))
            super().__init__(load_lm(str(model)).model, max_active=max_active, decoder=Decoder)

    monkeypatch.setattr(arrangements, "VLLMEngine", Stand)
    hf = train_rhythm(lm, problems, few)
    assert not made
    run = train_rhythm(lm, problems, replace(few, engine="vllm"), kv_gib=2)
    assert made[0][1:] == ("float32", dict(kv_gib=2)) and torch.equal(flat(run.lm), flat(hf.lm))
    folder = save_lm(lm, tmp_path / "policy")
    train_rhythm(str(folder), problems, replace(few, engine="vllm", steps=1))
    assert str(made[1][0]) == str(folder)


def test_what_is_missing_is_named(lm, problems, tmp_path):
    with pytest.raises(ValueError, match="no folder with a config.json"):
        load_policy(tmp_path / "none")
    with pytest.raises(ValueError, match="no folder with a config.json"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="hub id"):
        load_policy("no such model")
    with pytest.raises(RuntimeError, match="cannot load 'nobody/nothing'"):
        load_policy("nobody/nothing")


@pytest.mark.parametrize(
    "kw",
    [
        dict(strategy="x"),
        dict(sign="x"),
        dict(engine="x"),
        dict(loop="x"),
        dict(steps=0),
        dict(group_size=1),
        dict(h_lo=9, h_hi=3),
    ],
)
def test_bad_configuration(kw):
    with pytest.raises(ValueError, match=next(reversed(kw))):
        RhythmConfig(**kw)


# ---- Countdown -----------------------------------------------------------------------------------
def test_countdown_traces_are_right_and_readable_by_the_verifier():
    p = countdown_problems(Countdown(), 3)
    for i in range(60):
        x = p.prompt(i)
        trace = countdown_trace(x["solution"])
        assert p.reward(x["prompt"], trace, x) == 1.0 and x == p.prompt(i)
        steps, last = trace.split("\n")
        assert (
            last == x["solution"]
            and len(steps.split(";")) == 3
            and steps.split(";")[-1].endswith(f"={x['target']}")
        )


def test_countdown_outcome_is_cached(tmp_path, monkeypatch):
    "The whole path of the GPU scale with a tiny model, in bfloat16, once"
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    recipe = CountdownLMConfig(
        Countdown(3),
        TinyLMConfig(layers=2, width=32, max_len=128),
        TrainConfig(steps=3, batch_size=4),
    )
    size = RhythmScale("countdown", recipe, Countdown(3), replace(few, bf16=True, steps=1), 1, 4)
    a = rhythm_outcome(size, size.run)
    monkeypatch.setattr(T, "train_rhythm", None)
    assert rhythm_outcome(size, size.run) == a and set(a) == {
        "before",
        "after",
        "reward",
        "share",
        "coverage",
    }
    assert success_rate(countdown_lm(recipe), countdown_problems(Countdown(3)), 4, 8) in (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )


# ---- the tabular world ---------------------------------------------------------------------------
small = TabularConfig(seeds=3, prompts=3, group=4, iterations=4)


def test_planted_maps():
    on, an = planted_rhythm(50, 32, rng(0))
    assert on[:, 0].all() and not (on & an).any()
    for o, a in zip(on, an):
        starts, anchors = o.nonzero().flatten(), a.nonzero().flatten()
        gaps = starts.diff()
        assert gaps.min() >= 3 and gaps.max() <= 6
        assert all(0 < (x - starts[starts < x].max()) <= 2 for x in anchors)
    attn, m = rhythm_maps(on, an, generator=rng(1))
    torch.testing.assert_close(attn.sum(-1), torch.ones(attn.shape[:-1]))
    assert not attn.triu(1).any() and m.sum(-1).eq(32).all()


def test_tabular_equivalences_and_pairing():
    "amp = 1 is GRPO, alpha = 0 is global-anchor, and the same world twice gives the same curves"
    world = tabular_world(small)
    base = tabular_grpo(world, small, "none")
    assert (
        base.success.shape == (3, 5)
        and 0 <= base.success.min()
        and base.success.max() <= 1
        and base.hit == 0
    )
    assert np.array_equal(tabular_grpo(world, small, "coupled", amp=1.0).success, base.success)
    assert np.array_equal(
        tabular_grpo(world, small, "coupled", alpha=0.0).success,
        tabular_grpo(world, small, "global").success,
    )
    assert np.array_equal(
        tabular_grpo(tabular_world(small), small, "coupled").success,
        tabular_grpo(world, small, "coupled").success,
    )
    assert (
        tabular_grpo(world, small, "oracle", q=0.1).hit == 1.0
        and tabular_grpo(world, replace(small, max_norm=math.inf), "none").clipped == 0.0
    )


def test_tabular_start_and_gradient():
    """The start is p_start to the number of decisive choices; one update without clip or norm
    equals the policy gradient by hand"""
    cfg = replace(small, iterations=1, updates=1, max_norm=math.inf, clip=10.0)
    world = tabular_world(cfg)
    start = (cfg.p_start ** world.decisive.sum(-1).double()).mean(-1)
    np.testing.assert_allclose(tabular_grpo(world, cfg, "none").success[:, 0], start, rtol=1e-4)
    theta = torch.randn(1, 1, 2, 3)
    y = torch.tensor([[[[0, 1], [2, 1]]]])
    A = torch.tensor([1.0, -1.0])[None, None, :, None].expand(1, 1, 2, 2)
    old = theta.log_softmax(-1)[:, :, None].expand(1, 1, 2, 2, 3).gather(-1, y[..., None])[..., 0]
    new, scaled = T._ascend(theta, y, old, A, cfg)
    by_hand = (
        sum(
            a * (torch.nn.functional.one_hot(k, 3) - theta[0, 0].softmax(-1))
            for a, k in zip((1.0, -1.0), y[0, 0])
        )
        / 2
    )
    torch.testing.assert_close(new[0, 0], theta[0, 0] + cfg.lr * by_hand)
    assert not scaled.any()


@pytest.mark.parametrize(
    "kw", [dict(decisive="x"), dict(group=1), dict(length=4), dict(p_start=0.1), dict(seeds=0)]
)
def test_bad_world(kw):
    with pytest.raises(ValueError):
        TabularConfig(**kw)
