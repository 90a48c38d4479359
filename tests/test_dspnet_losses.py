"Contrastive weights and losses, the softmax in pieces, and ranks with ties"

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.dspnet.data import make_interplay_world
from llmpapers.dspnet.evaluate import compare_all, expected_metrics, ranking_metrics
from llmpapers.dspnet.losses import (
    WeightHeads,
    ccr_loss,
    ccr_weights,
    chunked_ce,
    mmd,
    shared_information,
    weight_entropy,
    weight_kinds,
)


@st.composite
def batch(draw):
    g = rng(draw(st.integers(0, 10**6)), "batch")
    b, d = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    return torch.randn(2, b, d, generator=g), torch.randint(1, 5, (b,), generator=g), g


@settings(deadline=None, max_examples=40)
@given(batch(), st.sampled_from(weight_kinds), st.floats(0.05, 2))
def test_contrastive_loss(made, kind, tau):
    (z, z2), targets, g = made
    cond = torch.randn(len(z), 5, generator=g, requires_grad=True)
    weights = ccr_weights(kind, cond, targets, heads=WeightHeads(5))
    assert torch.allclose(weights.sum(1), torch.ones(len(z)), atol=1e-5) and (weights >= 0).all()
    loss = ccr_loss(z, z2, weights, tau)
    order = torch.randperm(len(z), generator=g)
    moved = ccr_loss(z[order], z2[order], weights[order][:, order], tau)
    assert torch.allclose(loss, moved, atol=1e-4)
    assert torch.allclose(loss, ccr_loss(5 * z, 0.2 * z2, weights, tau), atol=1e-4)
    assert float(loss) > float(weight_entropy(weights.detach())) - 1e-4  # its least value
    equal = ccr_loss(torch.ones_like(z), torch.ones_like(z), weights, tau)
    assert math.isclose(float(equal), math.log(len(z)), abs_tol=1e-4)
    if loss.requires_grad:
        assert torch.autograd.grad(loss, cond, allow_unused=True) == (None,)


@settings(deadline=None, max_examples=30)
@given(batch())
def test_targets_that_differ_are_the_identity(made):
    (z, z2), _, _ = made
    weights = ccr_weights("target", targets=torch.arange(len(z)))
    assert torch.equal(weights, torch.eye(len(z)))
    logits = F.normalize(z, eps=1e-6) @ F.normalize(z2, eps=1e-6).T / 0.2
    want = F.cross_entropy(logits, torch.arange(len(z)))
    assert torch.allclose(ccr_loss(z, z2, weights), want, atol=1e-4)


def test_zero_states_are_finite():
    z = torch.zeros(4, 3, requires_grad=True)
    loss = ccr_loss(z, torch.zeros(4, 3), torch.eye(4))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 50), st.integers(1, 60))
def test_pieces_of_a_softmax(seed, n, items, chunk):
    g = rng(seed, "pieces")
    z, w = torch.randn(n, 4, generator=g), torch.randn(items, 4, generator=g)
    labels = torch.randint(items, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = -100
    pairs = []
    for f in (lambda a, b: F.cross_entropy(a @ b.T, labels, reduction="sum"), None):
        a, b = z.clone().requires_grad_(), w.clone().requires_grad_()
        count = max(1, int((labels != -100).sum()))
        loss = f(a, b) / count if f else chunked_ce(a, b, labels, chunk)
        loss.backward()
        pairs.append((loss.detach(), a.grad, b.grad))
    for x, y in zip(*pairs):
        assert torch.allclose(x, y, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5))
def test_ranks_do_not_depend_on_the_order_of_candidates(seed, n, levels):
    g = rng(seed, "ranks")
    scores = torch.randint(levels, (6, n), generator=g).float()
    targets = torch.randint(1, n + 1, (6,), generator=g)
    order = torch.randperm(n, generator=g)
    a = ranking_metrics(scores, targets, (1, 3, 20))
    b = ranking_metrics(scores[:, order], order.argsort()[targets - 1] + 1, (1, 3, 20))
    assert a == pytest.approx(b, abs=1e-12)
    assert a["users"] == 6 and a["items"] == n


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 50))
def test_constant_scores_are_chance(n, k):
    got = ranking_metrics(torch.zeros(n, n), torch.arange(1, n + 1), (k,))
    assert got[f"HR@{k}"] == pytest.approx(min(1, k / n))
    assert got["MRR"] == pytest.approx(sum(1 / r for r in range(1, n + 1)) / n)
    assert got["AUC"] == pytest.approx(0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_no_list_is_above_the_ceiling(seed, n):
    g = rng(seed, "law")
    law = torch.rand(5, n, generator=g).softmax(1)
    k = int(torch.randint(1, n + 1, (1,), generator=g))
    any_list = torch.rand(5, n, generator=g).argsort(1)[:, :k] + 1
    best = law.argsort(1, descending=True)[:, :k] + 1
    for name, value in expected_metrics(any_list, law, (k,)).items():
        assert value <= expected_metrics(best, law, (k,))[name] + 1e-9


def test_a_ceiling_is_the_value_of_the_best_list_and_no_longer_than_the_catalogue():
    world = make_interplay_world(20, seed=0)
    best = world.next_item_probs.argsort(1, descending=True)[:, :7] + 1
    assert world.ceiling(7) == pytest.approx(
        expected_metrics(best, world.next_item_probs, (7,)), abs=1e-6
    )
    with pytest.raises(ValueError, match="k="):
        world.ceiling(world.n_items + 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_shared_information_is_not_negative(seed):
    g = rng(seed, "shared")
    p = torch.rand(4, 3, generator=g).softmax(1)
    law = torch.rand(4, 3, 6, generator=g).softmax(2)
    assert (shared_information(p, law) > -1e-9).all()
    assert shared_information(p, law[:, :1].expand(-1, 3, -1)).abs().max() < 1e-6


def test_mmd_of_the_same_states_is_zero():
    x = torch.randn(20, 4, generator=rng(0, "mmd"))
    assert abs(float(mmd(x, x))) < 1e-6


bad_metrics = {
    "ks": lambda: ranking_metrics(torch.rand(2, 3), torch.tensor([1, 2]), ks=10),
    "targets: need integers": lambda: ranking_metrics(torch.rand(2, 3), torch.tensor([1.0, 2.0])),
    "n_items": lambda: ranking_metrics(torch.rand(2, 3), torch.tensor([1, 4])),
    "ids: need integers": lambda: expected_metrics(torch.ones(1, 1), torch.ones(1, 1), (1,)),
    "probs": lambda: expected_metrics(torch.tensor([[1]]), torch.full((1, 2), 5.0), (1,)),
    "probs: every row": lambda: expected_metrics(
        torch.tensor([[1]]), torch.tensor([[float("nan"), 1.0]]), (1,)
    ),
    "need the same rows": lambda: expected_metrics(
        torch.zeros(0, 1).long(), torch.zeros(0, 2), (1,)
    ),
    "alone": lambda: compare_all(dict(a=[1.0, 2.0]), "a"),
}


@pytest.mark.parametrize("message", bad_metrics)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        bad_metrics[message]()
