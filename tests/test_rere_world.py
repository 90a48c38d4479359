"The worlds of ReRe: their law is exact, whatever the sizes, and windows may begin anywhere"

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.rere.data import make_sid_world as same_function
from llmpapers.rere.world import (
    book_catalogue,
    make_sid_world,
    make_title_world,
    successor_law,
)


def by_paths(w, history):
    "Law of the next item as a sum over hidden paths and over which items were random"
    n_clusters, n_items = w.item_law.shape
    T, q = w.transition.numpy(), w.item_law.numpy()
    law = np.zeros(n_items)
    for z0 in range(n_clusters):
        states = {z0: 1.0 / n_clusters}
        for i in history:
            new = dict.fromkeys(range(n_clusters), 0.0)
            for (a, p), b in product(states.items(), range(n_clusters)):
                stays = w.eps / n_items if a == b else 0.0
                new[b] += p * ((1 - w.eps) * T[a, b] * q[b, i] + stays)
            states = new
        for (a, p), b in product(states.items(), range(n_clusters)):
            stays = w.eps / n_items if a == b else 0.0
            law += p * ((1 - w.eps) * T[a, b] * q[b] + stays)
    return law / law.sum()


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 10**6),
    st.integers(14, 27),
    st.floats(0.01, 1.0),
    st.integers(0, 4),
)
def test_filter_is_the_sum_over_paths(seed, n_items, eps, length):
    w = make_sid_world(n_items, n_users=3, seq_len=5, eps=eps, seed=seed, n_codes=3)
    for row in w.sequences[:, :length].tolist():
        got = w.next_item_probs([row])[0].numpy()
        np.testing.assert_allclose(got, by_paths(w, row), atol=1e-12)
        assert abs(got.sum() - 1) < 1e-9 and (got >= eps / n_items - 1e-12).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(5, 40))
def test_successors_balance(seed, n):
    law = successor_law(n, (0.6, 0.3, 0.1), rng(seed, "test"))
    ones = torch.ones(n, dtype=torch.float64)
    assert torch.allclose(law.sum(0), ones) and torch.allclose(law.sum(1), ones)
    assert law.diagonal().sum() == 0 and ((law > 0).sum(1) == 3).all()


def test_groups_keep_the_first_successor():
    groups = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2])
    law = successor_law(8, (0.6, 0.3, 0.1), rng(0, "groups"), groups)
    assert (groups[law.argmax(1)] == groups).all()
    with pytest.raises(ValueError, match="a group has a single cluster"):
        successor_law(4, (0.7, 0.3), rng(0, "groups"), torch.tensor([0, 0, 1, 1, 2])[[0, 1, 2, 4]])


def test_windows_have_one_law_wherever_they_begin():
    "Mean log-probability of what was taken, early and late in the sequences, is the expected one"
    w = make_sid_world(60, n_users=4000, seq_len=9, seed=3, n_codes=4)
    for start in (0, 4):
        history, taken = w.sequences[:, start : start + 4], w.sequences[:, start + 4]
        p = w.next_item_probs(history)
        mean, square = (p * p.log()).sum(1), (p * p.log() ** 2).sum(1)
        off = p.log().gather(1, taken[:, None])[:, 0] - mean
        assert abs(off.sum() / (square - mean**2).sum().sqrt()) < 4.5
    early, late = (torch.bincount(w.cluster[w.sequences[:, t]]) for t in (0, 8))
    share = len(w.sequences) / len(w.transition)
    assert (early - share).abs().max() < 6 * share**0.5 + 0.1 * share
    assert (late - share).abs().max() < 6 * share**0.5 + 0.1 * share


def test_same_seed_same_world():
    a, b = (make_sid_world(50, n_users=7, seed=5, n_codes=4) for _ in range(2))
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.__dict__.values(), b.__dict__.values())
        if isinstance(x, torch.Tensor)
    )
    assert not torch.equal(a.sequences, make_sid_world(50, n_users=7, seed=6, n_codes=4).sequences)
    assert torch.equal(a.sample(4, 3, 1), b.sample(4, 3, 1))
    assert not torch.equal(a.sample(4, 3, 1), a.sample(4, 3, 2))
    assert same_function is make_sid_world


def test_books():
    books = book_catalogue()
    assert len(books) >= 200 and len({b.title for b in books}) == len(books)
    assert all(b.title == " ".join(b.title.split()) and b.title.isascii() for b in books)
    w = make_title_world(n_users=20, seed=1)
    genre = np.array([b.genre for b in books])
    of_cluster = {int(c): g for c, g in zip(w.cluster, genre)}
    nearest = w.transition.argmax(1).tolist()
    assert all(of_cluster[c] == of_cluster[n] for c, n in enumerate(nearest))
    assert len(w.sid.unique(dim=0)) == len(books) == len(w.titles)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: make_sid_world(eps=1.5), "eps=1.5"),
        (lambda: make_sid_world(eps=float("nan")), "eps=nan"),
        (lambda: make_sid_world(n_users=0), "n_users=0"),
        (lambda: make_sid_world(zipf=-1), "zipf=-1"),
        (lambda: make_title_world([("a", 1, 1), ("a", 2, 1)]), "title 'a' twice"),
        (lambda: make_sid_world(n_users=3).next_item_probs(torch.zeros(2, 2)), "integers"),
        (lambda: make_sid_world(n_users=3).next_item_probs([[-2]]), "item -2"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_cannot_happen_is_said():
    w = make_sid_world(20, n_users=2, eps=0.0, n_codes=3, seed=0)
    reach = (w.transition[w.cluster] @ w.item_law) > 0
    first, second = (~reach).nonzero()[0].tolist()
    with pytest.raises(ValueError, match="cannot happen"):
        w.next_item_probs([[first, second]])
