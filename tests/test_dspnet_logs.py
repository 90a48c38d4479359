"Logs in their published forms, the flat index, and splits without a leak"

import bz2
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.dspnet.data import (
    make_binding_world,
    make_interplay_world,
    relabel_scenes,
    shuffle_scenes,
)
from llmpapers.dspnet.logs import (
    as_events,
    as_index,
    index_events,
    join_events,
    k_core,
    load_amazon,
    load_behaviour,
    load_kuairand,
    load_movielens,
    load_outbrain,
    load_yelp,
    problems_of,
    split_last,
    split_time,
    to_sequences,
)


def log_of(seed, n=200):
    g = np.random.default_rng(seed)
    return pd.DataFrame(
        dict(
            user=g.integers(0, 12, n),
            item=g.integers(0, 15, n),
            scene=g.choice(["feed", "search", "cart"], n),
            time=g.integers(0, 60, n).astype(float),
        )
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_an_index_gives_back_every_event(seed, max_len):
    events = as_events(log_of(seed))
    index = index_events(events)
    items, scenes = index.rows(torch.arange(len(index)), max_len)
    for number, user in enumerate(index.users):
        mine = events[events.user == user].tail(max_len)
        row = items[number][items[number] > 0]
        assert [index.items[i - 1] for i in row.tolist()] == mine["item"].tolist()
        names = scenes[number][scenes[number] > 0].tolist()
        assert [index.scenes[i - 1] for i in names] == mine["scene"].tolist()
    assert index.nbytes == 14 * len(events) + 8 * (len(index) + 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(10, 50), st.integers(1, 3))
def test_nothing_at_or_after_the_split_is_in_training(seed, at, core):
    log = log_of(seed)
    if not len(k_core(log[log.time < at], core)):
        with pytest.raises(ValueError, match=f"core={core} leaves none"):
            split_time(log, float(at), core=core)
        return
    cut = split_time(log, float(at), core=core)
    assert float(cut.train.time.max()) < at
    late = log.assign(item=np.where(log.time >= at, 99, log.item))
    again = split_time(late, float(at), core=core)
    assert torch.equal(cut.train.item, again.train.item) and cut.train.items == again.train.items
    assert again.unknown == cut.unknown + len(cut.test.targets) and not len(again.test.targets)
    counts = torch.bincount(cut.train.item.long())[1:]
    assert int(counts.min()) >= core


def test_leave_last_two():
    items, scenes = to_sequences(as_events(log_of(1)), 8)
    cut = split_last(items, scenes)
    whole = [row[row > 0].tolist() for row in items]
    whole = [row for row in whole if len(row) >= 3]
    assert cut.test.targets.tolist() == [row[-1] for row in whole]
    assert cut.valid.targets.tolist() == [row[-2] for row in whole]
    seen = [row[row > 0].tolist() for row in cut.test.items]
    assert seen == [row[:-1] for row in whole]


def test_a_row_that_cannot_be_used_costs_one_row():
    table = log_of(0, 20).astype(dict(time=object))
    table.loc[3, "user"] = None
    table.loc[5, "time"] = "soon"
    table.loc[7] = table.loc[6]
    events = as_events(table)
    assert len(events) + problems_of(events).rows.sum() == 20
    assert set(problems_of(events).reason) >= {"no user", "no time that can be read"}


files = {
    "outbrain": (
        load_outbrain,
        "page_views.csv",
        "uuid,document_id,timestamp,platform,geo_location,traffic_source\n"
        "u,7,61,2,US>NY,3\nu,8,62,9,US,1\n",
        ("u", "7", "social, mobile", (1465876799998 + 61) / 1000),
    ),
    "kuairand": (
        load_kuairand,
        "log_standard_4_08_to_4_21_1k.csv",
        "user_id,video_id,date,hourmin,time_ms,is_click,tab\n0,7,1,2,1649380000000,1,4\n0,8,1,2,1649380000000,0,4\n",
        ("0", "7", "tab 4", 1649380000.0),
    ),
    "behaviour": (
        load_behaviour,
        "UserBehavior.csv",
        "1,5,50,fav,99\n1,5,50\n",
        ("1", "5", "favourite", 99.0),
    ),
    "movielens-1m": (
        load_movielens,
        "ratings.dat",
        "1::1193::5::978300760\nbad\n",
        ("1", "1193", "evening, weekend", 978300760.0),
    ),
    "movielens-100k": (
        load_movielens,
        "u.data",
        "196\t242\t3\t881250949\n",
        ("196", "242", "afternoon, working day", 881250949.0),
    ),
    "movielens-25m": (
        load_movielens,
        "ratings.csv",
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,never\n",
        ("1", "296", "afternoon, working day", 1147880044.0),
    ),
    "yelp": (
        load_yelp,
        "yelp_academic_dataset_review.json",
        '{"user_id":"a","business_id":"b","date":"1970-01-02 00:00:00"}\n{"user_id":"a"}\n[]\n',
        ("a", "b", "review", 86400.0),
    ),
    "amazon-2018": (
        load_amazon,
        "Toys_5.json",
        '{"reviewerID":"r","asin":"A","unixReviewTime":5,"verified":true,"overall":5.0}\n{}\n',
        ("r", "A", "verified, 4 or 5 stars", 5.0),
    ),
    "amazon-2023": (
        load_amazon,
        "Toys.jsonl",
        '{"user_id":"r","parent_asin":"A","timestamp":1588687728000,"verified_purchase":false,"rating":1}\n',
        ("r", "A", "not verified, 1 to 3 stars", 1588687728.0),
    ),
}


@pytest.mark.parametrize("name", files)
def test_published_forms(name, tmp_path):
    load, file, text, want = files[name]
    (tmp_path / file).write_text(text)
    events = load(tmp_path)
    assert tuple(events.iloc[0]) == pytest.approx(want) and len(events) == 1
    with pytest.raises(ValueError, match="has no file"):
        load(tmp_path / "elsewhere")


@pytest.mark.parametrize("make", [make_interplay_world, make_binding_world])
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 4), st.integers(2, 6))
def test_worlds_have_laws(make, seed, items, scenes, length):
    world = make(30, length, items, min(3, items), scenes, seed=seed)
    assert world.items.shape == world.scenes.shape == (30, length)
    assert torch.allclose(world.next_item_probs.sum(1), torch.ones(30), atol=1e-5)
    assert torch.allclose(world.item_law.sum(2), torch.ones(30, scenes), atol=1e-5)
    told, blind = world.ceiling(1, in_scene=True), world.ceiling(1)
    assert 0 < blind["HR@1"] <= 1 and 0 < told["HR@1"] <= 1


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6))
def test_scenes_are_worth_nothing_where_they_are_switched_off(seed):
    world = make_interplay_world(20, 6, rho=0.0, seed=seed)
    assert (world.item_law - world.item_law[:, :1]).abs().max() < 1e-6


def test_other_names_and_other_users():
    world = make_interplay_world(30, 5, seed=0)
    assert relabel_scenes(world.scenes, torch.ones(4).long()).unique().tolist() == [1]
    mixed = shuffle_scenes(world.scenes, 1)
    assert torch.equal(mixed.sort(0).values.sum(), world.scenes.sort(0).values.sum())
    index = as_index(world.items, world.scenes)
    assert index.longest == 5 and len(k_core(log_of(3), 1)) == 200


def refused(events):
    return [tuple(x) for x in problems_of(events)[["reason", "rows", "first_line"]].to_numpy()]


KUAIRAND = "user_id,video_id,time_ms,is_click,tab\n"


def test_all_standard_logs_of_a_folder_are_read(tmp_path):
    for name, row in (
        ("log_standard_4_08_to_4_21_1k.csv", "1,10,1649400000000,1,1\n"),
        ("log_standard_4_22_to_5_08_1k.csv", "1,11,1650600000000,1.0,2\n1,12,1,1,2\n1,13,9,?,2\n"),
    ):
        (tmp_path / name).write_text(KUAIRAND + row)
    events = load_kuairand(tmp_path)
    assert events.item.tolist() == ["10", "11"]
    assert refused(events) == [
        ("no click that can be read", 1, 4),
        ("a time in another unit", 1, 3),
    ]


def test_several_files_are_not_chosen_from_in_silence(tmp_path):
    row = '{"user_id":"r","parent_asin":"A","timestamp":1588687728000,"verified_purchase":true,'
    for name in ("Books.jsonl", "Toys.jsonl"):
        (tmp_path / name).write_text(row + '"rating":1}\n')
    with pytest.raises(ValueError, match="Books.jsonl, Toys.jsonl"):
        load_amazon(tmp_path)
    both = join_events(*(load_amazon(tmp_path / n) for n in ("Books.jsonl", "Toys.jsonl")))
    assert len(both) == 2


def test_joined_tables_keep_what_was_refused():
    bad = pd.DataFrame(dict(user=["a", None], item=[1, 2], scene=["x", "x"], time=[1, 2]))
    good = bad.assign(user=["b", "c"])
    joined = join_events(as_events(bad), as_events(good))
    assert len(joined) == 3 and refused(joined) == [("no user", 1, 1)]


@pytest.mark.parametrize(
    "text, items, problems",
    [
        ("1,11,1,pv,101,EXTRA\n1,12,1,pv,102\n", ["12"], [("too many fields", 1, 1)]),
        ("1,11,1,pv,101,\n1,12,1,pv,102,\n", ["11", "12"], []),
        (
            "1,10,1,pv,100\n1,11,1,pv,101,EXTRA\n1,12,1,xx,102\n",
            ["10"],
            [("too many fields", 1, 2), ("no scene", 1, 3)],
        ),
        ('1,"10,1,pv,100\n1,11,1,pv,101\n1,12,1,pv,"103\n', ['"10', "11"], None),
        ("1,10,1,pv,100\n1,11,1,pv,1511544070000\n", ["10"], [("a time in another unit", 1, 2)]),
    ],
)
def test_one_bad_row_costs_one_row(tmp_path, text, items, problems):
    (tmp_path / "UserBehavior.csv").write_text(text)
    events = load_behaviour(tmp_path)
    assert events.item.tolist() == items
    assert problems is None or refused(events) == problems


@pytest.mark.parametrize("kind", ["zip", "bz2"])
def test_packed_files(tmp_path, kind):
    text = "uuid,document_id,timestamp,platform,traffic_source\n" + "u,1,5,1,2\n" + "u,2,6,9,2\n"
    name = tmp_path / f"page_views_sample.csv.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(name, "w") as z:
            z.writestr("page_views_sample.csv", text)
    else:
        name.write_bytes(bz2.compress(text.encode()))
    events = load_outbrain(tmp_path)
    assert len(events) == 1 and refused(events) == [("no scene", 1, 3)]


def test_dates_are_seconds_and_missing_ones_are_refused():
    when = pd.to_datetime(["2020-01-02", None, "2020-01-01"])
    table = pd.DataFrame(dict(user=["a", "a", "b"], item=[1, 2, 3], scene=list("xyx"), time=when))
    for dates in (when, when.tz_localize("Europe/Berlin").tz_convert("UTC").tz_localize(None)):
        events = as_events(table.assign(time=dates))
        assert refused(events) == [("no time that can be read", 1, 1)]
    assert as_events(table).time.tolist() == [1577836800.0, 1577923200.0]
    aware = as_events(table.assign(time=when.tz_localize("Europe/Berlin")))
    assert aware.time.tolist() == [1577833200.0, 1577919600.0]


def test_text_timestamps_of_amazon_are_milliseconds(tmp_path):
    start = '{"user_id":"r","parent_asin":"A","verified_purchase":true,'
    rows = [
        f'{start}"timestamp":{time},"rating":{rating}}}\n'
        for time, rating in (('"1588687728923"', 5), ("1588687728", 5), ("1588687729000", "NaN"))
    ]
    (tmp_path / "T.jsonl").write_text("".join(rows))
    events = load_amazon(tmp_path)
    assert events.time.tolist() == [1588687728.923]
    assert {r[0] for r in refused(events)} == {"a time in another unit", "no scene"}


def test_marks_of_the_byte_order(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::2::5::978300760\n", encoding="utf-8-sig")
    assert load_movielens(tmp_path).user.tolist() == ["1"]
    review = tmp_path / "yelp_academic_dataset_review.json"
    record = '{"user_id":"a","business_id":"b","date":"2018-07-07 22:09:11"}\n'
    review.write_text(record + record.replace(":11", ":12Z"), encoding="utf-8-sig")
    (tmp_path / "yelp_academic_dataset_tip.json").write_text("{}\n")
    events = load_yelp(tmp_path)
    assert len(events) == 2 and ("no user", 1, 1) in refused(events)


def test_movielens_by_its_head_not_its_name(tmp_path):
    (tmp_path / "mine.csv").write_text("userId,movieId,timestamp,rating\n1,2,978300760,3.5\n")
    assert load_movielens(tmp_path / "mine.csv").time.tolist() == [978300760.0]
    (tmp_path / "u1.base").write_text("1\t2\t5\t978300760\n")
    assert load_movielens(tmp_path / "u1.base").item.tolist() == ["2"]


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08\x00"])
def test_empty_and_broken_files_are_named(tmp_path, data):
    name = "UserBehavior.csv" + (".gz" if data else "")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        load_behaviour(tmp_path)
    (tmp_path / "page_views.csv").write_text("")
    with pytest.raises(ValueError, match="page_views.csv is empty"):
        load_outbrain(tmp_path)


@pytest.mark.parametrize(
    "items, scenes, message",
    [
        ([[1, 2, 0]], [[1, 1, 0]], "padded on the left"),
        ([[1, 2, 3]], [[1, 0, 1]], "needs both"),
        ([[0, 0, 0]], [[0, 0, 0]], "no event"),
        ([[1, 2, 3]], [[1, 40_000, 1]], "an index holds"),
    ],
)
def test_tables_are_checked(items, scenes, message):
    pair = torch.tensor(items), torch.tensor(scenes)
    with pytest.raises(ValueError, match=message):
        as_index(*pair)
    if "index" not in message:
        with pytest.raises(ValueError, match=message):
            split_last(*pair)


def test_a_user_alone_with_its_length_is_shuffled_too():
    scenes = torch.tensor([[1, 2, 3, 4, 1, 2], [0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 2, 1]])
    mixed = shuffle_scenes(scenes, 1)
    assert not torch.equal(mixed[0], scenes[0])
    assert sorted(mixed[0].tolist()) == sorted(scenes[0].tolist())


def test_arguments_are_named():
    log = log_of(3)
    for bad, name in (
        (lambda: split_time(log, pd.Timestamp("2020-01-01")), "at"),
        (lambda: split_time(log, 30.0, core=0), "core"),
        (lambda: split_time(log, 30.0, max_len=0), "max_len"),
        (lambda: index_events(as_events(log), items=["a", "a"]), "items"),
        (lambda: k_core(pd.DataFrame(dict(user=[1]))), "item"),
        (lambda: as_events([1]), "table"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            bad()
    index = index_events(as_events(log))
    assert index.rows([], 5)[0].shape == (0, 1)
