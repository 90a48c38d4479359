"""Properties of the ranking metrics: against loops and references, under ties, permutations and
blocks"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from llmpapers.core.ranking import (
    as_relevance,
    exact_search,
    hit_rate_at_k,
    mean_metric,
    mrr_at_k,
    ndcg_at_k,
    ndcg_loop,
    recall_at_k,
    top_k,
)

seeds = st.integers(0, 10**6)


def case(seed, ties=True):
    g = np.random.default_rng(seed)
    q, c = g.integers(1, 8), g.integers(1, 40)
    s = (
        g.integers(0, 5, (q, c)).astype(float)
        if ties
        else g.permutation(q * c).reshape(q, c).astype(float)
    )
    return s, g.choice(4, (q, c), p=[0.7, 0.1, 0.1, 0.1]), int(g.integers(1, c + 3))


@given(seeds, st.sampled_from(["linear", "exponential"]))
@settings(max_examples=60, deadline=None)
def test_ndcg_equals_the_loop_with_ties(seed, gain):
    s, y, k = case(seed)
    np.testing.assert_allclose(ndcg_at_k(s, y, k, gain), ndcg_loop(s, y, k, gain), atol=1e-12)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_ndcg_equals_sklearn_without_ties(seed):
    s, y, k = case(seed, ties=False)
    for i in range(len(s)):
        if y[i].any() and s.shape[1] > 1:
            assert abs(ndcg_at_k(s, y, k)[i] - ndcg_score([y[i]], [s[i]], k=k)) < 1e-6


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_equals_pytrec_eval(seed):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    s, y, _ = case(seed, ties=False)
    some = [i for i in range(len(s)) if y[i].any()]
    if not some:
        return
    run = {str(i): {f"d{c}": float(v) for c, v in enumerate(s[i])} for i in some}
    qrel = {str(i): {f"d{c}": int(y[i, c]) for c in np.nonzero(y[i])[0]} for i in some}
    ref = pytrec_eval.RelevanceEvaluator(
        qrel, {"ndcg_cut.10", "recall.10", "recip_rank", "success.10"}
    ).evaluate(run)
    for key, ours in (
        ("ndcg_cut_10", ndcg_at_k(s, y)),
        ("recall_10", recall_at_k(s, y)),
        ("recip_rank", mrr_at_k(s, y, s.shape[1])),
        ("success_10", hit_rate_at_k(s, y)),
    ):
        np.testing.assert_allclose(ours[some], [ref[str(i)][key] for i in some], atol=1e-6)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_top_k_is_a_stable_sort(seed):
    s, _, k = case(seed)
    np.testing.assert_array_equal(top_k(s, k).ids, np.argsort(-s, 1, kind="stable")[:, :k])


@given(seeds, st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_search_in_blocks_is_search_in_one(seed, block):
    g = np.random.default_rng(seed)
    q, d = g.integers(-2, 3, (4, 3)).astype(float), g.integers(-2, 3, (30, 3)).astype(float)
    np.testing.assert_array_equal(exact_search(q, d, 7, block).ids, top_k(q @ d.T, 7).ids)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_forms_of_relevance_agree(seed):
    s, y, k = case(seed)
    rows = [{int(c): int(v) for c, v in enumerate(r) if v} for r in y]
    np.testing.assert_array_equal(ndcg_at_k(s, y, k), ndcg_at_k(s, rows, k))
    np.testing.assert_array_equal(
        ndcg_at_k(s, y, k), ndcg_at_k(top_k(s, k), as_relevance(y, s.shape[1]), k)
    )


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_bounds_and_perfect_order(seed):
    s, y, k = case(seed)
    for f in (ndcg_at_k, mrr_at_k, hit_rate_at_k, recall_at_k):
        v = f(s, y, k)
        assert (np.isnan(v) == ~(y > 0).any(1)).all() and (
            (v >= 0) & (v <= 1 + 1e-12) | np.isnan(v)
        ).all()
    perfect = ndcg_at_k(y.astype(float), y, k)
    assert np.allclose(perfect[~np.isnan(perfect)], 1)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: top_k(np.array([[np.nan]]), 1), "scores has NaN"),
        (lambda: top_k(np.ones((1, 2)), 0), "k=0"),
        (lambda: top_k(np.ones(3), 1), "scores has shape"),
        (lambda: ndcg_at_k(np.ones((2, 3)), np.array([0])), "relevance has 1 queries"),
        (lambda: ndcg_at_k(np.ones((1, 3)), np.array([5])), "document 5"),
        (lambda: ndcg_at_k(np.ones((1, 3)), np.array([0]), gain="log"), "gain='log'"),
        (lambda: exact_search(np.ones((1, 2)), np.ones((1, 3))), "same width"),
        (lambda: as_relevance([{0: -1.0}], 2), "not negative"),
        (lambda: mean_metric([np.nan]), "no query"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        bad()
