"""The agent as a part: one call, one route, the form of another trainer; the arms of the study"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpapers.qagent.generator import ExtractiveReader
from llmpapers.qagent.protocol import Segment, Trajectory
from llmpapers.qagent.retrieval import BM25, RetrievalError, hop_queries
from llmpapers.qagent.rewards import ReaderError
from llmpapers.qagent.rollout import Policy, RolloutConfig, ScriptedPolicy, rollout
from llmpapers.qagent.study import (
    GainReward,
    StudyConfig,
    arms,
    judging_worlds,
    naive_answers,
    scores,
    study_agent,
    study_outcome,
    study_small,
    variants,
)
from llmpapers.qagent.submodule import (
    AgentRetriever,
    SearchAgent,
    create_search_app,
    main,
    to_trl,
)
from llmpapers.qagent.train import evaluate
from llmpapers.qagent.world import build_world

world = build_world(0, 24, 16, 8, coverage=1.0)
retriever = BM25(world.docs)
asked = world.questions("bridge", "test")
hops = {q.text: hop_queries(world, q) for q in asked}


def turn(question, k, docs):
    "Searches to the end, then answers with the last page's country"
    queries = hops.get(question, ["film"])
    if k < len(queries):
        return f"<plan> p </plan> <search> <query> {queries[k]} </query> </search>"
    return f"<answer> {docs[-1].text.split()[-2] if docs else 'none'} </answer>"


class Down:
    "A retriever that cannot be asked"

    def search(self, queries, k=5):
        raise RetrievalError("connection refused")


@pytest.fixture(scope="module")
def agent():
    return SearchAgent(ScriptedPolicy(turn), retriever, RolloutConfig(style="plain"))


def test_passages_in_the_order_found(agent):
    found = agent.search(asked[0].text)
    assert [d.id for d in found.docs] == list(asked[0].support_ids)
    assert found.queries == tuple(hops[asked[0].text])
    assert found.trace.answer == asked[0].golds[0]
    short = SearchAgent(agent.policy, retriever, agent.cfg, max_docs=2)
    assert short.search(asked[0].text).docs == found.docs[:2]


def test_many_are_each(agent):
    texts = [q.text for q in asked]
    together = agent.search_all(texts)
    assert together == [agent.search(t) for t in texts] and agent.search_all([]) == []
    assert AgentRetriever(agent).search(["", texts[0], " "], 2) == [
        [],
        list(together[0].docs[:2]),
        [],
    ]


def test_a_silent_failure_is_an_error():
    lost = SearchAgent(ScriptedPolicy(turn), Down(), RolloutConfig(style="plain"))
    with pytest.raises(RetrievalError, match="connection refused"):
        lost.search(asked[0].text)


def test_limits_are_greedy_and_checked():
    hot = SearchAgent(ScriptedPolicy(turn), retriever, RolloutConfig(temperature=1.0))
    assert hot.cfg.temperature == 0.0
    with pytest.raises(ValueError, match="max_docs"):
        SearchAgent(ScriptedPolicy(turn), retriever, max_docs=0)
    with pytest.raises(TypeError, match="search_all"):
        hot.search([asked[0].text])


def test_the_route(agent):
    from fastapi.testclient import TestClient

    server = TestClient(create_search_app(agent, max_questions=3))
    one = server.post("/search", json=dict(question=asked[0].text)).json()["result"]
    two = server.post("/search", json=dict(questions=[q.text for q in asked[:2]])).json()["result"]
    assert two[0] == one and one["answer"] == asked[0].golds[0]
    assert [d["id"] for d in one["docs"]] == list(asked[0].support_ids)
    assert (one["stop"], one["errors"], one["error"]) == ("answer", [], None)
    assert server.post("/search", json=dict(questions=["a"] * 4)).status_code == 422
    lost = SearchAgent(ScriptedPolicy(turn), Down(), RolloutConfig(style="plain"))
    down = TestClient(create_search_app(lost), raise_server_exceptions=False)
    r = down.post("/search", json=dict(question=asked[0].text))
    assert r.status_code == 502 and "connection refused" in r.json()["detail"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=9), x, max_size=4),
    max_leaves=8,
)
bodies = st.fixed_dictionaries({}, optional=dict(question=anything, questions=anything))


@pytest.mark.slow
@given(bodies | anything)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_is_a_fault_of_the_server(agent, body):
    from fastapi.testclient import TestClient

    server = TestClient(create_search_app(agent), raise_server_exceptions=False)
    status = server.post("/search", content=json.dumps(body).encode()).status_code
    assert status in (200, 422)


def test_the_form_of_trl():
    from llmpapers.core.lm import TinyLMConfig, tiny_lm
    from llmpapers.qagent.train import atlas_tokenizer
    from llmpapers.rl.engines import HFEngine

    tok = atlas_tokenizer()
    lm = tiny_lm(tok, TinyLMConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8), 0)
    policy = Policy(HFEngine(lm, tok.pad_token_id), tok, first=str)
    limits = RolloutConfig(max_searches=2, max_new_tokens=8, max_len=200, style="plain")
    trajs = rollout(policy, retriever, asked[:2], limits, n=3)
    rows = to_trl(trajs)
    for t, prompt, ids, logps, mask in zip(
        trajs, *(rows[k] for k in ("prompt_ids", "completion_ids", "logprobs", "env_mask"))
    ):
        assert prompt == tok(t.question, add_special_tokens=False).input_ids
        assert ids == t.token_ids and mask == [int(m) for m in t.loss_mask]
        assert len(ids) == len(logps) and all(x == 0 for x, m in zip(logps, mask) if not m)
    with pytest.raises(ValueError, match=r"trajectories\[0\] has no tokens"):
        to_trl([Trajectory("?", (), (Segment("model", "a", (), ()),))])


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["--policy", str(tmp_path), "--docs", str(tmp_path / "none.jsonl")])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


class Picky:
    "A retriever that one query brings down"

    def search(self, queries, k=5):
        if any("bad" in q for q in queries):
            raise RetrievalError("cannot parse this")
        return retriever.search(queries, k)


def as_query(question, k, docs):
    "Searches for the question, then answers"
    return "<answer> a </answer>" if k else f"<search> {question} </search>"


def test_one_bad_question_costs_itself():
    """[good, bad, good]: two lists of passages and a reason; an error only if all are bad"""
    from fastapi.testclient import TestClient

    agent = SearchAgent(ScriptedPolicy(as_query), Picky(), RolloutConfig(style="plain"))
    found = agent.search_all(["film", "bad one", "city"])
    assert [len(r.docs) for r in found] == [1, 0, 1]
    assert [r.error is None for r in found] == [True, False, True]
    assert "'bad one' succeeded: RetrievalError: cannot parse" in found[1].error
    with pytest.raises(RetrievalError, match="bad two.*cannot parse"):
        agent.search_all(["bad two", "bad one"])
    with pytest.raises(RetrievalError, match="1 of 2 queries failed.*cannot parse"):
        AgentRetriever(agent).search(["film", "bad one", " "])
    server = TestClient(create_search_app(agent), raise_server_exceptions=False)
    rows = server.post("/search", json=dict(questions=["film", "bad one"])).json()["result"]
    assert rows[0]["error"] is None and rows[0]["docs"] and rows[0]["errors"] == []
    assert "cannot parse" in rows[1]["error"] and len(rows[1]["errors"]) == 1
    r = server.post("/search", json=dict(questions=["bad one", "bad two"]))
    assert r.status_code == 502 and "cannot parse" in r.json()["detail"]


def small_policy(max_len=64, seed=0):
    "A policy with random weights"
    from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm
    from llmpapers.qagent.train import as_policy, atlas_tokenizer

    tok = atlas_tokenizer()
    sizes = TinyLMConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, max_len=max_len)
    return as_policy(LM(tiny_lm(tok, sizes, seed), tok, "tiny"))


brief = RolloutConfig(max_searches=2, max_new_tokens=8, max_len=200, style="plain")


def test_what_cannot_be_asked_is_refused_by_name():
    """Blank, too long, half a surrogate: the question is named, the model is not asked"""
    from fastapi.testclient import TestClient

    agent = SearchAgent(small_policy(), retriever, brief)
    for bad, match in (
        (" ", "is blank"),
        ("\x1c", "is blank"),
        ("film " * 60, "is too long: prompt and first turn take 68 tokens, there is room for 64"),
        ("\ud800", "has half of a surrogate"),
    ):
        with pytest.raises(ValueError, match=rf"questions\[1\] {match}"):
            agent.search_all(["film", bad])
        with pytest.raises(ValueError, match=f"question {match}"):
            agent.search(bad)
        if bad.strip():
            with pytest.raises(RetrievalError, match=match):
                AgentRetriever(agent).search([bad])
    server = TestClient(create_search_app(agent), raise_server_exceptions=False)
    r = server.post("/search", json=dict(questions=["film", "film " * 60]))
    assert r.status_code == 422 and r.json()["detail"].startswith("questions.1 is too long")
    r = server.post("/search", json=dict(question="film " * 60))
    assert r.status_code == 422 and r.json()["detail"].startswith("question is too long")
    for bad in (None, "text", [3], {"a": 1}):
        with pytest.raises(TypeError, match="questions"):
            agent.search_all(bad)


def test_nothing_searched_is_no_empty_result():
    """A policy that never writes a tag: each item says so; an answer without a search is one"""
    from fastapi.testclient import TestClient

    def mute(question, k, docs):
        return "<answer> a </answer>" if question == "known" else "I do not know"

    agent = SearchAgent(ScriptedPolicy(mute), retriever, brief)
    lost, known = agent.search_all(["film", "known"])
    assert "no search of 'film' succeeded: the policy wrote no search" in lost.error
    assert known.error is None and known.docs == ()
    server = TestClient(create_search_app(agent))
    row = server.post("/search", json=dict(question="film")).json()["result"]
    assert (row["docs"], row["stop"], row["errors"]) == ([], "invalid", [])
    assert "wrote no search" in row["error"]
    with pytest.raises(RetrievalError, match="wrote no search"):
        AgentRetriever(agent).search(["film"])


def test_parts_that_do_not_fit():
    from llmpapers.core.lm import LM

    scripted = ScriptedPolicy(turn)
    for make, match in (
        (lambda: SearchAgent("hub/id", retriever), r"policy is a str.*HFPolicy\('hub/id'\)"),
        (lambda: SearchAgent(LM(None, None, "x"), retriever), r"policy is a LM.*HFPolicy\(lm\)"),
        (lambda: SearchAgent(scripted, world.docs), "retriever is a list.*BM25"),
        (lambda: SearchAgent(scripted, retriever, None), "cfg is a NoneType"),
        (lambda: SearchAgent(scripted, retriever, dict(topk=1)), "cfg is a dict"),
        (lambda: create_search_app(retriever), "agent is a BM25.*create_app"),
        (lambda: AgentRetriever(scripted), "agent is a ScriptedPolicy"),
    ):
        with pytest.raises(TypeError, match=match):
            make()
    for limits in (replace(brief, max_new_tokens=64), replace(brief, max_len=8)):
        with pytest.raises(ValueError, match=r"cfg.max_new_tokens=\d+: .* room for"):
            SearchAgent(small_policy(), retriever, limits)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A folder with a policy, a corpus with a bad line"
    from llmpapers.core.lm import LM, save_lm

    folder = tmp_path_factory.mktemp("served")
    policy = small_policy()
    save_lm(LM(policy.engine.model, policy.tokenizer, "tiny"), folder / "model")
    rows = [json.dumps(dict(id=d.id, title=d.title, text=d.text)) for d in world.docs]
    (folder / "docs.jsonl").write_text("\n".join([*rows, "{broken"]), encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    return folder


def test_the_command_starts_only_what_works(served, capsys, monkeypatch):
    from llmpapers.qagent import submodule

    monkeypatch.setattr(submodule, "serve", lambda *args: None)
    docs, model = str(served / "docs.jsonl"), str(served / "model")
    for policy, corpus, more, match in (
        (str(served / "none"), docs, ["--bare"], "--policy: "),
        ("no-such/model", docs, ["--bare"], "--policy: cannot load 'no-such/model'"),
        (str(served), docs, ["--bare"], "--policy: "),
        (model, str(served / "empty.jsonl"), ["--bare"], "has no page"),
        (model, docs, [], "has no chat template; use --bare"),
        (model, docs, ["--bare"], "--new-tokens=512: the model has room for 63"),
        (model, docs, ["--bare", "--new-tokens", "0"], "max_new_tokens=0"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["--policy", policy, "--docs", corpus, *more])
        said = capsys.readouterr().err
        assert e.value.code == 2 and said.count("\n") == 1 and match in said, said
    assert main(["--policy", model, "--docs", docs, "--bare", "--new-tokens", "16"]) == 0
    said = capsys.readouterr().out
    assert f"{len(world.docs)} pages, 1 lines left out (line {len(world.docs) + 1}: " in said


def test_failed_rollouts_keep_their_place():
    """A row for each trajectory; one that failed is a token that nobody learns from"""
    policy = small_policy()
    limits = replace(brief, max_searches=1, max_len=64)
    trajs = rollout(policy, retriever, ["film", "film " * 100, "city"], limits, n=2)
    rows = to_trl(trajs)
    assert rows["failed"] == [False] * 2 + [True] * 2 + [False] * 2
    assert {len(v) for v in rows.values()} == {6}
    for k in range(6):
        sizes = {len(rows[c][k]) for c in ("completion_ids", "logprobs", "env_mask")}
        assert len(sizes) == 1 and rows["prompt_ids"][k] and rows["completion_ids"][k]
        assert rows["failed"][k] == (not any(rows["env_mask"][k]))
    assert len(rows["prompt_ids"][2]) == 100 and rows["answer"][2] is None
    assert to_trl([])["failed"] == []
    agent = SearchAgent(ScriptedPolicy(turn), retriever, brief)
    for bad, match in (
        (trajs[0], "trajectories is a Trajectory"),
        (iter(trajs), "trajectories is a list_iterator"),
        (agent.search_all([asked[0].text]), r"trajectories\[0\] is a SearchResult.*trace"),
    ):
        with pytest.raises(TypeError, match=match):
            to_trl(bad)
    with pytest.raises(ValueError, match="all of them failed.*max_context"):
        to_trl(trajs[2:4])


@pytest.mark.slow
def test_trl_trains_on_them(tmp_path, monkeypatch):
    """TRL's own trainer takes the rows: our log-probabilities as its sampler's, no loss on what the
    environment said, no reward for a rollout that failed"""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    policy, seen = small_policy(128), []
    limits = replace(brief, max_new_tokens=4, max_len=128)

    def play(prompts, trainer):
        lost = policy._replace(first=lambda q: "city " * 200 if q == "city" else q)
        seen.append(to_trl(rollout(lost, retriever, prompts, limits)))
        return seen[-1]

    def reward(prompts, completions, answer, failed, docs, **kw):
        return [None if f else float(i) for i, f in enumerate(failed)]

    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        num_generations=2,
        max_completion_length=64,
        max_steps=1,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(policy.engine.model),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([dict(prompt=p) for p in ("film", "city", "born")]),
        processing_class=policy.tokenizer,
        rollout_func=play,
    )
    trainer.train()
    (rows,) = seen
    assert sum(rows["failed"]) == 2 and len(rows["failed"]) == 6
    log = trainer.state.log_history[0]
    assert np.isfinite(log["grad_norm"]) and log["grad_norm"] > 0
    assert log["completions/max_length"] == max(map(sum, rows["env_mask"]))


# ---- the study ----------------------------------------------------------------------------------
def test_arms_and_sets():
    assert len(set(arms)) == len(arms)
    with pytest.raises(ValueError, match="arm="):
        study_agent(StudyConfig(), "stage 3")
    sets = judging_worlds(study_small, 0.5, 3)
    films = {name: set(w.facts.director) for name, w in sets.items()}
    assert set(sets) == {"same law", "shifted"} and films["same law"] != films["shifted"]


def test_the_gain_is_over_the_question_itself():
    import asyncio

    reader = ExtractiveReader()
    told = naive_answers(retriever, asked, reader)
    naive = {q.text: a for q, a in zip(asked, told)}
    reward = GainReward(reader, naive)
    limits = RolloutConfig(style="plain")
    good = rollout(ScriptedPolicy(turn), retriever, asked[:1], limits)[0]

    async def pay(r):
        return await r(good)

    known = GainReward(reader, {asked[0].text: asked[0].golds[0]})
    assert naive[asked[0].text] == "unknown"
    assert asyncio.run(pay(reward)) == 1.0 and asyncio.run(pay(known)) == 0.0


class Half:
    "A retriever that cannot be asked for some films"

    def search(self, queries, k=5):
        if any(hash_of(q) for q in queries):
            raise RetrievalError("connection refused")
        return retriever.search(queries, k)


def hash_of(query):
    return sum(map(ord, query)) % 2


class Mute(ExtractiveReader):
    "A reader that fails for a share of the questions"

    last_error = "status 401: no such key"

    def __init__(self, every):
        super().__init__()
        self.every = every

    def answer(self, questions, docs):
        told = super().answer(questions, docs)
        return [None if i % self.every == 0 else a for i, a in enumerate(told)]


def test_an_outage_has_no_score():
    """A retriever or a reader that was never there is an error; single failures are counted"""
    policy = ScriptedPolicy(turn)
    good = scores(policy, world, study_small)
    assert good["reader_em"] == 1 and (good["errors"], good["failed"], good["unread"]) == (0, 0, 0)
    with pytest.raises(RetrievalError, match="retriever: no search of .* connection refused"):
        scores(policy, world, study_small, Down())
    some = scores(policy, world, study_small, Half())
    assert some["errors"] > 0 and some["searches"] > 0 and some["failed"] == 0
    table = evaluate(policy, Half(), asked, ExtractiveReader(), study_small.atlas.rollout)
    assert table["errors"].sum() == some["errors"]
    assert all((n == 0) == (why == "") for n, why in zip(table["errors"], table["error"]))
    with pytest.raises(ReaderError, match="reader: none of .* status 401: no such key"):
        scores(policy, world, study_small, reader=Mute(1))
    half = scores(policy, world, study_small, reader=Mute(2))
    assert half["unread"] == (len(asked) + 1) // 2 and half["reader_em"] == 1


def test_failed_rollouts_are_counted():
    from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm
    from llmpapers.qagent.train import as_policy, atlas_tokenizer

    tok = atlas_tokenizer()
    model = tiny_lm(tok, TinyLMConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8), 0)
    policy = as_policy(LM(model, tok, "tiny"))
    policy = policy._replace(first=lambda q: q if q != asked[0].text else q * 100)
    limits = replace(study_small.atlas.rollout, max_new_tokens=4)
    cfg = replace(study_small, atlas=replace(study_small.atlas, rollout=limits))
    found = scores(policy, world, cfg)
    assert found["failed"] == 1 and found["errors"] == 1
    endless = policy._replace(first=lambda q: q * 100)
    with pytest.raises(RetrievalError, match="max_context"):
        scores(endless, world, cfg)


def test_what_is_paid_by_the_gain():
    import asyncio

    reader = ExtractiveReader()
    with pytest.raises(ValueError, match="naive has None for 'q'"):
        GainReward(reader, dict(q=None))
    t = Trajectory("another question", ("a",), ())

    async def pay():
        return await GainReward(reader, dict(q="a"))(t)

    with pytest.raises(ValueError, match="naive has no answer to 'another question'"):
        asyncio.run(pay())


def test_the_key_of_an_arm_is_its_stages(monkeypatch):
    """A changed variant is another agent; a new one is an arm, with arguments of its reward"""
    from llmpapers.qagent import study

    keys = []
    monkeypatch.setattr(study, "artifact", lambda kind, recipe, build: keys.append(recipe) or 1 / 0)

    def recipe(*args, **kw):
        with pytest.raises(ZeroDivisionError):
            study_agent(study_small, *args, **kw)
        return keys[-1]

    before = recipe("beta 0")
    monkeypatch.setitem(variants, "beta 0", ("paper", dict(beta=0.5)))
    assert recipe("beta 0") != before and recipe("beta 0", 0.5) != recipe("beta 0", 1)
    monkeypatch.setitem(variants, "format", ("paper", {}, dict(format_weight=0.5)))
    assert recipe("format")["stages"][-1].reward == dict(format_weight=0.5)
    assert recipe("format", 1, np.int64(0)) == recipe("format", 1.0, 0)
    assert recipe("format", device="cpu") == recipe("format")
    paid = study._paid_by(recipe("format")["stages"][-1], retriever, asked)
    assert paid.weights["format_weight"] == 0.5
    monkeypatch.setitem(variants, "wrong", ("paper", dict(format_weight=0.5)))
    with pytest.raises(ValueError, match=r"variants\['wrong'\] changes 'format_weight'"):
        study_agent(study_small, "wrong")


@pytest.mark.slow
def test_a_new_arm_runs(monkeypatch):
    monkeypatch.setitem(variants, "format", ("paper", {}, dict(format_weight=0.5)))
    outcome = study_outcome(study_small, "format", 1, np.int64(0), device="cpu")
    assert outcome["same law"]["failed"] == 0 and outcome["curves"]
    assert study_outcome(study_small, "format", 1.0, 0) == outcome
    lm, curves = study_agent(study_small, "format", 1, 0)
    assert curves == outcome["curves"] and lm.model.device.type == "cpu"
    with pytest.raises(ValueError, match="device='abacus'"):
        study_agent(study_small, "format", device="abacus")


def test_arguments_are_named():
    from llmpapers.core.lm import LM

    lm = LM(None, None, "x")
    for make, kind, match in (
        (lambda: study_agent(study_small, "stage 1", seed=-1), ValueError, "seed=-1"),
        (lambda: study_agent(study_small, "stage 1", seed=1.5), ValueError, "seed=1.5"),
        (lambda: study_agent(study_small, "imitation", seed="0"), ValueError, "seed='0'"),
        (lambda: study_outcome(study_small, "stage 1", "x"), ValueError, "coverage='x'"),
        (lambda: judging_worlds(study_small, 1.1), ValueError, "coverage=1.1"),
        (lambda: study_agent("small", "stage 1"), TypeError, "cfg is a str"),
        (lambda: judging_worlds("small"), TypeError, "cfg is a str"),
        (lambda: study_outcome("small", "stage 1"), TypeError, "cfg is a str"),
        (lambda: scores(ScriptedPolicy(turn), world, "small"), TypeError, "cfg is a str"),
        (lambda: scores(lm, world, study_small), TypeError, "policy is a LM.*as_policy"),
        (lambda: scores(ScriptedPolicy(turn), [], study_small), TypeError, "world is a list"),
        (lambda: naive_answers(retriever, ["?"], None), TypeError, r"questions\[0\] is a str"),
        (lambda: StudyConfig(first=0), ValueError, "first=0"),
        (lambda: StudyConfig(more="x"), ValueError, "more='x'"),
        (lambda: study_outcome(study_small, "stage 3"), ValueError, "arm='stage 3'"),
    ):
        with pytest.raises(kind, match=match):
            make()
    empty = build_world(0, 24, 16, 8, test_share=0.0)
    with pytest.raises(ValueError, match="world has no test questions of kind='bridge'"):
        scores(ScriptedPolicy(turn), empty, study_small)
