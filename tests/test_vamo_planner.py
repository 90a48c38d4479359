"""Invariants of the planners: schedule, conditions, loss, in-painting, guidance, inverse dynamics,
policies"""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmpapers.core.scale import rng
from llmpapers.vamo.auction import Market, MarketConfig, behaviour, draw_budgets, rollout
from llmpapers.vamo.causal import CausalPlanner, load_planner, save_planner
from llmpapers.vamo.planner import (
    DiffusionSchedule,
    InverseDynamics,
    MultiTaskPlanner,
    PlannerPolicy,
    TaskLinear,
    conditions,
    day_return,
    fit_conditions,
    habits,
    logged,
    train_planner,
    training_set,
    value_so_far,
)

seeds = st.integers(0, 10**6)
some, many = settings(max_examples=8, deadline=None), settings(max_examples=25, deadline=None)
T, S, K, Y = 12, 8, 3, 3
kinds = ["none", "sincos", "times", "sincos+times", "sincos+context"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed, *shape), dtype=dtype)


def planner(temporal="sincos", seed=0, kind=MultiTaskPlanner, **kw):
    torch.manual_seed(seed)
    small = dict(d=8, T=T, temporal=temporal, days=2)
    if kind is MultiTaskPlanner:
        small |= dict(N=4, blocks=2, periods=(4, 3), inv_width=8)
    else:
        small |= dict(heads=2)
    p = kind(S, K, **(small | kw)).double().eval()
    with torch.no_grad():
        for q in p.parameters():
            q.add_(
                0.1 * torch.randn(q.shape, generator=rng(seed, "w", *q.shape), dtype=q.dtype)
            )  # no zero biases
    return p


def case(B=6, seed=0, context=False):
    b = dict(
        states=normal(B, T, S, seed=seed),
        actions=normal(B, T, seed=seed),
        cond=normal(B, Y, seed=seed),
    )
    if context:
        b["context"] = normal(B, 2 * T, 3, seed=seed)
    return b, torch.arange(B) % K


def both(temporal="sincos", **kw):
    return [planner(temporal, kind=k, **kw) for k in (MultiTaskPlanner, CausalPlanner)]


# ---- schedule ------------------------------------------------------------------------------------
@given(st.integers(1, 200))
@many
def test_schedule_is_exact(N):
    s = DiffusionSchedule(N).double()
    a, b = s.alpha_bar, s.beta
    assert (
        a[0] == 1 and (a.diff() < 0).all() and (a > 0).all() and ((b[1:] > 0) & (b[1:] < 1)).all()
    )
    for n in {1, (N + 1) // 2, N}:
        zero, one = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
        c0, cn = s.back(zero, n, one)[0], s.back(one, n, zero)[0]
        assert torch.allclose(c0 + cn * a[n].sqrt(), a[n - 1].sqrt(), atol=1e-5)
        assert torch.allclose(
            cn**2 * (1 - a[n]) + s.back(zero, n, zero)[1] ** 2, 1 - a[n - 1], atol=1e-5
        )
    assert s.back(one, 1, 3 * one)[1] == 0 and torch.allclose(
        s.back(one, 1, 3 * one)[0], 3 * one, atol=1e-5
    )


@given(seeds, st.integers(1, 50), st.data())
@many
def test_clean_undoes_noise(seed, N, data):
    s = DiffusionSchedule(N).double()
    n = data.draw(st.integers(1, N))
    x, eps = normal(2, 5, 3, seed=seed), normal(2, 5, 3, seed=seed + 1)
    assert torch.allclose(s.clean(s.add_noise(x, torch.full((2,), n), eps), n, eps), x, atol=1e-6)
    assert torch.equal(s.add_noise(x, torch.zeros(2).long(), eps), x)


@given(seeds, st.integers(1, 50), st.data())
@many
def test_day_noise_and_v_give_each_other(seed, N, data):
    s = DiffusionSchedule(N)
    n = data.draw(st.integers(0, N))
    x0, eps, at = normal(2, 5, 3, seed=seed), normal(2, 5, 3, seed=seed + 1), torch.full((2,), n)
    x, v, a = s.add_noise(x0, at, eps), s.velocity(x0, at, eps), s.alpha_bar[n]
    assert torch.allclose(s.clean(x, n, v, "v"), x0, atol=1e-12)
    assert torch.allclose((1 - a).sqrt() * x + a.sqrt() * v, eps, atol=1e-12)
    assert torch.allclose(v, a.sqrt() * eps - (1 - a).sqrt() * x0, atol=1e-12)
    if n:
        assert torch.allclose(s.clean(x, n, (1 - a).sqrt() * x + a.sqrt() * v), x0, atol=1e-6)
    if n in (0, N):
        assert torch.allclose(
            v, -x0 if n else eps, atol=0.5 if n else 0
        )  # the ends: the noise, and nearly minus the day


def test_v_does_not_amplify_errors():
    """An error of the guess enters the day times at most one; an error of the noise times its share
    over the signal's"""
    s, x0, eps, d = (
        DiffusionSchedule(10),
        normal(1, 4, 2),
        normal(1, 4, 2, seed=1),
        normal(1, 4, 2, seed=2),
    )
    for n in range(1, 11):
        at, a = torch.tensor([n]), s.alpha_bar[n]
        x = s.add_noise(x0, at, eps)
        assert torch.allclose(
            s.clean(x, n, s.velocity(x0, at, eps) + d, "v") - x0, -(1 - a).sqrt() * d, atol=1e-9
        )
        assert torch.allclose(s.clean(x, n, eps + d) - x0, -((1 - a) / a).sqrt() * d, atol=1e-6)


@pytest.mark.parametrize("N", [0, -1, 2.5, True])
def test_bad_schedule(N):
    with pytest.raises(ValueError, match="N="):
        DiffusionSchedule(N)


# ---- conditions ----------------------------------------------------------------------------------
@given(seeds)
@many
def test_conditions_of_training_days_lie_in_the_unit_interval(seed):
    g = rng(seed, "c")
    R, money, task = (
        torch.rand(30, generator=g) * 2,
        torch.rand(30, generator=g).double() + 0.1,
        torch.arange(30) % K,
    )
    cs = fit_conditions(R, money, task, K)
    y = conditions(cs, R, torch.ones(30).bool(), money, task)
    for k in range(K):
        r = y[task == k, 0]
        assert r.min().abs() < 1e-5 and (r.max() - 1).abs() < 1e-5
        assert (
            y[task == k, 2].mean().abs() < 1e-4
            and (y[task == k, 2].std(unbiased=False) - 1).abs() < 1e-3
        )
    later = conditions(
        cs, R + 1, False, money, 0
    )  # other days are not clipped and do not change the scale
    assert later[:, 0].max() > 1 and (later[:, 1] == 0).all()


def test_conditions_of_equal_days_are_finite():
    cs = fit_conditions(torch.ones(6), torch.ones(6), torch.arange(6) % K, K)
    assert conditions(cs, torch.ones(6), True, torch.ones(6), torch.arange(6) % K).isfinite().all()


def test_bad_conditions():
    with pytest.raises(ValueError, match="task 2 of 3"):
        fit_conditions(torch.ones(4), torch.ones(4), torch.arange(4) % 2, 3)
    with pytest.raises(ValueError, match="finite"):
        fit_conditions(torch.full((3,), torch.nan), torch.ones(3), torch.arange(3), 3)
    with pytest.raises(ValueError, match="positive"):
        fit_conditions(torch.ones(3), torch.zeros(3), torch.arange(3), 3)
    with pytest.raises(ValueError, match="rewards"):
        day_return(torch.zeros(2, 5, 8), torch.zeros(2, 4))


def simulated(n=5, day=1, k=0, seed=0):
    m = Market(MarketConfig(days=3, volume=1500.0), seed)
    money = draw_budgets(m, day, k, n, rng(seed, "b"))
    return m, money, rollout(m, day, k, money, behaviour("pid", n, rng(seed, "p")))


def test_return_read_from_states_is_the_value_won():
    "In units of what the budget buys at yesterday's price"
    from llmpapers.vamo.auction import yesterday

    m, money, t = simulated()
    ref = yesterday(m, 1, 0, money)
    direct = t.rewards.sum(1) * ref.price / money
    assert torch.allclose(day_return(t.states, t.rewards).double(), direct, rtol=1e-3)
    won = (t.rewards.cumsum(1) - t.rewards) * (ref.price / money)[:, None]
    assert torch.allclose(value_so_far(t.states).double(), won, atol=1e-4)


# ---- the loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("temporal", kinds)
def test_loss_is_finite_and_reproducible(temporal):
    b, k = case(context="context" in temporal)
    for p in both(temporal) if "times" not in temporal else [planner(temporal)]:
        noise = p.draw(6, rng(0, "n"))._replace(eps=normal(6, T, S))
        loss = p.loss(b, k, noise)
        assert loss.ndim == 0 and loss.isfinite() and torch.equal(loss, p.loss(b, k, noise))


@given(seeds, st.integers(2, T))
@some
def test_padding_does_not_count(seed, real):
    b, k = case(seed=seed)
    mask = torch.arange(T).expand(6, T) < real
    junk = b | dict(
        states=torch.where(mask[..., None], b["states"], torch.nan),
        actions=torch.where(mask, b["actions"], 1e9),
    )
    for p in both():
        noise = p.draw(6, rng(seed, "n"))._replace(eps=normal(6, T, S))
        one, two = (p.loss(x | dict(mask=mask), k, noise) for x in (b, junk))
        assert one.isfinite() and torch.equal(one, two)
        g = torch.autograd.grad(
            p.loss(junk | dict(mask=mask), k, noise),
            [q for q in p.parameters() if q.requires_grad],
            allow_unused=True,
        )
        assert all(v is None or v.isfinite().all() for v in g)


@pytest.mark.parametrize("predict", ["noise", "v"])
def test_loss_is_a_mean_over_real_steps_only(predict):
    """Longer padding leaves the mean as it is, where a mean over all steps would shrink; the aim is
    what the network predicts"""
    p, (b, k) = planner(predict=predict), case()
    noise = p.draw(6, rng(0, "n"))._replace(prefix=torch.ones(6).long(), eps=normal(6, T, S))
    mask = torch.zeros(6, T).bool()
    mask[:, :2] = True
    x0 = p.normalise(b["states"])
    known = torch.arange(T).expand(6, T) < 1
    x = (
        torch.where(known[..., None], x0, p.schedule.add_noise(x0, noise.n, noise.eps))
        * mask[..., None]
        + p.schedule.add_noise(0 * x0, noise.n, noise.eps) * (~mask)[..., None]
    )
    guess = p.guess(x, known, noise.n, b["cond"], noise.drop, k)
    a = p.schedule.alpha_bar[noise.n][:, None]
    aim = (
        noise.eps[:, 1]
        if predict == "noise"
        else a.sqrt() * noise.eps[:, 1] - (1 - a).sqrt() * x0[:, 1]
    )
    by_hand = (guess[:, 1] - aim).square().mean()
    inv = (p.inverse(x0[:, :1], x0[:, 1:2], k)[:, 0] - b["actions"][:, 0]).square().mean()
    assert torch.allclose(p.loss(b | dict(mask=mask), k, noise), 0.5 * (by_hand + inv), atol=1e-10)


def test_executed_steps_are_not_scored_and_the_last_step_has_no_inverse():
    p, (b, k) = planner(), case()
    noise = p.draw(6, rng(0, "n"))._replace(eps=normal(6, T, S), prefix=torch.full((6,), 4))
    other = noise._replace(eps=torch.where((torch.arange(T) < 4)[:, None], 7.0, noise.eps))
    assert torch.equal(p.loss(b, k, noise), p.loss(b, k, other))
    last = b | dict(actions=torch.cat([b["actions"][:, :-1], torch.full((6, 1), 9.0)], 1))
    assert torch.equal(p.loss(b, k, noise), p.loss(last, k, noise))


@given(seeds)
@some
def test_task_number_and_task_vector_agree(seed):
    b, _ = case(seed=seed)
    for p in both():
        noise = p.draw(6, rng(seed, "n"))._replace(eps=normal(6, T, S))
        assert torch.equal(p.loss(b, 1, noise), p.loss(b, torch.ones(6).long(), noise))


def test_other_heads_get_zero_gradient():
    b, _ = case()
    for p in both():
        noise = p.draw(6, rng(0, "n"))._replace(eps=normal(6, T, S))
        p.loss(b, 1, noise).backward()
        for name, q in p.named_parameters():
            if name.startswith(("head", "act_head", "cond", "inverse.head")):
                assert q.grad[1].abs().sum() > 0 and q.grad[[0, 2]].abs().sum() == 0, name


class Wrap(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, *a):
        return self.m.loss(*a)


@pytest.mark.parametrize("temporal", kinds)
def test_forward_mode_and_second_backward(temporal):
    "What one-pass alignments need"
    b, k = case(context="context" in temporal)
    for p in both(temporal) if "times" not in temporal else [planner(temporal)]:
        noise = p.draw(6, rng(0, "n"))._replace(eps=normal(6, T, S))

        def f(q, p=p, noise=noise):
            named = {f"m.{n}": v for n, v in q.items()}
            return torch.func.functional_call(Wrap(p), named, (b, k, noise))

        q = {n: v.detach() for n, v in p.named_parameters()}
        g = torch.func.grad(f)(q)
        u = {n: normal(*v.shape, seed=3) for n, v in q.items()}
        dot = sum((g[n] * u[n]).sum() for n in q)
        assert torch.allclose(torch.func.jvp(f, (q,), (u,))[1], dot, rtol=1e-8)

        def along(r, f=f, u=u):
            return sum((v * u[n]).sum() for n, v in torch.func.grad(f)(r).items())

        h = torch.func.grad(along)(q)
        assert all(v.isfinite().all() for v in h.values())


def test_loss_touches_nothing():
    b, k = case()
    for p in both():
        noise, state, rnd = (
            p.draw(6, rng(0, "n"))._replace(eps=normal(6, T, S)),
            {n: v.clone() for n, v in p.state_dict().items()},
            torch.random.get_rng_state(),
        )
        p.train().loss(b, k, noise)
        assert p.training and all(torch.equal(v, state[n]) for n, v in p.state_dict().items())
        assert torch.equal(rnd, torch.random.get_rng_state()) and all(
            q.grad is None for q in p.parameters()
        )


# ---- plans ---------------------------------------------------------------------------------------
@given(seeds, st.integers(1, T), st.floats(0, 2), st.floats(0, 1))
@some
def test_history_is_kept_bit_for_bit(seed, t, guidance, temperature):
    b, k = case(seed=seed)
    for p in both():
        p = p.float()
        p.fit(3 + 2 * b["states"].float(), b["actions"].float())
        h = (3 + 2 * b["states"][:, :t]).float()
        x = p.plan(
            h,
            b["cond"].float(),
            k,
            guidance=guidance,
            temperature=temperature,
            generator=rng(seed, "g"),
        )
        assert x.shape == (6, T, S) and torch.equal(x[:, :t], h) and x.isfinite().all()


def test_history_is_put_back_at_every_denoising_step():
    p, (b, k) = planner(), case()
    seen, real = [], p.guess
    p.guess = lambda x, known, *a: (seen.append((x.clone(), known.clone())), real(x, known, *a))[1]
    p.plan(b["states"][:, :5], b["cond"], k, guidance=1, noise=normal(6, 4, T, S))
    assert len(seen) == 4
    for x, known in seen:
        assert (
            torch.equal(x[:, :5], p.normalise(b["states"][:, :5]))
            and known[:, :5].all()
            and not known[:, 5:].any()
        )


@pytest.mark.parametrize("predict", ["noise", "v"])
def test_a_network_that_knows_the_day_plans_it(predict):
    """With the true noise or the true v at every step the plan is the day, whatever noise it starts
    from"""
    p, (b, k) = planner(predict=predict), case()
    p.fit(b["states"], b["actions"])
    x0 = p.normalise(b["states"])

    def oracle(x, known, n, *_):
        a = p.schedule.alpha_bar[n][:, None, None]
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return eps if predict == "noise" else a.sqrt() * eps - (1 - a).sqrt() * x0

    p.guess = oracle
    for z in (1, 2):
        assert torch.allclose(
            p.plan(b["states"][:, :5], b["cond"], k, guidance=1, noise=normal(6, 4, T, S, seed=z)),
            b["states"],
            atol=1e-6,
        )


@given(seeds, st.integers(1, T - 1))
@some
def test_guidance(seed, t):
    "1 is the conditional model, 0 the unconditional one, others lie on the line through both"
    b, k = case(seed=seed)
    h, no = b["states"][:, :t], torch.zeros(6).bool()
    p = planner()
    x, known, n = normal(6, T, S, seed=seed), torch.arange(T).expand(6, T) < t, torch.full((6,), 2)
    given_, free = p.guess(x, known, n, b["cond"], no, k), p.guess(x, known, n, b["cond"], ~no, k)
    assert torch.equal(p.guided(x, known, 2, b["cond"], k, 1), given_) and torch.equal(
        p.guided(x, known, 2, b["cond"], k, 0), free
    )
    for w in (-0.5, 0.3, 1.2, 3.0):
        assert torch.allclose(
            p.guided(x, known, 2, b["cond"], k, w), free + w * (given_ - free), atol=1e-9
        )
    for q in both():
        kw = dict(noise=normal(6, 4, T, S, seed=seed)) if q.needs_plan else {}
        other = b["cond"] + 1
        assert torch.equal(
            q.plan(h, b["cond"], k, guidance=0, **kw), q.plan(h, other, k, guidance=0, **kw)
        )
        assert not torch.equal(
            q.plan(h, b["cond"], k, guidance=1, **kw), q.plan(h, other, k, guidance=1, **kw)
        )
        assert torch.allclose(
            q.plan(h, b["cond"], k, guidance=1, **kw),
            q.plan(h, b["cond"], k, guidance=1 + 1e-9, **kw),
            atol=1e-5,
        )


@pytest.mark.slow
@pytest.mark.parametrize("temporal", kinds)
def test_64_plans_at_once_are_64_single_ones(temporal):
    B = 64
    b, k = case(B, context="context" in temporal)
    for p in both(temporal) if "times" not in temporal else [planner(temporal)]:
        z = normal(B, 4, T, S, seed=1)

        def one(i):
            return slice(i, i + 1)

        def call(i, p=p, z=z):
            return p.plan(
                b["states"][i, :5],
                b["cond"][i],
                k[i],
                guidance=1.2,
                context=b["context"][i] if "context" in b else None,
                **(dict(noise=z[i]) if p.needs_plan else {}),
            )

        assert torch.allclose(
            call(slice(None)), torch.cat([call(one(i)) for i in range(B)]), atol=1e-7
        )


def test_temperature_zero_is_deterministic_and_noise_widens():
    p, (b, k) = planner(), case()
    spread = [
        torch.stack(
            [
                p.plan(
                    b["states"][:, :5],
                    b["cond"],
                    k,
                    temperature=t,
                    noise=normal(6, 4, T, S, seed=i),
                )
                for i in range(12)
            ]
        )[:, :, 5:]
        .std(0)
        .mean()
        for t in (0.0, 0.25, 1.0)
    ]
    assert spread[0] < 1e-12 < spread[1] < spread[2]


def test_own_generator():
    p, (b, k) = planner().float(), case()
    h, y = b["states"][:, :5].float(), b["cond"].float()
    state = torch.random.get_rng_state()
    one, two = p.plan(h, y, k), p.plan(h, y, k)
    assert torch.equal(one, two) and torch.equal(state, torch.random.get_rng_state())
    g = rng(0, "own")
    assert not torch.equal(p.plan(h, y, k, generator=g), p.plan(h, y, k, generator=g))


def test_samples_stay_in_the_range_of_training_days():
    p, (b, k) = planner().float(), case()
    p.fit(b["states"].float(), b["actions"].float())
    x = p.normalise(
        p.plan(b["states"][:, :5].float(), b["cond"].float() * 50, k, guidance=9, temperature=0.0)
    )
    assert (x[:, 5:] >= p.low - 1e-4).all() and (x[:, 5:] <= p.high + 1e-4).all()


def test_normalisation_comes_from_what_is_given_alone():
    p, (b, _) = planner(), case()
    mask = torch.arange(T).expand(6, T) < 7
    p.fit(b["states"], b["actions"], mask)
    want = b["states"][mask]
    assert torch.allclose(p.mean, want.mean(0)) and torch.allclose(p.std, want.std(0))
    changed = torch.where(mask[..., None], b["states"], 99.0)
    q = planner()
    q.fit(changed, b["actions"], mask)
    assert all(
        torch.equal(p.state_dict()[n], q.state_dict()[n])
        for n in ("mean", "std", "low", "high", "a_mean", "a_std")
    )
    assert torch.allclose(p.restore(p.normalise(b["states"])), b["states"])


def test_constant_entries_do_not_divide_by_zero():
    p, (b, k) = planner(), case()
    x = b["states"].clone()
    x[..., 7] = 0.0
    p.fit(x, torch.zeros(6, T))
    assert p.plan(x[:, :3], b["cond"], k, noise=normal(6, 4, T, S)).isfinite().all()


# ---- inverse dynamics and policies ---------------------------------------------------------------
@given(seeds)
@some
def test_inverse_sees_three_states_back_and_one_ahead(seed):
    torch.manual_seed(seed)
    f, k = InverseDynamics(S, K, 8).double(), torch.arange(4) % K
    s, nxt = normal(4, T, S, seed=seed), normal(4, T, S, seed=seed + 1)
    a = f(s, nxt, k)
    for t in range(T):
        lo = max(t - 2, 0)
        rows = s[:, lo : t + 1] if t >= 2 else torch.cat([s[:, :1]] * (2 - t) + [s[:, : t + 1]], 1)
        assert torch.allclose(
            a[:, t], f.head(f.net(torch.cat([rows.flatten(1), nxt[:, t]], 1)), k)[:, 0], atol=1e-10
        )


def test_hidden_entries_of_the_next_state():
    f, k = InverseDynamics(S, K, 8, hide=(6,)).double(), torch.arange(4) % K
    s, nxt = normal(4, T, S), normal(4, T, S, seed=1)
    changed = nxt.clone()
    changed[..., 6] += 5
    assert torch.equal(f(s, nxt, k), f(s, changed, k))
    with pytest.raises(ValueError, match="no state entry 8"):
        InverseDynamics(S, K, hide=(8,))


@given(seeds, st.integers(1, T - 1))
@some
def test_a_hidden_entry_of_the_plan_does_not_move_the_action(seed, t):
    b, k = case(seed=seed)
    for hide in ((), (6,), (2, 6)):
        p = planner(hide=hide)
        p.fit(b["states"], b["actions"])
        p.a_low.fill_(-1e6)
        p.a_high.fill_(1e6)  # no clamp, so that every difference shows
        plan = p.plan(b["states"][:, :t], b["cond"], k, noise=normal(6, 4, T, S))
        first = p.act(b["states"][:, :t], b["cond"], k, b["actions"][:, : t - 1], plan)
        for i in range(S):
            other = plan.clone()
            other[:, t, i] += 3.0
            same = torch.equal(
                p.act(b["states"][:, :t], b["cond"], k, b["actions"][:, : t - 1], other), first
            )
            assert same == (i in hide), (hide, i)


def test_the_executed_last_action_is_still_seen():
    p, (b, k) = planner(hide=(6,)), case()
    other = b["states"].clone()
    other[:, 4, 6] += 1.0
    assert not torch.equal(
        p.decide(b["states"][:, :5], b["states"], k), p.decide(other[:, :5], b["states"], k)
    )


@given(seeds, st.integers(1, T - 1))
@some
def test_decision_is_the_inverse_of_the_planned_step(seed, t):
    p, (b, k) = planner(), case(seed=seed)
    p.fit(b["states"], b["actions"])
    plan = p.plan(b["states"][:, :t], b["cond"], k, noise=normal(6, 4, T, S))
    full = p.normalise(plan)
    want = p.action(p.inverse(full[:, :-1], full[:, 1:], k)[:, t - 1])
    assert torch.allclose(p.decide(b["states"][:, :t], plan, k), want, atol=1e-9)


def test_causal_model_does_not_see_ahead():
    p, (b, k) = planner(kind=CausalPlanner), case()
    later = torch.cat([b["states"][:, :5], normal(6, T - 5, S, seed=9)], 1)
    for x, y in zip(
        p(b["states"], b["cond"], torch.zeros(6).bool(), k),
        p(later, b["cond"], torch.zeros(6).bool(), k),
    ):
        assert torch.allclose(x[:, :5], y[:, :5], atol=1e-12) and not torch.allclose(
            x[:, 5:], y[:, 5:]
        )


def test_return_to_go_counts_what_is_left():
    "Value already won and a smaller wish are the same thing"
    p, (b, k) = planner(kind=CausalPlanner), case()
    p.r_low.fill_(0.0)
    p.r_high.fill_(2.0)
    x = b["states"][:, :4].clone()
    x[..., 3] = 1.0
    won = value_so_far(x)[:, -1] / 2
    y, none = b["cond"].clone(), b["cond"].clone()
    none[:, 0] -= won

    def show(states, c):
        return p(states, c, torch.zeros(6).bool(), k)[1][:, -1]

    assert not torch.allclose(show(x, y), show(x, none))
    p.embed.weight.data.zero_()  # the state speaks through the return to go alone
    for layer in p.layers:
        layer.out.weight.data.zero_()
        layer.out.bias.data.zero_()  # each step by itself
    idle = x.clone()
    idle[..., 3] = 0.0
    p.mean.zero_()
    p.std.fill_(1.0)
    a, b2 = show(x, y), show(idle, none)
    assert torch.allclose(a, b2, atol=1e-10)
    zero = x.clone()
    zero[..., 3] = 0.0  # nothing bought yet: no value
    assert (value_so_far(zero) == 0).all()


def test_plain_attention_is_attention():
    p = planner(kind=CausalPlanner)
    layer, x = p.layers[0], normal(2, 7, 8)
    q, k, v = layer.qkv(layer.one(x)).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = x + layer.out(
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        .transpose(1, 2)
        .reshape(2, 7, 8)
    )
    assert torch.allclose(layer(x), y + layer.mlp(layer.two(y)), atol=1e-10)


@pytest.mark.parametrize("kind", [MultiTaskPlanner, CausalPlanner])
@pytest.mark.parametrize("replan", [1, 5])
@pytest.mark.slow
def test_policy_plays_a_day(kind, replan):
    m, money, t = simulated()
    torch.manual_seed(0)
    p = kind(8, 3, d=8)
    p.fit(t.states, t.actions)
    cond = torch.rand(5, 3, generator=rng(0, "y"))

    def play():
        return rollout(m, 2, 0, money, PlannerPolicy(p, 0, cond, replan=replan))

    one, two = play(), play()
    assert torch.equal(one.actions, two.actions) and one.actions.isfinite().all()
    assert (one.actions >= t.actions.min() - 1e-6).all() and (
        one.actions <= t.actions.max() + 1e-6
    ).all()
    assert (one.cost.sum(1) <= money * (1 + 1e-6)).all()
    if kind is MultiTaskPlanner:
        assert torch.equal(one.actions[:, -1], one.actions[:, -2])  # no next state at the end: hold


def test_policy_replans_as_often_as_told():
    p, (b, k) = planner().float(), case()
    calls, real = [], p.plan
    p.plan = lambda h, *a, **kw: (calls.append(h.shape[1]), real(h, *a, **kw))[1]
    pol = PlannerPolicy(p, k, b["cond"].float(), replan=4)
    for t in range(1, T + 1):
        pol(b["states"][:, :t].float(), b["actions"][:, : t - 1].float())
    assert calls == [1, 5, 9]


# ---- files, logs, training -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, kw",
    [
        (MultiTaskPlanner, {}),
        (MultiTaskPlanner, dict(predict="noise", hide=())),
        (CausalPlanner, {}),
    ],
)
def test_a_file_gives_the_same_planner(tmp_path, kind, kw):
    p, (b, k) = planner(kind=kind, **kw).float(), case()
    p.fit(b["states"].float(), b["actions"].float())
    q = load_planner(
        save_planner(p, tmp_path / "p.pt")
    ).float()  # as `p`, whose schedule was rounded with it
    assert (
        type(q) is kind
        and q.config == p.config
        and not q.training
        and [f.name for f in tmp_path.iterdir()] == ["p.pt"]
    )
    h, y = b["states"][:, :5].float(), b["cond"].float()
    assert torch.equal(p.plan(h, y, k), q.plan(h, y, k)) and torch.equal(
        p.act(h, y, k, None), q.act(h, y, k, None)
    )


def test_a_file_older_than_the_options_guesses_noise_and_shows_everything(tmp_path):
    p, (b, k) = planner(predict="noise", hide=()).float(), case()
    saved = torch.load(save_planner(p, tmp_path / "p.pt"), weights_only=True)
    for name in ("predict", "hide"):
        del saved["config"][name]
    torch.save(saved, tmp_path / "old.pt")
    q = load_planner(tmp_path / "old.pt").float()
    assert (q.predict, q.config["hide"]) == ("noise", ())
    assert torch.equal(
        p.act(b["states"][:, :5].float(), b["cond"].float(), k, None),
        q.act(b["states"][:, :5].float(), b["cond"].float(), k, None),
    )
    assert (MultiTaskPlanner(8, 3).predict, MultiTaskPlanner(8, 3).config["hide"]) == (
        "v",
        (6,),
    )  # what is new gets the new defaults


def test_bad_files(tmp_path):
    torch.save(dict(a=1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no planner"):
        load_planner(tmp_path / "x.pt")
    torch.save(dict(kind="Sequential", config={}, state={}), tmp_path / "y.pt")
    with pytest.raises(ValueError, match="Sequential"):
        load_planner(tmp_path / "y.pt")


def test_training_days_of_all_tasks():
    m = Market(MarketConfig(days=4, volume=1500.0), 0)
    logs, again, other = (training_set(m, (1, 2), 3, s) for s in (0, 0, 1))
    assert len(logs.task) == 2 * 3 * sum(map(len, habits.values())) and logs.batch[
        "states"
    ].shape == (36, 48, 8)
    assert all(
        torch.equal(logs.batch[n], again.batch[n])
        and not torch.equal(logs.batch[n], other.batch[n])
        for n in logs.batch
    )
    for k in habits:
        r = logs.batch["cond"][logs.task == k, 0]
        assert r.min() == 0 and abs(r.max() - 1) < 1e-5
    one, _ = logged(m, 1, 0, "pid", 3, 0)
    assert torch.equal(logs.batch["states"][:3], one.states) and torch.equal(
        logs.returns[:3], day_return(one.states, one.rewards)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiTaskPlanner, CausalPlanner])
def test_training_is_reproducible_and_lowers_the_loss(kind):
    m = Market(MarketConfig(days=4, volume=1500.0), 0)
    logs = training_set(m, (1, 2), 3, 0)

    def run(seed=0):
        torch.manual_seed(0)
        p = kind(8, 3, d=16)
        return p, train_planner(p, logs, 30, 24, seed=seed)

    p, losses = run()
    assert losses == run()[1] and losses != run(1)[1] and len(losses) == 30 and not p.training
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert torch.allclose(
        p.mean, logs.batch["states"].flatten(0, 1).mean(0), atol=1e-5
    ) and torch.equal(p.r_high, logs.scale.high)
    with pytest.raises(ValueError, match="steps=0"):
        train_planner(p, logs, 0)


# ---- sizes and bad input -------------------------------------------------------------------------
@pytest.mark.parametrize("temporal", kinds)
def test_default_planners_are_small(temporal):
    n = [sum(q.numel() for q in MultiTaskPlanner(8, 12, d=64, temporal=temporal).parameters())]
    if "times" not in temporal:
        n.append(sum(q.numel() for q in CausalPlanner(8, 12, d=64, temporal=temporal).parameters()))
    assert max(n) < 1_000_000


def test_a_larger_planner_runs():
    p = MultiTaskPlanner(8, 6, d=128, blocks=8, temporal="sincos+times+context")
    h = torch.zeros(1, 40, 8)
    assert p.eval().plan(h, torch.zeros(1, 3), 5, context=torch.zeros(1, 144, 3)).shape == (
        1,
        48,
        8,
    )


@pytest.mark.parametrize("temporal", ["", "tides", "none+sincos", "sincos,times", None, 3])
def test_bad_temporal(temporal):
    with pytest.raises(ValueError, match="temporal="):
        MultiTaskPlanner(8, 3, temporal=temporal)


def test_causal_planner_refuses_a_leak():
    with pytest.raises(ValueError, match="future"):
        CausalPlanner(8, 3, temporal="sincos+times")


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(K=0), "K=0"),
        (dict(blocks=0), "blocks=0"),
        (dict(drop=1.0), "drop=1.0"),
        (dict(state_dim=0), "state_dim=0"),
        (dict(predict="day"), "predict='day'"),
        (dict(hide=(8,)), "no state entry 8"),
        (dict(state_dim=5), "no state entry 6"),
    ],
)
def test_bad_sizes(kw, words):
    with pytest.raises(ValueError) as e:
        MultiTaskPlanner(**(dict(state_dim=8, K=3) | kw))
    assert words in str(e.value)


def calls(p, b, k):
    h, y, z = b["states"][:, :5], b["cond"], normal(6, 4, T, S)
    return SimpleNamespace(p=p, h=h, y=y, k=k, z=z)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(h=torch.zeros(6, 0, S)), "history"),
        (dict(h=torch.zeros(6, T + 1, S)), "history"),
        (dict(h=torch.zeros(6, 5, S - 1)), "S=8"),
        (dict(h=torch.full((6, 5, S), torch.nan)), "finite"),
        (dict(y=torch.zeros(6, 2)), "cond"),
        (dict(y=torch.zeros(5, 3)), "cond"),
        (dict(k=3), "task=3"),
        (dict(k=-1), "task=-1"),
        (dict(k=[0, 1]), "one per sample"),
        (dict(k=0.5), "whole number"),
    ],
)
def test_bad_plan(change, words):
    b, k = case()
    for p in both():
        c = calls(p, b, k)
        for n, v in change.items():
            setattr(c, n, v.double() if isinstance(v, torch.Tensor) else v)
        with pytest.raises(ValueError) as e:
            p.plan(c.h, c.y, c.k)
        assert words in str(e.value)


def test_bad_noise_context_and_temperature():
    p, (b, k) = planner(), case()
    with pytest.raises(ValueError, match="noise has shape"):
        p.plan(b["states"][:, :5], b["cond"], k, noise=normal(6, 3, T, S))
    with pytest.raises(ValueError, match="temperature=-1"):
        p.plan(b["states"][:, :5], b["cond"], k, temperature=-1)
    with pytest.raises(ValueError, match="context is given"):
        p.plan(
            b["states"][:, :5], b["cond"], k, noise=normal(6, 4, T, S), context=normal(6, 2 * T, 3)
        )
    with pytest.raises(ValueError, match="context is missing"):
        planner("context").plan(b["states"][:, :5], b["cond"], k, noise=normal(6, 4, T, S))
    with pytest.raises(ValueError, match="next state"):
        p.decide(b["states"], b["states"], k)
    with pytest.raises(ValueError, match="replan=0"):
        PlannerPolicy(p, 0, b["cond"], replan=0)
    with pytest.raises(ValueError, match="states"):
        p.loss(b | dict(states=b["states"][:, :5]), k, p.draw(6, rng(0, "n")))
    with pytest.raises(ValueError, match="states has shape"):
        p.fit(b["states"][:, :5], b["actions"])
    with pytest.raises(ValueError, match="finite"):
        p.fit(b["states"] * torch.nan, b["actions"])


def test_task_linear_is_one_layer_per_task():
    torch.manual_seed(0)
    f, k = TaskLinear(K, 4, 2).double(), torch.tensor([2, 0, 2, 1])
    x = normal(4, 3, 4)
    for i in range(4):
        assert torch.allclose(f(x, k)[i], x[i] @ f.weight[k[i]] + f.bias[k[i]], atol=1e-12)
    assert torch.allclose(f(x[:, 0], k), f(x, k)[:, 0], atol=1e-12)


class Command:
    "Leaves a folder wherever it is unpickled without care"

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_planner_from_elsewhere_runs_nothing_and_is_named(tmp_path):
    torch.save(dict(kind=Command(tmp_path / "ran"), config={}, state={}), tmp_path / "p.pt")
    whole = save_planner(planner(), tmp_path / "whole.pt").read_bytes()
    for data in ((tmp_path / "p.pt").read_bytes(), b"", b"text", whole[:-200]):
        (tmp_path / "p.pt").write_bytes(data)
        with pytest.raises(ValueError, match="path='p.pt' is damaged, or holds more than tensors"):
            load_planner(tmp_path / "p.pt")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read_back_is_not_saved(tmp_path):
    p = planner()
    save_planner(p, tmp_path / "p.pt")
    before = (tmp_path / "p.pt").read_bytes()
    p.config["blocks"] = Command(tmp_path / "ran")
    with pytest.raises(ValueError, match="holds more than tensors"):
        save_planner(p, tmp_path / "p.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["p.pt"]
    assert (tmp_path / "p.pt").read_bytes() == before
