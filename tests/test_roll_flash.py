"""Invariants of the asynchronous step: schedules, bounds, and the simulator that drives the real
sample buffer"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.rl.buffer import SampleBuffer
from llmpapers.roll_flash.environments import simulate_env_rollout, simulate_redundancy
from llmpapers.roll_flash.rollout import (
    simulate_batch_filtering,
    simulate_filtering,
    simulate_replication,
)
from llmpapers.roll_flash.sim import lognormal_lengths, propositions_study
from llmpapers.roll_flash.simulator import simulate
from llmpapers.roll_flash.theory import (
    async_step_bound,
    best_split,
    graham_bound,
    list_schedule,
    max_speedup,
    optimal_beta,
    queue_bound,
    simulate_async,
    static_schedule,
    sync_step_bound,
)

ALPHAS = [0, 0.5, 1, 1.5, 2, 3.25]
POLICIES = ["wait", "abort", "drop"]
fast = settings(max_examples=60, deadline=None)
times = st.lists(
    st.floats(0, 50, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=1, max_size=40
)
workers = st.integers(1, 12)
positive = st.floats(0.01, 100)
cluster = st.fixed_dictionaries(
    dict(
        n=st.integers(1, 4096),
        k=st.integers(2, 256),
        mu_gen=positive,
        l_gen=st.floats(0, 1000),
        mu_train=positive,
        epochs=st.integers(1, 4),
    )
)


def draw(seed, n, sigma=1.0):
    return np.random.default_rng(seed).lognormal(0, sigma, n).clip(max=30)


# ---- schedules -----------------------------------------------------------------------------------
@fast
@given(times, workers)
def test_greedy_keeps_grahams_bound(d, k):
    s = list_schedule(d, k)
    assert max(max(d), sum(d) / k) * (1 - 1e-12) <= s.makespan <= graham_bound(d, k) + 1e-9
    assert graham_bound(d, k) <= queue_bound(len(d), k, sum(d) / len(d), max(d)) + 1e-9


@fast
@given(times)
def test_one_worker_and_many_workers(d):
    for f in (list_schedule, static_schedule):
        assert math.isclose(f(d, 1).makespan, sum(d), abs_tol=1e-9)
        assert f(d, len(d)).makespan == f(d, len(d) + 3).makespan == max(d)


@pytest.mark.parametrize("k", [2, 3, 7, 20])
def test_tight_instance(k):
    d = [1] * (k * (k - 1)) + [k]
    assert (
        list_schedule(d, k).makespan
        == pytest.approx(2 * k - 1)
        == pytest.approx(graham_bound(d, k))
    )


@fast
@given(times, workers)
def test_schedules_are_schedules(d, k):
    "Nobody does two things at a time, each response runs once and for its duration"
    for f in (list_schedule, static_schedule):
        s = f(d, k)
        assert np.allclose(s.end - s.start, d) and set(s.worker) <= set(range(k))
        for w in set(s.worker):
            mine = np.flatnonzero(s.worker == w)
            order = mine[np.lexsort((mine, s.start[mine]))]
            assert (s.start[order][1:] >= s.end[order][:-1] - 1e-9).all()


@fast
@given(times, workers)
def test_greedy_is_work_conserving(d, k):
    "At the start of each response, every other worker is busy or has been free for no longer"
    s = list_schedule(d, k)
    for i in range(len(d)):
        busy = [
            max((s.end[j] for j in range(i) if s.worker[j] == w), default=0.0) for w in range(k)
        ]
        assert s.start[i] == min(busy)


# ---- bounds --------------------------------------------------------------------------------------
@fast
@given(cluster)
def test_bounds_at_the_ends(c):
    assert math.isclose(async_step_bound(**c, async_ratio=0), sync_step_bound(**c), rel_tol=1e-12)
    far = async_step_bound(**c, async_ratio=1e300)
    assert math.isclose(far * max_speedup(**c), sync_step_bound(**c), rel_tol=1e-9)


@fast
@given(cluster, st.lists(st.floats(0, 50), min_size=2, max_size=6), st.floats(0.01, 0.99))
def test_more_ahead_is_never_a_larger_bound(c, alphas, beta):
    for b in (None, beta):
        bounds = [async_step_bound(**c, async_ratio=a, beta=b) for a in sorted(alphas)]
        assert all(y <= x * (1 + 1e-12) for x, y in zip(bounds, bounds[1:]))


@fast
@given(cluster, st.floats(0, 50))
def test_exact_split_balances(c, alpha):
    b, loose = (
        optimal_beta(**c, async_ratio=alpha, exact=True),
        optimal_beta(**c, async_ratio=alpha),
    )
    assert 0 < loose <= b * (1 + 1e-12) and b < 1
    gen = c["n"] * c["mu_gen"] / ((1 - b) * c["k"]) + c["l_gen"] / (1 + alpha)
    train = c["epochs"] * c["n"] * c["mu_train"] / (b * c["k"])
    assert abs(gen - train) <= 1e-9 * train
    exact = async_step_bound(**c, async_ratio=alpha, beta=b)
    assert exact <= async_step_bound(**c, async_ratio=alpha, beta=loose) * (1 + 1e-12)
    assert exact <= async_step_bound(**c, async_ratio=alpha) * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(cluster, st.floats(0, 10))
def test_whole_split_is_the_best_whole_split(c, alpha):
    def bound(m):
        return async_step_bound(**c, async_ratio=alpha, beta=m / c["k"])

    assert bound(best_split(**c, async_ratio=alpha)) <= min(bound(m) for m in range(1, c["k"])) * (
        1 + 1e-12
    )


# ---- simulator -----------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    workers,
    st.integers(1, 9),
    st.floats(0, 5),
    st.floats(0, 2),
    st.integers(1, 3),
)
def test_synchronous_time_in_closed_form(seed, k, B, train, swap, G):
    S = 6
    d = draw(seed, S * B * G)
    res = simulate(d, k, B, 0, train, S, sync_time=swap, group_size=G)
    steps = [list_schedule(x, k).makespan + train + swap for x in d.reshape(S, -1)]
    assert np.allclose(res.step_times, steps) and math.isclose(
        res.total_time, sum(steps), rel_tol=1e-9
    )
    assert set(res.staleness) == {0} and res.trained == list(range(S * B * G))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    workers,
    st.integers(1, 9),
    st.sampled_from(ALPHAS),
    st.floats(0, 5),
    st.integers(1, 3),
)
def test_waiting_trains_each_once_and_in_time(seed, k, B, alpha, train, G):
    S = 10
    res = simulate(draw(seed, S * B * G), k, B, alpha, train, S, group_size=G)
    assert sorted(res.trained) == sorted(res.dispatched) == list(range(S * B * G))
    assert 0 <= min(res.staleness) and max(res.staleness) <= math.ceil(alpha)
    assert res.wasted == res.aborted == 0 and 0 <= res.utilisation <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    workers,
    st.integers(1, 9),
    st.sampled_from(ALPHAS),
    st.sampled_from(POLICIES),
    st.floats(0, 1),
)
def test_no_policy_trains_too_old_or_twice(seed, k, B, alpha, how, swap):
    S = 12
    endless = (
        float(x)
        for x in itertools.chain.from_iterable(draw((seed, i), 64) for i in itertools.count())
    )
    res = simulate(endless, k, B, alpha, 1.0, S, on_stale=how, sync_time=swap)
    assert (
        max(res.staleness) <= math.ceil(alpha)
        and len(res.trained) == len(set(res.trained)) == S * B
    )
    assert 0 <= res.utilisation <= 1 and 0 <= res.wasted <= k * res.total_time
    assert (
        math.isclose(sum(res.step_times), res.total_time, rel_tol=1e-9)
        and min(res.step_times) >= 1 + swap - 1e-9
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    workers,
    st.integers(1, 7),
    st.sampled_from(ALPHAS),
    st.sampled_from(POLICIES),
    st.integers(1, 3),
)
def test_asking_less_often_changes_nothing(seed, k, B, alpha, how, G):
    args = dict(
        durations=draw(seed, 4000),
        n_workers=k,
        batch_size=B,
        async_ratio=alpha,
        train_time=2.0,
        n_steps=10,
        on_stale=how,
        group_size=G,
        record=True,
    )
    assert simulate(**args) == simulate(**args, ask_always=True) == simulate(**args)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    workers,
    st.integers(1, 7),
    st.sampled_from(ALPHAS),
    st.sampled_from(POLICIES),
)
def test_slots_run_one_thing_and_are_never_idle_while_something_is_pending(seed, k, B, alpha, how):
    res = simulate(draw(seed, 4000), k, B, alpha, 2.0, 10, on_stale=how, record=True)
    for w in range(k):
        mine = [x for x in res.runs if x[1] == w]
        assert all(b[2] >= a[3] - 1e-9 for a, b in zip(mine, mine[1:]))
    starts = sorted(x[2] for x in res.runs)
    published = np.cumsum(res.step_times)
    for t in (
        starts
    ):  # work begins only when a slot was freed at that moment, or when a version admitted it
        freed = any(math.isclose(x[3], t, abs_tol=1e-9) for x in res.runs)
        assert t == 0 or freed or any(math.isclose(p, t, abs_tol=1e-9) for p in published)
    assert sum(x[3] - x[2] for x in res.runs) <= k * res.total_time + 1e-6


def test_total_time_falls_with_the_ratio_on_average():
    total = {
        al: np.mean([simulate(draw(s, 16 * 30), 16, 16, al, 1.0, 30).total_time for s in range(12)])
        for al in (0, 1, 2, 4, 8)
    }
    assert list(total.values()) == sorted(total.values(), reverse=True)


@pytest.mark.parametrize("alpha", [1, 1.5, 2, 4])
def test_constant_durations_gain_no_more_than_two(alpha):
    """With training as long as generation the two hide behind each other, and the slots are always
    busy"""
    N, K, d = 32, 8, 1.0
    sync, ahead = (simulate([d] * N * 130, K, N, a, N * d / K, 120) for a in (0, alpha))
    assert 1.9 < sync.total_time / ahead.total_time <= 2 + 1e-9
    assert sync.utilisation == pytest.approx(0.5) and ahead.utilisation > 0.98


def starving(how, alpha=1, steps=60):
    "One response that takes longer than alpha + 1 steps among short ones"
    return simulate([200.0] + [1.0] * 4000, 8, 8, alpha, 1.0, steps, on_stale=how)


def test_starvation():
    """Waiting trains the long one, once; aborting puts it back each time and never trains it;
    dropping loses it"""
    wait, abort, drop = map(starving, POLICIES)
    assert wait.trained.count(0) == 1 and wait.dispatched.count(0) == 1
    assert (
        0 not in abort.trained
        and abort.dispatched.count(0) > 10
        and abort.aborted >= abort.dispatched.count(0) - 1
    )
    assert 0 not in drop.trained and drop.dispatched.count(0) == 1 and drop.aborted == 1


def test_an_aborted_prompt_is_kept_and_trained_when_nothing_younger_is_left():
    "The buffer loses no prompt: at the end of the data the long one has its turn"
    res = simulate([40.0] + [1.0] * 39, 4, 4, 1, 0.5, 10, on_stale="abort")
    assert (
        sorted(res.trained) == list(range(40))
        and res.dispatched.count(0) > 1
        and max(res.staleness) <= 1
    )
    with pytest.raises(ValueError, match="durations"):
        simulate([40.0] + [1.0] * 39, 4, 4, 1, 0.5, 10, on_stale="drop")


def test_length_bias():
    "Steady state: waiting trains the stream as it is, dropping trains the short ones"
    means = {how: [] for how in POLICIES}
    for s in range(8):
        d = draw(s, 32 * 400).clip(max=20)
        for how in POLICIES:
            res = simulate(d, 32, 32, 2, 1.5, 60, on_stale=how)
            means[how].append(np.mean(d[res.trained[9 * 32 :]]) / d.mean() - 1)
    assert (
        abs(np.mean(means["wait"])) < 0.03
        and np.mean(means["drop"]) < -0.1
        and np.mean(means["abort"]) < np.mean(means["wait"])
    )


def test_the_swap_stops_the_slots():
    plain, swap = (
        simulate([3.0] * 40, 2, 4, 1, 1.0, 5, sync_time=x, record=True) for x in (0.0, 10.0)
    )
    assert swap.total_time >= plain.total_time + 50 - 1e-9 and swap.utilisation == pytest.approx(
        plain.utilisation, abs=0.2
    )
    assert [x[0] for x in swap.runs if x[4]][:8] == [x[0] for x in plain.runs if x[4]][:8]


def test_it_is_the_production_buffer(monkeypatch):
    "A buffer that lets a batch through too early is seen by the simulator's own count"
    monkeypatch.setattr(SampleBuffer, "_in_time", lambda self, left: True)
    with pytest.raises(AssertionError, match="versions old"):
        simulate([20.0] * 4 + [1.0] * 400, 8, 4, 1, 0.1, 40, ask_always=True)


GOOD = dict(
    durations=[1.0] * 8, n_workers=2, batch_size=2, async_ratio=1, train_time=1.0, n_steps=3
)
BAD = [
    ("durations", [-1.0] * 8),
    ("durations", [float("nan")] * 8),
    ("durations", [math.inf] * 8),
    ("durations", []),
    ("durations", [1.0] * 5),
    ("n_workers", 0),
    ("n_workers", 1.5),
    ("batch_size", 0),
    ("async_ratio", -1),
    ("async_ratio", float("nan")),
    ("train_time", -1.0),
    ("n_steps", 0),
    ("sync_time", -1.0),
    ("group_size", 0),
    ("on_stale", "discard"),
]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_input_of_the_simulator(name, value):
    with pytest.raises(ValueError, match=name):
        simulate(**GOOD | {name: value})


C = dict(n=8, k=4, mu_gen=1.0, l_gen=5.0, mu_train=1.0)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: list_schedule([1, -1], 2), "durations"),
        (lambda: list_schedule([1, float("nan")], 2), "durations"),
        (lambda: static_schedule([], 2), "durations"),
        (lambda: list_schedule([1], 0), "n_workers"),
        (lambda: graham_bound([1], 0), "k="),
        (lambda: queue_bound(0, 1, 1, 1), "q="),
        (lambda: async_step_bound(**C, async_ratio=-0.5), "async_ratio"),
        (lambda: async_step_bound(**C, beta=0), "beta"),
        (lambda: async_step_bound(**C, beta=1), "beta"),
        (lambda: sync_step_bound(**C | dict(mu_gen=-1)), "mu_gen"),
        (lambda: optimal_beta(**C | dict(mu_train=0)), "mu_train"),
        (lambda: best_split(**C | dict(k=1)), "k=1"),
        (lambda: simulate_replication(np.ones(3), 1, 1, True), "lengths"),
        (lambda: simulate_filtering([1.0], [True], 2, 1), "need"),
        (lambda: simulate_filtering([1.0], [True], 1, 0), "in_flight"),
        (lambda: simulate_env_rollout(np.ones((2, 2)), 1.0, "both"), "mode"),
        (lambda: simulate_redundancy(np.ones((2, 2)), 3, 1), "need_groups"),
        (lambda: lognormal_lengths(1, 10, -1), "sigma"),
    ],
)
def test_bad_input_of_the_rest(call, name):
    with pytest.raises(ValueError, match=name):
        call()


# ---- components ----------------------------------------------------------------------------------
@fast
@given(
    st.integers(0, 10**6),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 16),
)
def test_replication(seed, P, n, K, slots):
    t = draw(seed, P * n).reshape(P, n)
    single, group = (simulate_replication(t, K, slots, r) for r in (True, False))
    assert (
        max(t.sum() / (K * slots), t.max()) <= single * (1 + 1e-12)
        and single <= graham_bound(t.ravel(), K * slots) + 1e-9
    )
    assert group >= t.max()
    if n == 1:
        assert math.isclose(single, group)


@fast
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 30))
def test_filtering(seed, need, in_flight):
    r = np.random.default_rng(seed)
    d, ok = draw(seed, 200), r.random(200) < 0.5
    queue = simulate_filtering(d, ok, need, in_flight)
    assert (
        np.partition(d[ok], need - 1)[need - 1] <= queue + 1e-12
        and (list_schedule(d, in_flight).end[ok] <= queue).sum() >= need
    )
    assert simulate_batch_filtering(d, [True] * 200, need) == d[:need].max()


@fast
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.floats(0, 5))
def test_no_barrier_is_never_slower(seed, E, T, g):
    x = draw(seed, E * T).reshape(E, T)
    turn, env = (simulate_env_rollout(x, g, m) for m in ("turn", "env"))
    assert env <= turn + 1e-9
    if E == 1 or T == 1:
        assert math.isclose(env, turn)


@fast
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_spares_never_hurt(seed, G, S, more_g, more_s):
    t = draw(seed, (G + more_g) * (S + more_s)).reshape(G + more_g, S + more_s)
    assert simulate_redundancy(t[:G, :S], G, S) == t[:G, :S].max()
    assert simulate_redundancy(t, G, S) <= t[:G, :S].max()


@pytest.mark.slow
def test_proposition_two_on_random_clusters():
    """With at least one batch ahead the steady step stays within a few per cent of the bound; with
    half a batch it need not"""
    rows = propositions_study(24, (2.0, 4.0), steps=8, seed=1)
    assert max(r["ratio"] for r in rows) <= 1.05 and all(
        r["staleness"] <= r["async_ratio"] for r in rows
    )
    assert simulate_async is simulate
