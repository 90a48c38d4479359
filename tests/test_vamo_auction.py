"""Auctions, response curves, markets and logs of the auto-bidding room: invariants, oracles and bad
input"""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.vamo.auction import (
    AuctionLogs,
    Market,
    MarketConfig,
    TaskSpec,
    Trajectories,
    auctionnet_columns,
    behaviour,
    behaviours,
    draw_budgets,
    final_value,
    hindsight,
    load_auctionnet,
    ratio_to_hindsight,
    replay,
    rollout,
    yesterday,
)
from llmpapers.vamo.slots import ResponseCurve, gsp_auction, run_auctions, run_auctions_loop, score

fast, few = settings(max_examples=30, deadline=None), settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**31)


def bids_of(seed, n, A, levels=None):
    "Random bids; few levels make ties, zeros are no bids"
    g = np.random.default_rng(seed)
    b = g.integers(0, levels, (n, A)) / 4 if levels else g.random((n, A)) * (g.random((n, A)) < 0.8)
    return torch.tensor(b, dtype=torch.double)


# ---- one auction ---------------------------------------------------------------------------------
def gsp_naive(bids, reserve, slots):
    "Sort each row by (-bid, index)"
    W, P = [], []
    for row in bids.tolist():
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        ranked = [row[j] for j in order] + [0.0] * (slots + 1)
        wins = [s < len(row) and ranked[s] >= reserve and ranked[s] > 0 for s in range(slots)]
        W.append([order[s] if wins[s] else -1 for s in range(slots)])
        P.append([max(ranked[s + 1], reserve) if wins[s] else 0.0 for s in range(slots)])
    return W, P


@fast
@given(
    seeds,
    st.integers(0, 12),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(1, 4),
)
def test_gsp_is_the_sorted_rule(seed, n, A, levels, reserve, slots):
    bids = bids_of(seed, n, A, levels)
    w, p = gsp_auction(bids, reserve, slots)
    W, P = gsp_naive(bids, reserve, slots)
    assert w.tolist() == W and p.tolist() == P and w.shape == (n, slots)
    own = bids.gather(1, w.clamp(min=0)) if n else bids.new_zeros(0, slots)
    sold = w >= 0
    assert (p[sold] <= own[sold]).all() and (p[sold] >= reserve).all() and (p[~sold] == 0).all()
    assert (p.diff(dim=1) <= 0).all()


@fast
@given(seeds, st.integers(1, 70), st.sampled_from([torch.double, torch.float]), st.integers(1, 4))
def test_gsp_orders_bids_that_differ_in_the_last_bit(seed, A, dtype, slots):
    "Next to equal bids: their order hangs on bits that the partition gives up to the column"
    g = np.random.default_rng(seed)
    one = torch.ones((), dtype=dtype)
    steps = [one * 1.0]
    for _ in range(7):
        steps.append(torch.nextafter(steps[-1], 2 * one))
    bids = torch.stack([*steps, 0 * one, -0.0 * one])[
        torch.from_numpy(g.integers(0, 10, (1100, A)))
    ]
    w, p = gsp_auction(bids, 0.0, slots)
    assert (w.tolist(), p.tolist()) == gsp_naive(bids, 0.0, slots)


@fast
@given(
    seeds,
    st.integers(0, 25),
    st.integers(1, 7),
    st.sampled_from([None, 3]),
    st.sampled_from([0.0, 0.2]),
    st.integers(1, 3),
    st.floats(0, 4),
)
def test_batch_is_the_loop_and_money_is_conserved(seed, n, A, levels, reserve, S, money):
    bids, g = bids_of(seed, n, A, levels), rng(seed, "x")
    values, draws = torch.rand(n, A, generator=g).double(), torch.rand(n, 2 * S, generator=g)
    budget = (money * torch.rand(A, generator=g)).double()
    e = (1.0, 0.8, 0.6)[:S]
    o = run_auctions(bids, values, budget, draws=draws, reserve=reserve, exposure=e)
    assert (o.cost <= budget * (1 + 1e-6)).all()
    assert abs(o.cost.sum() - o.price[o.shown].sum()) < 1e-9
    assert o.conversions.sum() == o.converted.sum() and (o.converted <= o.shown).all()
    assert (o.shown[:, 1:] <= o.shown[:, :-1]).all(), "a slot is seen only if the one above was"
    if n:
        loop = run_auctions_loop(bids, values, budget, draws, reserve, e)
        for f in ("winner", "price", "shown", "converted", "left", "conversions"):
            assert torch.equal(getattr(o, f), getattr(loop, f)), f
        assert torch.allclose(o.cost, loop.cost, atol=1e-10)


def test_budget_zero_pays_nothing_and_inputs_are_left_alone():
    bids, values = bids_of(1, 40, 5), torch.rand(40, 5).double()
    before = bids.clone()
    o = run_auctions(bids, values, torch.zeros(5), rng(0, "a"), reserve=0.05)
    assert o.cost.sum() == 0 and (o.winner == -1).sum() == 40 * 3 and torch.equal(bids, before)


def test_draws_differ_between_calls_of_one_generator():
    bids, values, inf = (
        bids_of(1, 400, 5),
        torch.full((400, 5), 0.5).double(),
        torch.full((5,), math.inf),
    )
    g = rng(0, "a")
    a, b = (run_auctions(bids, values, inf, g) for _ in range(2))
    assert not torch.equal(a.shown, b.shown) and torch.equal(a.winner, b.winner)
    again = run_auctions(bids, values, inf, rng(0, "a"))
    assert torch.equal(a.converted, again.converted)


def test_exposure_and_conversion_rates():
    n = 40_000
    o = run_auctions(
        torch.ones(n, 4).double(),
        torch.full((n, 4), 0.3).double(),
        torch.full((4,), math.inf),
        rng(0, "r"),
    )
    seen = o.shown.double().mean(0)
    assert torch.allclose(seen, torch.tensor([1.0, 0.8, 0.48]).double(), atol=0.01)
    assert abs(o.converted.sum() / o.shown.sum() - 0.3) < 0.01
    s = run_auctions(
        torch.ones(n, 4).double(),
        torch.full((n, 4), 0.3).double(),
        torch.full((4,), math.inf),
        rng(0, "r"),
        sigma=torch.full((n, 4), 0.1).double(),
    )
    assert (
        abs(s.converted.sum() / s.shown.sum() - 0.3) < 0.01
    )  # noise that is symmetric leaves the rate


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bids=torch.tensor([[math.nan, 1.0]])), "finite"),
        (dict(bids=torch.tensor([[-1.0, 1.0]])), "not negative"),
        (dict(bids=torch.ones(3)), "float matrix"),
        (dict(bids=torch.ones(1, 2, dtype=torch.long)), "float matrix"),
        (dict(reserve=-1.0), "reserve=-1"),
        (dict(reserve=math.nan), "reserve=nan"),
        (dict(slots=0), "slots=0"),
    ],
)
def test_gsp_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        gsp_auction(**(dict(bids=torch.ones(1, 2)) | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budget=torch.tensor([-1.0, 1.0])), "budget"),
        (dict(budget=torch.ones(3)), "budget"),
        (dict(values=torch.ones(1, 3)), "values"),
        (dict(generator=None), "generator or draws"),
    ],
)
def test_run_auctions_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        run_auctions(
            **(
                dict(
                    bids=torch.ones(1, 2),
                    values=torch.ones(1, 2),
                    budget=torch.ones(2),
                    generator=rng(0),
                )
                | change
            )
        )


# ---- response curves -----------------------------------------------------------------------------
def impressions(seed, n, S, grid=False):
    g = np.random.default_rng(seed)
    draw = (
        (lambda *s: 2.0 ** g.integers(-3, 3, s)) if grid else (lambda *s: g.random(s))
    )  # powers of two: ratios are exact
    v = draw(n) * (g.random(n) < 0.8)
    c = -np.sort(-draw(n, S) * (g.random((n, 1)) < 0.8), 1)
    return torch.tensor(v), torch.tensor(c.reshape(n, S))


@fast
@given(seeds, st.integers(0, 20), st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 0.25]))
def test_curve_is_brute_force_thresholds_included(seed, n, S, grid, reserve):
    v, c = impressions(seed, n, S, grid)
    e = (1.0, 0.8, 0.48)[:S]
    curve = ResponseCurve(v, c, e, reserve)
    grid_a = torch.tensor([0.0, 0.01, 0.5, 1.0, 2.0, 7.3]).double()
    a = torch.cat([grid_a, curve.thresholds]) if grid else grid_a
    cost, value, slots = curve.evaluate(a)
    for i, m in enumerate(a.tolist()):
        w, p = (
            gsp_auction(torch.cat([(m * v)[:, None], c], 1), reserve, S)
            if n
            else (torch.full((0, S), -1), torch.zeros(0, S).double())
        )
        mine = w == 0
        won = mine * torch.tensor(e, dtype=torch.double)
        assert (
            abs(cost[i] - (won * p).sum()) < 1e-9 and abs(value[i] - (won.sum(1) * v).sum()) < 1e-9
        )
        assert slots[i].tolist() == mine.sum(0).tolist()


@fast
@given(seeds, st.integers(0, 30))
def test_curve_is_monotone(seed, n):
    v, c = impressions(seed, n, 3)
    table = ResponseCurve(v, c, reserve=0.1).evaluate(torch.linspace(0, 5, 50).double())
    assert (table[0].diff() >= -1e-12).all() and (table[1].diff() >= -1e-12).all()


def test_curve_edges():
    a = torch.tensor([0.0, 1.0, 1e12])
    assert ResponseCurve(torch.zeros(0), torch.zeros(0, 3)).evaluate(a)[0].tolist() == [0, 0, 0]
    assert ResponseCurve(torch.zeros(4), torch.ones(4, 3)).evaluate(a)[1].tolist() == [0, 0, 0], (
        "worth nothing is never won"
    )
    assert ResponseCurve(torch.ones(4), torch.zeros(4, 3)).evaluate(a)[1].tolist() == [0, 4, 4], (
        "without rivals any bid wins, no bid does not"
    )
    tied = ResponseCurve(torch.ones(5), torch.ones(5, 3)).evaluate(torch.tensor([0.999, 1.0]))
    assert tied[0].tolist() == [0, 5] and tied[2].tolist() == [[0, 0, 0], [5, 0, 0]]


def test_prefix_sums_are_double():
    n = 300_000
    curve = ResponseCurve(torch.full((n,), 0.1), torch.full((n, 1), 0.1), (1.0,))
    assert curve.table.dtype == torch.double
    assert (
        abs(curve.evaluate(torch.tensor([2.0]))[0].item() / (n * float(np.float32(0.1))) - 1)
        < 1e-10
    )


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), (1.0, 0.8)), "descend"),
        ((torch.ones(3), torch.ones(2, 3)), "must be"),
        ((torch.tensor([math.nan]), torch.ones(1, 3)), "finite"),
        ((torch.ones(1), -torch.ones(1, 3)), "not negative"),
        ((torch.ones(1), torch.ones(1, 2), (0.5, 0.8)), "exposure"),
    ],
)
def test_curve_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        ResponseCurve(*args)


def test_curve_refuses_multipliers():
    curve = ResponseCurve(torch.ones(2), torch.ones(2, 3))
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="a must not"):
            curve.evaluate(torch.tensor([bad]))


# ---- score ---------------------------------------------------------------------------------------
@fast
@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1e-3, 1e6), st.floats(0, 5))
def test_score_bounds(v, cost, target, beta):
    s = score(v, cost, target, beta).item()
    assert math.isfinite(s) and 0 <= s <= v
    if v == 0:
        assert s == 0
    elif cost <= target * v:
        assert s == v
    else:
        assert s == pytest.approx(v * (target * v / cost) ** beta, rel=1e-9, abs=1e-12)


def test_score_edges():
    assert (
        score(4.0, 400.0, 100.0) == 4.0
        and score(0.0, 0.0, 1.0) == 0
        and score(3.0, 10.0, math.inf) == 3
    )
    for bad in (
        dict(beta=-1.0),
        dict(beta=math.nan),
        dict(cpa_target=0.0),
        dict(conversions=-1.0),
        dict(cost=math.nan),
    ):
        with pytest.raises(ValueError):
            score(**(dict(conversions=1.0, cost=1.0, cpa_target=1.0) | bad))


# ---- markets -------------------------------------------------------------------------------------
small = MarketConfig(days=5, volume=1500.0, steps=24)
market = Market(small, 3)


def test_same_seed_same_market_in_any_order():
    a, b = Market(small, 3), Market(small, 3)
    b.day(4)
    for d in (2, 4):
        for x, y in zip(a.day(d), b.day(d)):
            assert torch.equal(x, y)
    assert not torch.equal(Market(small, 4).day(2).values[:20], a.day(2).values[:20])


def test_steps_and_days_share_no_draws():
    still = Market(small.still(), 0)
    firsts = [
        tuple(r)
        for d in range(3)
        for r in still.day(d).rivals[:, 0].split(still.day(d).counts.tolist())
        for r in [r[:4].tolist()]
    ]
    assert len(set(firsts)) == len(firsts)


def test_shift_knobs_are_the_only_drift():
    """Mean first price of early and late days, over markets: equal without shift, growing with
    price drift"""

    def price(m, d):
        return m.day(d).rivals[:, 0].log().mean().item()

    def gap(c):
        return np.array([price(m, 4) - price(m, 0) for m in (Market(c, s) for s in range(12))])

    flat, up = gap(small.still()), gap(replace(small.still(), price_drift=0.1))
    assert abs(flat.mean()) < 4 * flat.std(ddof=1) / math.sqrt(12) + 1e-3
    assert abs(up.mean() - 0.4) < 0.03
    regime = gap(replace(small.still(), regime_day=4, regime_price=0.5))
    assert abs(regime.mean() - 0.5) < 0.03


def test_day_is_well_formed():
    d = market.day(1)
    assert d.counts.sum() == len(d.step) and (d.counts >= 8).all() and (d.step.diff() >= 0).all()
    assert (d.values > 0).all() and (d.values <= 1).all() and (d.rivals.diff(dim=1) <= 0).all()
    lonely = Market(replace(small, rivals=1), 0)
    assert lonely.day(0).rivals.shape[1] == 3 and (lonely.day(0).rivals[:, 1:] == 0).all()
    nobody = Market(replace(small, rivals=0), 0)
    assert nobody.step(1, 3, 0, torch.tensor([1000.0]), torch.tensor([1e9])).cost > 0  # the reserve


@fast
@given(seeds, st.integers(0, 3), st.floats(0, 5))
def test_step_never_overspends(seed, task, money):
    g = rng(seed, "s")
    a, left = (
        torch.exp(4 * torch.randn(16, generator=g)).double() * 100,
        money * torch.rand(16, generator=g).double() * 20,
    )
    r = market.step(1, int(seed % 24), task, a, left)
    assert (
        (r.cost <= left * (1 + 1e-6)).all()
        and (r.cost >= 0).all()
        and torch.isfinite(r.value).all()
        and (r.slots >= 0).all()
    )


@few
@given(seeds, st.integers(0, 3), st.sampled_from(behaviours))
def test_rollout_is_exact_in_money(seed, task, kind):
    B = draw_budgets(market, 2, task, 6, rng(seed, "b"))
    t = rollout(market, 2, task, B, behaviour(kind, 6, rng(seed, "p"), steps=24))
    assert (
        t.states.shape == (6, 24, 8)
        and t.actions.shape == (6, 24) == t.rewards.shape == t.cost.shape
    )
    assert (
        (t.cost.sum(1) <= B * (1 + 1e-6)).all()
        and torch.isfinite(t.states).all()
        and (t.rewards >= 0).all()
    )
    assert torch.allclose(t.states[:, 1:, 6], t.actions[:, :-1]) and (t.states[:, 0, 1] == 1).all()
    assert torch.allclose(
        t.states[:, 1:, 1].double(), 1 - t.cost.cumsum(1)[:, :-1] / B[:, None], atol=1e-6
    )


@few
@given(seeds, st.integers(0, 3))
def test_hindsight_is_the_best_constant(seed, task):
    B = draw_budgets(market, 2, task, 3, rng(seed, "h"), low=0.01, high=2.0)
    a, R = hindsight(market, 2, task, B)
    ref = yesterday(market, 2, task, B)

    def still(s, x):
        return torch.zeros(len(s))

    t = rollout(market, 2, task, B, still, ref._replace(a=a))
    assert torch.allclose(t.rewards.sum(1), R, rtol=1e-9) and final_value(market, t)[1].all()
    for f in torch.exp(torch.linspace(-1, 1, 15)).double():
        other = rollout(market, 2, task, B, still, ref._replace(a=a * f))
        kept = final_value(market, other)[1] & (other.cost.sum(1) < B * (1 - 1e-9))
        assert (other.rewards.sum(1)[kept] <= R[kept] * (1 + 1e-9)).all()
        assert (
            ratio_to_hindsight(market, other)[other.cost.sum(1) < B * (1 - 1e-9)] <= 1 + 1e-9
        ).all()


def test_hindsight_edges():
    zero = hindsight(market, 1, 0, torch.tensor([0.0, 1e-9]))
    assert zero[0].tolist() == [0, 0] and zero[1].tolist() == [0, 0]
    a, _ = hindsight(market, 1, 1, torch.tensor([500.0, 500.0]), cpa=60.0)
    b, _ = hindsight(market, 1, 1, torch.tensor([500.0, 500.0]), cpa=1e9)
    assert (a <= b).all()


def test_reference_is_of_yesterday():
    B = torch.tensor([100.0, 400.0])
    later = Market(small, 3)
    ref = yesterday(later, 2, 0, B)
    assert 2 not in later._days, "the reference must not look at today"
    assert torch.equal(ref.a, hindsight(market, 1, 0, B)[0])


def test_replay_agrees_with_the_fast_path():
    B = draw_budgets(market, 2, 0, 2, rng(0, "r"), 0.1, 0.1)
    t = rollout(market, 2, 0, B, lambda s, a: torch.full((len(s),), -0.4))
    exact = torch.stack(
        [
            replay(
                market, 2, 0, t.a_ref[0] * t.actions[0].double().exp(), B[0].item(), rng(0, "k", k)
            ).sum(0)
            for k in range(25)
        ]
    )
    assert (exact[:, 0] <= B[0] * (1 + 1e-6)).all()
    for k, x in enumerate((t.cost[0].sum(), t.rewards[0].sum())):
        assert abs(exact[:, k].mean() / x - 1) < 0.025


def test_trajectories_slice_and_join():
    B = torch.tensor([100.0, 200.0, 300.0])
    t = rollout(market, 1, 2, B, lambda s, a: torch.zeros(len(s)))
    assert len(t[:2]) == 2 and len(Trajectories.cat([t, t[:1]])) == 4
    with pytest.raises(ValueError, match="mixes days"):
        ratio_to_hindsight(market, Trajectories.cat([t, replace(t, day=t.day + 1)]))
    with pytest.raises(ValueError, match="mixes tasks"):
        final_value(market, Trajectories.cat([t, replace(t, task=t.task - 1)]))


@pytest.mark.parametrize(
    "policy",
    [
        lambda s, a: torch.zeros(1),
        lambda s, a: torch.full((len(s),), math.nan),
        lambda s, a: torch.full((len(s),), 50.0),
    ],
)
def test_bad_policies(policy):
    with pytest.raises(ValueError, match="policy must return"):
        rollout(market, 1, 0, torch.tensor([10.0, 20.0]), policy)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Market(replace(small, steps=2)), "steps"),
        (lambda: Market(replace(small, quality=(2.0, 0.1, 0.1))), "quality"),
        (lambda: Market(replace(small, worths=(1.0,))), "one number per"),
        (lambda: Market(replace(small, tasks=())), "task"),
        (lambda: market.day(5), "days 0 to 4"),
        (lambda: market.curves(1, 9), "task=9"),
        (lambda: market.step(1, 24, 0, torch.ones(1), torch.ones(1)), "t=24"),
        (lambda: market.step(1, 0, 0, torch.ones(1), -torch.ones(1)), "remaining"),
        (lambda: market.step(1, 0, 0, torch.ones(1), torch.ones(2)), r"\(B,\)"),
        (lambda: yesterday(market, 0, 0, torch.ones(1)), "no yesterday"),
        (lambda: rollout(market, 1, 0, torch.zeros(1), None), "positive"),
        (lambda: hindsight(market, 1, 0, torch.tensor([math.nan])), "budget"),
        (lambda: behaviour("clever", 1, rng(0)), "clever"),
        (lambda: TaskSpec("x", 0, "cpm"), "cpm"),
        (lambda: TaskSpec("x", 0, "roi"), "roi=None"),
        (lambda: TaskSpec("x", 0, "bcb", cpa=1.0), "no meaning"),
    ],
)
def test_market_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- logs ----------------------------------------------------------------------------------------
def log_frame(periods=(7, 8), advertisers=(3, 5), steps=4, n=6, seed=0):
    g, rows = np.random.default_rng(seed), []
    for p in periods:
        for a in advertisers:
            for t in range(steps):
                v, price = g.random(n) * 0.1, g.random(n)
                won = (bid := 8 * v) >= price
                rows.append(
                    pd.DataFrame(
                        dict(
                            deliveryPeriodIndex=p,
                            advertiserNumber=a,
                            advertiserCategoryIndex=a % 2,
                            budget=50.0 + a,
                            CPAConstraint=10.0 + a,
                            timeStepIndex=t,
                            remainingBudget=50.0,
                            pvIndex=np.arange(n),
                            pValue=v,
                            pValueSigma=0.1 * v,
                            bid=bid,
                            xi=won * 1,
                            adSlot=won * 1,
                            cost=price * won,
                            isExposed=won * 1,
                            conversionAction=0,
                            leastWinningCost=price,
                            isEnd=0,
                        )
                    )
                )
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(
    "kind, chunk", [("csv", 7), ("csv", 10**6), ("parquet", 7), ("parquet", 10**6)]
)
def test_logs_any_format_any_chunk(tmp_path, kind, chunk):
    df = log_frame()
    shuffled = df.sample(frac=1.0, random_state=1)
    shuffled.to_csv(
        tmp_path / "period-7.csv", index=False
    ) if kind == "csv" else shuffled.to_parquet(tmp_path / "period-7.parquet")
    logs = load_auctionnet(tmp_path, chunk)
    assert (
        isinstance(logs, AuctionLogs)
        and logs.periods == [7, 8]
        and logs.T == 4
        and len(logs.values) == len(df)
        and logs.values.dtype == np.float32
    )
    assert (
        [t.cpa for t in logs.tasks] == [13.0, 15.0]
        and logs.budget.tolist() == [[53.0, 55.0]] * 2
        and logs.category.tolist() == [1, 1]
    )
    mine = df.query("deliveryPeriodIndex == 8 and advertiserNumber == 5 and timeStepIndex == 2")
    curve = logs.curves(1, 1)[2]
    cost, value, slots = curve.evaluate(torch.tensor([8.0]))
    assert cost.item() == pytest.approx(mine.cost.sum(), rel=1e-5) and slots.item() == mine.xi.sum()
    assert logs.summary.impressions.sum() == len(df) and logs.summary.cost.sum() == pytest.approx(
        df.cost.sum(), rel=1e-5
    )
    t = rollout(logs, 1, 0, torch.tensor([0.5, 5.0]), lambda s, a: torch.zeros(len(s)))
    assert (t.cost.sum(1) <= t.budget * (1 + 1e-6)).all() and ratio_to_hindsight(
        logs, t
    ).isfinite().all()
    assert logs.splits(1, 1, 1) == [] if len(logs.periods) > 2 else True


def test_logs_holes_periods_and_splits(tmp_path):
    df = log_frame(periods=range(7, 13))
    df = df[
        ~((df.advertiserNumber == 5) & (df.deliveryPeriodIndex == 9))
    ]  # an advertiser absent for a period
    df.to_csv(tmp_path / "a.csv", index=False)
    logs = load_auctionnet(tmp_path / "a.csv")
    assert (
        all(c.n == 0 for c in logs.curves(2, 1))
        and logs.budget[2, 1] == 0
        and logs.curves(2, 0)[0].n == 6
    )
    assert logs.splits(4, 1, 1) == [([0, 1, 2, 3], [4], [5])] and len(logs.splits(2, 1, 1)) == 3
    with pytest.raises(ValueError, match="need 10 periods"):
        logs.splits()
    assert load_auctionnet(tmp_path / "a.csv", periods=[8, 9]).periods == [8, 9]
    with pytest.raises(ValueError, match="no rows of the periods"):
        load_auctionnet(tmp_path / "a.csv", periods=[99])


def test_logs_refuse(tmp_path):
    with pytest.raises(ValueError, match="alimama-tech/AuctionNet"):
        load_auctionnet(tmp_path)
    with pytest.raises(ValueError, match="alimama-tech/AuctionNet"):
        load_auctionnet(tmp_path / "no.csv")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match="neither csv nor parquet"):
        load_auctionnet(tmp_path / "x.txt")
    log_frame().drop(columns="pValue").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="lacks the columns pValue"):
        load_auctionnet(tmp_path / "b.csv")
    bad = log_frame()
    bad.loc[3, "leastWinningCost"] = np.nan
    bad.to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match="leastWinningCost"):
        load_auctionnet(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="chunk=0"):
        load_auctionnet(tmp_path / "b.csv", chunk=0)
    assert len(auctionnet_columns) == 18


def write(df, path):
    df.to_csv(path, index=False) if path.suffix == ".csv" else df.to_parquet(path)
    return path


def test_derived_files_beside_the_logs(tmp_path):
    "As published: trajectories for training agents in a folder of their own, notes, hidden files"
    df = log_frame()
    write(df, tmp_path / "period-7.csv")
    derived = tmp_path / "training_data_rlData_folder"
    derived.mkdir()
    columns = "deliveryPeriodIndex,advertiserNumber,budget,CPAConstraint,state,action,reward\n"
    (derived / "period-7-rlData.csv").write_text(columns + '7,3,53,13,"(0.1, 0.2)",8.0,1\n')
    (tmp_path / "sizes.csv").write_text("name,rows\na,1\n")
    (tmp_path / "._period-7.csv").write_bytes(b"\x00\xff")
    with pytest.warns(
        UserWarning, match=r"2 file\(s\) are no logs.*sizes.csv, period-7-rlData.csv"
    ):
        logs = load_auctionnet(tmp_path)
    assert len(logs.values) == len(df)
    write(df.drop(columns="pValue"), tmp_path / "period-9.csv")
    with pytest.raises(ValueError, match="period-9.csv lacks the columns pValue"):
        load_auctionnet(tmp_path)
    with pytest.raises(ValueError, match="period-7-rlData.csv lacks the columns"):
        load_auctionnet(derived / "period-7-rlData.csv")


@pytest.mark.parametrize("second", ["copy.csv", "copy.parquet"])
def test_a_period_in_two_files_is_refused(tmp_path, second):
    df = log_frame()
    write(df, tmp_path / "period-7.csv")
    write(df[df.deliveryPeriodIndex == 8], tmp_path / second)
    with pytest.raises(ValueError, match=f"period 8 is in {second} and in period-7.csv"):
        load_auctionnet(tmp_path)
    assert load_auctionnet(tmp_path, periods=[7]).periods == [7]


def test_an_impression_twice_is_refused(tmp_path):
    df = log_frame()
    path = write(pd.concat([df, df.iloc[[30]]]), tmp_path / "a.csv")
    row = df.iloc[30]
    place = f"impression {row.pvIndex:.0f} of advertiser {row.advertiserNumber:.0f} is twice"
    with pytest.raises(ValueError, match=place):
        load_auctionnet(path)


def test_limits_belong_to_their_period(tmp_path):
    "Budget and largest cost per conversion change from day to day, and every rule takes today's"
    df = log_frame(periods=(7, 8))
    later = df.deliveryPeriodIndex == 8
    df.loc[later, "CPAConstraint"] = 0.5
    df.loc[later, "budget"] = 7.0
    logs = load_auctionnet(write(df, tmp_path / "a.csv"))
    assert logs.cpa.tolist() == [[13.0, 15.0], [0.5, 0.5]]
    assert logs.budget.tolist() == [[53.0, 55.0], [7.0, 7.0]]
    only = load_auctionnet(tmp_path / "a.csv", periods=[8])
    money = torch.tensor([1.0, 5.0])
    assert torch.equal(hindsight(logs, 1, 0, money)[1], hindsight(only, 0, 0, money)[1])
    assert (hindsight(logs, 1, 0, money)[1] < hindsight(logs, 1, 0, money, cpa=13.0)[1]).any()
    t = rollout(logs, 1, 0, torch.tensor([5.0]), lambda s, a: torch.zeros(len(s)))
    value, kept = final_value(logs, t)
    cost, won = t.cost.sum(1).double(), t.rewards.sum(1).double()
    assert not kept and cost > 0.5 * won
    assert torch.allclose(value, won * (0.5 * won / cost) ** 2, rtol=1e-5)
    both = Trajectories.cat([t, replace(t, day=torch.tensor([0]))])
    assert final_value(logs, both)[1].tolist() == [False, True]
    df.loc[0, "CPAConstraint"] = 1.0
    with pytest.raises(ValueError, match="advertiser 3 has two .*in period 7"):
        load_auctionnet(write(df, tmp_path / "a.csv"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_logged_actions(tmp_path, kind):
    "Multipliers are bids over values; money left is that of the first impression of a step"
    df = log_frame()
    step = df.timeStepIndex
    df["bid"] = (5.0 + step + df.advertiserNumber) * df.pValue
    df["remainingBudget"] = 50.0 - 10 * step - 0.5 * df.pvIndex
    df = df[~((df.advertiserNumber == 5) & (step == 2))]
    path = write(df.sample(frac=1.0, random_state=2), tmp_path / f"a.{kind}")
    plain, logs = load_auctionnet(path), load_auctionnet(path, chunk=11, actions=True)
    assert plain.bids is None and np.array_equal(plain.values, logs.values)
    for task, advertiser in enumerate((3, 5)):
        action, left = logs.logged(1, task)
        want = 5.0 + torch.arange(4.0).double() + advertiser
        seen = torch.tensor([True, True, advertiser == 3, True])
        assert torch.allclose(action[seen], want[seen], rtol=1e-5) and action[~seen].isnan().all()
        assert left[seen].tolist() == (50.0 - 10 * torch.arange(4.0))[seen].tolist()
        day = logs.replayed(1, task)
        mine = df[(df.deliveryPeriodIndex == 8) & (df.advertiserNumber == advertiser)]
        won = mine[mine.bid >= mine.leastWinningCost]
        assert float(day.cost.sum()) == pytest.approx(won.leastWinningCost.sum(), rel=1e-3)
        assert float(day.rewards.sum()) == pytest.approx(won.pValue.sum(), rel=1e-3)
        assert day.states.shape == (1, 4, 8) and day.actions.isfinite().all()
    with pytest.raises(ValueError, match="read without bids"):
        plain.logged(0, 0)
    with pytest.raises(ValueError, match="day=2, task=0"):
        logs.logged(2, 0)


@pytest.mark.parametrize(
    "column, value, what",
    [
        ("leastWinningCost", "", "finite, and not negative"),
        ("leastWinningCost", "cheap", "finite, and not negative"),
        ("leastWinningCost", -0.5, "finite, and not negative"),
        ("pValue", "inf", "finite, and not negative"),
        ("pValue", 1e300, "finite, and not negative"),
        ("budget", "NaN", "finite, and not negative"),
        ("CPAConstraint", 0.0, "finite, and positive"),
        ("timeStepIndex", 1.5, "whole, from 0 to 32767"),
        ("timeStepIndex", -1, "whole, from 0 to 32767"),
        ("advertiserNumber", 70_000, "whole, from 0 to 32767"),
        ("deliveryPeriodIndex", "seven", "whole, from 0 to 32767"),
        ("isExposed", "yes", "whole, from 0 to 32767"),
        ("pvIndex", 2**40, "whole, from 0 to 2147483647"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_values_that_cannot_be_are_refused_with_their_place(tmp_path, column, value, what, kind):
    df = log_frame()
    if kind == "parquet":
        if isinstance(value, str) and value not in ("", "NaN", "inf"):
            df[column] = df[column].astype(str)
        else:
            value = float(value or "nan")
            df[column] = df[column].astype(float)
    else:
        df[column] = df[column].astype(object)
    df.loc[20, column] = value
    path = write(df, tmp_path / f"a.{kind}")
    place = "line 22" if kind == "csv" else "row 20"
    for chunk in (7, 10**6):
        with pytest.raises(ValueError, match=f"a.{kind}, {place}, column {column}: .*{what}"):
            load_auctionnet(path, chunk)


def test_files_that_cannot_be_read_are_named(tmp_path):
    text = log_frame().to_csv(index=False).splitlines()
    path = tmp_path / "a.csv"
    for lines, message in (
        ([], "a.csv cannot be read"),
        ([*text[:9], text[9] + ",1,2", *text[10:]], "a.csv cannot be read: .*line 10"),
        ([text[0], *(x + ",1" for x in text[1:])], "more fields than its header"),
        ([*text[:9], text[9][:30]], "a.csv, line 10, column"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            load_auctionnet(path)
    path.write_text("\ufeff" + "\r\n".join(text))
    assert len(load_auctionnet(path).values) == len(text) - 1
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="a.parquet cannot be read"):
        load_auctionnet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no rows of the periods \[9, 10\]"):
        load_auctionnet(path, periods=np.array([7, 9, 10]))


@few
@given(seeds, st.integers(0, 3), st.integers(1, 20), st.sampled_from(behaviours))
def test_states_do_not_see_later_prices(seed, task, t, kind):
    """Rivals of step `t` and after are made dearer: every state and action up to `t` stays, what
    follows does not"""
    runs = []
    for factor in (1.0, 3.0):
        m = Market(small, 3)
        d = m.day(2)
        m._days[2] = d._replace(
            rivals=torch.where((d.step >= t)[:, None], factor * d.rivals, d.rivals)
        )
        B = draw_budgets(Market(small, 3), 2, task, 6, rng(seed, "b"))
        runs.append(rollout(m, 2, task, B, behaviour(kind, 6, rng(seed, "p"), steps=24)))
    a, b = runs
    assert torch.equal(a.states[:, : t + 1], b.states[:, : t + 1]) and torch.equal(
        a.actions[:, : t + 1], b.actions[:, : t + 1]
    )
    assert not torch.equal(a.states[:, t + 1 :], b.states[:, t + 1 :])
