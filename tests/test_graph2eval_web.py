"The wire of the task generator: one request for one, time limits, forms, addresses, robots"

import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmpapers.graph2eval.browser import (
    Action,
    ActionError,
    HttpBrowser,
    Policy,
    Reply,
    crawl,
    fetch_once,
    parse_page,
)
from llmpapers.graph2eval.documents import load_html
from llmpapers.graph2eval.graph import build_web_graph
from llmpapers.graph2eval.site import Site, fresh_state, make_request, respond
from llmpapers.graph2eval.world import make_world


@pytest.fixture(scope="module")
def site():
    with Site(make_world(3)) as s:
        yield s


class Serving:
    "A server on loopback: path -> (status, headers, body); what was asked is kept"

    def __init__(self, pages, version="HTTP/1.1"):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = version

            def log_message(self, *_):
                pass

            def do_GET(self):
                n = int(self.headers.get("Content-Length") or 0)
                asked.append((self.command, self.path, self.rfile.read(n).decode()))
                status, head, body = pages.get(self.path.partition("?")[0], (404, {}, b""))
                self.send_response(status)
                for k, v in ({"Content-Type": "text/html"} | head).items():
                    self.send_header(k, v)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def browser(self, **kw):
        return HttpBrowser(Policy((self.origin,), **kw))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_one_request_on_the_wire_for_one_in_the_record(site):
    sid = site.new_session()
    browser = HttpBrowser(Policy((site.origin,)), dict(sid=sid))
    for path in ("/", "/cart", "/forum", "/cart"):
        browser.goto(site.origin + path)
    assert [r["path"] for r in site.requests(sid)] == ["/", "/cart", "/forum", "/cart"]
    assert len(browser.har.entries) == 4
    site.release(sid)
    before = len(site.sessions)
    crawl(site.origin, HttpBrowser(Policy((site.origin,))))
    assert len(site.sessions) == before + 1  # one visitor, not one for each doubled request


def test_connections_are_kept(site):
    policy, seen = Policy((site.origin,)), set()
    handler = site.server.process_request

    def count(request, address):
        seen.add(address)
        handler(request, address)

    site.server.process_request = count
    for path in ("/", "/forum", "/cart", "/"):
        assert fetch_once(policy, "GET", site.origin + path, []).status == 200
    assert len(seen) <= 1
    del site.server.process_request


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("head", [{}, {"Connection": "close"}])
def test_servers_that_hang_up_are_crawled(version, head):
    pages = {"/": (200, head, b"<a href=/a>A</a>"), "/a": (200, head, b"<title>A</title>")}
    with Serving(pages, version) as s:
        assert len(crawl(s.origin, s.browser()).pages) == 2
        assert [p for _, p, _ in s.asked] == ["/robots.txt", "/", "/a"]


def test_a_folder_served_by_the_standard_library(tmp_path):
    (tmp_path / "index.html").write_text("<a href=b.html>B</a>")
    (tmp_path / "b.html").write_text("<title>B</title>")

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_address[1]}"
        assert len(crawl(origin, HttpBrowser(Policy((origin,)))).pages) == 2
        server.shutdown()


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_server_that_drips_is_left(what):
    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            start = b"HTTP/1.1 200 OK\r\n" + (b"" if what == "headers" else b"\r\n")
            try:
                self.request.sendall(start)
                for k in range(40):
                    self.request.sendall(b"X-%d: 1\r\n" % k)
                    time.sleep(0.1)
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_address[1]}"
        start = time.monotonic()
        reply = fetch_once(Policy((origin,), timeout=0.3), "GET", origin + "/", [])
        assert reply.status == 504 and time.monotonic() - start < 3.5  # of 4 that it drips
        server.shutdown()


def test_a_closed_site_leaves_no_thread():
    before = threading.active_count()
    for _ in range(5):
        with Site(make_world(0)) as s:
            fetch_once(Policy((s.origin,)), "GET", s.origin + "/", [])
    end = time.monotonic() + 3
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("source", ["<b>" * 30000 + "</i>" * 30000, "<dt>" + "<i>x</i>" * 40000])
@pytest.mark.parametrize("prefix", ["", "<label for=a>" * 3000])
def test_reading_a_page_takes_time_in_line_with_its_length(source, prefix):
    def seconds(text):
        start = time.process_time()
        parse_page("http://x/", text)
        return time.process_time() - start

    whole, half = prefix + source, prefix + source[: len(source) // 4]
    assert seconds(whole) < 12 * seconds(half) + 0.5


@pytest.mark.parametrize("piece", ["<!--", "<a ", "<a b='", "<![CDATA[", "</", "<!", "<p hidden>"])
def test_what_never_ends_is_left_at_once(piece):
    start = time.process_time()
    page = parse_page("http://x/", "<a href=/a>A</a>" + piece * 20_000)
    load_html("<p>A</p>" + piece * 20_000, "d")
    assert time.process_time() - start < 3 and page.widgets[0].name == "A"


# ---- addresses -----------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["/a b", "/ü", "/order/²", "/c/indoor?page=²", "/x\ty", "/\x00"])
def test_what_an_agent_types_is_sent_as_an_address(site, target):
    page = HttpBrowser(Policy((site.origin,))).act(Action("goto", site.origin + target))
    assert page.status in (200, 404) and page.url.isascii() and " " not in page.url


@pytest.mark.parametrize("target", ["http://[", "http://a b/", "http://x/\ud800"])
def test_what_is_no_address_is_an_error_of_the_action(target):
    with pytest.raises(ActionError, match="no address"):
        HttpBrowser(Policy(("http://127.0.0.1:1",))).act(Action("goto", target))


def test_a_page_with_a_broken_link_is_read():
    page = parse_page("http://x/", "<a href='http://['>a</a><a href='/b c'>b</a>")
    assert [w.href for w in page.widgets] == ["", "http://x/b%20c"]


@pytest.mark.parametrize(
    "path", ["/c/indoor?page=%C2%B2", "/c/indoor?page=" + "1" * 5000, "/order/%C2%B2", "/order/9"]
)
def test_the_site_answers_odd_numbers(site, path):
    reply = fetch_once(Policy((site.origin,)), "GET", site.origin + path, [])
    assert reply.status in (200, 404) and not reply.note


def test_a_quantity_too_long_for_a_number_is_refused(site):
    key = site.world.products[0].id
    for n in ("1" * 5000, "²", "-1", "100"):
        ask = make_request("POST", "/cart/add", f"item={key}&quantity={n}")
        assert respond(site.world, fresh_state(), ask)[0].status == 400


def test_text_that_cannot_be_sent_is_an_error_of_the_action(site):
    browser = HttpBrowser(Policy((site.origin,)))
    browser.goto(site.origin + "/")
    with pytest.raises(ActionError, match="cannot be typed"):
        browser.act(Action("fill", "textbox/Search for/0", "\ud800"))


def test_an_action_is_text():
    with pytest.raises(TypeError, match="target"):
        Action("click", 5)


# ---- forms ---------------------------------------------------------------------------------------
odd_form = """<base href="/sub/"><a href=x>x</a><form action=send method=post>
<input type=hidden name=h value=1><label for=l>Language</label><select id=l name=lang>
<option value=en>English<option value=de selected>German</select>
<label for=c>Tick</label><input id=c type=checkbox name=c value=blue>
<label for=r1>one</label><input id=r1 type=radio name=r value=1>
<label for=r2>two</label><input id=r2 type=radio name=r value=2>
<input type=hidden name=h value=2><label for=t>City</label><input id=t name=city>
<input name=off value=1 disabled><button type=button>Cancel</button>
<button type=reset>Reset</button><button name=op value=delete>Delete</button>
<button name=op value=keep>Keep</button></form>"""
odd_steps = [
    Action("click", "checkbox/Tick"),
    Action("click", "checkbox/one"),
    Action("click", "checkbox/two"),
    Action("fill", "textbox/City", "a\nb é"),
]
odd_sent = "h=1&lang=de&c=blue&r=2&h=2&city=ab+%C3%A9&op="


def odd_server(charset="utf-8"):
    page = f"<meta charset={charset}>{odd_form}".encode(charset)
    return Serving({"/": (200, {}, page), "/sub/send": (200, {}, b"ok")})


@pytest.mark.parametrize(
    "last, value",
    [
        (Action("click", "button/Delete"), "delete"),
        (Action("click", "button/Keep"), "keep"),
        (Action("press", "textbox/City"), "delete"),
    ],
)
def test_a_form_sends_what_a_browser_sends(last, value):
    with odd_server() as s:
        browser = s.browser()
        page = browser.goto(s.origin + "/")
        assert page.widgets[0].href == s.origin + "/sub/x"
        for a in [*odd_steps, last]:
            browser.page = browser.act(a)
        assert s.asked[-1] == ("POST", "/sub/send", odd_sent + value)


locked_form = """<form action=/send><label for=a>Dead</label><input id=a name=a value=1 disabled>
<label for=b>Fixed</label><input id=b name=b value=2 readonly>
<fieldset disabled><label for=c>Inside</label><input id=c name=c value=3>
<input type=hidden name=h value=4><label for=d>Choice</label><select id=d name=d><option>x<option>y
</select><label for=e>Tick</label><input id=e type=checkbox name=e></fieldset>
<label for=f>Open</label><input id=f name=f value=5><button disabled>Dead end</button>
<button name=go value=6>Send</button></form>"""


def test_what_is_disabled_takes_nothing_and_sends_nothing():
    page = locked_form.encode()
    with Serving({"/": (200, {}, page), "/send": (200, {}, b"ok")}) as s:
        browser = s.browser()
        seen = browser.goto(s.origin + "/")
        locked = {w.name: w.locked for w in seen.widgets}
        assert locked == dict(Dead="disabled", Fixed="readonly", Inside="disabled", Open="") | {
            "Choice": "disabled", "Tick": "disabled", "Dead end": "disabled", "Send": ""
        }  # fmt: skip
        for a in [Action("fill", f"textbox/{x}", "9") for x in ("Dead", "Fixed", "Inside")]:
            with pytest.raises(ActionError, match="disabled|readonly"):
                browser.act(a)
        with pytest.raises(ActionError, match="disabled"):
            browser.act(Action("select", "choice/Choice", "y"))
        for a in [
            Action("click", "checkbox/Tick"),
            Action("click", "button/Dead end"),
            Action("press", "textbox/Dead"),
            Action("press", "textbox/Open"),  # its first button that sends is disabled
        ]:
            assert browser.act(a).url == s.origin + "/"
        assert len(s.asked) == 1
        browser.act(Action("fill", "textbox/Open", "7"))
        browser.act(Action("click", "button/Send"))
        assert s.asked[-1][1] == "/send?b=2&f=7&go=6"


def test_a_form_is_sent_in_the_letters_of_its_page():
    with odd_server("iso-8859-1") as s:
        browser = s.browser()
        browser.goto(s.origin + "/")
        for a in [Action("fill", "textbox/City", "é漢"), Action("click", "button/Keep")]:
            browser.page = browser.act(a)
        assert "city=%E9%26%2328450%3B&" in s.asked[-1][2]


def test_buttons_that_do_not_send():
    with odd_server() as s:
        browser = s.browser()
        browser.goto(s.origin + "/")
        for a in [*odd_steps, Action("click", "button/Cancel"), Action("click", "button/Reset")]:
            browser.page = browser.act(a)
        browser.act(Action("click", "button/Keep"))
        assert len(s.asked) == 2
        assert s.asked[-1][2] == "h=1&lang=de&h=2&city=&op=keep"


@pytest.mark.parametrize("odd", ["enctype=multipart/form-data", "><select name=m multiple"])
def test_what_http_cannot_send_is_said(odd):
    with Serving({"/": (200, {}, f"<form {odd}><button>Go</button></form>".encode())}) as s:
        browser = s.browser()
        browser.goto(s.origin + "/")
        with pytest.raises(ActionError, match="use chromium"):
            browser.act(Action("click", "button/Go"))


# ---- encodings, robots, redirects ----------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, body",
    [
        ("text/html; charset=iso-8859-1", "<title>Café</title>".encode("latin-1")),
        ("text/html", "<meta charset='iso-8859-1'><title>Café</title>".encode("latin-1")),
        ("application/xhtml+xml", "<title>Café</title>".encode()),
        ("text/html; charset=nonsense", "<title>Café</title>".encode()),
    ],
)
def test_the_encoding_of_a_page_is_heeded(kind, body):
    with Serving({"/": (200, {"Content-Type": kind}, body)}) as s:
        assert s.browser().goto(s.origin + "/").title == "Café"


secret_pages = {
    "/": (200, {}, b"<a href=/secret>s</a><a href=/open>o</a><a href=/gosec>g</a>"),
    "/secret": (200, {}, b"secret"),
    "/open": (200, {}, b"open"),
    "/gosec": (302, {"Location": "/secret"}, b""),
    "/r.txt": (200, {"Content-Type": "text/plain"}, b"User-agent: *\nDisallow: /secret\n"),
}


@pytest.mark.parametrize(
    "robots",
    [
        (301, {"Location": "/r.txt"}, b""),
        (200, {}, b"\xef\xbb\xbfUser-agent: *\nDisallow: /secret\n"),
        (200, {}, b"User-agent: *\nDisallow: /*ret\n"),
        (200, {}, b"User-agent: *\nDisallow: /secret$ # no\n\nUser-agent: b\nDisallow:\n"),
        (200, {}, b"User-agent: a\nUser-agent: llmpapers\nAllow: /s\nDisallow: /secret\n"),
    ],
)
def test_robots_in_any_dress(robots):
    with Serving(secret_pages | {"/robots.txt": robots}) as s:
        found = crawl(s.origin, s.browser())
        assert [p.path for p in found.pages] == ["/", "/open"]
        assert found.skipped["robots.txt"] == 2


def test_a_page_behind_a_redirect_is_there_once():
    pages = {
        "/": (200, {}, b"<a href=/p>p</a><a href=/go>g</a>"),
        "/p": (200, {}, b"<title>P</title><dl><dt>Size<dd>3</dl>"),
        "/go": (302, {"Location": "/p"}, b""),
    }
    with Serving(pages) as s:
        found = crawl(s.origin, s.browser())
        assert [p.path for p in found.pages] == ["/", "/p"]
        assert len(build_web_graph(found.pages).edges("Shows")) == 1


def test_a_second_snapshot_of_a_page_changes_nothing():
    one = parse_page("http://x/", "<title>A</title>")
    two = parse_page("http://x/", "<title>A</title><dl><dt>Size<dd>3</dl>")
    assert build_web_graph([one, two]).to_dict() == build_web_graph([one]).to_dict()


# ---- the site ------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["::1", "127.0.0.2"])
def test_every_address_of_loopback(host):
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with Site(make_world(0), host=host) as s:
        assert HttpBrowser(Policy((s.origin,))).goto(s.origin + "/").status == 200


def test_bad_sites_and_states_are_named(site):
    with pytest.raises(ValueError, match="delay"):
        Site(make_world(0), delay="x")
    with pytest.raises(ValueError, match="no product 'nope'"):
        site.restore(site.new_session(), fresh_state() | dict(cart=dict(nope=1)))


def test_two_worlds_side_by_side():
    from llmpapers.graph2eval import site as module

    worlds = [make_world(0), make_world(1)]
    first = [module._index(w) for w in worlds]
    assert [module._index(w) for w in worlds] == first


def test_a_reply_that_leads_nowhere_is_a_page():
    def send(method, url, headers, body):
        return Reply(302, [("Location", "http://[")], b"")

    browser = HttpBrowser(Policy(("http://127.0.0.1:1",)), send=send)
    assert browser.goto("http://127.0.0.1:1/").status == 508
