"What models are shown and what may come back: schemas, pictures, points, reflection, roles"

import base64
import inspect
import io
import json
import stat
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import open_chromium
from llmpapers.benchmarks.tasks import RagasBuilder, find_ragas
from llmpapers.graph2eval import (
    agents,
    bench,
    browser,
    client,
    documents,
    embed,
    env,
    graph,
    metapath,
    quality,
    tasks,
)
from llmpapers.graph2eval.agents import LLMDocAgent, LLMWebAgent, PixelAgent, RetrievalAgent
from llmpapers.graph2eval.bench_io import GymTaskEnv
from llmpapers.graph2eval.browser import (
    Action,
    ActionError,
    Chromium,
    HttpBrowser,
    Policy,
    Screen,
    crawl,
    direct,
    draw_marks,
)
from llmpapers.graph2eval.client import (
    ChatClient,
    ClientError,
    EndpointError,
    StubServer,
    check_reply,
    formats,
    json_schema,
)
from llmpapers.graph2eval.env import InfrastructureError, Obs, Script, WebEnv, play, regrade
from llmpapers.graph2eval.graph import build_web_graph, semantic_edges
from llmpapers.graph2eval.site import Injection, Site
from llmpapers.graph2eval.tasks import generate_web_tasks
from llmpapers.graph2eval.world import make_world

quick = settings(deadline=None)
promised = [
    (client.ChatClient, "base_url model timeout retries max_concurrency schema"),
    (agents.LLMWebAgent, "client mode reflect"),
    (agents.PixelAgent, "client"),
    (agents.LLMDocAgent, "client roles"),
    (env.WebEnv, "site backend policy"),
    (env.WebEnv.result, "task"),
    (embed.HashEmbedder, "dim"),
    (embed.MiniLM, "path"),
    (graph.crawl, "origin browser limits policy"),
    (graph.semantic_edges, "E tau top_k block"),
    (graph.KG.khop, "seeds k direction types"),
    (metapath.parse, "expr"),
    (metapath.match, "kg pattern start limit"),
    (tasks.generate_document_tasks, "kg n types seed"),
    (tasks.corrupt_edges, "kg p seed"),
    (quality.verify, "task env repeats minimality"),
    (quality.dedupe, "keys S quality tau"),
    (quality.select_coverage, "items quality k alpha"),
    (bench.run, "tasks agents make_env seeds workers"),
    (bench.discrimination, "S strength"),
]


@pytest.mark.parametrize("what, names", promised, ids=lambda x: getattr(x, "__qualname__", ""))
def test_names_that_users_were_promised(what, names):
    assert set(names.split()) <= set(inspect.signature(what).parameters)


# schemas

choice = dict(
    type="object",
    properties=dict(kind=dict(enum=["click", "stop"]), mark=dict(type="integer", minimum=0)),
    required=["kind", "mark"],
    additionalProperties=False,
)
values = st.one_of(st.text(max_size=5), st.integers(-3, 3), st.booleans(), st.none())
replies = st.dictionaries(st.sampled_from(["kind", "mark", "more"]), values, max_size=3)


def fits(d):
    "The schema `choice`, by hand"
    mark = d.get("mark")
    whole = isinstance(mark, int) and not isinstance(mark, bool) and mark >= 0
    return set(d) == {"kind", "mark"} and d["kind"] in ("click", "stop") and whole


@quick
@given(replies | st.fixed_dictionaries(dict(kind=st.sampled_from(["click", "x"]), mark=values)))
def test_a_reply_passes_exactly_if_it_fits(d):
    text = "Here it is: " + json.dumps(d)
    if fits(d):
        assert check_reply(text, choice) == d
    else:
        with pytest.raises(ValueError, match="of the reply"):
            check_reply(text, choice)


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=4), st.sampled_from([str, int, bool, list])))
def test_the_short_form_and_its_json_schema_agree(short):
    example = {str: "a", int: 3, bool: True, list: [1]}
    d = {k: example[t] for k, t in short.items()}
    assert check_reply(json.dumps(d), short) == d
    if short:
        assert check_reply(json.dumps(d), json_schema(short)) == d
        for bad in (d | {"another key": 1}, dict(list(d.items())[1:])):
            for form in (short, json_schema(short)):
                with pytest.raises(ValueError):
                    check_reply(json.dumps(bad), form)


@pytest.mark.parametrize(
    "bad, error",
    [
        (dict(type="array"), ValueError),
        (dict(score="number"), ValueError),
        (dict(score=complex), ValueError),
        (dict(type="object", properties=3), Exception),
        ("score", TypeError),
    ],
)
def test_a_schema_that_is_none_is_refused_at_once(bad, error):
    with pytest.raises(error):
        ChatClient("http://127.0.0.1:1/v1", "m", schema=bad)


@pytest.mark.parametrize("refuses", [(), ("json_schema",), ("json_schema", "json_object")])
def test_the_strictest_form_that_the_endpoint_takes_is_used_and_remembered(refuses):
    with StubServer(['{"kind": "stop", "mark": 1}'], refuses=refuses) as stub:
        asking = ChatClient(stub.base_url, "m", retries=0, schema=choice)
        for _ in range(2):
            assert asking.chat([dict(role="user", content="?")]) == dict(kind="stop", mark=1)
        sent = [b.get("response_format", {}).get("type", "") for b in stub.bodies]
    best = [f for f in formats if f not in refuses][0]
    assert sent == [*refuses, best, best]
    first = stub.bodies[0]["response_format"]
    assert first["json_schema"]["schema"] == choice


def test_without_a_schema_no_form_is_asked_for():
    with StubServer(["hello"]) as stub:
        assert ChatClient(stub.base_url, "m").chat([dict(role="user", content="?")]) == "hello"
        assert "response_format" not in stub.bodies[0]


def test_an_endpoint_that_refuses_everything_is_given_up_and_its_form_not_believed():
    with StubServer([400]) as stub:
        asking = ChatClient(stub.base_url, "m", schema=dict(a=str), backoff=0)
        with pytest.raises(EndpointError, match="400"):
            asking.chat([])
        assert len(stub.bodies) == len(formats) and asking.form == 0


def test_a_bad_reply_is_told_what_was_wrong_and_attempts_are_bounded():
    with StubServer(['{"kind": "hover", "mark": 0}']) as stub:
        asking = ChatClient(stub.base_url, "m", retries=2, backoff=0, schema=choice)
        with pytest.raises(ClientError, match="hover"):
            asking.chat([dict(role="user", content="?")])
        lengths = [len(m) for m in stub.asked]
    assert lengths == [1, 3, 3]  # the question, then with the last bad reply and the complaint


# the environment


@pytest.fixture(scope="module")
def site():
    with Site(make_world(4)) as s:
        yield s


@pytest.fixture(scope="module")
def some(site):
    "Tasks, one of each type"
    visitor = HttpBrowser(Policy((site.origin,)), dict(sid=site.new_session()), direct(site))
    found = generate_web_tasks(build_web_graph(crawl(site.origin, visitor).pages), 40, seed=1)
    site.release(visitor.cookies["sid"])
    by = {}
    for t in found:
        by.setdefault(t.type, t)
    return by


def test_result_of_a_task_is_whether_its_goal_was_met(site, some):
    form, look = some["form"], some["lookup"]
    with WebEnv(site, "direct") as place:
        place.reset(form)
        with pytest.raises(ValueError, match="still running"):
            place.result(form)
        for a in form.oracle:
            place.step(a)
        assert place.result(form) is True and place.result(look) is False
        assert place.result().reward == 1.0
        place.reset(look)
        site.release(place.sid)
        place.step(Action("answer"))
        with pytest.raises(InfrastructureError, match="no grade"):
            place.result(look)


@pytest.mark.parametrize("agent", ["som", "pixels"])
def test_an_agent_that_looks_needs_a_browser_and_is_told_the_extra(site, some, agent):
    model = ChatClient("http://127.0.0.1:1/v1", "m", retries=0)
    agent = LLMWebAgent(model, "som") if agent == "som" else PixelAgent(model)
    with WebEnv(site, "http") as place:
        with pytest.raises(ValueError, match=r"llmpapers\[web\]"):
            play(place, some["lookup"], agent)
    assert not site.sessions
    with pytest.raises(ValueError, match="picture"):
        WebEnv(site, "http", picture="marks")


def test_without_chromium_the_error_names_what_to_install(site, monkeypatch):
    monkeypatch.setattr(browser, "find_chromium", lambda: None)
    with pytest.raises(ValueError, match="install the package chromium"):
        Chromium()


def test_without_playwright_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright", None)
    with pytest.raises(ImportError, match=r"llmpapers\[web\]"):
        Chromium(path="/nowhere/chromium")


def test_a_crawl_can_be_held_closer_than_its_browser(site):
    visitor = HttpBrowser(Policy((site.origin, "http://127.0.0.2:1")))
    narrow = Policy((site.origin,))
    found = crawl(site.origin, visitor, policy=narrow)
    assert len(found.pages) > 20
    with pytest.raises(ValueError, match="not on the list"):
        crawl("http://127.0.0.2:1", visitor, policy=narrow)
    site.sessions.clear()


def white(width=300, height=200):
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def pixels(png):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


box = st.tuples(st.integers(0, 290), st.integers(0, 190), st.integers(2, 60), st.integers(2, 40))


@settings(max_examples=20, deadline=None)
@given(st.lists(box, max_size=6))
def test_marks_are_drawn_at_their_boxes_and_nowhere_else(boxes):
    image = pixels(draw_marks(white(), boxes))
    assert image.shape == (200, 300, 3)
    drawn = (image < 250).any(2)
    near = np.zeros_like(drawn)
    for x, y, w, h in boxes:
        near[max(0, y - 2) : max(y + h, y + 17) + 3, max(0, x - 25) : x + max(w, 25) + 3] = True
        alone = (pixels(draw_marks(white(), [(x, y, w, h)])) < 250).any(2)
        assert alone[
            y, x : min(300, x + w)
        ].all()  # its upper edge, where no other label lies on it
    assert not (drawn & ~near).any()


# models without a browser


def seen_by(prompt):
    "The text of a prompt"
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def page_of(site, path="/"):
    plain = HttpBrowser(Policy((site.origin,)), dict(sid=site.new_session()), direct(site))
    page = plain.goto(site.origin + path)
    site.release(plain.cookies["sid"])
    return page


def test_the_prompt_of_marks_has_a_picture_and_numbers_but_no_ids_and_no_facts(site):
    page = page_of(site, "/p/" + site.world.products[0].id)
    ids = tuple(w.id for w in page.widgets)
    screen = Screen(white(), (300, 200), ids, tuple((0, 0, 9, 9) for _ in ids))
    agent = LLMWebAgent(ChatClient("http://127.0.0.1:1/v1", "m"), "som")
    agent.notes = []
    prompt = agent.prompt(Obs("Do it.", page, "", 0, screen))
    text, image = prompt[-1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == screen.png
    assert f"[{len(ids) - 1}] " in text["text"] and ids[-1] not in text["text"]
    assert page.facts and not any(value in text["text"] for _, value in page.facts)
    pointing = PixelAgent(agent.client)
    pointing.notes = []
    told = seen_by(pointing.prompt(Obs("Do it.", page, "", 0, screen)))
    assert "300 x 200" in told and not any(w.name in told for w in page.widgets if w.name)


@quick
@given(st.integers(-5, 40), st.sampled_from(["click", "fill", "answer", "scroll"]))
def test_a_mark_or_a_point_outside_of_the_picture_is_no_action(k, kind):
    screen = Screen(b"", (30, 20), tuple("abcdefg"), ((0, 0, 1, 1),) * 7)
    obs = Obs("", None, "", 0, screen)
    model = ChatClient("http://127.0.0.1:1/v1", "m")
    marked, pointed = LLMWebAgent(model, "som"), PixelAgent(model)
    for agent, said, fine in (
        (marked, dict(mark=k), 0 <= k < 7),
        (pointed, dict(x=abs(k), y=0), abs(k) < 30),
        (pointed, dict(x=0, y=abs(k)), abs(k) < 20),
    ):
        said = said | dict(kind=kind, value="v")
        if fine or kind in ("answer", "scroll"):
            assert agent.action_of(said, obs).kind == kind
        else:
            with pytest.raises(ValueError, match="picture"):
                agent.action_of(said, obs)


def replies_of(acts):
    return [json.dumps(dict(kind=a.kind, target=a.target, value=a.value)) for a in acts]


def test_reflection_costs_one_call_a_failure_and_its_note_stays(site, some):
    task = some["form"]
    acts = iter(replies_of([Action("click", "button/Nowhere/0"), *task.oracle]))

    def model(messages):
        if "It failed:" in messages[0]["content"]:
            assert "Nowhere" in messages[0]["content"]
            return '{"wrong": "it is\\u200b not there", "instead": "look"}'
        return next(acts)

    with StubServer(model) as stub, WebEnv(site, "direct") as place:
        agent = LLMWebAgent(ChatClient(stub.base_url, "m"), reflect=True)
        assert play(place, task, agent).reward == 1
        texts = [seen_by(m) for m in stub.asked]
    assert sum("It failed:" in t for t in texts) == 1
    assert all("Note to yourself: it is not there" in t for t in texts[2:])
    agent.begin(task)
    assert agent.notes == []


def test_reflection_also_follows_a_step_that_changed_nothing_or_was_no_action(site, some):
    "Why it was asked, for a step that leaves the page as it was, and for a reply that is no action"
    task, asked = some["lookup"], []

    def model(messages):
        text = seen_by(messages)
        if "It failed:" in text:
            asked.append(text.split("It failed: ")[1].split("\n")[0])
            return '{"wrong": "w", "instead": "i"}'
        said = len(stub.asked) - len(asked)
        if said == 1:
            return '{"kind": "click", "target": "link/Home/0", "value": ""}'  # it is there already
        return "nothing" if said == 2 else '{"kind": "answer", "target": "", "value": "x"}'

    with StubServer(model) as stub, WebEnv(site, "direct") as place:
        agent = LLMWebAgent(ChatClient(stub.base_url, "m", retries=0), reflect=True)
        episode = play(place, task, agent)
    assert (episode.status, episode.reward) == ("finished", 0.0)
    assert asked[0] == "nothing on the page changed" and "no action" in asked[1]


@pytest.mark.parametrize("said, status", [("I am sorry", "limit"), (503, "infrastructure")])
def test_a_reflection_that_cannot_be_read_is_no_note_and_a_dead_endpoint_no_zero(
    site, some, said, status
):
    def model(messages):
        if "It failed:" in seen_by(messages):
            return said
        return '{"kind": "click", "target": "link/Nowhere/0", "value": ""}'

    with StubServer(model) as stub, WebEnv(site, "direct", max_steps=3) as place:
        agent = LLMWebAgent(ChatClient(stub.base_url, "m", retries=0), reflect=True)
        episode = play(place, some["lookup"], agent)
    assert (episode.status, agent.notes) == (status, [])
    assert (episode.reward is None) == (status == "infrastructure")


@pytest.mark.parametrize("bad", [dict(mode="pixels"), dict(max_elements=0)])
def test_bad_settings_of_an_agent_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LLMWebAgent(None, **bad)


# several roles


class Shelf:
    "A reader whose search finds the texts that share a word with the question"

    def __init__(self, texts):
        self.kg = graph.KG()
        for k, t in enumerate(texts):
            self.kg.add(str(k), "paragraph", text=t, doc="d")
        self.asked = []

    def given(self, task):
        self.asked.append(task.instruction)
        words = set(task.instruction.split())
        return [k for k in self.kg.nodes() if words & set(self.kg.attrs[k]["text"].split())]


question = tasks.Task(
    "q", "document", "hop", 2, "alpha", "", tasks.AnswerIs("text", "gamma"), (), ("1",), "k"
)


def team_of(confidence, **kw):
    "A team whose model answers with its last text, and is told what is missing"
    shelf, parts = Shelf(["alpha leads to beta", "beta leads to gamma", "other"]), []

    def model(messages):
        text = messages[0]["content"]
        if '"queries"' in text:
            parts.append("plan")
            return json.dumps(dict(queries=["nothing", 7]))
        if '"confidence"' in text:
            parts.append("verify")
            said = confidence(text)
            return said if isinstance(said, str) else json.dumps(said)
        if "Word the final" in text:
            parts.append("final")
            return "I am sorry"
        parts.append("reason")
        return json.dumps(dict(answer=text.split("\n")[-2].split()[-1]))

    with StubServer(model) as stub:
        agent = LLMDocAgent(ChatClient(stub.base_url, "m", retries=0), shelf, "multi", **kw)
        return agent.answer(question), parts, shelf


def test_what_is_missing_becomes_the_next_query_until_the_verifier_is_sure():
    def confidence(text):
        return dict(confidence=0.9 if "gamma" in text else 0.1, missing="beta")

    answer, parts, shelf = team_of(confidence)
    assert answer == "gamma" and parts == ["plan", *["reason", "verify"] * 2, "final"]
    assert shelf.asked[:2] == ["alpha", "nothing"] and shelf.asked[-1] == "beta"


@pytest.mark.parametrize("said", ["I am sorry", dict(confidence=7, missing="x"), dict(sure=1)])
def test_a_verifier_that_cannot_be_read_is_not_sure_and_rounds_are_bounded(said):
    answer, parts, _ = team_of(lambda text: said, rounds=2)
    assert parts.count("reason") == parts.count("verify") == 2
    assert answer == "beta"  # the best of what was tried, where the last word cannot be read


def test_a_single_role_asks_once_and_a_dead_endpoint_is_no_answer():
    shelf = Shelf(["alpha leads to beta"])
    with StubServer(['{"answer": "beta"}']) as stub:
        agent = LLMDocAgent(ChatClient(stub.base_url, "m"), shelf)
        assert agent.answer(question) == "beta" and len(stub.asked) == 1
    for mode in ("single", "multi"):
        with StubServer([500]) as stub, pytest.raises(EndpointError):
            asking = ChatClient(stub.base_url, "m", retries=0)
            LLMDocAgent(asking, shelf, mode).answer(question)
    with pytest.raises(ValueError, match="roles"):
        LLMDocAgent(None, shelf, "many")


def test_a_query_stays_in_the_document_that_the_question_names():
    kg = graph.KG()
    for doc in "ab":
        kg.add(doc, "paragraph", text="alpha beta", doc=doc)
    reader = RetrievalAgent(kg, k=5)
    named = tasks.Task(
        "q",
        "document",
        "x",
        1,
        'What is "alpha"? (document "b")',
        "",
        tasks.AnswerIs("text", "x"),
        (),
        ("b",),
        "k",
    )
    with StubServer(['{"queries": ["beta"]}', '{"answer": "x"}', "no", "no"]) as stub:
        LLMDocAgent(ChatClient(stub.base_url, "m", retries=0), reader, "multi", rounds=1).answer(
            named
        )
        material = stub.asked[1][0]["content"].split("MATERIAL\n")[1]
    assert material.count("alpha beta") == 1


# RAGAS' side of the benchmark, with a stand-in for its package

stand_in = {
    "ragas/__init__.py": "",
    "ragas/testset/__init__.py": "",
    "ragas/testset/graph.py": """
import uuid
class Node:
    def __init__(self, properties): self.properties, self.id = properties, uuid.uuid4()
class KnowledgeGraph:
    def __init__(self, nodes): self.nodes = nodes
print("something that a package prints")
""",
    "ragas/testset/transforms/__init__.py": "",
    "ragas/testset/transforms/relationship_builders/__init__.py": "",
    "ragas/testset/transforms/relationship_builders/cosine.py": """
from types import SimpleNamespace as R
import numpy as np
class CosineSimilarityBuilder:
    def __init__(self, threshold): self.threshold = threshold
    async def transform(self, kg):
        E = np.array([n.properties["embedding"] for n in kg.nodes])
        pairs = np.argwhere(np.triu(E @ E.T >= self.threshold, 1))
        return [R(source=kg.nodes[j], target=kg.nodes[i]) for i, j in pairs]
""",
    "ragas-0.0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: ragas\nVersion: 0.0.1\n",
}


def a_python_with(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_peer_runs_in_a_python_of_its_own(tmp_path, monkeypatch):
    gen = np.random.default_rng(0)
    E = gen.normal(size=(60, 8))
    E /= np.linalg.norm(E, axis=1, keepdims=True)
    python = a_python_with(tmp_path, stand_in)
    with RagasBuilder(python, E, 0.5) as ragas:
        assert ragas.versions["ragas"] == "0.0.1"
        assert ragas.build()["edges"] is None
        found = ragas.build(edges=True)
    ours = [[i, j] for i, j, _ in semantic_edges(E, 0.5, len(E) - 1)]
    assert found["edges"] == ours and found["n"] == len(ours) > 10
    assert found["seconds"] > 0 and found["cpu"] > 0 and ragas.process.returncode == 0
    monkeypatch.setenv("LLMPAPERS_RAGAS", python)
    assert find_ragas() == python


def test_a_peer_that_hangs_is_ended(tmp_path):
    python = a_python_with(tmp_path, {"ragas.py": "import time\ntime.sleep(600)"})
    with pytest.raises(TimeoutError, match="patience=1 s"):
        RagasBuilder(python, np.eye(3), patience=1)
    with pytest.raises(ValueError, match="patience"):
        RagasBuilder(python, np.eye(3), patience=0)


def test_a_python_without_the_peer_says_so(tmp_path, monkeypatch):
    python = a_python_with(tmp_path, {"ragas.py": "raise ImportError('no such thing here')"})
    with pytest.raises(ValueError, match="ragas"):
        RagasBuilder(python, np.eye(3))
    with pytest.raises(ValueError, match="ragas_python"):
        find_ragas(str(tmp_path / "nowhere"))
    monkeypatch.delenv("LLMPAPERS_RAGAS", raising=False)
    assert find_ragas() in ("", sys.executable)


# a real browser


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as c:
        yield c


browsing = [pytest.mark.browser, pytest.mark.timeout(600)]


def marked(fn):
    for mark in browsing:
        fn = mark(fn)
    return fn


def oracle_model(task, spot, nowhere, taken):
    "A stub's script that looks at a real picture and points at what the oracle uses next"
    rest = list(task.oracle)

    def model(messages):
        text, image = messages[-1]["content"]
        png = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        taken.append(pixels(png))
        where = spot(rest[0].target) if rest[0].kind != "answer" else nowhere
        if where is None:
            return json.dumps(dict(kind="scroll", value="") | nowhere)
        a = rest.pop(0)
        return json.dumps(dict(kind=a.kind, value=a.value) | where)

    return model


@marked
@pytest.mark.parametrize("way", ["som", "pixels"])
def test_a_model_that_looks_solves_tasks_by_marks_and_by_points(chromium, site, some, way):
    with WebEnv(site, "chromium", chromium=chromium) as place:

        def mark(target):
            marks = place.browser.screen().marks
            return dict(mark=marks.index(target)) if target in marks else None

        def point(target):
            seen = place.browser.screen()
            if target not in seen.marks:
                return None
            x, y, w, h = seen.boxes[seen.marks.index(target)]
            return dict(x=x + w // 2, y=y + h // 2)

        spot, nowhere = (mark, dict(mark=-1)) if way == "som" else (point, dict(x=0, y=0))
        for task in [some[k] for k in ("form", "lookup", "search") if k in some]:
            taken = []
            with StubServer(oracle_model(task, spot, nowhere, taken)) as stub:
                asking = ChatClient(stub.base_url, "m", retries=0)
                agent = LLMWebAgent(asking, "som") if way == "som" else PixelAgent(asking)
                episode = play(place, task, agent)
            assert episode.reward == 1, (task.instruction, episode.reason, episode.steps)
            assert regrade(episode, task, site.world).agrees
            assert {p.shape for p in taken} == {(800, 1000, 3)}
            assert all((p < 250).mean() > 0.001 for p in taken)  # something is drawn on it
    assert not site.sessions


@marked
def test_marks_are_in_the_picture_and_not_in_the_page(chromium, site):
    tab = chromium.new(Policy((site.origin,)), dict(sid=site.new_session()))
    try:
        before = tab.goto(site.origin + "/settings")
        plain, with_marks = tab.screen(), tab.screen(marks=True)
        assert plain.marks == with_marks.marks and plain.boxes == with_marks.boxes
        changed = (pixels(plain.png) != pixels(with_marks.png)).any(2)
        x, y, w, h = plain.boxes[0]
        assert changed[y : y + h, x : x + w].any() and changed.mean() < 0.2
        assert tab.snapshot() == before
    finally:
        tab.close()


@marked
def test_what_is_covered_or_out_of_sight_has_no_mark(chromium):
    cover = Injection(
        "cover",
        "*",
        "<div style='position:fixed;left:0;top:0;width:400px;height:60px;background:red'></div>"
        "<div style='height:5000px'></div><a href='/cart'>Far down</a>",
    )
    with Site(make_world(4), injections=(cover,)) as site:
        tab = chromium.new(Policy((site.origin,), timeout=5.0))
        page = tab.goto(site.origin + "/")
        seen = tab.screen()
        ids = {w.id for w in page.widgets}
        assert "link/Home/0" in ids and "link/Home/0" not in seen.marks
        far = next(w.id for w in page.widgets if w.name == "Far down")
        assert far not in seen.marks and "link/Settings/0" in seen.marks
        assert tab.act(Action("click", "@5,5")).path == "/"  # the cover is hit, and nothing happens
        tab.close()


@marked
@pytest.mark.parametrize("point", ["@", "@1", "@-1,5", "@1000,5", "@5,800", "@1,2,3", "@x,y"])
def test_a_point_that_is_none_is_an_error_of_the_action(chromium, site, some, point):
    acts = [Action("click", point), Action("answer")]
    with WebEnv(site, "chromium", chromium=chromium) as place:
        episode = play(place, some["lookup"], Script(acts))
    assert (episode.status, episode.reward) == ("finished", 0.0)
    assert "no point" in episode.steps[0]["error"]


@marked
def test_points_obey_the_fence(chromium):
    away = Injection("link", "*", "<p><a href='http://127.0.0.2:9/x'>Away</a></p>")
    with Site(make_world(4), injections=(away,)) as site:
        tab = chromium.new(Policy((site.origin,), timeout=5.0))
        tab.goto(site.origin + "/")
        for _ in range(12):
            seen = tab.screen()
            if "link/Away/0" in seen.marks:
                break
            tab.act(Action("scroll"))
        x, y, w, h = seen.boxes[seen.marks.index("link/Away/0")]
        with pytest.raises(ActionError, match="forbidden"):
            tab.act(Action("click", f"@{x + w // 2},{y + h // 2}"))
        assert any(e["kind"] == "blocked" for e in tab.events)
        tab.close()


@marked
def test_fields_and_choices_take_a_point_too(chromium, site):
    tab = chromium.new(Policy((site.origin,)), dict(sid=site.new_session()))
    tab.goto(site.origin + "/settings")
    seen = tab.screen()

    def middle(name):
        x, y, w, h = seen.boxes[seen.marks.index(name)]
        return f"@{x + w // 2},{y + h // 2}"

    tab.act(Action("select", middle("choice/Currency/0"), "EUR"))
    page = tab.act(Action("fill", middle("textbox/Search for/0"), "lamp"))
    held = {w.id: w.value for w in page.widgets}
    assert (held["choice/Currency/0"], held["textbox/Search for/0"]) == ("EUR", "lamp")
    with pytest.raises(ActionError, match="needs textbox"):
        tab.act(Action("fill", middle("choice/Currency/0"), "x"))
    started = time.monotonic()
    assert tab.act(Action("click", middle("textbox/Search for/0"))).path == "/settings"
    assert time.monotonic() - started < tab.policy.timeout  # a field leads nowhere: no waiting
    assert tab.act(Action("press", middle("textbox/Search for/0"))).path.startswith("/search")
    tab.close()


@marked
def test_a_picture_that_cannot_be_taken_is_trouble_of_the_machinery(chromium, site, some):
    with WebEnv(site, "chromium", chromium=chromium, picture="plain") as place:
        seen = place.reset(some["lookup"])
        assert seen.screenshot.startswith(b"\x89PNG") and seen.title == seen.page.title
        place.browser.screen = lambda marks: 1 / 0
        place.step(Action("scroll"))
        assert (place.result().status, place.result().reward) == ("infrastructure", None)
    with WebEnv(site, "chromium", chromium=chromium) as place:
        assert place.reset(some["lookup"]).screenshot is None


# bad input is named


@pytest.mark.parametrize("seed", [-1, 1.5, "a", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: agents.OracleAgent(0.1, seed),
        lambda seed: agents.RandomAgent(seed),
        lambda seed: Site(make_world(4), seed=seed),
    ],
)
def test_a_bad_seed_is_named_by_its_argument(make, seed):
    with pytest.raises(ValueError, match="seed="):
        make(seed)


def test_types_of_edges_as_one_text_are_not_taken_for_letters():
    kg = graph.KG()
    kg.add("a", "Page")
    kg.add("b", "Page")
    kg.link("a", "b", "NavTo")
    for call in (lambda: kg.around("a", types="NavTo"), lambda: kg.khop(["a"], 1, types="NavTo")):
        with pytest.raises(TypeError, match="NavTo"):
            call()
    with pytest.raises(ValueError, match="a: there is no node"):
        kg.distance("z", "a")


def test_letters_that_a_file_cannot_hold_are_named(tmp_path):
    with pytest.raises(ValueError, match="blocks: 'Привет'"):
        documents.write_blocks([("paragraph", "Привет")], tmp_path / "r.pdf")
    documents.write_blocks([("paragraph", "Müller, 3.5 €".replace("€", "EUR"))], tmp_path / "r.pdf")


@pytest.mark.parametrize(
    "said, fine",
    [
        ('click("0")', True),
        ("click('0', button='left')", True),
        ('click("0", "left", [])', True),
        ('click("0", button="right")', False),
        ('click("0", "left", ["Shift"])', False),
    ],
)
def test_buttons_of_the_mouse_as_browsergym_writes_them(site, some, said, fine):
    with WebEnv(site, "direct") as place:
        gym = GymTaskEnv(place, some["lookup"])
        gym.reset()
        if fine:
            assert gym.action_of(said).kind == "click"
        else:
            with pytest.raises(ValueError, match="left button"):
                gym.action_of(said)
        gym.close()
