"""Tiny language models: tokenizers, seeded weights, save and load, and the same numbers in a vLLM
engine"""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmpapers.core.lm import (
    TinyLMConfig,
    archs,
    char_tokenizer,
    encode_batch,
    load_lm,
    n_params,
    save_lm,
    tiny_lm,
    word_tokenizer,
)

words = "so we now add take a b c d = + - : ; 0 1 2 3 4 5 6 7 8 9 answer".split()


@pytest.fixture(scope="module")
def tok():
    return word_tokenizer(words)


GPT2 = ("unk_token", "eos_token", "bos_token", "pad_token")
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(texts.filter(lambda s: not any(special in s for special in SPECIALS)))
@example("<eos")
def test_char_round_trip(text):
    t = char_tokenizer(text)
    ids = t(text).input_ids
    assert t.decode(ids) == text and len(ids) == len(text) and t.unk_token_id not in ids


@pytest.mark.parametrize("special", SPECIALS)
def test_a_special_token_in_a_text_is_one_token(special):
    "As the notebook says under Pitfalls; the text comes back all the same"
    text = f"a{special}b"
    t = char_tokenizer(text)
    ids = t(text).input_ids
    assert len(ids) == 3 and ids[1] == SPECIALS.index(special) and t.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(" |;\n"),
    st.lists(st.sampled_from(["so", "we", "a", "<", "é", "--"]), min_size=1, max_size=20),
)
def test_word_round_trip(sep, seq):
    t = word_tokenizer(["so", "we", "a", "<", "é", "--"], sep=sep)
    assert t.decode(t(sep.join(seq)).input_ids) == sep.join(seq)
    assert len(t(sep.join(seq)).input_ids) == len(seq)


@pytest.mark.parametrize(
    "make",
    [
        lambda: word_tokenizer(words),
        lambda: word_tokenizer(words, sep="|"),
        lambda: char_tokenizer("abc \n"),
    ],
)
def test_auto_tokenizer_round_trip(make, tmp_path):
    t = make()
    t.save_pretrained(tmp_path)
    u = AutoTokenizer.from_pretrained(tmp_path)
    text = "a|b|c" if "|" in t.decode(t("a|b").input_ids) else "a b c"
    assert u(text).input_ids == t(text).input_ids and u.decode(u(text).input_ids) == text
    assert [u.pad_token_id, u.bos_token_id, u.eos_token_id, u.unk_token_id] == [0, 1, 2, 3]
    assert u.get_vocab() == t.get_vocab() and u.padding_side == "right"


@pytest.mark.parametrize("arch", archs)
@pytest.mark.parametrize("tied", [True, False])
def test_reload_is_bit_for_bit(arch, tied, tok, tmp_path):
    lm = load_lm(f"tiny-{arch}", tok, device="cpu", seed=3, tied=tied, layers=2)
    folder = save_lm(lm, tmp_path / "m")
    x = encode_batch(tok, ["so we now add a", "c = 8"])
    with torch.no_grad():
        ref = lm.model(**x).logits
        assert torch.equal(ref, load_lm(folder, device="cpu").model(**x).logits)
        assert torch.equal(ref, AutoModelForCausalLM.from_pretrained(folder)(**x).logits)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tok)


def test_seed_decides_the_weights(tok):
    torch.manual_seed(0)
    want = torch.rand(4)
    torch.manual_seed(0)
    a = tiny_lm(tok, seed=1)
    assert torch.equal(torch.rand(4), want)
    torch.manual_seed(99)
    b = tiny_lm(tok, seed=1)
    c = tiny_lm(tok, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))
    assert n_params(a) == sum({id(p): p.numel() for p in a.parameters()}.values())


def test_save_is_atomic(tok, tmp_path, monkeypatch):
    old, new = (load_lm("tiny-qwen3", tok, device="cpu", seed=s, layers=1) for s in (0, 1))
    folder = save_lm(old, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(
        type(new.tokenizer),
        "save_pretrained",
        lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        save_lm(new, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # no half-written folder is left
    monkeypatch.undo()
    save_lm(new, folder)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_save_refuses_other_folders(tok, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no model"):
        save_lm(load_lm("tiny-qwen3", tok, layers=1), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_hub_id_without_network_says_what_to_do(tmp_path):
    code = "from llmpapers.core.lm import load_lm\nload_lm('nobody/no-such-model')"
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    p = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert p.returncode == 1
    last = p.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("RuntimeError: name:")
        and "hf download nobody/no-such-model" in last
        and "tiny-qwen3" in last
    )


def test_a_given_tokenizer_must_fit(tok, tmp_path):
    folder = save_lm(load_lm("tiny-qwen3", tok, layers=1), tmp_path / "m")
    with pytest.raises(ValueError, match="tokenizer: has"):
        load_lm(folder, word_tokenizer(map(str, range(500))))


@pytest.mark.parametrize(
    "field,value",
    [
        ("arch", "rnn"),
        ("layers", 0),
        ("heads", 2.0),
        ("kv_heads", 3),
        ("width", True),
        ("head_dim", -1),
        ("max_len", 0),
        ("dropout", 1.0),
    ],
)
def test_bad_sizes_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}:"):
        TinyLMConfig(**{field: value})


vllm_child = r"""
import json, os, sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
from vllm import LLM, SamplingParams

out = {}
for arch, folder in json.loads(sys.argv[1]).items():
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    prompts = json.loads(sys.argv[2])
    res = llm.generate(
        [dict(prompt_token_ids=p) for p in prompts],
        SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, ignore_eos=True),
        use_tqdm=False,
    )
    text = llm.generate(
        [sys.argv[3]], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False
    )[0]
    out[arch] = dict(
        ids=[list(r.outputs[0].token_ids) for r in res],
        prompt=list(text.prompt_token_ids),
        logps=[
            [d[t].logprob for t, d in zip(r.outputs[0].token_ids, r.outputs[0].logprobs)]
            for r in res
        ],
    )
    del llm
open(sys.argv[4], "w").write(json.dumps(out))
"""


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(600)
def test_vllm_computes_the_same_numbers(tok, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: the engine check is left out")
    probe = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"vllm cannot be imported: {probe.stderr.strip().splitlines()[-1]}")
    lms = {
        a: load_lm(f"tiny-{a}", tok, device="cpu", seed=5, width=128, layers=2, max_len=128)
        for a in archs
    }
    folders = {a: str(save_lm(lm, tmp_path / a)) for a, lm in lms.items()}
    rnd = random.Random(0)
    prompts = [[rnd.randrange(4, len(tok)) for _ in range(n)] for n in (3, 7, 12, 30)]
    out, text = tmp_path / "out.json", "so we now add"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    p = subprocess.run(
        [
            sys.executable,
            "-c",
            vllm_child,
            json.dumps(folders),
            json.dumps(prompts),
            text,
            str(out),
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr[-4000:]
    for arch, res in json.loads(out.read_text()).items():
        assert res["prompt"] == tok(text).input_ids  # vLLM reads our tokenizer from the folder
        for prompt, ids, logps in zip(prompts, res["ids"], res["logps"]):
            with torch.no_grad():
                z = lms[arch].model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            ref = z.log_softmax(-1)
            assert len(ids) == 16 and ref.argmax(-1).tolist() == ids, arch
            assert (
                ref.gather(-1, torch.tensor(ids)[:, None])[:, 0] - torch.tensor(logps)
            ).abs().max() < 1e-3, arch
        assert ref.std() > 0.3  # the comparison is not between two flat distributions


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_added_tokens_are_no_unknown_words(side):
    "pad is unk, as after the usual repair of GPT-2; eos is unk and added to every text"
    t = word_tokenizer(["a", "b"])
    t.pad_token = t.unk_token
    mask = encode_batch(t, ["a b a", "a"], side=side)["attention_mask"]
    assert mask.sum(1).tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"texts\[1\].*'b zzz'"):
        encode_batch(t, ["a", "b zzz"], side=side)
    t.eos_token = t.unk_token
    t.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <unk>", special_tokens=[("<unk>", t.unk_token_id)]
    )
    assert encode_batch(t, ["a b", "a"], side=side)["attention_mask"].sum(1).tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"texts\[0\]"):
        encode_batch(t, ["zzz", "a"], side=side)
    assert encode_batch(t, ["zzz"], side=side, allow_unk=True)["input_ids"].shape == (1, 2)


def test_the_end_of_text_may_stand_in_a_text_of_gpt2():
    "Byte-level: there is no unknown word, though an id for it is named"
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    t = PreTrainedTokenizerFast(tokenizer_object=bpe, **dict.fromkeys(GPT2, "<|endoftext|>"))
    got = encode_batch(t, ["a<|endoftext|>b", "a"])
    assert got["input_ids"].tolist() == [[0, 2, 1], [0, 2, 2]]
    assert set(got) == {"input_ids", "attention_mask"}
