"Language models that misbehave, files that were changed, and rewards for a policy"

import json

import pytest

from llmpapers.graph2eval.bench_io import load_bench, save_bench, to_verifiers, verifiers_reward
from llmpapers.graph2eval.client import ChatClient, ClientError, StubServer, judge, slots
from llmpapers.graph2eval.rl import Digits, MenuEnv, as_prompt, menu_tokenizer
from llmpapers.graph2eval.site import Site
from llmpapers.graph2eval.tasks import AnswerIs, Task, task_key, task_to_dict


def a_task(value="12"):
    goal = AnswerIs("number", value)
    return Task(
        "t" + value, "document", "x", 1, "How many?", "", goal, (), ("n",), task_key(goal, ["n"])
    )


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no",
        "{}",
        '{"score": "1"}',
        '{"score": true}',
        '{"score": 1, "x": 2}',
        "[1]",
        "cut",
        "empty",
    ]
    + [400, 429, 500, "broken"],
)
def test_bad_replies_are_refused(reply):
    with StubServer([reply]) as stub:
        client = ChatClient(stub.base_url, "stub", retries=1, backoff=0.001)
        with pytest.raises(ClientError):
            client.chat([dict(role="user", content="?")], dict(score=float))
        assert not judge(a_task(), "n", client).read


def test_slots_are_what_must_stay():
    assert slots('Set "A" to "2" in 3 steps') == slots('In 3 steps, set "A" to "2"')
    assert slots('Set "A" to "2"') != slots('Set "A" to "3"')


def test_a_changed_benchmark_is_noticed(tmp_path):
    save_bench(tmp_path, [a_task(), a_task("13")])
    assert len(load_bench(tmp_path).tasks) == 2
    lines = (tmp_path / "tasks.jsonl").read_text()
    (tmp_path / "tasks.jsonl").write_text(lines.replace("12", "14"))
    with pytest.raises(ValueError, match="was changed"):
        load_bench(tmp_path)


def test_no_pickle_is_opened(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    line = dict(prompt="How many?", gold_answer="12", task_type="table_qa")
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert load_bench(tmp_path).tasks[0].goal == AnswerIs("number", "12")


def test_rows_carry_their_goal():
    row = to_verifiers([a_task()])[0]
    assert verifiers_reward(row["info"], "", {}, "12.0") == 1
    assert verifiers_reward(row["info"], "", {}, "13") == 0


def test_an_environment_pays_only_for_the_goal():
    from llmpapers.graph2eval.browser import HttpBrowser, Policy, crawl, direct
    from llmpapers.graph2eval.graph import build_web_graph
    from llmpapers.graph2eval.tasks import generate_web_tasks
    from llmpapers.graph2eval.world import make_world

    with Site(make_world(5)) as site:
        visitor = HttpBrowser(Policy((site.origin,)), send=direct(site))
        tasks = generate_web_tasks(
            build_web_graph(crawl(site.origin, visitor).pages), 4, ["search"]
        )
    env = MenuEnv(Digits(menu_tokenizer()))
    for t in tasks:
        prompt = json.loads(json.dumps(as_prompt(t, 5)))
        answer = env.reset(prompt, 0)
        assert answer.observation == MenuEnv().reset(prompt, 0).observation
        for _ in range(8):
            at = next((k for k, a in enumerate(env.acts) if a in t.oracle), 0)
            answer = env.step(str(at))
            if answer.done:
                break
        assert answer.reward in (0.0, 1.0)
    assert task_to_dict(tasks[0])["goal"]["goal"] == "All"
