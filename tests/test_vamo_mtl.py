"""Invariants of the task weightings: closed forms, parity with TorchJD, degenerate gradients, and
lanes that do not touch each other"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from llmpapers.core.scale import rng
from llmpapers.vamo.mtl import (
    MTLTrainer,
    aggregate,
    available,
    make_related_tasks,
    mtl_step,
    perceptron,
    perceptron_layers,
    perceptron_start,
    run_lanes,
    task_gradients,
)

agg = pytest.importorskip("torchjd.aggregation")
seeds = st.integers(0, 10**6)
few, some = settings(max_examples=6, deadline=None), settings(max_examples=20, deadline=None)
drawing = ("pcgrad", "gradvac", "rlw")
solved = ("nash_mtl", "fairgrad", "cagrad", "mgda")  # to the tolerance of a solver


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed, *shape), dtype=torch.float64)


def inputs(K, seed):
    G, v = normal(K, 12, seed=seed), normal(12, seed=seed + 1)
    return dict(G=G, losses=normal(K, seed=seed + 2).abs() + 0.1, m=G @ v, gval_sq=float(v @ v))


@pytest.mark.parametrize("name", available())
def test_direction_is_the_weighted_sum_and_state_is_passed_on(name):
    state, before = None, torch.get_rng_state()
    for i in range(12):
        x = inputs(4, 10 * i)
        g, w, state = aggregate(name, state=state, **x)
        assert (
            torch.isfinite(g).all()
            and torch.isfinite(w).all()
            and w.shape == (4,)
            and g.dtype == torch.float64
        )
        if name != "db_mtl":
            assert torch.allclose(g, w @ x["G"])
    assert torch.equal(torch.get_rng_state(), before)  # the global generator belongs to the data
    x32 = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    assert aggregate(name, **x32)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "name", [n for n, needs in available().items() if "G" not in needs.split()]
)
def test_gramian_is_enough(name):
    x = inputs(4, 3)
    g, w, _ = aggregate(name, **x)
    x["gram"] = (G := x.pop("G")) @ G.T
    none, w2, _ = aggregate(name, **x)
    assert none is None and torch.allclose(w, w2, rtol=1e-6, atol=1e-8)


@given(seeds, st.sampled_from([n for n in available() if n not in drawing + ("single",)]))
@some
def test_permuting_tasks(seed, name):
    x = inputs(4, seed)
    p = torch.randperm(4, generator=rng(seed, "p"))
    y = {k: (v[p] if isinstance(v, torch.Tensor) else v) for k, v in x.items()}
    w, wp = aggregate(name, **x)[1], aggregate(name, **y)[1]
    tol = 2e-2 if name in solved else 1e-6
    assert (wp - w[p]).abs().max() <= tol * w.abs().max()


@pytest.mark.parametrize("name", available())
def test_degenerate_gradients_are_finite(name):
    g, h = normal(9, seed=1), normal(9, seed=2)
    for G in (
        torch.stack([g, 0 * g, h]),
        torch.stack([g, g, g]),
        torch.stack([g, -g, h]),
        torch.zeros(3, 9, dtype=torch.float64),
        1e-8 * torch.stack([g, h, g - h]),
        1e6 * torch.stack([g, h, g - h]),
    ):
        d, w, _ = aggregate(
            name,
            G,
            losses=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
            m=G @ h,
            gval_sq=float(h @ h),
        )
        assert torch.isfinite(d).all() and torch.isfinite(w).all()


@given(seeds, st.integers(2, 5))
@few
def test_parity_with_torchjd(seed, K):
    G = normal(K, 20, seed=seed)
    for name, theirs in dict(
        imtl_g=agg.IMTLG(),
        aligned_mtl=agg.AlignedMTL(),
        upgrad=agg.UPGrad(),
        fairgrad=agg.FairGrad(1.0),
        cagrad=agg.CAGrad(0.5),
    ).items():
        ours, peer = aggregate(name, G)[0], theirs(G)
        assert (ours - peer).norm() <= 1e-3 * peer.norm(), name


# ---- closed forms --------------------------------------------------------------------------------
@given(st.lists(st.floats(0.5, 3.0), min_size=2, max_size=4), st.sampled_from([0.5, 1.0, 2.0]))
@few
def test_orthogonal_gradients(norms, alpha):
    n = torch.tensor(norms, dtype=torch.float64)
    diagonal = torch.diag(n)

    def unit(w):
        return w / w.sum()

    assert torch.allclose(unit(aggregate("nash_mtl", diagonal)[1]), unit(1 / n), atol=1e-2)
    assert torch.allclose(
        unit(aggregate("fairgrad", diagonal, alpha=alpha)[1]),
        unit(n ** (-2 * alpha / (1 + alpha))),
        atol=1e-3,
    )
    assert torch.allclose(unit(aggregate("mgda", diagonal)[1]), unit(1 / n**2), atol=1e-2)
    assert torch.allclose(unit(aggregate("imtl_g", diagonal)[1]), unit(1 / n), atol=1e-6)


@given(seeds)
@some
def test_two_gradients(seed):
    g1, g2 = normal(6, seed=seed), normal(6, seed=seed + 1)
    G = torch.stack([g1, g2])
    g0 = G.mean(0)
    share = float((((g2 - g1) @ g2) / (g1 - g2).square().sum()).clamp(0, 1))
    assert abs(float(aggregate("mgda", G)[1][0]) - share) < 2e-3
    assert torch.allclose(aggregate("cagrad", G, c=0.0)[0], g0, atol=2e-3)
    assert abs(float((aggregate("cagrad", G, c=0.4)[0] - g0).norm() / g0.norm()) - 0.4) < 0.05
    d = aggregate("imtl_g", G)[0]
    assert abs(float(d @ g1 / g1.norm() - d @ g2 / g2.norm())) < 1e-8
    assert torch.allclose(aggregate("pcgrad", G.abs())[0], G.abs().sum(0))  # no conflict: the sum
    d = aggregate("upgrad", G)[0]
    assert (G @ d >= -1e-6).all()  # never against a task


def test_pcgrad_on_a_conflict_by_hand():
    G = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(aggregate("pcgrad", G)[0], torch.tensor([0.5, 1.5], dtype=torch.float64))


def test_rules_of_the_losses():
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    geometric = aggregate("gls", losses=L)[1]
    assert torch.allclose(geometric, L.prod() ** (1 / 3) / (3 * L), rtol=1e-6)
    smooth = aggregate("stch", losses=L, mu=0.5)[1]
    assert torch.allclose(smooth, ((L / 3) / 0.5).softmax(0) / 3, rtol=1e-5)
    assert torch.allclose(aggregate("uw", losses=L)[1], torch.full((3,), 0.5, dtype=L.dtype))
    state = None
    for _ in range(200):
        _, w, state = aggregate("uw", losses=L, state=state, lr=0.1)
    assert torch.allclose(w, 0.5 / L, rtol=0.05)  # its optimum: variance = loss
    state = None
    for i in range(31):
        _, w, state = aggregate(
            "dwa",
            losses=torch.tensor([1.0, 0.5 ** (i // 10), 1.0], dtype=L.dtype),
            state=state,
            every=10,
        )
    assert w[1] < w[0] and abs(float(w.sum()) - 3) < 1e-5  # a loss that fell loses weight
    rlw = torch.stack([aggregate("rlw", losses=L, seed=i)[1] for i in range(50)])
    assert (
        torch.allclose(rlw.sum(1), torch.ones(50, dtype=L.dtype), atol=1e-6)
        and rlw.std(0).min() > 0.1
    )


def test_famo_moves_to_the_task_that_lags():
    state, L = None, torch.tensor([1.0, 1.0], dtype=torch.float64)
    for _ in range(30):
        _, w, state = aggregate("famo", losses=L, after=L * torch.tensor([0.5, 1.0]), state=state)
    assert w[1] > 1.3 * w[0]


def test_rules_of_norms():
    G = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    state, L = None, torch.ones(2, dtype=torch.float64)
    for _ in range(400):
        _, w, state = aggregate("gradnorm", G, losses=L, state=state)
    assert abs(float(w[0] / w[1]) / 4 - 1) < 0.1 and abs(float(w.sum()) - 2) < 1e-9
    g, w, _ = aggregate("db_mtl", G, losses=L)
    assert torch.allclose(w @ G, g) and torch.allclose(g, torch.full((2,), 4.0, dtype=g.dtype))


@given(seeds, st.integers(2, 6))
@some
def test_rules_of_a_validation_gradient(seed, K):
    x = inputs(K, seed)
    m = x["m"]
    w = aggregate("l2rw", **x)[1]
    pos = m.clamp_min(0)
    assert torch.allclose(w, pos / pos.sum() if pos.any() else pos)
    gate = aggregate("cosine_gate", **x)[1]
    assert torch.allclose(gate, (m / (x["G"].norm(dim=1) * x["gval_sq"] ** 0.5)).clamp_min(0))
    state = None
    for _ in range(3):
        _, w, state = aggregate("doge", **x, state=state, eta=0.2)
    assert torch.allclose(w, (0.6 * m / m.square().mean().sqrt()).softmax(0))
    used, state = aggregate("auto_lambda", **x)[1:]
    assert (
        torch.allclose(used, torch.full((K,), 1 / K, dtype=used.dtype))
        and ((state - used) * m >= -1e-12).all()
        and (state >= 0).all()
    )
    v = aggregate("vamo", **x)[1]
    assert torch.allclose(v, (m / (x["G"].norm(dim=1) * x["gval_sq"] ** 0.5) / 0.1).softmax(0))


def test_bad_input_is_named():
    G = normal(3, 5)
    for kw, text in (
        (dict(name="x"), "not known"),
        (dict(name="dwa", G=G), "losses"),
        (dict(name="mgda", losses=torch.ones(3)), "gram"),
        (dict(name="vamo", G=G), "needs m"),
        (dict(name="cosine_gate", G=G, m=torch.ones(3)), "gval_sq"),
        (dict(name="uniform"), "number of tasks"),
        (dict(name="gls", losses=torch.tensor([1.0, float("nan")])), "losses of task 1"),
    ):
        with pytest.raises(ValueError, match=text):
            aggregate(**kw)
    with pytest.raises(ValueError, match="not known"):
        MTLTrainer(nn.Linear(1, 1), "x")
    with pytest.raises(ValueError, match="val_loss"):
        mtl_step(MTLTrainer(nn.Linear(1, 1), "l2rw"), lambda n: n(torch.ones(2, 1))[:, 0])


# ---- gradients, problems, lanes, trainer ---------------------------------------------------------
def test_task_gradients_three_ways():
    n = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x, y = normal(3, 6, 5), normal(3, 6)

    def one(p, b):
        return F.mse_loss(functional_call(n, p, (b[0],))[:, 0], b[1])

    p = dict(n.named_parameters())

    def both(p):
        return torch.stack([one(p, b) for b in zip(x, y)])

    L, G = task_gradients(both, p)
    for L2, G2 in (task_gradients(both, p, "vmap"), task_gradients(one, p, batches=(x, y))):
        assert torch.allclose(L2, L) and torch.allclose(G2, G, atol=1e-12)
    assert all(v.grad is None for v in n.parameters()) and G.shape == (
        3,
        sum(v.numel() for v in n.parameters()),
    )
    with pytest.raises(ValueError, match="method"):
        task_gradients(both, p, "loop")


def test_problems():
    a, b, c = make_related_tasks(3), make_related_tasks(3), make_related_tasks(4)
    assert all(
        torch.equal(u, v)
        for u, v in zip(a.x + a.y + [a.x_test, a.y_test], b.x + b.y + [b.x_test, b.y_test])
    ) and not torch.equal(a.x[0], c.x[0])
    assert (
        [len(x) for x in a.x] == [12] + [400] * 5
        and len(a.x_val) == 12
        and a.y_test.shape == (1024,)
    )
    assert [len(x) for x in make_related_tasks(0, c=(0.0, 0.0), n_aux=30).x] == [12, 30]
    with pytest.raises(ValueError, match="target"):
        make_related_tasks(0, c=(1.0, 0.0))
    many = [make_related_tasks(i, n_target=300, noise=0.0) for i in range(12)]

    def fit(t, k):
        return np.corrcoef(t.y[0], t.x[0] @ torch.linalg.lstsq(t.x[k], t.y[k]).solution)[0, 1]

    near, far = (np.mean([fit(t, k) for t in many]) for k in (1, 5))
    assert near > 0.5 > -0.2 > far


@pytest.mark.parametrize("name", ["uniform", "vamo", "pcgrad", "famo", "auto_lambda", "db_mtl"])
def test_lanes_do_not_touch_each_other(name):
    tasks = [make_related_tasks(i) for i in range(3)]
    whole, alone = run_lanes(tasks, name, steps=8), run_lanes(tasks[2:], name, [2], steps=8)
    assert torch.allclose(whole["theta"][2], alone["theta"][0], atol=1e-5) and torch.allclose(
        whole["test"][2], alone["test"][0], atol=1e-4
    )
    again = run_lanes(tasks, name, steps=8)
    assert torch.equal(again["theta"], whole["theta"])
    swapped = run_lanes(
        [replace(tasks[0], x_test=tasks[1].x_test, y_test=tasks[1].y_test), *tasks[1:]],
        name,
        steps=8,
    )
    assert torch.equal(swapped["theta"], whole["theta"])  # test data decide nothing


@pytest.mark.parametrize(
    "name", ["uniform", "vamo", "mgda", "famo", "l2rw", "auto_lambda", "db_mtl", "uw"]
)
def test_trainer_learns_and_keeps_the_best(name):
    t = make_related_tasks(0, c=(0.0, 0.0, 0.0))
    torch.manual_seed(0)
    n = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss(f):
        return torch.stack([F.mse_loss(f(x)[:, 0], y) for x, y in zip(t.x, t.y)])

    def val(f):
        return F.mse_loss(f(t.x_val)[:, 0], t.y_val)

    start = float(val(n).detach())
    tr = MTLTrainer(n, name, lr=5e-3)
    infos = tr.fit(lambda i: (loss, val), 60, val, every=5)
    assert (
        len(infos) == 60
        and float(val(n).detach()) == pytest.approx(tr.best_val, rel=1e-5)
        and tr.best_val < start
    )


# ---- perceptrons in one vector -------------------------------------------------------------------
@given(
    seeds,
    st.sampled_from([(3, 1), (2, 4, 1), (5, 3, 3, 2)]),
    st.sampled_from([torch.relu, torch.tanh]),
)
@some
def test_perceptron_is_the_module(seed, sizes, act):
    theta = torch.stack([perceptron_start(sizes, seed + i).double() for i in range(3)])
    x, layers = normal(3, 7, sizes[0], seed=seed), perceptron_layers(sizes)
    for t, xi, out in zip(theta, x, perceptron(theta, x, sizes, act)):
        h = xi
        for at, a, b in zip(layers, sizes, sizes[1:]):
            lin = nn.Linear(a, b).double()
            lin.weight.data, lin.bias.data = t[at][: a * b].view(a, b).T, t[at][a * b :]
            h = lin(h) if at is layers[-1] else act(lin(h))
        assert torch.allclose(out, h) and torch.allclose(perceptron(t, xi, sizes, act), h)
    assert layers[-1].stop == theta.shape[1] and [layer.start for layer in layers[1:]] == [
        layer.stop for layer in layers[:-1]
    ]


def test_perceptron_start():
    sizes = (400, 50, 1)
    layers = perceptron_layers(sizes)
    u, z = perceptron_start(sizes, 1), perceptron_start(sizes, 1, "normal")
    assert torch.equal(u, perceptron_start(sizes, 1)) and not torch.equal(
        u, perceptron_start(sizes, 2)
    )
    assert (
        u[layers[0]].abs().max() <= 400**-0.5
        and abs(float(u[layers[0]].std()) * (3 * 400) ** 0.5 - 1) < 0.05
    )
    assert (
        abs(float(z[layers[0]][:20000].std()) * 400**0.5 - 1) < 0.05
        and (z[layers[0]][20000:] == 0).all()
    )
    with pytest.raises(ValueError, match="init"):
        perceptron_start(sizes, 1, "he")
    with pytest.raises(ValueError, match="needs"):
        perceptron(u[:-1], torch.ones(2, 400), sizes)


@given(seeds, st.integers(2, 5))
@some
def test_imtl_projections_are_equal_for_any_number_of_tasks(seed, K):
    G = normal(K, 12, seed=seed)
    g = aggregate("imtl_g", G)[0]
    along = (G / G.norm(dim=1, keepdim=True)) @ g
    assert (along - along.mean()).abs().max() < 1e-6 * along.abs().max()


@given(seeds, st.integers(2, 5), st.sampled_from([0.2, 0.4, 0.8]))
@few
def test_cagrad_stays_at_its_distance_from_the_mean(seed, K, c):
    G = normal(K, 12, seed=seed)
    g0 = G.mean(0)
    assert abs(float((aggregate("cagrad", G, c=c)[0] - g0).norm() / g0.norm()) - c) < 0.1 * c


# ---- outside of their domain ---------------------------------------------------------------------
signed = ("imtl_g", "aligned_mtl")  # negative weights belong to their definition
ratios = ("gls", "famo", "dwa", "gradnorm", "db_mtl")  # logarithms or ratios of losses


def weights_or_refusal(name, state=None, steps=4, **x):
    "Weights of several steps, or the message of the error that names the method"
    found = []
    for _ in range(steps):
        try:
            _, w, state = aggregate(name, state=state, **x)
        except ValueError as e:
            assert name in str(e), e
            return str(e)
        assert torch.isfinite(w).all(), (name, w)
        assert name in signed or (w >= 0).all(), (name, w)
        found.append(w)
    return torch.stack(found)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("losses", [(0.0, 1.0, 2.0), (-1.0, 2.0, 1.0), (-3.0, -2.0, -1.0)])
def test_losses_that_are_not_positive(name, losses):
    x = inputs(3, 5) | dict(losses=torch.tensor(losses, dtype=torch.float64))
    got = weights_or_refusal(name, **x)
    assert isinstance(got, str) == (name in ratios), got
    if name in ratios:
        assert f"{name} needs positive losses" in got and "task 0 has" in got


def test_the_bound_of_famo_moves_its_domain():
    low = torch.full((2,), -5.0)
    x = dict(losses=torch.tensor([-1.0, 2.0]), min_losses=low)
    assert weights_or_refusal("famo", **x).shape == (4, 2)
    with pytest.raises(ValueError, match="famo needs positive after.*task 0 has -6"):
        aggregate("famo", **x, after=torch.tensor([-6.0, 1.0]))


@pytest.mark.parametrize("name", available())
def test_one_task(name):
    "Alone, with a gradient and without one"
    for scale in (1.0, 0.0):
        x = inputs(1, 7)
        x = x | dict(G=scale * x["G"], m=scale * x["m"])
        got = weights_or_refusal(name, **x)
        assert not isinstance(got, str) and got.shape == (4, 1), got
    assert float(aggregate("nash_mtl", torch.tensor([[3.0, 4.0]]))[1]) == pytest.approx(0.2)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_taken(name, bad):
    "A NaN in a gradient, a loss, an agreement or a norm is refused where it enters"
    needs = available()[name].split()
    for what in ("G", "losses", "m", "gval_sq"):
        x = inputs(3, 9)
        if what == "gval_sq":
            x["gval_sq"] = bad
        else:
            x[what][-1] = bad
        used = what in needs or (what == "G" and {"gram", "m"} & set(needs))
        if used or what in ("G", "losses", "m", "gval_sq"):
            with pytest.raises(ValueError, match=what if what != "G" else r"(G|gram) of task 2"):
                aggregate(name, **x)


@pytest.mark.slow
@given(
    seeds, st.sampled_from([*available()]), st.integers(1, 5), st.sampled_from([1e-12, 1.0, 1e12])
)
@settings(max_examples=150, deadline=None)
def test_weights_are_finite_and_not_negative(seed, name, K, size):
    x = inputs(K, seed)
    x |= dict(G=size * x["G"], m=size * x["m"])
    if seed % 3 == 0:
        x["G"][0] = 0
    got = weights_or_refusal(name, **x, seed=seed % 100)
    assert not isinstance(got, str), got


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", available())
def test_half_precision_is_widened(name, dtype):
    "Gradients whose inner products overflow in 16 bits"
    x = inputs(3, 11)
    G = (100 * x["G"]).to(dtype)
    big = torch.cat([G] * 20, 1)
    g, w, _ = aggregate(name, big, losses=x["losses"].to(dtype), m=x["m"].float(), gval_sq=1e4)
    wide = aggregate(name, big.float(), losses=x["losses"].to(dtype), m=x["m"].float(), gval_sq=1e4)
    assert g.dtype == w.dtype == dtype and torch.isfinite(g).all()
    torch.testing.assert_close(w.double(), wide[1].double(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", available())
def test_misspelt_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} has no option 'alhpa'; it has: "):
        aggregate(name, **inputs(3, 1), alhpa=0.5)
    with pytest.raises(ValueError, match=f"{name} has no option 'alhpa'"):
        MTLTrainer(nn.Linear(1, 1), name, alhpa=0.5)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("single", "task", -1),
        ("single", "task", 1.0),
        ("uw", "lr", float("nan")),
        ("dwa", "every", 0),
        ("dwa", "temperature", 0.0),
        ("gradnorm", "alpha", -1.0),
        ("gradnorm", "lr", "fast"),
        ("db_mtl", "beta", 1.5),
        ("doge", "eta", -0.1),
        ("auto_lambda", "init", float("inf")),
        ("famo", "lr", -1.0),
        ("stch", "mu", 0.0),
        ("cagrad", "c", -0.5),
        ("vamo", "lam", -1.0),
        ("vamo", "normalize", "l2"),
    ],
)
def test_options_out_of_their_domain(name, option, value):
    "When the trainer is made, not in the first step"
    with pytest.raises(ValueError, match=option):
        MTLTrainer(nn.Linear(1, 1), name, **{option: value})


def test_other_bad_input_is_named():
    x = inputs(3, 2)
    with pytest.raises(ValueError, match="different numbers of tasks: .*G 3.*losses 2"):
        aggregate("gradnorm", x["G"], losses=x["losses"][:2])
    with pytest.raises(ValueError, match="task=3 of single must be below"):
        aggregate("single", x["G"], task=3)
    with pytest.raises(ValueError, match="lr=-0.1"):
        MTLTrainer(nn.Linear(1, 1), "uniform", lr=-0.1)
    t = MTLTrainer(nn.Linear(1, 1), "uniform")
    with pytest.raises(ValueError, match="every=0"):
        t.fit(None, 3, every=0)


# ---- a step that fails changes nothing -----------------------------------------------------------
class Body(nn.Module):
    "Two tasks over one layer, batch norm and dropout"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
        self.heads = nn.Linear(6, 2)

    def forward(self, x):
        return self.heads(self.body(x))


def everything(n, trainer=None):
    "Parameters, buffers, flags and the state of the generator"
    flags = torch.tensor([float(m.training) for m in n.modules()])
    return [v.clone() for v in n.state_dict().values()] + [flags, torch.get_rng_state()]


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


data = torch.randn(8, 4, generator=rng(0, "body"))


def two_losses(n):
    return n(data).square().mean(0) + 0.1


def held_out(n):
    return two_losses(n).mean()


@pytest.mark.parametrize("at", [1, 2])
def test_a_look_ahead_that_raises_puts_the_parameters_back(at):
    "The validation loss fails at the point itself, or one step ahead"
    n, calls = Body(), []

    def fails(n):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("no validation data")
        return held_out(n)

    t = MTLTrainer(n, "auto_lambda", lr=0.3)
    before = [p.detach().clone() for p in n.parameters()]
    with pytest.raises(RuntimeError, match="no validation data"):
        mtl_step(t, two_losses, fails)
    assert same(before, n.parameters()) and len(calls) == at
    calls[:] = [0] * 9
    mtl_step(t, two_losses, fails)
    assert not same(before, n.parameters())


def test_a_look_ahead_is_exact():
    "A thousand parameters of any size come back to the bit; adding what was taken off rounds"
    n = nn.Linear(50, 20, bias=False)
    with torch.no_grad():
        n.weight.copy_(torch.randn(20, 50, generator=rng(0, "w")).exp())
    seen, before = [], n.weight.detach().clone()

    def val(m):
        seen.append(m.weight.detach().clone())
        return m.weight.square().mean()

    t = MTLTrainer(n, "auto_lambda", torch.optim.SGD(n.parameters(), 0.0), lr=5e4)
    mtl_step(t, lambda m: (m.weight**2).mean(1), val)
    assert len(seen) == 2 and not torch.equal(seen[1], before) and torch.equal(n.weight, before)


def root_of_nothing(n):
    "Finite losses whose gradient is NaN: the mask comes after the root"
    off = two_losses(n)
    root = (off - off.detach()).sqrt()
    return off + torch.where(off < 0, root, torch.zeros_like(off))


@pytest.mark.parametrize("name", available())
def test_a_gradient_that_is_no_number_is_refused(name):
    n = Body()
    t = MTLTrainer(n, name)
    before = [p.detach().clone() for p in n.parameters()]
    assert torch.isfinite(root_of_nothing(n)).all()
    with pytest.raises(ValueError, match="NaN or infinite|not finite"):
        mtl_step(t, root_of_nothing, held_out)
    assert same(before, n.parameters())
    assert all(p.grad is None for p in n.parameters())
    mtl_step(t, two_losses, held_out)
    assert all(torch.isfinite(p).all() for p in n.parameters())


@pytest.mark.parametrize("name", ["l2rw", "auto_lambda", "cosine_gate", "famo"])
def test_looking_at_validation_leaves_the_model_alone(name):
    "Batch norm is not fed by it, and the draws of dropout are those of training alone"

    def run(val):
        n = Body()
        t = MTLTrainer(n, name)
        torch.manual_seed(5)
        for _ in range(2):
            mtl_step(t, two_losses, val)
        return [n.body[1].num_batches_tracked.clone(), torch.get_rng_state()]

    def noisy(n):
        return held_out(n) + 0 * torch.rand(())

    def twice(n):
        return (held_out(n) + held_out(n.train())) / 2

    assert (
        run(held_out)[0] == 2 and same(run(held_out), run(noisy)) and same(run(noisy), run(twice))
    )


def test_the_best_checkpoint_is_chosen_in_evaluation_mode():
    n, modes = Body(), []

    def valid(m):
        modes.append(m.training)
        return float("nan") if len(modes) == 3 else held_out(m)

    t = MTLTrainer(n, "uniform")
    with pytest.raises(ValueError, match="valid gave NaN after 4 steps"):
        t.fit(lambda i: (two_losses,), 6, valid, every=2)
    assert modes == [False] * 3 and n.training
