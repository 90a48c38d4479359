"""Capture against a plain pass, one architecture after the other: a method agrees with the eager
maps of each row alone, or it refuses by name and recommends nothing that fails. A dozen models, and
with LLMPAPERS_SWEEP=all every causal model of the installed Transformers"""

import copy
import os
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from llmpapers.attention_rhythm import capture
from llmpapers.attention_rhythm.analysis import perturb_rollouts, sample_responses, token_entropy
from llmpapers.attention_rhythm.capture import capture_attention, capture_ways, rhythm_signals
from llmpapers.attention_rhythm.metrics import fai, head_spans, waad

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MORE = dict(  # what some architectures have besides, as small as it gets
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    word_embed_proj_dim=32,
    ffn_dim=48,
    decoder_layers=4,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    encoder_layers=4,
    rotary_dim=8,
    attn_layer_period=2,
    attn_layer_offset=1,
    attn_layer_indices=[1, 3],
    embedding_size=32,
    d_ff=48,
    num_layers=4,
    sliding_window=6,
    mamba_d_state=4,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_num_heads=4,
    mamba_head_dim=16,
    state_size=8,
    num_heads=4,
    kv_channels=8,
)
NO_HEADS = dict(head_dim=None, num_key_value_heads=4)
VARIANTS = (MORE, MORE | NO_HEADS, MORE | dict(num_key_value_heads=4), {}, NO_HEADS)
PICKED = dict(
    Llama=dict(),
    Mistral=dict(sliding_window=5),
    Gemma2=dict(sliding_window=5),
    Gemma3Text=dict(sliding_window=5),
    GptOss=dict(sliding_window=8),
    DeepseekV3=dict(num_key_value_heads=4),
    GPTBigCode=dict(multi_query=True),
    Falcon=dict(multi_query=True),
    Bloom=dict(),
    GPT2=dict(),
    GPTNeo=dict(attention_types=[[["global", "local"], 2]], window_size=5),
    Granite=dict(attention_multiplier=0.5),
    StableLm=dict(),
    Qwen3Next=dict(
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
)
REFUSED = ("GptOss",)  # the others must agree, by all three methods
KW = dict(window=4, h_lo=2, h_hi=9)


def config_class(name):
    return getattr(transformers, name + "Config")


def build(config_of, more=None, sharp=4.0, **given):
    "A tiny eager model whose attention is not flat, or None if it is not tiny with these sizes"
    default, sizes = config_of(), {}
    for k, v in (TINY | (more or {})).items():
        alias = getattr(default, "attribute_map", {}).get(k, k)
        settable = not isinstance(getattr(type(default), k, None), property)
        if v is not None and hasattr(default, k) and settable and alias not in given:
            sizes[alias] = v
    config = config_of(**sizes | given)
    make = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        if sum(p.numel() for p in make(config).parameters()) > 3_000_000:
            return None
    torch.manual_seed(0)
    model = make(copy.deepcopy(config), attn_implementation="eager").eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(sharp)
    return model


def tokens(side="left", lens=(24, 17), n=26):
    "Ids, attention mask, response mask: two rows padded on a side, and once on both"
    ids, real, resp = torch.full((len(lens), n), 3), *torch.zeros(2, len(lens), n).long()
    for i, length in enumerate(lens):
        a = n - length if side == "left" else 0
        g = torch.Generator().manual_seed(i)
        ids[i, a : a + length] = torch.randint(4, 64, (length,), generator=g)
        real[i, a : a + length] = 1
        resp[i, a + 6 : a + length] = 1
    return ids, real, resp.bool()


@torch.no_grad()
def own_maps(model, row):
    "Eager maps of one row alone, by number of the layer; by position where the model does not say"
    maps = [a[0] for a in model(row[None], output_attentions=True, use_cache=False).attentions]
    config = model.config.get_text_config()
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or []
    where = [i for i, k in enumerate(kinds) if k in ("attention", "full_attention", "hybrid")]
    if len(maps) == config.num_hidden_layers or len(where) != len(maps):
        where = range(len(maps))
    return dict(zip(where, maps))


def check(model, method, side="left", layers=None, maps_of=own_maps, tol=1e-4):
    "The signals against the maps of each row alone"
    ids, real, resp = tokens(side)
    s = rhythm_signals(model, ids, real, resp, layers=layers, method=method, **KW)
    layers = capture._choose_layers(layers, order_of(model, ids, real), "")
    spans, total = 0, 0
    for i in range(len(ids)):
        m = real[i].bool()
        maps, r = torch.stack([maps_of(model, ids[i, m])[k] for k in layers]), resp[i, m]
        loc, glob = (maps[h[:, 0], h[:, 1]].mean(0) for h in s.heads)
        torch.testing.assert_close(s.waad[i, m], waad(loc, r, KW["window"]), atol=tol, rtol=0)
        f = fai(glob, r, KW["h_lo"], KW["h_hi"])
        torch.testing.assert_close(s.fai[i, m], f, atol=tol, rtol=0)
        spans = spans + head_spans(maps, r) * r.sum()
        total = total + r.sum()
    torch.testing.assert_close(s.spans, spans / total, atol=tol * 10, rtol=1e-4)
    assert not s.waad[~resp].any() and not s.fai[~resp].any()
    return s


def order_of(model, ids, real):
    front = capture._to_front(ids, real.bool())
    return [p.layer for p in capture._look(model, front, "dense").places]


def agrees_or_refuses(model, name):
    "Methods that agree; of the others the message names the model and recommends only what works"
    good, advice = set(), {}
    for method in capture_ways:
        try:
            check(model, method)
            good.add(method)
        except NotImplementedError as e:
            assert type(capture._base(model)).__name__ in str(e) and "model" in str(e), e
            advice[method] = str(e)
    for method, text in advice.items():
        for other in capture_ways:
            assert f'method="{other}"' not in text or other in good, (name, method, text)
    return good


@pytest.mark.parametrize("name", PICKED)
def test_picked_models(name):
    more = {k: v for k, v in MORE.items() if k != "sliding_window"}
    model = build(config_class(name), more, **PICKED[name])
    good = agrees_or_refuses(model, name)
    assert good == set(() if name in REFUSED else capture_ways), f"{name}: {sorted(good)}"
    assert not model.training
    assert model.config.get_text_config()._attn_implementation == "eager"


def all_models():
    "Configurations of all causal models of Transformers"
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if os.environ.get("LLMPAPERS_SWEEP") == "all":
        return list(names)
    return [pytest.param("all", marks=pytest.mark.skip(reason="needs LLMPAPERS_SWEEP=all"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", all_models())
def test_all_models(kind):
    model, why = None, ""
    for more in VARIANTS:
        try:
            model = build(transformers.AutoConfig.for_model(kind).__class__, more)
            if model is not None:
                own_maps(model, torch.arange(4, 20))
                break
            why = "it is not tiny with these sizes"
        except Exception as e:  # an architecture with other needs
            model, why = None, f"{type(e).__name__}: {e}"[:150]
    if model is None:
        pytest.skip(f"{kind} does not build, or gives no maps, from these sizes ({why})")
    agrees_or_refuses(model, kind)


# ---- which layers --------------------------------------------------------------------------------
def test_layer_numbers_are_those_of_the_model():
    "Layers 1 and 3 have attention: they are the default, and the others are refused by number"
    model = build(config_class("Qwen3Next"), MORE, **PICKED["Qwen3Next"])
    for method in capture_ways:
        s = check(model, method)
        assert s.spans.shape[0] == 2
        check(model, method, layers=[3])
        with pytest.raises(ValueError, match=r"layers=\[0, 1\].*\[1, 3\]"):
            rhythm_signals(model, *tokens(), layers=[0, 1], method=method, **KW)
    ids, real, _ = tokens()
    row = ids[0, real[0].bool()]
    assert torch.equal(capture_attention(model, row, None, [3])[0, 0], own_maps(model, row)[3])
    for bad in ([1.5], [True], [], [3, 1], [4]):
        with pytest.raises(ValueError, match="layers="):
            rhythm_signals(model, *tokens(), layers=bad, **KW)


def test_sinks_are_named_and_nothing_is_recommended():
    model = build(config_class("GptOss"), MORE, **PICKED["GptOss"])
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_()
    for method in capture_ways:
        with pytest.raises(NotImplementedError, match="sink") as e:
            rhythm_signals(model, *tokens(), method=method, **KW)
        assert "method=" not in str(e.value)


def test_a_way_that_fails_is_not_recommended():
    "Falcon cannot change its implementation once it is made"
    falcon = build(config_class("Falcon"), MORE, multi_query=True)
    falcon.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="'sdpa'.*; load it with") as e:
        capture_attention(falcon, tokens()[0])
    assert "set_attn_implementation" not in str(e.value)
    llama = build(config_class("Llama"))
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        capture_attention(llama, tokens()[0])
    llama.set_attn_implementation("eager")
    assert capture_attention(llama, tokens()[0]).shape == (2, 2, 4, 26, 26)


def test_a_model_without_attention_is_refused_by_name():
    model = build(config_class("Mamba"), MORE)
    with pytest.raises(NotImplementedError, match="MambaModel.*no attention maps"):
        rhythm_signals(model, *tokens(), **KW)


def test_no_hook_is_left_in_the_model():
    "Neither ours nor those of Transformers, which other code takes for a change of the model"
    model = build(config_class("Llama"))
    for method in capture_ways:
        rhythm_signals(model, *tokens(), method=method, **KW)
        for m in model.modules():
            assert not m._forward_hooks and not m._forward_pre_hooks
    assert model.model(tokens()[0], output_attentions=True).attentions[0].shape == (2, 4, 26, 26)


def test_changed_attention_is_looked_at_again():
    "A module whose forward pass was replaced is compared anew, and taken layer by layer"
    model = build(config_class("Llama"))
    rhythm_signals(model, *tokens(), **KW)
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def doubled(hidden_states, *args, **kw):
        attention.scaling *= 2 if model.config._attn_implementation == capture._name else 1
        try:
            return plain(hidden_states, *args, **kw)
        finally:
            attention.scaling /= 2 if model.config._attn_implementation == capture._name else 1

    attention.forward = doubled
    assert "differs" in look(model, "band").refusal
    check(model, "band")
    check(model, "dense")


def look(model, method):
    ids, real, _ = tokens()
    return capture._look(model, capture._to_front(ids, real.bool()), method)


def test_flat_attention_does_not_hide_a_wrong_scale(monkeypatch):
    "At initialisation all heads attend almost uniformly; a wrong scale is found all the same"
    model = build(config_class("Granite"), sharp=1.0, attention_multiplier=0.5)
    check(model, "band")
    real = capture._Recorder.attention

    def wrong(self, q, k, scaling, *args):
        return real(self, q, k, scaling * 2, *args)

    assert look(model, "band").refusal is None
    monkeypatch.setattr(capture._Recorder, "attention", wrong)
    assert "differs" in look(model, "band").refusal


# ---- frequencies that depend on the input --------------------------------------------------------
def stretched(kind):
    if kind == "longrope":
        factors = dict(short_factor=[1.0] * 4, long_factor=[6.0] * 4)
        how = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=20)
        sizes = dict(original_max_position_embeddings=20, rope_parameters=how | factors)
        return build(config_class("Phi3"), **sizes)
    how = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    return build(config_class("Llama"), max_position_embeddings=20, rope_parameters=how)


def frequencies(model):
    return {k: v.clone() for k, v in model.named_buffers() if "inv_freq" in k}


@pytest.mark.parametrize("method", capture_ways)
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_company_does_not_change_the_frequencies(kind, method):
    "Rows of 24, 17 and 30 tokens around an original length of 20: each as if alone in a new model"
    ids, real, resp = tokens(lens=(24, 17, 30), n=32)
    s = rhythm_signals(stretched(kind), ids, real, resp, method=method, **KW)
    again = stretched(kind)
    again.model(torch.arange(4, 60)[None])  # a long row before leaves its traces in the model
    before = frequencies(again)
    t = rhythm_signals(again, ids, real, resp, method=method, heads=s.heads, **KW)
    torch.testing.assert_close(t.waad, s.waad, atol=1e-5, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in frequencies(again).items())
    for i in range(len(ids)):
        m = real[i].bool()
        maps, r = own_maps(stretched(kind), ids[i, m]), resp[i, m]
        layers = capture.middle_layers(4)
        loc = torch.stack([maps[k] for k in layers])[s.heads.local[:, 0], s.heads.local[:, 1]]
        torch.testing.assert_close(s.waad[i, m], waad(loc.mean(0), r, 4), atol=1e-4, rtol=0)


# ---- wrappers ------------------------------------------------------------------------------------
class Wrapper(nn.Module):
    "Hides the arguments of the model, as adapters do"

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.config = model.config

    def forward(self, *args, **kw):
        return self.base_model(*args, **kw)


def wrapped(kind, model):
    if kind == "hidden arguments":
        return Wrapper(model)
    if kind == "DataParallel":
        return nn.DataParallel(model)
    peft = pytest.importorskip("peft", reason="peft is not installed; the stand-in above is")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["hidden arguments", "DataParallel", "peft"])
def test_wrapped_models_with_learned_positions(kind):
    "GPT-2 under left padding, inside something that does not say that it takes positions"
    outer = wrapped(kind, build(config_class("GPT2")))
    inner = capture._base(outer)
    left, right = tokens("left"), tokens("right")
    for method in capture_ways:
        s = rhythm_signals(outer, *left, method=method, **KW)
        t = rhythm_signals(outer, *right, method=method, heads=s.heads, **KW)
        torch.testing.assert_close(s.waad[left[2]], t.waad[right[2]], atol=1e-5, rtol=0)
        row = right[0][0, :24]
        with torch.no_grad():
            maps = inner(input_ids=row[None], output_attentions=True).attentions
        loc = torch.stack([maps[i][0] for i in capture.middle_layers(4)])
        loc = loc[s.heads.local[:, 0], s.heads.local[:, 1]].mean(0)
        own = waad(loc, right[2][0, :24], 4)
        torch.testing.assert_close(t.waad[0, :24], own, atol=1e-4, rtol=0)
    H = token_entropy(outer, *left[:2])
    assert (H[left[1] == 0] == 0).all()
    torch.testing.assert_close(H[left[2]], token_entropy(outer, *right[:2])[right[2]])


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="Linear holds no model of Transformers"):
        rhythm_signals(nn.Linear(2, 2), *tokens(), **KW)
    model = Wrapper(build(config_class("GPT2")))
    model.active_peft_config = type("Prefix", (), dict(is_prompt_learning=True))
    with pytest.raises(NotImplementedError, match="tokens of its own"):
        rhythm_signals(model, *tokens(), **KW)
    with pytest.raises(ValueError, match="the model knows 0 to 63"):
        rhythm_signals(model.base_model, tokens()[0] + 60, *tokens()[1:], **KW)


# ---- threads, precision, mode --------------------------------------------------------------------
def test_two_threads_and_an_exception_leave_the_implementation():
    "The second capture begins while the first is inside the model, and ends after it"
    model, x = build(config_class("Llama")), tokens()
    model.set_attn_implementation("sdpa")
    want = rhythm_signals(model, *x, **KW)
    inside, second, done, got = *(threading.Event() for _ in range(3)), {}

    def meet(*_):  # with a lock the second one cannot come in: then go on
        if threading.current_thread().name == "first":
            inside.set()
            second.wait(1.0)
        elif threading.current_thread().name == "second":
            second.set()
            done.wait(5.0)

    hook = model.model.layers[0].register_forward_pre_hook(meet)

    def capture_in(name):
        if name == "second":
            inside.wait(5.0)
        got[name] = rhythm_signals(model, *x, **KW)
        if name == "first":
            done.set()

    threads = [threading.Thread(target=capture_in, args=(n,), name=n) for n in ("first", "second")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(s.waad, want.waad) for s in got.values()) and len(got) == 2

    def fail(*_):
        raise KeyError("in the middle")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    for method in capture_ways:
        with pytest.raises(KeyError):
            rhythm_signals(model, *x, method=method, **KW)
        assert model.config._attn_implementation == "sdpa" and capture._recorder.get() is None
    hook.remove()
    assert torch.equal(rhythm_signals(model, *x, **KW).waad, want.waad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(dtype):
    model, x = build(config_class("Mistral"), sliding_window=5), tokens()
    want = {m: rhythm_signals(model, *x, method=m, **KW) for m in capture_ways}
    torch.set_default_dtype(dtype)
    try:
        for method, w in want.items():
            s = rhythm_signals(model, *x, method=method, **KW)
            assert s.waad.dtype == s.fai.dtype == s.spans.dtype == torch.float32
            tol = dict(atol=2e-3 if dtype == torch.bfloat16 else 1e-5, rtol=0)
            torch.testing.assert_close(s.waad, w.waad, **tol)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_of_a_pass_do_not_matter():
    "One, two or all rows at once, in any order, one of them without a response token"
    model = build(config_class("Llama"))
    ids, real, resp = tokens(lens=(24, 17, 9, 26, 12), n=28)
    resp[2] = False
    for method in capture_ways:
        whole = rhythm_signals(model, ids, real, resp, method=method, **KW)
        for rows in (1, 2, 4):
            s = rhythm_signals(model, ids, real, resp, method=method, rows=rows, **KW)
            assert torch.equal(s.heads.local, whole.heads.local)
            torch.testing.assert_close(s.waad, whole.waad, atol=1e-5, rtol=0)
            torch.testing.assert_close(s.fai, whole.fai, atol=1e-5, rtol=0)
        order = [3, 0, 4, 2, 1]
        s = rhythm_signals(model, ids[order], real[order], resp[order], method=method, rows=2, **KW)
        torch.testing.assert_close(s.waad, whole.waad[order], atol=1e-5, rtol=0)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="rows="):
            rhythm_signals(model, ids, real, resp, rows=bad, **KW)


# ---- generation settings stored with a model -----------------------------------------------------
def test_greedy_is_greedy_whatever_is_stored_with_the_model():
    model = build(config_class("Llama"), sharp=2.0)
    stored = model.generation_config
    stored.update(repetition_penalty=5.0, no_repeat_ngram_size=2, num_beams=3, do_sample=True)
    stored.update(top_k=3, temperature=2.0)
    before = stored.to_dict()
    model.train()
    ids = tokens("right", lens=(12,), n=12)[0]
    p = perturb_rollouts(model, ids, 5, top_k=2, max_new_tokens=6, eos_token_id=2)
    assert model.training and model.generation_config.to_dict() == before
    model.eval()
    for c, got in zip([*p.candidates[0].tolist(), int(p.original)], p.continuations[0]):
        row = [*ids[0, :5].tolist(), c]
        while len(row) < 12 and row[-1] != 2:
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert got == [t for t in row[6:] if t != 2]


def test_samples_are_those_of_the_temperature_alone():
    "Stored settings change nothing, and dropout is off; entropies are those of evaluation mode"
    tok = type("Tokenizer", (), dict(pad_token_id=0, eos_token_id=2))()
    model = build(config_class("GPT2"), sharp=2.0, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    want = sample_responses(model, tok, prompts, 8, temperature=0.8, seed=1)
    H = token_entropy(model, want.input_ids, want.attention_mask)
    model.generation_config.update(repetition_penalty=4.0, min_p=0.5, min_new_tokens=7)
    model.train()
    got = sample_responses(model, tok, prompts, 8, temperature=0.8, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and model.training
    assert torch.equal(token_entropy(model, want.input_ids, want.attention_mask), H)
