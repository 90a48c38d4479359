"""Properties of the ranking metrics: against loops and references, under ties, permutations and
blocks"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from llmpapers.core.ranking import (
    Ranked,
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


@given(seeds, st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_pytrec_eval(seed, ties):
    "Graded judgements, with and without equal scores; names fall, so its rule for ties is ours"
    pytrec_eval = pytest.importorskip("pytrec_eval")
    s, y, _ = case(seed, ties)
    some = [i for i in range(len(s)) if y[i].any()]
    if not some:
        return
    name = [f"d{99 - c:02d}" for c in range(s.shape[1])]
    run = {str(i): dict(zip(name, map(float, s[i]), strict=True)) for i in some}
    qrel = {str(i): {name[c]: int(y[i, c]) for c in np.nonzero(y[i])[0]} for i in some}
    wanted = {"ndcg_cut.5,10", "recall.5,10", "recip_rank", "success.5,10"}
    ref = pytrec_eval.RelevanceEvaluator(qrel, wanted).evaluate(run)
    ours = {"recip_rank": mrr_at_k(s, y, s.shape[1])}
    for k in (5, 10):
        ours[f"ndcg_cut_{k}"] = ndcg_at_k(s, y, k)
        ours[f"recall_{k}"] = recall_at_k(s, y, k)
        ours[f"success_{k}"] = hit_rate_at_k(s, y, k)
    for key, values in ours.items():
        theirs = [ref[str(i)][key] for i in some]
        np.testing.assert_allclose(values[some], theirs, atol=1e-6, err_msg=key)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_top_k_is_a_stable_sort(seed):
    s, _, k = case(seed)
    np.testing.assert_array_equal(top_k(s, k).ids, np.argsort(-s, 1, kind="stable")[:, :k])


@given(seeds, st.integers(1, 50), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_search_is_the_full_order_in_any_blocks(seed, block, k):
    "One large product and any blocks agree where many scores are equal"
    g = np.random.default_rng(seed)
    q, d = g.integers(-2, 3, (4, 3)).astype(float), g.integers(-2, 3, (30, 3)).astype(float)
    found, whole = exact_search(q, d, k, block), top_k(q @ d.T, k)
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.scores, whole.scores)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_search_is_that_of_faiss(seed):
    faiss = pytest.importorskip("faiss")
    g = np.random.default_rng(seed)
    q, d = (g.standard_normal((n, 16)).astype(np.float32) for n in (5, 200))
    scores, ids = faiss.knn(q, d, 10, metric=faiss.METRIC_INNER_PRODUCT)
    found = exact_search(q, d, 10, 64)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.ids, ids)


METRICS = (ndcg_at_k, mrr_at_k, hit_rate_at_k, recall_at_k)


@given(seeds, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_minus_one_is_no_document(seed, more):
    "A list that is filled up with -1, wherever they stand at its end, scores like the shorter list"
    s, y, k = case(seed)
    short, rel = top_k(s, k), as_relevance(y, s.shape[1])
    fill = np.full((len(s), more), -1)
    long = Ranked(np.concatenate([short.ids, fill], 1), np.zeros((len(s), k)))
    assert long.ids.shape[1] == short.ids.shape[1] + more
    for f in METRICS:
        values = (f(long, rel, k + more), f(short, rel, k + more))
        np.testing.assert_allclose(*values, atol=1e-15)


@pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "ids, message",
    [
        ([[0, 5]], "document 5, but there are 5"),
        ([[0, -2]], "document -2"),
        ([[3, 1, 3]], "document 3 twice for query 0"),
        ([[0.0, 1.0]], "needs integers"),
        ([0, 1], "needs integers"),
    ],
)
def test_rankings_that_cannot_be_are_refused(metric, ids, message):
    rel = as_relevance([{0: 2, 3: 1}], 5)
    with pytest.raises(ValueError, match=message):
        metric(Ranked(np.array(ids), np.zeros((1, 2))), rel, 10)


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_metrics_never_exceed_one(seed):
    "Not even by rounding, with grades that are no integers"
    g = np.random.default_rng(seed)
    y = g.random((3, 12)) * (g.random((3, 12)) < 0.6)
    for gain in ("linear", "exponential"):
        assert not (ndcg_at_k(y, y, 12, gain) > 1).any()
    for f in METRICS:
        assert not (f(y, y, int(g.integers(1, 15))) > 1).any()


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
        (lambda: exact_search(np.ones((1, 2)), np.array([[1.0, np.nan]])), "docs has NaN"),
        (lambda: exact_search(np.ones((1, 2)), np.ones((3, 2)), 0), "k=0"),
        (lambda: as_relevance([{0: -1.0}], 2), "not negative"),
        (lambda: mean_metric([np.nan]), "no query"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        bad()
