"Generated tasks have one right answer, whatever the graph; patterns and readers have limits"

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from llmpapers.graph2eval.agents import GoldReader, GraphAgent
from llmpapers.graph2eval.browser import HttpBrowser, Policy, crawl, direct, parse_page
from llmpapers.graph2eval.documents import (
    Document,
    DocumentError,
    Element,
    PdfLimits,
    load_html,
    load_pdf,
    render_report,
    write_blocks,
)
from llmpapers.graph2eval.graph import KG, HashEmbedder, build_document_graph, build_web_graph
from llmpapers.graph2eval.metapath import PatternError, match
from llmpapers.graph2eval.site import Site
from llmpapers.graph2eval.tasks import (
    AnswerIs,
    KGFreeGenerator,
    KGFreeQuestions,
    UrlIs,
    generate_document_tasks,
    generate_web_tasks,
    goal_from_dict,
    task_from_dict,
    task_to_dict,
)
from llmpapers.graph2eval.world import make_world


def of(*paragraphs, many=False):
    "A graph of one document, or of a document for each paragraph"
    if many:
        docs = [load_html(f"<p>{p}</p>", f"d{k}") for k, p in enumerate(paragraphs)]
    else:
        docs = [load_html("".join(f"<p>{p}</p>" for p in paragraphs), "d0")]
    return build_document_graph(docs)


def every(kg, *types, n=40):
    return [t for seed in range(6) for t in generate_document_tasks(kg, n, types or None, seed)]


# ---- one right answer ----------------------------------------------------------------------------
def test_a_sentence_that_two_numbers_complete_is_not_asked():
    assert not every(of("It rose by 5 percent.", "It rose by 7 percent."), "extraction")
    one = every(of("It rose by 5 percent.", "It rose by 7 percent.", many=True), "extraction")
    assert {t.instruction[-5:] for t in one} == {'"d0")', '"d1")'}
    assert every(of("It rose by 5 percent.", "It rose by much percent."), "extraction")


def test_what_another_document_says_is_said():
    kg = of(*(f"It rose by {k} percent." for k in (5, 7, 9, 11)), many=True)
    said = {kg.attrs[k]["text"] for k in kg.nodes("paragraph")}
    asked = every(kg, "verification")
    assert asked
    for t in asked:
        assert t.goal.value == ("yes" if t.instruction.split('"')[1] in said else "no")


def tables(tmp_path, *all_rows, sentences=("See Table 1 for it.",)):
    blocks = [("title", "T"), *(("paragraph", x) for x in sentences)]
    blocks += [("table", (1, f"Units {k}", rows)) for k, rows in enumerate(all_rows)]
    write_blocks(blocks, tmp_path / "x.pdf")
    return build_document_graph([load_pdf(tmp_path / "x.pdf")])


def test_tables_and_rows_of_one_name_are_not_asked_for(tmp_path):
    head = ["Region", "Units"]
    two = tables(tmp_path, [head, ["north", "1"]], [head, ["north", "7"]])
    assert not every(two, "table_qa", "cross_reference")
    kg = tables(tmp_path, [head, ["north", "1"], ["north", "2"], ["south", "3"]])
    assert {t.goal.value for t in every(kg, "table_qa")} == {"3"}
    kg = tables(tmp_path, [["Region", "Units", "Units"], ["north", "1", "2"]])
    assert not every(kg, "table_qa")


def test_one_sentence_about_two_tables_is_not_asked(tmp_path):
    rows = [["Region", "Units"], ["north", "1"], ["south", "2"]]
    blocks = [("title", "T"), ("paragraph", "Sales are in Table 1."), ("paragraph", "x y z")]
    blocks += [("paragraph", "Sales are in Table 2.")]
    blocks += [("table", (k, "Units", [*rows, ["west", str(k)]])) for k in (1, 2)]
    write_blocks(blocks, tmp_path / "x.pdf")
    kg = build_document_graph([load_pdf(tmp_path / "x.pdf")])
    assert not every(kg, "cross_reference", "aggregation")


def test_blank_cells_do_not_stop_the_rival_without_edges():
    rows = [["Region", "Units"], ["north", ""], ["south"], ["west", "3"]]
    said = Element("d#p1/paragraph1", "paragraph", "Sales are in Table 1.", 1)
    table = Element("d#p1/table1", "table", "", 1, meta=dict(rows=rows, number=1, caption=""))
    found = KGFreeQuestions([Document("d", (said, table))]).generate(2)
    assert {t.goal.value for t in found} == {"3"}


def test_a_name_with_two_numbers_is_not_compared():
    kg = of("In May Bada had 5 shops.", "In May Bada had 9 shops.", "In May Mire had 7 shops.")
    assert not every(kg, "comparison")


@pytest.mark.parametrize(
    "sentence, gold",
    [
        ("It fell by -7 points in May.", {"-7"}),
        ("It fell by \u22127 points in May.", {"\u22127"}),
        ("It rose 5-7 points in May.", set()),
        ("Route B12 has 12 stops now.", {"12"}),
        ("It was 13,5 metres high.", set()),
        ("It was 1,250 metres high.", {"1,250"}),
        ('He said "it was 5 metres" high.', set()),
    ],
)
def test_numbers_in_sentences(sentence, gold):
    asked = every(of(sentence), "extraction", "verification")
    assert {t.goal.value for t in asked if t.type == "extraction"} == gold
    for t in asked:
        assert t.goal.check("", {}, t.goal.value) and t.instruction.count('"') % 2 == 0
    for t in asked:
        if t.goal.value == "no":
            assert t.instruction.split('"')[1] != sentence


def pages_of(*sources):
    links = "".join(f"<a href=/{k}>{k}</a>" for k in range(len(sources)))
    home = parse_page("http://h/", f"<title>Home</title>{links}")
    return build_web_graph([home, *(parse_page(f"http://h/{k}", s) for k, s in enumerate(sources))])


def test_titles_and_names_that_cannot_be_quoted_are_left_out():
    fact = "<a href=/>Home</a><dl><dt>Stock<dd>{}</dl>"
    kg = pages_of(
        "<title>The &quot;Best&quot; Lamp</title>" + fact.format(3),
        "<title></title>" + fact.format(4),
        "<title>Lamp</title>" + fact.format(5),
        "<title>Chair</title><form action=/s><select name=s><option>up<option>do&quot;wn</select>"
        "<button>Go</button></form>",
    )
    asked = [t for seed in range(4) for t in generate_web_tasks(kg, 20, seed=seed)]
    assert asked and all(t.instruction.count('"') % 2 == 0 for t in asked)
    assert not any("Best" in t.instruction or '""' in t.instruction for t in asked)
    assert {t.type for t in asked} <= {"navigate", "lookup"}


def test_reports_still_give_all_kinds_of_questions(tmp_path):
    docs = []
    for i in range(2):
        render_report(make_world(0), i, tmp_path / "r.pdf")
        docs.append(load_pdf(tmp_path / "r.pdf", doc_id=f"R{i}"))
    kg = build_document_graph(docs, HashEmbedder())
    found = generate_document_tasks(kg, 24)
    assert len(found) == 24 and len({t.type for t in found}) == 8
    readers = GoldReader(kg, pixels=True), GraphAgent(kg, k=len(kg), pixels=True)
    for t in found:  # who is given everything finds what who is given the evidence finds
        assert len({r.answer(t) for r in readers}) == 1
    other = build_document_graph(docs[::-1], HashEmbedder())
    assert other.to_dict() == kg.to_dict()
    assert [t.key for t in generate_document_tasks(other, 24)] == [t.key for t in found]


# ---- patterns ------------------------------------------------------------------------------------
def complete(n):
    kg = KG()
    for k in range(n):
        kg.add(str(k), "Page")
    for a, b in itertools.permutations(range(n), 2):
        kg.link(str(a), str(b), "NavTo")
    return kg


def test_a_range_longer_than_the_graph_costs_nothing():
    start = time.process_time()
    assert len(match(complete(10), "Page ( -NavTo-> Page ){1,10}", limit=1)) == 1
    assert len(match(complete(10), "Page ( -NavTo-> * ){9,50}", limit=1)) == 1
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_a_search_without_end_is_an_error():
    kg = complete(11)
    kg.add("x", "Goal")
    with pytest.raises(PatternError, match="max_steps"):
        match(kg, "Page ( -NavTo-> Page ){1,9} -NavTo-> Goal", limit=1, max_steps=10_000)
    with pytest.raises(PatternError, match="goes beyond"):
        match(kg, "Page ( -NavTo-> Page ){1,1000000}")
    with pytest.raises(PatternError, match="groups in groups"):
        match(kg, "Page ( ( -NavTo-> Page ){1,40} ( -NavTo-> Page )? ){1,40}")


# ---- goals and tasks as data ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "d",
    [
        dict(goal="UrlIs", pth="/"),
        dict(goal="AnswerIs", kind="moeny", value="3"),
        dict(goal="All"),
        dict(goal="Not", of=dict(goal="x")),
        dict(),
        [],
    ],
)
def test_a_bad_goal_is_named(d):
    with pytest.raises(ValueError, match="goal|kind"):
        goal_from_dict(d)


def test_a_task_without_a_part_is_named():
    task = task_to_dict(every(of("It has 7 doors now."), "extraction")[0])
    for part in ("goal", "oracle", "evidence", "start"):
        with pytest.raises(ValueError, match="not a task"):
            task_from_dict({k: v for k, v in task.items() if k != part})


def test_a_generator_without_pages_says_so():
    with pytest.raises(ValueError, match="pages"):
        KGFreeGenerator([])
    with Site(make_world(0)) as site:
        pages = crawl(site.origin, HttpBrowser(Policy((site.origin,)), send=direct(site))).pages
    with pytest.raises(ValueError, match="n"):
        KGFreeGenerator(pages).generate(-1)
    with pytest.raises(ValueError, match="seed"):
        KGFreeGenerator(pages, seed=-1)


# ---- files ---------------------------------------------------------------------------------------
def test_a_small_file_that_unpacks_to_hours_of_drawing(tmp_path):
    import zlib

    drawing = zlib.compress(b"BT /F1 12 Tf (a) Tj ET\n" * 60_000)
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources "
        b"<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(drawing)
        + drawing
        + b"\nendstream",
    ]
    data, places = b"%PDF-1.4\n", []
    for k, body in enumerate(parts, 1):
        places.append(len(data))
        data += b"%d 0 obj\n" % k + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % x for x in places)
    data += b"xref\n0 5\n0000000000 65535 f \n" + table
    data += b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % data.index(b"xref")
    (tmp_path / "bomb.pdf").write_bytes(data)
    start = time.process_time()
    with pytest.raises(DocumentError, match="max_drawing"):
        load_pdf(tmp_path / "bomb.pdf")
    assert time.process_time() - start < 2 and len(data) < 10_000


def test_turned_text_is_skipped_with_a_reason(tmp_path):
    fpdf = pytest.importorskip("fpdf")
    pdf = fpdf.FPDF()
    pdf.add_page()
    pdf.set_font("Helvetica", size=12)
    pdf.text(20, 20, "This line stands upright.")
    with pdf.rotation(90, 100, 100):
        pdf.text(100, 100, "This line is turned.")
    pdf.output(str(tmp_path / "t.pdf"))
    doc = load_pdf(tmp_path / "t.pdf")
    assert [e.text for e in doc.elements] == ["This line stands upright."]
    assert "do not stand upright" in doc.meta["skipped"][0]


def test_files_are_bounded_in_time(tmp_path, monkeypatch):
    render_report(make_world(0), 0, tmp_path / "r.pdf")
    clock = itertools.count(0, 100)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(DocumentError, match="max_seconds"):
        load_pdf(tmp_path / "r.pdf", limits=PdfLimits(max_seconds=50))


def test_bytes_are_no_page():
    for bad in (None, b"<p>x</p>"):
        with pytest.raises(TypeError, match="source"):
            load_html(bad, "d")


# ---- a benchmark in files ------------------------------------------------------------------------
def a_row(**kw):
    row = dict(task_id="a", prompt="How many?", gold_answer="3.50", task_type="x")
    return row | kw


def written(tmp_path, *rows, name="t.jsonl", start=""):
    text = start + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_released_rows_are_read_once_and_whole(tmp_path):
    from llmpapers.graph2eval.bench_io import load_bench

    rows = [
        a_row(prompt="one\u2028two"),
        a_row(prompt="again"),
        a_row(task_id="b", gold_answer=["x", "y"]),
        a_row(task_id="c", gold_answer="A"),
        a_row(task_id="d", gold_answer="Yes"),
        a_row(task_id="e", gold_answer=dict(x=1)),
    ]
    found = load_bench(written(tmp_path, *rows, start="\ufeff"))
    goals = {t.id: t.goal for t in found.tasks}
    assert set(goals) == set("abcd") and found.tasks[0].instruction == "one\u2028two"
    for key, said in dict(a="3.5", b="Y, x", c="a", d="yes").items():
        assert goals[key].check("", {}, said)
    reasons = found.manifest["skipped"]
    assert len(reasons) == 2 and any("before" in r for r in reasons)


def test_a_list_in_a_json_file_is_read(tmp_path):
    from llmpapers.graph2eval.bench_io import load_bench

    (tmp_path / "t.json").write_text(json.dumps([a_row(), a_row(task_id="b"), "x"]))
    found = load_bench(tmp_path)
    assert len(found.tasks) == 2 and sum(found.manifest["skipped"].values()) == 1


def test_a_damaged_or_foreign_bench_says_so(tmp_path):
    from llmpapers.graph2eval.bench_io import load_bench, save_bench

    tasks = every(of("It has 7 doors now.", "It has 9 locks now."), "extraction")[:2]
    save_bench(tmp_path, tasks)
    good = (tmp_path / "manifest.json").read_text()
    for bad, why in (
        (good.replace('"format": 1', '"format": 99'), "format 99"),
        (good.replace('"tasks": 2', '"tasks": 77'), "77 tasks"),
        ("{", "manifest.json is no JSON"),
        ("[]", "must hold an object"),
    ):
        (tmp_path / "manifest.json").write_text(bad)
        with pytest.raises(ValueError, match=why):
            load_bench(tmp_path)


def test_what_was_saved_before_is_not_kept(tmp_path):
    from llmpapers.graph2eval.bench_io import load_bench, save_bench

    kg = of("It has 7 doors now.")
    tasks = every(kg, "extraction")[:1]
    save_bench(tmp_path, tasks, kg, make_world(0))
    save_bench(tmp_path, tasks)
    found = load_bench(tmp_path)
    assert found.kg is None and found.world is None and found.tasks == tasks


def test_a_mistyped_folder_is_named(monkeypatch):
    import huggingface_hub

    from llmpapers.graph2eval.bench_io import load_bench

    def nowhere(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    with pytest.raises(ValueError, match="no folder"):
        load_bench("nbench/folder")


# ---- Gymnasium -----------------------------------------------------------------------------------
@pytest.fixture()
def gym():
    from llmpapers.graph2eval.bench_io import GymTaskEnv
    from llmpapers.graph2eval.env import WebEnv

    with Site(make_world(0)) as site:
        pages = crawl(site.origin, HttpBrowser(Policy((site.origin,)), send=direct(site))).pages
        task = generate_web_tasks(build_web_graph(pages), 1, ["lookup"])[0]
        yield GymTaskEnv(WebEnv(site, "direct", max_steps=6), task)


@pytest.mark.parametrize(
    "said, kind, value",
    [
        ("click('3')", "click", ""),
        ('click("3")', "click", ""),
        ('click(bid="3")', "click", ""),
        ('```click("3")```', "click", ""),
        ('```python\nclick("3")\n```', "click", ""),
        ("send_msg_to_user('it\\'s 5')", "answer", "it's 5"),
        ('report_infeasible("no")', "answer", ""),
        ('select_option("3", ["a"])', "select", "a"),
        ('fill("3", value="x")', "fill", "x"),
        ('press("3", "Enter")', "press", ""),
        ("go_back()", "back", ""),
        ("noop(1000)", "scroll", ""),
        ("scroll(0, 200)", "scroll", ""),
    ],
)
def test_actions_as_browsergym_writes_them(gym, said, kind, value):
    gym.reset()
    action = gym.action_of(said)
    assert (action.kind, action.value) == (kind, value)
    assert not action.target or action.target == gym.last.page.widgets[3].id


@pytest.mark.parametrize(
    "said",
    ["I think", "click(3", "press('3', 'Tab')", "click('9999')", "open('x')", "click(f())"]
    + ["__import__('os').system('x')", "click('²')", "select_option('3', ['a', 'b'])", "(" * 5000],
)
def test_what_is_no_action_costs_a_step(gym, said):
    gym.reset()
    for k in range(6):
        obs, reward, ended, cut, _ = gym.step(said)
        assert "action" in obs["last_action_error"] and not ended and reward == 0
        assert cut == (k == 5)


def test_the_gym_begins_with_a_reset(gym):
    with pytest.raises(ValueError, match="reset"):
        gym.step("click('3')")
    assert gym.unwrapped is gym


# ---- sets ----------------------------------------------------------------------------------------
def test_bad_sizes_of_sets_are_named():
    from llmpapers.graph2eval.bench import discrimination
    from llmpapers.graph2eval.quality import check_static, dedupe, select_coverage

    kg = of("It has 7 doors now.")
    task = every(kg, "extraction")[0]
    assert "AnswerIs" in check_static(replace(task, goal=UrlIs("/")), kg).reason
    for q in ([1], [np.nan, 1]):
        with pytest.raises(ValueError, match="quality"):
            dedupe(["a", "a"], quality=q)
        with pytest.raises(ValueError, match="quality"):
            select_coverage([dict(a={1}), dict(a={2})], q, 1)
    with pytest.raises(ValueError, match="weights"):
        select_coverage([dict(a={1})], [1.0], 1, weights=dict(b=1))
    with pytest.raises(ValueError, match="n_boot"):
        discrimination(np.eye(3), [1, 2, 3], n_boot=-1)


def test_an_item_of_an_attack_is_text():
    from llmpapers.graph2eval.safety import injection

    assert "<script>" not in injection("fake button", item='"><script>').markup


def test_a_menu_begins_with_a_reset():
    from llmpapers.graph2eval.rl import MenuEnv

    with pytest.raises(ValueError, match="reset"):
        MenuEnv().step("1")


def test_a_goal_is_an_answer_that_can_be_given():
    with pytest.raises(ValueError):
        AnswerIs("number", "3,5")
