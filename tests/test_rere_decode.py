"""Searching a catalogue: beams against exhaustive scores, for any model of transformers, whatever
the batch, the padding, the order, the part of the catalogue and the settings in the checkpoint"""

import functools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import hub
from llmpapers.rere.decode import (
    PlainReader,
    RowsReader,
    SharedReader,
    TrieConstraint,
    TrieLogitsProcessor,
    constrained_beam_search,
    constrained_sample,
    draw_items,
    merge_ends,
    pick_reader,
    reader_fault,
    score_items,
    sort_key,
)
from llmpapers.rere.trie import ItemTrie
from llmpapers.rl.engines import HFEngine, generate
from llmpapers.rl.types import Request, SamplingConfig
from zoo import model_of

V, END = 96, 2


def catalogue(n, seed, vocab=V, longest=4, end=END):
    "n strings of 1 to `longest` tokens, the end not among them"
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [(torch.randint(vocab - 4, (k,), generator=g) + 4).tolist() for k in sizes]


def prompts(n, seed, longest=9, side="left"):
    "Padded prompts of different lengths, and their mask"
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    rows = [(torch.randint(V - 4, (k,), generator=g) + 4).tolist() for k in sizes]
    return padded(rows, side)


def padded(rows, side, extra=0):
    width = max(map(len, rows)) + extra
    fill = [[0] * (width - len(r)) for r in rows]
    ids = [f + r if side == "left" else r + f for r, f in zip(rows, fill)]
    mask = [[0] * len(f) + [1] * len(r) for r, f in zip(rows, fill)]
    mask = mask if side == "left" else [m[::-1] for m in mask]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def slow_scores(model, prompt, strings, score, trie):
    "Scores by one plain pass for each item, token by token"
    out = []
    for s in strings:
        ids = torch.tensor([prompt + s])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        total = 0.0
        for t, token in enumerate(s):
            at = len(prompt) + t - 1
            legal = torch.arange(logits.shape[-1])
            if score == "renorm":
                node = trie.walk(s[:t])[-1] if t else torch.tensor(0)
                legal = trie.mask(node, logits.shape[-1]).nonzero()[:, 0]
            total += (logits[at, token] - logits[at, legal].logsumexp(-1)).item()
        out.append(total)
    return torch.tensor(out)


def same_lists(a, b, tol=1e-4):
    "Equal items; where they differ, the scores are as good as equal"
    torch.testing.assert_close(a.scores, b.scores, atol=tol, rtol=0)
    differ = a.items != b.items
    gaps = (a.scores[:, :, None] - b.scores[:, None]).abs() + torch.eye(a.scores.shape[1]) * 9
    assert (gaps.amin(-1)[differ] < tol).all(), (a.items, b.items)


# ---- against exhaustive scores -------------------------------------------------------------------
FAMILIES = (
    "llama qwen2 qwen3 gpt2 gpt_neox mistral gemma gemma2 gemma3_text phi3 falcon mamba bloom"
)


@pytest.mark.parametrize("kind", FAMILIES.split())
@pytest.mark.parametrize("score", ["raw", "renorm"])
@pytest.mark.slow
def test_beams_are_the_best_of_all_items_in_every_family(kind, score):
    model, strings = model_of(kind), catalogue(40, 1)
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    ids, mask = prompts(3, 2)
    exact = constrained_beam_search(model, ids, trie, 10, mask, score=score, exact=True)
    everything = score_items(model, ids, trie, score, mask)
    for b in range(3):
        prompt = ids[b][mask[b].bool()].tolist()
        want = slow_scores(model, prompt, [s + [END] for s in strings], score, trie)
        torch.testing.assert_close(everything[b], want, atol=2e-4, rtol=1e-4)
        best = want.sort(descending=True).values
        canonical = trie.canonical(exact.items[b])
        torch.testing.assert_close(want[canonical], exact.scores[b], atol=2e-4, rtol=1e-4)
        distinct = torch.unique(trie.canonical(torch.arange(40)))
        best = want[distinct].sort(descending=True).values[:10]
        torch.testing.assert_close(exact.scores[b], best, atol=2e-4, rtol=1e-4)
    assert exact.certified.all()
    torch.testing.assert_close(exact.logprobs.sum(-1), exact.scores, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 50),
    size=st.integers(1, 12),
    extra=st.integers(0, 20),
    score=st.sampled_from(["raw", "renorm"]),
    longest=st.integers(1, 5),
    vocab=st.integers(6, 40),
)
def test_a_certified_list_is_the_exact_one(seed, n, size, extra, score, longest, vocab):
    model, strings = model_of("llama"), catalogue(n, seed, vocab, longest)
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    ids, mask = prompts(2, seed)
    found = constrained_beam_search(model, ids, trie, size, mask, size + extra, score)
    every = score_items(model, ids, trie, score, mask)
    lowest = torch.unique(trie.canonical(torch.arange(n)))
    k = min(size, len(lowest))
    best = every[:, lowest].topk(k).values
    there = found.items >= 0
    wide = size + extra >= max(trie.inner_width)
    assert (there.sum(1) <= k).all() and (not wide or (there.sum(1) == k).all())
    assert (found.items[~there] == -1).all() and (found.scores[~there] == -torch.inf).all()
    for b in range(2):
        items = found.items[b][there[b]]
        assert len(set(items.tolist())) == len(items)
        torch.testing.assert_close(every[b, items], found.scores[b][there[b]], atol=1e-4, rtol=0)
        if found.certified[b] or wide:
            torch.testing.assert_close(found.scores[b][:k], best[b], atol=1e-4, rtol=0)
    if wide:
        assert found.certified.all()
    exact = constrained_beam_search(model, ids, trie, size, mask, score=score, exact=True)
    assert exact.certified.all()
    torch.testing.assert_close(exact.scores[:, :k], best, atol=1e-4, rtol=0)


def test_renormalised_scores_are_a_distribution_and_raw_ones_less():
    trie = ItemTrie.from_sequences(catalogue(60, 3), eos_id=END)
    ids, mask = prompts(3, 4)
    lowest = torch.unique(trie.canonical(torch.arange(60)))
    model = model_of("qwen3")
    renorm = score_items(model, ids, trie, "renorm", mask)[:, lowest].exp().sum(1)
    torch.testing.assert_close(renorm, torch.ones(3), atol=1e-5, rtol=0)
    assert (score_items(model, ids, trie, "raw", mask)[:, lowest].exp().sum(1) < 1).all()


def test_a_chain_costs_nothing_when_renormalised():
    trie = ItemTrie.from_sequences([[5, 6, 7, 8], [9, 10, 11]], eos_id=END)
    found = constrained_beam_search(model_of("llama"), [[4, 5]], trie, 2, score="renorm")
    assert (found.logprobs[0, :, 1:] == 0).all() and (found.logprobs[0, :, 0] < 0).all()
    both = found.scores[0].exp().sum()
    torch.testing.assert_close(both, torch.tensor(1.0), atol=1e-6, rtol=0)


# ---- as transformers does it, where both keep G hypotheses ---------------------------------------
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_generate_on_fixed_length_ids(seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (120, 3), generator=g) + torch.tensor([4, 12, 20])
    codes = torch.unique(codes, dim=0)
    trie, model, G = ItemTrie.from_sequences(codes), model_of("llama"), 8
    ids = torch.randint(4, V, (2, 5), generator=g)

    def legal(row, tokens):
        done = tokens[5:].tolist()
        node = trie.walk(done)[-1] if done else torch.tensor(0)
        return trie.mask(node, V).nonzero()[:, 0].tolist() or [END]

    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=G,
        num_return_sequences=G,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=legal,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    # generate ranks by scores over the legal tokens: it masks and then takes them as they are
    ours = constrained_beam_search(model, ids, trie, G)
    want = theirs.sequences_scores.reshape(2, G)
    torch.testing.assert_close(ours.scores, want, atol=1e-4, rtol=0)
    tokens = theirs.sequences[:, 5:].reshape(2, G, 3)
    assert (ours.tokens == tokens).all()


# ---- batch, order, padding -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mamba"])
def test_lists_do_not_depend_on_batch_order_or_padding(kind):
    model = model_of(kind)
    trie = ItemTrie.from_sequences(catalogue(80, 5), eos_id=END)
    g = torch.Generator().manual_seed(6)
    sizes = torch.randint(2, 12, (32,), generator=g).tolist()
    rows = [(torch.randint(V - 4, (k,), generator=g) + 4).tolist() for k in sizes]

    def lists(parts, side, extra=0):
        found = [
            constrained_beam_search(model, i, trie, 6, m) for i, m in parts_of(parts, side, extra)
        ]
        order = [i for p in parts for i in p]
        items = torch.cat([f.items for f in found])
        scores = torch.cat([f.scores for f in found])
        back = torch.tensor(order).argsort()
        return items[back], scores[back]

    def parts_of(parts, side, extra):
        return [padded([rows[i] for i in p], side, extra) for p in parts]

    singles = lists([[i] for i in range(32)], "left")
    for parts, side, extra in (
        ([list(range(8 * i, 8 * i + 8)) for i in range(4)], "left", 0),
        ([list(range(32))], "right", 0),
        ([list(range(31, -1, -1))], "left", 7),
        ([list(range(16, 32)) + list(range(16))], "right", 3),
    ):
        items, scores = lists(parts, side, extra)
        assert torch.equal(items, singles[0])
        torch.testing.assert_close(scores, singles[1], atol=1e-4, rtol=0)


def test_settings_of_the_checkpoint_change_nothing(tmp_path):
    folder = hub.hub_folder(tmp_path / "m", "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.generation_config.do_sample
    strings = catalogue(50, 7, 200)
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    first = constrained_beam_search(model, [[5, 6, 7]], trie, 8)
    again = constrained_beam_search(model, [[5, 6, 7]], trie, 8)
    model.generation_config = transformers.GenerationConfig()
    plain = constrained_beam_search(model, [[5, 6, 7]], trie, 8)
    for other in (again, plain):
        assert torch.equal(first.items, other.items) and torch.equal(first.scores, other.scores)


def test_dropout_is_off_and_modes_come_back():
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    trie = ItemTrie.from_sequences(catalogue(30, 8), eos_id=END)
    a = constrained_beam_search(model, [[5, 6]], trie, 5)
    assert [m.training for m in model.modules()] == before
    b = constrained_beam_search(model.eval(), [[5, 6]], trie, 5)
    assert torch.equal(a.scores, b.scores)


# ---- hard cases ----------------------------------------------------------------------------------
def favouring(token, vocab=V):
    "A model that wants one token and no other, by 50 nats"

    def model(ids):
        logits = torch.zeros(*ids.shape, vocab)
        logits[..., token] = 50.0
        return logits

    return model


def test_the_one_allowed_token_wins_however_unlikely():
    model = favouring(77)
    trie = ItemTrie.from_sequences([[43]], eos_id=END)
    for found in (
        constrained_beam_search(model, [[5]], trie, 1),
        constrained_beam_search(model, [[5]], trie, 1, score="renorm"),
        constrained_sample(model, [[5]], trie, 3, generator=torch.Generator().manual_seed(0)),
        constrained_sample(model, [[5]], trie, 3, temperature=0),
    ):
        assert (found.tokens[0, :, 0] == 43).all() and (found.items == 0).all()


def test_a_mask_to_one_item_gives_that_item():
    trie = ItemTrie.from_sequences(catalogue(50, 9), eos_id=END)
    model = model_of("llama")
    for item in range(0, 50, 7):
        only = torch.zeros(50, dtype=torch.bool)
        only[item] = True
        found = constrained_beam_search(model, [[5, 6]], trie, 4, allowed=only)
        assert found.items[0].tolist() == [item, -1, -1, -1]
        drawn = constrained_sample(model, [[5, 6]], trie, 4, allowed=only)
        assert drawn.items[0].tolist() == [item] * 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), score=st.sampled_from(["raw", "renorm"]))
def test_a_part_of_the_catalogue_is_as_if_the_rest_were_not_there(seed, share, score):
    strings, model = catalogue(40, seed, 14), model_of("llama")
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    ids, mask = prompts(2, seed)
    allowed = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < share
    found = constrained_beam_search(
        model, ids, trie, 6, mask, score=score, exact=True, allowed=allowed
    )
    for b in range(2):
        rows = allowed[b].nonzero()[:, 0]
        if not len(rows):
            assert (found.items[b] == -1).all()
            continue
        part = ItemTrie.from_sequences([strings[i] for i in rows], eos_id=END, items=rows)
        alone = constrained_beam_search(
            model, ids[b : b + 1], part, 6, mask[b : b + 1], score=score, exact=True
        )
        assert found.items[b].tolist() == alone.items[0].tolist()
        torch.testing.assert_close(found.scores[b], alone.scores[0], atol=1e-4, rtol=0)


def test_items_that_begin_others_end_right():
    strings = [[5], [5, 6], [5, 6, 7], [8]]
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    found = constrained_beam_search(model_of("gpt2"), [[9, 4]], trie, 4)
    assert sorted(found.items[0].tolist()) == [0, 1, 2, 3]
    for item, tokens, n in zip(found.items[0], found.tokens[0].tolist(), found.lengths[0]):
        assert tokens[:n] == strings[item] + [END] and set(tokens[n:]) <= {-1}


def test_several_ends_count_as_one():
    model, strings = model_of("llama"), catalogue(30, 10)
    ends = (2, 0, 3)
    trie = ItemTrie.from_sequences(strings, eos_id=ends)
    found = constrained_beam_search(model, [[5, 6, 7]], trie, 10, exact=True)
    for item, score in zip(found.items[0].tolist(), found.scores[0]):
        ids = torch.tensor([[5, 6, 7] + strings[item]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        body = logp[torch.arange(2, ids.shape[1] - 1), ids[0, 3:]].sum()
        want = body + logp[-1, list(ends)].logsumexp(-1)
        torch.testing.assert_close(score, want, atol=1e-4, rtol=0)
    logits = torch.randn(4, 9)
    torch.testing.assert_close(merge_ends(logits, (1, 5)).logsumexp(-1), logits.logsumexp(-1))


def test_equal_scores_go_by_the_order_of_the_strings():
    def flat(ids):
        return torch.zeros(*ids.shape, V)

    strings = [[9, 5], [4, 8], [9, 4], [6, 6]]
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    found = constrained_beam_search(flat, [[5], [6], [7]], trie, 4)
    assert found.items.tolist() == [[1, 3, 2, 0]] * 3
    two = constrained_beam_search(flat, [[5]], trie, 2)
    assert two.items.tolist() == [[1, 3]] and not two.certified.any()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.randoms())
def test_keys_sort_as_scores_and_then_places(scores, random):
    places = random.sample(range(2**32), len(scores))
    key = sort_key(torch.tensor(scores), torch.tensor(places))
    order = key.argsort(descending=True).tolist()
    assert order == sorted(range(len(scores)), key=lambda i: (-(scores[i] + 0.0), places[i]))


def test_items_with_one_string():
    trie = ItemTrie.from_sequences([[5, 6], [7], [5, 6]], eos_id=END, items=[30, 10, 20])
    found = constrained_beam_search(model_of("llama"), [[4]], trie, 3)
    assert sorted(found.items[0].tolist()) == [-1, 10, 20]
    assert trie.canonical([30]).tolist() == [20]
    scores = score_items(model_of("llama"), [[4]], trie)[0]
    assert scores[0] == scores[2]


def test_wide_levels_in_pieces(monkeypatch):
    strings, model = catalogue(300, 11, longest=3), model_of("llama")
    trie = ItemTrie.from_sequences(strings, eos_id=END)
    ids, mask = prompts(3, 12)
    for score in ("raw", "renorm"):
        want = constrained_beam_search(model, ids, trie, 7, mask, 12, score)
        with monkeypatch.context() as m:
            m.setattr("llmpapers.rere.decode._most_slots", 30)
            got = constrained_beam_search(model, ids, trie, 7, mask, 12, score)
        assert torch.equal(want.items, got.items) and torch.equal(want.certified, got.certified)
    with monkeypatch.context() as m:
        m.setattr("llmpapers.rere.decode._most_logits", 2000)
        got = constrained_beam_search(model, ids, trie, 7, mask, 12, "renorm")
        every = score_items(model, ids, trie, "renorm", mask)
    assert torch.equal(want.items, got.items)
    torch.testing.assert_close(every, score_items(model, ids, trie, "renorm", mask))


# ---- readers -------------------------------------------------------------------------------------
def test_which_reader_a_model_gets():
    for kind in ("llama", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma2", "gemma3_text", "phi3"):
        assert pick_reader(model_of(kind))[0] is SharedReader, pick_reader(model_of(kind))
    make, faults = pick_reader(model_of("bloom"))
    assert make is not SharedReader and "SharedReader" in faults
    make, faults = pick_reader(model_of("mamba"))
    assert make is PlainReader and set(faults) == {"SharedReader", "RowsReader"}
    assert pick_reader(favouring(5)) == (PlainReader, {})


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_windows_shorter_than_the_prompt(kind):
    "The zoo's windows are eight tokens; prompts are longer"
    model = model_of(kind)
    trie = ItemTrie.from_sequences(catalogue(30, 13), eos_id=END)
    ids, mask = prompts(3, 14, longest=30)
    assert pick_reader(model, 40)[0] in (SharedReader, RowsReader)
    found = constrained_beam_search(model, ids, trie, 5, mask, exact=True)
    for b in range(3):
        prompt = ids[b][mask[b].bool()].tolist()
        strings = [[t for t in s if t >= 0] for s in found.tokens[b].tolist()]
        want = slow_scores(model, prompt, strings, "raw", trie)
        torch.testing.assert_close(found.scores[b], want, atol=2e-4, rtol=1e-4)


def test_a_reader_that_is_wrong_is_not_taken():
    class Late(SharedReader):
        def feed(self, tokens, parent):
            self.fed += 1  # positions one too far
            return super().feed(tokens, parent)

    assert "differ" in reader_fault(Late, model_of("llama"))
    assert reader_fault(RowsReader, model_of("llama")) is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_reader_that_says_nan_is_wrong(at):
    "NaN in the first distribution or in a later one"

    class Gone(RowsReader):
        def start(self):
            self.fed = 0
            return super().start() * (torch.nan if at == 0 else 1.0)

        def feed(self, tokens, parent):
            self.fed += 1
            return super().feed(tokens, parent) * (torch.nan if self.fed == at else 1.0)

    assert "differ by nan" in reader_fault(Gone, model_of("llama"))


def test_half_precision_ranks_as_single_up_to_its_rounding(tmp_path):
    folder = hub.hub_folder(tmp_path / "m", "llama")
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    full = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trie = ItemTrie.from_sequences(catalogue(60, 15, 200), eos_id=END)
    a = constrained_beam_search(half, [[5, 6, 7]], trie, 60, exact=True)
    assert a.scores.dtype == torch.float32
    want = score_items(full, [[5, 6, 7]], trie)[0]
    there = a.items[0][a.items[0] >= 0]
    assert (want[there] - a.scores[0][: len(there)]).abs().max() < 0.5


# ---- sampling ------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_probabilities_they_report(temperature):
    strings = [[5, 6], [5, 7], [8], [9, 4, 4]]
    trie, model = ItemTrie.from_sequences(strings, eos_id=END), model_of("llama")

    def heated(ids):
        with torch.no_grad():
            return model(input_ids=ids).logits / temperature

    p = score_items(heated, [[5, 6]], trie, "renorm")[0].exp()
    n = 4000
    drawn = constrained_sample(
        model, [[5, 6]], trie, n, temperature, torch.Generator().manual_seed(0)
    )
    share = torch.bincount(drawn.items[0], minlength=4) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all(), (share, p)
    torch.testing.assert_close(drawn.scores[0].exp(), p[drawn.items[0]], atol=1e-4, rtol=1e-3)
    raw = constrained_sample(
        model, [[5, 6]], trie, 50, temperature, torch.Generator().manual_seed(0), score="raw"
    )
    assert torch.equal(raw.items, drawn.items[:, :50]) or temperature
    want = score_items(model, [[5, 6]], trie, "raw")[0]
    torch.testing.assert_close(raw.scores[0], want[raw.items[0]], atol=1e-4, rtol=1e-4)


def test_greedy_draws_follow_the_best_legal_token():
    model = model_of("llama")
    trie = ItemTrie.from_sequences(catalogue(40, 16), eos_id=END)
    ids, mask = prompts(3, 17)
    drawn = constrained_sample(model, ids, trie, 2, temperature=0, attention_mask=mask)
    one = constrained_beam_search(model, ids, trie, 1, mask, width=1, score="renorm")
    assert (drawn.items[:, :1] == one.items).all() and (
        drawn.items[:, 0] == drawn.items[:, 1]
    ).all()


def test_groups_for_a_trainer():
    model = model_of("qwen3")
    trie = ItemTrie.from_sequences(catalogue(30, 18), eos_id=END)
    group = draw_items(model, [5, 6, 7], trie, 8)
    assert len({d.item for d in group}) == 8
    for d in group:
        ids = torch.tensor([[5, 6, 7] + d.tokens])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        want = logp[torch.arange(2, ids.shape[1] - 1), ids[0, 3:]]
        torch.testing.assert_close(torch.tensor(d.logprobs), want, atol=1e-4, rtol=0)
        assert abs(sum(d.logprobs) - d.score) < 1e-5
    assert len(draw_items(model, [5], trie, 99)) == len(torch.unique(trie.canonical(range(30))))
    drawn = draw_items(model, [5], trie, 5, "sample", generator=torch.Generator().manual_seed(1))
    assert len(drawn) == 5
    with pytest.raises(ValueError, match="how='beams'"):
        draw_items(model, [5], trie, 5, "beams")


# ---- other engines -------------------------------------------------------------------------------
def test_the_floors_engine_writes_items_only():
    model = model_of("llama")
    strings = catalogue(20, 19)
    trie = ItemTrie.from_sequences(strings, eos_id=(END, 3))
    sampling = SamplingConfig(6, 1.0, stop_token_ids=(END, 3), seed=0)
    asks = [Request(f"r{i}", [5, 6], sampling, constraint=TrieConstraint(trie)) for i in range(12)]
    for done in generate(HFEngine(model), asks):
        node = trie.walk(done.token_ids)[-1]
        assert node >= 0 and trie.item_at(node[None])[0] >= 0 and done.finish_reason == "stop"


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_with_the_processor_writes_items_only(beams):
    model = model_of("llama")
    trie = ItemTrie.from_sequences(catalogue(30, 20), eos_id=END)
    ids, mask = prompts(3, 21)
    processor = TrieLogitsProcessor(trie, ids.shape[1])
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=mask,
        logits_processor=transformers.LogitsProcessorList([processor]),
        do_sample=beams == 1,
        num_beams=beams,
        max_new_tokens=5,
        eos_token_id=END,
        pad_token_id=0,
    )
    for row in out[:, ids.shape[1] :].tolist():
        node = trie.walk(row[: row.index(END) + 1])[-1]
        assert trie.item_at(node[None])[0] >= 0
    with pytest.raises(ValueError, match="end_id"):
        TrieLogitsProcessor(ItemTrie.from_sequences([[4], [5]]), 3)


# ---- bad input -----------------------------------------------------------------------------------
@functools.cache
def small():
    return ItemTrie.from_sequences([[5, 6], [7]], eos_id=END)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(num_items=0), "num_items=0"),
        (dict(num_items=3, width=2), "width=2 is less than num_items=3"),
        (dict(score="log"), "score='log'"),
        (dict(input_ids=[[V]]), f"token {V}"),
        (dict(input_ids=[[-5]]), "token -5"),
        (dict(input_ids=[5, 6]), "input_ids"),
        (dict(input_ids=torch.ones(1, 2)), "input_ids"),
        (dict(attention_mask=[[0, 0]]), r"input_ids\[0\] has no real token"),
        (dict(attention_mask=[[1]]), "attention_mask"),
        (dict(allowed=torch.ones(3, dtype=torch.bool)), "allowed"),
        (dict(allowed=torch.ones(2)), "allowed"),
        (dict(allowed=torch.ones(3, 2, dtype=torch.bool)), "allowed has 3 rows for 1 prompts"),
        (dict(trie=ItemTrie.from_sequences([[V + 3]])), f"token {V + 3}"),
        (dict(model=lambda ids: torch.full((*ids.shape, V), torch.nan)), "NaN"),
        (dict(model=lambda ids: torch.zeros(len(ids), V)), "logits of shape"),
    ],
)
def test_bad_input_is_named(change, text):
    args = dict(model=model_of("llama"), input_ids=[[4, 5]], trie=small(), num_items=2) | change
    with pytest.raises(ValueError, match=text):
        constrained_beam_search(**args)
    with pytest.raises(TypeError, match="ItemTrie"):
        constrained_beam_search(model_of("llama"), [[4]], [[5, 6]], 2)


def test_more_items_than_there_are():
    trie = ItemTrie.from_sequences(catalogue(30, 22), eos_id=END)
    n = len(torch.unique(trie.canonical(range(30))))
    found = constrained_beam_search(model_of("llama"), [[4, 5]], trie, 38)
    items = found.items[0].tolist()
    assert len(set(items[:n])) == n and min(items[:n]) >= 0 and set(items[n:]) == {-1}
    assert found.certified.all() and (found.lengths[0, n:] == 0).all()
    assert not found.logprobs[0, n:].any()


def test_what_a_model_cannot_do_is_said_before_it_is_asked():
    trie = ItemTrie.from_sequences([[5, 6, 7], [8]], eos_id=END)
    config = transformers.GPT2Config(vocab_size=V, n_positions=12, n_embd=8, n_layer=1, n_head=1)
    learned = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.full((2, 9), 5)
    assert constrained_beam_search(learned, ids, trie, 2).items.shape == (2, 2)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=12)
    config = transformers.Qwen3Config(vocab_size=V, **sizes)
    turning = transformers.AutoModelForCausalLM.from_config(config).eval()
    for model in (learned, turning):
        for ask in (constrained_beam_search, constrained_sample):
            with pytest.raises(ValueError, match="input_ids: a prompt of 10 tokens.*reads 12"):
                ask(model, torch.full((2, 10), 5), trie, 2)
        with pytest.raises(ValueError, match="reads 12"):
            score_items(model, torch.full((2, 10), 5), trie)
    beyond = ItemTrie.from_sequences([[5]], eos_id=[END, V + 4])
    for ask in (constrained_beam_search, constrained_sample):
        with pytest.raises(ValueError, match=f"token {V + 4}, the model has"):
            ask(learned, ids, beyond, 1)
    with pytest.raises(ValueError, match=f"token {V + 4}, the model has"):
        score_items(learned, ids, beyond)
    with pytest.raises(ValueError, match="hold NaN"):
        score_items(lambda x: torch.full((*x.shape, V), torch.nan), ids, trie)
    with pytest.raises(TypeError, match="generator: need a torch.Generator, got int"):
        constrained_sample(learned, ids, trie, 1, generator=5)
    with pytest.raises(TypeError, match="pass its 'input_ids'"):
        constrained_beam_search(learned, dict(input_ids=ids), trie, 1)


def test_adapters_are_read():
    peft = pytest.importorskip("peft", reason="the extra lora brings adapters")
    trie = ItemTrie.from_sequences(catalogue(12, 3), eos_id=END)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model_of("qwen3"), config).eval()
    ids, mask = prompts(3, 1)
    want = score_items(model, ids, trie, attention_mask=mask)
    got = constrained_beam_search(model, ids, trie, 5, mask, 40)
    torch.testing.assert_close(got.scores, want.gather(1, got.items), atol=1e-4, rtol=0)
    plain = model(input_ids=ids[:1], attention_mask=mask[:1]).logits[0, -1].log_softmax(-1)
    one = ItemTrie.from_sequences([[5], [8]])
    torch.testing.assert_close(
        score_items(model, ids[:1], one, attention_mask=mask[:1])[0], plain[[5, 8]].detach()
    )
    with model.disable_adapter():
        without = score_items(model, ids, trie, attention_mask=mask)
    assert (without - want).abs().max() > 1e-2
