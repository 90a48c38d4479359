"""Logs in the formats in which they are published, with the accidents of such files; windows,
splits and prompts that bind a target to its row"""

import gzip
import json
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.rere.data import (
    Log,
    as_log,
    chronological_split,
    code_tokens,
    history_tokens,
    instructions,
    k_core,
    load_amazon,
    load_csv,
    load_movielens,
    load_yelp,
    make_windows,
    number_items,
    rere_filter,
    sequence_windows,
    sid_format,
    title_format,
)


def write(path, *lines, packed=False):
    "A file of lines; objects as JSON"
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = b"".join(x if isinstance(x, bytes) else (json.dumps(x) + "\n").encode() for x in lines)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def reasons(log):
    return {(r.reason, r.rows, r.first) for r in log.problems.itertuples()}


def review(user="A", item="B", time=1476000000):
    return dict(reviewerID=user, asin=item, unixReviewTime=time)


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_amazon_2018(tmp_path, packed):
    end = ".gz" if packed else ""
    write(
        tmp_path / f"Toys_and_Games_5.json{end}",
        b"\xef\xbb\xbf" + json.dumps(review()).encode() + b"\r\n",
        b"\n",
        b"\xff\xfe{}\n",
        b"{'reviewerID': 'single quotes'}\n",
        review(item=""),
        review(time="yesterday"),
        review(time=None),
        review(time=1e300),
        review(),
        review(time=1476000001),
        packed=packed,
    )
    write(
        tmp_path / f"meta_Toys_and_Games.json{end}",
        dict(asin="B", title=" a \n b "),
        dict(asin="B", title="later"),
        dict(asin="C", title=["no", "text"]),
        b"{broken\n",
        packed=packed,
    )
    log = load_amazon(tmp_path)
    assert log.events.time.tolist() == [1476000000, 1476000001]
    assert log.titles == {"B": "a b"}
    assert log.events.time.dtype == np.int64
    wanted = {
        ("not UTF-8", 1, (3,)),
        ("not JSON", 1, (4,)),
        ("no item", 1, (5,)),
        ("time is neither a number nor a date", 2, (6, 7)),
        ("time is outside the years 1 to 5000 (in milliseconds?)", 1, (8,)),
        ("copy of an earlier row", 1, (9,)),
        ("not JSON", 1, (4,)),
    }
    assert wanted <= reasons(log)
    assert set(log.problems.file) == {
        f"Toys_and_Games_5.json{end}",
        f"meta_Toys_and_Games.json{end}",
    }
    assert log.summary()["problems"] == 8


def test_amazon_2023_and_the_hub(tmp_path, monkeypatch):
    row = dict(user_id="u", parent_asin="P", asin="C", timestamp=1476000000999, rating=5.0)
    reviews = write(tmp_path / "raw/Toys.jsonl", row, row | dict(timestamp=None))
    meta = write(tmp_path / "raw/meta_Toys.jsonl", dict(parent_asin="P", title="Train"))
    for source in (tmp_path / "raw", reviews):
        log = load_amazon(source)
        assert log.events.values.tolist() == [["u", "P", 1476000000]]
        assert log.titles == {"P": "Train"}
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(meta if "meta" in name else reviews)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub = load_amazon("McAuley-Lab/Amazon-Reviews-2023", "Toys_and_Games")
    pd.testing.assert_frame_equal(hub.events, log.events)
    assert [name for _, name, _ in asked] == [
        "raw/review_categories/Toys_and_Games.jsonl",
        "raw/meta_categories/meta_Toys_and_Games.jsonl",
    ]
    with pytest.raises(ValueError, match="category must be named"):
        load_amazon("McAuley-Lab/Amazon-Reviews-2023")


def test_a_packed_file_that_ends_early_is_an_error(tmp_path):
    path = write(tmp_path / "X_5.json.gz", *[review(time=i) for i in range(500)], packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path / "meta_X.json", dict(asin="B", title="t"))
    with pytest.raises(ValueError, match="X_5.json.gz cannot be read to its end"):
        load_amazon(tmp_path)


def test_which_file_is_asked_when_there_are_several(tmp_path):
    for c in ("A", "B"):
        write(tmp_path / f"{c}_5.json", review(item=c))
        write(tmp_path / f"meta_{c}.json", dict(asin=c, title=c))
    with pytest.raises(ValueError, match="found A_5.json, B_5.json"):
        load_amazon(tmp_path)
    assert load_amazon(tmp_path, "B").events.item.tolist() == ["B"]
    with pytest.raises(ValueError, match="is no file or folder"):
        load_amazon(tmp_path / "none")


def test_yelp(tmp_path):
    write(
        tmp_path / "yelp_academic_dataset_business.json",
        dict(business_id="1", name="Bar", categories="Restaurants, Bars"),
        dict(business_id="2", name="Bar", categories="Restaurants"),
        dict(business_id="3", name="Shop", categories="Shopping"),
        dict(business_id="4", name="", categories="Restaurants"),
    )
    rows = [
        dict(user_id="u", business_id=str(i), date=f"2019-01-0{i} 00:00:00") for i in range(1, 5)
    ]
    write(
        tmp_path / "yelp_academic_dataset_review.json", *rows, dict(user_id="u", date="2019-01-01")
    )
    log = load_yelp(tmp_path)
    assert log.events.item.tolist() == ["Bar", "Bar", "4"]
    assert log.titles["Bar"] == "Bar"
    assert ("no name", 1, (4,)) in reasons(log) and ("no item", 1, (5,)) in reasons(log)
    assert len(load_yelp(tmp_path, category=None).events) == 4
    one_each = load_yelp(tmp_path, by_name=False)
    assert one_each.events.item.tolist() == ["1", "2", "4"]
    assert one_each.titles == {"1": "Bar", "2": "Bar"}


def test_movielens_in_three_generations(tmp_path):
    write(tmp_path / "1m/ratings.dat", b"1::2::5::978300760\n1::3::5\n1::2::x::978300761\n")
    write(
        tmp_path / "1m/movies.dat",
        "2::L\u00e9on: The Professional (1994)::Crime\n".encode("latin-1"),
    )
    write(tmp_path / "25m/ratings.csv", b"userId,movieId,rating,timestamp\n1,2,5.0,978300760\n")
    write(tmp_path / "25m/movies.csv", b'movieId,title,genres\n2,"Leon, the (1994)",Crime\n')
    write(tmp_path / "100k/u.data", b"1\t2\t5\t978300760\n")
    write(tmp_path / "100k/u.item", b"2|Leon (1994)|01-Jan-1994||x\n")
    titles = {
        "1m": "L\u00e9on: The Professional (1994)",
        "25m": "Leon, the (1994)",
        "100k": "Leon (1994)",
    }
    for name, title in titles.items():
        log = load_movielens(tmp_path / name)
        assert log.events.values.tolist()[0] == ["1", "2", 978300760]
        assert log.titles == {"2": title}
    one = load_movielens(tmp_path / "1m")
    assert ("3 columns instead of 4", 1, (2,)) in reasons(one) and len(one.events) == 2


def test_csv_lines_are_those_of_the_file(tmp_path):
    path = write(
        tmp_path / "x.csv",
        b"\xef\xbb\xbfuser,item,time,title\r\n",
        b'1,2,3,"two\nlines"\n',
        b"\n",
        b"1,2,NaN,t\n",
        b"1,2\n",
        b"1,\xff,3,t\n",
        b" ,2,3,t\n",
        b"1.0,2.5,4,t\n",
    )
    log = load_csv(path, title="title")
    assert log.events.values.tolist() == [["1", "2", 3], ["1.0", "2.5", 4]]
    assert log.titles == {"2": "two lines", "2.5": "t"}
    assert reasons(log) == {
        ("time is neither a number nor a date", 1, (5,)),
        ("2 columns instead of 4", 1, (6,)),
        ("not UTF-8", 1, (7,)),
        ("no user", 1, (8,)),
    }
    with pytest.raises(ValueError, match="has no column 'who'; it has"):
        load_csv(path, user="who")
    with pytest.raises(ValueError, match="is empty"):
        load_csv(write(tmp_path / "e.csv", b"\n"))


def test_a_quote_that_does_not_close_costs_its_line_only(tmp_path):
    rows = b'1,2,3,"Foo\n1,3,4,bar\n2,3,5,"x"\n3,3,5,y\n1,4,5,"two\n\nlines"\n2,4,5,5" disk\n'
    log = load_csv(write(tmp_path / "x.csv", b"user,item,time,title\n", rows), title="title")
    assert log.events.time.tolist() == [4, 5, 5, 5, 5]
    assert log.titles == {"3": "bar", "4": "two lines"}
    ((_, reason, n, first),) = log.problems.values.tolist()
    assert "not CSV" in reason and (n, first) == (1, (2,))
    long = b"1,2,3," + b"a" * 200_000 + b"\n"
    log = load_csv(write(tmp_path / "y.csv", b"user,item,time,title\n", long), title="title")
    assert len(log.titles["2"]) == 200_000


@pytest.mark.parametrize(
    "texts, seconds",
    [
        (["20200131", "20200201"], [1580428800, 1580515200]),
        (["20200131", "20209999"], [20200131, 20209999]),
        (["13/02/2020", "01/02/2020"], [1581552000, 1580515200]),
        (["02/13/2020", "01/02/2020"], [1581552000, 1577923200]),
        (["2020-02-01", "1 Feb 2020"], [1580515200, 1580515200]),
        (["01/02/2020", "05/05/2020"], [1588636800]),
        (["13/02/2020", "02/13/2020", "01/02/2020"], [1581552000, 1581552000]),
        (["now", "today", "10:30", "May", "9999-12-31", "5"], [5]),
        (["1" + "0" * 400, "True", "0x10", "inf", "7.9"], [7]),
    ],
)
def test_what_is_a_time(texts, seconds):
    table = pd.DataFrame(dict(user=range(len(texts)), item="i", time=texts))
    log = as_log(table)
    assert log.events.time.tolist() == seconds
    assert log.problems.rows.sum() == len(texts) - len(seconds)


def test_values_of_every_kind_are_used_or_counted():
    odd = [None, pd.NA, np.nan, "nan", "NULL", " ", [1], {}, np.array([1, 2]), "a\ud800"]
    table = pd.DataFrame(dict(user=pd.Series(odd, dtype=object), item="i", time=1))
    log = as_log(table)
    assert log.events.empty and reasons(log) == {("no user", 10, (1, 2, 3, 4, 5))}
    ids = pd.Series([1, np.float32(2), np.int8(3), "4", 5.5], dtype=object)
    assert as_log(table[:5].assign(user=ids)).events.user.tolist() == ["1", "2", "3", "4", "5.5"]
    times = pd.Series([10**400, True, [1], pd.NaT, 8], dtype=object)
    assert as_log(table[:5].assign(user=1, time=times)).events.time.tolist() == [8]
    nullable = pd.DataFrame(dict(user=[1, None], item=["a", "b"], time=[1, 2])).convert_dtypes()
    assert as_log(nullable).events.values.tolist() == [["1", "a", 1]]
    with pytest.raises(TypeError, match="table: need a pandas DataFrame"):
        as_log([1])
    twice = pd.DataFrame([[1, 2, 3, 4]], columns=["user", "user", "item", "time"])
    with pytest.raises(ValueError, match="more than one column 'user'"):
        as_log(twice)


def test_damaged_objects_cost_their_line(tmp_path):
    write(
        tmp_path / "a/Toys_5.json",
        b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 1' + b"0" * 400 + b"}\n",
        b'{"user_id": "A", "asin": "B", "timestamp": 1' + b"0" * 400 + b"}\n",
        b'{"x": ' + b"[" * 100_000 + b"\n",
        dict(user_id="A", asin=7, timestamp="1600000000000"),
    )
    write(
        tmp_path / "a/meta_Toys.json",
        dict(title="of nothing"),
        dict(asin=7, title="a\ud800b"),
        dict(asin=["B"], title="x"),
    )
    log = load_amazon(tmp_path / "a")
    assert log.events.values.tolist() == [["A", "7", 1600000000]]
    assert log.titles == {"7": "a\ufffdb"} and log.problems.rows.sum() == 3
    write(
        tmp_path / "y/yelp_academic_dataset_business.json",
        dict(business_id="b", name="Bar", categories=["Restaurants", "Bars"]),
        dict(name="None", categories="Restaurants"),
        dict(business_id=["c"], name="C", categories=5),
        dict(business_id="d", name="D", categories=5),
    )
    write(
        tmp_path / "y/yelp_academic_dataset_review.json",
        *(dict(user_id="u", business_id=b, date="2015-01-01") for b in ("b", None, ["c"], "d")),
    )
    log = load_yelp(tmp_path / "y")
    assert log.events.item.tolist() == ["Bar"] and log.titles == {"Bar": "Bar"}
    assert ("no business_id", 2, (2, 3)) in reasons(log) and ("no item", 2, (2, 3)) in reasons(log)


def test_packed_files_with_changed_bytes_are_errors(tmp_path):
    raw = gzip.compress(b"user,item,time\n" + b"1,2,3\n" * 1000)
    for at in (12, 20, len(raw) // 2, len(raw) - 6):
        bad = bytearray(raw)
        bad[at] ^= 255
        with pytest.raises(ValueError, match="x.csv cannot be read to its end"):
            load_csv(write(tmp_path / "x.csv", bytes(bad)))


def test_movielens_columns_are_found_by_name(tmp_path):
    write(tmp_path / "a/ratings.csv", b"movieId,userId,timestamp\n1,2,978300760\n")
    write(tmp_path / "a/movies.csv", b"title,movieId\nX,1\n")
    log = load_movielens(tmp_path / "a")
    assert log.events.values.tolist() == [["2", "1", 978300760]] and log.titles == {"1": "X"}
    write(tmp_path / "b/ratings.csv", b"1,2,5.0,978300760\n1,3,5.0,978300760\n")
    with pytest.raises(ValueError, match="ratings.csv has no column 'userId'"):
        load_movielens(tmp_path / "b")
    write(tmp_path / "10m/ratings.dat", b"1::2::5::978300760\n")
    write(tmp_path / "10m/movies.dat", "2::Am\u00e9lie (2001)::C\n3\n".encode())
    assert load_movielens(tmp_path / "10m").titles == {"2": "Am\u00e9lie (2001)"}
    write(tmp_path / "100k/u.data", b"1\t2\t3\t4\n")
    write(tmp_path / "100k/u.item", b'2|"Q" movie|a\n3|"Open|b\n4|x|c\n')
    found = load_movielens(tmp_path / "100k").titles
    assert found == {"2": '"Q" movie', "3": '"Open', "4": "x"}


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("data/ratings.csv", "data/log.tsv.gz"):
        with pytest.raises(ValueError, match="no file and no id"):
            load_csv(name)
    with pytest.raises(ValueError, match="sep=''"):
        load_csv("x.csv", sep="")


def test_rows_without_a_value_are_refused_by_name():
    for sequences in (torch.tensor([[1, 2, -1]]), torch.tensor([[1.0, 2.0]]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="sequences"):
            sequence_windows(sequences)
    holes = pd.DataFrame(dict(user=[1, 1], item=[1, 2], time=[1, None])).convert_dtypes()
    with pytest.raises(ValueError, match="df has no time in row 1"):
        make_windows(holes)
    with pytest.raises(ValueError, match="df has no user in row 1"):
        k_core(pd.DataFrame(dict(user=["a", None], item=["x", "x"])), 1)
    with pytest.raises(ValueError, match="needs a column 'time'"):
        chronological_split(pd.DataFrame(dict(a=range(20))))
    with pytest.raises(ValueError, match="not finite"):
        chronological_split(pd.DataFrame(dict(time=pd.to_datetime(["2020-01-01"] * 19 + [None]))))
    log = as_log(pd.DataFrame(dict(user=[1], item=[1], time=[1])))
    with pytest.raises(TypeError, match="since='2020-01-01' must be a datetime"):
        rere_filter(log, since="2020-01-01")


def test_data_of_the_hub_and_tables(monkeypatch):
    table = pd.DataFrame(
        dict(
            u=[1.0, 2.0, np.nan],
            i=["a", "b", "c"],
            t=pd.to_datetime(["2020-01-01", None, "2020-01-02"]),
        )
    )
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return SimpleNamespace(to_pandas=lambda: table)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    log = load_csv("owner/data", "u", "i", "t", split="test")
    assert calls == [("owner/data", "test")]
    assert log.events.values.tolist() == [["1", "a", 1577836800]]
    assert log.summary()["problems"] == 2
    ms = as_log(pd.DataFrame(dict(user=[1], item=[2], time=[1577836800123])), unit="ms")
    assert ms.events.values.tolist() == [["1", "2", 1577836800]]
    with pytest.raises(ValueError, match="unit='h'"):
        as_log(table, "u", "i", "t", unit="h")


# ---- filters -------------------------------------------------------------------------------------
pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


@settings(deadline=None, max_examples=60)
@given(pairs, st.integers(1, 5))
def test_k_core_is_the_largest_fixed_point(rows, k):
    df = pd.DataFrame(rows, columns=["user", "item"])
    core = k_core(df, k)
    assert all((core[c].value_counts() >= k).all() for c in ("user", "item"))
    assert k_core(core, k).index.tolist() == core.index.tolist()
    left = df
    while True:  # peel one event at a time
        bad = (left.user.map(left.user.value_counts()) < k) | (
            left.item.map(left.item.value_counts()) < k
        )
        if not bad.any():
            break
        left = left.drop(left.index[bad.to_numpy()][0])
    assert core.index.tolist() == left.index.tolist()


def some_log(n_years=4):
    rows, titles = [], {}
    for year in range(n_years):
        for item in range(3):
            for user in range(3):
                stamp = datetime(2010 + year, 6, 1 + item, user).timestamp()
                rows.append((f"u{user}", f"i{year}{item}", int(stamp)))
            titles[f"i{year}{item}"] = "word " * (1 + item)
    events = pd.DataFrame(rows, columns=["user", "item", "time"])
    return Log(events, titles, pd.DataFrame(columns=["file", "reason", "rows", "first"]))


def test_window_grows_back_by_years_until_enough_items():
    log = some_log()
    kept = rere_filter(log, k=3, since=datetime(2013, 1, 1), min_items=6)
    assert kept.since.year == 2012 and kept.log.events.item.nunique() == 6
    assert len(log.events) == len(kept.log.events) + sum(kept.dropped.values())
    assert set(kept.log.titles) == set(kept.log.events.item)
    with pytest.raises(ValueError, match="min_items=100"):
        rere_filter(log, k=3, since=datetime(2013, 1, 1), min_items=100)
    assert rere_filter(log, k=1, until=datetime(2011, 1, 1)).log.events.item.nunique() == 3


def test_titles_are_counted_when_they_cost_events():
    log = some_log()
    del log.titles["i00"]
    kept = rere_filter(log, k=1, max_words=2)
    assert kept.dropped["no title"] == 3 and kept.dropped["title above 2 words"] == 12
    none = rere_filter(log, k=99)
    assert none.log.events.empty
    with pytest.raises(ValueError, match="log has no events"):
        number_items(none.log)


# ---- windows and splits --------------------------------------------------------------------------
events = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=60)
@given(events, st.integers(1, 6), st.integers(1, 3))
def test_windows_are_the_last_events_before_the_target(rows, max_len, least):
    df = pd.DataFrame(rows, columns=["user", "item", "time"], dtype=np.int64)
    w = make_windows(df, max_len, least)
    want = []
    for user in sorted(set(df.user)):
        mine = sorted(df[df.user == user].itertuples(), key=lambda e: e.time)  # stable
        for k in range(least, len(mine)):
            past = [e.item for e in mine[:k]][-max_len:]
            want.append(([-1] * (max_len - len(past)) + past, mine[k].item, mine[k].time, user))
    got = zip(w.history.tolist(), w.target.tolist(), w.time.tolist(), w.user.tolist())
    assert list(got) == want
    assert w.row.tolist() == list(range(len(want)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=20, max_size=80))
def test_split_is_by_time_and_has_the_stated_sizes(times):
    n = len(times)
    df = pd.DataFrame(dict(time=times))
    a, b, c = chronological_split(df)
    assert a.time.max() <= b.time.min() and b.time.max() <= c.time.min()
    assert [len(a), len(b), len(c)] == [int(0.8 * n), int(0.9 * n) - int(0.8 * n), n - int(0.9 * n)]
    assert sorted([*a.index, *b.index, *c.index]) == list(range(n))
    for part in (a, b, c):  # equal times keep their order
        for _, same in part.groupby("time"):
            assert same.index.is_monotonic_increasing


def test_split_refuses_times_that_are_none():
    with pytest.raises(ValueError, match="not finite"):
        chronological_split(pd.DataFrame(dict(time=[1.0, np.nan] * 20)))


def test_rows_with_one_history_keep_their_targets():
    "And validation changes nothing in training"
    df = pd.DataFrame(
        dict(user=np.repeat(np.arange(20), 2), item=[7, 0] * 10 + [7, 1] * 10, time=np.arange(40))
    )
    windows = make_windows(df)
    fmt = title_format([f"t{i}" for i in range(8)])
    texts = fmt.prompts(windows, bare=True)
    assert len(set(texts)) == 1
    split = chronological_split(windows, (0.5, 0.25, 0.25))
    assert split.train.target.tolist() == [0] * 10 and set(split.test.target.tolist()) == {1}
    for part in split:
        assert torch.equal(windows.target[part.row], part.target)
        assert torch.equal(windows.history[part.row], part.history)
    shuffled = split.train.take(torch.randperm(10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(windows.target[shuffled.row], shuffled.target)


def test_take_takes_masks_lists_and_nothing():
    w = sequence_windows(torch.arange(12).view(2, 6), 3)
    assert w.take(w.target > 8).target.tolist() == [9, 10, 11]
    assert w.take([1, 0]).row.tolist() == [1, 0]
    assert len(w.take([])) == 0


# ---- texts ---------------------------------------------------------------------------------------
def test_wording_belongs_to_the_row():
    w = sequence_windows(torch.randint(0, 9, (60, 12)), 10)
    fmt = title_format([f"title {i}" for i in range(9)])
    all_texts = fmt.prompts(w)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(1))
    assert fmt.prompts(w.take(order)) == [all_texts[i] for i in order]
    used = {t.split("### Instruction:\n")[1].split("\n")[0] for t in all_texts}
    assert used == set(instructions) and len(set(instructions)) == 11
    assert all_texts != fmt.prompts(w, seed=1)
    assert all(t.endswith("### Response:\n") for t in all_texts)


def test_history_is_cut_on_the_left():
    w = sequence_windows(torch.arange(15)[None], 10).take([13])
    fmt = title_format([f"t{i}" for i in range(15)])
    text = fmt.prompts(w, bare=True)[0]
    assert text == ",\t".join(f'"t{i}"' for i in range(4, 14))


def test_answers_differ_and_end():
    fmt = title_format(["a", "a b", 'say "b"', "c\nd"])
    assert len(set(fmt.answers)) == 4
    assert all(x.count("\n") == 1 and x.endswith('"\n') for x in fmt.answers)
    assert not any(x != y and y.startswith(x) for x in fmt.answers for y in fmt.answers)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 9))
def test_codes_as_text_and_as_tokens_agree(seed, levels, n_codes):
    g = torch.Generator().manual_seed(seed)
    sid = torch.randint(0, n_codes, (12, levels), generator=g)
    fmt = sid_format(sid, [n_codes] * levels, sep=" ")
    tokens = code_tokens(sid, n_codes, first=4)
    place = {w: 4 + i for i, w in enumerate(fmt.words)}
    assert [[place[w] for w in name.split(" ")] for name in fmt.names] == tokens.tolist()
    w = sequence_windows(torch.randint(0, 12, (2, 5), generator=g), 3)
    ids = history_tokens(w, tokens)
    assert ids.shape == (len(w), 3 * levels)
    want = [[place[t] for t in text.split(" ")] for text in fmt.prompts(w, bare=True)]
    assert [[t for t in row if t] for row in ids.tolist()] == want
