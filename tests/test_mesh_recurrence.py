"""MeSH: the memory, the schemes and the counts, as properties"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import n_params
from llmpapers.mesh.layout import (
    Layout,
    RecursiveConfig,
    count_parameters,
    forward_flops,
    mesh_overhead_flops,
)
from llmpapers.mesh.model import make_lm
from llmpapers.mesh.recurrence import MeshRouters, mesh_coefficients, mesh_cycle, run_scheme
from llmpapers.mesh.rivals import Injection, make_between

pytestmark = pytest.mark.timeout(200)
few = settings(max_examples=40, deadline=None)
schemes = st.sampled_from(
    [
        "base",
        "residual",
        "anchor",
        "anchor_emb",
        "residual+anchor",
        "residual+anchor+anchor_emb",
        "static",
        "dynamic",
        "mesh",
        "step",
        "adapter",
        "injection",
    ]
)


def toy(loops, slots, width, seed):
    "Embeddings, blocks and routers in double precision"
    g = torch.Generator().manual_seed(seed)
    first, loop = (torch.randn(width, width, generator=g, dtype=torch.float64) for _ in range(2))
    h_emb = torch.randn(2, 5, width, generator=g, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        routers = MeshRouters(width, loops + 1, slots).double()
    return (
        h_emb,
        lambda h: h + torch.tanh(h @ first),
        lambda h, t: h + torch.tanh(h @ loop),
        routers,
    )


@few
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_unrolled_is_slots(loops, slots, width, seed):
    "Values and all gradients, and the memory holds what was written"
    h_emb, prelude, core, routers = toy(loops, slots, width, seed)
    found = []
    for impl in ("unrolled", "slots"):
        h, trace = run_scheme("mesh", h_emb, prelude, core, loops, routers, impl)
        found.append([h, *torch.autograd.grad(h.sin().sum(), [h_emb, *routers.parameters()])])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-10)
    for c in range(loops + 1):
        assert torch.allclose(trace.slots(c).sum(-2), h_emb + sum(trace.outputs[: c + 1]))
        assert (trace.alpha[c] >= 0).all() and (trace.alpha[c] <= 1 + 1e-12).all()


@few
@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 99), st.data())
def test_coefficients_match_the_cycle(n, slots, seed, data):
    "The coefficients give the read of a memory that is written step by step"
    g = torch.Generator().manual_seed(seed)
    w, r = torch.rand(2, n, slots, generator=g, dtype=torch.float64).softmax(-1)
    ys = torch.randn(n + 1, 3, generator=g, dtype=torch.float64)
    memory = torch.zeros(slots, 3, dtype=torch.float64)
    memory[0] = ys[0]
    for c in range(n):
        memory, read = mesh_cycle(memory, ys[c + 1], w[c], r[c])
        alpha = mesh_coefficients(list(w[: c + 1]), r[c])
        assert torch.allclose(alpha @ ys[: c + 2], read)


@few
@given(st.integers(1, 4), st.integers(0, 99))
def test_one_slot_is_the_running_sum(loops, seed):
    h_emb, prelude, core, routers = toy(loops, 1, 4, seed)
    h, trace = run_scheme("mesh", h_emb, prelude, core, loops, routers)
    assert torch.allclose(h, h_emb + sum(trace.outputs))


@few
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from(["base", "residual"]))
def test_one_hot_routers_reduce_exactly(loops, seed, scheme):
    h_emb, prelude, core, routers = toy(loops, loops + 3, 4, seed)
    with torch.no_grad():
        routers.weight.zero_()
        routers.bias.fill_(-1e4)
        for c in range(loops + 1):
            slot = c + 1 if scheme == "base" else 1
            routers.bias[c, [slot, routers.n_slots + slot]] = 1e4
    mesh, _ = run_scheme("mesh", h_emb, prelude, core, loops, routers)
    plain, _ = run_scheme(scheme, h_emb, prelude, core, loops)
    assert torch.allclose(mesh, plain, rtol=1e-12, atol=1e-12)


@few
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 5), st.integers(1, 5))
def test_layout_round_trip(prelude, core, coda, loops):
    layout = Layout(prelude, core, coda, loops)
    assert Layout.parse(str(layout)) == layout
    assert layout.computed - layout.stored == (loops - 1) * core


@given(st.text(alphabet="0123456789+R- ", max_size=9))
def test_bad_layouts_are_refused(text):
    import re

    good = re.fullmatch(r"\d+\+0*[1-9]\d*R0*[1-9]\d*\+\d+", text)
    if good:
        Layout.parse(text)
    else:
        with pytest.raises(ValueError, match="layout="):
            Layout.parse(text)


@settings(max_examples=30, deadline=None)
@given(
    schemes,
    st.sampled_from(["none", "lora", "mlp"]),
    st.sampled_from(["pre", "peri", "output"]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_counts_are_those_of_the_model(scheme, per_loop, norm, loops, tie_core, tie_head):
    per_loop = per_loop if tie_core else "none"
    cfg = RecursiveConfig(
        d_model=16,
        n_heads=2,
        layout=f"1+1R{loops}+1",
        scheme=scheme,
        per_loop=per_loop,
        norm=norm,
        tie_core=tie_core,
        tie_word_embeddings=tie_head,
        vocab_size=20,
        lora_rank=3,
    )
    model = make_lm(cfg)
    assert n_params(model) == count_parameters(cfg)["total"]
    between = sum(p.numel() for p in model.model.between.parameters())
    assert between == count_parameters(cfg)["router"]


def test_published_counts():
    "Table 5 of the paper, and the operations of its second version"
    same = dict(layout="4+8R2+4", d_model=2048, n_heads=16, vocab_size=52352)
    stack = RecursiveConfig(**same, scheme="base", tie_core=False)
    base, mesh = (RecursiveConfig(**same, scheme=s) for s in ("base", "mesh"))
    assert count_parameters(stack)["total"] == 1_423_036_416
    assert count_parameters(base)["total"] == 1_020_170_240
    assert count_parameters(mesh)["total"] == 1_020_231_710
    assert count_parameters(mesh)["router"] == 61_470
    assert mesh_overhead_flops(4096, mesh) == 755_097_600
    assert forward_flops(4096, base) == forward_flops(4096, stack)


def test_first_cycle_can_see_the_output():
    cfg = RecursiveConfig(d_model=16, n_heads=2, router_input="output")
    assert make_between(cfg).first_sees == "output"
    ids = torch.arange(4, 14)[None]
    a, b = (
        make_lm(RecursiveConfig(d_model=16, n_heads=2, router_input=x)) for x in ("input", "output")
    )
    b.load_state_dict(a.state_dict())
    assert not torch.allclose(a(ids).logits, b(ids).logits)


@few
@given(st.floats(-8, 8), st.integers(1, 6))
def test_injection_is_stable(rate, width):
    "Whatever is learned, less than everything is carried, and nothing changes its sign"
    between = Injection(width)
    with torch.no_grad():
        between.rate_bias.fill_(rate)
    assert (between.carry >= 0).all() and (between.carry <= 1).all()
