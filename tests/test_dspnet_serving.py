"Event by event equals a whole pass, and what is kept comes back"

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.dspnet.model import DSPNet, last_scores
from llmpapers.dspnet.serving import Session, export_program, load_dspnet, next_scenes, save_dspnet


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
