"What pages of the field do to a browser and its fence; both browsers give the same account"

import http.client
import queue
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import open_chromium
from llmpapers.graph2eval import browser as module
from llmpapers.graph2eval.browser import (
    Action,
    ActionError,
    Chromium,
    Gate,
    HttpBrowser,
    Policy,
    _connection,
    _rules,
    crawl,
    fetch_once,
    parse_page,
)
from llmpapers.graph2eval.env import Script, WebEnv, play
from llmpapers.graph2eval.site import Injection, Site
from llmpapers.graph2eval.tasks import Task, UrlIs
from llmpapers.graph2eval.world import make_world

html = {"Content-Type": "text/html; charset=utf-8"}
page = "<!doctype html><title>{}</title>{}"


class Server:
    "path -> HTML, or (status, headers, text), or a function of the body; what came is kept"

    def __init__(self, pages, host="127.0.0.1", family=socket.AF_INET):
        outer, self.asked, self.pages = self, [], pages

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                "Say nothing"

            def answer(self):
                n = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(n).decode()
                outer.asked.append((self.command, self.path, body))
                found = outer.pages.get(self.path.partition("?")[0], (404, html, "no"))
                found = found(body) if callable(found) else found
                status, head, text = (200, html, found) if isinstance(found, str) else found
                data = text.encode()
                self.send_response(status)
                for k, v in head.items():
                    self.send_header(k, v)
                if status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data if status != 204 else b"")

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        kind = type("Own", (ThreadingHTTPServer,), dict(address_family=family))
        self.server = kind((host, 0), Handler)
        self.server.daemon_threads = True
        shown = f"[{host}]" if ":" in host else host
        self.origin = f"http://{shown}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self, method):
        return [p for m, p, _ in self.asked if m == method and p != "/favicon.ico"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def chromium():
    with open_chromium(timeout=30) as c:
        yield c


def marked(fn):
    for mark in (pytest.mark.browser, pytest.mark.timeout(600)):
        fn = mark(fn)
    return fn


@pytest.fixture(params=["http", "chromium"])
def opened(request):
    "A function of an origin: a browser for it"
    made = []

    def make(origin, **kw):
        policy = Policy((origin,), **(dict(timeout=6.0) | kw))
        if request.param == "http":
            made.append(HttpBrowser(policy))
        else:
            made.append(request.getfixturevalue("chromium").new(policy))
        return made[-1]

    yield make
    for b in made:
        b.close()


# what leaves, and how often


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST"])
def test_what_changes_something_is_sent_once(method):
    came = []

    def serve(listener):
        for _ in range(3):
            link, _ = listener.accept()
            for answered in (True, False):  # a connection that is kept, and dies at the second word
                data = link.recv(65536)
                came.append(data.split(b" ")[0].decode())
                if answered and data:
                    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                else:
                    break
            link.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        policy = Policy((origin,), timeout=3)
        assert fetch_once(policy, "GET", origin + "/", []).status == 200
        assert fetch_once(policy, method, origin + "/x", [], b"x=1").status in (200, 502)
        assert fetch_once(policy, "GET", origin + "/", []).status == 200
    assert came.count(method) == 1


def test_a_body_that_is_too_large_is_not_sent_in_parts():
    with Server({"/x": "ok"}) as server:
        gate = Gate(Policy((server.origin,), max_bytes=1000))
        link = http.client.HTTPConnection("127.0.0.1", gate.server.server_address[1], timeout=10)
        tail = b"PUT " + server.origin.encode() + b"/x HTTP/1.1\r\nHost: x\r\n\r\n"
        link.request("POST", server.origin + "/x", b"a" * 1000 + tail)
        answer = link.getresponse()
        assert answer.status == 403 and b"max_bytes" in answer.read()
        link.close()
        other = http.client.HTTPConnection("127.0.0.1", gate.server.server_address[1], timeout=10)
        other.request("POST", server.origin + "/x", b"a" * 1000)
        assert other.getresponse().status == 200
        other.close()
        gate.close()
        assert [m for m, _, _ in server.asked] == ["POST"]
        assert len(gate.har.blocked()) == len(gate.har.writes()) == 1


def test_a_form_whose_answer_never_came_was_sent():
    with Server({"/": lambda body: time.sleep(2) or "late"}) as server:
        browser = HttpBrowser(Policy((server.origin,), timeout=0.3))
        assert browser._load("POST", server.origin + "/", "x=1").status == 504
        browser.goto("http://127.0.0.9:1/")
    assert [e["request"]["method"] for e in browser.har.writes()] == ["POST"]
    assert browser.har.blocked() == ["http://127.0.0.9:1/"]


def test_many_open_files_are_no_trouble():
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1400:
        pytest.skip("fewer than 1400 files may be open here")
    with Server({"/": "ok"}) as server:
        held = [open("/dev/null") for _ in range(1100)]
        try:
            policy = Policy((server.origin,))
            assert [fetch_once(policy, "GET", server.origin, []).status for _ in "ab"] == [200] * 2
            link, used = _connection(server.origin, 5, False)
            assert used and link.sock.fileno() > 1023
        finally:
            for f in held:
                f.close()


def test_a_record_has_what_its_form_asks_for():
    with Server({"/": "ok"}) as server:
        browser = HttpBrowser(Policy((server.origin,)))
        browser.goto(server.origin + "/")
    (entry,) = browser.har.to_dict()["log"]["entries"]
    assert {"startedDateTime", "time", "request", "response", "cache", "timings"} <= {*entry}
    both = {"httpVersion", "cookies", "headers", "headersSize", "bodySize"}
    assert both | {"method", "url", "queryString"} <= {*entry["request"]}
    assert both | {"status", "statusText", "content", "redirectURL"} <= {*entry["response"]}
    assert {"send", "wait", "receive"} <= {*entry["timings"]}


# robots.txt


def allows(text, path, agent="llmpapers"):
    return next((yes for _, yes, fits in _rules(text, agent) if fits(path)), True)


@pytest.mark.parametrize(
    "pattern, path, fits",
    [
        ("/a*b", "/axxb", True),
        ("/a*b", "/axxbc", True),
        ("/a*b$", "/axxbc", False),
        ("/a*b$", "/abab", True),
        ("/*.php", "/x/y.php?z", True),
        ("/*.php$", "/x/y.php?z", False),
        ("/ab*ab$", "/ab", False),
        ("/$", "/", True),
        ("/$", "/a", False),
        ("*", "/a", True),
        ("/a*", "/a", True),
        ("/caf%C3%A9", "/caf%C3%A9", True),
    ],
)
def test_patterns_of_robots(pattern, path, fits):
    assert allows(f"User-agent: *\nDisallow: {pattern}\n", path) is not fits


def test_many_stars_are_read_at_once_and_groups_by_their_whole_name():
    text = "User-agent: *\nDisallow: /" + "*a" * 40 + "*b\n"
    assert allows(text, "/" + "a" * 4000)
    groups = "User-agent: llm\nDisallow: /\n\nUser-agent: *\nDisallow: /private\n"
    assert (
        allows(groups, "/x") and not allows(groups, "/private") and not allows(groups, "/x", "LLM")
    )
    assert not allows(groups, "/x", "llm/2.0")


def test_a_site_of_the_longer_addresses_is_crawled():
    try:
        server = Server(
            {"/": page.format("A", "<a href=/b>B</a>"), "/b": "b"}, "::1", socket.AF_INET6
        )
    except OSError as e:
        pytest.skip(f"no IPv6 on loopback: {e}")
    with server:
        found = crawl(server.origin, HttpBrowser(Policy((server.origin,))))
    assert len(found.pages) == 2


# the same account in both browsers


@marked
@pytest.mark.parametrize("what", ["file", "nothing"])
def test_an_answer_that_is_no_page_is_an_error_of_the_action(opened, what):
    head = html | {"Content-Disposition": "attachment; filename=x.html"}
    away = (200, head, "x") if what == "file" else (204, {}, "")
    body = "<a href=/x>Get</a><form action=/x method=post><button>Send</button></form>"
    with Server({"/": page.format("A", body), "/x": away}) as server:
        tab = opened(server.origin)
        tab.goto(server.origin + "/")
        for target in ("link/Get/0", "button/Send/0"):
            with pytest.raises(ActionError, match="leads to no page"):
                tab.act(Action("click", target))
            seen = tab.snapshot()
            assert (seen.path, seen.status, seen.title) == ("/", 200, "A")
        assert (server.paths("GET"), server.paths("POST")) == (["/", "/x"], ["/x"])


forms = {
    "disabled": "<button disabled>Send</button>",
    "required": "<input name=a required><button>Send</button>",
    "radio": "<input type=radio name=r value=1 required><button>Send</button>",
    "choice": "<select name=s required><option value=''>-<option>b</select><button>Send</button>",
}


@marked
@pytest.mark.parametrize("form", forms)
def test_what_a_browser_does_not_send_stays(opened, form):
    with Server(
        {"/": page.format("A", f"<form action=/x>{forms[form]}</form>"), "/x": "x"}
    ) as server:
        tab = opened(server.origin, timeout=60.0)
        tab.goto(server.origin + "/")
        start = time.monotonic()
        assert tab.act(Action("click", "button/Send/0")).path == "/"
        assert time.monotonic() - start < 30  # the time limit of a page is not waited for
        assert server.paths("GET") == ["/"] and tab.events == [
            dict(kind="stayed", what="button/Send/0")
        ]
        if form == "required":
            tab.act(Action("fill", "textbox/a/0", "1"))
        elif form == "radio":
            tab.act(Action("click", "checkbox/r/0"))
        if form in ("required", "radio"):
            assert tab.act(Action("click", "button/Send/0")).path.startswith("/x?")


@marked
def test_fields_are_sent_as_they_stand(opened):
    body = (
        "<form action=/x method=post><input name=z value=0 type=hidden><input name=b value=0 "
        "type=hidden><input name=trap value=1 style='display:none'><textarea name=n>one\ntwo"
        "</textarea><select name=s><option value=1>One<option value=2 selected>Two</select>"
        "<select name=t style='display:none'><option value=7>x</select><button>Send</button></form>"
    )
    with Server({"/": page.format("A", body), "/x": "x"}) as server:
        tab = opened(server.origin)
        seen = {w.id: w.value for w in tab.goto(server.origin + "/").widgets}
        assert seen["choice/s/0"] == "Two" and seen["textbox/n/0"] == "one\ntwo"
        tab.act(Action("click", "button/Send/0"))
        (sent,) = (b for m, _, b in server.asked if m == "POST")
    assert sent == "z=0&b=0&trap=1&n=one%0D%0Atwo&s=2&t=7"


@marked
def test_a_place_on_the_page_asks_for_nothing_and_a_new_window_is_this_one(opened):
    body = "<a href=#low>Low</a><a href=/x target=_blank>Far</a><form><input name=q></form>"
    box = "<form action='javascript:void(0)'><input type=checkbox name=c></form>"
    with Server({"/": page.format("A", body + box), "/x": page.format("X", "x")}) as server:
        tab = opened(server.origin)
        tab.goto(server.origin + "/")
        tab.act(Action("fill", "textbox/q/0", "typed"))
        for move in (
            Action("click", "link/Low/0"),
            Action("back"),
            Action("click", "checkbox/c/0"),
        ):
            held = {w.id: w.value for w in tab.act(move).widgets}
            assert held["textbox/q/0"] == "typed" and server.paths("GET") == ["/"]
        assert held["checkbox/c/0"] == "on"
        assert tab.act(Action("click", "link/Far/0")).title == "X"
        assert tab.act(Action("back")).title == "A"


@marked
@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_text_is_no_page_with_links(opened, kind):
    text = '{"a": "<a href=/b>B</a>"}'
    with Server({"/": (200, {"Content-Type": kind}, text)}) as server:
        seen = opened(server.origin).goto(server.origin + "/")
    assert not [w for w in seen.widgets if w.role == "link"] and text in seen.text


@marked
def test_marks_of_ours_mean_nothing_on_a_page_of_others(opened):
    body = (
        "<a href=/x data-hidden=false>Seen</a><form><select name=s data-value=zzz>"
        "<option>S<option>M</select><button>Send</button></form><p data-hidden>Read me"
    )
    with Server({"/": page.format("A", body)}) as server:
        tab = opened(server.origin)
        seen = tab.goto(server.origin + "/")
        assert [w.id for w in seen.widgets] == ["link/Seen/0", "choice/s/0", "button/Send/0"]
        assert seen.widgets[1].value == "S" and "Read me" in seen.text
        assert tab.act(Action("click", "button/Send/0")).path == "/?s=S"


@marked
@pytest.mark.parametrize("end", ["file", "nothing", "csv", "zip"])
def test_a_redirect_to_no_page_leaves_the_page_as_it_was(opened, end):
    kinds = dict(csv="text/csv", zip="application/zip")
    ends = dict(
        file=(200, html | {"Content-Disposition": "attachment"}, "x"), nothing=(204, {}, "")
    )
    last = ends.get(end) or (200, {"Content-Type": kinds[end]}, "a,b")
    pages = {"/": page.format("A", "<a href=/to>Get</a>"), "/x": last}
    with Server(pages | {"/to": (302, {"Location": "/x"}, "")}) as server:
        tab = opened(server.origin, timeout=60.0)
        tab.goto(server.origin + "/")
        start = time.monotonic()
        with pytest.raises(ActionError, match="leads to no page"):
            tab.act(Action("click", "link/Get/0"))
        assert time.monotonic() - start < 30
        seen = tab.snapshot()
        assert (seen.path, seen.status, seen.title) == ("/", 200, "A")


@marked
@pytest.mark.parametrize("to", [303, 200])
def test_back_over_forms_that_were_sent(opened, to):
    form = "<form action=/cart method=post><button>Send</button></form><a href=/next>Next</a>"
    shown = (200, html | {"Cache-Control": "no-store"}, page.format("Cart", form))

    def answer(_):
        return (
            (303, {"Location": "/cart"}, "")
            if to == 303 and server.asked[-1][0] == "POST"
            else shown
        )

    with Server(
        {"/": page.format("A", "a"), "/cart": answer, "/next": page.format("N", "n")}
    ) as server:
        tab = opened(server.origin)
        tab.goto(server.origin + "/")
        tab.goto(server.origin + "/cart")
        tab.act(Action("click", "button/Send/0"))
        assert tab.act(Action("back")).path == "/cart"
        tab.act(Action("click", "button/Send/0"))
        tab.act(Action("click", "link/Next/0"))
        seen = tab.act(Action("back"))  # the answer to a form that is gone is not asked for again
        gone = to == 200 and tab.name == "chromium"
        assert (seen.path, seen.status) == ("/cart", 504 if gone else 200)
        assert len(server.paths("POST")) == 2


@marked
def test_what_stands_in_a_template_or_a_frame_is_no_element(opened):
    body = (
        "<template><a href=/c>T</a></template><iframe><a href=/c>F</a></iframe>"
        "<a href=/b>R</a><a href=/cart>S</a>"
    )
    with Server({"/": page.format("A", body), "/b": page.format("B", "")}) as server:
        tab = opened(server.origin)
        seen = tab.goto(server.origin + "/")
        assert [w.id for w in seen.widgets] == ["link/R/0", "link/S/0"]
        assert tab.act(Action("click", "link/R/0")).title == "B"


@marked
def test_forms_of_new_windows_and_forms_that_are_not_checked(opened):
    body = (
        "<form action=/b target=_blank><button>New</button></form>"
        "<form action=/b novalidate><input name=q required><button>Go</button></form>"
        "<form action=/b><input name=r required><button formnovalidate>Skip</button></form>"
    )
    with Server({"/": page.format("A", body), "/b": page.format("B", "")}) as server:
        tab = opened(server.origin)
        for name in ("New", "Go", "Skip"):
            tab.goto(server.origin + "/")
            assert tab.act(Action("click", f"button/{name}/0")).title == "B"
        assert [e["kind"] for e in tab.events] == []


@marked
def test_what_is_hidden_in_what_is_shown_is_not_read(opened):
    body = (
        "<dl><dt>A<dd>5<span hidden>SECRET</span></dl><a href=/x>Go<span hidden>SECRET</span></a>"
        "<form action=/b><select name=s><option>a<option selected>&nbsp;Child</select>"
        "<select name=t hidden></select><select name=m multiple hidden><option value=1>x</select>"
        "<button>Send</button></form>"
    )
    with Server({"/": page.format("A", body), "/b": page.format("B", "")}) as server:
        tab = opened(server.origin)
        seen = tab.goto(server.origin + "/")
        assert seen.facts == (("A", "5"),) and "SECRET" not in seen.text
        assert [w.id for w in seen.widgets] == ["link/Go/0", "choice/s/0", "button/Send/0"]
        assert seen.widgets[1].value == "Child"
        assert "t=" not in tab.act(Action("click", "button/Send/0")).path


def task_at(path):
    return Task("t", "web", "x", 1, "Be there.", "/", UrlIs(path), (), (), "k")


@marked
@pytest.mark.parametrize("backend", ["http", "chromium", "picture"])
def test_a_refused_address_leaves_nobody_where_he_was(chromium, backend):
    refused = Action("goto", "http://127.0.0.9:1/x")
    picture = "plain" if backend == "picture" else ""
    kind = "http" if backend == "http" else "chromium"
    with Site(make_world(4)) as s, WebEnv(s, kind, chromium=chromium, picture=picture) as place:
        there = Action("goto", "/cart")
        assert play(place, task_at("/cart"), Script([there])).reward == 1
        done = play(place, task_at("/cart"), Script([there, refused]))
        assert done.reward == 0 and done.path.startswith("status 403")
        again = [there, refused, refused, Action("back")]
        if backend == "http":  # it goes back to the address, which is refused again
            again.append(Action("back"))
        assert play(place, task_at("/cart"), Script(again)).reward == 1
        on = [there, refused, Action("goto", "/"), Action("back")]
        if backend == "http":
            on.append(Action("back"))
        assert play(place, task_at("/cart"), Script(on)).reward == 1


# Chromium alone

rtc = """<script>const c = new RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:PORT'}]});
c.createDataChannel('x'); c.createOffer().then((o) => c.setLocalDescription(o));</script>"""
framed = """<iframe></iframe><script>const w = document.querySelector('iframe').contentWindow;
const c = new w.RTCPeerConnection({iceServers: [{urls: 'stun:127.0.0.1:PORT'}]});
c.createDataChannel('x'); c.createOffer().then((o) => c.setLocalDescription(o));</script>"""


@marked
def test_no_packet_passes_the_fence(chromium, monkeypatch):
    def heard(body):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
            ear.bind(("127.0.0.1", 0))
            ear.settimeout(0.2)
            body = body.replace("PORT", str(ear.getsockname()[1]))
            with Server({"/": page.format("A", body)}) as server:
                tab = chromium.new(Policy((server.origin,)))
                assert tab.goto(server.origin + "/").title == "A"
                found = b""
                for _ in range(15):
                    tab.snapshot()
                    try:
                        found = ear.recv(2000)
                        break
                    except TimeoutError:
                        continue
                tab.close()
        return found

    assert heard(rtc) == heard(framed) == b""
    monkeypatch.setattr(module, "_no_udp", "0")
    assert heard(rtc)  # and the page does what it is feared for where nothing is taken from it


@marked
@pytest.mark.parametrize("ms", [0, 30, 60, 100])
def test_what_a_script_asked_for_is_there_when_the_step_returns(chromium, ms):
    body = """<button type=button onclick="fetch('/data').then((r) => r.text()).then((t) => {
      this.after(t) })">More</button>"""
    data = (200, {"Content-Type": "text/plain", "Cache-Control": "no-store"}, "one more")
    with Server({"/": page.format("A", body)}) as server:
        server.pages["/data"] = lambda _: time.sleep(ms / 1000) or data
        tab = chromium.new(Policy((server.origin,)))
        tab.goto(server.origin + "/")
        for k in range(1, 7):
            assert tab.act(Action("click", "button/More/0")).text.count("one more") == k
        tab.close()


unread = {
    "fetch": "<script>fetch('/data')</script>",
    "keepalive": "<script>fetch('/data', {method: 'POST', keepalive: true})</script>",
    "worker": """<script>const w = new Worker(URL.createObjectURL(new Blob(["fetch('/x')"])));
      setTimeout(() => w.terminate(), 20)</script>""",
    "shared": "<script>new SharedWorker('/data')</script>",
}


@marked
@pytest.mark.parametrize("what", unread)
def test_what_no_script_reads_is_not_waited_for(chromium, what):
    with Server({"/": page.format("A", unread[what]), "/data": "x"}) as server:
        tab = chromium.new(Policy((server.origin,), timeout=60.0))
        start = time.monotonic()
        assert tab.goto(server.origin + "/").title == "A"
        assert time.monotonic() - start < 30
        tab.close()


@marked
def test_a_page_that_was_left_is_not_shown_as_the_next_one(chromium):
    body = """<script>let k = 0; const ask = () => fetch('/data').then(() => ++k < 3 ? ask()
      : location = '/late'); ask()</script>"""
    pages = {"/": page.format("FIRST", body), "/data": "x"}
    pages["/late"] = page.format("LATE", "<img src=/hang>")
    with Server(pages | {"/hang": lambda _: time.sleep(4) or "x"}) as server:
        tab = chromium.new(Policy((server.origin,), timeout=2.0))
        seen = tab.goto(server.origin + "/")
        assert (seen.title, seen.path) in (("FIRST", "/"), ("LATE", "/late"))
        tab.close()


@marked
@pytest.mark.parametrize(
    "name",
    [
        "matches",
        "checkVisibility",
        "getClientRects",
        "querySelectorAll",
        "childNodes",
        "setAttribute",
    ],
)
def test_fields_may_be_called_like_functions(chromium, name):
    body = (
        f"<form action=/b><input name={name}><button>Send</button></form><img name=implementation>"
    )
    with Server({"/": page.format("A", body), "/b": page.format("B", "")}) as server:
        tab = chromium.new(Policy((server.origin,)))
        assert len(tab.goto(server.origin + "/").widgets) == 2
        tab.act(Action("fill", f"textbox/{name}/0", "1"))
        assert tab.act(Action("click", "button/Send/0")).path == f"/b?{name}=1"
        tab.close()


@marked
def test_who_waits_does_not_wait_for_ever_for_one_whose_caller_is_gone(chromium):
    own = Chromium(timeout=3)
    tab = own.new(Policy(("http://127.0.0.1:9",)))
    own.jobs.put(module._Job(lambda: tab.tab.evaluate("() => { for (;;); }"), queue.SimpleQueue()))
    start = time.monotonic()
    tab.close()
    own.new(Policy(("http://127.0.0.1:9",))).close()
    assert time.monotonic() - start < 60
    own.close()


@marked
def test_a_look_changes_nothing(chromium):
    body = """<script>window.made = 0; customElements.define('x-y', class extends HTMLElement {
      constructor() { super(); window.made++; } })</script><x-y></x-y><img src=/pix>"""
    pix = (200, {"Content-Type": "image/gif", "Cache-Control": "no-store"}, "")
    with Server({"/": page.format("A", body), "/pix": pix}) as server:
        tab = chromium.new(Policy((server.origin,)))
        tab.goto(server.origin + "/")
        for _ in range(5):
            tab.snapshot()
        assert chromium.call(lambda: tab.tab.evaluate("window.made")) == 1
        assert server.paths("GET") == ["/", "/pix"]
        tab.close()


@marked
def test_what_style_sheets_hide_is_not_read(chromium):
    body = """<style>.h{display:none} .v{visibility:hidden} .c{display:contents}</style>
      <p class=h>SECRET <dl class=h><dt>Code<dd>SECRET</dl><div class=v>SECRET
      <span style='visibility:visible'>Shown</span></div><div class=v>SECRET</div>
      <div class=c><a href=/x>Kept</a></div><details><summary>More</summary>SECRET</details>"""
    with Server({"/": page.format("A", body)}) as server:
        tab = chromium.new(Policy((server.origin,)))
        seen = tab.goto(server.origin + "/")
        tab.close()
    assert [w.id for w in seen.widgets] == ["link/Kept/0"] and seen.facts == ()
    assert "Shown" in seen.text and "More" in seen.text and "SECRET" not in seen.text


@marked
@pytest.mark.parametrize(
    "script",
    [
        "document.querySelectorAll = () => []",
        "Element.prototype.scrollIntoView = null",
        "document.elementFromPoint = undefined",
        "document.querySelectorAll = null",
        "getComputedStyle = undefined",
        "document.documentElement.remove()",
        "setTimeout = null; fetch('/cart')",
    ],
)
@pytest.mark.parametrize("picture", ["", "marks"])
def test_a_page_that_replaces_functions_costs_a_step(chromium, script, picture):
    bad = Injection("x", "/settings", f"<script>{script}</script>")
    acts = [Action("click", "link/Settings/0"), Action("click", "link/Cart/0")]
    with Site(make_world(4), injections=(bad,)) as s:
        with WebEnv(s, "chromium", chromium=chromium, picture=picture) as place:
            done = play(place, task_at("/cart"), Script([*acts, Action("goto", "/cart")]))
    assert (done.status, done.reward) == ("finished", 1)


@marked
def test_scripts_that_take_a_click_are_not_waited_for(chromium):
    body = "<a href=/x onclick='event.preventDefault(); this.after(\" taken\")'>Go</a>"
    with Server({"/": page.format("A", body), "/x": "x"}) as server:
        tab = chromium.new(Policy((server.origin,), timeout=60.0))
        tab.goto(server.origin + "/")
        start = time.monotonic()
        assert "taken" in tab.act(Action("click", "link/Go/0")).text
        assert time.monotonic() - start < 30 and tab.events[-1]["kind"] == "stayed"
        tab.close()


@marked
def test_a_page_that_never_rests_costs_no_episode(chromium):
    again = "<script>setTimeout(() => location.reload(), 0)</script>"
    pages = {"/": page.format("A", "<a href=/again>Again</a>"), "/again": page.format("R", again)}
    with Server(pages) as server:
        tab = chromium.new(Policy((server.origin,), timeout=2.0))
        tab.goto(server.origin + "/")
        assert tab.act(Action("click", "link/Again/0")).status in (200, 504)
        assert tab.goto(server.origin + "/").title == "A"
        tab.close()


@marked
def test_cookies_of_an_episode_are_not_shown_to_scripts(chromium):
    body = "<p id=p></p><script>p.textContent = 'jar:' + document.cookie</script>"
    with Server({"/": page.format("A", body)}) as server:
        tab = chromium.new(Policy((server.origin,)), dict(sid="S"))
        assert tab.goto(server.origin + "/").text.endswith("jar:")
        tab.close()


@marked
def test_a_program_that_is_no_browser_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(Exception, match="(?i)closed|launch|failed|exit"):
        Chromium("/bin/false", timeout=30)
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before


@marked
def test_a_browser_that_was_closed_says_so_and_turns_are_not_counted(chromium):
    own = Chromium(timeout=4)
    took, done = [], []

    def slow():
        time.sleep(1.5)
        done.append(1)

    jobs = [threading.Thread(target=lambda: took.append(own.call(slow))) for _ in range(4)]
    for j in jobs:
        j.start()
    for j in jobs:
        j.join()
    assert len(took) == len(done) == 4  # six seconds, and none of them longer than four
    tab = own.new(Policy(("http://127.0.0.1:9",)))
    own.close()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="closed"):
        own.call(lambda: None)
    tab.close()
    assert time.monotonic() - start < 3


def test_names_are_what_a_person_calls_things():
    seen = parse_page(
        "http://h/",
        "<label>Email <input name=e></label><label for=k>Key</label><input id=k name=f>"
        "<label>Colour <select name=s><option>Red<option>Blue</select></label>"
        "<a href=/a aria-label='Open menu'>=</a><a href=/b><img alt=Basket></a>"
        "<button><img alt=Search></button><label>Terms <a href=/t>of use</a></label>",
    )
    assert [w.id for w in seen.widgets] == [
        "textbox/Email/0",
        "textbox/Key/0",
        "choice/Colour/0",
        "link/Open menu/0",
        "link/Basket/0",
        "button/Search/0",
        "link/of use/0",
    ]
