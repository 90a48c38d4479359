"Token credit in training: equivalences, engines and loops by argument, cost, and the tabular world"

import copy
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from llmpapers.attention_rhythm import train as T
from llmpapers.attention_rhythm.analysis import (
    coupling_stats,
    load_prompts,
    perturb_rollouts,
    sample_responses,
    token_entropy,
)
from llmpapers.attention_rhythm.capture import rhythm_signals
from llmpapers.attention_rhythm.credit import credit_gamma
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
    tabular_worlds,
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


@pytest.mark.slow
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


def test_neither_parts_nor_order_change_the_credit(lm, problems):
    """Any number of rows at a time, any order, a part without a response token: the same heads, the
    same coefficients, and the model's attention is what it was"""
    run = train_rhythm(lm, problems, few)
    batch = batch_of(lm, problems)
    batch.response_mask[1] = False
    whole = RhythmCredit(run.trainer, few).signals(batch)
    gamma = credit_gamma("coupled", batch.response_mask, **whole)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    for rows in (1, 2, 4):
        credit = RhythmCredit(run.trainer, replace(few, signal_rows=rows))
        parts, moved = credit.signals(batch), credit.signals(batch.rows(order.tolist()))
        for name in ("waad", "fai"):
            torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=0)
            torch.testing.assert_close(moved[name], whole[name][order], atol=1e-5, rtol=0)
        again = credit_gamma("coupled", batch.response_mask[order], **moved)
        assert torch.equal(again, gamma[order])
    assert run.lm.model.config._attn_implementation == "sdpa"


def test_frozen_heads_stay_and_are_in_the_checkpoint(lm, problems, tmp_path):
    "The heads of the first batch serve the run, also after it was broken off"
    cfg = replace(few, steps=3, freeze=True, lr=3e-2, signal_rows=2)
    whole = train_rhythm(lm, problems, cfg)
    heads = whole.trainer.advantages_fn.heads
    free = train_rhythm(lm, problems, replace(cfg, freeze=False))
    assert free.trainer.advantages_fn.heads is None
    train_rhythm(lm, problems, replace(cfg, steps=1), out=tmp_path / "run")
    rest = train_rhythm(lm, problems, cfg, out=tmp_path / "run")
    kept = rest.trainer.advantages_fn.heads
    assert all(torch.equal(a, b) for a, b in zip(kept, heads))
    assert torch.equal(flat(rest.lm), flat(whole.lm))


@pytest.mark.parametrize("strategy", ["random", "entropy"])
def test_a_resumed_run_draws_what_the_whole_run_drew(lm, problems, tmp_path, strategy):
    cfg = replace(few, strategy=strategy, steps=3)
    whole = train_rhythm(lm, problems, cfg)
    train_rhythm(lm, problems, replace(cfg, steps=1), out=tmp_path / "run")
    assert torch.equal(
        flat(train_rhythm(lm, problems, cfg, out=tmp_path / "run").lm), flat(whole.lm)
    )


def test_thresholds_of_the_configuration_reach_the_credit(lm, problems):
    "With an infinite jump nothing is handed back: coupled is then global"
    batch, run = batch_of(lm, problems), train_rhythm(lm, problems, replace(few, steps=1))

    def shaped(**kw):
        return RhythmCredit(run.trainer, replace(few, **kw))(batch)

    assert torch.equal(shaped(tau_delta=math.inf), shaped(strategy="global"))
    assert not torch.equal(shaped(), shaped(strategy="global"))


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


# ---- a checkpoint as it comes from the hub -------------------------------------------------------
@pytest.fixture
def half_folder(lm, tmp_path):
    "A folder like a hub's, in bfloat16"
    model = copy.deepcopy(lm.model).to(torch.bfloat16)
    return save_lm(lm._replace(model=model), tmp_path / "policy")


def test_half_precision_checkpoints_are_trained_in_single_precision(lm, problems, half_folder):
    "Folder, path and model in memory: float32 masters move by steps that bfloat16 could not hold"
    start = load_lm(str(half_folder))
    assert start.model.dtype == torch.bfloat16
    cfg = replace(few, lr=1e-6, bf16=True)
    for policy in (str(half_folder), half_folder, start):
        run = train_rhythm(policy, problems, cfg)
        moved = flat(run.lm) - flat(start).float()
        assert {p.dtype for p in run.lm.model.parameters()} == {torch.float32}
        assert (moved != 0).float().mean() > 0.9
        assert not torch.equal(flat(run.lm), flat(run.lm).to(torch.bfloat16).float())
    assert start.model.dtype == torch.bfloat16


def test_a_half_precision_checkpoint_learns(problems, half_folder):
    "The reward of a task that is easy to please rises"
    tok = load_lm(str(half_folder)).tokenizer
    liked = tok.decode([tok.vocab_size - 3])
    please = Problems(problems.prompt, lambda p, r, info: r.count(liked) / max(1, len(r)))
    cfg = RhythmConfig(
        steps=12, prompts=4, group_size=8, max_new_tokens=8, lr=1e-2, h_lo=1, h_hi=6, bf16=True
    )
    rewards = [r["rollout/reward"] for r in train_rhythm(half_folder, please, cfg).rows]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]) + 0.1


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_the_published_recipe_runs(problems, half_folder, monkeypatch, loop):
    "Two steps of `rhythm_paper` on a tiny checkpoint, with little data and a stand-in for vLLM"
    from llmpapers.rl import run as arrangements

    made = []

    class Stand(HFEngine):
        def __init__(self, model, max_active, dtype, seed, **args):
            made.append((str(model), dtype, args))
            lm = load_lm(str(model), dtype=torch.float32)
            super().__init__(lm.model, max_active=max_active, decoder=Decoder)

    monkeypatch.setattr(arrangements, "VLLMEngine", Stand)
    less = dict(steps=2, prompts=2, group_size=2, max_new_tokens=8, h_lo=1, h_hi=6, minibatches=2)
    cfg = replace(T.rhythm_paper, loop=loop, async_ratio=0.0, **less)
    run = train_rhythm(half_folder, problems, cfg, gpu_memory_utilization=0.4)
    assert [r["step"] for r in run.rows] == [1, 2] and run.trainer.advantages_fn.heads is not None
    assert made == [(str(half_folder), "bfloat16", dict(gpu_memory_utilization=0.4))]


def test_a_checkpoint_and_a_data_set_are_measured(half_folder, tmp_path):
    "The path of `model=` and `dataset=`: JSON lines as the field writes them, a bfloat16 folder"
    questions = ["a = b + c ?", "b = a - c ; \u2028 c = a"]
    lines = [json.dumps(dict(question=q), ensure_ascii=False) for q in questions]
    (tmp_path / "data.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    net, tok, _ = load_lm(str(half_folder))
    prompts = load_prompts(str(tmp_path / "data.jsonl"), 2, tok)
    assert prompts == [tok(q)["input_ids"] for q in questions]
    res = sample_responses(net, tok, prompts, 24, seed=0)
    sig = rhythm_signals(net, *res, h_lo=2, h_hi=10)
    H = token_entropy(net, res.input_ids, res.attention_mask)
    assert sig.waad.dtype == H.dtype == torch.float32 and (H[res.response_mask] > 0).all()
    rows = coupling_stats(sig.waad, sig.fai, H, res.response_mask, n_perm=20)
    assert all(0 < r.p_value <= 1 for r in rows)
    p = perturb_rollouts(
        net,
        res.input_ids,
        int(res.response_mask[0].long().argmax()) + 2,
        max_new_tokens=4,
        attention_mask=res.attention_mask,
    )
    assert p.candidates.shape == (2, 3) and all(len(c) == 4 for c in p.continuations)


def test_the_gpu_recipe_runs(lm, problems):
    "Two steps of the recipe of the `gpu` scale"
    size = T.rhythm_scales["gpu"]
    less = dict(steps=2, prompts=2, group_size=2, max_new_tokens=8, h_lo=1, h_hi=6)
    assert len(train_rhythm(lm, problems, replace(size.run, **less)).rows) == 2
    tiny = replace(size.lm, lm=replace(size.lm.lm, layers=1), train=replace(size.lm.train, steps=2))
    assert tiny.task == size.problems


def test_adapters_and_wrappers(lm, problems):
    "What was frozen stays frozen; a model inside DataParallel is named"
    part = lm._replace(model=copy.deepcopy(lm.model).requires_grad_(False))
    part.model.model.layers[0].mlp.requires_grad_(True)
    run = train_rhythm(part, problems, few)
    for (name, p), q in zip(run.lm.model.named_parameters(), lm.model.parameters()):
        assert torch.equal(p, q) != ("layers.0.mlp" in name)
    with pytest.raises(TypeError, match="DataParallel; pass the model inside"):
        train_rhythm(lm._replace(model=torch.nn.DataParallel(lm.model)), problems, few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft(lm, problems, monkeypatch, dtype, tmp_path):
    "Only the adapters move, in both loops, and an engine apart gets them merged"
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    folder = save_lm(lm._replace(model=copy.deepcopy(lm.model).to(dtype)), tmp_path / "policy")
    base = load_lm(str(folder), device="cpu")
    policy = base._replace(model=peft.get_peft_model(base.model, config))
    from llmpapers.rl import run as arrangements

    def stand(folder, max_active, **args):
        return HFEngine(load_lm(str(folder), dtype=torch.float32).model, max_active=max_active)

    monkeypatch.setattr(arrangements, "VLLMEngine", stand)
    for loop in ("sync", "async"):
        for engine in ("hf", "vllm"):
            cfg = replace(few, engine=engine, loop=loop, async_ratio=0.0)
            run = train_rhythm(policy, problems, cfg)
            for (name, p), q in zip(run.lm.model.named_parameters(), policy.model.parameters()):
                assert torch.equal(p, q.float()) != ("lora_" in name), name
                assert p.dtype == torch.float32 and p.requires_grad == ("lora_" in name)
            assert max(abs(r["ratio/mean"] - 1) for r in run.rows) < 1e-4


# ---- configurations ------------------------------------------------------------------------------
def bad_values(field):
    "Values that no field of its kind may have"
    kind = str(field.type)
    if "tuple" in kind:
        return [(1.5,), (2, 1), (True,), (), 3, "x"]
    bad = [math.nan, "x", [1]]
    if "bool" in kind:
        return [*bad, 2, 1.5]
    if "str" in kind:
        return ["x", 3, True]
    if "int" in kind:
        return [*bad, -1, 1.5, True, math.inf]
    return [*bad, True] + ([] if field.name.startswith("tau") else [-1.0])


@pytest.mark.parametrize("config", [RhythmConfig, TabularConfig])
def test_every_field_is_checked_by_name(config):
    for f in fields(config):
        for bad in bad_values(f):
            with pytest.raises((ValueError, TypeError)) as e:
                config(**{f.name: bad})
            assert f"{f.name}=" in str(e.value) and "must be" in str(e.value), (f.name, bad)
        config(**{f.name: getattr(config(), f.name)})


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(q=2), "q=2 must be a number in [0, 1]"),
        (dict(k=-1), "k=-1 must be an integer in [0, inf)"),
        (dict(window=0), "window=0 must be an integer in [1, inf)"),
        (dict(select="x"), "select='x' must be one of top, bottom"),
        (dict(frac=0.0), "frac=0.0 must be a number in (0, 0.5]"),
        (dict(temperature=0), "temperature=0 must be a number in (0, inf)"),
        (dict(group_size=1), "group_size=1 must be an integer in [2, inf)"),
        (dict(h_lo=9, h_hi=3), "h_hi=3 is below h_lo=9"),
    ],
)
def test_messages_name_field_and_range(kw, says):
    with pytest.raises(ValueError) as e:
        RhythmConfig(**kw)
    assert says in str(e.value)


def test_numbers_of_numpy_become_plain():
    cfg = RhythmConfig(seed=np.int64(3), lr=np.float32(0.5), layers=[np.int64(1), 2])
    assert (type(cfg.seed), type(cfg.lr), cfg.layers) == (int, float, (1, 2))
    with pytest.raises(TypeError, match="task=3 must be a Countdown"):
        CountdownLMConfig(task=3)


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


def test_worlds_that_share_their_maps():
    "Reading the same maps in several ways equals making a world for each; other worlds are refused"
    ways = [
        small,
        *(replace(small, **kw) for kw in (dict(window=3), dict(h_lo=0), dict(h_hi=None))),
    ]
    ways.append(replace(small, targeted=False))
    for c, world in zip(ways, tabular_worlds(ways)):
        for a, b in zip(world, tabular_world(c)):
            assert torch.equal(a, b)
    assert not torch.equal(tabular_world(ways[0]).waad, tabular_world(ways[1]).waad)
    with pytest.raises(ValueError, match="cfgs differ in noise"):
        tabular_worlds([small, replace(small, noise=0.5)])


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
