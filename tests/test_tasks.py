"The chain-of-thought task: generator, roles, labels, verifier, recipe"

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import TinyLMConfig
from llmpapers.core.scale import rng
from llmpapers.core.tasks import (
    FILLERS,
    ROLE,
    ROLES,
    ChainLMConfig,
    ChainTask,
    chain_lm,
    chain_lm_folder,
    chain_scales,
    solve,
)
from llmpapers.core.train import TrainConfig, read_metrics

tasks = st.builds(
    lambda s, lo, more, m, ops, fill: ChainTask(
        s, lo + more, m, ops=ops, min_steps=lo, max_filler=fill, names="abcdefghijkl"
    ),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(2, 30),
    st.sampled_from(["+", "-", "*", "+-", "-*", "+-*"]),
    st.integers(0, 3),
)


def by_hand(prompt, modulus):
    "The answer to a prompt, word by word"
    values, words = {}, prompt.split()
    for line in " ".join(words[:-2]).split(" ;"):
        w = line.split()
        if len(w) == 2:
            values[w[1]] = int(w[0])
        elif len(w) == 5:
            values[w[0]] = eval(f"{values[w[2]]} {w[3]} {values[w[4]]}") % modulus
    return values[words[-2]]


@settings(max_examples=60, deadline=None)
@given(tasks, st.integers(0, 2**20))
def test_every_sample_is_a_correct_solution(task, seed):
    b = task.sample(8, rng(seed, "x"))
    for text, ids, on, resp, roles in zip(
        b.texts, b.input_ids, b.attention_mask, b.response_mask, b.roles
    ):
        prompt, response = task.split(text)
        assert task.verify(prompt, response) and all(task.check_steps(prompt, response))
        assert task.min_steps <= len(task.check_steps(prompt, response)) <= task.n_steps
        assert response.endswith(f"answer {by_hand(prompt, task.modulus)}")
        n = int(on.sum())
        assert on[:n].all() and not on[n:].any() and (ids[n:] == 0).all()  # padded on the right
        assert (
            ids[: n - 1].tolist() == task.tokenizer(text).input_ids
            and ids[n - 1] == task.tokenizer.eos_token_id
        )
        assert (
            int((on & ~resp).sum()) == len(prompt.split())
            and int(resp.sum()) == len(response.split()) + 1
        )
        assert ((roles == ROLE["pad"]) == ~on).all() and (
            (roles == ROLE["prompt"]) == (on & ~resp)
        ).all()


def test_roles_say_what_the_words_are():
    task = ChainTask(ops="+-*")
    words = dict(
        filler=set(FILLERS),
        operator=set("+-*"),
        operand=set(map(str, range(10))),
        result=set(map(str, range(10))),
        answer=set(map(str, range(10))),
        name=set(task.names),
        punct=set("=:;"),
        eos={"<eos>"},
    )
    b = task.sample(200, rng(0, "roles"))
    for role, allowed in words.items():
        ids = b.input_ids[b.roles == ROLE[role]].unique().tolist()
        assert set(task.tokenizer.convert_ids_to_tokens(ids)) == allowed, role
    assert {ROLES[i] for i in b.roles.unique().tolist()} == set(ROLES)
    assert ((b.roles == ROLE["answer"]).sum(1) == 1).all() and (
        (b.roles == ROLE["operand"]).sum(1) == 2 * (b.roles == ROLE["result"]).sum(1)
    ).all()


def test_the_generator_decides():
    task = ChainTask()
    a, b, c = (
        task.sample(16, rng(1, "x")),
        task.sample(16, rng(1, "x")),
        task.sample(16, rng(2, "x")),
    )
    assert a.texts == b.texts and torch.equal(a.input_ids, b.input_ids) and a.texts != c.texts
    k = torch.tensor(
        [len(ChainTask().check_steps(*task.split(t))) for t in task.sample(600, rng(0, "k")).texts]
    ).bincount()
    assert k[:2].sum() == 0 and (k[2:] > 150).all()  # 2, 3 and 4 steps, each about 200 times


def test_noise_is_in_the_result_labels_alone():
    task = ChainTask(noise=0.4)
    b, clean = (replace(task, noise=n).batch(400)(0, rng(3, "n")) for n in (0.4, 0.0))
    assert torch.equal(b["input_ids"], clean["input_ids"])
    s = task.sample(400, rng(3, "n"))
    assert torch.equal(clean["labels"] == -100, ~s.response_mask) and torch.equal(
        clean["labels"][s.response_mask], s.input_ids[s.response_mask]
    )
    changed, result = b["labels"] != clean["labels"], s.roles == ROLE["result"]
    assert not (changed & ~result).any()
    share = (
        changed.sum() / result.sum()
    )  # a random digit equals the right one in a tenth of the cases
    assert abs(share - 0.4 * 0.9) < 4 * (0.36 * 0.64 / int(result.sum())) ** 0.5


prompt = "3 a ; 5 b ; c = a + b ; d = b - c ; d ?"
good = (
    "so we now add c = a 3 + b 5 : 8 c ; next let us subtract well d = b 5 - c 8 : 7 d ; answer 7"
)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "answer 7",
        good + " ;",
        good + " answer 7",
        good.replace("answer 7", "answer 8"),
        good.replace("answer 7", ""),
        good.replace(": 8 c", ": 9 c"),
        good.replace("c 8", "c 9"),
        good.replace("+", "-"),
        good.replace("b 5 - c 8", "c 8 - b 5"),
        good.replace("so we now add ", ""),
        good.replace("so we now add", "so we now subtract"),
        good.replace("well", "well well well"),
        good.replace("a 3", "a well 3"),
        good.replace("so we now", "so now we"),
        good.replace("7 d", "7 c"),
        good.replace(" ;", ";"),
        good[good.index("next") :],
        good.replace("next", good[: good.index("next")] + "next"),
        good.upper(),
        "well " + good,
        good.replace("  ", " ").replace(" : ", "  : "),
    ],
)
def test_verifier_is_strict(bad):
    task = ChainTask()
    assert task.verify(prompt, good) and bad != good and not task.verify(prompt, bad)


def test_steps_are_judged_one_by_one():
    task = ChainTask()
    assert task.check_steps(prompt, good) == [True, True]
    assert task.check_steps(prompt, good.replace(": 8 c", ": 9 c")) == [False, True]
    assert task.check_steps(prompt, good[: good.index("next")].strip()) == [True, False]
    assert task.check_steps(prompt, "nonsense") == [False, False]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "d ?",
        "3 a ; d ?",
        "3 a ; 5 b ; c = a + x ; c ?",
        "3 a ; 5 b ; c = a + b ; z ?",
        "3 a ; 5 b ; c = a * b ; c ?",
        "a 3 ; b 5 ; c = a + b ; c ?",
    ],
)
def test_bad_prompts_are_refused(bad):
    with pytest.raises(ValueError, match="^prompt:"):
        ChainTask().verify(bad, good)


@pytest.mark.parametrize(
    "field,value",
    [
        ("n_start", 1),
        ("n_steps", 1),
        ("modulus", 1),
        ("modulus", 101),
        ("noise", -0.1),
        ("noise", 2),
        ("ops", ""),
        ("ops", "+/"),
        ("ops", "++"),
        ("min_steps", 0),
        ("max_filler", -1),
        ("names", "abc"),
        ("names", "aabcdefg"),
        ("names", "ab cdefg"),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}:"):
        ChainTask(**{field: value})
    with pytest.raises(ValueError, match="^n:"):
        ChainTask().sample(0, rng(0))
    with pytest.raises(TypeError, match="^generator:"):
        ChainTask().sample(1, 0)
    with pytest.raises(ValueError, match="^text:"):
        ChainTask().split("no mark")


def test_chain_lm_is_trained_once_and_can_be_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    cfg = ChainLMConfig(
        ChainTask(names="abcdef"),
        TinyLMConfig(layers=1, width=32, heads=1, kv_heads=1, max_len=256),
        TrainConfig(steps=6, batch_size=4, log_every=1, save_every=2),
    )
    first = chain_lm(cfg, progress=False, device="cpu")
    monkeypatch.setattr(
        "llmpapers.core.tasks.train", lambda *a, **k: pytest.fail("it is in the cache")
    )
    again = chain_lm(cfg, progress=False, device="cpu")
    assert (
        all(torch.equal(p, q) for p, q in zip(first.model.parameters(), again.model.parameters()))
        and first.name == again.name
    )
    assert read_metrics(chain_lm_folder(cfg, progress=False)).steps == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path))
    other = chain_lm(cfg, seed=1, progress=False, device="cpu")
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))

    real, seen = ChainTask.batch, []

    def cut(self, n):
        def data(step, g):
            seen.append(step)
            if step == 5 and seen.count(5) == 1:
                raise KeyboardInterrupt
            return real(self, n)(step, g)

        return data

    monkeypatch.setattr(ChainTask, "batch", cut)
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        chain_lm_folder(cfg, progress=False, device="cpu")
    resumed = chain_lm(cfg, progress=False, device="cpu")
    assert all(
        torch.equal(p, q) for p, q in zip(first.model.parameters(), resumed.model.parameters())
    )
    assert (
        seen.count(1) == 1 and seen.count(5) == 2
    )  # steps before the interruption were not done again


def test_answers_are_greedy_and_do_not_depend_on_the_batch():
    task = ChainTask(names="abcdef")
    cfg = ChainLMConfig(task, TinyLMConfig(layers=1, width=32, heads=1, kv_heads=1, max_len=256))
    from llmpapers.core.lm import LM, tiny_lm

    lm = LM(tiny_lm(task.tokenizer, cfg.lm).double(), task.tokenizer, "x")
    prompts = [task.split(t)[0] for t in task.sample(5, rng(0, "p")).texts]
    assert (
        solve(lm, task, prompts, 12)
        == [solve(lm, task, [p], 12)[0] for p in prompts]
        == solve(lm, task, prompts, 12, batch=2)
    )


def test_scales_grow():
    assert set(chain_scales) >= {"smoke", "laptop", "gpu"}
    assert chain_scales["smoke"].train.steps <= 30 < chain_scales["laptop"].train.steps
