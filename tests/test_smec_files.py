"""Files and numbers that reach the compression room from outside: checkpoints that are not ours,
folders that hold something else, half precision, options that cannot be"""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.smec.ads import gumbel_topk_mask, ware
from llmpapers.smec.compress import MRL, SMEC, MatryoshkaAdaptor, SearchAdaptor
from llmpapers.smec.compressor import (
    PCACompressor,
    RandomProjection,
    Truncation,
    load_compressor,
    to_int8,
)
from llmpapers.smec.data import make_retrieval, planted_retrieval, unit
from llmpapers.smec.losses import (
    ce_loss,
    listwise_consistency_loss,
    mse_loss,
    prefix_scores,
    rank_loss,
    rank_loss_loop,
    similarity_consistency_loss,
)
from llmpapers.smec.memory import CrossBatchMemory

seeds = st.integers(0, 10**6)
TRAINED = (MRL, MatryoshkaAdaptor, SearchAdaptor, SMEC)


@pytest.fixture(scope="module")
def given_problem():
    p, _ = planted_retrieval(120, 16, 8, 0.5, 0)
    q, rel = p.part("train")
    return dict(queries=q, docs=p.docs, relevance=rel)


def quick(kind=SMEC, dims=(16, 8), **kw):
    return kind(dims, **(dict(steps=6, batch_size=16) | kw))


# ---- checkpoints ---------------------------------------------------------------------------------
class Command:
    "Leaves a file wherever it is unpickled without care"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def stored(obj, how):
    "A planted file: torch's archive, its old form, or a plain pickle"
    data = io.BytesIO()
    if how == "pickle":
        pickle.dump(obj, data)
    else:
        torch.save(obj, data, _use_new_zipfile_serialization=how == "archive")
    return data.getvalue()


@pytest.mark.parametrize("how", ["archive", "legacy", "pickle"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_planted_stage_file_runs_nothing(tmp_path, given_problem, kind, how):
    out, ran = tmp_path / "fit", tmp_path / "ran"
    quick(kind).fit(**given_problem, out=out)
    (out / "stage0.pt").write_bytes(stored(dict(params=[Command(ran)], key=Command(ran)), how))
    with pytest.raises(ValueError, match=r"out='fit': stage0.pt is damaged, or holds more than"):
        quick(kind).fit(**given_problem, out=out)
    assert not ran.exists()


def test_the_library_unpickles_only_with_care():
    "No module reads a file in a way that can run code"
    import re

    from common import root

    risky = re.compile(r"torch\.load\((?![^)]*weights_only=True)|allow_pickle=True|yaml\.load\(")
    pickles = re.compile(r"pickle\.load\(|pickle\.loads\(|joblib\.load|\beval\(|\bexec\(")
    # between processes of one run, never from a file
    own = {"rl/ray.py": 2, "core/bench.py": 1}
    for path in sorted((root / "llmpapers").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert not risky.findall(source), path
        found = [m for m in pickles.findall(source.replace(".eval(", ".mode("))]
        assert len(found) <= own.get(str(path.relative_to(root / "llmpapers")), 0), (path, found)


@pytest.mark.parametrize("damage", [b"", b"text", None])
def test_a_damaged_stage_or_mark_is_named(tmp_path, given_problem, damage):
    out = tmp_path / "fit"
    quick().fit(**given_problem, out=out)
    file = out / "stage1.pt"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ValueError, match="stage1.pt is damaged"):
        quick().fit(**given_problem, out=out)
    (out / "fit.json").write_text("{")
    with pytest.raises(ValueError, match="out='fit' has a damaged fit.json"):
        quick().fit(**given_problem, out=out)


def changed(v, row):
    v = np.array(v)
    v[row] = -v[row]
    return v


def test_a_folder_belongs_to_one_fit(tmp_path, given_problem):
    "Other judgements, another row, another method, other options or other validation are refused"
    p, out = given_problem, tmp_path / "fit"
    first = quick().fit(**p, out=out)
    again = quick().fit(**p, out=out)
    assert np.array_equal(first.matrix(8), again.matrix(8))
    n = len(p["queries"])
    other = [dict.fromkeys([int(d)], 1.0) for d in np.roll(p["relevance"].docs, 1)]
    graded = p["relevance"]._replace(grades=p["relevance"].grades * 2)
    valid = p["queries"][:5], np.arange(5)
    for change, make in (
        (dict(relevance=other), quick()),
        (dict(relevance=graded), quick()),
        (dict(queries=changed(p["queries"], n - 2)), quick()),
        (dict(docs=changed(p["docs"], 77)), quick()),
        (dict(valid=False), quick()),
        (dict(valid=valid), quick()),
        ({}, quick(seed=1)),
        ({}, quick(selection="ads")),
        ({}, quick(MRL)),
        ({}, quick(SearchAdaptor)),
    ):
        with pytest.raises(ValueError, match="out='fit' holds another fit"):
            make.fit(**(p | change), out=out)
    lone = tmp_path / "lone"
    quick(MRL).fit(**p, out=lone)
    (lone / "fit.json").unlink()
    with pytest.raises(ValueError, match="stage0.pt belongs to another fit"):
        quick(SearchAdaptor).fit(**p, out=lone)
    assert {f.name for f in out.iterdir()} == {"fit.json", "stage0.pt", "stage1.pt"}


# ---- files of vectors ----------------------------------------------------------------------------
def test_a_file_is_not_its_own_target_and_failures_leave_nothing(tmp_path, given_problem):
    c = Truncation((16, 8)).fit(None, given_problem["docs"])
    source = tmp_path / "x.npy"
    np.save(source, given_problem["docs"])
    before = source.read_bytes()
    (tmp_path / "link.npy").symlink_to(source)
    for target in (source, tmp_path / "." / "x.npy", tmp_path / "link.npy"):
        with pytest.raises(ValueError, match="is the source"):
            c.transform_file(source, target)
    with pytest.raises(ValueError, match="block=0"):
        c.transform_file(source, tmp_path / "y.npy", block=0)
    bad = np.array(given_problem["docs"])
    bad[100] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(ValueError, match="source='bad.npy', rows from 90"):
        c.transform_file(tmp_path / "bad.npy", tmp_path / "y.npy", block=30)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError):
        c.save(tmp_path / "folder.safetensors")
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {"x.npy", "link.npy", "bad.npy", "folder.safetensors"}
    assert source.read_bytes() == before
    z = c.transform_file(source, tmp_path / "z.npy", block=7, device="cpu")
    np.testing.assert_allclose(z, c.encode(given_problem["docs"]), atol=1e-6)


def test_a_header_that_does_not_fit_is_named(tmp_path, given_problem):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = PCACompressor((16, 8)).fit(None, given_problem["docs"]).save(tmp_path / "c.safetensors")
    with safe_open(path, "np") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    for config in ('{"dims": [16, 4]}', '{"dims": [16, 8], "centre": true}', "{", '{"dims": 3}'):
        save_file(tensors, tmp_path / "bad.safetensors", metadata=meta | dict(config=config))
        with pytest.raises(ValueError, match="path='bad.safetensors' has a header"):
            load_compressor(tmp_path / "bad.safetensors")


def test_numbers_of_numpy_can_be_saved(tmp_path, given_problem):
    c = SMEC(
        np.array([16, 8]),
        steps=np.int64(4),
        lr=np.float32(0.01),
        seed=np.int32(3),
        alpha=np.float64(0.1),
        polish=np.bool_(True),
        batch_size=np.int16(16),
    ).fit(**given_problem)
    back = load_compressor(c.save(tmp_path / "c.safetensors"))
    assert back.config() == c.config()
    r = RandomProjection((16, 8), seed=np.int64(2)).fit(None, given_problem["docs"])
    assert load_compressor(r.save(tmp_path / "r.safetensors")).seed == 2


# ---- options -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize(
    "option, value",
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("batch_size", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", "fast"),
        ("scale", float("inf")),
        ("seed", -1),
        ("seed", 1.5),
        ("fallback", "no"),
        ("early_stop", 1),
        ("init", "zero"),
    ],
)
def test_options_are_checked_when_the_object_is_made(kind, option, value):
    with pytest.raises(ValueError, match=f"{option}="):
        kind((16, 8), **{option: value})


@pytest.mark.parametrize(
    "option, value",
    [
        ("memory", 0),
        ("topk", 1.5),
        ("sample", -3),
        ("anchors", 0),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("supervised", "yes"),
        ("polish", None),
        ("mode", "deep"),
        ("selection", 3),
        ("consistency", "relative"),
    ],
)
def test_options_of_smec_are_checked_when_it_is_made(option, value):
    with pytest.raises(ValueError, match=f"{option}="):
        SMEC((16, 8), **{option: value})


def test_misspelt_options_are_refused():
    for kind in TRAINED:
        with pytest.raises(TypeError, match="stepps"):
            kind((16, 8), stepps=3)


@pytest.mark.parametrize("kind", [Truncation, RandomProjection, PCACompressor])
def test_documents_without_directions(kind):
    with pytest.raises(ValueError, match="docs has shape"):
        kind((4, 2)).fit(None, np.ones(8))
    if kind is PCACompressor:
        x = np.random.default_rng(0).standard_normal((5, 8))
        for docs in (x[:0], x[:1], np.repeat(x[:1], 4, 0)):
            with pytest.raises(ValueError, match="principal components need two that differ"):
                kind((4, 2)).fit(None, docs)


# ---- types ---------------------------------------------------------------------------------------
@given(seeds, st.sampled_from([1e-4, 1e-3, 1.0, 100.0, 60.0]))
@settings(max_examples=25, deadline=None)
def test_norms_of_half_precision(seed, size):
    x = size * (1 + np.random.default_rng(seed).random((3, 768)))
    half = x.astype(np.float16)
    for form in (half, torch.from_numpy(half), torch.from_numpy(x).bfloat16()):
        u = unit(form)
        assert u.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, atol=1e-5)
    assert unit(x).dtype == np.float64


def test_types_that_are_no_embedding():
    for x in (np.ones((2, 2), int), torch.ones(2, 2, dtype=torch.int8), np.array([["a"]])):
        with pytest.raises(TypeError, match="x has type"):
            unit(x)
    with pytest.raises(TypeError, match="queries has type"):
        make_retrieval(np.ones((2, 2), complex), np.ones((2, 2)), [0, 1])


def test_a_fit_in_half_precision_is_that_of_the_same_numbers():
    g = np.random.default_rng(0)
    x = (100 * g.standard_normal((64, 16))).astype(np.float16)
    want = quick(dims=(8, 4)).fit(x.astype(np.float32), x.astype(np.float32))
    for form in (x, torch.from_numpy(x)):
        c = quick(dims=(8, 4)).fit(form, form)
        for d in (8, 4):
            assert np.array_equal(c.matrix(d), want.matrix(d))
        assert c.encode(form).dtype == np.float32
        np.testing.assert_allclose(c.encode(form), want.encode(x.astype(np.float32)), atol=1e-5)
    assert np.isfinite(PCACompressor((8,)).fit(None, x).encode(x)).all()
    np.testing.assert_array_equal(to_int8(x)[0], to_int8(x.astype(np.float32))[0])
    with pytest.raises(ValueError, match="finite numbers"):
        to_int8(np.array([[np.nan]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision(dtype):
    "Sums of a hundred thousand terms, norms of 768 numbers of size 100"
    s = torch.linspace(-1, 1, 400 * 400).view(400, 400).to(dtype)
    y = (torch.arange(400)[:, None] % 7 == torch.arange(400) % 7).to(dtype)
    for f in (
        lambda s, y: rank_loss(s, y, 20.0, "sum"),
        lambda s, y: rank_loss(s, None, 20.0, "sum"),
        lambda s, y: ce_loss(s, y),
        lambda s, y: mse_loss(s, y),
        lambda s, y: similarity_consistency_loss(s, y, "sum"),
        lambda s, y: listwise_consistency_loss(s, y),
    ):
        got = f(s, y)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, f(s.float(), y.float()))
    z = torch.full((3, 768), 100.0, dtype=dtype)
    torch.testing.assert_close(prefix_scores(z, z, 768), torch.ones(3, 3))
    assert torch.isfinite(ware(z, z)).all() and ware(z, z).dtype == torch.float32
    with pytest.raises(TypeError, match=r"scores has type torch.int64.*scores.float\(\)"):
        rank_loss(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.slow
@given(seeds)
@settings(max_examples=25, deadline=None)
def test_grades_of_any_type_and_blocks_of_any_size(seed):
    g = np.random.default_rng(seed)
    q, c = int(g.integers(1, 6)), int(g.integers(2, 9))
    s = torch.from_numpy(g.standard_normal((q, c))).requires_grad_()
    y = torch.from_numpy(g.integers(0, 4, (q, c)))
    want = rank_loss_loop(s, y.double(), 3.0)
    slope = torch.autograd.grad(want, s)[0] if want.requires_grad else torch.zeros_like(s)
    for grades in (y, y.to(torch.uint8), y.to(torch.int8), y.float(), y.bfloat16()):
        for block in (1, 7, 1 << 22):
            loss = rank_loss(s, grades, 3.0, "sum", block=block)
            torch.testing.assert_close(loss, want)
            (mine,) = torch.autograd.grad(loss, s)
            torch.testing.assert_close(mine, slope)
            torch.testing.assert_close(
                rank_loss(s, grades, block=block), rank_loss(s, y.double(), block=1 << 22)
            )
    some = y > 1
    torch.testing.assert_close(rank_loss(s, some), rank_loss(s, some.double()))
    torch.testing.assert_close(mse_loss(s, some), mse_loss(s, some.double()))
    for f in (rank_loss, mse_loss, ce_loss):
        with pytest.raises(ValueError, match="relevance has NaN"):
            f(s, torch.full((q, c), torch.nan))
    with pytest.raises(ValueError, match="negative grades"):
        ce_loss(s, -1 - y)


def test_class_labels_stay_within_memory():
    "A batch of 512 with ten classes: a tenth of what one table of all comparisons takes"
    label = torch.arange(512) % 10
    y = label[:, None] == label
    s = torch.rand(512, 512, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = rank_loss(s, y, 20.0)
    whole = int(y.sum()) * 512
    assert whole > 10_000_000 and max(kept) < whole / 10 and sum(kept) < whole / 5
    loss.backward()
    assert torch.isfinite(s.grad).all() and s.grad.any()


def test_the_queue_and_the_selector_refuse_what_is_no_number():
    m = CrossBatchMemory(4, 3)
    m.push(torch.eye(3))
    with pytest.raises(ValueError, match="x has NaN"):
        m.topk(torch.tensor([[1.0, torch.nan, 0.0]]), 1)
    with pytest.raises(ValueError, match=r"saved holds \(2, 5\)"):
        m.restore(dict(x=torch.ones(2, 5), ids=torch.arange(2), at=0, next_id=2))
    with pytest.raises(ValueError, match="logits has NaN"):
        gumbel_topk_mask(torch.tensor([1.0, torch.nan]), 1)


def test_a_loss_that_is_no_number_stops_the_fit(given_problem, monkeypatch):
    c = quick()
    monkeypatch.setattr(SMEC, "_rank", lambda self, scores, y: scores.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1"):
        c.fit(**given_problem)
