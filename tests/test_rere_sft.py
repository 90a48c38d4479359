"""ReRe's supervised part: labels, prompts that are cut on the left, checkpoints of the hub"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub import hub_folder, tokenizer
from llmpapers.core.lm import LM, TinyLMConfig, char_tokenizer, load_lm, tiny_lm, word_tokenizer
from llmpapers.core.train import TrainConfig, sft_batch
from llmpapers.rere.data import Windows, sequence_windows, sid_format, title_format
from llmpapers.rere.sft import (
    ItemCoder,
    SidConfig,
    add_item_tokens,
    best_items,
    left_padded,
    sft_examples,
    sft_paper,
    sid_task,
    train_sft,
)
from llmpapers.rl.weights import trainable

quick = settings(max_examples=30, deadline=None)
titles = [f"item {c}{d}" for c in "abcdef" for d in "xyz"]
chars = char_tokenizer(
    "".join(sorted({c for t in title_format(titles).answers for c in t} | set(',\t"\n')))
)
tiny = TinyLMConfig(layers=1, heads=1, kv_heads=1, width=16, head_dim=16, max_len=256)


def rows(n=20, length=7, seed=0):
    "Windows over random users"
    g = torch.Generator().manual_seed(seed)
    return sequence_windows(torch.randint(len(titles), (n, length), generator=g), 5)


def coder(**more):
    return ItemCoder(chars, title_format(titles), bare=True, **more)


def policy(seed=0):
    return LM(tiny_lm(chars, tiny, seed), chars, "tiny")


# ---- labels --------------------------------------------------------------------------------------
@quick
@given(st.integers(0, 1000), st.integers(1, 8))
def test_labels_are_the_item_and_its_end(seed, n):
    w = rows(seed=seed).take(slice(0, n))
    c = coder()
    batch = sft_batch(sft_examples(c, w), pad=0)
    for labels, ids, real, target in zip(
        *map(batch.get, ("labels", "input_ids", "attention_mask")), w.target
    ):
        string = c.strings[target]
        assert labels[labels >= 0].tolist() == string and string[-1] == chars.eos_token_id
        size = int(real.sum())
        assert ids[size - len(string) : size].tolist() == string
        assert (labels[: size - len(string)] == -100).all() and (labels[size:] == -100).all()


def test_every_item_of_a_bare_history_can_be_learned():
    c, w = coder(), rows().take([3])
    ((ids, fixed),) = sft_examples(c, w, every_item=True)
    assert fixed == 1 and ids.tolist() == c.prompts(w)[0] + c.strings[w.target[0]]
    with pytest.raises(ValueError, match="bare=True"):
        sft_examples(replace(c, bare=False), w, every_item=True)


# ---- prompts -------------------------------------------------------------------------------------
@quick
@given(st.integers(0, 1000), st.integers(12, 80))
def test_a_long_prompt_keeps_the_latest_events(seed, room):
    w = rows(seed=seed).take(slice(0, 6))
    whole, cut = coder().prompts(w), coder(max_prompt=room).prompts(w)
    for a, b in zip(whole, cut):
        assert len(b) <= room and a[len(a) - len(b) :] == b
        if len(a) > room:  # whole events only, and no event more would have fitted
            text, rest = chars.decode(b), chars.decode(a[: len(a) - len(b)])
            assert text.startswith('"') or len(b) == room
            assert len(b) == room or len(rest.rstrip(",\t").rsplit("\t")[-1]) + 2 + len(b) > room


def test_the_instruction_stays_when_events_go():
    c = replace(coder(), bare=False, tokenizer=tokenizer(), max_prompt=10**4)
    w = rows().take([4])
    whole = c.tokenizer.decode(c.prompts(w)[0])
    n = len(c.prompts(w)[0])
    short = c.tokenizer.decode(replace(c, max_prompt=n - 4).prompts(w)[0])
    head, tail = whole.split("### User Input:")
    assert short.startswith(head) and short.endswith("### Response:\n") and len(short) < len(whole)
    latest = titles[w.history[0, -1]]
    assert latest in short.split("### User Input:")[1] and latest in tail


def test_prompts_do_not_depend_on_the_batch():
    w, c = rows(), replace(coder(), bare=False, tokenizer=tokenizer())
    assert c.prompts(w)[7] == c.prompts(w.take([7]))[0]


def test_left_padding():
    ids, mask = left_padded([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- training ------------------------------------------------------------------------------------
def test_the_policy_that_is_given_stays_and_the_other_learns():
    w, lm = rows(4).take([0] * 16), policy()
    before = [p.clone() for p in lm.model.parameters()]
    cfg = TrainConfig(steps=40, batch_size=16, lr=1e-2, log_every=10)
    run = train_sft(lm, coder(), w, cfg, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters()))
    assert run.history.losses[-1] < 0.3 * run.history.losses[0]
    assert best_items(run.lm, coder(), w.take([0]), 3)[0, 0] == w.target[0]


def test_only_adapters_learn(tmp_path):
    "A policy with adapters, one with adapters from a folder, and one of which a part is frozen"
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = policy()._replace(model=peft.get_peft_model(policy().model, config))
    part = policy()
    part.model.requires_grad_(False).model.layers[0].mlp.requires_grad_(True)
    adapted.model.save_pretrained(tmp_path)
    read = policy()._replace(model=peft.PeftModel.from_pretrained(policy().model, tmp_path))
    assert not any(p.requires_grad for p in read.model.parameters())
    for lm, learns in ((adapted, "lora_"), (read, "lora_"), (part, "mlp")):
        run = train_sft(lm, coder(), rows(), TrainConfig(steps=2, lr=1e-2), device="cpu")
        for (name, p), q in zip(run.lm.model.named_parameters(), lm.model.parameters()):
            assert torch.equal(p, q) != (learns in name), name


def test_a_row_that_the_model_cannot_read_is_refused():
    small = LM(tiny_lm(chars, replace(tiny, max_len=16), 0), chars, "small")
    with pytest.raises(ValueError, match="the model reads 16"):
        train_sft(small, coder(), rows(), TrainConfig(steps=1), device="cpu")


def test_a_run_resumes_to_the_same_bits(tmp_path):
    cfg = TrainConfig(steps=6, batch_size=4, log_every=1, save_every=3)
    whole = train_sft(policy(), coder(), rows(), cfg, device="cpu")
    stop = []

    def interrupt(model):
        stop.append(1)
        if len(stop) == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train_sft(policy(), coder(), rows(), cfg, eval_fn=interrupt, out=tmp_path, device="cpu")
    rest = train_sft(policy(), coder(), rows(), cfg, out=tmp_path, device="cpu")
    for a, b in zip(whole.lm.model.parameters(), rest.lm.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("gpt_neox", False)])
def test_a_checkpoint_of_the_hub_learns_in_float32(tmp_path, kind, tied):
    folder = hub_folder(tmp_path / "hub", kind, tied)
    c = ItemCoder(load_lm(folder).tokenizer, title_format(titles), max_prompt=400)
    cfg = replace(
        sft_paper, steps=6, batch_size=2, grad_accum=2, warmup=0.1, log_every=1, save_every=6
    )
    run = train_sft(folder, c, rows(6), cfg, out=tmp_path / "run", device="cpu")
    assert {p.dtype for p in run.lm.model.parameters()} == {torch.float32}
    start, half = trainable(folder, "cpu")
    moved = [
        (a - b).abs().max() for a, b in zip(run.lm.model.parameters(), start.model.parameters())
    ]
    assert half and max(moved) > 0 and len(run.history.rows) == 6
    lists = best_items(run.lm, c, rows(6).take(slice(0, 3)), len(titles))
    assert torch.equal(lists.sort(-1).values, torch.arange(len(titles)).expand(3, -1))


def test_codes_become_tokens_of_a_hub_model(tmp_path):
    lm = load_lm(hub_folder(tmp_path / "hub"), dtype=torch.float32, device="cpu")
    fmt = sid_format(torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 1]]))
    rows_before, known = lm.model.get_input_embeddings().num_embeddings, len(lm.tokenizer)
    lm = add_item_tokens(add_item_tokens(lm, fmt.words), fmt.words)
    assert len(lm.tokenizer) == known + len(fmt.words)
    assert lm.model.get_input_embeddings().num_embeddings >= max(rows_before, len(lm.tokenizer))
    c = ItemCoder(lm.tokenizer, fmt, terminated=False)
    assert {len(s) for s in c.strings} == {3} and len(c.trie.items) == 3
    wide = sid_format(torch.arange(200)[:, None].expand(-1, 3))
    big = add_item_tokens(lm, wide.words)
    assert big.model.get_input_embeddings().num_embeddings >= len(big.tokenizer)
    w = Windows(*[torch.tensor(x) for x in ([[0, 1]], [2], [0], [0], [0])])
    assert best_items(lm, c, w, 5).tolist()[0][3:] == [-1, -1]


def test_a_tokenizer_with_bos_keeps_it():
    class WithBos:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, add_special_tokens=True, **kw):
            one = [1] * add_special_tokens + [5, 6]
            return type(
                "E", (), dict(input_ids=one if isinstance(text, str) else [one] * len(text))
            )

    c = ItemCoder(WithBos(), title_format(["a", "b"]), max_prompt=2)
    w = Windows(*[torch.tensor(x) for x in ([[0]], [1], [0], [0], [0])])
    assert c.start == [1] and c.prompts(w) == [[1, 6]] and c.strings[0] == [5, 6, 2]


def test_the_small_world_has_three_sets_of_users():
    cfg = SidConfig(n_users=20, n_test=30)
    task = sid_task(cfg, 3)
    assert len(task.train) == 20 * (cfg.seq_len - cfg.history) and len(task.test) == 30
    assert not torch.equal(task.valid.history, task.test.history)
    assert torch.equal(sid_task(cfg, 3).test.history, task.test.history)
    assert not torch.equal(sid_task(cfg, 4).test.history, task.test.history)


@pytest.mark.parametrize("name, bad", [("max_prompt", 0), ("terminated", 2), ("bare", "no")])
def test_fields_of_the_coder_are_checked(name, bad):
    with pytest.raises(ValueError, match=f"{name}="):
        ItemCoder(word_tokenizer(["a"]), title_format(["a"]), **{name: bad})


def test_items_beyond_the_catalogue_are_named():
    good = rows(2)
    for value in (-1, len(titles), 99):
        wrong = replace(good, target=good.target.clone().fill_(value))
        with pytest.raises(ValueError, match=f"targets hold item {value}"):
            sft_examples(coder(), wrong)
    for value in (-2, len(titles)):
        wrong = replace(good, history=good.history.clone().fill_(value))
        with pytest.raises(ValueError, match=f"histories hold item {value}"):
            coder().prompts(wrong)


def test_no_rows_are_no_lists_and_no_training():
    none = rows(2).take([])
    assert best_items(policy(), coder(), none, 4).shape == (0, 4)
    with pytest.raises(ValueError, match="windows is empty"):
        train_sft(policy(), coder(), none, TrainConfig(steps=1))


def test_a_folder_belongs_to_its_rows(tmp_path):
    cfg = TrainConfig(steps=2, batch_size=4)
    first = train_sft(policy(), coder(), rows(), cfg, out=tmp_path / "run", device="cpu")
    again = train_sft(policy(), coder(), rows(), cfg, out=tmp_path / "run", device="cpu")
    assert first.history == again.history
    with pytest.raises(ValueError, match="out: run holds a run on other rows"):
        train_sft(policy(), coder(), rows(seed=1), cfg, out=tmp_path / "run", device="cpu")
