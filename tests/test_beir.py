"""Folders in the formats that the field publishes: what is read, what is left out and counted, what
is refused and where"""

import json
import re
import warnings

import numpy as np
import pytest

from llmpapers.core.ranking import as_relevance, exact_search, ndcg_at_k
from llmpapers.smec.compressor import Truncation, evaluate
from llmpapers.smec.data import load_beir, make_retrieval

datasets = pytest.importorskip("datasets")


def jsonl(file, rows, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + end for r in rows)
    file.write_bytes(text.encode())


def beir(folder, corpus, queries, **splits):
    "A folder; each split is the text of its judgements"
    jsonl(folder / "corpus.jsonl", corpus)
    jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    for name, text in splits.items():
        (folder / "qrels" / f"{name}.tsv").write_bytes(text.encode())
    return str(folder)


def doc(i, text, title=""):
    return dict(_id=i, title=title, text=text, metadata={})


HEAD = "query-id\tcorpus-id\tscore\n"
DOCS = [doc("d1", "sleeps", "Cat"), doc("d2", "barks", "Dog"), doc("d3", "sings")]
ASKED = [dict(_id="q1", text="Who sleeps?"), dict(_id="q2", text="Who sings?")]


def told(call):
    "The result, and the text of its warnings"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        res = call()
    return res, " ".join(str(w.message) for w in found if w.category is UserWarning)


def test_a_clean_folder_says_nothing(tmp_path):
    path = beir(tmp_path, DOCS, ASKED, test=HEAD + "q1\td1\t2\nq2\td3\t1\n")
    t, said = told(lambda: load_beir(path))
    assert said == "" and t.docs == ["Cat sleeps", "Dog barks", "sings"]
    assert t.relevance == [{0: 2.0}, {2: 1.0}] and t.query_ids == ["q1", "q2"]
    assert t.doc_ids == ["d1", "d2", "d3"] and t.same.tolist() == [-1, -1]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_newline_ends_a_line(tmp_path, sign):
    text = f"one{sign}two"
    rows = [doc("d1", text) if sign != "\r" else doc("d1", "one two"), doc("d2", "x")]
    end = "\r\n" if sign == "\r" else "\n"
    beir(tmp_path, DOCS, [dict(_id="q1", text=text)], test=f"q1\td2\t1{end}")
    jsonl(tmp_path / "corpus.jsonl", rows, end)
    t = load_beir(str(tmp_path))
    assert t.docs == [rows[0]["text"], "x"] and t.queries == [text] and t.relevance == [{1: 1.0}]


def test_a_byte_order_mark_belongs_to_no_id(tmp_path):
    path = beir(tmp_path, DOCS, ASKED, test="\ufeff" + HEAD + "q1\td1\t1\n")
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_beir(path).relevance == [{0: 1.0}]


def test_what_is_left_out_is_counted(tmp_path):
    "NFCorpus, FiQA and TREC-COVID: dangling ids, empty texts, rows twice, grades below 0"
    corpus = [*DOCS, doc("d4", "", None), doc("d5", "  "), DOCS[1]]
    asked = [*ASKED, dict(_id="q3", text=""), ASKED[0]]
    rows = "q1\td1\t1.0\nq1\td1\t1\nq1\tgone\t2\nq1\td4\t1\nq9\td1\t1\nq3\td1\t1\nq2\td2\t-1\n"
    t, said = told(lambda: load_beir(beir(tmp_path, corpus, asked, test=HEAD + rows)))
    assert t.queries == ["Who sleeps?", "Who sings?"] and t.relevance == [{0: 1.0}, {1: 0.0}]
    assert t.doc_ids == ["d1", "d2", "d3"]
    for count, what in (
        (2, "judgements of absent or empty documents"),
        (2, "judgements of absent or empty queries"),
        (2, "documents without text"),
        (1, "queries without text"),
        (1, "documents that came twice"),
        (1, "queries that came twice"),
        (1, "grades below 0"),
        (1, "judgements that came twice"),
    ):
        assert re.search(rf"\b{count} {what}", said), (what, said)
    as_relevance(t.relevance, len(t.docs))


def test_a_judgement_twice_with_one_grade_counts_once(tmp_path):
    path = beir(tmp_path, DOCS, ASKED, test="q1\td1\t1\nq1\td1\t1.0\n")
    t, said = told(lambda: load_beir(path))
    assert t.relevance == [{0: 1.0}] and "1 judgements that came twice" in said


def test_half_a_surrogate_pair_is_an_unknown_character(tmp_path):
    beir(tmp_path, DOCS, ASKED, test="q1\td1\t1\n")
    (tmp_path / "corpus.jsonl").write_text(
        r'{"_id": "d1", "text": "bad \ud83d, good \ud83d\ude00"}'
    )
    assert load_beir(str(tmp_path)).docs == ["bad \ufffd, good \U0001f600"]


def test_published_splits_and_a_query_that_is_a_document(tmp_path):
    "ArguAna: the query is in the corpus; SciFact: training judgements of their own"
    corpus = [doc("a", "Cats are fine. They sleep.", "pets"), doc("b", "Cats are not fine.")]
    asked = [
        dict(_id="a", text="Cats are  fine. They sleep."),
        dict(_id="b", text="another text of the same number"),
    ]
    path = beir(tmp_path, corpus, asked, train="b\ta\t1\n", dev="a\tb\t1\n", test="a 0 b 1\n")
    t = load_beir(path, ("train", "dev", "test"))
    assert [v.tolist() for v in t.splits.values()] == [[0], [1], [2]]
    assert t.query_ids == ["b", "a", "a"] and t.same.tolist() == [-1, 0, 0]
    with pytest.raises(ValueError, match="split='valid' has no judgements.*dev, test, train"):
        load_beir(path, "valid")
    vectors = np.eye(2, dtype=np.float32)
    q = vectors[[1, 0, 0]]
    p = make_retrieval(q, vectors, t.relevance, parts=t.splits.values(), same=t.same)
    assert [p.train.tolist(), p.valid.tolist(), p.test.tolist()] == [[0], [1], [2]]
    found = exact_search(q, vectors, 2, exclude=t.same)
    assert found.ids.tolist() == [[1, 0], [1, -1], [1, -1]]
    assert ndcg_at_k(found, p.relevance)[2] == 1
    assert evaluate(Truncation((2,)).fit(None, vectors), p) == {2: 1.0}
    with pytest.raises(ValueError, match="a query twice"):
        make_retrieval(q, vectors, t.relevance, parts=([0], [1], [1]))


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": ',
            "corpus.jsonl, line 2 is not JSON",
        ),
        ("corpus.jsonl", "[1]", "corpus.jsonl, line 1 is not a JSON object"),
        ("corpus.jsonl", '\n{"text": "a"}', "corpus.jsonl, line 2 lacks the column _id"),
        ("queries.jsonl", '{"_id": "q1"}', "queries.jsonl, line 1 lacks the column text"),
        ("queries.jsonl", '{"_id": "q1", "text": 3}', "queries.jsonl, line 1, column text: 3"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"id": "d1", "text": "b"}',
            "corpus.jsonl, line 2, column id: 'd1' came before with another text",
        ),
        ("qrels/test.tsv", HEAD + "q1\td1\n", "test.tsv, line 2 has 2 columns"),
        ("qrels/test.tsv", "q1\td1\tnan\n", "test.tsv, line 1, column score: 'nan'"),
        ("qrels/test.tsv", HEAD + HEAD, "test.tsv, line 2, column score: 'score'"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t2\n", "line 2, column score: document 'd1' came"),
        ("qrels/test.tsv", HEAD, "has no judgement of a document"),
        ("qrels/test.tsv", b"q1\td1\t1\nq\xff\td1\t1\n", "test.tsv, line 2 is not UTF-8"),
    ],
)
def test_refusals_name_their_place(tmp_path, name, text, message):
    path = beir(tmp_path, DOCS, ASKED, test="q1\td1\t1\n")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_beir(path)


# ---- MTEB ----------------------------------------------------------------------------------------
ROWS = dict(
    corpus=[dict(id="d1", title="Cat", text="sleeps"), dict(id="d2", title="", text="sings")],
    queries=[dict(id="q1", text="Who sleeps?")],
    qrels=[{"query-id": "q1", "corpus-id": "d1", "score": 1}],
)


@pytest.mark.parametrize("judged", ["default", "qrels"])
@pytest.mark.parametrize("key", ["id", "_id"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("readme", [True, False], ids=["configured", "folders"])
def test_copies_of_mteb(tmp_path, monkeypatch, judged, key, kind, readme):
    "Parquet or JSON lines, configurations in README.md or folders alone, either name of the id"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, head = tmp_path / "set", ""
    for table, rows in ROWS.items():
        config = judged if table == "qrels" else table
        rows = [{key if k == "id" else k: v for k, v in r.items()} for r in rows]
        split = "test" if table == "qrels" or not readme else table
        file = folder / config / f"{'test' if table == 'qrels' else 'part'}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "jsonl":
            jsonl(file, rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(file))
        head += f"- config_name: {config}\n  data_files:\n  - split: {split}\n"
        head += f"    path: {config}/{file.name}\n"
    if readme:
        (folder / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    t, said = told(lambda: load_beir(str(folder)))
    assert t.docs == ["Cat sleeps", "sings"] and t.relevance == [{0: 1.0}] and not said
    assert t.doc_ids == ["d1", "d2"] and t.query_ids == ["q1"]
    with pytest.raises(ValueError, match="split='dev' has no judgements; there are test"):
        load_beir(str(folder), "dev")
