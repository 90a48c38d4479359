"""QAgent: worlds, retrieval, the server and its client, in the hands of people and of fuzzers"""

import asyncio
import gzip
import json
import math

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.qagent import retrieval
from llmpapers.qagent.retrieval import (
    BM25,
    Cached,
    Dense,
    Hybrid,
    RemoteRetriever,
    RetrievalError,
    bm25_loop,
    load_docs,
    page_text,
)
from llmpapers.qagent.server import create_app, main
from llmpapers.qagent.world import Doc, build_world, kinds, suffix_country, world_words

words = st.sampled_from(["fish", "eat", "sea", "the", "a", "blue", "Fish", "42"])
texts = st.lists(words, max_size=8).map(" ".join)


def corpus(pages):
    return [Doc(str(i), "", t) for i, t in enumerate(pages)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(texts, max_size=9),
    st.lists(texts, max_size=4),
    st.integers(1, 12),
    st.floats(0, 3),
    st.floats(0, 1),
)
def test_bm25_is_its_formula(pages, queries, k, k1, b):
    """Scores of the formula, positive, best first, ties by place, at most k and all that match"""
    index = BM25(corpus(pages), k1, b)
    for query, found in zip(queries, index.search(queries, k)):
        scores = np.array(bm25_loop(query, ["\n" + p for p in pages], k1, b))
        order = sorted(np.flatnonzero(scores > 0), key=lambda i: (-np.float32(scores[i]), i))
        assert len(found) == min(k, len(order))
        np.testing.assert_allclose(
            [d.score for d in found], sorted(scores, reverse=True)[: len(found)], rtol=1e-4
        )
        same = [d.id for d in found] == [str(i) for i in order[:k]]
        gaps = np.diff(np.sort(scores[scores > 0]))
        assert same or (gaps[gaps > 0] < 1e-5).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=9), st.lists(texts, min_size=2, max_size=6))
def test_bm25_does_not_know_its_batch(pages, queries):
    index = BM25(corpus(pages))
    whole = index.search(queries, 3)
    assert whole == [index.search([q], 3)[0] for q in queries]
    assert whole == index.search(queries[::-1], 3)[::-1]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_corpora_without_a_word(n):
    assert BM25(corpus([""] * n)).search(["a", ""], 3) == [[], []]


def test_a_match_never_ranks_below_none():
    """Words in half, in all and in one of the pages"""
    pages = ["common half", "common half rare", "common", "common"]
    for q in ("common", "half", "rare", "common half rare"):
        found = BM25(corpus(pages)).search([q], 9)[0]
        having = {str(i) for i, p in enumerate(pages) if set(q.split()) & set(p.split())}
        assert {d.id for d in found} == having and min(d.score for d in found) > 0


def test_repeated_words_add_up():
    index = BM25(corpus(["fish sea", "sea"]))
    once, twice = (index.search([q], 1)[0][0].score for q in ("fish", "fish FISH"))
    assert math.isclose(twice, 2 * once, rel_tol=1e-5)


def zipf(seed, pages):
    "An index over pages of a language with frequent words, and queries in that language"
    gen = np.random.default_rng(seed)
    share = 1 / np.arange(1.0, 61)
    rows = gen.choice(60, (pages, 8), p=share / share.sum())
    index = BM25(corpus([" ".join(f"w{r}" for r in row) for row in rows]))
    asked = [[f"w{r}" for r in gen.choice(60, 5, p=share / share.sum())] for _ in range(6)]
    return index, [[w for w in q if w in index.vocab] for q in asked]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 20))
def test_what_bm25_leaves_out_could_not_win(seed, pages, k):
    """The best of all sums, ties by place, whatever the order of the words"""
    index, asked = zipf(seed, pages)
    indptr, listed, weights, _ = index.table
    for query in asked:
        sums = np.zeros(pages)
        for w in query:
            at = slice(indptr[index.vocab[w]], indptr[index.vocab[w] + 1])
            sums[listed[at]] += weights[at]
        order = [i for i in np.argsort(-sums, kind="stable")[:k] if sums[i]]
        for text in (" ".join(query), " ".join(query[::-1])):
            found = index.search([text], k)[0]
            assert [(d.id, d.score) for d in found] == [(str(i), sums[i]) for i in order]


def test_bm25_does_leave_out(monkeypatch):
    """The same code without a compiler: long lists are cut short, and the result is the same"""
    index, asked = zipf(0, 300)
    found, cut = index.search([" ".join(q) for q in asked], 2), []
    narrow = retrieval._narrow

    def counted(seen, total, least):
        cut.append(len(seen))
        return narrow(seen, total, least)

    monkeypatch.setattr(retrieval, "_narrow", counted)
    monkeypatch.setattr(retrieval, "_compiled", [retrieval._best_pages])
    assert index.search([" ".join(q) for q in asked], 2) == found
    assert cut


def test_lucene_constants():
    a, b = BM25(corpus(["a b"]), preset="lucene-default"), BM25(corpus(["a b"]), 0.9, 0.4)
    assert (a.k1, a.b) == (0.9, 0.4) and a.search(["a"], 1) == b.search(["a"], 1)
    with pytest.raises(ValueError, match="preset"):
        BM25([], preset="lucene")


class Fixed:
    "Lists that were written down"

    def __init__(self, lists):
        self.lists, self.calls = lists, []

    def search(self, queries, k):
        self.calls.append(list(queries))
        return [[Doc(i, "", "t") for i in self.lists.get(q, ())][:k] for q in queries]


def test_fusion_by_hand():
    both = Hybrid(Fixed(dict(q=["a", "b"])), Fixed(dict(q=["b", "c"])), rrf_k=60)
    found = both.search(["q"], 9)[0]
    assert [d.id for d in found] == ["b", "a", "c"]
    assert [d.score for d in found] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=5), max_size=6), st.integers(1, 3))
def test_a_cache_changes_nothing_and_asks_once(batches, size):
    inner = Fixed({q: [q + "1", q + "2"] for q in "abcd"})
    cached, plain = Cached(inner, size), Fixed(inner.lists)
    for batch in batches:
        assert cached.search(batch, 2) == plain.search(batch, 2)
    assert all(len(set(c)) == len(c) and c for c in inner.calls)
    assert cached.asked == sum(map(len, batches)) and cached.sent == sum(map(len, inner.calls))


def test_files_of_the_field(tmp_path):
    """Wikipedia's dump, BEIR's names, a byte order mark, gzip; bad lines are counted and named"""
    rows = [
        dict(id="0", contents='"A title"\nIts text'),
        dict(_id="b", title="T", text="x"),
        dict(id=3, text="number as id"),
        dict(id="e", text=" "),
        dict(id="b", text="again"),
    ]
    lines = [json.dumps(r) for r in rows] + ["{broken", "[1]", "null", ""]
    data = ("\ufeff" + "\r\n".join(lines)).encode()
    (tmp_path / "d.jsonl").write_bytes(data)
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as f:
        f.write(data)
    for name in ("d.jsonl", "d.jsonl.gz"):
        got = load_docs(tmp_path / name, max_refused=1)
        assert [(d.id, d.title) for d in got.docs] == [("0", "A title"), ("b", "T"), ("3", "")]
        assert [n for n, _ in got.refused] == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="d.jsonl: 5 of 8 lines"):
        load_docs(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="is no file"):
        load_docs(tmp_path / "none.jsonl")


def client(answer, **kw):
    def reply(request):
        return answer(request) if callable(answer) else httpx.Response(200, json=answer)

    kw = dict(probe=None, timeout=1, retries=1) | kw
    return RemoteRetriever("http://127.0.0.1:1/r", transport=httpx.MockTransport(reply), **kw)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(junk | st.fixed_dictionaries(dict(result=junk | st.lists(st.lists(junk)))))
def test_whatever_a_server_says(answer):
    """Pages with texts, or a `RetrievalError`; nothing else"""
    try:
        found = client(answer).search(["q"], 2)
    except RetrievalError:
        return
    assert len(found) == 1 and all(d.text.strip() for d in found[0])


def test_empty_texts_are_loud():
    for page in (dict(id=1, text=""), dict(id=1, content="x"), dict(document=dict(id=1))):
        with pytest.raises(RetrievalError, match="no text"):
            client(dict(result=[[page]])).search(["q"], 1)
    with pytest.raises(RetrievalError, match="finds nothing for the probe"):
        client(dict(result=[[]]), probe="the")


def test_attempts_are_few_and_bad_requests_are_not_repeated():
    calls = []

    def reply(status):
        def fn(request):
            calls.append(status)
            return httpx.Response(status)

        return fn

    for status, n in ((500, 2), (503, 2), (422, 1), (404, 1)):
        calls.clear()
        with pytest.raises(RetrievalError, match=str(status)):
            client(reply(status)).search(["q"], 1)
        assert len(calls) == n


@pytest.fixture(scope="module")
def server():
    from fastapi.testclient import TestClient

    app = create_app(BM25(corpus(["fish eat", "sea", ""])), max_queries=8, max_chars=40)
    with TestClient(app, raise_server_exceptions=False) as client:  # one event loop for all
        yield client


fields = st.sampled_from(["queries", "query", "topk", "return_scores", "x"])
bodies = st.one_of(
    st.dictionaries(fields, junk | texts | st.lists(texts | junk, max_size=10), max_size=4).map(
        lambda x: json.dumps(x).encode()
    ),
    st.binary(max_size=30),
    st.text(max_size=20).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"", b"[" * 5000, b'{"query": "\\ud800"}', b'{"topk": 1e999, "query": "a"}']),
)


async def post(app, body):
    "Status and JSON of a request to the bare application"
    sent = []

    async def receive():
        return dict(type="http.request", body=body, more_body=False)

    async def send(message):
        sent.append(message)

    scope = dict(type="http", method="POST", path="/retrieve", headers=[], query_string=b"")
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(bodies, min_size=25, max_size=25))
def test_ten_thousand_requests(server, batch):
    """Whatever is sent: an answer of the right shape, or a refusal that is not our fault"""

    async def all_of_them():
        return await asyncio.gather(*(post(server.app, body) for body in batch))

    for body, (status, answer) in zip(batch, asyncio.run(all_of_them())):
        assert status in (200, 413, 422), (body, status, answer)
        if status == 200:
            asked = json.loads(body)
            assert isinstance(answer["result"], list)
            if asked.get("queries") is not None:
                assert len(answer["result"]) == len(asked["queries"])
        else:
            assert isinstance(answer["detail"], str)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("scores", [True, False])
def test_one_shape(server, n, scores):
    body = dict(queries=["fish"] * n, topk=9, return_scores=scores)
    result = server.post("/retrieve", json=body).json()["result"]
    assert [len(r) for r in result] == [1] * n
    flat = server.post("/retrieve", json=dict(query="fish", topk=9, return_scores=scores)).json()
    assert [x["document"]["id"] for x in result[0]] == [x["id"] for x in flat["result"]]
    assert ("score" in flat["result"][0]) == ("score" in result[0][0]) == scores


def test_pages_that_json_cannot_carry():
    from fastapi.testclient import TestClient

    app = create_app(BM25([Doc("a\ud800", "\udfff", "fish \ud800")]))
    r = TestClient(app, raise_server_exceptions=False).post("/retrieve", json=dict(query="fish"))
    assert r.status_code == 200 and "\ufffd" in r.json()["result"][0]["text"]


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    for argv in (["--docs", str(tmp_path / "no.jsonl")], ["--docs", "x", "--topk", "0"]):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--docs", "x", "--retriever", "none"])


def test_dense_says_what_the_model_wants():
    class Model:
        prompts = {}

    class Enc:
        name, model = "intfloat/e5-base-v2", Model()

    from llmpapers.qagent.retrieval import _prompts

    assert _prompts(Enc()) == ("query: ", "passage: ")
    Enc.name = "BAAI/bge-base"
    assert _prompts(Enc()) == ("", "")
    Model.prompts = dict(query="q: ", document="d: ")
    assert _prompts(Enc()) == ("q: ", "d: ")


def test_dense_finds_itself():
    world = build_world(0, 8, 8, 4)
    docs = [*world.docs, Doc("void", "", " ")]
    dense = Dense(docs)
    found = dense.search([page_text(d) for d in world.docs[:5]] + [" "], 1)
    assert [f[0].id for f in found[:5]] == [d.id for d in world.docs[:5]] and found[5] == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["suffix", "shuffled"]), st.floats(0, 1))
def test_worlds(seed, geo, coverage):
    """Answers stand in the last page of their evidence; words are known; splits are apart"""
    w = build_world(seed, 16, 12, 8, coverage, geo)
    pages, known = {d.id: d.text for d in w.docs}, set(world_words())
    assert len(pages) == len(w.docs)
    for kind in kinds:
        train, test = (w.questions(kind, split) for split in ("train", "test"))
        assert not {q.text for q in train} & {q.text for q in test} or kind == "ambiguous"
        for q in train + test:
            assert set(q.text.split()) <= known and q.golds[0]
            assert q.answerable == all(i in pages for i in q.support_ids)
            if q.answerable and kind != "parallel":
                assert q.golds[0] in pages[q.support_ids[-1]]
    if geo == "suffix":
        assert all(suffix_country(c) == land for c, land in w.facts.country.items())


# ---- bad lines, bad answers, bad files --------------------------------------------------------
def test_a_bad_line_costs_one_line(tmp_path):
    """Scores that are none, deep nesting, ids that are empty: each is refused and named"""
    lines = [
        '{"id": "a", "text": "x", "score": [1]}',
        '{"id": "b", "text": "x", "score": NaN}',
        '{"id": "c", "text": "x", "score": "high"}',
        "[" * 100_000,
        '{"id": "", "text": "x"}',
        '{"id": ["d"], "text": "x"}',
        '{"id": "e", "text": "good", "score": 2}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    got = load_docs(tmp_path / "d.jsonl", max_refused=1)
    assert got.docs == [Doc("e", "", "good", 2.0)] and not got.damaged
    assert [n for n, _ in got.refused] == [1, 2, 3, 4, 5, 6]
    assert "score '[1]'" in got.refused[0][1] and "nested" in got.refused[3][1]
    assert got.report.startswith("1 pages, 6 lines left out (line 1: has the score")
    for bad in (-1, 0, 1.5, "x"):
        with pytest.raises(ValueError, match="limit="):
            load_docs(tmp_path / "d.jsonl", limit=bad)
    with pytest.raises(ValueError, match="max_refused="):
        load_docs(tmp_path / "d.jsonl", max_refused=2)


def test_bytes_that_are_no_text_are_counted(tmp_path):
    lines = [b'{"id": 1, "text": "caf\xe9"}', b'{"id": 2, "text": "plain"}']
    lines.append(b'{"id": 3, "text": "half \\ud800"}')
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    got = load_docs(tmp_path / "d.jsonl")
    assert [d.text for d in got.docs] == ["caf\ufffd", "plain", "half \ufffd"]
    assert (
        got.damaged == [1, 3] and "2 lines with bytes that are no UTF-8 (line 1, 3)" in got.report
    )


@pytest.mark.parametrize(
    "data", [b"no gzip", gzip.compress(b"a" * 999, mtime=0)[:-9]], ids=["no gzip", "cut off"]
)
def test_a_broken_archive(tmp_path, capsys, data):
    (tmp_path / "d.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match="d.jsonl.gz cannot be read"):
        load_docs(tmp_path / "d.jsonl.gz")
    with pytest.raises(SystemExit) as e:
        main(["--docs", str(tmp_path / "d.jsonl.gz")])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_tells_what_it_serves(tmp_path, capsys, monkeypatch):
    """An empty corpus is refused; lines left out are counted, the first of them named"""
    from llmpapers.qagent import server

    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(SystemExit) as e:
        main(["--docs", str(tmp_path / "d.jsonl")])
    assert e.value.code == 2 and "has no page" in capsys.readouterr().err
    lines = [json.dumps(dict(id=i, text="fish")) for i in range(30)] + ["{broken"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(server, "serve", lambda *args: None)
    assert main(["--docs", str(tmp_path / "d.jsonl")]) == 0
    assert "30 pages, 1 lines left out (line 31: Expecting" in capsys.readouterr().out


@pytest.mark.parametrize("score", ["high", [1], math.nan, 10**400, True])
def test_scores_that_are_none(score):
    page = json.dumps(dict(result=[[dict(id="1", text="x", score=score)]]))
    answer = httpx.Response(200, content=page.encode())
    with pytest.raises(RetrievalError, match="result 0 of query 0 .* has the score"):
        client(lambda request: answer).search(["q"], 1)


def test_what_cannot_be_sent_or_read():
    with pytest.raises(RetrievalError, match=r"queries\[1\]"):
        client(dict(result=[[], []])).search(["q", "\udfff"], 1)
    deep = httpx.Response(200, content=b"[" * 100_000)
    with pytest.raises(RetrievalError, match="sent no JSON"):
        client(lambda request: deep).search(["q"], 1)
    for url in ("http://[", "ftp://x", "localhost:1", "http://\ud800"):
        with pytest.raises(RetrievalError):
            RemoteRetriever(url, probe=None, retries=0).search(["q"], 1)


def test_a_retriever_behind_the_route_that_fails():
    from fastapi.testclient import TestClient

    app = create_app(client(lambda request: httpx.Response(503)))
    r = TestClient(app, raise_server_exceptions=False).post("/retrieve", json=dict(query="a"))
    assert r.status_code == 502 and "503" in r.json()["detail"]
