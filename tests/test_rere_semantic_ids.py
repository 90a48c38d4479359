"Semantic ids: codes by the definition, an inversion that loses nobody, collapse that is seen"

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.rere.data import sequence_windows
from llmpapers.rere.semantic_ids import (
    RQVAE,
    RQVAEConfig,
    SemanticIds,
    assign_codes,
    behaviour_embeddings,
    check_ids,
    collapse_of,
    fit_codebooks,
    load_ids,
    residual_error,
    residual_ids,
    rqvae_ids,
    shuffled_ids,
)
from llmpapers.rere.world import make_sid_world

pytest.importorskip("sklearn", reason="the extra search brings the k-means")


def blobs(n=60, dim=5, groups=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(groups, dim, generator=g)
    label = torch.arange(n) % groups
    return centres[label] + 0.3 * torch.randn(n, dim, generator=g), label


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_codes_are_the_nearest_centres_of_the_rest(seed, levels, k):
    g = torch.Generator().manual_seed(seed)
    x, books = torch.randn(9, 3, generator=g), torch.randn(levels, k, 3, generator=g)
    codes = assign_codes(x, books)
    for row, found in zip(x.double().numpy(), codes.tolist()):
        rest = row.copy()
        for book, c in zip(books.double().numpy(), found):
            distances = ((rest - book) ** 2).sum(1)
            assert distances[c] <= distances.min() + 1e-9
            rest = rest - book[c]


def test_levels_explain_more_and_groups_share_the_first_code():
    x, label = blobs()
    books = fit_codebooks(x, 3, 4, seed=1)
    left = residual_error(x, books)
    assert all(a > b for a, b in zip(left, left[1:])) and left[1] < 0.05
    first = assign_codes(x, books)[:, 0]
    for c in range(4):
        assert len(first[label == c].unique()) == 1
    assert len(first.unique()) == 4


codes = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1, max_size=30)
)


@settings(deadline=None, max_examples=60)
@given(codes)
def test_every_item_comes_back_from_its_id(rows):
    ids = SemanticIds(torch.tensor(rows), (3,) * len(rows[0]))
    back = ids.items_of(ids.codes)
    assert all(i in items for i, items in enumerate(back))
    assert sorted(i for items in ids.inversion().values() for i in items) == list(range(len(rows)))
    unique = ids.with_suffix()
    assert unique.items_of(unique.codes) == [[i] for i in range(len(rows))]
    assert torch.equal(unique.codes[:, :-1], ids.codes)
    assert unique.items_of(torch.full((1, len(rows[0]) + 1), 99)) == [[]]
    assert len(set(unique.format().answers)) == len(rows)


@settings(deadline=None, max_examples=40)
@given(codes, st.integers(0, 1000))
def test_shuffled_ids_are_the_same_ids_on_other_items(rows, seed):
    ids = SemanticIds(torch.tensor(rows), (3,) * len(rows[0]))
    control = shuffled_ids(ids, seed)
    assert sorted(control.codes.tolist()) == sorted(ids.codes.tolist())
    assert collapse_of(control) == collapse_of(ids)
    assert torch.equal(shuffled_ids(ids, seed).codes, control.codes)


def test_collapse_is_measured():
    half = SemanticIds(torch.tensor([[0], [0], [1], [1]]), (4,))
    found = collapse_of(half)
    assert found.entropy == (1.0,) and found.effective == (2.0,)
    assert (found.used, found.dead, found.distinct, found.largest) == ((2,), (2,), 2, 2)
    assert found.duplicate_rate == 1.0
    with pytest.raises(ValueError, match="100% of the items share their id"):
        check_ids(half)
    dead_level = SemanticIds(torch.tensor([[i, 0] for i in range(8)]), (8, 8))
    with pytest.raises(ValueError, match="level 1 uses 1.0 of 8"):
        check_ids(dead_level)


def test_a_suffix_is_no_collapse():
    x, _ = blobs()
    ids = residual_ids(x, 2, 6, seed=0, unique=True)
    assert len(ids.inversion()) == len(ids) and check_ids(ids, 0.0, 0.0).duplicate_rate == 0


def test_saved_ids_come_back(tmp_path):
    ids = residual_ids(blobs()[0], 2, 4, unique=True)
    again = load_ids(ids.save(tmp_path / "a"))
    assert torch.equal(again.codes, ids.codes) and again.n_codes == ids.n_codes
    assert all(torch.equal(a, b) for a, b in zip(again.codebooks, ids.codebooks))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["semantic_ids.safetensors"]


def test_the_trained_quantiser_learns_and_repeats():
    x, label = blobs()
    cfg = RQVAEConfig(levels=2, n_codes=4, width=16, latent=4, steps=150, seed=3)
    ids, again = rqvae_ids(x, cfg), rqvae_ids(x, cfg)
    assert torch.equal(ids.codes, again.codes)
    assert collapse_of(ids).used[0] >= 3
    torch.manual_seed(0)
    net = RQVAE(5, cfg)
    net(x).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.codebooks.grad[0].abs().sum() > 0 and net.encoder[0].weight.grad.abs().sum() > 0


def test_behaviour_knows_the_cluster():
    w = make_sid_world(60, n_users=2500, seed=2, n_codes=4, eps=0.05)
    e = behaviour_embeddings(sequence_windows(w.sequences, 1), 60, 16)
    alike = (w.cluster[:, None] == w.cluster) & ~torch.eye(60, dtype=torch.bool)
    cosine = e @ e.T
    assert cosine[alike].mean() > cosine[~alike].mean() + 0.2
    np.testing.assert_allclose(e.norm(dim=1).numpy(), 1, atol=1e-5)


def test_caught_in_words():
    with pytest.raises(ValueError, match="n_codes=1"):
        fit_codebooks(torch.rand(5, 2), 1, 1)
    with pytest.raises(ValueError, match="levels=0"):
        fit_codebooks(torch.rand(5, 2), 0, 4)
    with pytest.raises(ValueError, match="dim=9"):
        behaviour_embeddings(sequence_windows(torch.zeros(2, 3, dtype=torch.int64), 1), 4, 9)


def test_numbers_that_are_none_are_refused_by_name():
    x, _ = blobs()
    bad = x.clone()
    bad[3, 1] = torch.nan
    books = fit_codebooks(x, 2, 4)
    for call in (
        lambda v: assign_codes(v, books),
        lambda v: fit_codebooks(v, 2, 4),
        lambda v: residual_error(v, books),
        lambda v: rqvae_ids(v, RQVAEConfig(levels=2, n_codes=4, steps=2, start="random")),
        lambda v: rqvae_ids(v, RQVAEConfig(levels=2, n_codes=4, steps=2)),
    ):
        for wrong in (bad, x[0], x[:0]):
            with pytest.raises(ValueError, match="x has shape"):
                call(wrong)
    with pytest.raises(ValueError, match=r"codebooks\[1\] has shape"):
        assign_codes(x, [books[0], books[1] * torch.nan])
    with pytest.raises(ValueError, match="codebooks is empty"):
        assign_codes(x, [])
    with pytest.raises(ValueError, match="windows has an item"):
        behaviour_embeddings(sequence_windows(torch.tensor([[0, 7]])), 3, 2)


def test_equal_items_few_items_and_one_item():
    for x in (torch.zeros(10, 3), torch.ones(10, 3)):
        ids = residual_ids(x, 2, 4, unique=True)
        assert len(ids.inversion()) == 10 and ids.n_codes == (1, 1, 10)
        assert residual_error(x, ids.codebooks)[1:] == [0.0, 0.0]
    for n in (1, 3):
        ids = residual_ids(torch.randn(n, 4), 3, 256, unique=True)
        assert len(ids.inversion()) == n


def test_rows_without_a_history_are_not_the_last_item():
    rows = sequence_windows(torch.tensor([[0, 1, 2], [1, 2, 0]]), 2)
    found = behaviour_embeddings(rows, 4, 2)
    more = rows.take(list(range(len(rows))) + [0])
    more.history[-1] = -1
    assert torch.equal(behaviour_embeddings(more, 4, 2), found)


def test_damaged_ids_are_named(tmp_path):
    from safetensors.torch import save_file

    x, _ = blobs()
    ids = residual_ids(x, 2, 4)
    file = ids.save(tmp_path) / "semantic_ids.safetensors"
    raw = file.read_bytes()
    for damage in (raw[:-5], b"", b"{}"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged or holds no ids"):
            load_ids(tmp_path)
    for codes, meta in (
        (ids.codes, None),
        (ids.codes, {"n_codes": "[2, 4]"}),
        (ids.codes, {"n_codes": "7"}),
        (x, {"n_codes": "[4, 4]"}),
        (ids.codes - 1, {"n_codes": "[4, 4]"}),
    ):
        save_file({"codes": codes}, file, metadata=meta)
        with pytest.raises(ValueError, match="damaged or holds no ids"):
            load_ids(tmp_path)
    book = ids.codebooks[0]
    twice = SemanticIds(ids.codes, ids.n_codes, (book, book))
    assert torch.equal(load_ids(twice.save(tmp_path)).codebooks[1], book)
