"""Invariants of the validation-aligned weights: closed forms, five ways to the same agreements, and
steps that change nothing else"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmpapers.core.scale import rng
from llmpapers.vamo import alignment
from llmpapers.vamo.alignment import (
    AlignedWeighter,
    alignment_report,
    entropy_weights,
    methods,
    project_simplex,
    same_draw,
    task_alignments,
    vamo_step,
)
from llmpapers.vamo.temporal import TimesBlock

seeds = st.integers(0, 10**6)
few, many = settings(max_examples=8, deadline=None), settings(max_examples=60, deadline=None)
scores = st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9)
lams = st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 1.0, 1e5, 1e30, math.inf])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed, *shape), dtype=dtype)


# ---- weights -------------------------------------------------------------------------------------
@given(scores, lams)
@many
def test_weights_lie_on_the_simplex_at_any_size(m, lam):
    for dtype in (torch.float32, torch.float64):
        for w in (
            entropy_weights(torch.tensor(m, dtype=dtype), lam),
            project_simplex(torch.tensor(m, dtype=dtype)),
        ):
            assert (
                torch.isfinite(w).all()
                and (w >= 0).all()
                and abs(float(w.sum()) - 1) < 1e-5
                and w.dtype == dtype
            )


@given(
    seeds,
    st.integers(1, 12),
    st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
@many
def test_guarantees_and_value(seed, K, lam, size):
    m = size * normal(4, K, seed=seed)
    r = alignment_report(m, lam)
    tol = 1e-9 * size
    assert (r["wm"] >= r["mean"] - tol).all() and (
        r["wm"] >= r["best"] - lam * math.log(K) - tol
    ).all()
    assert torch.allclose(r["value"], lam * (m / lam).logsumexp(-1), rtol=1e-9, atol=tol)
    assert (alignment_report(m, 2 * lam)["wm"] <= r["wm"] + tol).all()
    perm = torch.randperm(K, generator=rng(seed, "perm"))
    assert torch.allclose(entropy_weights(m[:, perm], lam), r["w"][:, perm]) and torch.allclose(
        entropy_weights(m + 7.0, lam), r["w"], atol=1e-6
    )
    others = torch.rand(200, K, generator=rng(seed, "w"), dtype=torch.float64).log()
    others = others / others.sum(-1, keepdim=True)
    value = others @ m[0] - lam * torch.special.xlogy(others, others).sum(-1)
    assert (value <= r["value"][0] + tol).all()


@given(seeds, st.integers(1, 8))
@many
def test_projection_is_nearest(seed, K):
    v = 2 * normal(K, seed=seed)
    p = project_simplex(v)
    grid = torch.rand(300, K, generator=rng(seed, "grid"), dtype=torch.float64).log()
    grid = grid / grid.sum(-1, keepdim=True)
    assert ((grid - p) @ (v - p) <= 1e-9).all()  # the variational inequality of a projection


def test_limits_and_bad_input():
    assert entropy_weights(torch.tensor([2.0, 2.0, 0.0]), 0.0).tolist() == [0.5, 0.5, 0.0]
    assert torch.equal(entropy_weights(torch.tensor([5.0, -3.0]), math.inf), torch.full((2,), 0.5))
    assert (
        entropy_weights(torch.tensor([4]), 0.1).tolist() == [1.0]
        and alignment_report(torch.tensor([4.0]), math.inf)["value"] == 4
    )
    for bad, text in (
        (dict(m=torch.tensor([1.0, 2.0, float("nan")]), lam=1.0), "task 2"),
        (dict(m=torch.tensor([1.0]), lam=-1.0), "lam"),
        (dict(m=torch.tensor([1.0]), lam=float("nan")), "lam"),
        (dict(m=torch.tensor(1.0), lam=1.0), "shape"),
    ):
        with pytest.raises(ValueError, match=text):
            entropy_weights(**bad)


# ---- agreements ----------------------------------------------------------------------------------
class Heads(nn.Module):
    "A trunk, three heads that are used and one that is not"

    def __init__(self, trunk, width):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(nn.Linear(width, 1) for _ in range(4))

    def forward(self, *a):
        h = self.trunk(*a)
        h = (h[0] if isinstance(h, tuple) else h).flatten(1)
        return torch.stack(
            [
                F.mse_loss(f(h)[:, 0], torch.full_like(h[:, 0], k))
                for k, f in enumerate(self.heads[:3])
            ]
        )

    def shared_parameters(self):
        return self.trunk.parameters()


def net(kind, dtype=torch.float64, seed=0):
    "A small network and its input"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(6, 5, 8, dtype=dtype)
        trunk, width, args = dict(
            mlp=lambda: (
                nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.LayerNorm(16), nn.Mish()),
                16,
                (x,),
            ),
            conv=lambda: (
                nn.Sequential(
                    nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.ConvTranspose1d(4, 3, 3)
                ),
                24,
                (x,),
            ),
            conv2d=lambda: (
                nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 2, 3, padding=1), nn.GELU()),
                80,
                (x,),
            ),
            gru=lambda: (nn.GRU(8, 7, batch_first=True), 35, (x,)),
            attention=lambda: (
                nn.MultiheadAttention(8, 2, batch_first=True),
                40,
                (x, x, x, None, False),
            ),
            lstm=lambda: (nn.LSTM(8, 7, batch_first=True), 35, (x,)),
            times=lambda: (TimesBlock(8, 4, 5, kernels=2, periods=(2, 3)), 40, (x,)),
            times_found=lambda: (
                nn.Sequential(nn.Linear(8, 8), TimesBlock(8, 4, 5, kernels=2)),
                40,
                (x,),
            ),
            noisy=lambda: (
                nn.Sequential(
                    nn.Flatten(), nn.Linear(40, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4)
                ),
                16,
                (x,),
            ),
        )[kind]()
        return Heads(trunk, width).to(dtype), args


def agree(n, args, direction, method, **kw):
    with sdpa_kernel(SDPBackend.MATH):
        return task_alignments(
            lambda p: functional_call(n, p, args),
            dict(n.named_parameters()),
            direction,
            method,
            **kw,
        )


@pytest.mark.parametrize(
    "kind", ["mlp", "conv", "conv2d", "gru", "attention", "times", "times_found"]
)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_all_methods_agree(kind, dtype, tol):
    n, args = net(kind, dtype)
    d = {k: normal(*v.shape, seed=3, dtype=dtype) for k, v in n.named_parameters()}
    out = {w: agree(n, args, d, w) for w in methods + ("auto",)}
    losses, m = out["stack"]
    for w, (lw, mw) in out.items():
        limit = tol if w != "fd" else (2e-2 if dtype == torch.float32 else 1e-5)
        assert (mw - m).abs().max() <= limit * m.abs().max() and torch.allclose(
            lw, losses, rtol=1e-5
        ), w
        assert lw.shape == mw.shape == (3,) and not lw.requires_grad and not mw.requires_grad


@given(
    seeds,
    st.sampled_from(["mlp", "conv", "gru"]),
    st.sampled_from(["jvp", "double", "stack", "vmap"]),
)
@few
def test_linear_in_the_direction_and_norms(seed, kind, method):
    n, args = net(kind, seed=seed)
    p = dict(n.named_parameters())
    a, b = ({k: normal(*v.shape, seed=seed + i) for k, v in p.items()} for i in (1, 2))
    ma, mb = (agree(n, args, x, method)[1] for x in (a, b))
    assert torch.allclose(
        agree(n, args, {k: 2 * a[k] - 3 * b[k] for k in a}, method)[1],
        2 * ma - 3 * mb,
        rtol=1e-9,
        atol=1e-11,
    )
    g = torch.autograd.grad(n(*args)[1], list(p.values()), allow_unused=True)
    m = agree(n, args, dict(zip(p, g)), method)[1]  # entries that are None count as zero
    assert torch.allclose(m[1], sum(x.square().sum() for x in g if x is not None), rtol=1e-10)


@pytest.mark.parametrize("method", methods)
def test_unused_head_counts_zero_and_frozen_parameters_are_constants(method):
    n, args = net("mlp")
    p = dict(n.named_parameters())
    d = {k: torch.ones_like(v) for k, v in p.items()}
    whole = agree(n, args, d, method)[1]
    assert torch.allclose(
        agree(n, args, {k: v for k, v in d.items() if "heads.3" not in k}, method)[1],
        whole,
        rtol=1e-6,
    )
    only = agree(n, args, {k: v for k, v in d.items() if k == "heads.0.bias"}, method)[1]
    assert only[0] != 0 and torch.allclose(only[1:], torch.zeros(2, dtype=only.dtype), atol=1e-9)
    n.trunk[1].weight.requires_grad_(False)
    assert torch.allclose(
        agree(n, args, d, method)[1],
        agree(n, args, {k: v for k, v in d.items() if k != "trunk.1.weight"}, method)[1],
        rtol=1e-6,
    )


@pytest.mark.parametrize("method", methods)
def test_nothing_else_changes(method):
    n, args = net("noisy")
    n.train()
    n.heads.eval()
    n(*args).sum().backward()
    torch.manual_seed(11)
    before = {k: v.clone() for k, v in n.state_dict().items()}
    grads = {k: v.grad.clone() for k, v in n.named_parameters() if v.grad is not None}
    flags, state = [x.training for x in n.modules()], torch.get_rng_state()
    out = [
        agree(n, args, {k: torch.ones_like(v) for k, v in n.named_parameters()}, method, model=n)
        for _ in range(2)
    ]
    assert all(torch.equal(v, n.state_dict()[k]) for k, v in before.items()) and torch.equal(
        torch.get_rng_state(), state
    )
    assert (
        all(torch.equal(v, dict(n.named_parameters())[k].grad) for k, v in grads.items())
        and [x.training for x in n.modules()] == flags
    )
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(
        out[0][1], out[1][1]
    )  # the same dropout mask each time
    torch.manual_seed(11)
    assert torch.allclose(
        n(*args).detach(), out[0][0]
    )  # and it is the one the update pass will draw


def test_bad_closures_and_directions_are_named():
    n, args = net("mlp")
    p = dict(n.named_parameters())
    d = {k: torch.ones_like(v) for k, v in p.items()}

    def run(f, d=d, **kw):
        return task_alignments(f, p, d, **kw)

    def good(q):
        return functional_call(n, q, args)

    for w in methods[:4]:
        with pytest.raises(ValueError, match="no loss depends"):
            run(lambda q: n(*args).detach(), method=w)
        with pytest.raises(ValueError, match="task 2"):
            run(lambda q: good(q) / torch.tensor([1.0, 1.0, 0.0]), method=w)
        with pytest.raises(ValueError, match=r"shape \[K\]"):
            run(lambda q: good(q).sum(), method=w)
    for kw, text in (
        (dict(d={"nothing": torch.ones(1)}), "nothing"),
        (dict(d={"heads.0.bias": torch.ones(2)}), "shape"),
        (dict(d={}), "no entry"),
        (dict(method="magic"), "magic"),
    ):
        with pytest.raises(ValueError, match=text):
            run(good, **kw)


def test_auto_falls_back_once_and_is_exact():
    alignment._told.clear()
    n, args = net("attention")
    d = {k: torch.ones_like(v) for k, v in n.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [
            task_alignments(lambda p: functional_call(n, p, args), dict(n.named_parameters()), d)
            for _ in range(3)
        ]
    assert (
        len(caught) == 2
        and "double" in str(caught[0].message)
        and "stack" in str(caught[1].message)
    )
    assert torch.allclose(got[2][1], agree(n, args, d, "jvp")[1], rtol=1e-8)
    n, args = net("lstm")
    d = {k: torch.ones_like(v) for k, v in n.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = agree(n, args, d, "auto")[1]
    assert torch.allclose(m, agree(n, args, d, "stack")[1], rtol=1e-8)


def test_a_fault_of_the_closure_is_not_taken_for_a_missing_derivative():
    n, args = net("mlp")

    def broken(p):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        task_alignments(
            broken,
            dict(n.named_parameters()),
            {k: torch.ones_like(v) for k, v in n.named_parameters()},
        )


# ---- weighter ------------------------------------------------------------------------------------
@given(
    seeds,
    st.integers(2, 8),
    st.sampled_from(["rms", "cos", "val"]),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from(["entropy", "sparsemax"]),
)
@many
def test_scale_of_the_losses(seed, K, normalize, c, ema, mode):
    a, b = (AlignedWeighter(0.3, normalize, ema=ema, mode=mode) for _ in range(2))
    for i in range(3):
        m, norms = normal(K, seed=seed + i), normal(K, seed=seed + 50 + i).abs() + 0.1
        if normalize == "val":
            u, v = a.update(m, gval_sq=2.0), b.update(c * c * m, gval_sq=2.0 * c * c)
        else:
            u, v = a.update(m, 2.0, norms), b.update(c * m, 2.0, c * norms)
        assert torch.allclose(u, v, atol=1e-6)
        perm = torch.randperm(K, generator=rng(seed, i))
        if not ema and normalize != "val":
            assert torch.allclose(
                AlignedWeighter(0.3, normalize, mode=mode).update(m[perm], 2.0, norms[perm]),
                u[perm],
                atol=1e-9,
            )


@given(seeds, st.integers(1, 6), st.floats(0, 1))
@many
def test_floor_average_and_abstaining(seed, K, share):
    m = normal(K, seed=seed)
    w = AlignedWeighter(0.1, floor=share / K).update(m)
    assert (w >= share / K - 1e-9).all() and abs(float(w.sum()) - 1) < 1e-9
    steady = AlignedWeighter(0.1, ema=0.9)
    for _ in range(4):
        assert torch.allclose(
            steady.update(m), entropy_weights(m, 0.1)
        )  # a constant score is its own average
    skip, uni = (
        AlignedWeighter(0.1, abstain=a).update(-m.abs() - 0.1) for a in ("skip", "uniform")
    )
    assert not skip.any() and torch.allclose(uni, torch.full((K,), 1 / K, dtype=uni.dtype))


def test_state_goes_on_and_bad_options():
    ms = [normal(4, seed=i) for i in range(6)]
    run = AlignedWeighter(0.2, "val", ema=0.8)
    for m in ms[:3]:
        run.update(m, 1.0 + float(m[0]) ** 2)
    new = AlignedWeighter(0.2, "val", ema=0.8)
    new.load_state_dict(run.state_dict())
    for m in ms[3:]:
        assert torch.equal(run.update(m, 2.0), new.update(m, 2.0))
    for kw in (
        dict(lam=-1.0),
        dict(lam=1.0, normalize="l2"),
        dict(lam=1.0, ema=1.0),
        dict(lam=1.0, mode="max"),
        dict(lam=1.0, abstain="no"),
        dict(lam=1.0, floor=-0.1),
    ):
        with pytest.raises(ValueError):
            AlignedWeighter(**kw)
    for w, args, text in (
        (AlignedWeighter(1.0, floor=0.4), (ms[0],), "floor"),
        (AlignedWeighter(1.0, "cos"), (ms[0], 1.0), "norms"),
        (AlignedWeighter(1.0, "val"), (ms[0],), "gval_sq"),
        (run, (ms[0][:2], 1.0), "tasks"),
        (AlignedWeighter(1.0), (torch.ones(2, 2),), "one step"),
    ):
        with pytest.raises(ValueError, match=text):
            w.update(*args)


# ---- the step ------------------------------------------------------------------------------------
def flat(n):
    return torch.cat([v.flatten().double() for v in n.state_dict().values()])


optimizers = dict(
    sgd=lambda p: torch.optim.SGD(p, 0.05),
    momentum=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    adam=lambda p: torch.optim.Adam(p, 0.01),
    adamw=lambda p: torch.optim.AdamW(p, 0.01),
    rmsprop=lambda p: torch.optim.RMSprop(p, 0.01),
)


@pytest.mark.parametrize("opt", optimizers)
@pytest.mark.parametrize(
    "kind, method, clip",
    [
        ("noisy", "auto", None),
        ("noisy", "double", 0.5),
        ("noisy", "stack", None),
        ("noisy", "fd", 0.5),
        ("gru", "auto", None),
        ("conv", "vmap", None),
    ],
)
def test_infinite_temperature_is_the_mean_to_the_bit(opt, kind, method, clip):
    ends = []
    for aligned in (True, False):
        n, args = net(kind, torch.float32)
        o = optimizers[opt](n.parameters())
        other = [-a if isinstance(a, torch.Tensor) else a for a in args]
        torch.manual_seed(5)
        for _ in range(3):
            if aligned:
                vamo_step(
                    n,
                    o,
                    lambda f, args=args: f(*args),
                    lambda f, other=other: f(*other).mean(),
                    AlignedWeighter(math.inf),
                    method=method,
                    clip=clip,
                )
            else:
                o.zero_grad()
                n(*args).mean().backward()
                if clip:
                    nn.utils.clip_grad_norm_(n.parameters(), clip)
                o.step()
        ends.append((flat(n), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


@given(seeds, st.sampled_from(["none", "val", "rms", "cos"]))
@few
def test_identical_tasks_are_one_task(seed, normalize):
    ends = []
    for aligned in (True, False):
        n, args = net("mlp", seed=seed)
        o = torch.optim.SGD(n.parameters(), 0.1)

        def one(f, args=args):
            return f(*args)[0]

        for _ in range(3):
            if aligned:
                vamo_step(
                    n,
                    o,
                    lambda f, one=one: one(f).expand(3),
                    lambda f, args=args: f(-args[0]).mean(),
                    AlignedWeighter(0.1, normalize),
                )
            else:
                o.zero_grad()
                one(n).backward()
                o.step()
        ends.append(flat(n))
    assert torch.allclose(*ends, atol=1e-12)


@given(seeds, st.sampled_from(["rms", "cos", "val"]))
@few
def test_scaling_and_permuting_the_losses(seed, normalize):
    def w(c=1.0, cv=1.0, perm=(0, 1, 2)):
        n, args = net("mlp", seed=seed)
        o = torch.optim.SGD(n.parameters(), 0.1)
        return vamo_step(
            n,
            o,
            lambda f: c * f(*args)[list(perm)],
            lambda f: cv * f(-args[0]).mean(),
            AlignedWeighter(0.2, normalize),
        ).w

    assert torch.allclose(w(10.0, 10.0 if normalize == "val" else 1.0), w(), atol=1e-7)
    assert torch.allclose(w(perm=(2, 0, 1)), w()[[2, 0, 1]], atol=1e-9)


def test_weights_are_constants_in_the_backward():
    n, args = net("mlp")
    o = torch.optim.SGD(n.parameters(), 1.0)
    start = flat(n)
    info = vamo_step(
        n, o, lambda f: f(*args), lambda f: f(-args[0]).mean(), AlignedWeighter(0.1, "rms")
    )
    m, _ = net("mlp")
    (info.w @ m(*args)).backward()
    step = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in m.parameters()
        ]
    )
    assert torch.allclose(flat(n), start - step, atol=1e-12) and info.w.std() > 0.01


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw"])
def test_prediction_is_first_order(opt):
    ratio = []
    for lr in (1e-3, 1e-5, 1e-7):
        n, args = net("mlp")
        o = optimizers[opt](n.parameters())
        for group in o.param_groups:
            group["lr"] = lr

        def train(f, args=args):
            return f(*args)

        def val(f, args=args):
            return f(-args[0]).mean()

        info = vamo_step(n, o, train, val, AlignedWeighter(0.1, "rms"))
        ratio.append(float(val(n).detach() - info.val_loss) / info.predicted_delta)
    assert abs(ratio[2] - 1) < 1e-3 and abs(ratio[1] - 1) < 1e-2
    if opt == "sgd":
        assert abs(info.predicted_delta / float(-1e-7 * info.w @ info.m) - 1) < 1e-6


def test_validation_leaves_batch_norm_and_flags_alone():
    n, args = net("noisy")
    o = torch.optim.SGD(n.parameters(), 0.0)
    ref, _ = net("noisy")
    torch.manual_seed(1)
    ref(*args)
    torch.manual_seed(1)
    vamo_step(
        n, o, lambda f: f(*args), lambda f: f.eval()(100 * args[0]).mean(), AlignedWeighter(1.0)
    )
    assert torch.equal(flat(n), flat(ref)) and all(x.training for x in n.modules())


def test_scope():
    n, args = net("mlp")

    def step(**kw):
        return vamo_step(
            net("mlp")[0],
            torch.optim.SGD(n.parameters(), 0.0),
            lambda f: f(*args),
            lambda f: f(-args[0]).mean(),
            AlignedWeighter(1.0),
            **kw,
        ).m

    shared, by_prefix, by_name = (
        step(scope="shared"),
        step(scope=("trunk.",)),
        step(scope=lambda k: k.startswith("trunk")),
    )
    assert torch.equal(shared, by_prefix) and torch.equal(shared, by_name)
    assert torch.allclose(step(), shared + step(scope=("heads",)), rtol=1e-10)
    for bad in ("body", (), ("nothing",)):
        with pytest.raises(ValueError, match="scope"):
            step(scope=bad)


def test_failures_update_nothing_and_are_named():
    n, args = net("mlp")
    o = torch.optim.Adam(n.parameters(), 0.1)
    start = flat(n)
    own = torch.Generator().manual_seed(0)
    good, val = lambda f: f(*args), lambda f: f(-args[0]).mean()

    one = AlignedWeighter(1.0)

    def step(train=good, val=val, w=one, **kw):
        return vamo_step(n, o, train, val, w, **kw)

    def noisy(f):
        return f(args[0] + torch.randn(args[0].shape, generator=own, dtype=torch.float64))

    cases = [
        (
            dict(train=lambda f: good(f) * torch.tensor([1.0, float("nan"), 1.0])),
            ValueError,
            "task 1",
        ),
        (dict(val=lambda f: val(f) * float("inf")), ValueError, "validation loss"),
        (dict(val=lambda f: f(*args)), ValueError, "one number"),
        (dict(val=lambda f: torch.tensor(1.0)), ValueError, "does not depend"),
        (dict(train=noisy, method="fd"), RuntimeError, "draws new noise"),
        (dict(w=AlignedWeighter(1.0, "cos"), method="jvp"), ValueError, "norms"),
        (dict(train=lambda f: good(f).detach()), ValueError, "no loss depends"),
    ]
    for kw, err, text in cases:
        with pytest.raises(err, match=text):
            step(**kw)
    assert torch.equal(flat(n), start)
    info = step(w=AlignedWeighter(1.0, abstain="skip"), val=lambda f: -good(f).sum())
    assert info.skipped and info.predicted_delta == 0 and torch.equal(flat(n), start)
    with pytest.raises(RuntimeError, match="task 1"):
        same_draw(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))


def test_one_pass_methods_see_one_draw():
    "A closure with a generator of its own is harmless where agreement and update share a graph"
    n, args = net("mlp")
    o = torch.optim.SGD(n.parameters(), 0.0)
    own, calls = torch.Generator().manual_seed(0), []

    def train(f):
        calls.append(1)
        return f(args[0] + torch.randn(args[0].shape, generator=own, dtype=torch.float64))

    for i, method in enumerate(("jvp", "double", "stack", "vmap")):
        vamo_step(n, o, train, lambda f: f(-args[0]).mean(), AlignedWeighter(1.0), method=method)
        assert len(calls) == i + 1


def test_overlap_is_told():
    n, args = net("mlp")

    def step(a, b):
        return vamo_step(
            n,
            torch.optim.SGD(n.parameters(), 0.0),
            lambda f: f(*args),
            lambda f: f(-args[0]).mean(),
            AlignedWeighter(1.0),
            train_ids=a,
            val_ids=b,
        )

    with pytest.warns(UserWarning, match="2 validation"):
        step([torch.arange(4), [7, 8]], [3, 8, 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step([range(4)], {"a", "b"})
        step(None, [1])


def test_method_that_failed_is_remembered():
    n, args = net("attention")
    o = torch.optim.SGD(n.parameters(), 0.0)
    alignment._told.clear()
    calls = []

    def train(f):
        calls.append(1)
        return f(*args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        infos = [
            vamo_step(n, o, train, lambda f: f(*args).mean(), AlignedWeighter(1.0))
            for _ in range(3)
        ]
    assert [i.method for i in infos] == ["stack"] * 3 and len(calls) == 5


def quadratic_run(A, c, lam, eta, steps=150, turn=1):
    """Gradient descent on aligned mixtures of quadratics: mean squared validation gradient, start,
    smoothness, longest direction, coverage, M, each [N]"""
    theta, gsq, dsq, alpha = torch.zeros(len(A), A.shape[-1], dtype=A.dtype), [], [], []
    L0, L = (
        0.5 * torch.einsum("nd,nde,ne->n", c[:, -1], A[:, -1], c[:, -1]),
        torch.linalg.eigvalsh(A[:, -1])[:, -1],
    )
    for _ in range(steps):
        G = torch.einsum("nkde,nke->nkd", A, theta[:, None] - c)
        gv = G[:, -1]
        m = torch.einsum("nkd,nd->nk", G[:, :-1], gv)
        d = torch.einsum("nk,nkd->nd", entropy_weights(turn * m, lam), G[:, :-1])
        gsq.append(gv.square().sum(-1))
        dsq.append(d.square().sum(-1))
        alpha.append(m.amax(-1) / gsq[-1])
        theta = theta - eta[:, None] * d
    gsq, dsq = torch.stack(gsq), torch.stack(dsq)
    return gsq.mean(0), L0, L, dsq.amax(0), torch.stack(alpha).amin(0), (dsq / gsq).amax(0).sqrt()


def random_quadratics(seed, N=16, K=3, D=4):
    A = normal(N, K + 1, D, D, seed=seed)
    A = A @ A.mT / D + 0.2 * torch.eye(D, dtype=A.dtype)
    return A, normal(N, 1, D, seed=seed) + 0.3 * normal(N, K + 1, D, seed=seed + 1)


@given(seeds, st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
@few
def test_bound_on_quadratics(seed, lam):
    A, c = random_quadratics(seed)
    eta = torch.full((len(A),), 0.05, dtype=A.dtype)
    mean, L0, L, longest, a, _ = quadratic_run(A, c, lam, eta)
    ok = a > 0
    bound = (L0 / (eta * 150) + lam * math.log(3) + L * eta * longest / 2) / a
    assert (mean[ok] <= bound[ok] * (1 + 1e-9)).all()


@given(seeds, st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
@few
def test_bound_without_remainder_on_quadratics(seed, lam):
    "With steps of at most alpha/(L M^2), both measured on the run itself"
    A, c = random_quadratics(seed)
    eta = torch.full((len(A),), 0.05, dtype=A.dtype)
    _, _, L, _, a, M = quadratic_run(A, c, lam, eta)
    covered = a > 0
    eta = torch.where(covered, (0.8 * a / (L * M**2)).clamp(max=0.05), eta)
    mean, L0, L, _, a, M = quadratic_run(A, c, lam, eta)
    ok = covered & (a > 0) & (eta <= a / (L * M**2))
    assert (mean[ok] <= (2 * (L0 / (eta * 150) + lam * math.log(3)) / a)[ok] * (1 + 1e-9)).all()


def test_the_bounds_can_fail():
    "Weights turned round, least aligned task first, break both"
    A, c = random_quadratics(0, N=64)
    eta = torch.full((len(A),), 0.01, dtype=A.dtype)
    mean, L0, L, longest, a, M = quadratic_run(A, c, 1e-3, eta, 2000, turn=-1)
    ok = (a > 0) & (eta <= a / (L * M**2))
    first, second = (
        (L0 / (eta * 2000) + 1e-3 * math.log(3) + L * eta * longest / 2) / a,
        2 * (L0 / (eta * 2000) + 1e-3 * math.log(3)) / a,
    )
    assert (mean > first)[ok].any() and (mean > second)[ok].any()


# ---- a step that fails changes nothing -----------------------------------------------------------
class Roots(nn.Module):
    "Losses whose gradient is NaN although they are finite: the mask comes after the root"

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.head = nn.Linear(6, 2)

    def losses(self, x, broken=False):
        off = self.head(self.body(x)).square().mean(0) + 0.1
        root = (off - off.detach()).sqrt()
        return off + torch.where(off < 0, root, torch.zeros_like(off)) if broken else off


def state_of(net, weighter):
    flags = torch.tensor([float(m.training) for m in net.modules()])
    kept = weighter.state_dict()
    score = torch.zeros(0) if kept["score"] is None else kept["score"]
    own = torch.tensor([float(kept["n"]), float(kept["gval_sq"])])
    return [v.clone() for v in net.state_dict().values()] + [
        flags,
        torch.get_rng_state(),
        score,
        own,
    ]


@pytest.mark.parametrize("method", ["auto", "jvp", "double", "stack", "vmap"])
@pytest.mark.parametrize("where", ["train", "validation", "raises"])
def test_a_failed_step_leaves_everything_as_it_was(method, where):
    net, x = Roots(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    opt, weighter = torch.optim.Adam(net.parameters(), 0.1), AlignedWeighter(0.5, "rms", ema=0.5)

    def train(n, broken):
        n.body[2].eval()
        if broken and where == "raises":
            raise RuntimeError("no batch")
        return n.losses(x, broken and where == "train")

    def val(n, broken):
        n.eval()
        return n.losses(x, broken and where == "validation").mean()

    def step(broken):
        return vamo_step(
            net, opt, lambda n: train(n, broken), lambda n: val(n, broken), weighter, method=method
        )

    step(False)
    before = state_of(net, weighter)
    with pytest.raises((ValueError, RuntimeError), match="NaN|not finite|no batch"):
        step(True)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net, weighter), strict=True))
    assert all(p.grad is None for p in net.parameters())
    step(False)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_is_not_positive_is_refused(clip):
    net, x = Roots(), torch.ones(3, 4)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="clip="):
        vamo_step(
            net,
            opt,
            lambda n: n.losses(x),
            lambda n: n.losses(x).mean(),
            AlignedWeighter(0.5),
            clip=clip,
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_norms_that_are_no_numbers_are_refused(bad):
    m = torch.tensor([1.0, 2.0])
    for kw in (dict(gval_sq=bad), dict(gval_sq=1.0, norms=torch.tensor([1.0, bad]))):
        weighter = AlignedWeighter(0.5, "cos")
        with pytest.raises(ValueError, match="must be finite and not negative"):
            weighter.update(m, **({"norms": torch.ones(2)} | kw))
        assert weighter.n == 0 and weighter.score is None


@pytest.mark.parametrize("method", ["stack", "vmap"])
def test_inner_products_of_half_precision_are_taken_in_single(method):
    "Gradients of size 100 in 4,000 numbers: their inner product is beyond 16 bits"
    theta = {"t": torch.zeros(4000, dtype=torch.float16)}
    slopes = torch.full((2, 4000), 100.0, dtype=torch.float16)
    slopes[1] *= 0.5

    def losses(p):
        return (slopes * p["t"]).sum(1)

    _, m = task_alignments(losses, theta, {"t": slopes[0]}, method)
    assert m.dtype == torch.float32 and m.tolist() == [4e7, 2e7]
