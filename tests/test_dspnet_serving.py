"Event by event equals a whole pass, and what is kept comes back"

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.bench import extra_peak
from llmpapers.core.scale import rng
from llmpapers.dspnet.baselines import baselines, make_baseline
from llmpapers.dspnet.model import DSPNet, best_of, last_scores, recommend
from llmpapers.dspnet.serving import (
    Session,
    export_onnx,
    export_program,
    load_dspnet,
    load_rival,
    next_scenes,
    save_dspnet,
    save_rival,
)
from llmpapers.dspnet.train import DSPConfig

onnxruntime = pytest.importorskip("onnxruntime")


def network(**kw):
    torch.manual_seed(0)
    sizes = dict(d=8, d_scene=4, n_layers=2, max_len=6)
    return DSPNet(15, 3, **sizes, **kw).eval()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 5), st.booleans(), st.integers(0, 3))
def test_sessions_equal_whole_passes(seed, begin, injected, told):
    "New users, users without events, and histories longer than the window"
    model, g = network(inject_scene=injected, target_context=True), rng(seed, "session")
    users = 3
    size = torch.randint(0, begin + 1, (users,), generator=g)
    there = torch.arange(begin + 1) > begin - size[:, None]
    start = [torch.randint(1, n + 1, there.shape, generator=g) * there for n in (15, 3)]
    live = Session(model, *start)
    for _ in range(9):
        on = torch.rand(users, generator=g) < 0.7
        live.append(*(torch.randint(1, n + 1, (users,), generator=g) * on for n in (15, 3)))
        whole = last_scores(model, live.items, live.scenes, told)
        mine = live.scores(told)
        for a, b in zip(mine, whole):
            assert (a - b).abs().max() < 1e-4
        assert torch.equal(live.next_scenes(1), next_scenes(model, live.items, live.scenes))


@pytest.mark.parametrize("fusion", ["mlp", "gate", "none"])
def test_a_kept_model_comes_back(fusion, tmp_path):
    model = network(fusion=fusion, inject_scene=fusion == "gate")
    model.trained_len.fill_(4)
    save_dspnet(model, tmp_path / "m", items=[f"i{k}" for k in range(15)])
    kept = load_dspnet(tmp_path / "m")
    items, scenes = torch.randint(1, 16, (3, 6)), torch.randint(1, 4, (3, 6))
    for a, b in zip(last_scores(model, items, scenes), last_scores(kept.model, items, scenes)):
        assert torch.equal(a, b)
    assert kept.items[14] == "i14" and kept.scenes == []
    about = json.loads((tmp_path / "m" / "dspnet.json").read_text())
    about["sizes"]["d"] = 16
    (tmp_path / "m" / "dspnet.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="no complete DSPNet"):
        load_dspnet(tmp_path / "m")


@pytest.mark.parametrize("name", baselines)
def test_a_kept_rival_comes_back(name, tmp_path):
    sizes = DSPConfig(d=8, n_layers=2, hidden=2, max_len=6, dropout=0.3, seed=3)
    rival = make_baseline(name, 15, 3, sizes)[0].eval()
    for x in rival.parameters():  # other weights than those that the seed makes
        x.data.add_(0.1)
    rival.trained_len.fill_(4)
    save_rival(rival, tmp_path / "m", scenes=["a", "b", "c"])
    kept = load_rival(tmp_path / "m")
    assert type(kept.model) is type(rival) and not kept.model.training
    assert kept.scenes == ["a", "b", "c"] and int(kept.model.trained_len) == 4
    items, scenes = torch.randint(1, 16, (3, 6)), torch.randint(1, 4, (3, 6))
    for a, b in zip(last_scores(rival, items, scenes), last_scores(kept.model, items, scenes)):
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(ValueError, match="no complete DSPNet"):
        load_dspnet(tmp_path / "m")
    about = (tmp_path / "m" / "dspnet.json").read_text()
    (tmp_path / "m" / "dspnet.json").write_text(about.replace('"d": 8', '"d": 16'))
    with pytest.raises(ValueError, match="no complete rival"):
        load_rival(tmp_path / "m")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="something else"):
        save_dspnet(network(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_an_exported_program_takes_any_number_of_rows():
    model = network(inject_scene=True, target_context=True)
    program = export_program(model).module()
    for rows in (1, 5):
        items, scenes = torch.randint(1, 16, (rows, 6)), torch.randint(1, 4, (rows, 6))
        told = torch.randint(0, 4, (rows,))
        want = last_scores(model, items, scenes, told)
        got = program(items, scenes, told)
        assert (got[0] - want.items).abs().max() < 1e-4


def test_memory_follows_events_and_not_arrivals():
    "Users who act one at a time"
    model = network(inject_scene=True)
    none = torch.zeros(7, 1, dtype=torch.long)
    live = Session(model, none, none)
    for k in range(4):
        for user in range(7):
            event = torch.zeros(7, dtype=torch.long)
            event[user] = 1 + k
            live.append(event, event.clamp(max=3))
            assert live.length <= int(model.trained_len)
            whole = last_scores(model, live.items, live.scenes)
            assert (live.scores().items - whole.items).abs().max() < 1e-4
    assert live.items.shape == (7, 4) and live.items[0].tolist() == [1, 2, 3, 4]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4))
def test_lists_are_those_of_a_whole_stable_sort(seed, n, levels):
    g = rng(seed, "ties")
    scores = torch.randint(levels, (5, n), generator=g).float()
    scores[torch.rand(5, n, generator=g) < 0.2] = -torch.inf
    k = int(torch.randint(1, n + 1, (1,), generator=g))
    whole = scores.sort(dim=1, descending=True, stable=True)
    want = (whole.indices + 1).masked_fill(whole.values == -torch.inf, 0)[:, :k]
    assert torch.equal(best_of(scores, k), want)


def test_lists_for_many_users_are_made_in_parts(monkeypatch):
    model, g = network(target_context=True), rng(0, "parts")
    items, scenes = (torch.randint(1, n + 1, (9, 6), generator=g) for n in (15, 3))
    told = torch.arange(9) % 4
    want = recommend(model, items, scenes, 5, exclude_seen=True, target_context=told)
    monkeypatch.setattr("llmpapers.dspnet.model.scores_at_once", 31)
    widest = []
    whole = model.item_scores
    monkeypatch.setattr(
        model, "item_scores", lambda z, t=None: (widest.append(len(z)), whole(z, t))[1]
    )
    assert torch.equal(
        recommend(model, items, scenes, 5, exclude_seen=True, target_context=told), want
    )
    assert max(widest) == 2


def test_the_memory_of_lists_is_that_of_their_scores():
    model = DSPNet(20_000, 3, d=8, d_scene=4, n_layers=1, max_len=4).eval()
    items = torch.randint(1, 20_001, (1500, 4), generator=rng(0, "memory"))
    recommend(model, items[:8], items[:8] % 3 + 1, 10)
    peak = extra_peak(lambda: recommend(model, items, items % 3 + 1, 10))
    assert peak < 4 * 1024 * 20_000 * 4  # all rows at once, sorted, need more than seven of these


names = {
    "numpy": ([np.int64(k) for k in range(15)], list(range(15))),
    "index": (pd.unique(pd.Series(range(15))), list(range(15))),
    "torch": (torch.arange(15), list(range(15))),
}


@pytest.mark.parametrize("kind", names)
def test_names_that_are_numbers_come_back(kind, tmp_path):
    given_names, want = names[kind]
    save_dspnet(network(), tmp_path / "m", given_names)
    assert load_dspnet(tmp_path / "m").items == want


def edit(**kw):
    "Change the readable file"

    def change(folder):
        about = json.loads((folder / "dspnet.json").read_text())
        for key, value in kw.items():
            (about if key in about else about["sizes"])[key] = value
        (folder / "dspnet.json").write_text(json.dumps(about))

    return change


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-50])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"garbage")


def other_weights(folder):
    "Weights that fit, are whole, and are of another model"
    torch.manual_seed(1)
    other = DSPNet(15, 3, d=8, d_scene=4, n_layers=2, max_len=6)
    save_dspnet(other, folder.parent / "other")
    (folder / "model.safetensors").write_bytes(
        (folder.parent / "other" / "model.safetensors").read_bytes()
    )


faults = dict(
    cut=cut,
    garbage=garbage,
    weights=other_weights,
    names=edit(items=["c", "a"]),
    order=edit(items=[f"i{k}" for k in reversed(range(15))]),
    nothing=edit(items=None),
    kind=edit(kind="SASRec"),
    heads=edit(n_heads=4),
    no_sums=lambda folder: (folder / "checksums.json").unlink(),
)


@pytest.mark.parametrize("name", faults)
def test_a_kept_model_that_was_changed_is_refused(name, tmp_path):
    save_dspnet(network(), tmp_path / "m", [f"i{k}" for k in range(15)])
    faults[name](tmp_path / "m")
    with pytest.raises(ValueError, match="m holds no complete DSPNet"):
        load_dspnet(tmp_path / "m")


def test_a_folder_of_a_model_is_the_models_alone(tmp_path):
    save_dspnet(network(), tmp_path / "m")
    save_dspnet(network(), tmp_path / "m")  # a model that is there is replaced
    (tmp_path / "m" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="something else"):
        save_dspnet(network(), tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="is a file"):
        save_dspnet(network(), tmp_path / "m" / "notes.txt")


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    model = network()
    model.item_stream.embed.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="item_stream.embed.weight"):
        save_dspnet(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_an_export_takes_the_scene_of_the_target_where_the_model_does(told, tmp_path):
    model = network(target_context=told)
    items, scenes = torch.randint(1, 16, (3, 6)), torch.randint(1, 4, (3, 6))
    target = (torch.tensor([0, 1, 2]),) if told else ()
    want = last_scores(model, items, scenes, *target).items
    got = export_program(model).module()(items, scenes, *target)[0]
    assert (got - want).abs().max() < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about the checks of its input
        export_onnx(model, tmp_path / "m.onnx")
    run = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    inputs = [x.name for x in run.get_inputs()]
    assert inputs == ["items", "scenes", "target"][: 2 + told]
    fed = dict(zip(inputs, (x.numpy() for x in (items, scenes, *target))))
    assert np.abs(run.run(None, fed)[0] - want.numpy()).max() < 1e-4


def test_the_callers_model_keeps_its_mode():
    model = network().train()
    one = torch.ones(2, 3, dtype=torch.long)
    live = Session(model, one, one)
    before = live.scores().items
    assert model.training
    export_program(model)
    assert model.training
    with pytest.raises(ValueError):
        recommend(model, one * 99, one)
    with pytest.raises(ValueError):
        last_scores(model, one * 99, one)
    assert model.training
    live.append(one[:, 0], one[:, 0])
    assert model.training and not torch.equal(before, live.scores().items)
    assert torch.equal(live.scores().items, live.scores().items)


rival = make_baseline("SASRec", 15, 3, DSPConfig(d=8, max_len=6))[0]
some = torch.ones(2, 3, dtype=torch.long)
bad = {
    "model: need a DSPNet, got SASRec": [
        lambda: save_dspnet(rival, "never"),
        lambda: export_program(rival),
        lambda: export_onnx(rival, "never.onnx"),
        lambda: Session(rival, some, some),
    ],
    "need a rival .*, got DSPNet": [lambda: save_rival(network(), "never")],
    "target_context": [
        lambda: Session(network(target_context=True), some, some).scores(4),
        lambda: Session(network(target_context=True), some, some).scores(-1),
        lambda: Session(network(target_context=True), some, some).scores(1.0),
        lambda: Session(network(target_context=True), some, some).scores(torch.ones(3).long()),
        lambda: recommend(network(target_context=True), some, some, 2, target_context=True),
    ],
    "items": [
        lambda: Session(network(), some, some).append([1, 2], [1, 2]),
        lambda: recommend(network(), some.bool(), some, 2),
        lambda: recommend(network(), some.byte(), some.byte(), 2),
    ],
    "a name stands there twice": [lambda: save_dspnet(network(), "never", ["a"] * 15)],
}


@pytest.mark.parametrize("message", bad)
def test_bad_arguments_are_named(message):
    for call in bad[message]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", [*sorted(baselines), "DSPnet"])
def test_an_unknown_scene_of_the_target_is_no_question(name):
    made = make_baseline if name != "DSPnet" else None
    model = made(name, 15, 3, DSPConfig(d=8, d_scene=4, max_len=6))[0] if made else network()
    want = recommend(model, some, some, 3)
    for nobody in (0, torch.zeros(2, dtype=torch.long)):
        assert torch.equal(recommend(model, some, some, 3, target_context=nobody), want)
