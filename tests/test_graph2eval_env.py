"Episodes, gates and agents of the task generator, and what hostile pages do to it"

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.graph2eval.agents import HeuristicAgent, LLMWebAgent, OracleAgent, candidates
from llmpapers.graph2eval.browser import (
    Action,
    CrawlLimits,
    HttpBrowser,
    Policy,
    crawl,
    direct,
    fetch_once,
)
from llmpapers.graph2eval.client import ChatClient, ClientError, EndpointError, StubServer
from llmpapers.graph2eval.env import Script, WebEnv, play, regrade
from llmpapers.graph2eval.graph import build_web_graph
from llmpapers.graph2eval.quality import (
    check_static,
    coverage_gain,
    dedupe,
    select_mmr,
    verify,
)
from llmpapers.graph2eval.site import Site, fresh_state
from llmpapers.graph2eval.tasks import (
    All,
    AnswerIs,
    StateEquals,
    corrupt_edges,
    generate_web_tasks,
    task_from_dict,
    task_to_dict,
    web_types,
)
from llmpapers.graph2eval.world import make_world

quick = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def shop():
    with Site(make_world(3), hostile=True) as site:
        visitor = HttpBrowser(Policy((site.origin,)), send=direct(site))
        pages = crawl(site.origin, visitor).pages
        site.sessions.clear()
        web = build_web_graph(pages)
        yield site, web, generate_web_tasks(web, 40, seed=5)


def test_every_oracle_reaches_its_goal_twice_and_nothing_else_does(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    for t in tasks:
        assert verify(t, env, minimality=False).ok, t.instruction
        assert play(env, t, Script([])).reward == 0
        assert not t.goal.check(t.start, fresh_state(), "")
    assert {t.type for t in tasks} == set(web_types) - {"checkout"} and not site.sessions


def test_both_clients_agree(shop):
    site, _, tasks = shop
    with WebEnv(site, "http") as env:
        for t in tasks[::5]:
            ours, theirs = (
                play(WebEnv(site, "direct"), t, OracleAgent()),
                play(env, t, OracleAgent()),
            )
            assert (ours.reward, ours.state, ours.path) == (
                theirs.reward,
                theirs.state,
                theirs.path,
            )


def test_every_episode_can_be_graded_again(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    for t in tasks[::4]:
        for agent in (OracleAgent(0.3, 1), HeuristicAgent(1)):
            kept = json.loads(json.dumps(asdict(play(env, t, agent))))
            assert regrade(kept, t, site.world).agrees and regrade(kept, t, site.world).same_state


def test_slips_never_help(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    means = []
    for eps in (1.0, 0.4, 0.0):
        means.append(
            np.mean([play(env, t, OracleAgent(eps, k)).reward for k, t in enumerate(tasks)])
        )
    assert means[0] == 0 and means[0] < means[1] < means[2] == 1


def test_counts_are_kept_or_explained(shop):
    _, web, _ = shop
    for n in (0, 1, 7, 40):
        assert len({t.key for t in generate_web_tasks(web, n)}) == n
    few = generate_web_tasks(web, 500, ["filter"])
    assert len(few) < 500 and few.shortfall
    assert [t.key for t in generate_web_tasks(web, 12)] == [
        t.key for t in generate_web_tasks(web, 12)
    ]


def test_tasks_are_json(shop):
    for t in shop[2]:
        assert task_from_dict(json.loads(json.dumps(task_to_dict(t)))) == t


@quick
@given(st.floats(0, 1), st.integers(0, 100))
def test_bent_edges(shop_graph, p, seed):
    bent = corrupt_edges(shop_graph, p, seed)
    assert len(bent.links) == len(shop_graph.links)
    moved = [a != b for a, b in zip(bent.links, shop_graph.links)]
    assert p < 1 or not any(moved)
    n = len(shop_graph.edges("NavTo"))
    assert abs(sum(moved) / n - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9


@pytest.fixture(scope="module")
def shop_graph(shop):
    return shop[1]


def test_candidates_are_distinct_and_can_be_written(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    acts = candidates(env.reset(tasks[0]).page, tasks[0].instruction)
    assert len(set(acts)) == len(acts)
    env.close()


# ---- the fence -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{p}@evil.test/",
        "http://127.0.0.1:1/",
        "http://localhost:{p}/",
        "file:///etc/hosts",
        "javascript:alert(1)",
        "data:text/html,x",
        "http://127.0.0.1:{p}.evil.test/",
        "https://127.0.0.1:{p}/",
        "http://[::1]:{p}/",
        "http://127.0.0.1:99999999/",
    ],
)
def test_the_list_of_origins_is_exact(shop, url):
    port = shop[0].origin.rsplit(":", 1)[1]
    policy = Policy((shop[0].origin,))
    reply = fetch_once(policy, "GET", url.format(p=port), [])
    assert reply.status == 403 and reply.note


@pytest.mark.parametrize(
    "page, status", [("away", 403), ("loop", 508), ("huge", 413), ("error", 500)]
)
def test_hostile_pages_end(shop, page, status):
    browser = HttpBrowser(Policy((shop[0].origin,), timeout=2.0))
    assert browser.goto(f"{shop[0].origin}/hostile/{page}").status == status
    assert browser.goto(shop[0].origin + "/").status == 200


def test_an_endless_crawl_ends(shop):
    limits = CrawlLimits(max_pages=20, max_depth=30)
    found = crawl(
        shop[0].origin + "/hostile/endless", HttpBrowser(Policy((shop[0].origin,))), limits
    )
    assert len(found.pages) == 20 and found.skipped


def test_links_that_run_are_not_followed(shop):
    browser = HttpBrowser(Policy((shop[0].origin,)))
    page = browser.goto(f"{shop[0].origin}/hostile/script")
    for w in page.widgets:
        with pytest.raises(ValueError, match="forbidden"):
            browser.act(Action("click", w.id))
    assert len(browser.events) == 3


def test_robots_are_obeyed():
    with Site(make_world(0), robots="User-agent: *\nDisallow: /\n") as site:
        assert crawl(site.origin, HttpBrowser(Policy((site.origin,)))).pages == []


# ---- sets ----------------------------------------------------------------------------------------
@quick
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.randoms())
def test_the_order_of_doubles_does_not_matter(keys, random):
    order = list(range(len(keys)))
    random.shuffle(order)
    turned = dedupe([keys[i] for i in order])
    assert sorted(sorted(order[i] for i in g) for g in turned.groups) == dedupe(keys).groups


@quick
@given(st.integers(1, 8), st.integers(0, 1000))
def test_mmr_at_its_ends(n, seed):
    gen = np.random.default_rng(seed)
    q = gen.permutation(n) / n
    S = gen.random((n, n))
    assert select_mmr(S, q, n + 3, 1.0) == np.argsort(-q, kind="stable").tolist()
    assert sorted(select_mmr(S, q, n, 0.0)) == list(range(n))


@quick
@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_coverage_has_diminishing_returns(item, covered, more):
    x = dict(a=item)
    assert coverage_gain(x, dict(a=covered)) >= coverage_gain(x, dict(a=covered | more))
    assert coverage_gain(x, dict(a=item)) == 0


@pytest.mark.parametrize("reply", [500, 401, 429, "broken"])
def test_an_endpoint_that_fails_is_not_the_failure_of_its_agent(shop, reply):
    site, _, tasks = shop
    with StubServer([reply]) as stub:
        agent, env = (
            LLMWebAgent(ChatClient(stub.base_url, "stub", retries=0)),
            WebEnv(site, "direct"),
        )
        episode = play(env, tasks[0], agent)
        with pytest.raises(EndpointError):
            agent.client.chat([dict(role="user", content="?")])
    assert (episode.status, episode.reward, env.sid) == ("infrastructure", None, None)


@pytest.mark.parametrize("reply", ["I am sorry", "cut", "empty"])
def test_a_reply_that_cannot_be_used_is_the_failure_of_its_agent(shop, reply):
    site, _, tasks = shop
    with StubServer([reply]) as stub:
        agent = LLMWebAgent(ChatClient(stub.base_url, "stub", retries=0))
        assert play(WebEnv(site, "direct"), tasks[0], agent).reward == 0
        with pytest.raises(ClientError) as caught:
            agent.client.chat([dict(role="user", content="?")], dict(kind=str))
    assert caught.type is ClientError


def test_an_agent_that_crashes_leaves_its_record(shop):
    site, _, tasks = shop
    task = next(t for t in tasks if t.type == "two_forms")

    class Crash(Script):
        "Does half of what it should, then breaks"

        def act(self, obs):
            if len(self.rest) < len(self.actions) / 2:
                raise ZeroDivisionError("a bug")
            return super().act(obs)

    env = WebEnv(site, "direct")
    episode = play(env, task, Crash(task.oracle))
    assert episode.steps and episode.har["log"]["entries"] and "a bug" in episode.reason
    assert (episode.status, episode.reward) == ("finished", 0.0)
    assert regrade(asdict(episode), task, site.world).same_state and env.sid is None


def test_an_answer_inside_of_a_number_was_not_seen(shop):
    site, web, tasks = shop
    task = next(t for t in tasks if t.type == "lookup" and len(t.oracle[-1].value) > 2)
    part = task.oracle[-1].value[1:-1]
    goal = All((AnswerIs("text", part), StateEquals(fresh_state())))
    oracle = (*task.oracle[:-1], replace(task.oracle[-1], value=part))
    sly = replace(task, goal=goal, oracle=oracle)
    assert verify(task, WebEnv(site, "direct")).ok and check_static(task, web).ok
    assert verify(sly, WebEnv(site, "direct")).gate == "seen"
    assert not check_static(sly, web).ok


def test_evidence_of_a_web_task_exists(shop):
    _, web, tasks = shop
    for t in tasks:
        assert check_static(t, web).ok
        assert not check_static(replace(t, evidence=("/p/none",)), web).ok


def test_an_order_is_placed(shop):
    site, web, _ = shop
    sid = site.new_session()
    site.restore(sid, fresh_state() | dict(cart={site.world.products[0].id: 1}))
    visitor = HttpBrowser(Policy((site.origin,)), dict(sid=sid), direct(site))
    laden = build_web_graph(crawl(site.origin, visitor).pages)
    tasks = generate_web_tasks(laden, 5, ["checkout"])
    assert len(tasks) == 5
    for t in tasks:
        assert verify(t, WebEnv(site, "direct")).ok, t.instruction
        (order,) = t.goal.state["orders"]
        assert len(order["items"]) == 1 and not t.goal.state["cart"]
    none = generate_web_tasks(web, 5, ["checkout"])
    assert not none and none.shortfall
