"""QAgent: advantages and the masked loss, alone and in the trainer: what the environment said
counts nowhere"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm
from llmpapers.core.scale import rng
from llmpapers.qagent.grpo import aggregations, group_advantages, grpo_loss, share_without_signal
from llmpapers.qagent.retrieval import BM25
from llmpapers.qagent.rollout import RolloutConfig
from llmpapers.qagent.train import (
    SearchTrainConfig,
    _advantages,
    advantage_kinds,
    atlas_tokenizer,
    train_grpo,
)
from llmpapers.qagent.world import build_world
from llmpapers.rl.logprobs import token_logprobs
from llmpapers.rl.losses import PolicyLossConfig
from llmpapers.rl.trainer import PolicyTrainer
from llmpapers.rl.types import Group, Sample, collate

pytestmark = pytest.mark.timeout(200)

numbers = st.floats(-3, 3, width=32)
tables = st.integers(2, 5).flatmap(
    lambda g: st.lists(st.lists(numbers, min_size=g, max_size=g), min_size=1, max_size=4)
)


@settings(max_examples=200, deadline=None)
@given(tables, st.floats(-4, 4, width=16), st.randoms(use_true_random=False))
def test_group_advantages(rows, shift, rnd):
    """The formula; exact zeros where all are equal; mean 0; constants and order change nothing"""
    rewards = torch.tensor(rows)
    A = group_advantages(rewards)
    assert A.shape == rewards.shape and A.dtype == torch.float32
    equal = rewards.amax(1) == rewards.amin(1)
    assert (A[equal] == 0).all()
    assert A.mean(1).abs().max() < 2e-6
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    clear = rewards.std(1) > 1e-2
    assert torch.allclose(A[clear], want[clear], atol=1e-4)
    moved = group_advantages(rewards + shift)
    assert torch.allclose(A[clear], moved[clear], atol=2e-3)
    order = rnd.sample(range(rewards.shape[1]), rewards.shape[1])
    assert torch.allclose(group_advantages(rewards[:, order])[clear], A[clear][:, order], atol=1e-4)
    assert share_without_signal(rewards) == pytest.approx(equal.float().mean().item())


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6, -7.7])
def test_equal_rewards_are_exact_zeros(value):
    """Also where a mean of equal numbers is not that number"""
    for g in (2, 3, 5, 7):
        A = group_advantages(torch.full((3, g), value))
        assert (A == 0).all() and not A.isnan().any()


def test_the_other_arms():
    """RLOO: against the mean of the others; REINFORCE: against the mean of the batch"""
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    sample = Sample([1], [2], [True], [-1.0], [0], 0.0)
    found = [
        Group(
            g, None, 0, samples=[replace(sample, reward=r) for r in rewards[groups == g].tolist()]
        )
        for g in (0, 1)
    ]
    batch = collate(found, 0)
    A = {kind: _advantages(kind, batch) for kind in advantage_kinds}
    others = torch.stack([(rewards[groups == g].sum() - r) / 2 for g, r in zip(groups, rewards)])
    assert torch.allclose(A["rloo"], rewards - others, atol=1e-6)
    assert torch.allclose(A["reinforce"], rewards - rewards.mean(), atol=1e-6)
    want = group_advantages(rewards.reshape(2, 3)).reshape(-1)
    assert torch.allclose(A["grpo"], want, atol=1e-6)
    assert (A["grpo"][3:] == 0).all() and (A["rloo"][3:] == 0).all()


@st.composite
def batches(draw, n=None):
    "Log-probabilities of three models, advantages and a mask"
    n, t = n or draw(st.integers(1, 5)), draw(st.integers(1, 7))
    gen = rng(draw(st.integers(0, 10**6)), "batch")
    logp, ref = (-2 * torch.rand(n, t, generator=gen) for _ in range(2))
    old = logp + 0.3 * torch.randn(n, t, generator=gen)
    adv = torch.randn(n, generator=gen)
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return logp, old, ref, adv, torch.rand(n, t, generator=gen) < share


def loop_loss(logp, old, ref, adv, mask, clip, beta, agg):
    "The loss token by token"
    rows, total, count = [], 0.0, 0
    for i in range(len(logp)):
        terms = []
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = (logp[i, t] - old[i, t]).exp()
                gain = torch.minimum(ratio * adv[i], ratio.clamp(1 - clip, 1 + clip) * adv[i])
                d = ref[i, t] - logp[i, t]
                terms.append(-gain + beta * (d.exp() - d - 1))
        if terms:
            rows.append(sum(terms) / len(terms))
            total, count = total + sum(terms), count + len(terms)
    if not rows:
        return torch.tensor(0.0)
    return sum(rows) / len(rows) if agg == "seq" else total / count


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([0.0, 1e-3, 0.5]), st.sampled_from([0.1, 0.2]))
def test_the_loss_is_its_formula(batch, beta, clip):
    for agg in aggregations:
        loss, stats = grpo_loss(*batch, clip=clip, beta=beta, agg=agg)
        assert loss.item() == pytest.approx(
            float(loop_loss(*batch, clip, beta, agg)), abs=1e-5, rel=1e-4
        )
        assert loss.isfinite() and all(v == v for v in stats.values())


@settings(max_examples=60, deadline=None)
@given(batches())
def test_limits_of_the_loss(batch):
    """Equal numbers of own tokens: both averages agree. On policy: minus the mean advantage plus
    the divergence, and nothing is clipped"""
    logp, old, ref, adv, mask = batch
    for even in (torch.ones_like(mask), torch.arange(mask.shape[1]).expand_as(mask) == 0):
        a, b = (grpo_loss(logp, old, ref, adv, even, agg=agg)[0].item() for agg in aggregations)
        assert a == pytest.approx(b, abs=1e-5)
        loss, stats = grpo_loss(logp, logp, ref, adv, even, beta=0.1)
        assert loss.item() == pytest.approx(-adv.mean().item() + 0.1 * stats["kl"], abs=1e-5)
        assert stats["clipped"] == 0 and stats["ratio"] == pytest.approx(1)
    for agg in aggregations:
        x = logp.clone().requires_grad_()
        loss, stats = grpo_loss(x, old, ref, adv, torch.zeros_like(mask), agg=agg)
        (g,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0 and (g == 0).all()
        assert stats == dict(kl=0.0, ratio=1.0, clipped=0.0)


noises = st.sampled_from([1e4, -1e4, 1e30, float("inf"), -float("inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(batches(), noises, st.sampled_from([0.0, 0.01]))
def test_the_environment_counts_nowhere(batch, noise, beta):
    """Whatever stands at its tokens: loss, gradient and statistics are the same to the last bit,
    and the gradient there is zero; and so are more of its tokens"""
    logp, old, ref, adv, mask = batch
    n = len(mask)
    for agg in aggregations:

        def outcome(fill, extra=0, agg=agg):
            x, o, r = (torch.where(mask, v, fill) for v in (logp, old, ref))
            pad = torch.full((n, extra), fill)
            x, o, r = (torch.cat([v, pad], 1) for v in (x, o, r))
            x = x.requires_grad_()
            m = torch.cat([mask, torch.zeros(n, extra, dtype=torch.bool)], 1)
            loss, stats = grpo_loss(x, o, r if beta else None, adv, m, beta=beta, agg=agg)
            (g,) = torch.autograd.grad(loss, x)
            return loss, stats, g

        loss, stats, grad = outcome(0.0)
        assert (grad[~mask] == 0).all()
        for extra in (0, 3):
            other, told, g = outcome(noise, extra)
            assert other.item() == pytest.approx(loss.item(), rel=1e-6, abs=1e-7)
            assert told == pytest.approx(stats)  # sums of other lengths: the last bit
            assert torch.allclose(g[:, : mask.shape[1]], grad, atol=1e-8)
            assert (g[:, mask.shape[1] :] == 0).all() and (g[:, : mask.shape[1]][~mask] == 0).all()
        same, told, g = outcome(noise)
        assert same.item() == loss.item() and told == stats and torch.equal(g, grad)


@settings(max_examples=40, deadline=None)
@given(batches())
def test_an_empty_response_changes_nobody_elses_share(batch):
    """A rollout without an own token: the others are worth what they were"""
    logp, old, ref, adv, mask = batch
    pad = torch.full((1, logp.shape[1]), -1.0)
    wide = [torch.cat([v, pad]) for v in (logp, old, ref)]
    adv2, mask2 = torch.cat([adv, torch.tensor([5.0])]), torch.cat([mask, pad > 0])
    for agg in aggregations:
        a, b = grpo_loss(*wide, adv2, mask2, agg=agg), grpo_loss(*batch, agg=agg)
        assert a[0].item() == pytest.approx(b[0].item(), abs=1e-6)
        assert a[1] == pytest.approx(b[1])


words = atlas_tokenizer()
tiny = TinyLMConfig(layers=2, width=32, head_dim=16, max_len=256)


def model(seed=0):
    return tiny_lm(words, tiny, seed)


def trainer_of(m, agg="token", beta=0.05, advantages=None, **kw):
    "The trainer as `train_grpo` makes it"
    loss = PolicyLossConfig(
        "ppo", aggregations[agg], kl_coef=beta, args=dict(clip_low=0.2, clip_high=0.2)
    )
    t = PolicyTrainer(
        m,
        torch.optim.SGD(m.parameters(), lr=0.1),
        loss,
        ref_model=model(9) if beta else None,
        **kw,
    )
    t.advantages_fn = advantages or (lambda batch: batch.rewards)
    return t


def talk(seed, turns, trailing=0, prompt=3, noise=0.2):
    "A sample with turns of the policy between turns of the environment, off policy by `noise`"
    gen = rng(seed, "talk")
    ids, mask = [], []
    for k in range(turns):
        own, other = (int(torch.randint(1, 5, (1,), generator=gen)) for _ in range(2))
        mask += [True] * own + [False] * (other if k < turns - 1 else trailing)
    ids = torch.randint(4, len(words), (prompt + len(mask),), generator=gen).tolist()
    m, both = model(), torch.tensor([ids])
    with torch.no_grad():
        lp = token_logprobs(m(input_ids=both).logits, both)[0, prompt:]
    lp = lp + noise * torch.randn(len(mask), generator=gen)
    lp = torch.where(torch.tensor(mask), lp, 0.0).tolist()
    reward = float(torch.randn(1, generator=gen))
    return Sample(ids[:prompt], ids[prompt:], mask, lp, [0] * len(mask), reward)


def batch_of(samples):
    return collate([Group(i, None, 0, samples=[s]) for i, s in enumerate(samples)], 0)


def after(samples, agg="token", change=None, **kw):
    "Weights and row after one step"
    m = model()
    batch = batch_of(samples)
    row = trainer_of(m, agg, **kw).step(change(batch) if change else batch)
    return m.state_dict(), row


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


def near(a, b, atol=1e-6):
    return all(torch.allclose(x, y, atol=atol) for x, y in zip(a.values(), b.values()))


@pytest.mark.parametrize("agg", aggregations)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_trainer_has_the_same_loss(agg, beta):
    """`grpo_loss` and the step of the floor's trainer: value and gradient"""
    samples = [talk(s, 1 + s % 3) for s in range(5)]
    batch, m = batch_of(samples), model()
    before = copy.deepcopy(m.state_dict())
    lp = [
        token_logprobs(x(input_ids=batch.input_ids).logits, batch.input_ids) for x in (m, model(9))
    ]
    loss, _ = grpo_loss(
        lp[0],
        batch.behavior_logprobs,
        lp[1].detach(),
        batch.rewards,
        batch.response_mask,
        beta=beta,
        agg=agg,
    )
    grads = torch.autograd.grad(loss, list(m.parameters()))
    trainer = trainer_of(m, agg, beta, max_grad_norm=1e9)
    row = trainer.step(batch)
    assert row["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
    names = [n for n, _ in m.named_parameters()]
    for name, g in zip(names, grads):
        assert torch.allclose(m.state_dict()[name], before[name] - 0.1 * g, atol=1e-5), name


@pytest.mark.parametrize("agg", aggregations)
@pytest.mark.parametrize("fill", [1e4, -1e4, float("nan"), float("inf")])
def test_what_stands_at_pages_does_not_reach_the_weights(agg, fill):
    """Log-probabilities, versions and advantages at tokens of the environment, in a step"""
    samples = [talk(s, 3) for s in range(4)]
    plain, row = after(samples, agg)

    def spoil(batch):
        lost = ~batch.response_mask
        return replace(batch, behavior_logprobs=torch.where(lost, fill, batch.behavior_logprobs))

    def loud(batch):
        A = batch.rewards[:, None].expand(batch.input_ids.shape)
        return torch.where(batch.response_mask, A, fill)

    for kw in (dict(change=spoil), dict(advantages=loud), dict(change=spoil, advantages=loud)):
        spoiled, told = after(samples, agg, **kw)
        assert equal(plain, spoiled)
        for name in ("train/loss", "train/grad_norm", "ratio/mean", "kl/ref", "train/tokens"):
            assert told[name] == row[name], name


@pytest.mark.parametrize("agg", aggregations)
def test_pages_behind_the_last_turn_change_nothing(agg):
    """Other words, or none: nothing that follows reads them, and no denominator counts them"""
    samples = [talk(s, 2, trailing=6) for s in range(4)]
    plain, row = after(samples, agg)
    others = []
    for s in samples:
        ids = [i if own else 4 + i % 7 for i, own in zip(s.response_ids, s.response_mask)]
        keep = [t for t in range(len(ids)) if s.response_mask[t] or t < len(ids) - 6]
        ids = [s.response_ids[t] if t < len(ids) - 6 else ids[t] for t in range(len(ids))]
        others.append((replace(s, response_ids=ids), keep))
    changed, told = after([s for s, _ in others], agg)
    assert equal(plain, changed) and told["train/loss"] == row["train/loss"]
    short = [
        replace(
            s,
            response_ids=[s.response_ids[t] for t in keep],
            response_mask=[s.response_mask[t] for t in keep],
            behavior_logprobs=[s.behavior_logprobs[t] for t in keep],
            versions=[0] * len(keep),
        )
        for s, keep in others
    ]
    assert sum(len(s.response_ids) for s in short) < sum(len(s.response_ids) for s in samples)
    less, told = after(short, agg)
    assert near(plain, less) and told["train/loss"] == pytest.approx(row["train/loss"], abs=1e-6)


def test_turns_are_worth_what_they_are_alone():
    """Averaged over tokens, a conversation is the sum of its turns, each behind what was said
    before: so tokens of the environment are context and nothing else"""
    samples = [talk(s, 3) for s in range(4)]
    alone = []
    for s in samples:
        ids, mask = s.prompt_ids + s.response_ids, [False] * len(s.prompt_ids) + s.response_mask
        lps = [0.0] * len(s.prompt_ids) + s.behavior_logprobs
        t = 0
        while t < len(ids):
            end = t
            while end < len(ids) and mask[end]:
                end += 1
            if end > t:
                n = end - t
                part = Sample(ids[:t], ids[t:end], [True] * n, lps[t:end], [0] * n, s.reward)
                alone.append(part)
            t = max(end, t + 1)
    assert len(alone) == 12
    a, b = after(samples), after(alone)
    assert near(a[0], b[0], 1e-5) and a[1]["train/loss"] == pytest.approx(
        b[1]["train/loss"], abs=1e-5
    )


world = build_world(0, n_films=24, n_people=16, n_cities=8)
index = BM25(world.docs)
limits = RolloutConfig(max_searches=1, max_new_tokens=40, max_len=200, style="plain")


def own_words(traj):
    "A reward that random weights get, if both turns end in time"
    return len(traj.model_text.split()) / 80


@pytest.mark.parametrize("advantage", advantage_kinds)
@pytest.mark.parametrize("agg", aggregations)
def test_a_step_is_reproducible(advantage, agg):
    """Every arm trains, gives the same weights twice, and leaves the model it was given alone"""
    lm = LM(model(3), words, "tiny")
    before = copy.deepcopy(lm.model.state_dict())
    cfg = SearchTrainConfig(
        steps=1, questions=2, group_size=3, lr=1e-2, rollout=limits, advantage=advantage, agg=agg
    )
    asked = world.questions("bridge", "train")
    one, two = (train_grpo(lm, index, asked, own_words, cfg, first=str) for _ in range(2))
    assert equal(one.lm.model.state_dict(), two.lm.model.state_dict())
    assert equal(lm.model.state_dict(), before)
    assert not equal(one.lm.model.state_dict(), before)
    assert one.rows[0]["train/tokens"] == 6 * one.rows[0]["search/own_tokens"]


def test_only_adapters_learn():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    lm = LM(peft.get_peft_model(model(3), config), words, "tiny")
    cfg = SearchTrainConfig(steps=3, questions=2, group_size=3, lr=1e-2, rollout=limits)
    run = train_grpo(lm, index, world.questions("bridge", "train"), own_words, cfg, first=str)
    for (name, p), q in zip(run.lm.model.named_parameters(), lm.model.parameters()):
        assert torch.equal(p, q) != ("lora_" in name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_trained_in_single_precision(dtype):
    "Steps that bfloat16 could not hold; passes in bfloat16 only for what came in it"
    lm = LM(model(3).to(dtype), words, "tiny")
    cfg = SearchTrainConfig(steps=1, questions=2, group_size=3, lr=1e-6, rollout=limits)
    run = train_grpo(lm, index, world.questions("bridge", "train"), own_words, cfg, first=str)
    assert {p.dtype for p in run.lm.model.parameters()} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters()} == {dtype}
    assert run.trainer.autocast_dtype == (torch.bfloat16 if dtype == torch.bfloat16 else None)
    moved = [
        (p != q.float()).float().mean()
        for p, q in zip(run.lm.model.parameters(), lm.model.parameters())
    ]
    assert max(moved) > 0.5


def test_equal_rewards_move_nothing():
    """Without a divergence term, groups without a signal leave the weights as they are"""
    lm = LM(model(3), words, "tiny")
    cfg = SearchTrainConfig(steps=1, questions=2, group_size=3, beta=0.0, rollout=limits)
    run = train_grpo(lm, index, world.questions("bridge", "train"), lambda t: 0.0, cfg, first=str)
    assert equal(run.lm.model.state_dict(), lm.model.state_dict())
    assert run.rows[0]["search/no_signal"] == 1.0


@pytest.mark.parametrize(
    "bad", [dict(agg="mean"), dict(clip=0), dict(clip=1), dict(beta=-1), dict(beta=float("nan"))]
)
def test_what_is_refused(bad):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=next(iter(bad))):
        grpo_loss(x, x, x, torch.zeros(2), x.bool(), **bad)
    with pytest.raises(ValueError, match="mask"):
        grpo_loss(x, x, x, torch.zeros(2), x.bool()[:, :2])
    with pytest.raises(ValueError, match="adv"):
        grpo_loss(x, x, x, torch.zeros(3), x.bool())
    with pytest.raises(ValueError, match="ref_logp"):
        grpo_loss(x, x, None, torch.zeros(2), x.bool())
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(torch.zeros(3))
