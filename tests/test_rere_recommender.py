"""The recommender as an object and as a service: lists, parts of the catalogue, what was seen,
folders, and requests of every kind"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hub
from llmpapers.core.lm import load_lm
from llmpapers.core.train import TrainConfig
from llmpapers.rere.recommender import Limits, Recommender, as_table, create_app, main
from llmpapers.rere.train import RereConfig
from llmpapers.rere.world import make_sid_world

quick = TrainConfig(steps=15, batch_size=16, lr=3e-3, log_every=15)


def events(titles=False):
    world = make_sid_world(60, 60, 8, seed=0)
    rows = [
        (f"u{u}", f"i{i}", t, f"thing number {i // 2}")  # two items of each title
        for u, items in enumerate(world.sequences.tolist())
        for t, i in enumerate(items)
    ]
    table = pd.DataFrame(rows, columns=["user", "item", "time", "title"])
    return table if titles else table.drop(columns="title")


@pytest.fixture(scope="module")
def shop():
    return Recommender.fit(events(), history=3, sft=quick, device="cpu")


def ids(lists):
    return [[r.item for r in row] for row in lists]


def test_lists_are_valid_distinct_unseen_and_sorted(shop):
    histories = [["i1", "i2"], ["i3"], ["i1"] * 7 + ["i5"], []]
    histories = [[i for i in h if i in shop.number] for h in histories]
    lists = shop.recommend(histories, k=8)
    for h, row in zip(histories, lists):
        items = [r.item for r in row]
        assert len(set(items)) == 8 and set(items) <= set(shop.catalogue.items) - set(h)
        assert [r.score for r in row] == sorted((r.score for r in row), reverse=True)
    assert ids(lists) == ids(shop.recommend(histories, k=8, batch=1))
    assert ids(lists) == ids(shop.recommend(histories[::-1], k=8))[::-1]
    most = shop.counts.sort(descending=True, stable=True).indices[:8].tolist()
    assert ids(lists)[-1] == [shop.catalogue.items[i] for i in most]


def test_more_places_than_items(shop):
    n = len(shop.catalogue)
    (row,) = ids(shop.recommend([["i1"]], k=500))
    assert sorted(row) == sorted(set(shop.catalogue.items) - {"i1"}) and len(row) == n - 1
    (row,) = ids(shop.recommend([["i1"]], k=500, exclude_seen=False))
    assert len(row) == n
    few = shop.recommend([["i1"], []], k=5, allowed=[["i1", "i2"], []])
    assert ids(few) == [["i2"], []]
    table = as_table(few, 5)
    assert table["user 0"].tolist() == ["i2", "-", "-", "-", "-"]
    assert table["user 1"].tolist() == ["-"] * 5


@settings(max_examples=15, deadline=None)
@given(
    allowed=st.lists(st.integers(0, 59), max_size=20),
    history=st.lists(st.integers(0, 59), max_size=6),
    k=st.integers(1, 30),
    seen=st.booleans(),
)
def test_exactly_what_may_be_shown(shop, allowed, history, k, seen):
    known = [f"i{i}" for i in range(60) if f"i{i}" in shop.number]
    allowed = [f"i{i}" for i in allowed if f"i{i}" in known]
    history = [f"i{i}" for i in history if f"i{i}" in known]
    (row,) = ids(shop.recommend([history], k, allowed=[allowed], exclude_seen=not seen, width=80))
    may = set(allowed) - (set() if seen else set(history))
    assert len(row) == len(set(row)) == min(k, len(may)) and set(row) <= may


def test_unknown_items_and_bad_arguments(shop):
    with pytest.raises(ValueError, match="'nope' is not in the catalogue"):
        shop.recommend([["i1", "nope"]])
    with pytest.raises(ValueError, match="'nope' is not in the catalogue"):
        shop.recommend([["i1"]], allowed=["nope"])
    assert shop.recommend([["i1", "nope"]], skip_unknown=True) == shop.recommend([["i1"]])
    for change, text in (
        (dict(k=0), "k=0"),
        (dict(k=2.5), "k=2.5"),
        (dict(batch=0), "batch=0"),
        (dict(width=3, k=5), "width=3"),
        (dict(allowed=[["i1"], ["i2"]]), "2 lists for 1"),
    ):
        with pytest.raises(ValueError, match=text):
            shop.recommend([["i1"]], **change)
    with pytest.raises(TypeError, match="list of ids for each user"):
        shop.recommend("i1")
    with pytest.raises(ValueError, match="names='text'"):
        Recommender.fit(events(), names="text")
    with pytest.raises(ValueError, match="reads text"):
        Recommender.fit(events(titles=True), names="titles")
    with pytest.raises(ValueError, match="no column 'time'"):
        Recommender.fit(events().drop(columns="time"))


def test_a_file_is_as_good_as_a_table(tmp_path, shop):
    file = tmp_path / "log.csv"
    events().to_csv(file, index=False)
    other = Recommender.fit(file, history=3, sft=quick, device="cpu")
    assert other.recommend([["i1", "i2"]]) == shop.recommend([["i1", "i2"]])


@pytest.mark.parametrize("names", ["titles", "codes"])
def test_a_policy_of_the_hub_with_titles_or_codes(tmp_path, names):
    folder = hub.hub_folder(tmp_path / "m", "qwen3", max_position_embeddings=1024)
    rl = (
        RereConfig(steps=2, batch_size=2, group_size=3, save_every=1) if names == "titles" else None
    )
    shop = Recommender.fit(
        events(titles=True),
        policy=folder,
        names=names,
        history=3,
        sft=replace(quick, steps=2, batch_size=2),
        rl=rl,
        device="cpu",
    )
    lists = shop.recommend([["i1", "i2"], ["i3"]], k=5)
    for row in lists:
        assert len({r.item for r in row}) == 5 and all(r.title.startswith("thing") for r in row)
    if names == "titles":  # one of two items with one title
        assert len({r.title for r in lists[0]}) == 5
    again = Recommender.load(shop.save(tmp_path / "shop"), device="cpu")
    assert ids(again.recommend([["i1", "i2"], ["i3"]], k=5)) == ids(lists)


def test_a_folder_is_replaced_whole_and_damage_is_named(tmp_path, shop):
    folder = shop.save(tmp_path / "shop")
    assert Recommender.load(folder, device="cpu").report == shop.report
    shop.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["shop"]
    assert load_lm(str(folder), device="cpu").model.config.vocab_size
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no recommender"):
        shop.save(tmp_path / "mine")
    file = folder / "recommender.json"
    good = json.loads(file.read_text())
    for change in (
        dict(counts=[1, 2]),
        dict(catalogue=None),
        dict(history=0),
        dict(coder=dict(terminated="yes")),
        dict(format=dict(names=[])),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="damaged recommender.json"):
            Recommender.load(folder, device="cpu")
    file.write_text("{")
    with pytest.raises(ValueError, match="damaged recommender.json"):
        Recommender.load(folder, device="cpu")


def test_ids_and_sets_of_every_kind(shop):
    want = ids(shop.recommend([["i1"]], k=3, allowed=["i2", "i3", "i4"]))
    for allowed in (
        (x for x in ("i2", "i3", "i4")),
        {"i2", "i3", "i4"},
        np.array(["i2", "i3", "i4"]),
    ):
        assert ids(shop.recommend([["i1"]], k=3, allowed=allowed)) == want
    for histories in ("i1", ["i1"], [1], [None], None, {"u": ["i1"]}):
        with pytest.raises(TypeError, match="histories: need a list of ids for each user"):
            shop.recommend(histories)
    for allowed in ("i2", 5, [None, ["i2"]], ["i2", ["i3"]]):
        with pytest.raises(TypeError, match="allowed: need a list of ids"):
            shop.recommend([["i1"], ["i2"]], allowed=allowed)
    for odd in ((x for x in ["nope"]), {"nope"}, [["i1"]], [None], [float("nan")]):
        with pytest.raises(ValueError, match="is not in the catalogue"):
            shop.recommend([odd])
    with pytest.raises(TypeError, match="exclude_seen='no'"):
        shop.recommend([["i1"]], exclude_seen="no")
    with pytest.raises(ValueError, match="width=2.5"):
        shop.recommend([[]], width=2.5)


def test_numbers_are_read_as_in_the_table():
    table = events()
    table["item"] = table.item.str[1:].astype(int)
    shop = Recommender.fit(table, history=3, sft=quick, device="cpu")
    want = shop.recommend([["1", "2"]], k=3)
    for history in ([1, 2], np.array([1, 2]), [1.0, 2.0], pd.Series([1, 2])):
        assert shop.recommend([history], k=3) == want
        assert shop.recommend([history], k=3, skip_unknown=True) == want
    assert ids(shop.recommend([["1"]], k=3, allowed=[4, 5])) == ids(
        shop.recommend([["1"]], k=3, allowed=["4", "5"])
    )


def test_a_catalogue_of_one_item():
    table = pd.DataFrame(dict(user=["a", "a", "b"], item="x", time=range(3)))
    shop = Recommender.fit(table, history=3, sft=quick, device="cpu")
    assert ids(shop.recommend([["x"], []], k=3)) == [[], ["x"]]
    assert ids(shop.recommend([["x"]], k=3, exclude_seen=False)) == [["x"]]
    with pytest.raises(TypeError, match="interactions: need a table, a Log or a file, got list"):
        Recommender.fit([1])


def test_long_histories_are_cut_to_the_context(tmp_path):
    table = events(titles=True)
    policy = hub.hub_folder(tmp_path / "m", "qwen3", max_position_embeddings=160)
    sft = replace(quick, steps=1, batch_size=2)
    shop = Recommender.fit(
        table[table.user < "u3"], policy=policy, history=9, sft=sft, device="cpu"
    )
    assert shop.coder.max_prompt == 160 - shop.trie.depth
    many = [list(shop.catalogue.items)[:9]]
    assert len(shop.recommend(many, k=2)[0]) == 2
    small = hub.hub_folder(tmp_path / "s", "qwen3", max_position_embeddings=8)
    with pytest.raises(ValueError, match="policy: it reads 8 tokens"):
        Recommender.fit(table, policy=small, sft=sft, device="cpu")


def test_saving_deletes_nothing_of_others(tmp_path, shop, monkeypatch):
    folder = shop.save(tmp_path / "shop")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds 'notes.txt'"):
        shop.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(folder)
    shop.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "shop"]
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="working directory"):
        shop.save(".")
    assert Recommender.load(".", device="cpu").catalogue == shop.catalogue
    (folder / "recommender.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="damaged recommender"):
        shop.save(folder)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_damaged_and_planted_files_are_named(tmp_path, shop, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = shop.save(tmp_path / "whole")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        for change in ("gone", b"{", b""):
            folder = shutil.copytree(whole, tmp_path / "damaged")
            (folder / name).unlink() if change == "gone" else (folder / name).write_bytes(change)
            with pytest.raises(ValueError, match="folder: damaged holds no model"):
                Recommender.load(folder, device="cpu")
            shutil.rmtree(folder)
    folder = shutil.copytree(whole, tmp_path / "damaged")
    (folder / "model.safetensors").unlink()
    torch.save(dict(a=Planted()), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no pickle is read"):
        Recommender.load(folder, device="cpu")
    assert not Path("planted").exists()
    shutil.copy(whole / "model.safetensors", folder)
    good = json.loads((folder / "recommender.json").read_text())
    n = len(shop.catalogue)
    about, fmt = good["catalogue"], good["format"]
    for change in (
        dict(counts=[-1] * n),
        dict(counts=[float("nan")] * n),
        dict(catalogue=about | dict(items=["x"] * n)),
        dict(catalogue=about | dict(items=list(range(n)))),
        dict(catalogue=about | dict(titles=["a"])),
        dict(format=fmt | dict(names=fmt["names"][:3])),
        dict(format=fmt | dict(answers=fmt["answers"][::-1])),
    ):
        (folder / "recommender.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="damaged recommender.json"):
            Recommender.load(folder, device="cpu")
    more = good | dict(history=10**9, counts=[0] * n)
    (folder / "recommender.json").write_text(json.dumps(more))
    other = Recommender.load(folder, device="cpu")
    assert ids(other.recommend([["i1", "i2", "i3"]], k=3)) == ids(
        shop.recommend([["i1", "i2", "i3"]], k=3)
    )
    client = TestClient(create_app(other), raise_server_exceptions=False)
    answer = client.post("/recommend", json=dict(histories=[[]], k=2))
    assert answer.status_code == 200
    assert [r["score"] for r in answer.json()["lists"][0]] == [None, None]


def test_requests_at_the_same_time_get_their_own_answers(shop):
    client = TestClient(create_app(shop), raise_server_exceptions=False)
    asks = [[f"i{i}"] for i in range(12) if f"i{i}" in shop.number]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda h: client.post("/recommend", json=dict(histories=[h])), asks))
    assert [a.status_code for a in got] == [200] * len(asks)
    want = ids(shop.recommend(asks))
    assert [[r["item"] for r in a.json()["lists"][0]] for a in got] == want


# ---- the service ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def client(shop):
    limits = Limits(users=4, history=6, k=9, allowed=50, id_size=12, body=5000)
    return TestClient(create_app(shop, limits), raise_server_exceptions=False)


def test_the_endpoint_answers_as_the_object(shop, client):
    ask = dict(histories=[["i1", "i2"], []], k=4, allowed=["i4", "i5", "i6"])
    answer = client.post("/recommend", json=ask)
    assert answer.status_code == 200
    want = shop.recommend(**ask)
    assert [[r["item"] for r in row] for row in answer.json()["lists"]] == ids(want)
    assert client.get("/health").json()["items"] == len(shop.catalogue)


refused = [
    {},
    [],
    dict(histories=[]),
    dict(histories="i1"),
    dict(histories=["i1"]),
    dict(histories=[[1]]),
    dict(histories=[[None]]),
    dict(histories=[["nope"]]),
    dict(histories=[["\ud800"]]),
    dict(histories=[["x" * 13]]),
    dict(histories=[["i1"] * 7]),
    dict(histories=[["i1"]] * 5),
    dict(histories=[["i1"]], k=0),
    dict(histories=[["i1"]], k=10),
    dict(histories=[["i1"]], k="3"),
    dict(histories=[["i1"]], k=True),
    dict(histories=[["i1"]], k=1e99),
    dict(histories=[["i1"]], allowed=[["i1"], ["i2"]]),
    dict(histories=[["i1"]], allowed=["i1"] * 51),
    dict(histories=[["i1"]], allowed=["\ud800"]),
    dict(histories=[["i1"]], exclude_seen="no"),
    dict(histories=[["i1"]], width=10**9),
]


@pytest.mark.parametrize("query", refused, ids=lambda q: json.dumps(q)[:40])
def test_bad_requests_are_422_with_a_reason(client, query):
    answer = client.post("/recommend", content=json.dumps(query))
    assert answer.status_code == 422 and answer.json()["detail"]


def test_what_is_not_json_or_too_long(client):
    for body in (b"", b"{", b"\xff\xfe", b"[" * 4000, b'{"histories": NaN}'):
        assert 400 <= client.post("/recommend", content=body).status_code < 500
    assert client.post("/recommend", content=b" " * 5001).status_code == 413
    assert client.post("/recommend", content=iter([b"{}"])).status_code == 411
    assert client.get("/recommend").status_code == 405


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(st.sampled_from(["histories", "k", "allowed", "exclude_seen"]), x)
        ),
        max_leaves=8,
    )
)
def test_no_request_is_an_error_of_the_server(client, query):
    assert client.post("/recommend", content=json.dumps(query)).status_code in (200, 413, 422)


@pytest.mark.slow
def test_the_command_serves_on_this_machine_only(tmp_path, shop):
    folder = shop.save(tmp_path / "shop")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "llmpapers.rere.recommender", "--folder", str(folder)]
    server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"])
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as r:
                    assert json.load(r)["items"] == len(shop.catalogue)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        else:
            pytest.fail("no answer")
        import psutil

        places = {
            c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"
        }
        assert places == {"127.0.0.1"}
    finally:
        server.terminate()
        assert server.wait(30) in (0, -15)


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["--folder", str(tmp_path)])
    assert e.value.code == 2 and "recommender.json" in capsys.readouterr().err
