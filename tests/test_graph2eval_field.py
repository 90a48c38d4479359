"Endpoints and pages as they are met: each costs a step or an episode at most, and says why"

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import open_chromium
from llmpapers.graph2eval.agents import LLMDocAgent, LLMWebAgent, PixelAgent
from llmpapers.graph2eval.browser import (
    Action,
    Chromium,
    CrawlLimits,
    HttpBrowser,
    Policy,
    Screen,
    crawl,
    find_chromium,
)
from llmpapers.graph2eval.client import (
    ChatClient,
    ClientError,
    EndpointError,
    StubServer,
    check_reply,
    judge,
)
from llmpapers.graph2eval.env import Obs, Script, Unreadable, WebEnv, play, regrade
from llmpapers.graph2eval.site import Injection, Site, fresh_state
from llmpapers.graph2eval.tasks import StateEquals, Task
from llmpapers.graph2eval.world import make_world

good = dict(kind="answer", target="", value="x")
text = json.dumps(good)
schema = dict(kind=str, target=str, value=str)


class Endpoint:
    "A server that sends what it is told: (status, headers, whole body) in turn, the last for ever"

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                "Say nothing"

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(asked)
                n = min(len(outer.bodies), len(outer.answers)) - 1
                found = outer.answers[n]
                status, head, data = found(asked) if callable(found) else found
                data = data if isinstance(data, str) else json.dumps(data)
                self.send_response(status)
                for k, v in head.items():
                    self.send_header(k, v)
                self.send_header("Content-Length", str(len(data.encode())))
                self.end_headers()
                self.wfile.write(data.encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def said(content=None, reason="stop", **more):
    "A completion"
    message = dict(role="assistant", content=content) | more
    return 200, {}, dict(choices=[dict(message=message, finish_reason=reason)])


def asks(*answers, **kw):
    "What a client makes of an endpoint: a reply, or the kind of its error and what it says"
    with Endpoint(*answers) as end:
        asking = ChatClient(end.url, "m", **(dict(retries=0, backoff=0.01) | kw))
        try:
            return asking.chat([dict(role="user", content="?")], schema), end.bodies
        except ClientError as e:
            return (type(e), str(e)), end.bodies


parts = [dict(type="thinking", thinking=[dict(type="text", text="hm")]), dict(type="text")]


@pytest.mark.parametrize(
    "answer",
    [
        said([dict(type="text", text=text)]),
        said([dict(type="text", text=text[:9]), dict(type="text", text=text[9:])]),
        said([*parts, None, "x", dict(type="text", text=text)]),
        said(f"```json\n{text}\n```"),
        said(f"```\n{text}```\nThat is all."),
        said(f'<think>Perhaps {{"kind": "click", "target": "a", "value": ""}}?</think>\n{text}'),
        said(f"The braces {{ and }} of thought\n</think>\n\n{text}"),
        said(f"{text}\n{text}"),
        said(f"I use {{curly}} words. {text} {{"),
        said(text, reason="eos_token"),
        said(text, reason=""),
        said(text, reason="tool_calls"),
        said(text, refusal=None, tool_calls=[], reasoning_content="hm"),
    ],
)
def test_a_good_reply_is_read_in_any_wrapping(answer):
    assert asks(answer)[0] == good


@pytest.mark.parametrize(
    "answer, why",
    [
        (said(None, "tool_calls", tool_calls=[dict(function=dict(name="f"))]), "tool"),
        ((200, {}, dict(choices=[dict(message=dict(role="assistant", tool_calls=[1]))])), "tool"),
        (said(None, refusal="I cannot help."), "refuses: I cannot"),
        (said("I cannot help.", "content_filter"), "content_filter"),
        (said(text[:20], "length"), "max_tokens"),
        (said(text, "length"), "length"),
        (said([dict(type="image_url", image_url="x")]), "empty"),
        (said(" \n"), "empty"),
        (said(dict(a=1)), "empty"),
        (said(f"<think>{text}"), ""),
        (said(f"{text} or {text.replace('x', 'y')}"), "differ"),
        (said('{"action": ' + text + " "), "no JSON"),
        (said("<think>" + text + "</think> I would answer."), "no JSON"),
        (said('{"a":' * 5000), "nested|no JSON"),
        (said("{" * 50000), "no JSON"),
        (said('{"kind": 1' + "0" * 6000 + "}"), "ValueError"),
    ],
)
def test_what_is_no_reply_is_the_model_s_failure_and_says_why(answer, why):
    started = time.monotonic()
    (kind, told), _ = asks(answer)
    assert kind is ClientError and any(w in told for w in why.split("|")), told
    assert time.monotonic() - started < 20


def test_thoughts_that_never_end_hold_no_reply():
    (kind, told), _ = asks(said(f"<think>I could say {text}"))
    assert kind is ClientError and "thoughts" in told


objects = st.dictionaries(st.sampled_from("abc"), st.integers(-3, 3) | st.text(max_size=6))
plain = st.text(st.characters(exclude_characters="{}<`", exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(objects, plain, plain, st.sampled_from(["", '<think>{x} {"a": 1}</think>', "```json\n"]))
def test_an_object_is_found_in_any_text(d, before, after, opening):
    wanted = dict(type="object")
    assert check_reply(opening + before + json.dumps(d) + after, wanted) == d


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from('{}[]":,a1 \\<>/think'), max_size=60))
def test_no_text_does_more_than_a_value_error(noise):
    try:
        assert isinstance(check_reply(noise, dict(type="object")), dict)
    except ValueError:
        pass


def test_busy_endpoints_are_waited_for_as_they_ask_and_not_for_hours():
    soon = 429, {"Retry-After": "1"}, dict(error=dict(message="slow down"))
    started = time.monotonic()
    assert asks(soon, said(text), retries=1)[0] == good
    assert 1 <= time.monotonic() - started < 30
    started = time.monotonic()
    for head in ("3600", "Fri, 31 Dec 2199 23:59:59 GMT"):
        (kind, told), bodies = asks((429, {"Retry-After": head}, "{}"), retries=3)
        assert kind is EndpointError and "asks to wait" in told and len(bodies) == 1
    for head in ("soon", "-1", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 40):
        (kind, told), bodies = asks((503, {"Retry-After": head}, "{}"), retries=1)
        assert kind is EndpointError and len(bodies) == 2
    assert time.monotonic() - started < 60


def test_what_a_model_needs_in_a_request_can_be_said():
    extra = dict(max_tokens=50, temperature=None, chat_template_kwargs=dict(enable_thinking=False))
    _, bodies = asks(said(text), extra=extra)
    assert bodies[0]["max_tokens"] == 50 and "temperature" not in bodies[0]
    with pytest.raises(ValueError, match="extra: messages"):
        ChatClient("http://127.0.0.1:1/v1", "m", extra=dict(messages=[]))
    with pytest.raises(TypeError, match="extra"):
        ChatClient("http://127.0.0.1:1/v1", "m", extra=[1])


def test_a_format_that_is_refused_is_dropped_and_a_picture_that_is_refused_is_no_zero(site):
    def text_only(asked):
        if asked.get("response_format", {}).get("type") == "json_schema":
            return 400, {}, dict(error=dict(message="unknown response_format"))
        if isinstance(asked["messages"][-1]["content"], list):
            return 400, {}, dict(error=dict(message="this model takes no image_url"))
        return said(text)

    assert asks(text_only)[0] == good
    with Endpoint(text_only) as end:
        agent = PixelAgent(ChatClient(end.url, "m", retries=0))
        with WebEnv(site, "direct") as place:
            place.picture = ""
            agent.begin(task)
            obs = place.reset(task)._replace(screen=Screen(b"png", (10, 10), (), ()))
            with pytest.raises(EndpointError, match="takes no image_url"):
                agent.act(obs)


# agents


@pytest.fixture(scope="module")
def site():
    with Site(make_world(4)) as s:
        yield s


task = Task("t", "web", "x", 1, "Do it.", "/", StateEquals(fresh_state()), (), (), "k")


@pytest.mark.parametrize("bad", ["prose", '{"kind": "fly", "target": "", "value": ""}', "empty"])
def test_a_model_that_cannot_be_read_is_never_rewarded_for_where_it_stands(site, bad):
    "The goal of this task is met at the start: whoever gives no answer still has not finished"
    with WebEnv(site, "direct") as place:
        assert play(place, task, Script([])).reward == 1
        with StubServer([bad]) as stub:
            agent = LLMWebAgent(ChatClient(stub.base_url, "m", retries=0), reflect=True)
            episode = play(place, task, agent)
        assert (episode.status, episode.reward, episode.answer) == ("finished", 0.0, None)
        assert "no action" in episode.reason
        assert [s["kind"] for s in episode.steps] == ["unreadable"]
        assert regrade(episode, task, site.world).agrees
    assert not site.sessions


def test_one_bad_reply_costs_one_step_and_does_nothing(site):
    with StubServer(["hm", text]) as stub, WebEnv(site, "direct") as place:
        episode = play(place, task, LLMWebAgent(ChatClient(stub.base_url, "m", retries=0)))
        assert "no action" in stub.asked[1][-1]["content"]
    assert [s["kind"] for s in episode.steps] == ["unreadable", "answer"] and episode.reward == 1


def test_a_result_before_any_episode_says_what_to_call(site):
    with WebEnv(site, "direct") as place, pytest.raises(ValueError, match="call reset"):
        place.result()


seen = Obs("", None, "", 0, Screen(b"", (1000, 800), ("a", "b"), ((0, 0, 1, 1),) * 2))
nobody = ChatClient("http://127.0.0.1:1/v1", "m")


@settings(deadline=None)
@given(st.sampled_from([None, 1.0, 1000.0]), st.floats(0, 1), st.floats(0, 1))
def test_points_in_parts_of_the_picture_lie_in_it(span, x, y):
    agent = PixelAgent(nobody, span=span)
    whole = dict(kind="click", value="", x=int(x * 999), y=int(y * 799))
    part = dict(kind="click", value="", x=x * (span or 0), y=y * (span or 0))
    point = agent.action_of(whole if span is None else part, seen).target
    at = [int(v) for v in point[1:].split(",")]
    assert abs(at[0] - x * 1000) <= 2 and abs(at[1] - y * 800) <= 2
    assert 0 <= at[0] < 1000 and 0 <= at[1] < 800


@pytest.mark.parametrize(
    "span, reply",
    [
        (None, dict(x=0.5, y=0.5)),
        (None, dict(x="3", y="4")),
        (None, dict(x=[3, 4], y=0)),
        (None, dict(x=1000, y=0)),
        (None, dict(x=-1, y=0)),
        (None, dict(x=1e400, y=0)),
        (1.0, dict(x=340, y=20)),
        (1000, dict(x=1001, y=20)),
    ],
)
def test_points_that_are_counted_otherwise_are_no_action(span, reply):
    said = json.dumps(dict(kind="click", value="") | reply)
    agent = PixelAgent(nobody, span=span)
    with pytest.raises(ValueError):
        agent.action_of(check_reply(said, agent.schema), seen)


def test_numbers_that_are_whole_but_written_with_a_point_are_taken():
    marked, pointed = LLMWebAgent(nobody, "som"), PixelAgent(nobody)
    reply = check_reply('{"kind": "click", "mark": 1.0, "value": ""}', marked.schema)
    assert marked.action_of(reply, seen).target == "b"
    reply = check_reply('{"kind": "click", "x": 3.0, "y": 4e1, "value": ""}', pointed.schema)
    assert pointed.action_of(reply, seen).target == "@3,40"


@pytest.mark.parametrize("bad", [0, -1, float("nan"), "1"])
def test_a_span_that_is_none_is_named(bad):
    with pytest.raises((ValueError, TypeError), match="span"):
        PixelAgent(nobody, span=bad)


def test_a_judge_reads_wrapped_scores_and_fails_closed():
    scores = json.dumps(dict(clarity=1, relevance=0.5, consistency=0.5))
    for reply, read in (
        (f"<think>{{}}</think>```json\n{scores}```", True),
        (scores * 2, True),
        (scores + scores.replace("1", "0"), False),
    ):
        with StubServer([reply]) as stub:
            assert judge(task, "x", ChatClient(stub.base_url, "m", retries=0)).read is read


# a crawl


def test_a_narrower_crawl_reaches_nothing_else_even_by_redirect_and_lets_go_afterwards():
    with Site(make_world(4)) as other:
        go = Injection("go", "/", f"<a href='{other.origin}/cart'>Over there</a>")
        with Site(make_world(4), injections=(go,)) as here:
            visitor = HttpBrowser(Policy((here.origin, other.origin)))
            wide = visitor.policy
            found = crawl(here.origin, visitor, policy=Policy((here.origin,), max_redirects=3))
            assert found.skipped["forbidden"] >= 1 and visitor.policy is wide
            assert not any(p.url.startswith(other.origin) for p in found.pages)
            pair = Policy((here.origin, other.origin))
            both = crawl(here.origin, visitor, CrawlLimits(max_pages=200), policy=pair)
            assert any(p.url.startswith(other.origin) for p in both.pages)


def test_each_origin_has_its_own_robots():
    with Site(make_world(4), robots="User-agent: *\nDisallow: /cart\n") as other:
        go = Injection("go", "/", f"<a href='{other.origin}/cart'>Over there</a>")
        with Site(make_world(4), injections=(go,)) as here:
            visitor = HttpBrowser(Policy((here.origin, other.origin)))
            found = crawl(here.origin, visitor, CrawlLimits(max_pages=300))
    urls = [p.url for p in found.pages]
    assert here.origin + "/cart" in urls and other.origin + "/cart" not in urls
    assert found.skipped["robots.txt"] >= 1


def test_a_redirect_out_of_a_narrower_crawl_is_not_followed():
    with Site(make_world(4)) as other:
        sent = []

        def send(method, url, headers, body):
            from llmpapers.graph2eval.browser import Reply

            sent.append(url)
            if url.endswith("/away"):
                return Reply(302, [("Location", other.origin + "/cart")], b"")
            page = b"<title>x</title><a href='/away'>Away</a>"
            return Reply(200, [("Content-Type", "text/html")], page)

        with Site(make_world(4)) as here:
            visitor = HttpBrowser(Policy((here.origin, other.origin)), send=send)
            found = crawl(here.origin, visitor, policy=Policy((here.origin,)))
    assert len(found.pages) == 1 and found.skipped["status 403"] == 1
    assert not any(url.startswith(other.origin) for url in sent)


# a real browser


@pytest.fixture(scope="module")
def chromium():
    with open_chromium(timeout=15) as c:
        yield c


def marked(fn):
    for mark in (pytest.mark.browser, pytest.mark.timeout(600)):
        fn = mark(fn)
    return fn


def run_in(place, script):
    "Let a script change the page behind the agent's back, and what it gives"
    return place.chromium.call(lambda: place.browser.tab.evaluate(script))


def episode_on(chromium, html, acts, script=""):
    "Actions on a start page with something added to it; the environment's steps and last page"
    with Site(make_world(4), injections=(Injection("x", "/", html),)) as s:
        policy = Policy((s.origin,), timeout=4.0)
        with WebEnv(s, "chromium", policy=policy, chromium=chromium) as place:
            obs = place.reset(task)
            if script:
                run_in(place, script)
            for a in acts:
                obs = place.step(a(place) if callable(a) else a)
            place.step(Action("answer"))
            done = place.result()
    assert done.status == "finished", done.reason
    return [x.get("error", "") for x in done.steps], done.path, obs


two = "<a href='/cart' id=gone>First</a> <a href='/settings'>Second</a>"
leave = "document.getElementById('gone').remove()"


@marked
def test_an_element_that_went_is_not_replaced_by_its_neighbour(chromium):
    acts = [Action("click", "link/First/0")]
    errors, path, obs = episode_on(chromium, two, acts, leave)
    assert "has gone" in errors[0] and path == "/"
    assert not any(w.name == "First" for w in obs.page.widgets)  # and the next look is fresh
    assert episode_on(chromium, two, [Action("click", "link/Second/0")], leave)[1] == "/settings"


@marked
def test_a_field_that_went_or_takes_no_such_text_is_an_error_of_the_action(chromium):
    html = (
        "<form action='/search'><label for=gone>Gone</label><input id=gone>"
        "<label for=z>Stays</label><input id=z>"
        "<label for=n>Number</label><input id=n type=number><label for=f>File</label>"
        "<input id=f type=file><label for=d>Dead</label><input id=d disabled><label for=s>Choice"
        "</label><select id=s disabled><option>a<option>b</select></form>"
    )
    acts = [
        Action("fill", "textbox/Gone/0", "a"),
        Action("fill", "textbox/Number/0", "two"),
        Action("fill", "textbox/File/0", "a"),
        Action("fill", "textbox/Dead/0", "a"),
        Action("select", "choice/Choice/0", "b"),
        Action("fill", "textbox/Number/0", "2"),
        Action("fill", "textbox/Stays/0", "a"),
    ]
    errors, path, obs = episode_on(chromium, html, acts, leave)
    assert all(errors[:5]) and errors[5:] == ["", "", ""], errors
    held = {w.name: w.value for w in obs.page.widgets}
    assert (held["Number"], held["Stays"], path) == ("2", "a", "/")


@marked
def test_what_is_covered_is_not_clicked_through_and_a_point_hits_the_cover(chromium):
    html = (
        "<a href='/cart' style='position:absolute;left:300px;top:300px'>Under</a>"
        "<a href='/settings' style='position:absolute;left:290px;top:290px;width:200px;"
        "height:60px;background:red'>Over</a>"
    )
    errors, path, _ = episode_on(chromium, html, [Action("click", "link/Under/0")])
    assert "covered" in errors[0] and path == "/"
    assert episode_on(chromium, html, [Action("click", "@310,305")])[1] == "/settings"


@marked
def test_a_point_hits_what_is_there_by_then(chromium):
    def point(place):
        shown = place.browser.screen()
        x, y, w, h = shown.boxes[shown.marks.index("link/First/0")]
        run_in(place, "document.getElementById('gone').href = '/wishes'")
        return Action("click", f"@{x + w // 2},{y + h // 2}")

    assert episode_on(chromium, two, [point])[1] == "/wishes"


@marked
def test_parts_of_scrolled_zoomed_and_framed_pages_are_hit_where_they_are_seen(chromium):
    def middle(name):
        def find(place):
            shown = place.browser.screen()
            x, y, w, h = shown.boxes[shown.marks.index(name)]
            return Action("click", f"@{x + w // 2},{y + h // 2}")

        return find

    zoomed = "<style>html{zoom:2}</style><p><a href='/settings'>Here</a></p>"
    assert episode_on(chromium, zoomed, [middle("link/Here/0")])[1] == "/settings"
    block = "<div style='width:200px;height:80px'>Here</div>"
    card = f"<div>A word <a href='/settings'>{block}</a></div>"
    assert episode_on(chromium, card, [middle("link/Here/0")])[1] == "/settings"
    assert episode_on(chromium, card, [Action("click", "link/Here/0")])[1] == "/settings"
    far = "<div style='height:900px'></div><a href='/settings'>Here</a><div style='height:2000px'>"
    acts = [Action("scroll"), middle("link/Here/0")]
    assert episode_on(chromium, far, acts)[1] == "/settings"
    assert episode_on(chromium, far, [Action("click", "link/Here/0")])[1] == "/settings"
    frame = "<iframe src='/cart' style='position:absolute;left:0;top:300px;width:700px'></iframe>"
    errors, path, _ = episode_on(chromium, frame, [Action("click", "@130,320")])
    assert (errors[0], path) == ("", "/")  # what is in a frame is no element of the page


@marked
def test_a_scroll_is_over_when_its_step_returns(chromium):
    tall = "<div style='height:2000px'></div>"
    with Site(make_world(4), injections=(Injection("x", "/", tall),)) as s:
        with WebEnv(s, "chromium", chromium=chromium) as place:
            place.reset(task)
            end = run_in(place, "document.scrollingElement.scrollHeight - innerHeight")
            seen = []
            for _ in range(7):
                place.step(Action("scroll"))
                seen.append(run_in(place, "scrollY"))
    assert seen == [min(600 * k, end) for k in range(1, 8)] and 1200 < end < 4200


@marked
def test_there_is_no_way_back_before_the_first_page(chromium):
    acts = [Action("back"), Action("click", "link/Cart/0"), Action("back")]
    errors, path, obs = episode_on(chromium, "<a href='#x'>Hash</a>", acts)
    assert "no page to go back" in errors[0] and errors[1:3] == ["", ""] and path == "/"
    acts = [Action("click", "link/Hash/0"), Action("back"), Action("click", "link/Cart/0")]
    assert episode_on(chromium, "<a href='#x'>Hash</a>", acts)[:2] == (["", "", "", ""], "/cart")


@marked
def test_a_page_that_holds_the_browser_costs_one_episode():
    if not find_chromium():
        pytest.skip("no Chromium on the path")
    loop = Injection("x", "/", "<button type=button onclick='for(;;);'>Loop</button>")
    with Chromium(timeout=4) as own, Site(make_world(4), injections=(loop,)) as s:
        with WebEnv(s, "chromium", chromium=own) as place:
            stuck = play(place, task, Script([Action("click", "button/Loop/0")]))
            assert (stuck.status, stuck.reward) == ("infrastructure", None)
            after = play(place, task, Script([Action("click", "link/Cart/0")]))
            assert (after.status, after.path) == ("finished", "/cart")
        assert not s.sessions


@marked
def test_a_picture_s_marks_that_went_cost_a_step(chromium):
    def model(messages):
        lines = messages[-1]["content"][0]["text"].split("\n")
        if any("has gone" in line for line in lines):
            return '{"kind": "answer", "mark": -1, "value": "x"}'
        run_in(place, leave)
        k = next(x for x in lines if "'First'" in x)[1:].partition("]")[0]
        return json.dumps(dict(kind="click", mark=int(k), value=""))

    with Site(make_world(4), injections=(Injection("x", "/", two),)) as s:
        with StubServer(model) as stub, WebEnv(s, "chromium", chromium=chromium) as place:
            agent = LLMWebAgent(ChatClient(stub.base_url, "m", retries=0), "som")
            episode = play(place, task, agent)
    assert [x["kind"] for x in episode.steps] == ["click", "answer"] and episode.path == "/"


def test_a_document_agent_takes_wrapped_replies_and_numbers_as_texts():
    class Shelf:
        def given(self, task):
            return []

    asked = Task("q", "document", "x", 1, "How many?", "", StateEquals({}), (), (), "k")
    with StubServer(['{"answer": 42}', '```json\n{"answer": "42"}\n```']) as stub:
        agent = LLMDocAgent(ChatClient(stub.base_url, "m", backoff=0.01), Shelf())
        assert agent.answer(asked) == "42" and "answer must be a str" in str(stub.asked[1])
    assert Unreadable("why").said == ""
