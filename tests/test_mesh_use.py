"""MeSH in the hands of a user: compiled, changed, converted, probed, resumed, refused"""

import subprocess
import sys
import types

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import StaticCache

from llmpapers.core.lm import char_tokenizer
from llmpapers.core.train import TrainConfig, evaluating, param_groups
from llmpapers.mesh import train as mesh_train
from llmpapers.mesh.budget import saved_bytes
from llmpapers.mesh.data import byte_corpus, pointer_chasing
from llmpapers.mesh.generate import KVCache, generate, quantized
from llmpapers.mesh.layout import RecursiveConfig, count_parameters
from llmpapers.mesh.model import RecursiveLM, from_gpt_neox, make_lm
from llmpapers.mesh.probes import (
    blocks_of,
    effective_rank,
    logit_lens,
    probe_model,
    rbf_cka,
    singular_spectrum,
)
from llmpapers.mesh.recurrence import FixedSum, MeshRouters, Mixer, mesh_coefficients, run_scheme
from llmpapers.mesh.results import study_gpu
from llmpapers.mesh.rivals import StepEmbedding, make_between
from llmpapers.mesh.train import (
    PuzzleConfig,
    StudyConfig,
    arm_config,
    arms,
    hop_accuracy,
    outcome,
    placed,
    puzzle_outcome,
    set_aside,
    train_lm,
)

pytestmark = pytest.mark.timeout(200)
small = dict(d_model=32, n_heads=4, vocab_size=40)
ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))
neox = dict(vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=64)
layers = dict(num_hidden_layers=2)


def model(**how):
    return make_lm(RecursiveConfig(**small | how))


def stack(n=6, **how):
    return GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=n, **neox | how)).eval()


# One graph


@pytest.mark.parametrize(
    "how, graphs",
    [
        (dict(layout="0+1R10+0", scheme="base", tie_core=False), 1),
        (dict(layout="0+1R10+0", scheme="base", per_loop="mlp"), 1),
    ],
)
def test_loops_share_a_compiled_graph(how, graphs):
    "Ten loops with weights of their own stay below the limit of recompilations"
    seen = []

    def counting(graph, inputs):
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    m = model(**how).train()
    want = m(ids, use_cache=False).logits
    m.compile_core(backend=counting)
    got = m(ids, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5) and len(seen) == graphs
    got.sum().backward()
    used = [p.grad is not None for p in m.model.core.parameters()]
    assert all(used) and len(used) > 10


# A module belongs to a scheme


@pytest.mark.parametrize("scheme", ["step", "adapter", "injection", "static", "dynamic", "anchor"])
def test_a_module_of_another_scheme_is_refused(scheme):
    u, made = torch.randn(2, 3, 32), make_between(RecursiveConfig(**small, scheme=scheme))

    def run(name):
        return run_scheme(name, u, lambda h: h * 1.1, lambda h, t: h + 1, 2, made)

    run(scheme)
    for other in {"step", "adapter", "injection", "static", "dynamic", "base", "mesh"} - {scheme}:
        with pytest.raises(TypeError, match=f"routers: {other} needs"):
            run(other)


def test_a_module_of_the_reader_serves_any_scheme():
    class Twice(Mixer):
        def leave(self, t, h, y, h_emb, h0):
            return 2 * y

    u = torch.randn(2, 3, 8)
    h, _ = run_scheme("base", u, lambda h: h, lambda h, t: h, 3, Twice())
    assert torch.allclose(h, 8 * u) and FixedSum("residual+anchor").scheme == "residual+anchor"


def test_steps_beyond_the_last_are_asked_for():
    step, u = StepEmbedding(8, 2), torch.randn(2, 3, 8)

    def run(**how):
        return run_scheme("step", u, lambda h: h, lambda h, t: h, 3, step, **how)

    with pytest.raises(ValueError, match="has weights for 2"):
        run()
    assert torch.equal(run(any_loops=True)[0], u)


# Configurations


@pytest.mark.parametrize(
    "extra, message",
    [
        (dict(n_slot=3), "did you mean n_slots"),
        (dict(schem="base"), "did you mean scheme"),
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(use_parallel_residual=False), "use_parallel_residual=False"),
        (dict(num_hidden_layers=7), "follows from the layout"),
    ],
)
def test_names_that_would_be_kept_without_use(extra, message):
    with pytest.raises(ValueError, match=message):
        RecursiveConfig(**extra)
    assert RecursiveConfig(task_specific_params=dict(a=1), hidden_act="gelu").scheme == "mesh"


def test_a_field_is_checked_when_it_changes(tmp_path):
    cfg = RecursiveConfig(**small, layout="1+2R2+1")
    for name, bad in dict(layout="garbage", scheme="mash", d_model=30, n_heads=0, norm="x").items():
        before = cfg.to_dict()
        with pytest.raises(ValueError, match=name if name != "d_model" else "not a multiple"):
            setattr(cfg, name, bad)
        assert cfg.to_dict() == before
    cfg.layout, cfg.hidden_size = "1+1R4+1", 64
    assert (cfg.n_slots, cfg.intermediate_size, cfg.num_hidden_layers) == (7, 256, 6)
    assert vars(RecursiveConfig(layout="1+1R4+1")).get("n_slots") == 7
    fixed = RecursiveConfig(**small, n_slots=2, intermediate_size=48)
    fixed.layout, fixed.d_model = "1+1R4+1", 64
    assert (fixed.n_slots, fixed.intermediate_size) == (2, 48)  # these were asked for
    cfg.save_pretrained(tmp_path)
    assert RecursiveConfig.from_pretrained(tmp_path).to_diff_dict() == cfg.to_diff_dict()
    with pytest.raises(ValueError, match="n_slots=0"):
        RecursiveConfig.from_pretrained(tmp_path, n_slots=0)


# The forward pass


@pytest.mark.parametrize("columns", [3, 8, 10, 30])
def test_a_mask_of_another_length_is_refused(columns):
    m = model()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        m(ids, attention_mask=torch.ones(2, columns))
    cache = KVCache(m.config, 2, 9)
    m(ids[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="5 tokens in the cache"):
        m(ids[:, 5:], past_key_values=cache, attention_mask=torch.ones(2, 4))
    got = m(ids[:, 5:], past_key_values=cache, attention_mask=torch.ones(2, 9)).logits
    assert torch.allclose(got, m(ids).logits[:, 5:], atol=1e-5)


def test_what_transformers_may_ask_of_a_pass():
    m = model()
    assert isinstance(m.model(ids, return_dict=False), tuple)
    m.config.return_dict = False
    assert isinstance(m(ids), tuple) and isinstance(m.model(ids), tuple)
    m = model().train()
    m.set_attn_implementation("eager")
    m.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        m(ids)
    m = model().train()
    m.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache=True"):
        m(ids, use_cache=True)


def test_caches_have_a_place_for_each_loop():
    m = model()
    with pytest.raises(ValueError, match="past_key_values has 6 layers, these loops need 8"):
        m(
            ids,
            past_key_values=StaticCache(config=m.config, max_cache_len=20),
            n_loops=3,
            any_loops=True,
        )
    assert KVCache(m.config, 2, 40).get_max_length() == 40


# Training


@pytest.mark.parametrize("arm", list(arms))
def test_both_trainers_decay_the_same_weights(arm, tmp_path):
    m = make_lm(arm_config(StudyConfig(), arm))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    theirs = set(Trainer(m, arguments).get_decay_parameter_names(m))
    decayed = {id(p) for p in param_groups(m, 0.1)[0]["params"]}
    assert theirs == {n for n, p in m.named_parameters() if id(p) in decayed}


def test_a_killed_training_of_a_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some words to learn from " * 40)
    how = TrainConfig(steps=6, batch_size=2, log_every=1, save_every=2, eval_every=2)
    study = StudyConfig(
        source=str(tmp_path / "a.txt"), d_model=32, seq_len=8, valid_windows=2, train=how
    )
    want = outcome(study, "mesh", 1, "cpu")
    assert not list((tmp_path / "cache").rglob("training"))  # nothing is kept that is not needed
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "other"))
    plain, steps = mesh_train.loop_loss, []

    def killed(m, batch):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return plain(m, batch)

    monkeypatch.setattr(mesh_train, "loop_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        outcome(study, "mesh", 1, "cpu")
    got = outcome(study, "mesh", 1, "cpu")
    assert len(steps) < 6 + 6  # not from the start
    for key in ("valid", "curve", "train_loss"):
        assert got[key] == want[key]


def test_each_part_gets_its_mode_back():
    m = model().train()
    m.model.coda.eval()
    with pytest.raises(ValueError, match="input_ids"):
        with evaluating(m):
            assert not m.model.prelude.training
            m(ids + 1000)
    assert m.training and m.model.prelude[0].training and not m.model.coda[0].training
    m.eval()
    with pytest.raises(ValueError, match="input_ids"):
        saved_bytes(m, ids + 1000)
    assert not m.training


# Rounding


def test_additions_per_loop_are_rounded():
    m = model(scheme="base", per_loop="lora")
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith(".up"):
                p.normal_()
    rounded = dict(quantized(m, 2, "all").named_parameters())
    changed = {n for n, p in m.named_parameters() if not torch.equal(p, rounded[n])}
    assert changed == {
        n for n, p in m.named_parameters() if p.dim() > 1 and n.split(".")[1] in layer_lists
    }


layer_lists = ("prelude", "core", "coda")


# Conversion


def test_a_stack_is_refused_or_converted_by_name(tmp_path):
    stack().save_pretrained(tmp_path / "neox")
    with pytest.raises(ValueError, match="from_gpt_neox"):
        RecursiveLM.from_pretrained(tmp_path / "neox")
    assert from_gpt_neox(tmp_path / "neox", "1+2R2+1").config.layout == "1+2R2+1"
    LlamaForCausalLM(LlamaConfig(**neox, **layers)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="need a GPT-NeoX model.*'llama'"):
        from_gpt_neox(tmp_path / "llama", "1+1R1+0")
    with pytest.raises(ValueError, match=r"hidden_act='relu' \(need 'gelu'\)"):
        from_gpt_neox(stack(hidden_act="relu"), "1+2R2+1")
    with pytest.warns(UserWarning, match="adds norms that the checkpoint lacks"):
        from_gpt_neox(stack(), "1+2R2+1", norm="peri")


@pytest.mark.slow
def test_a_folder_is_read_in_a_fresh_process(tmp_path):
    model().save_pretrained(tmp_path)
    code = (
        "import llmpapers.mesh.model; from transformers import AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "RecursiveLM", done.stderr


# Probes


def test_the_final_norm_is_found_by_watching():
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=40, hidden_size=32, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32
        )
    )
    for m in (opt.eval(), stack(2), LlamaForCausalLM(LlamaConfig(**neox, **layers)).eval()):
        table = probe_model(m, ids)
        assert table["agree"].iloc[-1] == 1 and table["loss"].notna().all()
        want = m(ids, labels=ids).loss.item()
        assert table["loss"].iloc[-1] == pytest.approx(want, rel=1e-5)
        part = blocks_of(m, ids)[0].output
        norm = logit_lens(m, part, ids)
        assert norm["loss"] == pytest.approx(table["loss"].iloc[0])


def test_models_without_a_next_token_are_refused():
    how = neox | layers
    with pytest.raises(ValueError, match="as in a masked model"):
        probe_model(BertForMaskedLM(BertConfig(**how)).eval(), ids)
    table = probe_model(BertModel(BertConfig(**how)).eval(), ids)
    assert table["loss"].isna().all() and table["rank"].notna().all()
    t5 = T5Config(vocab_size=40, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        probe_model(T5ForConditionalGeneration(t5).eval(), ids)


def test_an_adapter_is_probed_like_its_model():
    peft = pytest.importorskip("peft")
    want = probe_model(model(), ids)
    how = peft.LoraConfig(target_modules=["query_key_value"], modules_to_save=["between"])
    tuned = peft.get_peft_model(model(), how)
    got = probe_model(tuned, ids)
    assert got["block"].tolist() == want["block"].tolist()
    assert got["loss"].tolist() == pytest.approx(want["loss"].tolist(), abs=1e-5)
    with pytest.raises(TypeError, match="merge an adapter"):
        quantized(tuned, 4)
    rounded = quantized(tuned.merge_and_unload(), 4)
    assert isinstance(rounded, RecursiveLM)


def test_a_diverged_model_is_probed_as_nan():
    x = torch.full((2, 5, 3), float("nan"))
    assert effective_rank(x).isnan().all() and singular_spectrum(x).isnan().all()
    x[0] = torch.randn(5, 3)
    assert effective_rank(x).isnan().tolist() == [False, True]
    m = model()
    with torch.no_grad():
        m.model.core[0].mlp.dense_4h_to_h.bias.fill_(float("nan"))
    table = probe_model(m, ids)
    assert table[["update", "rank", "loss"]].iloc[-1].isna().all()


@pytest.mark.parametrize("n", [20, 200])
def test_alignment_with_many_equal_rows_that_are_not_zero(n):
    "Equal rows tell no scale, wherever they lie; a constant state is constant wherever it lies"
    z = torch.cat([torch.randn(1, 64).expand(n, 64), torch.randn(n // 4, 64)])
    far = torch.ones_like(z) * 1e4 / 3
    assert rbf_cka(z, z).item() == pytest.approx(1)
    assert rbf_cka(z, 3 * z.double() + far.double()).item() == pytest.approx(1, abs=1e-6)
    assert rbf_cka(z, far) == 0


def test_the_width_of_the_kernel_is_the_median_between_different_tokens():
    "A token's distance to itself is zero but for rounding, and must not enter the median"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=g) + 3 * torch.randn(1, 64, generator=g)
    states = [z.double() for z in (x, x + 0.3 * torch.randn(64, 64, generator=g))]
    centred = []
    for z in states:
        far = torch.tensor([[(a - b).norm() for b in z] for a in z])
        width = 0.5 * far[~torch.eye(64, dtype=torch.bool)].median()
        k = torch.exp(-far.square() / (2 * width**2))
        centred.append(k - k.mean(0) - k.mean(1, keepdim=True) + k.mean())
    a, b = centred
    want = (a * b).sum() / (a.norm() * b.norm())
    assert rbf_cka(*states).item() == pytest.approx(want.item(), abs=1e-6)


# Data


def test_zeros_are_no_text(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.txt").write_text(f"words of file {k}\r\n" * 9, newline="")
    (tmp_path / "wide.txt").write_bytes("words in two bytes each".encode("utf-16-le"))
    with pytest.raises(ValueError, match="no UTF-8 text"):
        byte_corpus(str(tmp_path / "wide.txt"))
    with pytest.warns(UserWarning, match="wide.txt is no UTF-8"):
        corpus = byte_corpus(str(tmp_path))
    assert not (corpus.train == 4 + 13).any()  # line ends are those of a text file


# Arguments


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: StudyConfig(source="nope"), "source='nope'"),
        (lambda: StudyConfig(source=""), "source=''"),
        (lambda: generate(model(), ids, 2, temperature=1.0, seed=None), "seed=None"),
        (lambda: generate(model(), ids, 2, eos=40), "eos=40"),
        (lambda: generate(model(), ids[:0], 2), "ids has shape"),
        (lambda: MeshRouters(8, 3, 4, std=-1.0), "std=-1.0"),
        (lambda: MeshRouters(8, 2.5, 4), "n_cycles=2.5"),
        (lambda: MeshRouters(8, 3, 4, bias_init=float("nan")), "bias_init=nan"),
        (lambda: mesh_coefficients([torch.zeros(2, 1)], torch.zeros(2, 4)), "write has shape"),
        (lambda: model()(ids.float()), "whole numbers"),
        (lambda: model()(inputs_embeds=torch.zeros(2, 32)), "inputs_embeds has shape"),
        (lambda: model()(inputs_embeds=torch.zeros(2, 3, 8)), "inputs_embeds has shape"),
        (
            lambda: train_lm(RecursiveConfig(), None, TrainConfig(steps=1), valid_windows=0),
            "valid_windows=0",
        ),
        (lambda: train_lm(RecursiveConfig(), None, TrainConfig(steps=1), 1), "seq_len=1"),
    ],
)
def test_arguments_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bad()


# The harness


class StandIn:
    "What lm-evaluation-harness does with a model that it is handed, in a few lines"

    def __init__(self, pretrained, tokenizer=None, batch_size=1):
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, int(batch_size)

    def loglikelihood(self, requests):
        "Sum of log probabilities of the continuation, and whether it is the greedy one"
        found = []
        for context, continuation in requests:
            a, b = (
                self.tokenizer(x, add_special_tokens=False).input_ids
                for x in (context, continuation)
            )
            with torch.no_grad():
                shares = self.model(torch.tensor([a + b])).logits.log_softmax(-1)[
                    0, len(a) - 1 : -1
                ]
            each = shares.gather(-1, torch.tensor(b)[:, None])
            found.append((each.sum().item(), shares.argmax(-1).tolist() == b))
        return found


def test_the_harness_gets_a_model_that_it_can_score(monkeypatch):
    from llmpapers.mesh.results import harness_scores, harness_tasks

    questions = [("abc", "d"), ("dcb", "ab"), ("aa", "c")]
    asked = []

    def simple_evaluate(model, tasks=None, num_fewshot=None, batch_size=None, limit=None):
        asked.append((list(tasks), num_fewshot, limit))
        scores = [s for s, _ in model.loglikelihood(questions[:limit])]
        return dict(
            results={t: {"alias": t, "logprob,none": sum(scores)} for t in tasks}, versions={}
        )

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    parts = {name: types.ModuleType(name) for name in names}
    parts["lm_eval"].simple_evaluate = simple_evaluate
    parts["lm_eval.models.huggingface"].HFLM = StandIn
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    tokenizer = char_tokenizer("abcd")
    for m in (model(), stack(2)):
        scores = harness_scores(m, tokenizer, limit=2)
        want = 0.0
        for context, more in questions[:2]:
            row = tokenizer(context + more, add_special_tokens=False, return_tensors="pt").input_ids
            mean = m(row, labels=row.masked_fill(torch.arange(row.shape[1]) < len(context), -100))
            want -= mean.loss.item() * len(more)
        assert set(scores) == set(harness_tasks)
        assert scores["piqa"]["logprob,none"] == pytest.approx(want, rel=1e-4)
    assert asked[0] == (list(harness_tasks), 0, 2)
    harness_scores(model(), tokenizer, tasks=("sciq",), shots=5)
    assert asked[-1] == (["sciq"], 5, None)


@pytest.mark.parametrize("arm", ["base", "mesh, biased", "vanilla", "own mlp"])
def test_the_models_of_the_gpu_recipe_have_the_size_that_is_named(arm):
    "25 to 38 million weights without embeddings, of a model that is really made"
    cfg = arm_config(study_gpu, arm)
    with torch.device("meta"):
        made = RecursiveLM(cfg)
    counted = sum(p.numel() for p in made.parameters())
    inside = counted - 2 * cfg.vocab_size * cfg.d_model
    assert count_parameters(cfg)["total"] == counted
    assert count_parameters(cfg)["non_embedding"] == inside
    assert 25e6 < inside < 38e6


@pytest.mark.parametrize("norm", placed)
@pytest.mark.parametrize("arm", ["vanilla", "base", "mesh", "mesh, biased"])
def test_an_arm_with_other_norms_differs_in_nothing_else(arm, norm):
    study = StudyConfig(source="stdlib", d_model=32)
    plain, moved = (arm_config(study, x) for x in (arm, f"{arm}, {norm}"))
    own = {k: v for k, v in plain.to_dict().items() if k != "norm"}
    assert own == {k: v for k, v in moved.to_dict().items() if k != "norm"}
    assert (plain.norm, moved.norm) == ("pre", norm)
    begun = make_lm(plain, 1).state_dict(), make_lm(moved, 1).state_dict()
    assert all(torch.equal(v, begun[1][k]) for k, v in begun[0].items())


class Follower(torch.nn.Module):
    "Answers pointer chasing by following the arrows, the first hops only"

    device = torch.device("cpu")

    def __init__(self, n, hops, right):
        super().__init__()
        self.n, self.hops, self.right = n, hops, right

    def forward(self, ids, use_cache):
        n = self.n
        logits = torch.zeros(*ids.shape, n + 5)
        for row, out in zip(ids, logits):
            f = {int(a): int(b) for a, b in row[: 2 * n].view(n, 2)}
            at = int(row[2 * n])
            for j in range(self.hops):
                at = f[at]
                out[2 * n + 1 + j, at if j < self.right else 0] = 1.0
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("right", range(4))
def test_accuracy_by_hop_is_that_of_an_oracle(right):
    task = pointer_chasing(7, 3, 20, 5, "cycle")
    want = [1.0] * right + [0.0] * (3 - right)
    assert hop_accuracy(Follower(7, 3, right), task, batch=6) == want


def test_arms_learn_the_puzzle_from_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    seen = []

    def watching(*args):
        seen.append(set_aside(*args))
        return seen[-1]

    monkeypatch.setattr(mesh_train, "set_aside", watching)
    how = TrainConfig(steps=3, batch_size=4, log_every=1, eval_every=3)
    puzzle = PuzzleConfig(n=4, hops=2, d_model=32, held_out=8, train=how)
    found = [puzzle_outcome(puzzle, arm, 1) for arm in ("base", "vanilla")]
    held, *batches = [task["input_ids"] for task in seen]
    assert len(batches) == 7 and torch.equal(held, batches[3])  # held out, and three batches, twice
    questions = {tuple(row) for row in held[:, :9].tolist()}  # arrows and start
    for a, b in zip(batches[:3], batches[4:]):
        assert a.shape == (4, 2 * 4 + 2 + 2) and torch.equal(a, b)
        assert not questions & {tuple(row) for row in a[:, :9].tolist()}
    assert not torch.equal(batches[0], batches[1])
    assert [len(f["accuracy"]) for f in found] == [2, 2]
    assert puzzle_outcome(puzzle, "base", 1) == found[0] and len(seen) == 9  # kept, not trained


@pytest.mark.parametrize("n, hops, size", [(2, 1, 7), (4, 2, 40), (7, 3, 300)])
def test_what_is_set_aside_is_never_trained_on(n, hops, size):
    puzzle = PuzzleConfig(n=n, hops=hops, d_model=32)
    asked = []
    for aside in (True, False):
        task = set_aside(puzzle, size, 3, aside)
        assert task["input_ids"].shape == task["labels"].shape == (size, 2 * n + hops + 2)
        asked.append({tuple(row) for row in task["input_ids"].tolist()})
    assert asked[0] and asked[1] and not asked[0] & asked[1]
