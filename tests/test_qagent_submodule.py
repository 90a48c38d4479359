"""The agent as a part: one call, one route, the form of another trainer; the arms of the study"""

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
