"Logs in their published forms, the flat index, and splits without a leak"

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
