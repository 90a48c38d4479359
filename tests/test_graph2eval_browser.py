"The task generator in a real Chromium: the same pages, the same effects, and a fence that holds"

import contextlib
import signal
import time

import psutil
import pytest

from common import open_chromium
from llmpapers.graph2eval.agents import OracleAgent
from llmpapers.graph2eval.browser import (
    Action,
    HttpBrowser,
    Policy,
    crawl,
    direct,
    find_chromium,
)
from llmpapers.graph2eval.env import Script, WebEnv, play, regrade
from llmpapers.graph2eval.graph import build_web_graph
from llmpapers.graph2eval.site import Injection, Site, hostile_pages
from llmpapers.graph2eval.tasks import generate_web_tasks
from llmpapers.graph2eval.world import make_world
from test_graph2eval_web import odd_sent, odd_server, odd_steps

latin_sent = odd_sent.replace("%C3%A9", "%E9")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as c:
        yield c


@pytest.fixture(scope="module")
def site():
    with Site(make_world(4), delay=(0.0, 0.05), hostile=True) as s:
        yield s


def test_oracles_work_twice_with_a_slow_server(chromium, site):
    visitor = HttpBrowser(Policy((site.origin,)), dict(sid=site.new_session()), direct(site))
    tasks = generate_web_tasks(build_web_graph(crawl(site.origin, visitor).pages), 8, seed=2)
    site.sessions.clear()
    with WebEnv(site, "chromium", chromium=chromium) as env:
        for t in tasks:
            for _ in range(2):
                e = play(env, t, Script(t.oracle))
                assert e.reward == 1, (t.instruction, e.reason, e.steps)
            assert regrade(e, t, site.world).agrees and regrade(e, t, site.world).same_state
        assert play(env, tasks[0], Script([])).reward == 0
    assert not site.sessions


@pytest.mark.parametrize("name", [n for n in hostile_pages if n != "slow"])
def test_hostile_pages_do_not_hang(chromium, site, name):
    browser = chromium.new(Policy((site.origin,), timeout=3.0))
    try:
        browser.goto(f"{site.origin}/hostile/{name}")
        assert browser.goto(site.origin + "/").status == 200
        blocked = [u for u in browser.har.blocked() if "127.0.0.2" in u]
        assert bool(blocked) == (name in ("away", "frame", "socket"))
    finally:
        browser.close()


def test_contexts_share_nothing(chromium, site):
    one, two = site.new_session(), site.new_session()
    lamp = site.world.products[0].id
    for sid in (one, two):
        browser = chromium.new(Policy((site.origin,)), dict(sid=sid))
        browser.goto(f"{site.origin}/p/{lamp}")
        if sid == one:
            browser.act(Action("click", "button/Add to wishes/0"))
        browser.close()
    assert (site.state(one)["wishes"], site.state(two)["wishes"]) == ([lamp], [])


@pytest.mark.parametrize(
    "last, value",
    [
        (Action("click", "button/Delete"), "delete"),
        (Action("click", "button/Keep"), "keep"),
        (Action("press", "textbox/City"), "delete"),
        (Action("click", "button/Cancel"), None),
    ],
)
@pytest.mark.parametrize("charset, sent", [("utf-8", odd_sent), ("latin-1", latin_sent)])
def test_both_backends_send_the_same_form(chromium, last, value, charset, sent):
    asked = []
    with odd_server(charset) as server:
        for browser in (chromium.new(Policy((server.origin,))), server.browser()):
            del server.asked[:]
            page = browser.goto(server.origin + "/")
            assert page.widgets[0].href == server.origin + "/sub/x"
            for a in [*odd_steps, last]:
                browser.page = browser.act(a)
            asked.append([a for a in server.asked if a[0] == "POST"])
            browser.close()
    assert asked[0] == asked[1]
    assert asked[0] == ([("POST", "/sub/send", sent + value)] if value else [])


def test_chromium_sends_each_request_once(chromium, site):
    sid = site.new_session()
    browser = chromium.new(Policy((site.origin,)), dict(sid=sid))
    for path in ("/", "/cart", "/forum"):
        browser.goto(site.origin + path)
    browser.close()
    assert [r["path"] for r in site.requests(sid)] == ["/", "/cart", "/forum"]
    site.release(sid)


@pytest.mark.parametrize(
    "target", ["/a b", "/ü", "http://[", "/order/²", "/\x00", "\ud800", "/hostile/loop"]
)
def test_no_address_voids_an_episode_in_chromium(chromium, site, target):
    visitor = HttpBrowser(Policy((site.origin,)), send=direct(site))
    task = generate_web_tasks(build_web_graph(crawl(site.origin, visitor).pages), 1)[0]
    site.sessions.clear()
    acts = [Action("goto", target), Action("goto", "http://evil.test/"), Action("answer")]
    with WebEnv(site, "chromium", chromium=chromium) as env:
        episode = play(env, task, Script(acts))
    assert (episode.status, episode.reward) == ("finished", 0.0)
    assert regrade(episode, task, site.world).agrees


def test_a_chromium_that_dies_is_replaced(site):
    if not find_chromium():
        pytest.skip("no Chromium on the path")
    visitor = HttpBrowser(Policy((site.origin,)), send=direct(site))
    task = generate_web_tasks(build_web_graph(crawl(site.origin, visitor).pages), 1)[0]
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    with WebEnv(site, "chromium") as env:
        assert play(env, task, OracleAgent()).reward == 1
        own = [p for p in psutil.Process().children(recursive=True) if p.pid not in mine]
        for p in own:
            with contextlib.suppress(psutil.NoSuchProcess):  # it went with its parent
                if "chrom" in p.name():
                    p.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10
        while play(env, task, OracleAgent()).reward is None and time.monotonic() < end:
            pass
        assert play(env, task, OracleAgent()).reward == 1


def test_what_lies_far_down_is_clicked(chromium):
    tall = Injection("tall", "*", "<div style='height: 5000px'>wait</div>")
    with Site(make_world(4), injections=(tall,)) as site:
        browser = chromium.new(Policy((site.origin,), timeout=5.0))
        browser.goto(site.origin + "/")
        browser.act(Action("click", "link/Indoor/0"))
        page = browser.act(Action("click", "link/Home/0"))
        browser.close()
    assert page.path == "/" and not browser.events


def test_odd_addresses_are_mistakes_of_the_agent(chromium, site):
    visitor = HttpBrowser(Policy((site.origin,)), dict(sid=site.new_session()), direct(site))
    task = generate_web_tasks(build_web_graph(crawl(site.origin, visitor).pages), 1, ["navigate"])[
        0
    ]
    path = task.goal.goals[0].path
    with WebEnv(site, "chromium", chromium=chromium) as env:
        for target in ("/a b", "/ü", "http://[", "http://evil.test" + path):
            e = play(env, task, Script([Action("goto", target)]))
            assert (e.status, e.reward) == ("finished", 0.0), (target, e.reason)
