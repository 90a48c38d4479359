"""Token credit: the invariants of the coefficients as properties, on random signals with ties,
masks and padding"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpapers.attention_rhythm.credit import (
    coupled_gamma,
    coupled_gamma_loop,
    credit_gamma,
    delta_waad,
    entropy_gamma,
    global_anchor_gamma,
    local_chunk_gamma,
    random_gamma,
    shape_advantages,
    signs,
    strategies,
    top_q,
    uniform_gamma,
)
from llmpapers.attention_rhythm.metrics import fai_support
from llmpapers.rl.advantages import group_advantages
from llmpapers.rl.losses import PolicyLossConfig, policy_loss
from llmpapers.rl.types import Group, Sample, collate

props = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def signals(draw, n_max=24, b_max=4, h_lo=None):
    """WAAD, FAI, entropy with many ties, a response mask with rows of any length (0 too), and the
    support"""
    b, n, seed = (
        draw(st.integers(1, b_max)),
        draw(st.integers(1, n_max)),
        draw(st.integers(0, 2**20)),
    )
    g, levels = torch.Generator().manual_seed(seed), draw(st.sampled_from([1, 2, 5, 1000]))
    mask = torch.zeros(b, n).bool()
    for i in range(b):
        lo = draw(st.integers(0, n))
        mask[i, lo : draw(st.integers(lo, n))] = True
    lo = draw(st.integers(0, 6)) if h_lo is None else h_lo

    def x():
        return torch.randint(0, levels, (b, n), generator=g).float() / levels

    return (
        dict(waad=10 * x(), fai=x() * mask, entropy=x(), support=fai_support(mask, lo, lo + 8)),
        mask,
        seed,
    )


shares = st.one_of(st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0]), st.floats(0, 1))
amps = st.sampled_from([1.0, 1.5, 2.0, 3.7])


def size(q, n):
    return 0 if q == 0 else max(1, math.floor(q * n + 0.5 + 1e-9))


# ---- selection -----------------------------------------------------------------------------------
@props
@given(signals(), shares, st.booleans())
def test_top_q_is_exact_ordered_and_deterministic(case, q, largest):
    """Exactly min(m, candidates) tokens; nothing left out is better; among equals the earlier one
    is in"""
    s, mask, _ = case
    chosen = top_q(s["fai"], s["support"] > 0, q, mask.sum(-1), largest)
    assert not (chosen & (s["support"] == 0)).any()
    for x, t, c in zip(s["fai"] if largest else -s["fai"], chosen, s["support"] > 0):
        inside, outside = t.nonzero().flatten().tolist(), (c & ~t).nonzero().flatten().tolist()
        assert all((x[i], -i) > (x[j], -j) for i in inside for j in outside)
    expect = [
        min(size(q, int(n)), int(c)) for n, c in zip(mask.sum(-1), (s["support"] > 0).sum(-1))
    ]
    assert chosen.sum(-1).tolist() == expect


@props
@given(signals(), shares, amps, st.sampled_from(["top", "bottom"]))
def test_single_strategies_have_two_values_and_exact_counts(case, q, amp, select):
    """Values are 1 and amp; m tokens at amp, never more than the candidates, none outside the
    response"""
    s, mask, seed = case
    n, last = mask.sum(-1), (mask.sum(-1) - 1).clamp(min=0)
    for gamma, room in (
        (local_chunk_gamma(s["waad"], mask, q, amp, select), last),
        (
            global_anchor_gamma(s["fai"], mask, q, amp, s["support"], select),
            (s["support"] > 0).sum(-1),
        ),
        (entropy_gamma(s["entropy"], mask, q, amp, select), n),
        (random_gamma(mask, q, amp, torch.Generator().manual_seed(seed)), n),
    ):
        assert (
            ((gamma == 1) | (gamma == amp)).all()
            and (gamma[~mask] == 1).all()
            and not gamma.requires_grad
        )
        if amp > 1:
            assert (gamma > 1).sum(-1).tolist() == [
                min(size(q, int(a)), int(b)) for a, b in zip(n, room)
            ]


@props
@given(signals(h_lo=0), shares)
def test_ties_take_the_earliest(case, q):
    "All-equal scores select the first m tokens of the response"
    _, mask, _ = case
    flat = torch.ones(mask.shape)
    rank = mask.long().cumsum(-1)
    assert torch.equal(
        entropy_gamma(flat, mask, q) > 1,
        mask & (rank <= torch.tensor([size(q, int(n)) for n in mask.sum(-1)])[:, None]),
    )


# ---- the coupled strategy ------------------------------------------------------------------------
@props
@given(signals(), shares, amps, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 4))
def test_coupled_equals_the_loop(case, q, amp, alpha, k):
    s, mask, _ = case
    kw = dict(q=q, amp=amp, alpha=alpha, k=k, support=s["support"])
    torch.testing.assert_close(
        coupled_gamma(s["waad"], s["fai"], mask, **kw),
        coupled_gamma_loop(s["waad"], s["fai"], mask, **kw),
    )


@props
@given(
    signals(),
    shares,
    amps,
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(0, 4),
    st.sampled_from([None, -1.0, 3.0]),
    st.sampled_from([None, 0.0, 2.0]),
)
def test_coupled_is_additive_and_conserves_the_bonus(case, q, amp, alpha, k, tau_waad, tau_delta):
    """gamma is the sum of its three terms, at most 1+(1+alpha)(amp-1); the bonus is |T|(amp-1),
    exactly if intros are distinct"""
    s, mask, _ = case
    p = coupled_gamma(
        s["waad"],
        s["fai"],
        mask,
        q,
        amp,
        alpha,
        k,
        tau_waad,
        tau_delta,
        s["support"],
        return_parts=True,
    )
    b, T, D, intros = amp - 1, p.anchors, p.dominated, p.intros
    assert (D <= T).all() and not (intros & ~mask).any() and not p.gamma.requires_grad
    parts = 1 + b * (T & ~D).float() + (1 - alpha) * b * D.float() + alpha * b * intros.float()
    torch.testing.assert_close(p.gamma, parts)
    assert (
        p.gamma.min() >= 1
        and p.gamma.max() <= 1 + (1 + alpha) * b + 1e-6
        and (p.gamma[~mask] == 1).all()
    )
    bonus, full = (p.gamma - 1).sum(-1), b * T.sum(-1)
    distinct = intros.sum(-1) == D.sum(-1)
    assert (bonus <= full + 1e-4).all()
    torch.testing.assert_close(bonus[distinct], full[distinct].float())
    if b * alpha > 0:
        assert (bonus[~distinct] < full[~distinct] - 1e-6).all()
    assert (intros.any(-1) == D.any(-1)).all()


def test_anchor_and_intro_reach_one_point_seventy_five():
    "A plain anchor that introduces a dominated one gets both bonuses"
    w, f = torch.tensor([[0.0, 6, 0, 0, 0, 0, 0]]), torch.tensor([[0.0, 0.9, 0.8, 0, 0, 0, 0]])
    assert coupled_gamma(w, f, torch.ones(1, 7).bool(), q=0.3).tolist() == [
        [1, 1.75, 1.25, 1, 1, 1, 1]
    ]


@props
@given(signals(), shares, amps)
def test_coupled_limits(case, q, amp):
    "alpha = 0, k = 0 and an unreachable threshold are global-anchor; amp = 1 and q = 0 are ones"
    s, mask, _ = case
    anchor = global_anchor_gamma(s["fai"], mask, q, amp, s["support"])
    for kw in (dict(alpha=0.0), dict(k=0), dict(tau_delta=math.inf), dict(tau_waad=-1.0)):
        assert torch.equal(
            coupled_gamma(s["waad"], s["fai"], mask, q, amp, support=s["support"], **kw), anchor
        )
    for kw in (dict(amp=1.0), dict(q=0.0)):
        assert (coupled_gamma(s["waad"], s["fai"], mask, support=s["support"], **kw) == 1).all()


@props
@given(signals(h_lo=0), st.integers(0, 4), shares)
def test_thresholds_per_row(case, k, q):
    "A vector of thresholds does to each row what a number does to it alone"
    s, mask, seed = case
    tau = torch.rand(len(mask), generator=torch.Generator().manual_seed(seed)) * 10
    whole = coupled_gamma(s["waad"], s["fai"], mask, q, k=k, tau_waad=tau, tau_delta=tau / 2)
    rows = [
        coupled_gamma(
            s["waad"][i],
            s["fai"][i],
            mask[i],
            q,
            k=k,
            tau_waad=float(tau[i]),
            tau_delta=float(tau[i] / 2),
        )
        for i in range(len(mask))
    ]
    assert torch.equal(whole, torch.stack(rows))


# ---- short responses, padding, batches -----------------------------------------------------------
@props
@given(signals(h_lo=6), shares)
def test_short_responses_have_no_anchor(case, q):
    "Responses of at most h_lo tokens keep gamma = 1 under global and coupled, in silence"
    s, mask, _ = case
    short = mask.sum(-1) <= 6
    for strategy in ("global", "coupled"):
        assert (credit_gamma(strategy, mask, **s, q=q)[short] == 1).all()
    one = mask.sum(-1) == 1
    assert (local_chunk_gamma(s["waad"], mask, q)[one | (mask.sum(-1) == 0)] == 1).all()


@props
@given(signals(), st.integers(0, 5), st.integers(0, 5), shares)
def test_padding_and_batch_do_not_matter(case, left, right, q):
    s, mask, _ = case

    def pad(x):
        return torch.nn.functional.pad(x, (left, right))

    for strategy in set(strategies) - {"random"}:
        gamma = credit_gamma(strategy, mask, **s, q=q)
        padded = credit_gamma(strategy, pad(mask), **{k: pad(v) for k, v in s.items()}, q=q)
        assert torch.equal(padded[:, left : left + mask.shape[1]], gamma)
        flipped = credit_gamma(strategy, mask.flip(0), **{k: v.flip(0) for k, v in s.items()}, q=q)
        assert torch.equal(flipped.flip(0), gamma)
        assert torch.equal(
            credit_gamma(strategy, mask[0], **{k: v[0] for k, v in s.items()}, q=q), gamma[0]
        )


@props
@given(signals(), shares, amps)
def test_uniform_has_the_mean_of_a_selection(case, q, amp):
    _, mask, _ = case
    gamma = uniform_gamma(mask, q, amp)
    torch.testing.assert_close(gamma, torch.where(mask, 1 + q * (amp - 1), 1.0).float())


# ---- the advantage -------------------------------------------------------------------------------
def rows(seed, b=6, n=9):
    "A batch of `b` scored samples in groups of two, with log-probabilities"
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, n, (b,), generator=g).tolist()

    def sample(length):
        return Sample(
            [1, 2],
            [3] * length,
            [True] * length,
            torch.rand(length, generator=g).neg().tolist(),
            [0] * length,
            float(torch.rand((), generator=g)),
        )

    batch = collate(
        [
            Group(i, None, 0, samples=[sample(length), sample(length)])
            for i, length in enumerate(lens)
        ],
        0,
    )
    return batch, -torch.rand(batch.input_ids.shape, generator=g)


@pytest.mark.slow
@props
@given(
    st.integers(0, 2**20),
    st.sampled_from(["ppo", "reinforce", "cispo", "tis"]),
    st.sampled_from(["token-mean", "seq-mean-token-mean"]),
)
def test_gamma_one_is_grpo_bit_for_bit(seed, name, mode):
    "With amp = 1 every strategy gives the loss of GRPO, to the last bit, and its gradient"
    batch, lp = rows(seed)
    A, m = group_advantages(batch.rewards, batch.group_ids), batch.response_mask
    g = torch.Generator().manual_seed(seed)
    s = {k: torch.rand(m.shape, generator=g) for k in ("waad", "fai", "entropy")} | dict(
        support=fai_support(m, 1, 5)
    )

    def result(adv):
        x = lp.clone().requires_grad_()
        loss, _ = policy_loss(PolicyLossConfig(name, mode), replace(batch, advantages=adv), x)
        loss.backward()
        return loss, x.grad

    plain = result(A[:, None].expand(m.shape))
    for strategy in strategies:
        for sign in signs:
            new = result(
                shape_advantages(A, credit_gamma(strategy, m, **s, amp=1.0, generator=g), sign)
            )
            assert torch.equal(new[0], plain[0]) and torch.equal(new[1], plain[1])


@props
@given(signals(), amps, st.sampled_from(strategies), st.sampled_from(signs))
def test_signs(case, amp, strategy, sign):
    "No advantage changes its sign; those the mode leaves out are untouched; zeros stay zero"
    s, mask, seed = case
    g = torch.Generator().manual_seed(seed)
    A = torch.randint(-2, 3, (len(mask),), generator=g).float()
    gamma = credit_gamma(strategy, mask, **s, amp=amp, generator=g)
    out, wide = shape_advantages(A, gamma, sign), A[:, None].expand(mask.shape)
    assert torch.equal(out.sign(), wide.sign()) and (out.abs() >= wide.abs()).all()
    touched = {"both": A != 0, "positive": A > 0, "negative": A < 0}[sign]
    assert torch.equal(out[~touched], wide[~touched]) and torch.equal(
        out[touched], (wide * gamma)[touched]
    )
    assert torch.equal(out, shape_advantages(wide, gamma, sign))


def test_no_gradient_and_half_precision():
    "Coefficients carry no gradient, and half-precision signals are ranked in single precision"
    w, f = (torch.rand(2, 8).requires_grad_() for _ in range(2))
    m = torch.ones(2, 8).bool()
    assert (
        not coupled_gamma(w, f, m).requires_grad
        and not shape_advantages(torch.ones(2), coupled_gamma(w, f, m)).requires_grad
    )
    half = coupled_gamma(w.detach().bfloat16(), f.detach().bfloat16(), m)
    assert half.dtype == torch.float32
    assert torch.equal(
        half, coupled_gamma(w.detach().bfloat16().float(), f.detach().bfloat16().float(), m)
    )


# ---- bad input -----------------------------------------------------------------------------------
M, X = torch.ones(2, 6).bool(), torch.rand(2, 6)
holes = torch.tensor([1, 0, 1, 1, 1, 1]).bool().expand(2, 6)
bad = {
    "q=": lambda: local_chunk_gamma(X, M, q=-0.1),
    "q=1.5": lambda: top_q(X, M, 1.5),
    "amp=": lambda: entropy_gamma(X, M, amp=0.9),
    "amp=inf": lambda: random_gamma(M, amp=math.inf),
    "alpha=": lambda: coupled_gamma(X, X, M, alpha=1.1),
    "k=": lambda: coupled_gamma(X, X, M, k=1.5),
    "select=": lambda: global_anchor_gamma(X, M, select="best"),
    "strategy=": lambda: credit_gamma("all", M),
    "sign=": lambda: shape_advantages(X, X, "plus"),
    "waad has shape": lambda: delta_waad(X[:1], M),
    "support has shape": lambda: global_anchor_gamma(X, M, support=M[:1]),
    "holes": lambda: delta_waad(X, holes),
    "NaN or infinite": lambda: global_anchor_gamma(X / 0, M),
    "tau_waad has shape": lambda: coupled_gamma(X, X, M, tau_waad=torch.ones(3)),
    "tau_delta is NaN": lambda: coupled_gamma(X, X, M, tau_delta=math.nan),
    "fai is needed": lambda: credit_gamma("coupled", M, waad=X),
    "adv has shape": lambda: shape_advantages(torch.ones(3), X),
    "negative values": lambda: shape_advantages(torch.ones(2), -X),
}


@pytest.mark.parametrize("text", bad)
def test_bad_input(text):
    with pytest.raises(ValueError, match=text):
        bad[text]()
