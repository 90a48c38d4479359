"""Invariants of the auction study: nothing from validation, selection or test days leaks, arms meet
on the same batches, limits of the weights"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.core.stats import holm
from llmpapers.vamo.auction import MarketConfig, Trajectories
from llmpapers.vamo.experiments import (
    StudyConfig,
    _sets,
    arms,
    collect,
    compare,
    mix,
    paired_ci,
    run_study,
    train_policies,
)

pytestmark = pytest.mark.xdist_group("vamo_experiments")  # they share logs that take seconds
seeds = st.integers(0, 10**6)
some = settings(max_examples=40, deadline=None)
config = StudyConfig(
    markets=2,
    steps=6,
    width=6,
    batch=8,
    n_aux=2,
    n_test=3,
    lambdas=(0.1, math.inf),
    market=MarketConfig(days=13, phase_drift=1.0, volume=600.0),
)
names = (
    "uniform",
    "target only",
    "validation only",
    "pooled",
    "uniform, validation pooled",
    "cosine gate",
    "aligned",
    "aligned, random split",
)


@pytest.fixture(scope="module")
def logs():
    return [collect(config, i) for i in range(2)]


def other(t: Trajectories):
    return replace(
        t,
        states=t.states * 1.7 + 0.3,
        actions=t.actions + 0.5,
        rewards=t.rewards * 30,
        budget=t.budget * 30,
    )


# ---- logs and leaks ------------------------------------------------------------------------------
@pytest.mark.slow
def test_days_are_in_time_order_and_no_bidder_is_in_two_sets(logs):
    for log in logs:
        train, val, spread = log.days[:-2], log.days[-2], log.days[-1]
        assert (
            max(int(t.day.max()) for t in train)
            < config.val_day
            == int(val.day.min())
            == int(log.select.day.max())
            < int(log.test.day.min())
        )
        assert int(spread.day.max()) < config.val_day and len(train) == 1 + len(config.aux)
        sets = [*log.days, log.select, log.test]
        for i, a in enumerate(sets):
            for b in sets[i + 1 :]:
                assert not torch.isin(a.budget, b.budget).any()
    again = collect(config, 1)
    assert all(
        torch.equal(a.states, b.states) for a, b in zip(again.days, logs[1].days)
    ) and not torch.equal(logs[0].test.states, logs[1].test.states)


@pytest.mark.slow
def test_longer_validation_leaves_every_other_set_alone(logs):
    more = collect(replace(config, n_val=8), 0)
    assert all(
        torch.equal(a.states, b.states)
        for a, b in zip([*more.days[:-2], more.test], [*logs[0].days[:-2], logs[0].test])
    )
    assert len(more.days[-2]) == len(more.select) == 8 == len(more.days[-1])


@pytest.mark.slow
def test_normalisation_comes_from_training_days_and_test_days_decide_nothing(logs):
    train, runs = lambda ls: train_policies(config, ls, every=1), arms(config)
    base, unseen = train(logs), train([log._replace(test=other(log.test)) for log in logs])
    assert (
        torch.equal(base.theta, unseen.theta)
        and torch.equal(base.weights, unseen.weights)
        and torch.equal(base.select, unseen.select)
    )
    held = train(
        [
            log._replace(
                days=[*log.days[:-2], other(log.days[-2]), log.days[-1]], select=other(log.select)
            )
            for log in logs
        ]
    )
    assert torch.equal(base.mean, held.mean) and torch.equal(base.std, held.std)
    aligned, uniform = runs.index(("aligned", 0.1)), runs.index(("uniform", None))
    assert not torch.equal(base.weights[aligned], held.weights[aligned]) and torch.equal(
        base.weights[uniform], held.weights[uniform]
    )


def test_selection_decides_which_look_is_kept_and_no_step(logs):
    """Weights and path do not see the selection half; with one look at the end its content cannot
    matter"""

    def once(ls):
        return train_policies(config, ls, every=10**6)

    a, b = once(logs), once([log._replace(select=other(log.select)) for log in logs])
    assert torch.equal(a.weights, b.weights) and not torch.equal(a.select, b.select)


def test_conditions_of_a_planner_are_scaled_by_training_days(logs):
    log = logs[0]
    scale = _sets(log, "cpu")[3]
    swapped = _sets(
        log._replace(
            days=[*log.days[:-2], other(log.days[-2]), other(log.days[-1])],
            select=other(log.select),
            test=other(log.test),
        ),
        "cpu",
    )[3]
    assert all(torch.equal(a, b) for a, b in zip(scale, swapped) if isinstance(a, torch.Tensor))
    assert not torch.equal(
        _sets(log._replace(days=[other(t) for t in log.days]), "cpu")[3].high, scale.high
    )  # the check above can fail


# ---- weights -------------------------------------------------------------------------------------
def gradients(seed, M=3, K=4, P=30):
    return torch.randn(M, K + 2, P, generator=rng(seed, "G")), torch.tensor(
        [9.0, *[50.0] * (K - 1), 20.0, 20.0]
    )


@given(
    seeds,
    st.sampled_from(names),
    st.sampled_from([0.03, 0.3, math.inf]),
    st.sampled_from(["cos", "rms", "none"]),
)
@some
def test_mixtures_lie_on_the_simplex_and_use_only_their_sources(seed, name, lam, normalize):
    G, n = gradients(seed)
    w = mix(name, lam, G, n, normalize)
    assert (w >= 0).all() and ((w.sum(1) - 1).abs() < 1e-5).logical_or((w == 0).all(1)).all()
    if "validation" not in name and name != "pooled":
        assert (w[:, 4] == 0).all()
    assert (w[:, 5] == 0).all()  # the random days are a yardstick, never a source


@given(seeds, st.sampled_from(["cos", "rms", "none"]), st.floats(0.01, 100.0))
@some
def test_scales_and_limits_of_the_scores(seed, normalize, c):
    G, n = gradients(seed)
    K = 4
    many = torch.cat([c * G[:, :K], G[:, K:]], 1)
    w = mix("aligned", 0.3, G, n, normalize)
    if normalize != "none":
        assert torch.allclose(mix("aligned", 0.3, many, n, normalize), w, atol=1e-5)
    one = G.clone()
    one[:, 1] *= c  # one source alone: only the cosine does not care
    if normalize == "cos":
        assert torch.allclose(mix("aligned", 0.3, one, n, "cos"), w, atol=1e-5)
    assert torch.equal(mix("aligned", math.inf, G, n, normalize), mix("uniform", None, G, n))
    best = torch.einsum("mkp,mp->mk", G[:, :K], G[:, K])
    best = best / G[:, :K].norm(dim=2) if normalize == "cos" else best
    assert torch.equal(mix("aligned", 1e-9, G, n, normalize).argmax(1), best.argmax(1))
    p = torch.randperm(K, generator=rng(seed, "p"))
    turned = torch.cat([G[:, :K][:, p], G[:, K:]], 1)
    assert torch.allclose(
        mix("aligned", 0.3, turned, n, normalize)[:, :K], w[:, :K][:, p], atol=1e-6
    )


def test_a_source_against_validation_gets_nothing_from_the_gate_and_little_from_the_softmax():
    G, n = gradients(1)
    G[:, 2] = -G[:, 4]
    assert (mix("cosine gate", None, G, n)[:, 2] == 0).all() and (
        mix("aligned", 0.1, G, n)[:, 2] < 1e-3
    ).all()


def test_scope_changes_aligned_arms_alone(logs):
    runs, t = (
        arms(config),
        {s: train_policies(replace(config, scope=s), logs) for s in ("all", "shared", "last")},
    )
    for r, (name, lam) in enumerate(runs):
        same = [torch.equal(t["all"].theta[r], t[s].theta[r]) for s in ("shared", "last")]
        moved = [torch.equal(t["all"].weights[r], t[s].weights[r]) for s in ("shared", "last")]
        if name in ("cosine gate", "aligned", "aligned, random split") and lam != math.inf:
            assert not any(moved)
        else:
            assert all(same) and all(moved)
    last = train_policies(
        replace(config, normalize="none", scope="last"), logs, [("aligned", 0.1)]
    ).weights
    assert not torch.equal(
        last, train_policies(replace(config, normalize="none"), logs, [("aligned", 0.1)]).weights
    )


def test_an_arm_does_not_depend_on_the_others(logs):
    runs = arms(config)
    whole, part = train_policies(config, logs), train_policies(config, logs, [runs[6], runs[0]])
    assert torch.allclose(whole.theta[[6, 0]], part.theta, atol=1e-5)
    assert torch.equal(
        whole.theta[runs.index(("aligned", math.inf))], whole.theta[runs.index(("uniform", None))]
    )


# ---- statistics and bad input --------------------------------------------------------------------
@pytest.mark.slow
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@some
def test_holm_is_the_step_down_rule(p):
    adjusted = holm(p)
    order = np.argsort(p)
    assert (
        (adjusted >= np.array(p) - 1e-15).all()
        and (adjusted <= 1).all()
        and (np.diff(adjusted[order]) >= 0).all()
    )
    for level in (
        0.01,
        0.05,
        0.3,
    ):  # reject while p is below level/(n - i), stop at the first that is not
        reject, going = np.zeros(len(p), bool), True
        for i, j in enumerate(order):
            going = going and p[j] * (len(p) - i) <= level
            reject[j] = going
        assert (reject == (adjusted <= level)).all()


def test_comparison_is_paired():
    import pandas as pd

    level, gain = np.array([1.0, 5.0, 9.0, 2.0]), np.array([0.1, 0.12, 0.09, 0.11])
    table = pd.DataFrame(
        [
            dict(market=i, method=m, loss=level[i] - gain[i] * (m == "a"), fixed=False)
            for i in range(4)
            for m in ("uniform", "a")
        ]
    )
    c = compare(table.sample(frac=1, random_state=0)).loc["a"]
    assert (
        abs(c["diff"] + gain.mean()) < 1e-12
        and c.high < 0
        and paired_ci(level - gain, level).high < 0
    )
    with pytest.raises(ValueError, match="against"):
        compare(table, against="b")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(val_day=8), "time order"),
        (dict(test_days=(9, 10)), "time order"),
        (dict(test_days=(12, 13)), "14 days"),
        (dict(markets=0), "at least 1"),
        (dict(lambdas=()), "lambdas"),
        (dict(normalize="l2"), "l2"),
        (dict(scope="heads"), "heads"),
        (dict(backbone="mlp"), "mlp"),
        (dict(backbone="causal", scope="last"), "policy"),
    ],
)
def test_bad_studies(change, words):
    with pytest.raises(ValueError, match=words):
        run_study(replace(config, **change))
