"""Rollout engines: schedules do not matter, versions cover every token, weights arrive whole or
not at all"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import TinyLMConfig, tiny_lm, word_tokenizer
from llmpapers.rl import vllm as over_vllm
from llmpapers.rl.decoder import Decoder, why_not
from llmpapers.rl.engines import (
    CachedPath,
    HFEngine,
    ScriptedEngine,
    _Row,
    generate,
    path_fault,
    sample_tokens,
)
from llmpapers.rl.logprobs import token_logprobs
from llmpapers.rl.types import Request, SamplingConfig
from llmpapers.rl.weights import WeightSyncError, check_sync, probe_ids

tok = word_tokenizer([*"abcdefghij", "end"])
end = tok("end").input_ids[0]
models = [
    tiny_lm(tok, TinyLMConfig(arch=a, layers=2, width=32, head_dim=16, max_len=64), seed=i)
    for i, a in enumerate(("qwen3", "gpt_neox", "qwen3"))
]


def requests(lengths, seed=0, new=10, temperature=1.0):
    g = torch.Generator().manual_seed(seed)
    sc = SamplingConfig(new, temperature, (end,), seed)
    return [
        Request(f"r{i}", torch.randint(4, len(tok), (n,), generator=g).tolist(), sc)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([0, 1]),
    st.sampled_from([None, Decoder]),
)
def test_schedule_does_not_matter(lengths, max_active, cache, late, which, decoder):
    """Batch size, cache, late requests and an abort with resume leave tokens as they are and
    log-probabilities within 1e-5"""
    rs = requests(lengths)
    alone = HFEngine(models[which], use_cache=False)
    want = {r.request_id: generate(alone, [r])[0] for r in rs}
    e = HFEngine(models[which], max_active=max_active, use_cache=cache, decoder=decoder)
    got = {}
    for r in rs:
        e.add(r)
        for _ in range(late):
            got |= {c.request_id: c for c in e.step()}
    parts = {c.request_id: c for c in e.abort()}
    assert e.num_active == 0
    for r in rs:
        if r.request_id in parts:
            e.add(
                Request(
                    r.request_id,
                    r.prompt_ids,
                    r.sampling,
                    parts[r.request_id] if parts[r.request_id].token_ids else None,
                )
            )
    while e.num_active:
        got |= {c.request_id: c for c in e.step()}
    for k, w in want.items():
        assert got[k].token_ids == w.token_ids and got[k].finish_reason == w.finish_reason
        assert max(abs(a - b) for a, b in zip(got[k].logprobs, w.logprobs)) < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_weights_in_the_middle(first, second, cache):
    "Each token has the log-probability of the version it carries, with a cache and without"
    e = HFEngine(models[0], use_cache=cache, copy_model=True)
    rs = requests([1, 5, 9])
    for r in rs:
        e.add(r)
    done = []
    for v, steps in ((1, first), (2, second)):
        for _ in range(steps):
            done += e.step()
        e.load_weights(models[2 if v == 1 else 0].state_dict(), v)
    while e.num_active:
        done += e.step()
    of = {0: models[0], 1: models[2], 2: models[0]}
    by = {r.request_id: r for r in rs}
    for c in done:
        ids = torch.tensor([by[c.request_id].prompt_ids + c.token_ids])
        for v, a, b in c.versions:
            with torch.no_grad():
                lp = token_logprobs(of[v](input_ids=ids).logits, ids)[
                    0, len(by[c.request_id].prompt_ids) :
                ]
            assert (lp[a:b] - torch.tensor(c.logprobs[a:b])).abs().max() < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 50), st.floats(0, 0.9999), st.floats(0.1, 3), st.integers(0, 99))
def test_inversion(V, u, temperature, seed):
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * 3
    i, lp = sample_tokens(z, torch.tensor([u]), torch.tensor([temperature]))
    p = (z[0].double() / temperature).softmax(-1)
    cdf = p.cumsum(-1)
    k = int(i)
    assert (
        cdf[k] > u - 1e-6
        and (k == 0 or cdf[k - 1] <= u + 1e-6)
        and abs(lp.item() - p[k].log().item()) < 1e-4
    )


def test_tokens_without_mass_are_never_drawn():
    z = torch.tensor([[-1e9, 0.0, -1e9, 0.0]]).expand(1001, -1)
    ids, _ = sample_tokens(z, torch.linspace(0, 1 - 1e-7, 1001), torch.ones(1001))
    assert set(ids.tolist()) == {1, 3}


def test_greedy_needs_no_seed():
    a, b = (
        generate(HFEngine(models[0]), requests([3, 4], seed=5, temperature=0.0)) for _ in range(2)
    )
    assert [c.token_ids for c in a] == [c.token_ids for c in b]


def test_errors_name_the_argument():
    e = HFEngine(models[0])
    r = requests([3])[0]
    e.add(r)
    with pytest.raises(ValueError, match="request_id"):
        e.add(r)
    with pytest.raises(ValueError, match="64"):
        e.add(Request("long", [4] * 60, SamplingConfig(5)))
    with pytest.raises(ValueError, match="active requests"):
        generate(e, [r])
    with pytest.raises(ValueError, match="max_active"):
        HFEngine(models[0], max_active=0)
    with pytest.raises(ValueError, match="missing"):
        HFEngine(models[0], copy_model=True).load_weights({}, 1)
    w = dict(models[0].state_dict())
    k = next(iter(w))
    w[k] = w[k][:-1]
    with pytest.raises(ValueError, match="shape"):
        HFEngine(models[0], copy_model=True).load_weights(w, 1)
    with pytest.raises(ValueError, match="safetensors"):
        HFEngine(models[0]).load_weights("/nowhere", 1)


def test_half_loaded_weights_leave_the_old_ones():
    e = HFEngine(models[0], copy_model=True)
    before = {k: v.clone() for k, v in e.model.state_dict().items()}
    w = dict(models[2].state_dict())
    w["unknown"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown"):
        e.load_weights(w, 1)
    assert (
        all(torch.equal(before[k], v) for k, v in e.model.state_dict().items()) and e.version == 0
    )


def test_probe_notices_other_weights():
    ids = probe_ids(len(tok))
    want = HFEngine(models[0]).logprobs(ids)
    assert check_sync(HFEngine(models[0], copy_model=True), want, ids) == 0
    with pytest.raises(WeightSyncError, match="did not arrive"):
        check_sync(HFEngine(models[2]), want, ids)


def test_scripted_engine_keeps_its_script():
    e = ScriptedEngine(lambda r: len(r.prompt_ids), max_active=2)
    out = generate(e, requests([3, 1, 2]))
    assert [len(c.token_ids) for c in out] == [3, 1, 2] and e.num_active == 0


def test_decoder_is_used_where_it_agrees_and_hooks_are_not_lost():
    "Qwen is written out, GPT-NeoX is not; a hook or a norm that is put on later is seen at once"
    assert why_not(models[0]) is None and "GPTNeoX" in why_not(models[1])
    m = tiny_lm(tok, TinyLMConfig(layers=2, width=32, head_dim=16, max_len=64), seed=0)
    rs, e = requests([2, 6, 1]), HFEngine(m, decoder=Decoder)
    first = generate(e, rs)
    assert type(e.path) is Decoder and e.why_plain is None
    seen = []
    m.model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(1))
    second = generate(e, rs)
    assert type(e.path) is CachedPath and "has a hook" in e.why_plain and seen
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    neox = HFEngine(models[1], decoder=Decoder)
    generate(neox, rs)
    assert type(neox.path) is CachedPath and "GPTNeoX" in neox.why_plain


class Off(Decoder):
    "A decoder with a mistake that no list of names shows"

    def refresh(self):
        super().refresh()
        self.head = self.head * 1.01


def test_a_path_that_is_wrong_is_never_used_and_says_why():
    rs = requests([2, 6, 1])
    e = HFEngine(models[0], decoder=Off)
    got = generate(e, rs)
    assert type(e.path) is CachedPath and "differ by" in e.why_plain
    want = generate(HFEngine(models[0], use_cache=False), rs)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert path_fault(models[0], Decoder(models[0])) is None


@pytest.mark.parametrize("first", [0, 2])
def test_a_path_that_says_nan_is_wrong(first):
    "NaN from the first distribution on, or from a later one, is a difference"

    class Gone(Decoder):
        def next(self, ids):
            self.steps = getattr(self, "steps", 0) + 1
            return super().next(ids) * (torch.nan if self.steps >= first else 1.0)

        def read_in(self, seqs):
            return super().read_in(seqs) * (torch.nan if not first else 1.0)

    assert "differ by nan" in path_fault(models[0], Gone(models[0]))
    e = HFEngine(models[0], decoder=Gone)
    generate(e, requests([2, 6]))
    assert type(e.path) is CachedPath and "nan" in e.why_plain


def test_errors_of_a_call_are_not_raised_by_the_next():
    "Two requests fail in one step: the call that made them raises, the next one works"

    class Fails:
        def allowed(self, token_ids):
            if token_ids:
                raise KeyError("no such item")
            return None

    e, rs = HFEngine(models[0]), requests([3, 2, 4])
    with pytest.raises(RuntimeError, match="failed"):
        generate(e, [replace(r, constraint=Fails()) for r in rs[:2]] + rs[2:])
    assert not e.errors and e.num_active == 0
    assert len(generate(e, rs)) == 3


# ---- vLLM's side, without vLLM -------------------------------------------------------------------
class Says:
    "A constraint that gives the same answer always"

    def __init__(self, answer):
        self.answer = answer

    def allowed(self, token_ids):
        return self.answer


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor, range])
def test_a_constraint_of_vllm_may_answer_with_any_sequence(kind):
    answer = range(2, 4) if kind is range else kind([2, 3])
    got = over_vllm._among_allowed(Says(answer), (), [], torch.arange(6.0))
    assert got.isfinite().nonzero().flatten().tolist() == [2, 3]
    assert torch.equal(got[2:4], torch.arange(2.0, 4.0))


def test_a_token_that_vllm_should_not_have_drawn_ends_the_request():
    "The processor let everything pass, because the constraint failed there or named no token"
    token = SimpleNamespace(logprob=-1.0)
    out = SimpleNamespace(token_ids=[5], logprobs=[{5: token}], finish_reason=None)
    out = SimpleNamespace(outputs=[out], finished=False)
    ask = requests([3])[0]
    for answer, why in (([2, 3], "drew token 5"), ([2, 77], "the model has 15")):
        row = _Row(replace(ask, constraint=Says(answer)), n_tokens=15)
        with pytest.raises((RuntimeError, ValueError), match=why):
            over_vllm._take_in(row, 0, out, 0)
    row = _Row(replace(ask, constraint=Says(np.array([5]))), n_tokens=15)
    assert over_vllm._take_in(row, 0, out, 0) is None and row.sets == [(5,)]


def test_processors_of_the_caller_stand_beside_ours(monkeypatch, tmp_path):
    class Made(Exception):
        pass

    def llm(folder, **args):
        raise Made(args["logits_processors"])

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(over_vllm, "need", lambda *a: SimpleNamespace(LLM=llm))
    monkeypatch.setattr(over_vllm, "_constraint_processor", lambda: "ours")
    monkeypatch.setattr(over_vllm, "_quiet", partial(pytest.MonkeyPatch.context))
    for more, want in ((dict(logits_processors=["theirs"]), ["ours", "theirs"]), ({}, ["ours"])):
        with pytest.raises(Made) as e:
            over_vllm.VLLMEngine(tmp_path, **more)
        assert e.value.args == (want,)


def test_a_model_that_is_changed_in_kind_is_probed_again():
    "Attention with another scale, a replaced norm: the decoder computes something else and goes"
    m = tiny_lm(tok, TinyLMConfig(layers=2, width=32, head_dim=16, max_len=64), seed=0)
    rs, e = requests([2, 6, 1]), HFEngine(m, decoder=Decoder)
    generate(e, rs)
    assert type(e.path) is Decoder
    m.model.layers[0].self_attn.scaling *= 2
    got = generate(e, rs)
    assert type(e.path) is CachedPath
    want = generate(HFEngine(m, use_cache=False), rs)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]


def test_scores_come_from_the_path_that_samples():
    "A wrong path cannot hide behind a plain pass when engine and trainer are compared"
    ids = probe_ids(len(tok))
    e = HFEngine(models[0], decoder=Decoder)
    plain = HFEngine(models[0], use_cache=False).logprobs(ids)
    assert check_sync(e, plain, ids, tol=1e-4) > 0  # another way to the same numbers
    with torch.no_grad():
        assert max(abs(a - b) for a, b in zip(e.logprobs(ids), plain)) < 1e-5


class Upwards:
    "Each token larger than the one before"

    def allowed(self, token_ids):
        return list(range(token_ids[-1] + 1 if token_ids else 4, len(tok)))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([False, True, Decoder]),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
)
def test_only_allowed_tokens_with_their_own_distribution(lengths, max_active, how, temperature):
    rs = [
        Request(r.request_id, r.prompt_ids, r.sampling, constraint=Upwards())
        for r in requests(lengths, temperature=temperature)
    ]
    decoder = how if how is Decoder else None
    e = HFEngine(models[0], max_active=max_active, use_cache=bool(how), decoder=decoder)
    for r, c in zip(rs, generate(e, rs)):
        assert c.token_ids == sorted(set(c.token_ids)) and c.finish_reason == "stop"
        for t, (token, logp, allowed) in enumerate(zip(c.token_ids, c.logprobs, c.allowed)):
            with torch.no_grad():
                z = models[0](torch.tensor([r.prompt_ids + c.token_ids[:t]])).logits[0, -1]
            z = z[list(allowed)] / (temperature or 1.0)
            assert abs(z.log_softmax(-1)[list(allowed).index(token)].item() - logp) < 1e-4


@pytest.mark.parametrize("told", [True, False])
def test_decoder_sees_weights_that_change_in_place(told):
    """A trainer changes the shared module: seen at once after `load_weights(None)`, otherwise from
    the next batch on"""
    m = tiny_lm(tok, TinyLMConfig(layers=2, width=32, head_dim=16, max_len=64), seed=0)
    rs, e = requests([2, 6, 1]), HFEngine(m, decoder=Decoder)
    generate(e, rs)
    if told:
        for r in rs:
            e.add(r)
        early = {c.request_id: c for _ in range(3) for c in e.step()}
    with torch.no_grad():
        for a, b in zip(m.parameters(), models[2].parameters()):
            a.copy_(b)
    if told:
        e.load_weights(None, 1)
        got = early | {c.request_id: c for _ in range(20) for c in e.step()}
        with torch.no_grad():
            for r in rs:
                ids = torch.tensor([r.prompt_ids + got[r.request_id].token_ids])
                n = len(r.prompt_ids)
                lp = [
                    token_logprobs(models[k](input_ids=ids).logits, ids)[0, n:].tolist()
                    for k in (0, 2)
                ]
                for t, (v, x) in enumerate(
                    zip(got[r.request_id].token_versions(), got[r.request_id].logprobs)
                ):
                    assert abs(lp[v][t] - x) < 1e-5
        assert any(1 in c.token_versions() for c in got.values())
    else:
        assert [c.token_ids for c in generate(e, rs)] == [
            c.token_ids for c in generate(HFEngine(models[2], use_cache=True), rs)
        ]


def test_memory_of_the_block_is_kept_and_wiped_of_meaning():
    "A second batch in the same memory gives what a fresh engine gives"
    e = HFEngine(models[0], decoder=Decoder)
    generate(e, requests([12, 9, 11, 3], seed=1))
    where = e.path.block.layers[0][0].data_ptr()
    rs = requests([4, 1, 7])
    assert [c.token_ids for c in generate(e, rs)] == [
        c.token_ids for c in generate(HFEngine(models[0], use_cache=False), rs)
    ]
    assert e.path.block.layers[0][0].data_ptr() == where
