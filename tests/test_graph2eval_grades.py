"Grades of the task generator: the machinery's failures, odd input, addresses, records, answers"

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from llmpapers.graph2eval import bench
from llmpapers.graph2eval.agents import (
    GoldReader,
    HeuristicAgent,
    LLMDocAgent,
    LLMWebAgent,
    NoopAgent,
    OracleAgent,
    read_answer,
)
from llmpapers.graph2eval.browser import Action, HttpBrowser, Policy, Reply, crawl, direct
from llmpapers.graph2eval.client import (
    ChatClient,
    ClientError,
    EndpointError,
    LLMGenerator,
    LLMWriter,
    StubServer,
    judge,
    same_task,
)
from llmpapers.graph2eval.documents import load_html
from llmpapers.graph2eval.env import Script, WebEnv, play, regrade
from llmpapers.graph2eval.graph import build_document_graph, build_web_graph
from llmpapers.graph2eval.metrics import (
    answer_kinds,
    answers_match,
    canonical,
    citation_prf,
    exact_match,
    kind_of,
    normalize_answer,
    token_f1,
)
from llmpapers.graph2eval.site import Site
from llmpapers.graph2eval.tasks import (
    AnswerIs,
    UrlIs,
    generate_document_tasks,
    generate_web_tasks,
)
from llmpapers.graph2eval.world import make_world, money


@pytest.fixture(scope="module")
def shop():
    with Site(make_world(0)) as site:
        visitor = HttpBrowser(Policy((site.origin,)), send=direct(site))
        kg = build_web_graph(crawl(site.origin, visitor).pages)
        site.sessions.clear()
        tasks = {}
        for t in generate_web_tasks(kg, 40):
            tasks.setdefault(t.type, t)
        yield site, kg, tasks


def page_of(task):
    return next(g.path for g in task.goal.goals if isinstance(g, UrlIs))


# ---- the machinery -------------------------------------------------------------------------------
def nobody():
    return ChatClient("http://127.0.0.1:1/v1", "m", retries=0)


def test_an_endpoint_that_is_down_is_not_the_agents_failure(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    episode = play(env, tasks["lookup"], LLMWebAgent(nobody()))
    assert (episode.status, episode.reward) == ("infrastructure", None)
    assert len(episode.har["log"]["entries"]) == 1  # what happened before is kept
    docs = build_document_graph([load_html("<p>The rate was 35 percent.</p>", "d")])
    with pytest.raises(EndpointError):
        LLMDocAgent(nobody(), GoldReader(docs)).answer(generate_document_tasks(docs, 1)[0])


@pytest.mark.parametrize(
    "status, reward", [(500, None), (503, None), (429, None), (401, None), (400, None)]
)
def test_statuses_of_an_endpoint(shop, status, reward):
    site, _, tasks = shop
    with StubServer([status]) as stub:
        client = ChatClient(stub.base_url, "m", retries=0)
        episode = play(WebEnv(site, "direct"), tasks["lookup"], LLMWebAgent(client))
    assert episode.reward is reward and str(status) in episode.reason


@pytest.mark.parametrize("said", ["I refuse", "{", "cut"])
def test_a_model_that_answers_badly_fails_itself(shop, said):
    site, _, tasks = shop
    with StubServer([said]) as stub:
        client = ChatClient(stub.base_url, "m", retries=0)
        assert play(WebEnv(site, "direct"), tasks["lookup"], LLMWebAgent(client)).reward == 0.0


class Raising(NoopAgent):
    def __init__(self, error, after=1):
        super().__init__()
        self.error, self.after = error, after

    def act(self, obs):
        if obs.step >= self.after:
            raise self.error
        return Action("goto", "/cart")


def test_an_agent_that_raises_keeps_its_record(shop):
    site, _, tasks = shop
    episode = play(WebEnv(site, "direct"), tasks["lookup"], Raising(ValueError("no idea")))
    assert episode.reward == 0.0 and "ValueError: no idea" in episode.reason
    assert len(episode.har["log"]["entries"]) == 2 and episode.path == "/cart"
    again = regrade(json.loads(json.dumps(asdict(episode))), tasks["lookup"], site.world)
    assert again.same_state and again.agrees
    for error in (OSError("x"), ConnectionResetError(), TimeoutError()):
        assert play(WebEnv(site, "direct"), tasks["lookup"], Raising(error)).reward is None


def test_a_wrong_start_or_fence_is_no_episode(shop):
    site, _, tasks = shop
    fenced = WebEnv(site, "http", policy=Policy(("http://127.0.0.1:1",)))
    for env, task in (
        (fenced, tasks["lookup"]),
        (WebEnv(site, "direct"), replace(tasks["lookup"], start="/gone")),
    ):
        episode = play(env, task, OracleAgent())
        assert (episode.status, episode.reward) == ("infrastructure", None)


def test_too_many_requests_are_machinery(shop):
    site, _, tasks = shop
    env = WebEnv(site, "direct")
    env._browser = lambda cookies: HttpBrowser(env.policy, cookies, limited(direct(site)))

    def limited(send):
        asked = []

        def sender(*args):
            asked.append(args)
            return Reply(429, [], b"slow down") if len(asked) > 1 else send(*args)

        return sender

    assert play(env, tasks["lookup"], HeuristicAgent(3)).reward is None


def test_a_goal_that_cannot_be_checked_is_not_held_against_the_agent(shop):
    class Broken:
        def check(self, *_):
            raise RuntimeError("grader")

    site, _, tasks = shop
    task = replace(tasks["lookup"], goal=Broken())
    episode = play(WebEnv(site, "direct"), task, Script([Action("answer", value="x")]))
    assert episode.reward is None and "grader" in episode.reason


# ---- what the agent does -------------------------------------------------------------------------
odd = ["/a b", "/ü", "http://[", "/order/²", "/\x00", "/c/indoor?page=%C2%B2", "\ud800"]
odd += ["/c/indoor?page=" + "1" * 5000, "http://evil.test/", "file:///etc/passwd", "//"]


@pytest.mark.parametrize("backend", ["direct", "http"])
@pytest.mark.parametrize("target", odd)
def test_no_address_voids_an_episode(shop, backend, target):
    site, _, tasks = shop
    acts = [Action("goto", target), Action("answer", value="wrong")]
    with WebEnv(site, backend) as env:
        episode = play(env, tasks["lookup"], Script(acts))
    assert (episode.status, episode.reward) == ("finished", 0.0)


@pytest.mark.parametrize("value", ["1" * 5000, "\ud800", "²"])
def test_no_quantity_voids_an_episode(shop, value):
    site, _, tasks = shop
    acts = [
        Action("goto", f"/p/{site.world.products[0].id}"),
        Action("fill", "textbox/Quantity/0", value),
        Action("click", "button/Add to cart"),
        Action("answer", value="wrong"),
    ]
    for backend in ("direct", "http"):
        with WebEnv(site, backend) as env:
            assert play(env, tasks["lookup"], Script(acts)).reward == 0.0


@pytest.mark.parametrize("backend", ["direct", "http"])
@pytest.mark.parametrize("kind", ["navigate", "search"])
def test_a_blocked_page_of_the_same_path_is_not_the_page(shop, backend, kind):
    site, _, tasks = shop
    acts = [Action("goto", "http://evil.test" + page_of(tasks[kind]))]
    with WebEnv(site, backend) as env:
        episode = play(env, tasks[kind], Script(acts))
    assert episode.reward == 0.0 and episode.events[0]["kind"] == "blocked"
    again = regrade(json.loads(json.dumps(asdict(episode))), tasks[kind], site.world)
    assert again.agrees and again.reward == 0.0


def test_a_record_with_another_path_does_not_agree(shop):
    site, _, tasks = shop
    task = tasks["navigate"]
    honest = asdict(play(WebEnv(site, "direct"), task, Script([])))
    assert regrade(honest, task, site.world).agrees
    assert not regrade(honest | dict(path=page_of(task), reward=1.0), task, site.world).agrees


# ---- the table -----------------------------------------------------------------------------------
def test_a_factory_that_fails_costs_its_own_episodes(shop):
    site, _, tasks = shop
    two = list(tasks.values())[:2]

    def broken(seed):
        raise ZeroDivisionError("no agent")

    agents = dict(bad=broken, oracle=lambda seed: OracleAgent())
    found = bench.run(two, agents, lambda: WebEnv(site, "direct"))
    assert np.isnan(found.matrix[0]).all() and (found.matrix[1] == 1).all()
    assert sum(found.holes.values()) == 2 and found.table["oracle"] == 1

    def no_env():
        raise OSError("port taken")

    assert sum(bench.run(two, agents, no_env).holes.values()) == 4
    with pytest.raises(ValueError, match="seeds"):
        bench.run(two, agents, no_env, seeds=(0, 0))


def test_seeds_of_pairs_are_different():
    seeds = {bench._agent_seed(s, i) for s in range(5) for i in range(3000)}
    assert len(seeds) == 15000


# ---- answers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value", ["€1.200,50", "$1,2", "2023-02-30", "A", "The", "€1.200.000", "1.2.3", "$", "12%"]
)
def test_a_value_is_of_the_kind_that_it_is_said_to_be(value):
    assert canonical(kind_of(value), value) is not None
    assert answers_match(kind_of(value), value, value)


def test_a_goal_that_nothing_can_meet_is_refused():
    for kind, value in (("money", "€1.200,50"), ("text", ""), ("number", "3,5"), ("moeny", "3")):
        with pytest.raises(ValueError):
            AnswerIs(kind, value)


@pytest.mark.parametrize("kind", answer_kinds)
@pytest.mark.parametrize(
    "said", ["a" * 200_000 + "!", "9" * 3_000_000, "1 " * 50_000, "5" * 3900 + "!", "$" * 3000]
)
def test_no_answer_hangs_or_breaks_the_grader(kind, said):
    gold = dict(text="x", id="7", number="5", quantity="5 kg", money="$5", date="2024-01-02")
    start = time.process_time()
    value = gold.get(kind, "a, b" if kind == "list" else "yes")
    assert not answers_match(kind, value, said)
    assert time.process_time() - start < 1


def test_long_numbers_are_words_too():
    assert token_f1("1" * 5000, "x") == 0 and exact_match("1" * 5000, "1" * 5000) == 1


def test_numbers_keep_every_digit_sign_and_point():
    assert not answers_match("number", "1" * 29 + "1", "1" * 29 + "2")
    assert exact_match(".5", "5") == 0 and normalize_answer("-.5") == ["-0.5"]
    assert exact_match("\u22125", "5") == 0 and exact_match("\u22125", "-5") == 1
    assert normalize_answer("1,200 3.50 007 0.0") == ["1200", "3.5", "007", "0"]


@pytest.mark.parametrize(
    "kind, gold, said",
    [
        ("text", "Café", "Cafe\u0301"),
        ("money", "-$5.00", "$-5.00"),
        ("money", "$5", "US$5"),
        ("money", "$5", "$5 USD"),
        ("number", "-5", "\u22125"),
        ("number", "1200", "1\u00a0200"),
        ("number", "0.5", ".5"),
        ("date", "2024-12-31", "December 31st, 2024"),
        ("date", "2024-12-31", "Tuesday, 31 December 2024"),
        ("date", "2024-09-03", "Sept 3, 2024"),
        ("date", "2024-05-02", "2024/05/02"),
        ("date", "2024-05-02", "2024-05-02T00:00:00Z"),
        ("quantity", "12%", "12 %"),
        ("quantity", "2 months", "2 month"),
        ("list", "Bada, Mire, Nuko", "nuko, Bada, Mire."),
    ],
)
def test_right_answers_in_other_dress(kind, gold, said):
    assert answers_match(kind, gold, said)


@pytest.mark.parametrize(
    "kind, gold, said",
    [
        ("money", "$5", "€5"),
        ("money", "$5", "$5 EUR"),
        ("quantity", "2 months", "2 years"),
        ("list", "Bada, Mire, Nuko", "Bada, Mire"),
        ("date", "2024-05-02", "2024-05-02T10:00:00Z"),
        ("number", "12", "1 2"),
        ("text", "A", "The"),
    ],
)
def test_wrong_answers_stay_wrong(kind, gold, said):
    assert not answers_match(kind, gold, said)


def test_small_ones():
    assert money(-5) == "-$0.05" and kind_of("Bada, Mire, Nuko") == "list"
    with pytest.raises(TypeError, match="one string"):
        citation_prf("ab", "ba")


# ---- the client ----------------------------------------------------------------------------------
class Raw:
    "An endpoint that sends bytes"

    def __init__(self, data, pause=0.0):
        import socketserver
        import threading

        got = self.got = []

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                got.append(self.request.recv(65536))
                try:
                    for piece in data if isinstance(data, list) else [data]:
                        self.request.sendall(piece)
                        time.sleep(pause)
                except OSError:
                    pass

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def http(body, status=b"200 OK", length=None):
    n = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, n) + body


@pytest.mark.parametrize(
    "data",
    [
        http(b'{"choices": []', length=500),
        b"nonsense\r\n\r\n",
        http(b'{"choices": ["x"]}'),
        http(b'{"choices": [null]}'),
        http(b"[" * 100_000),
        http(json.dumps(dict(choices=[dict(message=dict(content="[{" * 50_000 + "}"))])).encode()),
        http(b'{"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}'),
    ],
)
def test_every_bad_reply_is_a_client_error(data, shop):
    with Raw(data) as raw:
        client = ChatClient(raw.base_url, "m", retries=0, timeout=2)
        with pytest.raises(ClientError):
            client.chat([dict(role="user", content="?")], dict(a=str))
        assert not judge(shop[2]["lookup"], "", client).read  # and a judge fails closed


def test_the_time_limit_holds_for_a_whole_reply():
    start = time.monotonic()
    with Raw([http(b"", length=60)] + [b"x"] * 60, pause=0.1) as raw:
        with pytest.raises(EndpointError, match="within timeout"):
            ChatClient(raw.base_url, "m", retries=0, timeout=0.3).chat([])
    assert time.monotonic() - start < 5  # of 6 that it drips


def test_a_reply_has_a_largest_size():
    with Raw(http(b"x" * 10_000)) as raw:
        with pytest.raises(ClientError, match="max_bytes"):
            ChatClient(raw.base_url, "m", retries=0, max_bytes=1000).chat([])


def test_the_key_stays_with_its_origin():
    with Raw(http(b"{}")) as thief:
        where = thief.base_url.replace("127.0.0.1", "localhost").encode()
        moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % where
        with Raw(moved) as raw:
            with pytest.raises(EndpointError, match="redirects are not followed"):
                ChatClient(raw.base_url, "m", key="SECRET", retries=0).chat([])
        assert b"SECRET" in raw.got[0] and not thief.got


@pytest.mark.parametrize(
    "kw, name",
    [
        (dict(backoff=-1), "backoff"),
        (dict(base_url="http://a b/v1"), "base_url"),
        (dict(base_url="http://u:p@host/v1"), "base_url"),
        (dict(key="a\nb"), "key"),
    ],
)
def test_bad_settings_of_a_client_are_named(kw, name):
    with pytest.raises(ValueError, match=name):
        ChatClient(**(dict(base_url="http://127.0.0.1:1/v1", model="m") | kw))


def test_what_an_endpoint_says_is_passed_on():
    said = b'{"error": {"message": "model not found"}}'
    with Raw(http(said, b"401 Unauthorized")) as raw:
        with pytest.raises(EndpointError, match="model not found; is `key` right"):
            ChatClient(raw.base_url, "m", retries=0).chat([])
    with Raw(http(said)) as raw:
        with pytest.raises(ClientError, match="model not found"):
            ChatClient(raw.base_url, "m", retries=0).chat([])


# ---- rewording -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "asked, said",
    [
        ('Open the page "A".', 'Do not open the page "A"; stay where you are.'),
        ('Open the page "A".', 'Don\'t open "A".'),
        ('Open the page "A".', 'Open the page "A", then place an order and empty the cart.'),
        ('Which name makes the number larger in "x"?', 'Which name makes it smaller in "x"?'),
        ('Does a document say: "x"? Answer yes or no.', 'Does no document say "x"? yes or no'),
        ('Which has the lower Price: "A" or "B"?', 'Which has the higher Price: "A" or "B"?'),
        ('Open the page "A".', 'Open "A". Then rest. Then go. Then come back.'),
    ],
)
def test_a_rewording_that_turns_the_task_is_refused(asked, said):
    assert not same_task(asked, said)


def test_a_kind_rewording_is_taken(shop):
    task = shop[2]["navigate"]
    title = task.instruction.split('"')[1]
    assert same_task(task.instruction, f'Please bring up the page called "{title}".')
    bad = json.dumps(dict(instruction=f'Do not open the page "{title}".'))
    with StubServer([bad]) as stub:
        client = ChatClient(stub.base_url, "m", retries=0)
        assert LLMWriter(client).reword(task).meta["reworded"] is False
        with pytest.raises(ValueError, match="pages"):
            LLMGenerator([], client)


@pytest.mark.parametrize(
    "question",
    ["Which number completes this?", "In Table, what", "In the table", "In the figure", "Does a"]
    + ["Take the name", 'Take the name "a" in "b"', "Which name makes", "In the table", ""],
)
def test_readers_do_not_break_on_other_words(question):
    elements = [dict(kind="paragraph", text="a", doc="d", number=None)]
    assert read_answer(question, elements) in ("", "no")
