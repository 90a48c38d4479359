"Logs in their published forms, the flat index, and splits without a leak"

import bz2
import gzip
import json
import lzma
import tempfile
import zipfile
from pathlib import Path

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
        "user_id,video_id,date,hourmin,time_ms,is_click,tab\n"
        "0,7,1,2,1649400000000,1,4\n0,8,1,2,1649400000000,0,4\n",
        ("0", "7", "tab 4", 1649400000.0),
    ),
    "behaviour": (
        load_behaviour,
        "UserBehavior.csv",
        "1,5,50,fav,1511544070\n1,5,50\n",
        ("1", "5", "favourite", 1511544070.0),
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
        '{"user_id":"a","business_id":"b","date":"2018-07-07 00:00:00"}\n{"user_id":"a"}\n[]\n',
        ("a", "b", "review", 1530921600.0),
    ),
    "amazon-2018": (
        load_amazon,
        "Toys_5.json",
        '{"reviewerID":"r","asin":"A","unixReviewTime":1252800000,"verified":true,"overall":5.0}\n{}\n',
        ("r", "A", "verified, 4 or 5 stars", 1252800000.0),
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


hd = "user_id,video_id,time_ms,is_click,tab\n"
view = "uuid,document_id,timestamp,platform,geo_location,traffic_source\n"
when = 1511544070


def behaviour(*rows):
    return "".join(
        f"{user},{item},5,{kind},{when + k}\n" for k, (user, item, kind) in enumerate(rows)
    )


def reasons(events):
    return {r.reason: (r.rows, r.first_line) for r in problems_of(events).itertuples()}


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_all_parts_of_a_log_are_read(tmp_path):
    write(tmp_path, "log_standard_4_08_to_4_21_1k.csv", hd + "1,10,1649400000000,1,1\n")
    write(tmp_path, "log_standard_4_22_to_5_08_1k.csv", hd + "1,11,1650600000000,1,2\n1,,1,1,1\n")
    events = load_kuairand(tmp_path)
    assert events.item.tolist() == ["10", "11"]
    assert set(problems_of(events).file) == {"log_standard_4_22_to_5_08_1k.csv"}
    row = '{{"user_id":"r","parent_asin":"{}","timestamp":1588687728000,"verified_purchase":true,'
    for name in ("Books.jsonl", "musical.jsonl"):
        write(tmp_path, name, row.format(name) + '"rating":5}\n')
    write(tmp_path, "meta_Books.jsonl", "{}\n")
    assert sorted(load_amazon(tmp_path).item) == ["Books.jsonl", "musical.jsonl"]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_line_with_too_many_fields_costs_itself(bad, tmp_path):
    rows = behaviour(*[("1", str(k), "pv") for k in range(3)]).splitlines()
    rows[bad] += ",EXTRA"
    write(tmp_path, "UserBehavior.csv", "\n".join(rows) + "\n")
    events = load_behaviour(tmp_path)
    assert events.item.tolist() == [str(k) for k in range(3) if k != bad]
    assert reasons(events) == {"too many fields": (1, bad + 1)}


def test_lines_are_named_as_they_stand_in_the_file(tmp_path):
    rows = behaviour(("1", "10", "pv"), ("1", "11", "pv,EXTRA"), ("1", "12", "xx"))
    events = load_behaviour(write(tmp_path, "UserBehavior.csv", rows))
    assert reasons(events) == {"too many fields": (1, 2), "no scene": (1, 3)}
    with_head = view + "u,7,61,2,US,3\n" + "u,7,61,2,US,3,9\n" + "u,8,62,9,US,1\n"
    events = load_outbrain(write(tmp_path, "page_views.csv", with_head))
    assert reasons(events) == {"too many fields": (1, 3), "no scene": (1, 4)}


def test_a_separator_after_the_last_field_is_no_field(tmp_path):
    text = (view + "u,7,61,2,US,3\nu,8,62,2,US,3\n").replace("\n", ",\n")
    assert len(load_outbrain(write(tmp_path, "page_views.csv", text))) == 2
    rows = behaviour(("1", "10", "pv"), ("1", "11", "buy")).replace("\n", ",\n")
    events = load_behaviour(write(tmp_path, "UserBehavior.csv", rows))
    assert events.scene.tolist() == ["view", "buy"] and not reasons(events)


def test_a_quotation_mark_swallows_nothing(tmp_path):
    rows = behaviour(*[("1", str(k), "pv") for k in range(5)]).replace("1,1,", '1,"1,')
    events = load_behaviour(write(tmp_path, "UserBehavior.csv", rows))
    assert len(events) == 5


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_every_line_is_an_event_or_a_named_problem(kinds):
    "Good lines, too long ones, unknown scenes and empty ones"
    lines = [
        (f"1,{k},5,pv,{when + k}", f"1,{k},5,pv,{when},7,7", f"1,{k},5,wink,{when}", "")[kind]
        for k, kind in enumerate(kinds)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "UserBehavior.csv", "\n".join(lines) + "\n")
        if 0 not in kinds:
            with pytest.raises(ValueError, match="has no row that can be used"):
                load_behaviour(path)
            return
        events = load_behaviour(path)
    assert events.item.tolist() == [str(k) for k, kind in enumerate(kinds) if kind == 0]
    for reason, kind in {"too many fields": 1, "no scene": 2, "no user": 3}.items():
        at = [k + 1 for k, x in enumerate(kinds) if x == kind]
        assert reasons(events).get(reason) == ((len(at), at[0]) if at else None)


packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("end", [*packers, ".zip"])
def test_compressed_files(end, tmp_path):
    text = view + "u,7,61,2,US,3\n" + "u,8,62,9,US,1\n" + "u,9,63,1,US,1,9\n"
    path = tmp_path / f"page_views_sample.csv{end}"
    if end == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("page_views_sample.csv", text)
    else:
        path.write_bytes(packers[end](text.encode()))
    events = load_outbrain(tmp_path)
    assert events.item.tolist() == ["7"]
    assert reasons(events) == {"too many fields": (1, 4), "no scene": (1, 3)}
    write(tmp_path, "page_views_sample.csv", text)  # the same file once more, unpacked
    assert len(load_outbrain(tmp_path)) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=path.name):
        load_outbrain(path)


amazon = '{"user_id":"r","parent_asin":"A","verified_purchase":true,"rating":5,"timestamp":%s}\n'
units = {
    "amazon": (load_amazon, "a.jsonl", amazon % 1588687728000, amazon % 1588687728),
    "movielens": (load_movielens, "r.dat", "1::2::3::978300760\n", "1::2::3::978300760000\n"),
    "kuairand": (
        load_kuairand,
        "log_standard_1.csv",
        hd + "1,10,1649400000000,1,1\n",
        "1,10,1649400000,1,1\n",
    ),
    "outbrain": (
        load_outbrain,
        "page_views.csv",
        view + "u,7,61,2,US,3\n",
        "u,7,1465876799998,2,US,3\n",
    ),
    "behaviour": (load_behaviour, "b.csv", f"1,5,50,fav,{when}\n", f"1,5,50,fav,{when}000\n"),
}


@pytest.mark.parametrize("name", units)
def test_times_in_another_unit_are_refused(name, tmp_path):
    load, file, good, bad = units[name]
    events = load(write(tmp_path, file, good + bad))
    assert len(events) == 1 and 9e8 < events.time[0] < 2e9
    assert [r.rows for r in problems_of(events).itertuples()] == [1]
    assert "another unit" in problems_of(events).reason[0]


def test_milliseconds_as_text_are_milliseconds(tmp_path):
    events = load_amazon(write(tmp_path, "a.jsonl", amazon % '"1588687728000"'))
    assert events.time.tolist() == [1588687728.0]


def test_ratings_are_known_by_their_first_line(tmp_path):
    table = "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1.0,297,5.0,1147880045\n"
    for name in ("ratings.csv", "my_ratings.csv"):
        events = load_movielens(write(tmp_path, name, table))
        assert events.user.tolist() == ["1", "1"] and not reasons(events)
    for name in ("ml-1m.dat", "u1.base", "\ufeffratings"):
        mark = "\ufeff" if "ratings" in name else ""
        sep = "\t" if name == "u1.base" else "::"
        text = mark + sep.join(("1", "242", "3", "881250949")) + "\n"
        events = load_movielens(write(tmp_path, name.strip("\ufeff"), text))
        assert events.iloc[0].tolist()[:2] == ["1", "242"]
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "ratings.csv.gz").write_bytes(gzip.compress(table.encode()))
    assert len(load_movielens(tmp_path / "gz")) == 2
    with pytest.raises(ValueError, match="plain.csv has no head"):
        load_movielens(write(tmp_path, "plain.csv", "1,296,5.0,1147880044\n"))


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    events = load_amazon(write(tmp_path, "a.jsonl", "\ufeff" + amazon % 1588687728000))
    assert len(events) == 1 and not reasons(events)


def test_clicks_in_other_words(tmp_path):
    rows = [f"{k},10,1649400000000,{x},1\n" for k, x in enumerate(("1.0", "True", "0", "maybe"))]
    events = load_kuairand(write(tmp_path, "log_standard_1.csv", hd + "".join(rows)))
    assert events.user.tolist() == ["0", "1"]
    assert reasons(events) == {"is_click is neither 0 nor 1": (1, 5)}


def test_bad_tips_cost_tips(tmp_path):
    kind = "yelp_academic_dataset_%s.json"
    good = '{"user_id":"a","business_id":"%s","date":"2018-07-07 22:09:11%s"}\n'
    write(tmp_path, kind % "review", good % ("b", "") + good % ("c", "Z"))
    write(tmp_path, kind % "tip", '{"user_id":"a"}\n')
    events = load_yelp(tmp_path)
    assert events.item.tolist() == ["b", "c"] and events.time.nunique() == 1
    assert kind % "tip" in set(problems_of(events).file)


empty = {
    "ratings.dat": load_movielens,
    "page_views.csv": load_outbrain,
    "UserBehavior.csv": load_behaviour,
    "log_standard_1.csv": load_kuairand,
    "a.jsonl": load_amazon,
}


@pytest.mark.parametrize("name", empty)
def test_an_empty_file_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        empty[name](write(tmp_path, name, ""))
    if name == "page_views.csv":
        with pytest.raises(ValueError, match=name):
            load_outbrain(write(tmp_path, name, view))


def test_reviews_that_say_nothing_of_verification(tmp_path):
    path = write(
        tmp_path, "Books.csv", "user_id,parent_asin,rating,timestamp\nr,A,5,1588687728000\n"
    )
    with pytest.raises(ValueError, match="Books.csv does not say what is verified"):
        load_amazon(path)
    events = load_amazon(
        write(tmp_path, "n.jsonl", amazon % 1588687728000 + amazon.replace(":5,", ":NaN,") % 2)
    )
    assert "no scene" in reasons(events)


def test_what_was_refused_is_not_forgotten(tmp_path):
    a = as_events(log_of(0, 20).assign(user=[None, *range(19)]))
    b = as_events(log_of(1, 20).assign(item=[None, *range(19)]))
    for table in (pd.concat([a, b]), log_of(0)):
        with pytest.raises(ValueError, match="no record"):
            problems_of(table)
    both = join_events(a, b)
    assert len(both) + problems_of(both).rows.sum() == 40
    assert set(problems_of(both).reason) >= {"no user", "no item"}


def test_space_around_a_name_is_no_part_of_it():
    table = pd.DataFrame(dict(user=["a", " a", "a "], item=[1, 2, 3], scene=["x", " ", "x "]))
    events = as_events(table.assign(time=range(3)))
    assert events.user.tolist() == ["a", "a"] and events.scene.tolist() == ["x", "x"]
    assert reasons(events) == {"no scene": (1, 1)}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_datetimes_become_seconds(unit, zone):
    times = pd.Series(pd.to_datetime(["2020-01-02", None, "2020-01-01"])).dt.as_unit(unit)
    times = times.dt.tz_localize("UTC").dt.tz_convert(zone) if zone else times
    table = pd.DataFrame(dict(user=["a", "a", "b"], item=[1, 2, 3], scene=["x", "y", "x"]))
    events = as_events(table.assign(time=times))
    assert events.time.tolist() == [1577836800.0, 1577923200.0]
    assert reasons(events) == {"no time that can be read": (1, 1)}
    with pytest.raises(ValueError, match="to_datetime"):
        as_events(table.assign(time=["2020-01-02", "2020-01-03", "2020-01-04"]))
    cut = split_time(events, pd.Timestamp("2020-01-01 12:00"))
    assert cut.train.users == ["b"]


def test_names_are_plain_and_at_hand():
    table = pd.DataFrame(dict(user=[1, 1, 2], item=[10, 20, 30], scene=[1, 2, 1], time=[1, 2, 3]))
    items, scenes = pair = to_sequences(as_events(table))
    assert json.dumps([pair.index.items, pair.index.scenes, pair.index.users])
    assert [pair.index.items[i - 1] for i in items[0].tolist()] == [10, 20]


def test_leave_last_two_refuses_what_it_would_misread():
    ragged = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 7], [0, 0, 8, 9]])
    bad = {
        "padded on the left": (ragged.flip(1), ragged.flip(1)),
        "without a scene": (ragged, ragged * 0),
        "three events": (ragged[2:], ragged[2:]),
        "items: need a tensor": (ragged.numpy(), ragged),
        "scenes: need a tensor": (ragged, None),
        "one shape": (ragged, ragged[:, 1:]),
    }
    for message, pair in bad.items():
        with pytest.raises(ValueError, match=message):
            split_last(*pair)
    cut = split_last(ragged[:, 1:], ragged[:, 1:])
    assert cut.short == 1 and cut.test.targets.tolist() == [4, 7]
    assert [x for x in cut.items[2].tolist() if x] == [8, 9]  # a short user keeps everything


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=12), st.integers(0, 10**6))
def test_every_user_gets_scenes_of_others(sizes, seed):
    "Each user's scenes are marked as theirs"
    width = max(1, *sizes)
    there = torch.arange(width) >= width - torch.tensor(sizes)[:, None]
    scenes = (torch.arange(1, len(sizes) + 1)[:, None] * there).long()
    if sum(n > 0 for n in sizes) == 1:
        with pytest.raises(ValueError, match="only one user"):
            shuffle_scenes(scenes, seed)
        return
    mixed = shuffle_scenes(scenes, seed)
    assert torch.equal(mixed > 0, scenes > 0)
    assert ((mixed != scenes) | ~there).all()


def test_an_index_refuses_what_it_cannot_hold():
    one = torch.ones(2, 3, dtype=torch.long)
    bad = {
        "40000": (one, one * 40_000),
        "without a scene": (one, torch.tensor([[1, 1, 1], [1, 0, 1]])),
        "behind an event": (one * torch.tensor([1, 1, 0]), one * torch.tensor([1, 1, 0])),
        "one shape": (one, one[:, 1:]),
    }
    for message, pair in bad.items():
        with pytest.raises(ValueError, match=message):
            as_index(*pair)
    nobody = as_index(one * 0, one * 0)
    assert nobody.rows(torch.arange(2), 5)[0].tolist() == [[0], [0]]
    index = as_index(one, one)
    assert index.rows([], 5)[0].shape == (0, 1)
    for numbers in (0, [0.5], [[0]]):
        with pytest.raises(ValueError, match="numbers"):
            index.rows(numbers, 5)


def test_a_catalogue_of_ones_own():
    events = as_events(log_of(2))
    with pytest.raises(ValueError, match="items: a name stands there twice"):
        index_events(events, items=["i1", "i1"])
    index = index_events(events, items=[0, 1, 2])
    assert index.unknown == int((events.item > 2).sum()) > 0
    with pytest.raises(ValueError, match="1 rows without item"):
        index_events(log_of(2).astype(dict(item=object)).assign(item=[None, *[1] * 199]))


bad_splits = {
    "at": dict(at="2020"),
    "max_len": dict(max_len=0),
    "core": dict(core=0),
}


@pytest.mark.parametrize("name", bad_splits)
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"^{name}="):
        split_time(log_of(0), **(dict(at=30.0) | bad_splits[name]))
    with pytest.raises(ValueError, match="no column 'item'"):
        k_core(log_of(0).drop(columns="item"), 2)
    for seed in (1.7, "a", -1):
        with pytest.raises(ValueError, match="seed"):
            make_interplay_world(5, 4, seed=seed)
    for pair, message in (
        ((torch.tensor([[1]]), torch.tensor([1.5])), "names"),
        ((torch.tensor([[-1]]), torch.tensor([1])), "id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            relabel_scenes(*pair)
