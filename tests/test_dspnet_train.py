"One training for every model: seeds, folders, windows, memory"

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmpapers.core.bench import extra_peak
from llmpapers.dspnet.baselines import baselines, make_baseline, train_baseline
from llmpapers.dspnet.data import make_interplay_world
from llmpapers.dspnet.evaluate import ranking_metrics
from llmpapers.dspnet.logs import split_last
from llmpapers.dspnet.model import DSPNet, last_scores
from llmpapers.dspnet.train import (
    Batch,
    DSPConfig,
    Objective,
    TensorSource,
    likelihood,
    model_fields,
    seeded,
    train_dspnet,
    train_model,
)

SMALL = dict(d=8, d_scene=4, n_layers=1, max_len=8, batch_size=8)


def histories(n=30, length=8, n_items=10):
    items = torch.randint(1, n_items + 1, (n, length), generator=torch.Generator().manual_seed(0))
    return items, items % 3 + 1


def test_told_scenes_are_cropped_with_long_histories():
    items, scenes = histories(length=20)
    model, history = train_dspnet(
        items, scenes, DSPConfig(**SMALL, steps=3, target_context=True), 10, 3, device="cpu"
    )
    assert torch.isfinite(torch.tensor(history.column("loss"))).all()
    assert int(model.trained_len) == 8


@pytest.mark.parametrize("name", list(baselines))
def test_rivals_take_the_configuration_of_the_network(name):
    items, scenes = histories()
    run = DSPConfig(**SMALL, steps=2, target_context=True, inject_scene=True)
    train_baseline(name, items, scenes, run, 10, 3, device="cpu")
    if name != "FDSA-like":
        with pytest.raises(ValueError, match="align='mmd' needs two streams"):
            train_baseline(name, items, scenes, replace(run, align="mmd"), 10, 3, device="cpu")


@pytest.mark.parametrize("kw", [dict(ccr="learned", ccr_weight=0.5), dict(align="adversarial")])
def test_everything_follows_from_the_seed_and_nothing_leaks(kw):
    items, scenes = histories()
    found, after = [], []
    for state in (1, 2):
        torch.manual_seed(state)
        run = DSPConfig(**SMALL, steps=3, **kw)
        found.append(train_dspnet(items, scenes, run, 10, 3, device="cpu")[0])
        after.append(torch.rand(1))
        torch.manual_seed(state)
        assert torch.equal(torch.rand(1), after[-1]), "the caller's random state has moved"
    pairs = zip(found[0].parameters(), found[1].parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_mmd_takes_a_wide_scene_stream():
    run = DSPConfig(d=4, d_scene=8, n_layers=1, max_len=8, steps=2, batch_size=8, align="mmd")
    train_dspnet(*histories(), run, 10, 3, device="cpu")


@pytest.fixture
def problem():
    world = make_interplay_world(60, 8, 12)
    run = DSPConfig(**SMALL, steps=60, eval_every=10, lr=2e-2)
    parts = split_last(world.items, world.scenes)
    return run, parts, TensorSource(parts.items, parts.scenes)


def fresh(run):
    return seeded(lambda: DSPNet(12, 4, **model_fields(run)), 0)


def valid_ndcg(model, parts):
    scores = last_scores(model, parts.valid.items, parts.valid.scenes).items
    return ranking_metrics(scores, parts.valid.targets, (10,))["NDCG@10"]


class Stop(Exception):
    pass


def test_a_finished_and_a_broken_run_keep_the_best_weights(problem, tmp_path):
    run, parts, source = problem
    first, again, broken = (fresh(run) for _ in range(3))
    train_model(first, source, run, parts.valid, out=tmp_path / "run", device="cpu")
    train_model(again, source, run, parts.valid, out=tmp_path / "run", device="cpu")

    looks = []

    def watch(model):
        looks.append(1)
        if len(looks) == 5:
            raise Stop
        return {}

    with pytest.raises(Stop):
        train_model(broken, source, run, parts.valid, tmp_path / "b", "cpu", watch)
    assert list((tmp_path / "b").glob("step_*")), "nothing was kept before the end"
    resumed = fresh(run)
    train_model(resumed, source, run, parts.valid, out=tmp_path / "b", device="cpu")
    for other in (again, resumed):
        assert valid_ndcg(other, parts) == valid_ndcg(first, parts)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("field", ["alpha", "batch_size", "data"])
def test_a_folder_of_another_run_is_refused(problem, tmp_path, field):
    run, parts, source = problem
    run = replace(run, steps=2, eval_every=1)
    train_model(fresh(run), source, run, out=tmp_path / "run", device="cpu")
    other = dict(alpha=dict(alpha=2.0), batch_size=dict(batch_size=16), data={})[field]
    moved = TensorSource(parts.items.flip(0), parts.scenes.flip(0)) if field == "data" else source
    with pytest.raises(ValueError, match=f"{field}: the run in run has"):
        train_model(fresh(run), moved, replace(run, **other), out=tmp_path / "run", device="cpu")


def test_valid_needs_looks(problem):
    run, parts, source = problem
    with pytest.raises(ValueError, match="eval_every"):
        train_model(fresh(run), source, replace(run, eval_every=0), parts.valid, device="cpu")


def test_padding_is_no_training():
    items, scenes = histories(length=5)
    run = DSPConfig(**(SMALL | dict(max_len=20)), steps=2)
    wide = [F.pad(x, (9, 0)) for x in (items, scenes)]
    for pair in ((items, scenes), wide):
        assert int(train_dspnet(*pair, run, 10, 3, device="cpu")[0].trained_len) == 4


def test_the_catalogue_covers_validation():
    items, scenes = histories()
    parts = split_last(*(torch.cat([x, x[:, :1] + 5], 1) for x in (items, scenes)))
    run = DSPConfig(**SMALL, steps=2, eval_every=1)
    valid = parts.valid._replace(targets=parts.valid.targets.clamp(min=11))
    model, _ = train_dspnet(parts.items, parts.scenes, run, valid=valid, device="cpu")
    assert model.n_items == 11


@pytest.mark.parametrize("scored", [True, False])
def test_a_chunked_loss_never_makes_all_scores(scored):
    n = 60_000
    run = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=20)
    if scored:
        model = DSPNet(n, 3, **model_fields(run))
    else:
        model, _ = make_baseline("SASRec", n, 3, run)
    items = torch.randint(1, n + 1, (16, 21))
    batch = Batch(items, items % 3 + 1, None)
    all_scores = 16 * 20 * n * 4
    peak = extra_peak(lambda: likelihood(model, batch, 0.5, 1024)[0].total.backward())
    assert peak < all_scores / 2
    model.eval()
    dense, chunked = (likelihood(model, batch, 0.5, c)[0] for c in (0, 1024))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(dense, chunked))


@pytest.mark.parametrize("name", ["behaviour types", "composite"])
def test_a_batch_without_a_target_has_no_loss(name):
    model, run = make_baseline(name, 10, 3, DSPConfig(**SMALL))
    nothing = torch.zeros(2, 5, dtype=torch.long)
    assert float(Objective(model, run)(Batch(nothing, nothing, None))) == 0


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(n_layers=0), "n_layers"),
        (dict(n_heads=0), "n_heads"),
        (dict(n_heads=2.0), "n_heads"),
        (dict(hidden=0), "hidden"),
        (dict(d=7), "no multiple"),
        (dict(inject_scene="yes"), "inject_scene"),
    ],
)
def test_sizes_are_checked(kw, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DSPNet(10, 3, **kw)
    with pytest.raises((ValueError, TypeError), match=message):
        DSPConfig(**kw)


def test_arrays_are_refused_by_name():
    items, scenes = histories()
    with pytest.raises(TypeError, match="items is a ndarray"):
        train_dspnet(items.numpy(), scenes, DSPConfig(**SMALL, steps=2))
