"""ReRe's rewards: hits, penalties by rank, absent slots, strings that two items share"""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.rere.rewards import (
    ItemReward,
    cf_reward,
    hit_mask,
    rank_weights,
    ranking_reward,
    reward_kinds,
    rule_reward,
    semantic_reward,
)

quick = settings(max_examples=60, deadline=None)
seeds, groups = st.integers(0, 10_000), st.integers(1, 20)


def lists(seed, B, G, n_items=30, absent=0):
    "Random lists of distinct items with empty slots at the end, and targets"
    g = rng(seed, "lists")
    items = torch.stack([torch.randperm(n_items, generator=g)[:G] for _ in range(B)])
    if absent:
        items[:, G - absent :] = -1
    return items, torch.randint(n_items, (B,), generator=g)


@quick
@given(seeds, groups, st.sampled_from(["all", "negatives"]), st.booleans())
def test_the_penalty(seed, G, normalize, zero_if_no_hit):
    items, target = lists(seed, 8, G)
    hit = hit_mask(items, target)
    r = ranking_reward(hit, normalize, zero_if_no_hit)
    w = rank_weights(torch.ones(8, G).bool())
    assert torch.equal(r[hit], torch.zeros(int(hit.sum())))
    for b in range(8):
        wrong = r[b][~hit[b]]
        if not hit[b].any() and zero_if_no_hit:
            assert (wrong == 0).all()
            continue
        assert (wrong < 0).all() and (wrong.diff() > 0).all()
        if len(wrong):
            want = -1.0 if normalize == "negatives" else float(w[b][hit[b]].sum()) - 1
            assert abs(float(r[b].sum()) - want) < 1e-5


def test_the_weights_of_the_published_code():
    w = rank_weights(torch.ones(1, 16).bool())[0]
    known = (
        ".1638 .1033 .0819 .0705 .0634 .0583 .0546 .0517 .0493 .0473 .0457 .0443 .0430 .0419 .0409"
    )
    known = torch.tensor([float(x) for x in [*known.split(), ".0401"]])
    assert (w - known).abs().max() < 6e-5
    loop = [-(1 / torch.log2(torch.tensor(r + 2.0))) for r in range(16)]
    total = -sum(loop)
    hit = torch.zeros(1, 16).bool()
    hit[0, 3] = True
    want = torch.tensor([0.0 if r == 3 else float(loop[r] / total) for r in range(16)])
    assert (ranking_reward(hit)[0] - want).abs().max() < 1e-6


@quick
@given(seeds, st.integers(2, 12), st.integers(1, 5), st.sampled_from(reward_kinds[:3]))
def test_absent_slots_change_nothing(seed, G, absent, kind):
    items, target = lists(seed, 6, G)
    longer = torch.cat([items, torch.full((6, absent), -1)], 1)
    a, b = ItemReward(kind)(items, target), ItemReward(kind)(longer, target)
    assert (b.value[:, :G] - a.value).abs().max() < 1e-6 and (b.value[:, G:] == 0).all()
    assert not b.present[:, G:].any() and not b.hit[:, G:].any()


@quick
@given(seeds)
def test_items_with_one_string_are_hits_of_each_other(seed):
    items, _ = lists(seed, 12, 6, n_items=12)
    leaf = torch.arange(12) // 2 * 2  # items 0 and 1, 2 and 3, ... have one title
    target = items[:, 3]
    twin = torch.where(target % 2 == 0, target + 1, target - 1)
    assert hit_mask(items, target, leaf)[:, 3].all() and hit_mask(items, twin, leaf)[:, 3].all()
    stands = leaf[items]
    assert torch.equal(hit_mask(stands, twin, leaf), stands == leaf[twin][:, None])
    assert torch.equal(rule_reward(items, target), (items == target[:, None]).float())


def test_one_slot():
    hit = torch.tensor([[True], [False]])
    for normalize in ("all", "negatives"):
        r = ranking_reward(hit, normalize)
        assert r.tolist() == [[0.0], [0.0]] and r.isfinite().all()
    assert ranking_reward(hit, zero_if_no_hit=False).tolist() == [[0.0], [-1.0]]


def test_similarity_and_scores():
    e = torch.randn(30, 4, generator=rng(0, "e"))
    items, target = lists(1, 5, 6, absent=2)
    s = semantic_reward(items, target, e)
    want = torch.nn.functional.cosine_similarity(e[items[0, 1]], e[target[0]], dim=0)
    assert (s[0, 1] - want).abs() < 1e-5 and (s[:, 4:] == 0).all() and s.abs().max() <= 1 + 1e-5
    table = torch.randn(5, 30, generator=rng(0, "t"))
    c = cf_reward(items, table)
    assert torch.equal(c[:, :4], table.gather(1, items[:, :4])) and (c[:, 4:] == 0).all()
    asked = []

    def scores(histories):
        asked.append(histories)
        return table

    r = ItemReward("collaborative", scores=scores)(items, target, [[1], [2], [3], [4], [5]])
    assert torch.equal(r.value, c) and asked == [[[1], [2], [3], [4], [5]]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i, t: hit_mask(i, torch.tensor([3, 99]), torch.arange(30)), "target=99"),
        (lambda i, t: hit_mask(i, torch.tensor([3, -1])), "target=-1"),
        (lambda i, t: hit_mask(i, t, torch.arange(2)), "catalogue of 2 items|has 2 items"),
        (lambda i, t: hit_mask(i, t[:1]), r"target has shape \(1,\)"),
        (lambda i, t: rule_reward(i[0], t), "items has shape"),
        (lambda i, t: ranking_reward(i > 3, "both"), "normalize='both'"),
        (lambda i, t: ranking_reward(i[0] > 3), "hit has shape"),
        (lambda i, t: ranking_reward(i > 3, present=i[:, :2] > 0), "present has shape"),
        (lambda i, t: semantic_reward(i, t, torch.zeros(2, 3)), "embeddings has 2 rows"),
        (lambda i, t: cf_reward(i, torch.zeros(1, 30)), "scores has shape"),
        (lambda i, t: ItemReward("semantic"), "embeddings is None"),
        (lambda i, t: ItemReward("collaborative"), "scores is None"),
    ],
)
def test_bad_input_is_named(call, message):
    items, target = lists(0, 2, 4)
    with pytest.raises(ValueError, match=message):
        call(items, target)


def test_fields_of_the_reward_are_checked():
    for name, bad in (("kind", "click"), ("normalize", "sum"), ("zero_if_no_hit", 2)):
        with pytest.raises(ValueError, match=f"{name}="):
            ItemReward(**{name: bad})
    assert {f.name for f in fields(ItemReward)} >= {"kind", "normalize", "zero_if_no_hit", "leaf"}
