"A real log: read as it is, cut so that every event counts once, split without a look ahead"

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.dspnet.real_log import (
    Arm,
    RealConfig,
    arms,
    counted,
    definitions,
    describe_log,
    genres,
    load_rated,
    make_case,
    measured,
    real_outcome,
    scene_rates,
    windows,
    write_planted,
)
from llmpapers.dspnet.train import DSPConfig, TensorSource, make_batch

tiny = RealConfig(
    run=DSPConfig(d=8, d_scene=4, n_layers=1, max_len=4, steps=2, batch_size=8, eval_every=1)
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_planted(folder, n_users=40, seq_len=9, seed=1)
    return load_rated(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path / "cache"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 3))
def test_every_event_but_the_first_is_a_target_once(sizes, width, spare):
    length = max(*sizes, 1) + spare
    items = torch.zeros(len(sizes), length, dtype=torch.long)
    for u, n in enumerate(sizes):
        if n:
            items[u, -n:] = torch.arange(1, n + 1) + 100 * u
    scenes = items * 2
    cut, told = windows(items, scenes, width)
    assert torch.equal(told, cut * 2) and cut.shape[1] == width + 1
    assert not ((cut[:, 1:] == 0) & (cut[:, :-1] > 0)).any()  # padded on the left
    steps = cut[:, 1:][(cut[:, :-1] > 0) & (cut[:, 1:] > 0)].tolist()
    wanted = [100 * u + k for u, n in enumerate(sizes) for k in range(2, n + 1)]
    assert Counter(steps) == Counter(wanted)
    alone = [100 * u + 1 for u, n in enumerate(sizes) if n == 1]
    assert all(cut[:, -1].tolist().count(x) == 1 for x in alone)
    if len(cut):
        batch = make_batch(
            TensorSource(cut, told), replace(tiny.run, max_len=width), rng(0, "batch")
        )
        assert int((batch.items > 0).sum(1).max()) <= width + 1


def test_a_recbole_copy_is_the_same_log(log, tmp_path):
    write_planted(tmp_path, n_users=40, seq_len=9, seed=1)
    text = (tmp_path / "u.data").read_text()
    other = tmp_path / "recbole"
    other.mkdir()
    (other / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + text
    )
    rows = [f"{i}\tFilm\t1995\t{genres[1 + i % 6]} Western" for i in range(1, 301)]
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    (other / "ml-100k.item").write_text("\n".join([head, *rows]))
    same = load_rated(other)
    assert same.equals(log) and same.attrs["sha256"] == log.attrs["sha256"]
    (tmp_path / "u.data").write_text(text.replace("\t5\t", "\t4\t", 1))
    assert load_rated(tmp_path).attrs["sha256"] != log.attrs["sha256"]


def test_nobody_rates_a_film_twice(log):
    assert not log.duplicated(["user", "item"]).any() and 330 < len(log) <= 360
    assert set(log["time of day"].str.split(", ").str[1]) == {"working day"}


def test_films_by_their_flags(tmp_path):
    "The first genre of `u.item`, a film without one, a film that the table lacks, another alphabet"
    (tmp_path / "u.data").write_text("1\t7\t4\t880000000\n1\t8\t3\t880000001\n1\t9\t1\t880000002\n")
    flags = [["0"] * len(genres) for _ in range(2)]
    flags[0][5] = flags[0][8] = "1"
    lines = ["|".join([str(7 + k), "Caf\xe9", "", "", "", *f]) for k, f in enumerate(flags)]
    (tmp_path / "u.item").write_text("\n".join(lines), encoding="latin-1")
    read = load_rated(tmp_path)
    assert read["genre"].tolist() == ["Comedy", "unknown", "unknown"]
    assert read["liked"].tolist() == ["liked", "not liked", "not liked"]
    (tmp_path / "u.item").write_text("7|Film|1\n")
    with pytest.raises(ValueError, match="line 1 has 3 fields"):
        load_rated(tmp_path)


def test_a_log_is_described(log):
    found = describe_log(log)
    assert (found["events"], found["users"]) == (len(log), 40) and found["users within a day"] == 0
    again = log.assign(time=log["time"].min())
    found = describe_log(again)
    assert found["users within a day"] == found["events in the second of the one before"] == 1
    rates = scene_rates(make_case(log.assign(genre="War"), "genre", "last"))
    assert rates == dict(commonest=1.0, as_before=1.0)


@settings(deadline=None, max_examples=15)
@given(share=st.floats(0.3, 0.9), definition=st.sampled_from(definitions))
def test_nothing_later_than_the_split_is_in_training(log, share, definition):
    case = make_case(log, definition, "time", share=share)
    at = np.quantile(log["time"], share)
    early = log[log["time"] < at]
    held = (case.items > 0).sum() + len(case.valid.targets)
    assert int(held) == len(early) and case.n_items == early["item"].nunique()
    later = log[log["time"] >= at]["user"].nunique()
    assert len(case.test.targets) + case.left_out == later


def test_shuffled_scenes_are_those_of_others(log):
    plain, other = (make_case(log, "time of day", "last", shuffle=k) for k in (None, 3))
    assert torch.equal(plain.items, other.items) and not torch.equal(plain.scenes, other.scenes)
    assert torch.equal(plain.test.targets, other.test.targets)
    rows = {tuple(x) for x in plain.test.scenes.tolist()}
    assert all(tuple(x) in rows for x in other.test.scenes.tolist())


def test_an_outcome_has_every_user_and_is_made_once(log, cache):
    found = real_outcome(tiny, log, "NARM", "last", 0)
    assert all(len(found[m]) == 40 for m in measured) and len(found["valid"]) == 2
    assert real_outcome(tiny, log, "NARM", "last", 0) == found
    assert real_outcome(tiny, log, "NARM", "last", 1) != found
    scene = real_outcome(tiny, log, "genre: DSPnet, shuffled", "last", 0)
    assert len(scene["scene"]) == 40
    late = real_outcome(tiny, log, "genre: behaviour types", "time", 0)
    assert sum(late["known"]) == len(late["known"])
    for message, args in {
        "arm='DIN' must be one of SASRec": (tiny, log, "DIN", "last", 0),
        "split='first' must be one of last, time": (tiny, log, "SASRec", "first", 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            real_outcome(*args)


def test_rated_films_are_no_candidates(log):
    "A user who has rated all films but the target gets it first, whatever the rival"
    case = make_case(log, "genre", "last")
    whole = torch.arange(1, case.n_items + 1)
    held = case.test._replace(items=whole[whole != 5][None], targets=torch.tensor([5]))
    held = held._replace(scenes=torch.ones_like(held.items), target_scenes=torch.tensor([1]))
    assert counted("popularity", case._replace(test=held))["NDCG@10"] == [1.0]


def test_arms_cover_definitions():
    assert {a.definition for a in arms.values()} == set(definitions)
    assert all(isinstance(a, Arm) for a in arms.values())
    for d in definitions:
        assert {f"{d}: DSPnet", f"{d}: DSPnet, injection", f"{d}: behaviour types"} <= set(arms)
