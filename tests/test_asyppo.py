"""AsyPPO: advantages, shards, spread, masks and objective hold for any input; bad input is refused;
a run resumes exactly"""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.asyppo.critics import (
    CriticEnsemble,
    ValueModel,
    check_vocab,
    critic_loss,
    ensemble_stats,
    shard_groups,
)
from llmpapers.asyppo.gae import SurvivalMDP, explained_variance, gae, terminal_rewards, whiten
from llmpapers.asyppo.loss import asyppo_loss
from llmpapers.asyppo.masks import advantage_mask, entropy_mask, random_mask
from llmpapers.asyppo.train import (
    AsyPPOConfig,
    AsyPPOTrainer,
    Critics,
    SumTask,
    methods,
    train_asyppo,
)
from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm, word_tokenizer
from llmpapers.core.scale import rng
from llmpapers.rl import advantages
from llmpapers.rl.losses import ppo_loss

quick = settings(max_examples=40, deadline=None)
seeds, sizes = st.integers(0, 10_000), st.tuples(st.integers(1, 6), st.integers(1, 12))
share = st.floats(0, 1)


def draw(seed, shape, p=0.7):
    "Two random tensors and a mask whose rows have a token each"
    g = rng(seed, "asy")
    mask = torch.rand(shape, generator=g) < p
    mask[:, 0] = True
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), mask


def loop(r, v, m, gamma, lam):
    A = torch.zeros(r.shape, dtype=torch.double)
    for b in range(len(r)):
        later = nxt = 0.0
        for t in reversed(m[b].nonzero().flatten().tolist()):
            later = A[b, t] = float(r[b, t]) + gamma * nxt - float(v[b, t]) + gamma * lam * later
            nxt = float(v[b, t])
    return A


# ---- advantages ----------------------------------------------------------------------------------
def test_one_implementation():
    assert gae is advantages.gae


@quick
@given(seeds, sizes, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_loop_and_ignores_what_is_outside(seed, shape, gamma, lam):
    r, v, m = draw(seed, shape)
    A, R = gae(r.double(), v.double(), m, gamma, lam)
    assert (A - loop(r, v, m, gamma, lam)).abs().max() < 1e-6
    assert torch.allclose(R[m], (A + v)[m]) and not A[~m].any()
    for junk in (float("nan"), 1e9):
        assert torch.equal(
            gae(torch.where(m, r, junk).double(), torch.where(m, v, junk).double(), m, gamma, lam)[
                0
            ],
            A,
        )


@quick
@given(seeds, sizes)
def test_gae_limits(seed, shape):
    r, v, m = draw(seed, shape)
    togo = (r * m).double().flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(gae(r, v, m, 1.0, 1.0)[0][m].double(), (togo - v)[m], atol=1e-4)
    assert torch.allclose(
        gae(r, v * 0, m, 0.9, 1.0)[0], advantages.discounted_returns(r, m, 0.9), atol=1e-5
    )
    score = terminal_rewards(r[:, 0], m)
    assert (
        torch.equal(score.sum(1), r[:, 0])
        and ((score != 0).sum(1) <= 1).all()
        and not score[~m].any()
    )


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 6))
def test_true_values_are_martingales(seed, n, G):
    """In expectation over the next token a true value does not change: checked by the exact formula
    at the last outcome"""
    world = SurvivalMDP()
    e = world.sample(n, G, rng(seed, "mdp"))
    V = world.true_values(e)
    assert ((V >= 0) & (V <= 1)).all() and not V[~e.mask].any()
    first = V[:, 1]
    stay = 1 - sum(p * q for p, q in zip(world.probs, world.errors))
    assert torch.allclose(first, stay ** (e.mask.sum(1) // 2).float(), atol=1e-5)
    assert np.isnan(explained_variance(V, torch.ones_like(V), e.mask))


# ---- shards and spread ---------------------------------------------------------------------------
@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=24), st.integers(1, 4), st.integers(0, 9))
def test_shards(groups, M, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = shard_groups(torch.tensor(groups), M, seed)
        assert torch.equal(s, shard_groups([f"g{x}" for x in groups], M, seed)) and torch.equal(
            s, shard_groups(groups, M, seed)
        )
        assert set(s.tolist()) <= set(range(M))
        for g in set(groups):
            n = torch.bincount(s[torch.tensor(groups) == g], minlength=M)
            assert n.max() - n.min() <= 1
        order = np.argsort(groups, kind="stable")  # keeps the order within groups
        assert torch.equal(shard_groups([groups[i] for i in order], M, seed), s[order])


def test_shards_warn_and_refuse():
    with pytest.warns(UserWarning, match="gives some of the 2 critics nothing"):
        shard_groups([0, 1, 1], 2)
    for bad in (0, 1.5):
        pytest.raises(ValueError, shard_groups, [1, 1], bad)
    with pytest.raises(ValueError, match="by="):
        shard_groups([1, 1], 1, by="token")


@quick
@given(seeds, st.integers(1, 4), sizes)
def test_spread(seed, M, shape):
    v = torch.randn(M, *shape, generator=rng(seed, "v"))
    mean, std = ensemble_stats(v)
    assert torch.allclose(mean, v.mean(0), atol=1e-6) and torch.allclose(
        std, v.std(0, unbiased=False), atol=1e-5
    )
    clones = v[:1].expand(M, *shape)
    assert not ensemble_stats(clones)[1].any() and torch.equal(ensemble_stats(clones)[0], v[0])
    if M == 2:
        assert torch.allclose(std, (v[0] - v[1]).abs() / 2, atol=1e-6)


@quick
@given(seeds, st.integers(1, 3), sizes)
def test_each_critic_learns_from_its_shard_only(seed, M, shape):
    R, _, m = draw(seed, shape)
    shard = torch.randint(M, shape[:1], generator=rng(seed, "s"))
    v = torch.randn(M, *shape, generator=rng(seed, "v"), requires_grad=True)
    loss, per = critic_loss(v, R, m, shard)
    loss.backward()
    own = (shard == torch.arange(M)[:, None])[..., None] & m
    assert not v.grad[~own].any() and torch.isfinite(per).all() and torch.isclose(loss, per.sum())
    junk = torch.where(m, R, float("nan"))
    assert torch.equal(critic_loss(v, junk, m, shard)[1], per)


# ---- masks ---------------------------------------------------------------------------------------
@quick
@given(seeds, sizes, share)
def test_masks_are_exact(seed, shape, k):
    x, _, m = draw(seed, shape)
    n, want = int(m.sum()), int(k * int(m.sum()) + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, top, rand = (
            advantage_mask(x, m, k),
            entropy_mask(x, m, k),
            random_mask(m, k, rng(seed, "r")),
        )
    for keep in (low, top):
        assert int((~keep).sum()) == (want if n > 1 or want == n else 0)
    assert int((~rand).sum()) == want and all(z[~m].all() for z in (low, top, rand))
    if 0 < want < n:
        assert x[~low].max() <= x[low & m].min() and x[~top].min() >= x[top & m].max()
    if k <= 0.5:
        assert (low | top).all() or want * 2 > n


@quick
@given(sizes, st.floats(0.01, 0.99))
def test_equal_spread_masks_nothing(shape, k):
    m = torch.ones(shape).bool()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert advantage_mask(torch.full(shape, 0.3), m, k).all()
    assert len(seen) == (int(k * m.numel() + 1e-9) > 0)


@pytest.mark.parametrize("f, name", [(advantage_mask, "k"), (entropy_mask, "h")])
def test_masks_refuse(f, name):
    x, _, m = draw(0, (2, 5))
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"{name}="):
            f(x, m, bad)
    with pytest.raises(ValueError, match="must agree"):
        f(x[:1], m)
    with pytest.raises(ValueError, match="NaN"):
        f(x * float("nan"), m)
    assert f(x, m, 0.0).all() and not f(x, m, 1.0)[m].any()


# ---- objective -----------------------------------------------------------------------------------
@quick
@given(seeds, sizes)
def test_without_additions_it_is_ppo(seed, shape):
    lp, A, m = draw(seed, shape)
    old = lp + 0.3 * A.roll(1, 0)
    x = torch.where(m, ppo_loss(lp, old, A), 0.0).sum(-1) / m.sum(-1)
    assert torch.equal(asyppo_loss(lp, old, A, m)[0], x.sum() / len(x))
    ones = torch.ones_like(m)
    assert torch.equal(
        asyppo_loss(lp, old, A, m, adv_mask=ones, ent_mask=ones, entropy=lp)[0],
        asyppo_loss(lp, old, A, m)[0],
    )


@quick
@given(seeds, sizes, share, share)
def test_masked_tokens_get_exactly_nothing(seed, shape, k, h):
    lp, A, m = draw(seed, shape)
    lp.requires_grad_()
    H = A.detach().abs().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        am, em = advantage_mask(A, m, k), entropy_mask(A, m, h)
    loss, stats = asyppo_loss(
        lp, lp.detach(), A + 3, m, adv_mask=am, entropy=H, ent_mask=em, beta=0.1
    )
    loss.backward()
    assert not lp.grad[~am | ~m].any() and not H.grad[~em | ~m].any()
    assert (lp.grad[am & m & (A != -3)] != 0).all() and (H.grad[em & m] != 0).all()
    n = m.sum(-1, keepdim=True).expand(m.shape)[em & m]
    assert torch.allclose(H.grad[em & m], -0.1 / (n * len(m)), atol=1e-7)


@quick
@given(seeds, sizes)
def test_denominator_is_the_length(seed, shape):
    lp, s, m = draw(seed, shape)
    one = torch.ones(shape)
    for k in (0.25, 0.5):
        keep = advantage_mask(s, m, k) if m.sum() > 1 else torch.ones_like(m)
        want = -((keep & m).sum(-1) / m.sum(-1)).mean()
        assert torch.isclose(asyppo_loss(lp, lp, one, m, adv_mask=keep)[0], want, atol=1e-6)


def test_objective_edges():
    lp, A, m = draw(3, (4, 6))
    none = torch.zeros_like(m)
    for r in (False, True):
        assert asyppo_loss(lp, lp, A, m, adv_mask=none, renorm=r)[0] == 0
    empty = m.clone()
    empty[1] = False
    assert torch.isclose(
        asyppo_loss(lp, lp, A, empty)[0],
        asyppo_loss(lp[[0, 2, 3]], lp[[0, 2, 3]], A[[0, 2, 3]], m[[0, 2, 3]])[0],
    )
    with pytest.raises(ValueError, match="entropy is None"):
        asyppo_loss(lp, lp, A, m, beta=0.1)
    with pytest.raises(ValueError, match="adv has shape"):
        asyppo_loss(lp, lp, A[:1], m)
    assert whiten(A, m)[m].mean().abs() < 1e-6


# ---- models and runs -----------------------------------------------------------------------------
task = SumTask(3)
cfg_lm = TinyLMConfig(layers=1, width=16, heads=2, kv_heads=2, head_dim=8, max_len=16)


def actor():
    return LM(tiny_lm(task.tokenizer, cfg_lm, 0), task.tokenizer, "a")


def run(method="asyppo", n=2, folder=None, ratio=None, **kw):
    cfg = AsyPPOConfig(
        method, batch_size=2, group_size=4, max_new_tokens=4, utd=2, critic_epochs=2, **kw
    )
    return train_asyppo(
        actor(),
        None if method == "grpo" else actor().model,
        task.prompt,
        lambda p, r, i: float(len(r)),
        n,
        cfg,
        ratio,
        folder=folder,
    )


def weights(t):
    return [
        *t.weights().values(),
        *(
            x
            for c in (t.critic.state_dict()["critics"] if t.critic else [])
            for x in c["model"].values()
        ),
    ]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("method", list(methods))
def test_every_method_runs(method):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std is the same")
        rows, t = run(method)
    assert all(
        np.isfinite(v) for r in rows for k, v in r.items() if k.startswith(("train/", "rollout/"))
    )
    if method == "ensemble_same":
        assert rows[-1]["critic/sigma"] == 0
    if method == "asyppo":
        assert rows[-1]["critic/sigma"] > 0 and rows[-1]["critic/rows"] == 8


def test_a_resumed_run_is_the_whole_run(tmp_path):
    run(n=1, folder=tmp_path)
    assert equal(run(n=3, folder=tmp_path)[1], run(n=3)[1])


def test_asynchronous_and_synchronous_agree_without_lead():
    assert equal(run(ratio=0.0)[1], run()[1])


def test_the_actor_gets_no_gradient_from_critics():
    t = run(n=1, lr=0.0)[1]
    assert all(
        torch.equal(a, b) for a, b in zip(t.weights().values(), actor().model.state_dict().values())
    )


def test_one_critic_masks_nothing():
    rows, t = run(n_critics=1)
    assert rows[-1]["asyppo/masked"] == 0 and t.adv_keep.all() and t.ent_keep.all()


def test_ensemble_training_is_the_loss():
    "One pass over shards equals one step on `critic_loss` of the ensemble"
    g = rng(0, "ens")
    ids, real = torch.randint(4, 14, (8, 6), generator=g), torch.ones(8, 6).bool()
    R, m = torch.rand(8, 6, generator=g), torch.rand(8, 6, generator=g) < 0.6
    ens = CriticEnsemble(lambda i: ValueModel(actor().model), 2)
    shard = shard_groups([0] * 4 + [1] * 4, 2)
    twin = copy.deepcopy(ens)
    critic_loss(twin(ids, real), R, m, shard)[0].backward()
    for k, c in enumerate(ens.critics):
        rows = shard == k
        loss = (
            torch.where(m[rows], (c(ids[rows], real[rows]) - R[rows]).square(), 0.0).sum()
            / m[rows].sum()
        )
        loss.backward()
        for a, b in zip(c.parameters(), twin.critics[k].parameters()):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_bad_runs_are_refused():
    for bad, name in (
        (dict(method="x"), "method"),
        (dict(k=2.0), "k="),
        (dict(h=-1.0), "h="),
        (dict(n_critics=0), "n_critics"),
        (dict(how="max"), "how"),
        (dict(utd=0), "utd"),
    ):
        with pytest.raises(ValueError, match=name):
            AsyPPOConfig(**bad)
    with pytest.raises(ValueError, match="needs 2"):
        AsyPPOTrainer(actor().model, None, AsyPPOConfig())
    with pytest.raises(ValueError, match="1 given"):
        Critics([ValueModel(actor().model)], AsyPPOConfig())
    small = tiny_lm(word_tokenizer(["a"]), cfg_lm, 0)
    with pytest.raises(ValueError, match="tokenizers do not match"):
        check_vocab(small, actor().model)
    with pytest.raises(ValueError, match="tokenizers do not match"):
        AsyPPOTrainer(actor().model, [ValueModel(small)] * 2, AsyPPOConfig())
