"""The agent as a part: one call, one route, the form of another trainer; the arms of the study"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpapers.qagent.generator import ExtractiveReader
from llmpapers.qagent.protocol import Segment, Trajectory
from llmpapers.qagent.retrieval import BM25, RetrievalError, hop_queries
from llmpapers.qagent.rollout import Policy, RolloutConfig, ScriptedPolicy, rollout
from llmpapers.qagent.study import (
    GainReward,
    StudyConfig,
    arms,
    judging_worlds,
    naive_answers,
    study_agent,
    study_small,
)
from llmpapers.qagent.submodule import (
    AgentRetriever,
    SearchAgent,
    create_search_app,
    main,
    to_trl,
)
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
