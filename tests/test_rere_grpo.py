"""ReRe's step: advantages over lists, three losses, the divergence, repaired lists"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.rere.grpo import (
    contrast_advantages,
    diversity,
    group_advantages,
    kl_k3,
    loss_kinds,
    policy_loss,
    repair_lists,
    sync_reference,
    zero_groups,
)
from llmpapers.rere.rewards import ItemReward, hit_mask

quick = settings(max_examples=60, deadline=None)
seeds, sizes = st.integers(0, 10_000), st.tuples(st.integers(1, 5), st.integers(2, 9))


def draw(seed, shape, p=0.7):
    "Log-probabilities of two policies, and a mask whose rows have a token each"
    g = rng(seed, "grpo")
    mask = torch.rand(shape, generator=g) < p
    mask[:, 0] = True
    a, b = (torch.randn(shape, generator=g, dtype=torch.float64) - 2 for _ in range(2))
    return a, b, mask


# ---- advantages ----------------------------------------------------------------------------------
@quick
@given(seeds, sizes, st.floats(1e-6, 1))
def test_advantages(seed, shape, eps):
    g = rng(seed, "rewards")
    r = torch.randint(-2, 3, shape, generator=g).float() / 3
    present = torch.rand(shape, generator=g) < 0.8
    A = group_advantages(r, eps, present)
    assert (A[~present] == 0).all()
    for b in range(len(r)):
        x = r[b][present[b]].double()
        if len(x) < 2 or (x == x[0]).all():
            assert (A[b] == 0).all()
            continue
        want = (x - x.mean()) / (x.std(unbiased=True) + eps)
        assert (A[b][present[b]] - want).abs().max() < 1e-5
        assert abs(float(A[b].sum())) < 1e-4
    assert torch.equal(zero_groups(r, present), (A == 0).all(-1))


@quick
@given(st.floats(-3, 3), st.integers(1, 16))
def test_a_constant_group_is_exactly_zero(value, G):
    assert (group_advantages(torch.full((2, G), value)) == 0).all()


def test_an_absent_slot_is_no_error_of_the_policy():
    items, target = torch.tensor([[4, 2, 9, -1, -1]]), torch.tensor([2])
    full = ItemReward()(items[:, :3], target)
    padded = ItemReward()(items, target)
    a = group_advantages(full.value, present=full.present)
    b = group_advantages(padded.value, present=padded.present)
    assert (b[:, :3] - a).abs().max() < 1e-5 and (b[:, 3:] == 0).all()


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 9))
def test_diversity_counts_distinct_items(seed, B, G):
    items = torch.randint(-1, 5, (B, G), generator=rng(seed, "div"))
    want = [len({i for i in row if i >= 0}) / G for row in items.tolist()]
    assert torch.allclose(diversity(items), torch.tensor(want))


# ---- the loss ------------------------------------------------------------------------------------
@quick
@given(seeds, sizes)
def test_k3(seed, shape):
    a, b, _ = draw(seed, shape)
    k = kl_k3(a, b)
    assert (k >= 0).all() and (kl_k3(a, a) == 0).all() and (k[(a - b).abs() > 1e-3] > 0).all()


@quick
@given(seeds, sizes, st.sampled_from(loss_kinds))
def test_no_advantage_and_no_divergence_is_no_gradient(seed, shape, kind):
    a, b, mask = draw(seed, shape)
    a.requires_grad_()
    zero = torch.zeros(shape[0], dtype=torch.float64)
    policy_loss(a, zero, mask, b, beta=0.0, kind=kind).backward()
    assert (a.grad == 0).all()


@quick
@given(seeds, sizes, st.sampled_from(loss_kinds), st.floats(0, 0.5))
def test_the_published_update_is_reinforce(seed, shape, kind, beta):
    "Ratio 1: the gradient is that of the plain policy gradient plus the divergence, by a loop"
    a, ref, mask = draw(seed, shape)
    adv = torch.randn(shape[0], generator=rng(seed, "adv"), dtype=torch.float64)
    x = a.clone().requires_grad_()
    policy_loss(x, adv, mask, ref, beta=beta, kind=kind).backward()
    want = torch.zeros(shape, dtype=torch.float64)
    n_tokens, n_rows = int(mask.sum()), shape[0]
    for i in range(shape[0]):
        length = int(mask[i].sum())
        per = n_tokens if kind == "dapo" else n_rows * length
        for t in range(shape[1]):
            if mask[i, t]:
                d = ref[i, t] - a[i, t]
                want[i, t] = (-adv[i] + beta * (1 - d.exp())) / per
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-6)


@quick
@given(seeds, st.integers(2, 8), st.integers(4, 12))
def test_a_catalogue_of_one_token_items(seed, G, n_items):
    "The closed form: logits move by the advantages of the items listed, nothing else"
    G = min(G, n_items)
    g = rng(seed, "one token")
    z = torch.randn(n_items, generator=g, dtype=torch.float64).requires_grad_()
    listed = torch.randperm(n_items, generator=g)[:G]
    r = torch.rand(1, G, generator=g)
    A = group_advantages(r)[0].double()
    policy_loss(z.log_softmax(0)[listed][:, None], A, torch.ones(G, 1).bool()).backward()
    want = torch.zeros(n_items, dtype=torch.float64).index_add_(0, listed, A / G)
    assert (-z.grad - want).abs().max() < 1e-6


@quick
@given(seeds, sizes, st.sampled_from(loss_kinds), st.sampled_from([None, 0.2]))
def test_parts_add_up(seed, shape, kind, clip):
    a, old, mask = draw(seed, shape)
    adv = torch.randn(shape[0], generator=rng(seed, "adv"), dtype=torch.float64)
    rest = dict(kind=kind, clip=clip)
    whole = policy_loss(a, adv, mask, old, old, **rest)
    denom = int(mask.sum()) if kind == "dapo" else len(mask)
    rows = [slice(0, 1), slice(1, None)] if len(mask) > 1 else [slice(0, 1)]
    parts = [policy_loss(a[r], adv[r], mask[r], old[r], old[r], denom=denom, **rest) for r in rows]
    assert abs(float(sum(parts) - whole)) < 1e-9
    per_token = adv[:, None].expand(shape)
    assert torch.equal(policy_loss(a, per_token, mask, old, old, **rest), whole)


@quick
@given(seeds, sizes)
def test_padding_may_hold_anything(seed, shape):
    a, b, mask = draw(seed, shape)
    adv = torch.ones(shape[0], dtype=torch.float64)
    bad = torch.where(mask, a, torch.nan)
    for kind in loss_kinds:
        want = policy_loss(a, adv, mask, b, kind=kind)
        assert torch.equal(
            policy_loss(bad, adv, mask, torch.where(mask, b, torch.inf), kind=kind), want
        )


def test_the_clip_acts_away_from_one():
    a = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0]])  # the first token is e times as likely as it was
    policy_loss(a, torch.ones(1), torch.ones(1, 2).bool(), old_logp=old, clip=0.2).backward()
    assert a.grad[0, 0] == 0 and a.grad[0, 1] < 0


# ---- repair and reference ------------------------------------------------------------------------
@quick
@given(seeds, st.integers(1, 6), st.integers(2, 8))
def test_repaired_lists(seed, B, G):
    g = rng(seed, "repair")
    items = torch.stack([torch.randperm(20, generator=g)[:G] for _ in range(B)])
    target = torch.randint(20, (B,), generator=g)
    hit = hit_mask(items, target)
    fixed, lost = repair_lists(items, hit, target)
    assert torch.equal(lost, ~hit.any(-1)) and torch.equal(fixed[~lost], items[~lost])
    assert hit_mask(fixed, target).any(-1).all()
    A = contrast_advantages(hit_mask(fixed, target))
    assert (A.sum(-1) == 0).all() and ((A == 1).sum(-1) == 1).all()
    for b in range(B):
        right = fixed[b] == target[b]
        assert A[b].argmax() == right.int().argmax() and A[b].argmin() == (~right).int().argmax()


def test_a_list_without_both_has_no_contrast():
    assert (contrast_advantages(torch.tensor([[True, True], [False, False]])) == 0).all()
    alone = torch.tensor([[True, False]]), torch.tensor([[True, False]])
    assert (contrast_advantages(*alone) == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_the_reference_moves(alpha):
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    want = [alpha * x + (1 - alpha) * y for x, y in zip(a.parameters(), b.parameters())]
    sync_reference(a, b, alpha)
    assert all((x - y).abs().max() < 1e-6 for x, y in zip(want, b.parameters()))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, m: policy_loss(a, torch.ones(2), m, kind="ppo"), "kind='ppo'"),
        (lambda a, m: policy_loss(a, torch.ones(3), m), r"adv \(3,\)"),
        (lambda a, m: policy_loss(a, torch.ones(2), m, beta=-1.0), "beta=-1.0"),
        (lambda a, m: policy_loss(a, torch.ones(2), m[:, :1]), "mask"),
        (lambda a, m: policy_loss(a, torch.tensor([1.0, torch.nan]), m), "adv is NaN in 1 of 2"),
        (lambda a, m: group_advantages(torch.ones(3)), "rewards has shape"),
        (lambda a, m: group_advantages(torch.ones(2, 3), present=m), "present has shape"),
        (lambda a, m: group_advantages(torch.full((1, 2), torch.nan)), "NaN"),
        (lambda a, m: sync_reference(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 2.0), "alpha="),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4), torch.ones(2, 4).bool())
