"""Properties of the ranking metrics: against loops and references, under ties, permutations and
blocks"""

from contextlib import nullcontext as nothing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from llmpapers.core.ranking import (
    Ranked,
    Relevance,
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


@pytest.mark.parametrize("seed", range(100))
def test_equals_pytrec_eval_on_graded_sets(seed):
    "Ties, grades below 0 read as 0, judged documents that are not found, lists cut short"
    pytrec_eval = pytest.importorskip("pytrec_eval")
    g = np.random.default_rng(seed)
    q, c, k = int(g.integers(1, 6)), int(g.integers(2, 60)), int(g.integers(1, 30))
    y = g.choice([-2, -1, 0, 1, 2, 3], (q, c), p=[0.05, 0.05, 0.6, 0.15, 0.1, 0.05])
    s = g.integers(0, int(g.integers(2, 200)), (q, c)).astype(np.float32)
    name = [f"d{99 - i:02d}" for i in range(c)]
    qrel = {str(i): {n: int(v) for n, v in zip(name, y[i], strict=True)} for i in range(q)}
    found = top_k(s, k)
    run = {
        str(i): {name[d]: float(v) for d, v in zip(found.ids[i], found.scores[i], strict=True)}
        for i in range(q)
    }
    wanted = {"ndcg", "ndcg_cut.3,10", "recall.3,10", "recip_rank", "success.1,5,10"}
    ref = pytrec_eval.RelevanceEvaluator(qrel, wanted).evaluate(run)
    with pytest.raises(ValueError, match="set it to 0") if (y < 0).any() else nothing():
        as_relevance(y, c)
    rel = as_relevance(np.maximum(y, 0), c)
    ours = {"recip_rank": mrr_at_k(found, rel, k), "success_1": hit_rate_at_k(found, rel, 1)}
    for depth in (3, 10):
        ours[f"ndcg_cut_{depth}"] = ndcg_at_k(found, rel, depth)
        ours[f"recall_{depth}"] = recall_at_k(found, rel, depth)
    ours["success_5"] = hit_rate_at_k(found, rel, 5)
    some = [i for i in range(q) if (y[i] > 0).any()]
    for key, values in ours.items():
        theirs = [ref[str(i)][key] for i in some]
        np.testing.assert_allclose(values[some], theirs, atol=1e-6, err_msg=key)
        assert np.isnan(np.delete(values, some)).all(), key


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


@given(seeds, st.integers(1, 12), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_search_leaves_out_what_a_query_must_not_find(seed, block, k):
    g = np.random.default_rng(seed)
    q, d = g.integers(-2, 3, (6, 3)).astype(float), g.integers(-2, 3, (20, 3)).astype(float)
    own = g.integers(-1, 20, 6)
    found = exact_search(q, d, k, block, exclude=own)
    scores = q @ d.T
    scores[np.arange(6)[own >= 0], own[own >= 0]] = -np.inf
    order = np.argsort(-scores, 1, kind="stable")[:, :k]
    order[np.take_along_axis(scores, order, 1) == -np.inf] = -1
    np.testing.assert_array_equal(found.ids, order)
    assert not (found.ids == own[:, None])[own >= 0].any()
    for bad in (own[:5], own + 20.5, own + 100):
        with pytest.raises(ValueError, match="exclude needs 6 document numbers"):
            exact_search(q, d, k, exclude=bad)


@pytest.mark.parametrize("value", [100.0, 1e-4])
def test_half_precision_is_searched_in_single(value):
    "Products of such vectors overflow or vanish in 16 bits; bfloat16, int8 codes and lists pass"
    torch = pytest.importorskip("torch")
    x = np.full((3, 768), value, np.float16) * np.array([[1], [2], [3]], np.float16)
    right = exact_search(x.astype(np.float32), x.astype(np.float32), 3)
    t = torch.from_numpy(x)
    for q, d in ((x, x), (t, x), (x, t), (t.double(), t)):
        found = exact_search(q, d, 3)
        assert found.ids.tolist() == right.ids.tolist() == [[2, 1, 0]] * 3
        np.testing.assert_allclose(found.scores, right.scores, rtol=1e-5)
    assert exact_search(t.bfloat16(), t.bfloat16(), 1).ids.tolist() == [[2]] * 3
    codes = np.array([[127, 127], [-128, -128], [1, 0]], np.int8)
    assert exact_search(codes, codes, 1).scores[:2, 0].tolist() == [2 * 127**2, 2 * 128**2]
    assert exact_search([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]], 1).ids.tolist() == [[1]]
    for bad in (x.astype(complex), np.array([["a"]])):
        with pytest.raises(TypeError, match="queries has type"):
            exact_search(bad, x)
    with pytest.raises(ValueError, match="docs has NaN or infinite"):
        exact_search(x, np.where(np.arange(768) == 5, np.inf, x))


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


def table(indptr, docs, grades):
    return Relevance(np.array(indptr), np.array(docs), np.array(grades, float), 3)


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
        (lambda: as_relevance([{0.5: 1}], 2), "document 0.5; documents are integers"),
        (lambda: as_relevance([{"0": 1}], 2), "documents are integers"),
        (lambda: as_relevance(table([0, 2], [1, 0], [1, 1]), 3), "ascending order, once"),
        (lambda: as_relevance(table([0, 2], [1, 1], [1, 1]), 3), "ascending order, once"),
        (lambda: as_relevance(table([0, 1], [1], [0]), 3), "grades above 0"),
        (lambda: as_relevance(table([0, 1], [1], [np.nan]), 3), "grades above 0"),
        (lambda: recall_at_k(Ranked(*np.ones((2, 1, 1), int)), table([0, 1], [7], [1])), "above 0"),
        (lambda: as_relevance(table([0, 2], [1], [1]), 3), "indptr must run"),
        (lambda: ndcg_at_k(np.ones((1, 2)), [{0: 2000}], gain="exponential"), "not finite"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        bad()
