"Invariants of period detection, the fold, the TimesBlock and the encoders of time"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.vamo.temporal import (
    ContextEncoder,
    Inception,
    TimeOfDay,
    TimesBlock,
    amplitudes,
    detect_periods,
    fold,
    planted_days,
    unfold,
)

seeds = st.integers(0, 10**6)
many = settings(max_examples=30, deadline=None)
divisors = [24, 16, 12, 8, 6, 4, 3]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed, *shape), dtype=dtype)


def block(seed=0, **kw):
    torch.manual_seed(seed)
    return TimesBlock(**(dict(d=3, d_ff=4, T=48, k=2, kernels=2) | kw)).double()


# ---- periods -------------------------------------------------------------------------------------
@given(st.sampled_from(divisors), st.floats(0, 6.28), st.floats(0.01, 1e4), st.floats(-1e3, 1e3))
@many
def test_pure_sine_whatever_phase_height_and_level(p, phase, height, level):
    x = (
        level
        + height
        * torch.sin(2 * torch.pi * torch.arange(48, dtype=torch.float64) / p + phase)[None, :, None]
    )
    periods, amp = detect_periods(x, 1)
    assert periods.tolist() == [p]
    assert amp.item() == pytest.approx(24 * height, rel=1e-4)
    assert detect_periods(x, 1, comb=True)[0].tolist() == [p]


@given(seeds, st.integers(1, 24), st.integers(4, 60), st.integers(1, 4), st.integers(1, 3))
@many
def test_amplitudes_descend_and_periods_fit(seed, k, T, B, C):
    k = min(k, T // 2)
    x = normal(B, T, C, seed=seed)
    periods, amp = detect_periods(x, k)
    assert periods.shape == (k,) and amp.shape == (B, k)
    assert (amp.mean(0).diff() <= 1e-9).all()
    assert ((2 <= periods) & (periods <= T)).all()
    assert (amp >= 0).all() and amp.isfinite().all()


@given(seeds, st.integers(4, 40))
@many
def test_parseval(seed, T):
    "The amplitudes are those of a Fourier transform: energy is kept"
    x = normal(1, T, 1, seed=seed)
    A = amplitudes(x)[0]
    twice = torch.full_like(A, 2.0)
    if T % 2 == 0:
        twice[-1] = 1.0
    assert torch.allclose((twice * A**2).sum() / T, (x - x.mean()).square().sum(), rtol=1e-6)


@given(st.floats(-1e6, 1e6), st.integers(4, 50), st.integers(1, 3))
@many
def test_constant_has_equal_weights(value, T, B):
    x = torch.full((B, T, 2), value, dtype=torch.float32)
    k = min(3, T // 2)
    for comb in (False, True):
        periods, amp = detect_periods(x, k, comb)
        assert amp.abs().max() == 0 and periods.isfinite().all() and (periods >= 2).all()
    b = TimesBlock(2, 3, T, k=k).eval()
    y = b(x)
    assert y.isfinite().all()
    w = b.mixing(torch.zeros(B, T, 2), list(range(1, k + 1)))
    assert torch.allclose(w, torch.full_like(w, 1 / k))


@given(seeds, st.floats(0.1, 10))
@many
def test_shift_and_scale(seed, c):
    x = planted_days((12, 8), B=2, noise=0.5, generator=rng(seed, "s"))
    p, a = detect_periods(x, 3)
    p2, a2 = detect_periods(c * x + 5.0, 3)
    assert p.tolist() == p2.tolist() and torch.allclose(a2, c * a, rtol=1e-3, atol=1e-3)
    q, b = detect_periods(x.roll(7, 1), 3)
    assert q.tolist() == p.tolist() and torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_permuting_samples_and_channels():
    x = planted_days((12, 8), B=5, C=3, noise=2.0, generator=rng(0, "p"))
    p, a = detect_periods(x, 4)
    order = torch.tensor([3, 1, 4, 0, 2])
    q, b = detect_periods(x[order][:, :, [2, 0, 1]], 4)
    assert p.tolist() == q.tolist() and torch.allclose(a[order], b, atol=1e-4)


def test_a_day_holds_its_daily_cycle_once():
    day = torch.sin(2 * torch.pi * torch.arange(48.0) / 48)[None, :, None]
    p = detect_periods(day, 1)[0].item()
    assert p == 48 and fold(day, p).shape[2] == 1
    assert fold(day.repeat(1, 5, 1), detect_periods(day.repeat(1, 5, 1), 1)[0].item()).shape[2] == 5


@given(seeds, st.sampled_from([12, 8, 6, 16]))
@many
def test_comb_finds_the_fundamental(seed, p):
    base = normal(6, p, 1, seed=seed)
    x = base.repeat(1, 48 // p, 1)
    found = detect_periods(x, 1, comb=True)[0].item()
    assert found == p


@pytest.mark.parametrize(
    "x, k, error, words",
    [
        (torch.zeros(1, 3, 1), 1, ValueError, "3 steps"),
        (torch.zeros(1, 8, 1), 5, ValueError, "between 1 and 4"),
        (torch.zeros(1, 8, 1), 0, ValueError, "k=0"),
        (torch.zeros(1, 8, 1), 1.5, ValueError, "k=1.5"),
        (torch.zeros(1, 8, 1), True, ValueError, "k=True"),
        (torch.zeros(8, 1), 1, ValueError, "(8, 1)"),
        (torch.zeros(0, 8, 1), 1, ValueError, "none empty"),
        (torch.zeros(1, 8, 0), 1, ValueError, "none empty"),
        (torch.full((1, 8, 1), float("nan")), 1, ValueError, "NaN"),
        (torch.full((1, 8, 1), float("inf")), 1, ValueError, "infinite"),
        (torch.zeros(1, 8, 1).long(), 1, TypeError, "floats"),
        ([[1.0, 2.0]], 1, TypeError, "tensor"),
    ],
)
def test_bad_series(x, k, error, words):
    with pytest.raises(error) as e:
        detect_periods(x, k)
    assert words in str(e.value)


def test_bad_planted_days():
    with pytest.raises(ValueError, match="periods"):
        planted_days((0,))
    with pytest.raises(ValueError, match="noise"):
        planted_days((4,), noise=-1.0)


# ---- the fold ------------------------------------------------------------------------------------
@given(seeds, st.integers(4, 50), st.data())
@many
def test_fold_is_undone(seed, T, data):
    p = data.draw(st.integers(1, T))
    x = normal(2, T, 3, seed=seed)
    z = fold(x, p)
    assert z.shape == (2, 3, -(-T // p), p) and torch.equal(unfold(z, T), x)
    for t in range(T):
        assert torch.equal(z[:, :, t // p, t % p], x[:, t])
    assert z.flatten(2)[:, :, T:].abs().sum() == 0


@given(seeds, st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_merged_kernel_is_the_mean_of_the_outputs(seed, kernels):
    torch.manual_seed(seed)
    inc = Inception(2, 3, kernels).double()
    z = normal(2, 2, 5, 7, seed=seed)
    assert torch.allclose(inc(z), sum(c(z) for c in inc.convs) / kernels, atol=1e-10)


# ---- the block -----------------------------------------------------------------------------------
@given(seeds, st.sampled_from([None, (12,), (12, 7), (48, 5)]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_zero_convolutions_are_the_identity(seed, periods, training):
    b = block(seed, periods=periods).train(training)
    with torch.no_grad():
        for p in b.parameters():
            p.zero_()
        x = normal(3, 48, 3, seed=seed)
        assert torch.equal(b(x), x)


@given(seeds, st.sampled_from([None, (12, 8)]), st.sampled_from(["raw", "mean"]))
@settings(max_examples=15, deadline=None)
def test_batch_invariant_in_evaluation(seed, periods, weights):
    b = block(seed, periods=periods, weights=weights).eval()
    x = torch.cat(
        [
            planted_days((12,), B=3, C=3, noise=0.3, generator=rng(seed, 1)),
            planted_days((8, 6), B=3, C=3, noise=0.3, generator=rng(seed, 2)),
        ]
    ).double()
    with torch.no_grad():
        y, alone = b(x), torch.cat([b(s[None]) for s in x])
        order = torch.randperm(6, generator=rng(seed, 3))
        assert torch.allclose(y, alone, atol=1e-10) and torch.allclose(
            b(x[order]), y[order], atol=1e-10
        )


def test_training_follows_the_batch_and_fixed_periods_do_not():
    x = torch.cat(
        [
            planted_days((12,), B=3, C=3, noise=0.1, generator=rng(0, 1)),
            planted_days((8,), B=1, C=3, noise=0.1, generator=rng(0, 2)),
        ]
    ).double()
    b = block(k=1).train()
    assert (b(x)[3] - b(x[3:])[0]).abs().max() > 1e-4
    assert b.fix_periods(x) == [12] and b.freqs == [4]
    assert torch.allclose(b(x)[3], b(x[3:])[0], atol=1e-10)
    assert torch.allclose(b.train()(x), b.eval()(x), atol=1e-12)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_detected_and_fixed_periods_agree(seed):
    "With the periods of its own spectrum fixed, a batch of one gives what detection gives"
    x = normal(1, 48, 3, seed=seed)
    b = block(seed).eval()
    y = b(x)
    b.fix_periods(x)
    assert torch.allclose(b(x), y, atol=1e-8)


def test_equal_periods_are_folded_once_with_added_weights():
    """Frequencies 17 and 20 both have period 2: the result is that of one fold, whatever the split
    of the weights"""
    x, b = normal(2, 48, 3), block()
    y = b._mix(x, [17, 20], [2, 2])
    assert torch.allclose(
        y, x + unfold(b.second(torch.nn.functional.gelu(b.first(fold(x, 2)))), 48), atol=1e-10
    )


@pytest.mark.parametrize("periods", [None, (12, 8)])
def test_derivatives(periods):
    "Forward mode, reverse mode and a second backward pass agree"
    b = block(periods=periods).eval()
    x = normal(2, 48, 3)
    params = {k: v.detach() for k, v in b.named_parameters()}
    u = {k: normal(*v.shape, seed=1) for k, v in params.items()}

    def loss(p):
        return torch.func.functional_call(b, p, (x,)).square().mean()

    if periods is not None:
        jvp = torch.func.jvp(loss, (params,), (u,))[1]
        g = torch.func.grad(loss)(params)
        assert torch.allclose(jvp, sum((g[k] * u[k]).sum() for k in g), rtol=1e-9)
    else:
        g = dict(zip(params, torch.autograd.grad(b(x).square().mean(), list(b.parameters()))))
    h = 1e-5
    fd = (
        loss({k: v + h * u[k] for k, v in params.items()})
        - loss({k: v - h * u[k] for k, v in params.items()})
    ) / (2 * h)
    assert torch.allclose(fd, sum((g[k] * u[k]).sum() for k in g), rtol=1e-4)


@pytest.mark.parametrize("weights", ["raw", "mean"])
def test_no_nan_at_zero_amplitude(weights):
    b = block(periods=(12, 8), weights=weights)
    x = torch.zeros(2, 48, 3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(b(x).square().sum() + b(x).sum(), x, create_graph=True)
    assert g.isfinite().all()
    (gg,) = torch.autograd.grad(g.square().sum(), x)
    assert gg.isfinite().all()


def test_the_block_sees_the_future():
    "So it must not stand on the steps of a causal model"
    b, x = block(periods=(12,)), normal(1, 48, 3)
    later = x.clone()
    later[:, 30:] += 1
    assert (b(x)[:, :30] - b(later)[:, :30]).abs().max() > 1e-6


def test_does_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    planted_days((12,), generator=rng(0, "x"))
    detect_periods(normal(1, 48, 2), 2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(T=3), "T=3"),
        (dict(k=0), "k=0"),
        (dict(k=25), "k=25"),
        (dict(periods=(1,)), "periods=(1,)"),
        (dict(periods=(49,)), "periods=(49,)"),
        (dict(periods=(2.5,)), "2.5"),
        (dict(periods=()), "periods=()"),
        (dict(weights="log"), "weights='log'"),
        (dict(kernels=0), "kernels=0"),
    ],
)
def test_bad_block(kw, words):
    with pytest.raises(ValueError) as e:
        block(**kw)
    assert words in str(e.value)


def test_bad_input_of_the_block():
    for x in (torch.zeros(1, 47, 3), torch.zeros(48, 3)):
        with pytest.raises(ValueError, match="T=48"):
            block()(x.double())
    with pytest.raises(ValueError, match="T=48"):
        block().fix_periods(torch.zeros(1, 40, 3))
    with pytest.raises(ValueError, match="p=0"):
        fold(torch.zeros(1, 8, 1), 0)


# ---- clock and memory ----------------------------------------------------------------------------
@given(seeds, st.integers(0, 500), st.integers(1, 5))
@many
def test_clock_repeats_every_day(seed, step, harmonics):
    torch.manual_seed(seed)
    c = TimeOfDay(5, 48, harmonics).double()
    assert torch.allclose(c(torch.tensor(step)), c(torch.tensor(step % 48)), atol=1e-8)


@given(seeds, st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_context_is_batch_invariant(seed, days):
    torch.manual_seed(seed)
    e = ContextEncoder(2, 6, T=12, days=days).double()
    x = normal(4, days * 12, 2, seed=seed)
    y = e(x)
    assert y.shape == (4, 6) and torch.allclose(y, torch.cat([e(s[None]) for s in x]), atol=1e-10)


def test_bad_clock_and_context():
    with pytest.raises(ValueError, match="harmonics"):
        TimeOfDay(4, 48, 25)
    with pytest.raises(ValueError, match="days=0"):
        ContextEncoder(2, 4, days=0)
    with pytest.raises(ValueError, match="channels=2"):
        ContextEncoder(2, 4, days=1)(torch.zeros(1, 48, 3))
