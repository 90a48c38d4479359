"Event by event equals a whole pass, and what is kept comes back"

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.dspnet.baselines import make_baseline
from llmpapers.dspnet.model import DSPNet, last_scores
from llmpapers.dspnet.serving import (
    Session,
    export_onnx,
    export_program,
    load_dspnet,
    next_scenes,
    save_dspnet,
)
from llmpapers.dspnet.train import DSPConfig


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


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="something else"):
        save_dspnet(network(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_exported_program_takes_any_number_of_rows():
    model = network(inject_scene=True, target_context=True)
    program = export_program(model).module()
    for rows in (1, 5):
        items, scenes = torch.randint(1, 16, (rows, 6)), torch.randint(1, 4, (rows, 6))
        told = torch.randint(0, 4, (rows,))
        want = last_scores(model, items, scenes, told)
        got = program(items, scenes, told)
        assert (got[0] - want.items).abs().max() < 1e-4


SIZES = dict(d=8, d_scene=4, n_layers=1, max_len=6, dropout=0.0)


def zeros(n):
    return torch.zeros(n, 1, dtype=torch.long)


def test_a_session_of_single_actors_stays_small():
    model = DSPNet(50, 3, **SIZES)
    users = 20
    session = Session(model, zeros(users), zeros(users))
    for turn in range(4 * users):
        act = torch.zeros(users, dtype=torch.long)
        act[turn % users] = turn % 50 + 1
        session.append(act, act.clamp(max=3))
        assert session.length <= 12 and session.items.shape[1] <= turn // users + 2
    whole = last_scores(model, session.items, session.scenes)
    assert (session.scores().items - whole.items).abs().max() < 1e-5


@pytest.mark.parametrize("told", [4, -1, 1.0, True, [1, 2, 3]])
def test_a_session_checks_the_scene_of_the_target(told):
    model = DSPNet(50, 3, **SIZES, target_context=True)
    session = Session(model, zeros(2), zeros(2))
    for asked in (session, model):
        with pytest.raises(ValueError, match="target_context"):
            if asked is session:
                session.recommend(3, target_context=told)
            else:
                model.recommend(zeros(2), zeros(2), 3, target_context=told)


def test_nobody_changes_the_mode_of_a_model(tmp_path):
    model = DSPNet(50, 3, **SIZES).train()
    session = Session(model, zeros(2), zeros(2))
    session.append(torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
    session.recommend(3)
    export_program(model)
    with pytest.raises(ValueError):
        last_scores(model, zeros(2) + 99, zeros(2) + 1)
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize("use", [save_dspnet, Session, export_program])
def test_rivals_are_refused_by_name(use, tmp_path):
    rival, _ = make_baseline("SASRec", 10, 3, DSPConfig(d=8, d_scene=4, n_layers=1, max_len=6))
    more = {save_dspnet: (tmp_path / "x",), Session: (zeros(1), zeros(1))}.get(use, ())
    with pytest.raises(ValueError, match="SASRec"):
        use(rival, *more)


def test_names_of_numbers_are_kept_and_other_files_spared(tmp_path):
    model = DSPNet(3, 2, **SIZES)
    save_dspnet(model, tmp_path / "m", items=list(np.array([10, 20, 30])), scenes=["a", "b"])
    kept = load_dspnet(tmp_path / "m")
    assert kept.items == [10, 20, 30] and kept.scenes == ["a", "b"]
    save_dspnet(model, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        save_dspnet(model, tmp_path / "m")
    with pytest.raises(ValueError, match="is a file"):
        save_dspnet(model, tmp_path / "m" / "notes.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(items=["c", "a"]), "2 names"),
        (dict(items="abc"), "list of names"),
        (dict(items=None), "list of names"),
        (dict(kind="SASRec"), "SASRec"),
        (dict(trained_len=500), "trained_len"),
        ("cut", "not the file"),
        ("noise", "not the file"),
    ],
)
def test_what_is_read_is_checked(tmp_path, change, message):
    folder = save_dspnet(DSPNet(3, 2, **SIZES), tmp_path / "m")
    about, weights = folder / "dspnet.json", folder / "model.safetensors"
    if isinstance(change, dict):
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
    else:
        data = weights.read_bytes()
        weights.write_bytes(data[:-50] if change == "cut" else b"noise")
    with pytest.raises(ValueError, match=f"holds no complete DSPNet.*{message}"):
        load_dspnet(folder)


def test_onnx_has_its_three_inputs_with_and_without_a_told_scene(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = DSPNet(10, 3, **SIZES)
    path = export_onnx(model, tmp_path / "m.onnx")
    run = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    items = torch.randint(1, 11, (3, 6))
    fed = dict(items=items.numpy(), scenes=(items % 3 + 1).numpy(), target=np.array([0, 1, 2]))
    want = last_scores(model, items, items % 3 + 1)
    assert np.abs(run.run(None, fed)[0] - want.items.numpy()).max() < 1e-4


def test_lists_of_many_users_are_those_of_a_few():
    model = DSPNet(10, 3, **SIZES, target_context=True)
    items = torch.randint(1, 11, (2100, 5))
    told = torch.arange(2100) % 4
    lists = model.recommend(items, items % 3 + 1, 4, True, told)
    some = slice(1020, 1030)
    few = model.recommend(items[some], items[some] % 3 + 1, 4, True, told[some])
    assert torch.equal(lists[some], few)
