"""MeSH: what a user gave it that once went wrong without a word, and input that must be refused"""

import copy
import io
import json
import sys
import types

import pytest
import torch
from transformers import GPT2Config, GPT2Model, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.cache_utils import DynamicCache

from llmpapers.core.train import TrainConfig, lm_loss
from llmpapers.mesh.data import byte_corpus, token_corpus
from llmpapers.mesh.generate import KVCache, generate, quantization_gap, quantized
from llmpapers.mesh.layout import RecursiveConfig, forward_flops, known_fields
from llmpapers.mesh.model import from_gpt_neox, make_lm
from llmpapers.mesh.probes import (
    effective_rank,
    logit_lens,
    probe_model,
    rbf_cka,
    update_magnitude,
)
from llmpapers.mesh.recurrence import MeshRouters, mesh_cycle, run_mesh, run_scheme
from llmpapers.mesh.rivals import make_between
from llmpapers.mesh.train import (
    StudyConfig,
    arm_config,
    arms,
    compare_schemes,
    loop_loss,
    token_loss,
    train_lm,
)

pytestmark = pytest.mark.timeout(200)
small = dict(d_model=32, n_heads=4, vocab_size=40)
ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def model(**how):
    return make_lm(RecursiveConfig(**small | how))


def stack(layers=6, **how):
    "A GPT-NeoX stack whose every weight is random"
    cfg = dict(vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    hf = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=layers, **cfg | how)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(std=0.3)
    return hf


@pytest.mark.parametrize("arm", [a for a in arms if not a.startswith("vanilla")])
@pytest.mark.parametrize("seed", [0, 3])
def test_weights_that_an_arm_shares_with_base_begin_equal(arm, seed):
    like = "base, std .02" if ".02" in arm else "base"
    study = StudyConfig(layout="1+2R3+1")
    base, other = (make_lm(arm_config(study, a), seed).state_dict() for a in (like, arm))
    assert all(torch.equal(other[k], v) for k, v in base.items())


@pytest.mark.parametrize("how", [dict(scheme="mesh"), dict(scheme="base", per_loop="mlp")])
def test_what_only_one_arm_has_is_drawn_anew_for_each_model(how):
    "Two models from one random stream differ everywhere, and so do loops' own MLPs"
    torch.manual_seed(0)
    cfg = RecursiveConfig(**small, layout="1+2R3+1", **how)
    first, second = (type(model())(cfg).state_dict() for _ in range(2))
    drawn = [k for k, v in first.items() if v.dim() > 1 and v.std() > 0]
    assert all(not torch.equal(first[k], second[k]) for k in drawn)
    own = [first[k] for k in drawn if ".own." in k and "dense_h_to_4h" in k]
    assert len({x.sum().item() for x in own}) == len(own)


def test_a_copy_of_a_compiled_model_runs_its_own_weights():
    m = model()
    want = quantization_gap(m, ids, 2, [2])
    m.compile_core(backend="eager")
    assert quantization_gap(m, ids, 2, [2]) == pytest.approx(want, abs=1e-6) and want != [0.0]
    q = quantized(m, 2)
    assert torch.allclose(q(ids, use_cache=False).logits, q(ids).logits, atol=1e-5)
    twin = copy.deepcopy(m)
    loop_loss(twin.train(), dict(input_ids=ids)).backward()
    assert twin.model.core[0].mlp.dense_h_to_4h.weight.grad is not None
    assert m.model.core[0].mlp.dense_h_to_4h.weight.grad is None
    torch.save(m, io.BytesIO())


def test_mlps_of_the_loops_come_from_their_own_layers():
    hf = stack()
    looped = from_gpt_neox(hf, "1+2R2+1", scheme="base", per_loop="mlp")
    layers = hf.gpt_neox.layers
    for k, layer in enumerate(looped.model.core):
        for mine, norm, source in (
            (layer.mlp, layer.post_attention_layernorm, layers[1 + k]),
            (layer.own[0].mlp, layer.own[0].norm, layers[3 + k]),
        ):
            same = (mine.dense_h_to_4h.weight, source.mlp.dense_h_to_4h.weight)
            assert torch.equal(*same)
            assert torch.equal(norm.weight, source.post_attention_layernorm.weight)


@pytest.mark.parametrize("scheme", ["static", "dynamic", "mesh", "step", "adapter", "injection"])
def test_a_trained_scheme_needs_its_module(scheme):
    with pytest.raises(TypeError, match=f"routers: {scheme} needs"):
        run_scheme(scheme, torch.randn(2, 3, 8), lambda h: h, lambda h, t: h, 2)


def test_schemes_refuse_routers_and_loops_that_do_not_fit():
    u, routers = torch.randn(2, 3, 8), MeshRouters(8, 3, 4)

    def run(scheme, n, module, **how):
        return run_scheme(scheme, u, lambda h: h * 1.1, lambda h, t: h + 1, n, module, **how)

    with pytest.raises(TypeError, match="base needs a Mixer"):
        run("base", 2, routers)
    with pytest.raises(TypeError, match="mesh needs MeshRouters"):
        run("mesh", 2, make_between(RecursiveConfig(**small, scheme="step")))
    for n in (3, 9):
        with pytest.raises(ValueError, match="any_loops=True"):
            run("mesh", n, routers)
    assert len(run("mesh", 9, routers, any_loops=True)[1].states) == 10
    for bad in (0, -5):
        for scheme, module in (("mesh", routers), ("base", None)):
            with pytest.raises(ValueError, match="n_loops"):
                run(scheme, bad, module)
    with pytest.raises(ValueError, match="n_loops"):
        run_mesh(u, lambda h: h, lambda h, t: h, -1, routers)
    with pytest.raises(ValueError, match="must agree"):
        mesh_cycle(torch.zeros(3, 4), torch.zeros(4), torch.ones(1), torch.ones(3))
    with pytest.raises(ValueError, match="first_sees"):
        MeshRouters(8, 3, 4, first_sees="outputs")


def test_a_diverged_state_is_not_called_unchanged():
    x, y = torch.full((5, 3), float("nan")), torch.randn(5, 3)
    assert update_magnitude(x, y).isnan() and rbf_cka(x, y).isnan()
    big = torch.full((20, 8), 3e4).half()
    assert 0 < update_magnitude(big, torch.randn(20, 8).half()) <= 2
    assert effective_rank(torch.eye(4).bfloat16()) == pytest.approx(4, rel=1e-5)


def test_alignment_of_a_state_with_many_equal_rows():
    z = torch.cat([torch.zeros(15, 8), torch.randn(5, 8)])
    assert rbf_cka(z, z).item() == pytest.approx(1)
    assert rbf_cka(z, torch.ones_like(z)) == 0


def test_misspelt_names_are_refused():
    with pytest.raises(ValueError, match="did you mean n_slots"):
        known_fields(dict(n_slot=3))
    with pytest.raises(ValueError, match="did you mean scheme"):
        from_gpt_neox(stack(), "1+4R1+1", schem="base")
    with pytest.raises(ValueError, match="n_slot"):
        arm_config(StudyConfig(fields=(("n_slot", 3),)), "mesh")
    with pytest.raises(ValueError, match="is what makes the arm"):
        arm_config(StudyConfig(fields=(("scheme", "base"),)), "mesh")
    m = model()
    for wrong in (dict(atention_mask=torch.ones(2, 9)), dict(num_loops=1)):
        for part in (m, m.model):
            with pytest.raises(TypeError, match="did you mean"):
                part(ids, **wrong)
    with pytest.raises(ValueError, match="output_attentions"):
        m(ids, output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_are_never_rounded(dtype, tmp_path):
    hf = stack().to(dtype)
    looped = from_gpt_neox(hf, "1+2R2+1", scheme="base")
    want = looped.model._rotary()
    assert looped.dtype == dtype and torch.equal(looped.model.inv_freq, want)
    assert torch.equal(model().to(dtype).float().model.inv_freq, model().model.inv_freq)


def test_checkpointing_does_not_drop_a_cache_silently():
    m, cache = model(), DynamicCache()
    m(ids[:, :4], past_key_values=cache)
    m.train()
    m.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="call model.eval"):
        m(ids[:, 4:], past_key_values=cache)
    assert m(ids, labels=ids, use_cache=True).loss.isfinite()


def test_probes_of_a_model_in_training_mode():
    hf = stack(3, hidden_dropout=0.4).train()
    first, second = probe_model(hf, ids), probe_model(hf, ids)
    assert hf.training and first["agree"].iloc[-1] == 1
    assert first["loss"].tolist() == second["loss"].tolist()


def test_padding_does_not_count_in_the_loss():
    m, pad = model().train(), torch.zeros(2, 20, dtype=torch.long)
    batch = dict(
        input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([torch.ones_like(ids), pad], 1)
    )
    assert loop_loss(m, batch).item() == pytest.approx(lm_loss(m, batch).item(), abs=1e-5)
    assert loop_loss(m, batch).item() == pytest.approx(
        loop_loss(m, dict(input_ids=ids)).item(), abs=1e-5
    )


@pytest.mark.parametrize("loops", [1, 3, 4])
def test_any_loops_in_generate_of_transformers(loops):
    m = model()
    how = dict(n_loops=loops, any_loops=True)
    a = m.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, **how)
    assert torch.equal(a, generate(m, ids, 3, **how))
    if loops > 2:
        with pytest.raises(ValueError, match="past_key_values has 4 layers"):
            m(ids, past_key_values=KVCache(m.config, 2, 20, n_loops=1), **how)


def test_peft_trains_the_routers_and_generates():
    peft = pytest.importorskip("peft")
    m = model()
    want = generate(m, ids, 3)
    how = peft.LoraConfig(target_modules=["query_key_value"], modules_to_save=["between"])
    tuned = peft.get_peft_model(m, how)
    loop_loss(tuned.train(), dict(input_ids=ids)).backward()
    grads = [p.grad for n, p in tuned.named_parameters() if "modules_to_save" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    assert torch.equal(generate(tuned, ids, 3), want) and tuned.training


def test_hidden_states_end_as_in_transformers():
    m = model()
    out = m.model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(out.hidden_states) == m.config.num_hidden_layers + 1
    m.config.output_hidden_states = True
    assert m(ids).hidden_states is not None
    assert isinstance(m(ids, return_dict=False), tuple)


def test_probes_of_models_without_head_or_norm():
    gpt2 = GPT2Model(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2)).eval()
    table = probe_model(gpt2, ids)
    assert table["loss"].isna().all() and table["update"].notna().all()
    assert probe_model(model(), ids[:, :2])["cka"].isna().all()
    with pytest.raises(ValueError, match="batches is empty"):
        probe_model(gpt2, [])
    with pytest.raises(TypeError, match="need tensors of tokens"):
        probe_model(gpt2, [dict(input_ids=ids)])
    with pytest.raises(ValueError, match="pass `norm`"):
        logit_lens(gpt2, torch.zeros(2, 9, 32), ids)


def test_what_a_checkpoint_says_is_kept(tmp_path):
    hf = stack()
    hf.generation_config.eos_token_id = [5, 6]
    looped = from_gpt_neox(hf, "1+2R2+1")
    assert looped.generation_config.eos_token_id == [5, 6]
    with pytest.raises(ValueError, match="that of the checkpoint"):
        from_gpt_neox(hf, "1+2R2+1", vocab_size=50)
    with pytest.raises(ValueError, match="with its head"):
        from_gpt_neox(hf.gpt_neox, "1+2R2+1")
    with pytest.raises(ValueError, match="use_parallel_residual=False"):
        from_gpt_neox(stack(use_parallel_residual=False), "1+2R2+1")


def test_the_mode_of_a_model_survives_an_error():
    m = model().train()
    for fail in (
        lambda: generate(m, ids + 1000, 2),
        lambda: token_loss(m, ids + 1000),
        lambda: probe_model(m, ids + 1000),
    ):
        with pytest.raises(ValueError, match="input_ids"):
            fail()
        assert m.training


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(layer_norm_eps=-1.0), "layer_norm_eps"),
        (dict(max_position_embeddings=0), "max_position_embeddings"),
        (dict(use_cache="yes"), "use_cache"),
        (dict(intermediate_size=0), "intermediate_size=0"),
        (dict(rotary_pct=0.01), "rotary_pct=0.01"),
    ],
)
def test_bad_configurations(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RecursiveConfig(**bad)


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: StudyConfig(layout="x"), "layout"),
        (lambda: StudyConfig(d_model=-3), "d_model"),
        (lambda: StudyConfig(n_heads=7), "n_heads=7"),
        (lambda: StudyConfig(train=dict(steps=3)), "train must be"),
        (lambda: forward_flops(10, RecursiveConfig(), -1), "n_loops"),
        (lambda: KVCache(RecursiveConfig(), 0, 40), "batch"),
        (lambda: KVCache(RecursiveConfig(), 2, 40, n_loops=-1), "n_loops"),
        (lambda: model()(ids[0]), "input_ids has shape"),
        (lambda: generate(model(), ids[:, :0], 2), "ids has shape"),
        (lambda: generate(model(), ids, 2, temperature=1e-42), "temperature"),
        (lambda: generate(model(), ids, 2, eos=[1, 2]), "eos"),
        (lambda: token_loss(model(), ids[:0]), "ids has shape"),
        (lambda: token_loss(model(), ids[:, :1]), "ids has shape"),
        (lambda: quantized(torch.nn.Linear(2, 2), 8), "RecursiveLM"),
        (lambda: byte_corpus(""), "source=''"),
        (lambda: byte_corpus("stdlib", size=-1), "size=-1"),
    ],
)
def test_bad_arguments_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bad()


def test_training_refuses_what_contradicts(tmp_path):
    (tmp_path / "a.txt").write_text("some words to learn from " * 40)
    text, how = byte_corpus(str(tmp_path)), TrainConfig(steps=2, batch_size=2, log_every=1)
    cfg = RecursiveConfig(d_model=32)
    for late in (-1, 1.0, 2.0):
        with pytest.raises(ValueError, match="late"):
            train_lm(cfg, text, how, 8, 2, late=late)
    with pytest.raises(ValueError, match="differs from cfg in scheme"):
        train_lm(cfg, text, how, 8, 2, model=make_lm(RecursiveConfig(d_model=32, scheme="base")))
    done = train_lm(cfg, text, how, 8, 2, out=tmp_path / "run", device="cpu")
    again = train_lm(cfg, text, how, 8, 2, out=tmp_path / "run", device="cpu")
    assert done.valid == again.valid and list((tmp_path / "run").iterdir())


def test_each_arm_and_seed_is_compared_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some words to learn from " * 40)
    study = StudyConfig(
        source=str(tmp_path / "a.txt"),
        d_model=32,
        seq_len=8,
        valid_windows=2,
        train=TrainConfig(steps=1, batch_size=2, log_every=1),
    )
    assert len(compare_schemes(["base", "base"], (0, 0), study, "cpu")) == 1


def test_files_that_are_no_text_are_named(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.txt").write_text(f"words of file {k} " * 9)
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe" * 20)
    with pytest.warns(UserWarning, match="picture is no UTF-8"):
        corpus = byte_corpus(str(tmp_path))
    assert corpus.vocab_size == 260
    with pytest.raises(ValueError, match="no UTF-8 text"):
        byte_corpus(str(tmp_path / "picture"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(text="a row of text")) * 20)
    assert len(byte_corpus(str(tmp_path / "rows.jsonl")).train) > 100
    with pytest.raises(ValueError, match="to train on"):
        byte_corpus(str(tmp_path / "0.txt"), held_out=0.9999)


class Tokens:
    "A tokenizer whose added tokens lie beyond its length"

    eos_token_id = None

    def __init__(self, length, high):
        self.length, self.high = length, high

    def __len__(self):
        return self.length

    def __call__(self, text, add_special_tokens=False):
        return dict(input_ids=[1, 2, self.high] if text else [])


@pytest.mark.parametrize("length, high", [(30_000, 40_000), (50_000, 70_000), (10, 5)])
def test_no_token_is_lost_beyond_the_length_of_a_tokenizer(length, high):
    corpus = token_corpus(["text"] * 30, Tokens(length, high))
    assert int(corpus.train.max()) == high < corpus.vocab_size and corpus.train.min() == 1
    with pytest.raises(ValueError, match="texts has no token"):
        token_corpus(["", ""], Tokens(10, 5))


def test_scores_of_the_harness(monkeypatch):
    "The interface of lm-evaluation-harness: what is handed over, and what comes back"
    from llmpapers.mesh.results import harness_scores, harness_tasks

    seen = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer=None, batch_size=1):
            seen.update(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)

    def simple_evaluate(model, tasks=None, num_fewshot=None, limit=None):
        seen.update(wrapped=model, tasks=tasks, num_fewshot=num_fewshot, limit=limit)
        return dict(results={t: {"acc,none": 0.5} for t in tasks}, config={})

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["lm_eval"].simple_evaluate = simple_evaluate
    stubs["lm_eval.models.huggingface"].HFLM = HFLM
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    m = model()
    found = harness_scores(m, "a tokenizer", shots=5, limit=7, batch_size=3)
    assert set(found) == set(harness_tasks) and found["piqa"]["acc,none"] == 0.5
    assert seen["pretrained"] is m and isinstance(seen["wrapped"], HFLM)
    assert (seen["tokenizer"], seen["batch_size"]) == ("a tokenizer", 3)
    assert (seen["num_fewshot"], seen["limit"], seen["tasks"]) == (5, 7, list(harness_tasks))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="lm.eval"):
        harness_scores(m, None)
