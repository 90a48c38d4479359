"""Files from elsewhere and files of our own: one policy for all readers of published lines, damage
that is noticed, and files that are whole or absent"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.attention_rhythm.analysis import load_prompts
from llmpapers.core.files import json_lines, k_core, lines_of, new_file, unpacked
from llmpapers.dspnet import logs
from llmpapers.dspnet.train import _note_folder
from llmpapers.graph2eval import bench_io
from llmpapers.graph2eval.bench_io import load_bench, save_bench
from llmpapers.graph2eval.graph import KG
from llmpapers.qagent.retrieval import load_docs
from llmpapers.rere import data
from llmpapers.rere.semantic_ids import SemanticIds
from llmpapers.rere.sft import same_rows
from llmpapers.rere.trie import ItemTrie
from llmpapers.smec.compressor import Truncation
from llmpapers.smec.data import load_beir
from llmpapers.vamo.causal import save_planner
from llmpapers.vamo.planner import MultiTaskPlanner


def zipped(raw, *names):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as z:
        for name in names or ("x",):
            z.writestr(name, raw)
    return made.getvalue()


packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
packers[".zip"] = zipped


# ---- one policy for all readers ------------------------------------------------------------------
class Reader:
    "A reader of one JSON object a line: a good line, and what was read of a file"

    fatal, file = False, "a.jsonl"

    def line(self, id):
        raise NotImplementedError

    def read(self, path):
        "Ids that were read, and how many lines were refused"
        raise NotImplementedError


class RereAmazon(Reader):
    file = "a_5.json"

    def line(self, id):
        row = dict(reviewerID=id, asin="i", unixReviewTime=1_400_000_000)
        return dict(overall=5.0, verified=True, **row)

    def read(self, path):
        (path.parent / "meta_a.json").write_text('{"asin": "i", "title": "T"}\n')
        log = data.load_amazon(path)
        return log.events.user.tolist(), int(log.problems.rows.sum())


class DspnetAmazon(RereAmazon):
    def read(self, path):
        events = logs.load_amazon(path)
        return events.user.tolist(), int(logs.problems_of(events).rows.sum())


class RereYelp(Reader):
    file = "yelp_academic_dataset_review.json"

    def line(self, id):
        return dict(user_id=id, business_id="b", date="2018-07-07 22:09:11")

    def read(self, path):
        business = dict(business_id="b", name="B", categories="Restaurants")
        (path.parent / "yelp_academic_dataset_business.json").write_text(json.dumps(business))
        log = data.load_yelp(path.parent)
        return log.events.user.tolist(), int(log.problems.rows.sum())


class DspnetYelp(RereYelp):
    def read(self, path):
        events = logs.load_yelp(path.parent)
        return events.user.tolist(), int(logs.problems_of(events).rows.sum())


class Qagent(Reader):
    def line(self, id):
        return dict(id=id, text="x")

    def read(self, path):
        got = load_docs(path, max_refused=1)
        return [d.id for d in got.docs], len(got.refused)


class Graph2eval(Reader):
    def line(self, id):
        return dict(task_id=id, task_type="t", prompt="?", gold_answer="12")

    def read(self, path):
        got = load_bench(path.parent)
        return [t.id for t in got.tasks], sum(got.manifest["skipped"].values())


class Smec(Reader):
    fatal, file = True, "corpus.jsonl"

    def line(self, id):
        return dict(_id=id, title="", text=id)

    def read(self, path):
        (path.parent / "queries.jsonl").write_text('{"_id": "q", "text": "x"}')
        (path.parent / "qrels").mkdir(exist_ok=True)
        (path.parent / "qrels" / "test.tsv").write_text("q\tu1\t1\n")
        return load_beir(str(path.parent)).doc_ids, 0


class Prompts(Reader):
    fatal = True

    def line(self, id):
        return dict(question=id)

    def read(self, path):
        got = []

        def tokenizer(text):
            got.append(text)
            return dict(input_ids=[0])

        load_prompts(str(path), 2, tokenizer)
        return got, 0


readers = {r.__name__: r() for r in Reader.__subclasses__()}
readers |= dict(DspnetAmazon=DspnetAmazon(), DspnetYelp=DspnetYelp())
every = pytest.mark.parametrize("name", readers)
of_logs = pytest.mark.parametrize("name", [n for n in readers if "Amazon" in n or "Yelp" in n])


def written(reader, folder, *lines, pack=bytes):
    raw = [x if isinstance(x, bytes) else json.dumps(reader.line(x)).encode() for x in lines]
    (folder / reader.file).write_bytes(pack(b"\n".join(raw) + b"\n"))
    return folder / reader.file


bad_lines = {
    "nested too deeply": b"[" * 100_000,
    "not JSON": b'{"x": ',
    "not a JSON object": b"[1]",
    "deep object": b'{"x": ' * 50_000,
}


@pytest.mark.parametrize("kind", bad_lines)
@every
def test_a_bad_line_costs_a_line_or_is_named(tmp_path, name, kind):
    reader = readers[name]
    path = written(reader, tmp_path, "u1", bad_lines[kind], "u2")
    if reader.fatal:
        with pytest.raises(ValueError, match=rf"{reader.file}'?, line 2 is (not|nested)"):
            reader.read(path)
    else:
        assert reader.read(path) == (["u1", "u2"], 1)


@every
def test_blank_lines_are_no_fault_and_count(tmp_path, name):
    reader = readers[name]
    path = written(reader, tmp_path, "u1", b"", b"  \r", "u2", b"", b"")
    assert reader.read(path) == (["u1", "u2"], 0)
    if reader.fatal:
        with pytest.raises(ValueError, match="line 3 is not JSON"):
            reader.read(written(reader, tmp_path, "u1", b"", b"x"))


@every
def test_names_that_are_no_text_are_never_joined(tmp_path, name):
    "Two different ids that are no UTF-8; a corpus keeps one such text, which it reports"
    reader = readers[name]
    bad = [json.dumps(reader.line("AA")).encode().replace(b"AA", x) for x in (b"\xff", b"\xfe")]
    path = written(reader, tmp_path, "u1", "u2", *bad)
    if reader.fatal:
        with pytest.raises(ValueError, match="line 3 is not UTF-8"):
            reader.read(path)
    elif name == "Qagent":
        assert reader.read(path) == (["u1", "u2", "\ufffd"], 1)
        assert load_docs(path, max_refused=1).damaged == [3]
    else:
        assert reader.read(path) == (["u1", "u2"], 2)


@pytest.mark.parametrize("id", ["\ud800", "a\udfff", "nan", "None", "<NA>", "\ufffd"])
@of_logs
def test_what_is_no_name_costs_a_line(tmp_path, name, id):
    reader = readers[name]
    assert reader.read(written(reader, tmp_path, "u1", id, "u2")) == (["u1", "u2"], 1)


@of_logs
def test_times_that_no_number_holds_cost_a_line(tmp_path, name):
    reader, lines = readers[name], []
    for k, time in enumerate((10**400, "\ud800", [1], "1" * 400)):
        row = reader.line(f"v{k}")
        field = "date" if "date" in row else "unixReviewTime"
        lines.append(json.dumps(row | {field: time}).encode())
    assert reader.read(written(reader, tmp_path, "u1", *lines, "u2")) == (["u1", "u2"], 4)


@pytest.mark.parametrize("end", packers)
@every
def test_packed_files_are_known_by_their_first_bytes(tmp_path, name, end):
    reader = readers[name]
    path = written(reader, tmp_path, "u1", "u2", pack=packers[end])
    assert reader.read(path) == (["u1", "u2"], 0)
    if end:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{reader.file} cannot be read to its end"):
            reader.read(path)


@pytest.mark.parametrize("end", [e for e in packers if e])
@pytest.mark.parametrize("name", ["RereAmazon", "DspnetAmazon", "Qagent", "Prompts"])
def test_the_name_of_a_packed_file(tmp_path, name, end):
    reader = readers[name]
    path = written(reader, tmp_path, "u1", "u2", pack=packers[end])
    named = path.rename(path.with_name(path.name + end))
    assert reader.read(named) == (["u1", "u2"], 0)
    named.write_bytes(b"<html>no download today</html>")
    with pytest.raises(ValueError, match=f"{named.name} cannot be read: it is not packed"):
        reader.read(named)


@pytest.mark.parametrize("name", ["RereAmazon", "DspnetAmazon"])
def test_reviews_of_2023_that_name_only_the_variant(tmp_path, name):
    row = dict(user_id="u9", asin="i", timestamp=1_400_000_000_000)
    row |= dict(rating=5.0, verified_purchase=True)
    path = written(readers[name], tmp_path, "u1", json.dumps(row).encode())
    assert readers[name].read(path) == (["u1", "u9"], 0)


def test_tables_of_dspnet_join_no_names(tmp_path):
    rows = [b"u1,1,5,pv,1511544070", b"\xff,1,5,pv,1511544071", b"\xfe,2,5,pv,1511544072"]
    rows += [b"nan,1,5,pv,1511544073", b"u1,\xff,5,pv,1511544074", b"u2,1,\xff,pv,1511544075"]
    path = tmp_path / "b.csv"
    path.write_bytes(b"\n".join(rows) + b"\n")
    events = logs.load_behaviour(path)
    assert events.user.tolist() == ["u1", "u2"]  # the column that is not read may be damaged
    found = {r.reason: (r.rows, r.first_line) for r in logs.problems_of(events).itertuples()}
    assert found == {"not UTF-8": (3, 2), "no user": (1, 4)}
    path.write_bytes(gzip.compress(path.read_bytes()))  # packed, though its name does not say it
    assert logs.load_behaviour(path).equals(events)


def test_own_tables_of_dspnet():
    user = pd.Series(["a", "half \ud800", "NaN", None, "b"], dtype=object)
    table = pd.DataFrame(dict(user=user, item=range(5), scene="none", time=range(5)))
    events = logs.as_events(table)
    assert events.item.tolist() == [0, 4] and set(events.scene) == {"none"}
    assert logs.problems_of(events).reason.tolist() == ["not UTF-8", "no user"]


def test_a_limit_counts_lines_and_reads_no_further(tmp_path):
    reader = readers["Qagent"]
    path = written(reader, tmp_path, "u1", b"", "u2", "u3", pack=gzip.compress)
    for limit, ids in ((1, ["u1"]), (2, ["u1"]), (3, ["u1", "u2"]), (9, ["u1", "u2", "u3"])):
        assert [d.id for d in load_docs(path, limit).docs] == ids
    path.write_bytes(gzip.compress(b'{"id": 1, "text": "x"}\n' * 9**5)[:-9])
    assert len(load_docs(path, 1, max_refused=1).docs) == 1  # the fault lies behind
    with pytest.raises(ValueError, match="cannot be read to its end"):
        load_docs(path, max_refused=1)


def test_a_prompt_without_a_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a"}\n\n{"question": 5}\n{"x": 1}\n')

    def tokenizer(text):
        return dict(input_ids=[0])

    assert load_prompts(str(tmp_path / "a.jsonl"), 1, tokenizer) == [[0]]
    with pytest.raises(ValueError, match="line 3 has no field 'question' with a text"):
        load_prompts(str(tmp_path / "a.jsonl"), 3, tokenizer)


# ---- the reader itself ---------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(list(packers)), st.booleans())
def test_lines_are_those_of_the_bytes(tmp_path_factory, raw, end, mark):
    raw = b"\xef\xbb\xbf" * mark + b"x" + raw  # no content that looks packed
    path = tmp_path_factory.mktemp("files") / "x"
    path.write_bytes(packers[end](raw))
    lines = enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    found = [(n, line.removesuffix(b"\n")) for n, line in lines_of(path)]
    assert found == [(n, line) for n, line in lines if line.strip()]


def test_archives_that_cannot_be_read(tmp_path):
    locked = bytearray(zipped(b"secret"))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(mark) + at] |= 1  # the bit that asks for a password
    unknown = bytearray(zipped(b"text"))
    for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        unknown[unknown.index(mark) + at] = 97
    future = bytearray(zipped(b"text"))
    future[future.index(b"PK\x01\x02") + 6] = 99  # the version that is needed
    for raw, why in (
        (bytes(locked), "a.zip cannot be read: .*password"),
        (bytes(unknown), "a.zip cannot be read: .*not supported"),
        (bytes(future), "a.zip cannot be read: .*version"),
        (zipped(b"", "b", "c"), "a.zip holds 2 files"),
        (zipped(b"", "folder/"), "a.zip holds 0 files"),
        (b"", "a.zip cannot be read: it is not packed"),
    ):
        (tmp_path / "a.zip").write_bytes(raw)
        for read in (lambda p: list(lines_of(p)), unpacked):
            with pytest.raises(ValueError, match=why):
                read(tmp_path / "a.zip")


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_a_changed_byte_is_an_error_or_changes_no_line(tmp_path, end):
    raw = b"".join(b'{"id": %d}\n' % i for i in range(400))
    whole, errors = packers[end](raw), []
    places = range(10, len(whole), 7)  # without its first bytes the file is another one
    for at in places:
        bad = bytearray(whole)
        bad[at] ^= 255
        (tmp_path / "x").write_bytes(bytes(bad))
        try:
            lines = b"".join(line for _, line in lines_of(tmp_path / "x"))
        except ValueError as e:
            errors.append(str(e))
        else:
            assert lines == raw, at
    assert len(errors) > 0.9 * len(places)
    assert all(e.startswith("x cannot be read to its end") for e in errors)


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_streams_behind_each_other_are_read_and_a_fault_in_any_is_noticed(tmp_path, end):
    raw = b"".join(b'{"id": %d}\n' % i for i in range(3000))
    one, file, padding = packers[end](raw), tmp_path / "x", b"\0" * 8
    for whole, times in ((one * 3, 3), (one + packers[end](b"") + one, 2), (one + padding, 1)):
        file.write_bytes(whole)
        assert b"".join(line for _, line in lines_of(file)) == raw * times
    if end == ".xz":
        file.write_bytes(one + padding + one)
        assert b"".join(line for _, line in lines_of(file)) == raw * 2
    for at in (12, len(one) // 2):
        spoilt = one[:at] + bytes([one[at] ^ 255]) + one[at + 1 :]
        for whole in (one + spoilt + one, one + one[:at], one + b"more"):
            file.write_bytes(whole)
            with pytest.raises(ValueError, match="x cannot be read to its end"):
                list(lines_of(file))


def test_a_pipe_is_refused_before_its_beginning_is_lost(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def write():
        with contextlib.suppress(BrokenPipeError):
            (tmp_path / "pipe").write_bytes(b"1\n2\n")

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(ValueError, match="pipe cannot be read: it is a pipe"):
        list(lines_of(tmp_path / "pipe"))
    writer.join()


def test_people_whose_names_look_like_words_for_nothing_stay():
    table = pd.DataFrame(
        dict(user=["Nat", "Nan", "none", "NaN"], item=range(4), scene="s", time=range(4))
    )
    assert logs.as_events(table).user.tolist() == ["Nat", "Nan", "none"]
    assert [data._id(x) for x in ("Nat", "Nan", "NaN", "NULL")] == ["Nat", "Nan", "", ""]


def test_what_the_caller_raises_stays_what_it_is(tmp_path):
    (tmp_path / "x").write_bytes(b"{}\nx\n")
    for error in (OSError("mine"), ValueError("mine"), EOFError("mine")):

        def raises(number, why, error=error):
            raise error

        with pytest.raises(type(error), match="^mine$"):
            list(json_lines(tmp_path / "x", raises))

    def refuse(number, why):
        raise KeyError(number, why)

    with pytest.raises(KeyError, match="not JSON"):
        list(json_lines(tmp_path / "x", refuse))
    with pytest.raises(FileNotFoundError):
        list(lines_of(tmp_path / "y"))
    with pytest.raises(ValueError, match="IsADirectoryError"):
        list(lines_of(tmp_path))


# ---- k-core --------------------------------------------------------------------------------------
def peeled(df, k):
    "The core by leaving out rare users and items with pandas, as often as needed"
    while True:
        enough = [df.groupby(c)[c].transform("size") >= k for c in ("user", "item")]
        if (keep := enough[0] & enough[1]).all():
            return df
        df = df[keep]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from("abcdef")), max_size=60),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_one_core_for_all(rows, k, order):
    index = list(range(5, 5 + len(rows)))
    order.shuffle(index)
    df = pd.DataFrame(rows, columns=["user", "item"], index=index)
    df.attrs["problems"] = [("file", "reason", 1, 2)]
    core = k_core(df, k)
    pd.testing.assert_frame_equal(core, peeled(df, k))
    assert core.attrs == df.attrs
    assert logs.k_core is data.k_core is k_core


@pytest.mark.parametrize("core", [logs.k_core, data.k_core])
def test_an_event_of_nobody_is_named(core):
    table = pd.DataFrame(dict(user=["a", None, "a"], item=[1, 1, 1]))
    with pytest.raises(ValueError, match="df has no user in row 1"):
        core(table, 2)
    with pytest.raises(ValueError, match="no column 'item'"):
        core(table[["user"]], 2)


# ---- files of our own ----------------------------------------------------------------------------
def save_trie(folder):
    return ItemTrie.from_sequences([[1, 2], [1, 3]], eos_id=9).save(folder / "trie.safetensors")


def save_ids(folder):
    return SemanticIds(torch.tensor([[0, 1], [1, 0]]), (2, 2)).save(folder)


def save_rows(folder):
    (folder / "rows.json").unlink(missing_ok=True)
    same_rows(folder, ["a", "b"])


def save_compressor(folder):
    c = Truncation((4, 2)).fit(None, np.eye(8, dtype=np.float32))
    c.save(folder / "c.safetensors")


def save_plan(folder):
    p = MultiTaskPlanner(8, 3, d=8, T=12, N=4, blocks=2, periods=(4, 3), inv_width=8)
    save_planner(p, folder / "p.pt")


def save_graph(folder):
    graph = KG()
    graph.add("a", "page")
    graph.save(folder)


def save_tasks(folder):
    save_bench(folder, [])


def save_note(folder):
    _note_folder(folder, dict(steps=1))


savers = [save_trie, save_ids, save_rows, save_compressor, save_plan, save_graph, save_tasks]
savers.append(save_note)


@pytest.fixture
def renamed(monkeypatch):
    "Sources of renames, each with what was forced to the disk before"
    seen, synced, replace = [], [], os.replace
    monkeypatch.setattr(os, "fsync", lambda f: synced.append(os.fstat(f).st_ino))

    def watched(source, target):
        seen.append((str(source), os.stat(source).st_ino in synced))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    return seen


@pytest.mark.parametrize("save", savers)
def test_a_file_is_on_the_disk_before_its_name_and_no_two_writers_share_one(
    tmp_path, renamed, save
):
    save(tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    save(tmp_path)
    assert len({source for source, _ in renamed}) == len(renamed) >= 2
    assert all(synced for _, synced in renamed)
    assert {f.name for f in tmp_path.iterdir()} == names


@pytest.mark.parametrize("save", savers)
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, save):
    def full(*args):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), new_file(path) as part:
            part.write_text("half")
            raise error
    with pytest.raises(FileNotFoundError), new_file(path):
        pass  # nothing was written
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path, faults, start = tmp_path / "a.txt", [], threading.Barrier(4)
    path.write_text("0" * 50_000)

    def write(letter):
        start.wait()
        for _ in range(30):
            with new_file(path) as part, open(part, "w") as f:
                for _ in range(5):
                    f.write(letter * 10_000)

    def read():
        start.wait()
        for _ in range(200):
            text = path.read_text()
            if len(text) != 50_000 or len(set(text)) != 1:
                faults.append(text[:1])

    with ThreadPoolExecutor(4) as pool:
        jobs = [*(pool.submit(write, x) for x in "abc"), pool.submit(read)]
    assert all(j.result() is None for j in jobs)
    assert not faults and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_keeps_its_mode_and_a_link_its_target(tmp_path):
    file, link = tmp_path / "a.txt", tmp_path / "link.txt"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    with new_file(link) as part:
        part.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError, match="path=.*no/a.txt': its folder does not exist"):
        with new_file(tmp_path / "no" / "a.txt") as part:
            part.write_text("new")


def test_a_list_of_the_released_benchmark_loses_the_entry_that_is_damaged(tmp_path):
    rows = [{"no": "a\ufffd"}, {"no": "caf\u00e9"}, {"no": "b"}]
    whole = json.dumps(rows, ensure_ascii=False).encode()
    for raw, damaged in ((whole, 0), (whole.replace("\u00e9".encode(), b"\xe9"), 2)):
        (tmp_path / "tasks.json").write_bytes(raw)
        found = []
        kept = list(bench_io._rows(tmp_path, found.append))
        assert found == ["not UTF-8"] * damaged and len(kept) == 3 - damaged
