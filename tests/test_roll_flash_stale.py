"""The forced-lag study: equal losses without lag, the age of samples, models in company, and time
to quality"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.roll_flash import stale
from llmpapers.roll_flash.stale import (
    Arm,
    LagConfig,
    answer_logprobs,
    forced_lag_run,
    gradient_weight,
    init_policies,
    lag_study,
    sample_answers,
    stale_losses,
    time_to_quality,
)

small = LagConfig(digits=2, prompts=3, samples=4, width=8, layers=1, steps=6, lr=3e-2)


def ask(cfg, m=3, n=5):
    g = rng(0, "test")
    return torch.randint(0, 10, (m, n, cfg.digits), generator=g), torch.rand(
        m, n, cfg.digits, generator=g
    )


def test_sampling_records_the_probabilities_of_a_full_pass():
    flat, (p, u) = init_policies([0, 1, 2], small), ask(small)
    answers, lp = sample_answers(flat, p, u, small)
    assert torch.allclose(lp, answer_logprobs(flat, p, answers, small), atol=1e-5)
    for m in range(3):
        one, lp1 = sample_answers(flat[m : m + 1], p[m : m + 1], u[m : m + 1], small)
        assert torch.equal(one[0], answers[m]) and torch.allclose(lp1[0], lp[m], atol=1e-5)


def test_tokens_come_from_the_distribution():
    n = 20_000
    p = torch.zeros(1, n, small.digits, dtype=torch.long)
    flat, u = init_policies([3], small), torch.rand(1, n, small.digits, generator=rng(0, "u"))
    answers, _ = sample_answers(flat, p, u, small)
    w = stale._unpack(flat, small)
    probs = stale._forward(w, stale._ask(p[:, :1]), small)[0][0, 0, -1].softmax(-1)
    share = torch.bincount(answers[0, :, 0], minlength=11) / n
    assert (share - probs).abs().max() < 5 * (0.25 / n) ** 0.5


def test_gradient_of_one_model_is_independent_of_its_company():
    flat, (p, u) = init_policies([0, 1], small).requires_grad_(), ask(small, 2)
    answers, _ = sample_answers(flat.detach(), p, u, small)
    (both,) = torch.autograd.grad(answer_logprobs(flat, p, answers, small).sum(), flat)
    one = flat[1:].detach().requires_grad_()
    (alone,) = torch.autograd.grad(answer_logprobs(one, p[1:], answers[1:], small).sum(), one)
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_without_lag_all_losses_are_one():
    r = forced_lag_run([Arm(n) for n in stale_losses], [0, 1], small)
    assert (
        np.abs(r.reward - r.reward[:1]).max() < 0.05
        and np.allclose(r.ess, 1, atol=1e-4)
        and np.abs(r.kl).max() < 1e-4
    )


@pytest.mark.parametrize("lag", [1, 3])
def test_the_trained_batch_is_the_one_of_lag_steps_ago(lag, monkeypatch):
    drawn, trained, draw, logp = [], [], stale._draw, stale.answer_logprobs
    monkeypatch.setattr(stale, "_draw", lambda flat, *a: drawn.append(draw(flat, *a)) or drawn[-1])
    monkeypatch.setattr(
        stale,
        "answer_logprobs",
        lambda flat, p, answers, cfg: trained.append((p, answers)) or logp(flat, p, answers, cfg),
    )
    forced_lag_run([Arm("tis", lag)], [0], small)
    assert len(drawn) == small.steps + lag and len(trained) == small.steps
    for v, (p, answers) in enumerate(trained):
        assert torch.equal(p, drawn[v][0]) and torch.equal(
            answers, drawn[v][1]
        )  # batch v - lag is entry v


def test_lag_makes_ratios_depart_and_the_losses_differ():
    r = forced_lag_run([Arm(n, 2) for n in stale_losses], [0], replace(small, steps=12))
    assert (r.kl[:, :, 0] < 1e-6).all() and (r.kl[:, :, 1:].max(-1) > 1e-4).all()
    assert (
        np.abs(r.kl[0] - r.kl[1]).max() > 1e-6 and (0 < r.ess).all() and (r.ess <= 1 + 1e-5).all()
    )
    assert np.array_equal(r.of("ppo", 2, "ess"), r.ess[1])


def test_arms_are_paired_and_runs_are_repeated_exactly():
    arms = [Arm("ppo"), Arm("tis", 2)]
    a, b = (forced_lag_run(arms, [4, 5], small) for _ in range(2))
    assert np.array_equal(a.reward, b.reward) and np.array_equal(a.kl, b.kl)
    assert (
        a.reward[0, 0, 0] == a.reward[1, 0, 0] != a.reward[0, 1, 0]
    )  # same weights, prompts and noise; another seed has others


def test_study_is_cached_by_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    arms, calls, run = [Arm("ppo"), Arm("topr", 1)], [], stale.forced_lag_run
    first = lag_study(arms, [0], small)
    real = stale.artifact

    def counted(kind, recipe, build):
        @functools.wraps(build)  # it stays a function of its module, whose text is in the key
        def make(folder):
            calls.append(recipe["seed"])
            build(folder)

        return real(kind, recipe, make)

    monkeypatch.setattr(stale, "artifact", counted)
    both = lag_study(arms, [0, 1], small)
    assert (
        calls == [1]
        and both.reward.shape == (2, 2, small.steps)
        and np.array_equal(both.reward[:, :1], first.reward)
    )
    assert np.array_equal(both.reward[:, 1:], run(arms, [1], small).reward)
    lag_study(arms, [0], replace(small, lr=0.1))
    assert calls == [1, 0]


def test_weights_of_the_losses():
    x = torch.linspace(-3, 3, 61)
    r = x.exp()
    for c in stale_losses.values():
        for a in (2.0, -0.5):
            assert gradient_weight(c, x, a)[30] == pytest.approx(1, abs=1e-5)
    assert torch.allclose(
        gradient_weight(stale_losses["decoupled_ppo"], x, 1.0), r.clamp(max=5), rtol=1e-4
    )
    assert torch.allclose(gradient_weight(stale_losses["topr"], x, -1.0), r.clamp(max=1), rtol=1e-4)
    assert torch.equal(gradient_weight(stale_losses["reinforce"], x, -1.0), torch.ones(61))
    ppo = gradient_weight(stale_losses["ppo"], x, -1.0)
    assert (ppo[r < 0.79] == 0).all() and torch.allclose(ppo[r > 0.81], r[r > 0.81], rtol=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.1, 10), st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_time_to_quality_is_the_first_crossing(reward, step_time, smooth):
    targets, k = [0.2, 0.5, 0.9], min(smooth, len(reward))
    got = time_to_quality(reward, step_time, targets, smooth)
    for t, x in zip(targets, got):
        hits = [
            i + k
            for i in range(len(reward) - k + 1)
            if np.convolve(reward, np.ones(k) / k, "valid")[i] >= t
        ]
        assert x == (None if not hits else pytest.approx(hits[0] * step_time))
    known = [x for x in got if x is not None]
    assert known == sorted(known)


def test_bad_input_is_named():
    for f, match in (
        (lambda: Arm("x"), "loss"),
        (lambda: Arm("ppo", 1.5), "lag"),
        (lambda: LagConfig(steps=0), "steps=0"),
        (lambda: LagConfig(lr=math.nan), "lr"),
        (lambda: time_to_quality([], 1, [0.5]), "reward"),
        (lambda: time_to_quality([1], -1, [0.5]), "step_time"),
    ):
        with pytest.raises(ValueError, match=match):
            f()
