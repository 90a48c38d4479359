"Properties of worlds, documents, graph, patterns and pieces of the task generator"

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpapers.graph2eval.browser import parse_page
from llmpapers.graph2eval.documents import (
    DocumentError,
    load_html,
    load_pdf,
    recovered,
    references,
    write_blocks,
)
from llmpapers.graph2eval.graph import KG, build_document_graph, semantic_edges, semantic_edges_loop
from llmpapers.graph2eval.metapath import match
from llmpapers.graph2eval.metrics import answers_match, canonical, kind_of, token_f1
from llmpapers.graph2eval.sampling import StructSpec, sample_document, struct_match
from llmpapers.graph2eval.site import fresh_state, make_request, respond
from llmpapers.graph2eval.tasks import AnswerIs, goal_from_dict, goal_to_dict, task_key
from llmpapers.graph2eval.world import make_world, world_from_json

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

few = settings(quick, max_examples=5)


@quick
@given(st.integers(0, 10_000), st.integers(4, 30), st.integers(1, 8))
def test_a_world_is_its_json(seed, products, threads):
    world = make_world(seed, products, threads)
    assert world_from_json(world.to_json()) == world
    assert world.fingerprint() == make_world(seed, products, threads).fingerprint()


@quick
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_form_breaks_the_site(path, body):
    "Whatever is asked, the site answers, and only a known form changes a state"
    world, state = _world, fresh_state()
    for method in ("GET", "POST", "PUT"):
        answer, after = respond(world, state, make_request(method, "/" + path, body))
        assert 200 <= answer.status < 500 and state == fresh_state()
        assert answer.status in (200, 303) or after == state


_world = make_world(0)


@quick
@given(st.text(max_size=300))
def test_any_text_is_a_page(source):
    page = parse_page("http://h/", source)
    assert len({w.id for w in page.widgets}) == len(page.widgets)
    load_html(source, "d")


@few
@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=6, unique=True), st.integers(1, 5))
def test_a_pdf_comes_back(tmp_path, names, rows):
    table = [["Key", "Value"], *([f"{n}{k}", str(7 * k)] for n in names for k in range(rows))]
    blocks = [
        ("title", "Report"),
        ("paragraph", "See Table 2 for all of them."),
        ("heading", "1 A"),
    ]
    blocks += [("paragraph", f"Line about {n}, which is short." * 3) for n in names]
    blocks += [("table", (2, "Numbers", table))]
    blocks += [("figure", (1, "Bars from left to right: x, y; the end", dict(x=20, y=41)))]
    for columns in (1, 2):
        truth = write_blocks(blocks, tmp_path / "x.pdf", columns)
        shares = recovered(load_pdf(tmp_path / "x.pdf"), truth)
        assert min(shares.values()) == 1, shares


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", b"hello", b"\x00" * 500])
def test_what_is_no_pdf_says_so(tmp_path, data):
    (tmp_path / "bad.pdf").write_bytes(data)
    with pytest.raises(DocumentError, match="bad.pdf"):
        load_pdf(tmp_path / "bad.pdf")


def test_a_number_that_occurs_twice_is_referred_to_by_nothing(tmp_path):
    rows = [["Key", "Value"], ["a", "1"]]
    blocks = [("paragraph", "As Table 1 says, all is well."), ("heading", "Annex")]
    blocks += [("table", (1, "One", rows)), ("table", (1, "Two", [["Key", "Value"], ["b", "2"]]))]
    write_blocks(blocks, tmp_path / "x.pdf")
    kg = build_document_graph([load_pdf(tmp_path / "x.pdf")])
    assert kg.edges("refers_to") == [] and len(kg.nodes("table")) == 2
    assert references("Table 7.") == [("table", 7)]


@quick
@given(st.integers(2, 40), st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 50))
def test_blocks_give_the_edges_of_the_loop(n, seed, top_k, block):
    gen = np.random.default_rng(seed)
    E = gen.normal(size=(3, 6))[gen.integers(3, size=n)] + 0.4 * gen.normal(size=(n, 6))
    E /= np.linalg.norm(E, axis=1, keepdims=True)
    E[gen.integers(n)] = E[0]
    E[gen.integers(n)] = 0
    assert semantic_edges(E, 0.6, top_k, block) == semantic_edges_loop(E, 0.6, top_k)


def graph(edges, n=6):
    kg = KG()
    for k in range(n):
        kg.add(f"n{k}", "AB"[k % 2])
    for a, b, t in edges:
        kg.link(f"n{a}", f"n{b}", t)
    return kg


some_edges = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from("ef")), max_size=14
)


@quick
@given(some_edges)
def test_a_range_is_the_union_of_its_lengths(edges):
    kg = graph(edges)
    whole = match(kg, "A ( -e-> * ){0,2}")
    parts = [m for k in range(3) for m in match(kg, "A " + "-e-> * " * k)]
    assert sorted(m[1:] for m in whole) == sorted(m[1:] for m in parts)
    assert match(kg, "A ( -e-> * ){0,2}", limit=2) == whole[:2]
    for m in whole:
        assert len(set(m.nodes)) == len(m.nodes)
        for x, y, e in zip(m.nodes, m.nodes[1:], m.edges):
            assert kg.links[e][:2] == (x, y)


@quick
@given(some_edges, st.integers(0, 5), st.integers(0, 3))
def test_hops_grow(edges, start, k):
    kg = graph(edges)
    assert kg.khop([f"n{start}"], 0) == {f"n{start}"}
    assert kg.khop([f"n{start}"], k) <= kg.khop([f"n{start}"], k + 1)


@quick
@given(some_edges, st.integers(0, 1000))
def test_pieces_fit_their_template(edges, seed):
    kg, spec = graph(edges), StructSpec(("A",), ("e",), 2, 4, also=("B",))
    drawn = sample_document(kg, spec, 4, seed=seed)
    assert all(struct_match(kg, p.nodes, spec) for p in drawn)
    assert len(drawn) == 4 or drawn.reasons
    assert drawn == sample_document(kg, spec, 4, seed=seed)


@quick
@given(st.integers(0, 10**9))
def test_identifiers_are_not_numbers(n):
    assert not answers_match("id", f"00{n}", str(n))
    assert answers_match("number", f"{n:,}", f"{n}.0")
    assert kind_of(f"00{n}") == "id"


@quick
@given(st.text(max_size=30), st.text(max_size=30))
def test_words_are_compared_both_ways(a, b):
    assert token_f1(a, b) == token_f1(b, a) and 0 <= token_f1(a, b) <= 1
    for kind in ("number", "money", "date", "quantity", "yesno", "text", "id"):
        canonical(kind, a)


@quick
@given(st.text("ab12", min_size=1, max_size=10), st.lists(st.text(max_size=5), max_size=3))
def test_a_key_is_of_goal_and_evidence(value, evidence):
    goal = AnswerIs("text", value)
    assert goal_from_dict(goal_to_dict(goal)) == goal
    assert task_key(goal, evidence) == task_key(goal, evidence[::-1])
    assert task_key(goal, evidence) != task_key(AnswerIs("text", value + "x"), evidence)
