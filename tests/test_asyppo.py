"""AsyPPO: advantages, shards, spread, masks and objective hold for any input; bad input is refused;
a run resumes exactly"""

import copy
import warnings
from dataclasses import fields, replace

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
from llmpapers.asyppo.results import TabularConfig
from llmpapers.asyppo.train import (
    AsyPPOConfig,
    AsyPPOTrainer,
    Critics,
    MiniCritic,
    SumTask,
    asyppo_paper,
    methods,
    train_asyppo,
)
from llmpapers.core.lm import LM, TinyLMConfig, load_lm, save_lm, tiny_lm, word_tokenizer
from llmpapers.core.scale import rng
from llmpapers.rl import advantages
from llmpapers.rl.decoder import Decoder
from llmpapers.rl.engines import HFEngine
from llmpapers.rl.losses import ppo_loss
from llmpapers.rl.types import Group, Sample, collate

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
    for bad in (0, 1.5, True):
        pytest.raises(ValueError, shard_groups, [1, 1], bad)
    for bad in (1.5, True, "1"):
        with pytest.raises(ValueError, match="seed="):
            shard_groups([1, 1], 1, seed=bad)
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
    junk, grad = torch.where(m, R, float("nan")), v.grad.clone()
    wild = torch.where(own, v.detach(), float("nan")).requires_grad_()
    for clip in (None, 0.1):
        old = wild.detach() if clip else None
        ours = critic_loss(wild, junk, m, shard, clip, old)
        assert torch.equal(ours[1], per)
        wild.grad = None
        ours[0].backward()
        assert torch.equal(wild.grad, grad)


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


# ---- precision, mode, budget ---------------------------------------------------------------------
def test_whitening_and_spread_in_half_precision():
    x, _, m = draw(5, (4, 9))
    x = 1e-3 * x
    for dtype in (torch.float16, torch.bfloat16):
        y = x.to(dtype)
        w = whiten(y, m)
        assert w.dtype == torch.float32 and torch.equal(w, whiten(y.float(), m))
        value, std = ensemble_stats(torch.stack([y, -y]))
        assert value.dtype == std.dtype == torch.float32
        assert torch.equal(std, ensemble_stats(torch.stack([y, -y]).float())[1])
    assert whiten(torch.arange(6).reshape(2, 3), torch.ones(2, 3).bool()).std() > 0.9


def test_nothing_but_the_policy_is_learned_from():
    lp, A, m = draw(3, (4, 6))
    given = [x.clone().requires_grad_() for x in (lp, lp + 0.1, A, A.abs())]
    keep = torch.rand(4, 6, requires_grad=True)
    loss, _ = asyppo_loss(*given[:3], m, adv_mask=keep, entropy=given[3], ent_mask=keep, beta=0.1)
    loss.backward()
    assert given[0].grad.any() and given[3].grad.any()
    assert given[1].grad is None and given[2].grad is None and keep.grad is None
    for bad in (dict(clip=0.0), dict(clip=-1.0), dict(clip_high=-0.1)):
        with pytest.raises(ValueError, match="must be positive"):
            asyppo_loss(lp, lp, A, m, **bad)


class Noisy(torch.nn.Module):
    "A backbone with NaN in the hidden states of padding"

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), dict(hidden_size=4))()
        self.table = torch.nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask, use_cache):
        h = self.table(input_ids)
        pad = torch.where(input_ids == 0, float("nan"), 0.0)[..., None]
        return type("Out", (), dict(last_hidden_state=h + pad))()


def test_padding_reaches_neither_values_nor_gradients():
    "Hidden states that are no numbers, an empty row, and ids outside the table, all on padding"
    critic = ValueModel(Noisy())
    torch.nn.init.normal_(critic.head.weight)
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 1, 0], [0, 0, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    v = critic(torch.where(real, ids, 10_000), real)
    assert v.isfinite().all() and not v[~real].any() and v[real].any()
    v.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in critic.parameters())
    with pytest.raises(ValueError, match="pad on the right"):
        critic(ids, real.flip(-1))


def critic_model(dropout=0.0, dtype=torch.float32):
    cfg = TinyLMConfig("gpt_neox", layers=1, width=16, heads=2, max_len=16, dropout=dropout)
    return tiny_lm(task.tokenizer, cfg, 0).to(dtype)


def reading(n=12, width=8, seed=0):
    g = rng(seed, "reading")
    ids, lengths = torch.randint(4, 14, (n, width), generator=g), torch.randint(3, width + 1, (n,))
    real = torch.arange(width) < lengths[:, None]
    return ids, real, torch.rand(n, width, generator=g), real & (torch.arange(width) > 0)


def test_values_do_not_depend_on_dropout():
    "Whatever mode the model comes in, before and after learning"
    model = ValueModel(critic_model(dropout=0.5)).train()
    torch.nn.init.normal_(model.head.weight)
    c, (ids, real, R, m) = MiniCritic(model, 0.01), reading()
    assert torch.equal(c.values(ids, real), c.values(ids, real))
    twin = copy.deepcopy(c)
    twin.model.train()
    assert c.fit(ids, real, R, m, 2) == twin.fit(ids, real, R, m, 2)
    c.model.train()
    assert torch.equal(c.values(ids, real), twin.values(ids, real))


def test_passes_keep_to_the_budget():
    "Rows times width of a pass, and the values and steps are those of one pass"
    ids, real, R, m = reading()
    seen, results = [], []
    for budget in (8, 24, 10_000):
        c = MiniCritic(ValueModel(critic_model()), 0.01, max_tokens=budget)
        hook = c.model.register_forward_pre_hook(lambda _, a: seen.append(a[0].numel()))
        loss = c.fit(ids, real, R, m, 3)
        results.append((loss, c.values(ids, real)))
        hook.remove()
        assert max(seen) <= budget
        seen.clear()
    for loss, v in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5
        torch.testing.assert_close(v, results[0][1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_critics_learn(dtype):
    "At a rate of 1e-5 the weights move and the error falls; nothing of that could be held in half"
    model = ValueModel(critic_model(dtype=dtype))
    c, (ids, real, _, m) = MiniCritic(model, 1e-5), reading()
    before = torch.cat([p.detach().flatten() for p in c.model.backbone.parameters()]).clone()
    R = torch.ones(ids.shape)
    losses = [c.fit(ids, real, R, m, 4) for _ in range(15)]
    after = torch.cat([p.detach().flatten() for p in c.model.backbone.parameters()])
    assert after.dtype == torch.float32 and c.autocast_dtype == torch.bfloat16
    assert losses[-1] < losses[0] and (after != before).float().mean() > 0.5
    moved = (after - before).abs()
    assert not torch.equal(after.to(dtype).float(), after) and 0 < moved.max() < 1e-2


def test_a_return_that_is_no_number_moves_no_critic():
    c, (ids, real, R, m) = MiniCritic(ValueModel(critic_model()), 0.01), reading()
    before = c.state_dict()["model"]
    R[2, 1] = float("inf")
    assert np.isnan(c.fit(ids, real, R, m, 2))
    assert all(torch.equal(v, before[k]) for k, v in c.state_dict()["model"].items())


# ---- the actor and the vocabulary ----------------------------------------------------------------
def test_warm_up_leaves_the_actor_alone():
    "Weight decay, entropy bonus and scheduler included; critics learn; then the actor does"
    t = run(n=2, warmup=2, beta=0.1)[1]
    start = actor().model.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in t.model.state_dict().items())
    assert t.n_updates == 0 and not t.optimizer.state and t.critic.n == 2
    moved = t.critic.state_dict()["critics"][0]["model"]
    fresh = ValueModel(actor().model).state_dict()
    assert any(not torch.equal(v, fresh[k]) for k, v in moved.items())
    rows, t = run(n=3, warmup=2, beta=0.1)
    assert any(not torch.equal(v, start[k]) for k, v in t.model.state_dict().items())
    assert [r["train/updates"] for r in rows] == [0, 0, 2]


def test_warm_up_leaves_the_scheduler_alone():
    made = []
    cfg = AsyPPOConfig(warmup=1, batch_size=2, group_size=4, utd=2)
    a = actor()
    t = AsyPPOTrainer(a.model, [ValueModel(a.model) for _ in range(2)], cfg)
    t.scheduler = torch.optim.lr_scheduler.LambdaLR(t.optimizer, lambda n: made.append(n) or 1.0)
    made.clear()
    t.step(sums())
    assert made == []
    t.step(sums())
    assert made == [1, 2]


def sums():
    "A scored batch of two prompts"

    def sample(i):
        ids = task.tokenizer(task.prompt(i)).input_ids
        return Sample(ids, [5, 6, 7], [True] * 3, [-1.0] * 3, [0] * 3, float(i % 2))

    groups = [
        Group(g, "", 0, samples=[replace(sample(g), reward=float(k % 2)) for k in range(4)])
        for g in (0, 1)
    ]
    return collate(groups, 0)


def table(n):
    "A model whose table has `n` rows"
    m = actor().model
    m.resize_token_embeddings(n)
    return m


def test_what_counts_is_the_ids_that_occur():
    tok = task.tokenizer  # 15 ids
    check_vocab(table(15), tok)
    check_vocab(table(50), table(64))  # the same table, padded to a multiple
    for bad, vocab in ((table(14), tok), (table(6), table(16)), (table(15), table(29))):
        with pytest.raises(ValueError, match="tokenizers do not match"):
            check_vocab(bad, vocab)
    for sizes in ((64, 50), (15, 64)):
        a, small = (table(n) for n in sizes)
        t = AsyPPOTrainer(a, [ValueModel(small) for _ in range(2)], AsyPPOConfig(), tokenizer=tok)
        assert t.step(sums())["critic/rows"] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft(monkeypatch, tmp_path, dtype):
    "An actor with adapters, critics from the same model; an engine apart gets them merged"
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    folder = save_lm(actor()._replace(model=actor().model.to(dtype)), tmp_path / "actor")
    base = load_lm(str(folder), device="cpu")
    assert base.model.dtype == dtype
    lm = base._replace(model=peft.get_peft_model(base.model, config))
    before = {k: v.clone() for k, v in lm.model.named_parameters()}
    cfg = AsyPPOConfig(batch_size=2, group_size=4, max_new_tokens=4, utd=2, lr=1e-2)
    train_asyppo(lm, lm.model, task.prompt, lambda p, r, i: float(len(r)), 2, cfg)
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, before[name].float()) != ("lora_" in name), name
    with pytest.raises(ValueError, match="adapters"):
        ValueModel(lm.model).save_pretrained("nowhere")
    from llmpapers.rl import run as arrangements

    def stand(folder, max_active, **args):
        return HFEngine(load_lm(str(folder), dtype=torch.float32).model, max_active=max_active)

    monkeypatch.setattr(arrangements, "VLLMEngine", stand)
    rows, _ = train_asyppo(lm, lm.model, task.prompt, please, 2, replace(cfg, utd=1), engine="vllm")
    assert max(abs(r["ratio/mean"] - 1) for r in rows) < 1e-4


def test_ready_made_critics_name_an_id_they_do_not_know():
    cfg = AsyPPOConfig(batch_size=2, group_size=4)
    a = actor()
    critics = Critics([ValueModel(table(6)) for _ in range(2)], cfg)
    t = AsyPPOTrainer(a.model, critics, cfg)
    with pytest.raises(ValueError, match="token id .* a critic knows 0 to 5"):
        t.step(sums())
    with pytest.raises(ValueError, match="2 given, n_critics=1"):
        AsyPPOTrainer(a.model, critics, AsyPPOConfig(n_critics=1, k=0.0))
    with pytest.raises(TypeError, match="DataParallel; pass the model inside"):
        AsyPPOTrainer(torch.nn.DataParallel(a.model), None, AsyPPOConfig("grpo"))


# ---- a checkpoint as it comes from the hub -------------------------------------------------------
@pytest.fixture
def folders(tmp_path):
    "Actor and critic in bfloat16, as the hub has them"
    res = []
    for name in ("actor", "critic"):
        lm = actor()
        res.append(save_lm(lm._replace(model=lm.model.to(torch.bfloat16)), tmp_path / name))
    return res


def please(p, r, info):
    return r.count("7") / 4


def test_half_precision_checkpoints_learn(folders):
    cfg = AsyPPOConfig(
        batch_size=4, group_size=8, max_new_tokens=4, utd=2, lr=1e-2, critic_epochs=2, bf16=True
    )
    where = dict(device="cpu", critic_device="cpu")
    rows, t = train_asyppo(*folders, task.prompt, please, 10, cfg, **where)
    rewards = [r["rollout/reward"] for r in rows]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3]) + 0.1
    trained = [t.model, *(c.model for c in t.critic.members)]
    assert {p.dtype for m in trained for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_the_published_recipe_runs(folders, monkeypatch, ratio):
    "Two steps of `asyppo_paper` on tiny checkpoints, with little data and a stand-in for vLLM"
    from llmpapers.rl import run as arrangements

    made = []

    class Stand(HFEngine):
        def __init__(self, model, max_active, dtype, **args):
            made.append((dtype, args))
            lm = load_lm(str(model), dtype=torch.float32)
            super().__init__(lm.model, max_active=max_active, decoder=Decoder)

    monkeypatch.setattr(arrangements, "VLLMEngine", Stand)
    cfg = replace(asyppo_paper, batch_size=2, group_size=4, max_new_tokens=4)
    rows, t = train_asyppo(
        *folders, task.prompt, please, 2, cfg, ratio, engine="vllm", engine_args=dict(kv_gib=2)
    )
    assert len(rows) == 2 and t.n_updates == 2 * cfg.utd
    assert made == [("bfloat16", dict(kv_gib=2))]


def test_critics_are_kept_in_the_format_of_the_hub(tmp_path):
    t = run(n=1)[1]
    kept = t.critic.save_pretrained(tmp_path)
    ids, real, _, _ = reading()
    for folder, c in zip(kept, t.critic.members, strict=True):
        again = ValueModel.from_pretrained(folder)
        assert not again.training and torch.equal(again(ids, real), c.values(ids, real))
        suffixes = {p.suffix for p in folder.iterdir()}
        assert suffixes == {".json", ".safetensors"}
    (folder / "value_head.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no value_head.safetensors"):
        ValueModel.from_pretrained(folder)


def bad_values(field):
    "Values that no field of its kind may have"
    bad = [float("nan"), "x", [1]]
    if field.type is bool or "bool" in str(field.type):
        return [*bad, 2]
    if field.type is str or str(field.type) == "str":
        return ["x", 3, True]
    if field.type is int:
        return [*bad, -1, 1.5, True, float("inf")]
    return [*bad, -1.0, True]


@pytest.mark.parametrize("config", [AsyPPOConfig, TabularConfig])
def test_every_field_is_checked_by_name(config):
    for f in fields(config):
        for bad in bad_values(f):
            with pytest.raises((ValueError, TypeError)) as e:
                config(**{f.name: bad})
            assert f"{f.name}=" in str(e.value), (f.name, bad, e.value)
        config(**{f.name: getattr(config(), f.name)})
    for bad in (dict(probs=(0.5, "x", 0.5)), dict(errors=(0, 2, 0)), dict(steps=(1.5,))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SurvivalMDP(**bad)


def test_bad_runs_are_refused():
    for bad, name in (
        (dict(method="x"), "method"),
        (dict(k=2.0), "k="),
        (dict(h=-1.0), "h="),
        (dict(n_critics=0), "n_critics"),
        (dict(how="max"), "how"),
        (dict(utd=0), "utd"),
        (dict(clip=-1), r"clip=-1 must be a number in \(0, inf\)"),
        (dict(group_size=1), "group_size=1 must be at least 2"),
        (dict(n_critics=1.5), "n_critics=1.5 must be an integer"),
        (dict(temperature=0), "temperature=0 must be a number"),
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
