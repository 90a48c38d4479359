"Odd pages, odd files and odd agents: what they type, write and claim decides nothing it should not"

import socket
import threading
import time
from dataclasses import asdict, replace

import pytest

from llmpapers.graph2eval.agents import OracleAgent
from llmpapers.graph2eval.browser import (
    Action,
    HttpBrowser,
    Policy,
    crawl,
    direct,
    fetch_once,
    parse_page,
)
from llmpapers.graph2eval.client import ChatClient, EndpointError, judge
from llmpapers.graph2eval.documents import clean_text, load_html, load_pdf, write_blocks
from llmpapers.graph2eval.env import Script, WebEnv, play, regrade
from llmpapers.graph2eval.graph import build_document_graph, build_web_graph
from llmpapers.graph2eval.metrics import answers_match, canonical, kind_of
from llmpapers.graph2eval.site import Site, fresh_state
from llmpapers.graph2eval.tasks import (
    All,
    AnswerIs,
    Task,
    UrlIs,
    generate_document_tasks,
    generate_web_tasks,
)
from llmpapers.graph2eval.world import make_world


@pytest.fixture(scope="module")
def shop():
    with Site(make_world(0)) as site:
        pages = crawl(site.origin, HttpBrowser(Policy((site.origin,)), send=direct(site))).pages
        web = build_web_graph(pages)
        by_type = {}
        for t in generate_web_tasks(web, 40):
            by_type.setdefault(t.type, t)
        yield site, web, by_type


odd = [
    "/a b",
    "/ü",
    "http://[",
    "/order/²",
    "/\x00",
    "/c/indoor?page=²",
    "/c/indoor?page=" + "1" * 5000,
]


@pytest.mark.parametrize("backend", ["http", "direct"])
@pytest.mark.parametrize("target", odd)
def test_what_an_agent_types_never_voids_its_episode(shop, backend, target):
    site, _, by_type = shop
    with WebEnv(site, backend) as env:
        script = Script([Action("goto", target), Action("answer", value="wrong")])
        episode = play(env, by_type["lookup"], script)
    assert (episode.status, episode.reward) == ("finished", 0.0)


@pytest.mark.parametrize("text", ["1" * 5000, "\ud800", "²"])
def test_what_an_agent_fills_in_never_voids_its_episode(shop, text):
    site, _, by_type = shop
    task = by_type["form"]
    acts = [replace(a, value=text) if a.kind == "fill" else a for a in task.oracle]
    for backend in ("http", "direct"):
        with WebEnv(site, backend) as env:
            assert play(env, task, Script(acts)).reward == 0.0


@pytest.mark.parametrize("backend", ["http", "direct"])
@pytest.mark.parametrize("kind", ["navigate", "search"])
def test_a_page_of_another_host_is_no_goal(shop, backend, kind):
    site, _, by_type = shop
    path = next(g.path for g in by_type[kind].goal.goals if isinstance(g, UrlIs))
    with WebEnv(site, backend) as env:
        episode = play(env, by_type[kind], Script([Action("goto", "http://evil.test" + path)]))
    assert episode.reward == 0.0 and {"blocked"} <= {e["kind"] for e in episode.events}


def test_a_first_page_that_is_not_there_is_trouble_of_the_machinery(shop):
    site, _, by_type = shop
    for task, policy in (
        (by_type["lookup"], Policy(("http://127.0.0.1:1",))),
        (replace(by_type["lookup"], start="/gone"), None),
    ):
        with WebEnv(site, "http", policy) as env:
            for agent in (OracleAgent(), Script([])):
                assert play(env, task, agent).reward is None


def test_a_forged_path_is_noticed(shop):
    site, _, by_type = shop
    task = by_type["navigate"]
    path = next(g.path for g in task.goal.goals if isinstance(g, UrlIs))
    forged = asdict(play(WebEnv(site, "http"), task, Script([]))) | dict(path=path, reward=1.0)
    assert not regrade(forged, task, site.world).agrees


@pytest.mark.parametrize(
    "text", ["€1.200,50", "$1,2", "2023-02-30", "A", "The", "$5", "007", "-$3"]
)
def test_a_value_is_of_the_kind_that_is_guessed(text):
    assert canonical(kind_of(text), text) is not None and answers_match(kind_of(text), text, text)


def test_a_gold_that_nothing_could_match_is_refused():
    with pytest.raises(ValueError, match="no answer could be right"):
        AnswerIs("number", "twelve")
    with pytest.raises(ValueError, match="no answer could be right"):
        AnswerIs("text", "")


def shop_of(*bodies):
    "A graph of a home page and pages it links to"
    links = "".join(f"<a href='/p{k}'>Page {k}</a>" for k in range(len(bodies)))
    pages = [parse_page("http://h/", f"<title>Home</title>{links}")]
    return build_web_graph(pages + [parse_page(f"http://h/p{k}", b) for k, b in enumerate(bodies)])


def product(title, price):
    return f"<title>{title}</title><a href='/'>Home</a><dl><dt>Price<dd>{price}</dl>"


@pytest.mark.parametrize(
    "prices, expected",
    [
        (("€1.200,50", "€900,00"), 0),  # neither is an amount in our notation
        (("$100", "¥9000"), 0),  # two currencies
        (("€1.200.000", "€3"), 0),
        (("$1,200.50", "$900.00"), 2),
    ],
)
def test_amounts_are_compared_as_amounts(prices, expected):
    kg = shop_of(product("Alpha", prices[0]), product("Beta", prices[1]))
    found = generate_web_tasks(kg, 2, ["compare"])
    assert len(found) == expected
    for t in found:
        answer = next(g.value for g in t.goal.goals if isinstance(g, AnswerIs))
        assert answer == ("Beta" if "lower" in t.instruction else "Alpha")
    assert found or found.shortfall


def test_a_label_with_two_values_is_not_asked_for():
    kg = shop_of("<title>Alpha</title><dl><dt>Phone<dd>111<dt>Phone<dd>222<dt>Fax<dd>3</dl>")
    asked = generate_web_tasks(kg, 5, ["lookup"])
    assert asked and not any("Phone" in t.instruction for t in asked)


def test_pages_of_one_title_are_a_shortfall():
    pages = [
        parse_page(f"http://h{p}", "<title>Shop</title><a href='/a'>a</a>") for p in ("/", "/a")
    ]
    tasks = generate_web_tasks(build_web_graph(pages), 3)
    assert not tasks and tasks.shortfall


def test_all_fields_of_a_filter_are_in_its_goal():
    form = (
        "<title>Alpha</title><form action=/s><input type=hidden name=v value=1><select name=sort>"
        "<option>up<option>down</select><button>Go</button></form>"
    )
    task = generate_web_tasks(shop_of(form), 1, ["filter"])[0]
    assert next(g.path for g in task.goal.goals if isinstance(g, UrlIs)) == "/s?v=1&sort=down"


def test_tasks_of_another_first_state_can_be_done(shop):
    site, web, _ = shop
    state = fresh_state() | dict(cart={site.world.products[0].id: 2})
    tasks = generate_web_tasks(web, 6, ["form", "lookup"], initial=state)
    env = WebEnv(site, "direct")
    assert [play(env, t, OracleAgent()).reward for t in tasks] == [1.0] * 6
    plain = generate_web_tasks(web, 6, ["form", "lookup"])
    assert not {t.key for t in tasks} & {t.key for t in plain}


@pytest.mark.parametrize(
    "sentence", ["The rate was 3.5 percent in May.", "It began on 12.05.2024.", "It cost 1.200,50."]
)
def test_no_number_stops_the_generation(sentence):
    kg = build_document_graph([load_html(f"<p>{sentence}</p><p>It has 7 doors.</p>", "d")])
    for seed in range(6):
        tasks = generate_document_tasks(kg, 8, seed=seed)
        assert tasks and all(t.goal.check("", {}, t.goal.value) for t in tasks)


def test_only_the_number_itself_is_replaced():
    kg = build_document_graph([load_html("<p>Route B12 has 12 stops.</p>", "d")])
    asked = generate_document_tasks(kg, 4, ["extraction", "verification"])
    assert asked and all("B12 has" in t.instruction for t in asked)


@pytest.mark.parametrize("rows", [[["Name"], ["a"], ["b"]], [["Name", "Units"], ["a", ""]]])
def test_tables_without_cells_are_a_shortfall(tmp_path, rows):
    blocks = [("title", "T"), ("paragraph", "See Table 1 for names of all.")]
    write_blocks([*blocks, ("table", (1, "Names", rows))], tmp_path / "x.pdf")
    tasks = generate_document_tasks(build_document_graph([load_pdf(tmp_path / "x.pdf")]), 8)
    assert not any(t.type in ("table_qa", "cross_reference") for t in tasks) and tasks.shortfall


@pytest.mark.parametrize(
    "kind, gold, said",
    [
        ("text", "Caf\u00e9", "Cafe\u0301"),
        ("money", "-$5.00", "$-5.00"),
        ("money", "$5", "US$5"),
        ("money", "$5", "$5 USD"),
        ("number", "-5", "\u22125"),
        ("number", "1200", "1\u00a0200"),
        ("date", "2024-12-31", "December 31st, 2024"),
        ("date", "2024-12-31", "Tuesday, 31 December 2024"),
        ("date", "2024-09-03", "Sept 3, 2024"),
        ("date", "2024-05-02", "2024/05/02"),
        ("date", "2024-05-02", "2024-05-02T00:00:00Z"),
        ("quantity", "12%", "12 %"),
        ("quantity", "2 months", "2 month"),
        ("number", "0.5", ".5"),
    ],
)
def test_right_answers_in_other_forms(kind, gold, said):
    assert answers_match(kind, gold, said)


@pytest.mark.parametrize(
    "kind, gold, said",
    [
        ("number", "1" * 30, "1" * 29 + "2"),
        ("money", "$5", "$5 EUR"),
        ("money", "-$5", "--$5"),
        ("date", "2024-05-02", "2024-05-02T13:00:00Z"),
        ("number", "5", ".5"),
    ],
)
def test_wrong_answers_in_like_forms(kind, gold, said):
    assert not answers_match(kind, gold, said)


def test_goals_without_a_gold_are_not_graded_as_failures(shop):
    site, _, by_type = shop
    bad = replace(by_type["lookup"], goal=All((UrlIs("/"), "no goal")))
    episode = play(WebEnv(site, "direct"), bad, Script([]))
    assert (episode.status, episode.reward) == ("infrastructure", None)


class Raw:
    "A server that sends these bytes to whoever asks, piece by piece"

    def __init__(self, *pieces, pause=0.0):
        self.pieces, self.pause, self.asked = pieces, pause, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                link, _ = self.listening.accept()
                with link:
                    self.asked.append(link.recv(65536))
                    for p in self.pieces:
                        link.sendall(p)
                        time.sleep(self.pause)
            except OSError:
                if self.listening.fileno() < 0:
                    return

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listening.close()


def answer(body, head=b""):
    return b"HTTP/1.1 200 OK\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    "sent",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": []',
        b"nonsense\r\n\r\n",
        b"",
        answer(b'{"choices": ["x"]}'),
        answer(b'{"choices": [null]}'),
        answer(b"[" * 100_000),
    ],
)
def test_whatever_an_endpoint_sends_is_an_error_of_the_endpoint(sent):
    with Raw(sent) as server:
        client = ChatClient(server.url, "m", retries=1, backoff=0)
        with pytest.raises(EndpointError):
            client.chat([dict(role="user", content="?")])
        assert not judge(tasks_of_nothing(), "", client).read
    assert len(server.asked) == 4  # each of the two was tried again


def tasks_of_nothing():
    return Task("t", "web", "x", 1, "Do it.", "/", UrlIs("/"), (), (), "k")


def test_a_limit_of_time_is_one_for_the_whole_reply():
    slow = answer(b" " * 60)
    with Raw(*(slow[k : k + 1] for k in range(len(slow))), pause=0.1) as server:
        start = time.monotonic()
        with pytest.raises(EndpointError):
            ChatClient(server.url, "m", timeout=0.5, retries=0).chat([])
        reply = fetch_once(Policy((server.url,), timeout=0.5), "GET", server.url + "/", [])
        assert reply.status == 504 and time.monotonic() - start < 5


def test_a_key_stays_with_its_endpoint():
    with Raw(answer(b"{}")) as other:
        away = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/x\r\nContent-Length: 0\r\n\r\n"
        with Raw(away.encode()) as server:
            with pytest.raises(EndpointError, match="302"):
                ChatClient(server.url, "m", key="SECRET", retries=0).chat([])
        assert not other.asked


def test_an_endpoint_says_what_is_wrong():
    said = b'{"error": {"message": "model not found"}}'
    with Raw(answer(said).replace(b"200 OK", b"404 Not Found")) as server:
        with pytest.raises(EndpointError, match="model not found"):
            ChatClient(server.url, "m").chat([])
    for bad in (dict(base_url="http://a b"), dict(base_url="http://"), dict(backoff=-1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ChatClient(**(dict(base_url="http://h", model="m") | bad))


def test_a_page_of_stray_tags_is_read_in_linear_time():
    start = time.process_time()
    parse_page("http://x/", "<b>" * 20_000 + "</i>" * 20_000)
    parse_page("http://x/", "<a href='http://['>x</a><form action='http://['><button>b</button>")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "kind", [b"text/html; charset=iso-8859-1", b"application/xhtml+xml; charset=latin-1"]
)
def test_a_page_is_read_in_its_own_letters(kind):
    body = "<title>Café Müller</title>".encode("latin-1")
    with Raw(answer(body, b"Content-Type: " + kind + b"\r\nConnection: close\r\n")) as server:
        page = HttpBrowser(Policy((server.url,))).goto(server.url + "/")
    assert page.title == "Café Müller"


def test_invisible_letters_are_taken_out():
    assert clean_text("a\U000e0041b\u2066c\u2063d\xade") == "abcde"
