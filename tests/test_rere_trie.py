"""The catalogue as a trie: against a dictionary of sets, ranges, masks over items, bad input, files
that are damaged"""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmpapers.rere.trie import ItemTrie

END = 0
strings = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=40)


def sets_of(seqs):
    "Allowed next tokens of every prefix"
    table = {}
    for s in seqs:
        for t in range(len(s)):
            table.setdefault(tuple(s[:t]), set()).add(s[t])
    return table


def node_of(trie, prefix):
    return int(trie.walk(list(prefix))[-1]) if prefix else 0


@settings(max_examples=60, deadline=None)
@given(strings, st.lists(st.lists(st.integers(0, 8), max_size=6), max_size=20))
def test_it_is_the_dictionary_of_sets(seqs, others):
    trie = ItemTrie.from_sequences(seqs, eos_id=END)
    table = sets_of([s + [END] for s in seqs])
    prefixes = list(table) + [tuple(p) for p in others] + [tuple(s) + (END,) for s in seqs]
    nodes = torch.tensor([node_of(trie, p) for p in prefixes])
    mask = trie.mask(nodes, 9)
    assert [set(m.nonzero()[:, 0].tolist()) for m in mask] == [
        table.get(p, set()) for p in prefixes
    ]
    tok, dst, ok = trie.children(nodes)
    assert ok.sum(1).tolist() == mask.sum(1).tolist()
    for row, (t, d, o) in enumerate(zip(tok, dst, ok)):
        assert (t[o].diff() > 0).all() and (d[~o] == -1).all()
        assert torch.equal(trie.step(nodes[row].expand(int(o.sum())), t[o]), d[o])
    assert trie.level_width[0] == 1 and sum(trie.level_width) == trie.n_nodes == len(table) + len(
        {tuple(s) for s in seqs}
    )


@settings(max_examples=40, deadline=None)
@given(strings, st.randoms())
def test_items_below_a_node_strings_and_canonical_ids(seqs, random):
    ids = random.sample(range(1000), len(seqs))
    trie = ItemTrie.from_sequences(seqs, eos_id=END, items=ids)
    spelled = trie.spell(torch.arange(trie.n_nodes)).tolist()
    for n, prefix in enumerate(spelled):
        prefix = [t for t in prefix if t >= 0]
        below = {i for i, s in zip(ids, seqs) if (s + [END])[: len(prefix)] == prefix}
        rows = trie.by_string[int(trie.first[n]) : int(trie.last[n])]
        assert set(trie.items[rows].tolist()) == below
        assert node_of(trie, prefix) == n
    back = [[t for t in row if t >= 0] for row in trie.strings().tolist()]
    assert back == [s + [END] for s in seqs]
    lowest = {}
    for i, s in zip(ids, seqs):
        lowest[tuple(s)] = min(i, lowest.get(tuple(s), i))
    assert trie.canonical(ids).tolist() == [lowest[tuple(s)] for s in seqs]
    assert torch.equal(trie.strings([ids[-1]])[0], trie.strings()[-1])


@settings(max_examples=40, deadline=None)
@given(strings, st.integers(0, 10**6))
def test_a_mask_over_items_opens_the_nodes_above_them(seqs, seed):
    trie = ItemTrie.from_sequences(seqs, eos_id=END)
    allowed = torch.rand(3, len(seqs), generator=torch.Generator().manual_seed(seed)) < 0.4
    counts = trie.allowed_counts(allowed)
    nodes = torch.arange(trie.n_nodes).expand(3, -1)
    alive = trie.alive(nodes, counts)
    found = trie.item_at(nodes, counts)
    for u in range(3):
        for n in range(trie.n_nodes):
            rows = trie.by_string[int(trie.first[n]) : int(trie.last[n])]
            some = rows[allowed[u, rows]]
            assert alive[u, n] == bool(len(some))
            if len(some) and trie.indptr[n] == trie.indptr[n + 1]:
                assert found[u, n] == some.min()
    assert not trie.alive(torch.full((3, 1), -1), counts).any()


@settings(max_examples=40, deadline=None)
@given(strings)
def test_forced_steps_are_those_of_single_children(seqs):
    trie = ItemTrie.from_sequences(seqs, eos_id=END)
    for n in range(trie.n_nodes):
        at, steps = n, 0
        while trie.indptr[at + 1] - trie.indptr[at] == 1:
            at, steps = int(trie.indptr[at]) + 1, steps + 1
        leaf = trie.indptr[at + 1] == trie.indptr[at]
        assert int(trie.run[n]) == (-steps if leaf else steps)


@settings(max_examples=30, deadline=None)
@given(strings, st.randoms())
def test_lists_arrays_and_orders_make_one_trie(seqs, random):
    width = max(map(len, seqs))
    array = np.array([s + [-1] * (width - len(s)) for s in seqs])
    a = ItemTrie.from_sequences(seqs, eos_id=END)
    order = random.sample(range(len(seqs)), len(seqs))
    for other in (
        ItemTrie.from_sequences(array, eos_id=END),
        ItemTrie.from_sequences(torch.tensor(array), eos_id=[END]),
        ItemTrie.from_sequences([torch.tensor(s) for s in seqs], eos_id=END),
        ItemTrie.from_sequences([s + [END] for s in seqs], eos_id=END),
        ItemTrie.from_sequences([seqs[i] for i in order], eos_id=END, items=order),
    ):
        for name in ("indptr", "edge_tok", "first", "last", "run"):
            assert torch.equal(getattr(a, name), getattr(other, name)), name
        assert torch.equal(a.items[a.by_string], other.items[other.by_string])


def test_several_ends():
    trie = ItemTrie.from_sequences([[5], [5, 6, 2]], eos_id=(0, 2))
    assert trie.walk([[5, 0], [5, 2]])[:, -1].unique().numel() == 1
    assert trie.mask(trie.walk([5])[-1:], 8)[0].nonzero()[:, 0].tolist() == [0, 2, 6]
    assert trie.strings().tolist() == [[5, 0, -1], [5, 6, 0]]


@pytest.mark.parametrize(
    "seqs, more, text",
    [
        ([], {}, "at least one item"),
        ([[]], dict(eos_id=0), r"seqs\[0\] is empty"),
        ([[3], [0]], dict(eos_id=0), r"seqs\[1\] is empty"),
        ([[3], [4, -2]], {}, r"seqs\[1\] has the token -2"),
        ([[3], [3, 4]], {}, r"seqs\[0\] is the beginning of seqs\[1\]"),
        ([[3, 4], [3]], {}, r"seqs\[1\] is the beginning of seqs\[0\]"),
        ([[3, 0, 4]], dict(eos_id=0), r"seqs\[0\] has the end 0"),
        ([[3]], dict(eos_id=-1), "eos_id=-1"),
        ([[3], [4]], dict(items=[1, 1]), "has 1 more than once"),
        ([[3], [4]], dict(items=[1, -1]), "items has -1"),
        ([[3], [4]], dict(items=[1]), "need 2 ids"),
        (np.array([[3, -1, 4]]), {}, "padding must be at the end"),
        (np.array([3, 4]), {}, "need .I,L. int"),
        (torch.ones(2, 2), {}, "need .I,L. int"),
    ],
)
def test_bad_catalogues_are_named(seqs, more, text):
    with pytest.raises(ValueError, match=text):
        ItemTrie.from_sequences(seqs, **more)


def test_other_bad_input():
    trie = ItemTrie.from_sequences([[3], [4]], items=[7, 9])
    with pytest.raises(TypeError, match="token ids"):
        ItemTrie.from_sequences([["a"]])
    with pytest.raises(TypeError, match="token ids"):
        ItemTrie.from_sequences([[1.5]])
    with pytest.raises(ValueError, match="vocab_size=4"):
        trie.mask(torch.tensor([0]), 4)
    for call in (trie.canonical, trie.strings):
        with pytest.raises(ValueError, match="8 is not in the catalogue"):
            call([7, 8])
    for bad in (torch.ones(2), torch.ones(3, dtype=torch.bool), torch.ones(1, 1, 2).bool()):
        with pytest.raises(ValueError, match="allowed"):
            trie.allowed_counts(bad)


# ---- files ---------------------------------------------------------------------------------------
def saved(tmp_path):
    g = torch.Generator().manual_seed(0)
    seqs = [torch.randint(1, 5, (k,), generator=g).tolist() for k in (1, 2, 3, 3, 4, 4, 4)]
    trie = ItemTrie.from_sequences(seqs, eos_id=0, items=[9, 3, 5, 7, 1, 2, 4])
    return trie, trie.save(tmp_path / "trie.safetensors")


def test_a_file_gives_the_trie_back(tmp_path):
    trie, file = saved(tmp_path)
    again = ItemTrie.load(file)
    for name, value in vars(trie).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "name", ["indptr", "edge_tok", "first", "last", "run", "items", "by_string"]
)
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_a_changed_number_is_refused_or_harmless(tmp_path, name, place, value):
    trie, file = saved(tmp_path)
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        meta = f.metadata()
    tensors = load_file(file)
    tensors[name][place] = value
    save_file(tensors, file, metadata=meta)
    harmless = value > 0 and (name == "items" or (name == "edge_tok" and place == -1))
    try:
        again = ItemTrie.load(file)
    except ValueError as e:
        assert "damaged" in str(e)
        return
    assert harmless or name == "edge_tok"  # another catalogue, but a trie
    assert again.walk(again.strings().clamp(min=0)).max() < again.n_nodes


def test_other_damage_is_refused(tmp_path):
    trie, file = saved(tmp_path)
    whole = file.read_bytes()
    for broken in (whole[:-9], whole[:20], b"", whole[8:]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="trie.safetensors"):
            ItemTrie.load(file)
    with pytest.raises(ValueError, match="not a file"):
        ItemTrie.load(tmp_path / "none")
    numbers = dict(eos_ids=[0], level_width=[1, 4], inner_width=[1, 0], max_branch=[4, 0])
    tensors = {k: v for k, v in vars(trie).items() if torch.is_tensor(v)}
    save_file(tensors, file, metadata=dict(kind="ItemTrie", numbers=json.dumps(numbers)))
    with pytest.raises(ValueError, match="levels do not fit"):
        ItemTrie.load(file)


# ---- size ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_no_loop_over_the_items_of_a_large_catalogue():
    "A million items: lines of the builder run some times a level, and its numbers are small"
    g = torch.Generator().manual_seed(1)

    def lines_run(n):
        ids, lines = torch.randint(256, (n, 4), generator=g) + 1, []

        def count(frame, event, arg):
            lines.append(event)
            return count

        sys.settrace(count)
        try:
            trie = ItemTrie.from_sequences(ids, eos_id=0)
        finally:
            sys.settrace(None)
        return len(lines), trie

    few, many = lines_run(1000), lines_run(10**6)
    assert many[0] < 1.5 * few[0]
    trie = many[1]
    assert trie.indptr.dtype == torch.int32
    assert trie.n_bytes <= 5 * 4 * (trie.n_nodes + 1) + 16 * 10**6
