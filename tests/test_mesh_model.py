"""MeSH: the language model, its caches, gradients and files"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.cache_utils import DynamicCache

from llmpapers.mesh.data import (
    byte_ids,
    byte_text,
    modular_chain,
    p_hop_induction,
    pointer_chasing,
    pointer_kinds,
)
from llmpapers.mesh.generate import KVCache, generate, quantized
from llmpapers.mesh.layout import RecursiveConfig
from llmpapers.mesh.model import from_gpt_neox, grads_of, make_lm
from llmpapers.mesh.probes import (
    blocks_of,
    effective_rank,
    rbf_cka,
    singular_spectrum,
    update_magnitude,
)

pytestmark = pytest.mark.timeout(200)
schemes = [
    "base",
    "residual",
    "anchor",
    "static",
    "dynamic",
    "mesh",
    "step",
    "adapter",
    "injection",
]
kinds = st.fixed_dictionaries(
    dict(
        scheme=st.sampled_from(schemes),
        per_loop=st.sampled_from(["none", "lora", "mlp"]),
        norm=st.sampled_from(["pre", "peri", "output"]),
        layout=st.sampled_from(["1+1R2+1", "0+2R3+0", "1+1R4+0"]),
    )
)
small = dict(d_model=16, n_heads=2, vocab_size=30)
ids = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(0))


def stirred(cfg, seed=0):
    "A model in double precision whose every weight is random, so that nothing is hidden by zeros"
    model = make_lm(RecursiveConfig(**small, **cfg), seed).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


@settings(max_examples=25, deadline=None)
@given(kinds, st.integers(1, 8), st.booleans())
def test_cached_is_uncached(cfg, length, own):
    "Prompt of any length, then one token at a time; positions equal tokens fed"
    model = stirred(cfg)
    cache = KVCache(model.config, 3, 9) if own else DynamicCache()
    with torch.no_grad():
        parts = [model(ids[:, :length], past_key_values=cache, use_cache=True).logits]
        for k in range(length, 9):
            parts.append(model(ids[:, k : k + 1], past_key_values=cache, use_cache=True).logits)
            assert {c.get_seq_length() for c in cache.layers} == {k + 1}
        full = model(ids, use_cache=False).logits
    assert len(cache.layers) == model.config.num_hidden_layers
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(kinds, st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 9))
def test_rows_do_not_matter_to_each_other(cfg, lengths, seed):
    "Left padding and company change no logit"
    model = stirred(cfg)
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 30, (n,), generator=g) for n in lengths]
    width = max(lengths)
    pad = torch.nn.functional.pad
    batch = torch.stack([pad(r, (width - len(r), 0)) for r in rows])
    mask = torch.stack([pad(torch.ones_like(r), (width - len(r), 0)) for r in rows])
    with torch.no_grad():
        together = model(batch, attention_mask=mask).logits[:, -1]
        alone = torch.stack([model(r[None]).logits[0, -1] for r in rows])
    assert torch.allclose(together, alone, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(kinds, st.integers(1, 7), st.permutations(range(3)))
def test_cut_and_reordered(cfg, cut, order):
    model, order = stirred(cfg), torch.tensor(order)
    for cache in (KVCache(model.config, None, 12), DynamicCache()):
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            cache.crop(-cut)
            cache.reorder_cache(order)
            again = model(ids[order, 9 - cut :], past_key_values=cache, use_cache=True).logits
            full = model(ids[order]).logits[:, 9 - cut :]
        assert torch.allclose(again, full, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(kinds)
def test_gradients_do_not_depend_on_the_way(cfg):
    "Cache on or off, no checkpointing or either kind: the same loss and all gradients"
    model = stirred(cfg).train()
    plain = grads_of(model, ids)
    for use_cache in (False, True):
        for kind in ("off", "reentrant", "plain"):
            other = grads_of(model, ids, use_cache, kind)
            assert set(other) == set(plain)
            assert all(torch.allclose(other[k], plain[k], atol=1e-11) for k in plain)


@settings(max_examples=15, deadline=None)
@given(kinds, st.integers(0, 8))
def test_causal(cfg, place):
    model, changed = stirred(cfg), ids.clone()
    changed[:, place] = 4 + (changed[:, place] - 3) % 26
    with torch.no_grad():
        gap = (model(ids).logits - model(changed).logits).abs().amax((0, 2))
    assert not gap[:place].any() and gap[place] > 0


@pytest.mark.parametrize("layout, tie", [("1+2R1+1", True), ("0+2R2+0", False)])
@pytest.mark.parametrize("tied_head", [True, False])
def test_one_loop_is_gpt_neox(layout, tie, tied_head):
    cfg = GPTNeoXConfig(
        vocab_size=30,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=48,
        tie_word_embeddings=tied_head,
        rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5, rope_type="default"),
    )
    torch.manual_seed(0)
    hf = GPTNeoXForCausalLM(cfg).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(std=0.3)
    ours = from_gpt_neox(hf, layout, scheme="base", tie_core=tie)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, hf(ids).logits, atol=1e-4, rtol=1e-4)
        a = generate(ours, ids, 4)
    b = hf.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(a, b)


def test_refused_checkpoints():
    cfg = dict(vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    sequential = GPTNeoXForCausalLM(
        GPTNeoXConfig(intermediate_size=32, use_parallel_residual=False, **cfg)
    )
    with pytest.raises(ValueError, match="use_parallel_residual"):
        from_gpt_neox(sequential, "1+1R1+0")
    with pytest.raises(ValueError, match="how="):
        from_gpt_neox(
            GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **cfg)), "0+1R2+0", how="last"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_model_back(tmp_path, dtype):
    cfg = dict(scheme="mesh", layout="1+1R2+1", tie_word_embeddings=True, norm="peri")
    model = stirred(cfg).to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model) and again.dtype == dtype
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).n_slots == 5


def test_autocast_keeps_routers_exact():
    model = stirred(dict(scheme="mesh", layout="1+1R2+1")).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(ids, return_states=True)
    assert out.trace.alpha[-1].dtype == torch.float32
    assert torch.allclose(out.trace.read[-1].sum(-1), torch.ones(3, 9), atol=1e-5)
    assert out.logits.isfinite().all()


def test_a_cache_belongs_to_its_loops():
    model = stirred(dict(scheme="mesh", layout="1+1R3+1"))
    for loops in (1, 2, 5):
        cache = model(ids, n_loops=loops, any_loops=True, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="another number of loops"):
            model(ids[:, :1], past_key_values=cache)
        more = model(ids[:, :1], past_key_values=cache, n_loops=loops, any_loops=True).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), n_loops=loops, any_loops=True).logits
        assert torch.allclose(more, whole[:, -1:], atol=1e-6)


def test_stack_has_no_more_loops():
    model = make_lm(RecursiveConfig(**small, tie_core=False, layout="1+1R2+1"))
    with pytest.raises(ValueError, match="untied stack"):
        model(ids, n_loops=3, any_loops=True)
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="n_loops"):
            model(ids, n_loops=bad, any_loops=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 12), st.integers(1, 6), st.floats(0.1, 9), st.integers(0, 99))
def test_probe_identities(n, width, factor, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, width, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    assert torch.isclose(rbf_cka(x, factor * x @ turn + 1), torch.ones(()).double())
    assert torch.isclose(rbf_cka(x, y), rbf_cka(y, x)) and 0 <= rbf_cka(x, y) <= 1 + 1e-9
    assert rbf_cka(x, torch.ones_like(x)) == 0
    assert update_magnitude(x, x) == 0 and 0 <= update_magnitude(x, y) <= 2 + 1e-12
    assert torch.isclose(update_magnitude(x, y), update_magnitude(y, x))
    assert 1 - 1e-9 <= effective_rank(x) <= min(n, width) + 1e-9
    assert torch.isclose(effective_rank(x), effective_rank(factor * x @ turn))
    assert singular_spectrum(x)[0] == 1


def test_blocks_follow_the_trace():
    model = stirred(dict(scheme="mesh", layout="1+1R3+1"))
    seen = blocks_of(model, ids)
    watched = blocks_of(model, ids, layers=list(model.model.core))
    assert [b.loop for b in watched] == [1, 2, 3]
    for a, b in zip(seen[1:4], watched):
        assert torch.equal(a.input, b.input) and torch.equal(a.output, b.output)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_bytes_round_trip(text):
    assert byte_text(byte_ids(text)) == text


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 99), st.sampled_from(pointer_kinds))
def test_pointer_chasing_follows_its_function(n, hops, seed, kind):
    task = pointer_chasing(n, hops, 3, seed, kind)
    for row, labels in zip(task["input_ids"] - 4, task["labels"] - 4):
        f = {int(a): int(b) for a, b in row[: 2 * n].view(n, 2)}
        assert len(f) == n
        assert kind == "function" or len(set(f.values())) == n
        x = int(row[2 * n])
        if kind == "cycle":
            round_trip = [x]
            while f[round_trip[-1]] != x:
                round_trip.append(f[round_trip[-1]])
            assert len(round_trip) == n
        for j in range(hops):
            x = f[x]
            assert int(labels[2 * n + 2 + j]) == x
    assert (task["labels"] != -100).sum() == 3 * hops


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 99))
def test_chain_adds_up(modulus, length, seed):
    task = modular_chain(modulus, length, 2, seed)
    x, labels = task["input_ids"][:, :-1] - 4, task["labels"][:, 1:] - 4
    assert torch.equal(labels, x.cumsum(1) % modulus)
    assert p_hop_induction(modulus, length, 1, 2, seed)["labels"].shape == (2, length + 1)


def test_rounding_is_idempotent():
    model = stirred(dict(scheme="mesh", layout="1+1R2+1"))
    for bits in (3, 8):
        once = quantized(model, bits, "all")
        twice = quantized(once, bits, "all")
        pairs = zip(once.parameters(), twice.parameters())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert torch.equal(once.lm_head.weight, model.lm_head.weight)
