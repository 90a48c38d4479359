"Runs that stop and go on, what a batch holds, and arguments that are refused by name"

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmpapers.core.bench import extra_peak
from llmpapers.core.scale import rng
from llmpapers.dspnet.baselines import baselines, count_scores, make_baseline, train_baseline
from llmpapers.dspnet.data import make_interplay_world
from llmpapers.dspnet.logs import as_index, split_last
from llmpapers.dspnet.losses import ccr_loss, ccr_weights, joint_nll, mmd
from llmpapers.dspnet.model import DSPNet, last_scores
from llmpapers.dspnet.train import (
    Batch,
    DSPConfig,
    Objective,
    TensorSource,
    likelihood,
    make_batch,
    model_fields,
    seeded,
    train_dspnet,
    train_model,
)

world = make_interplay_world(60, 8, 12, seed=0)
parts = split_last(world.items, world.scenes)
sizes = dict(d=8, d_scene=4, n_layers=1, max_len=8, batch_size=8)
config = DSPConfig(**sizes, steps=60, eval_every=10, lr=2e-2)
source = TensorSource(parts.items, parts.scenes)


def new(**kw):
    return seeded(lambda: DSPNet(12, 4, **(model_fields(config) | kw)), 0)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Stop(Exception):
    pass


def stop_at(look):
    "A watch that fails at a look"
    calls = []

    def watch(model):
        calls.append(1)
        if len(calls) == look:
            raise Stop
        return {}

    return watch


def test_a_run_that_was_stopped_ends_in_the_weights_of_one_that_was_not(tmp_path):
    whole, halted, again = new(), new(), new()
    history = train_model(whole, source, config, parts.valid, device="cpu")
    seen = history.column("ndcg")
    assert seen.index(max(seen)) < len(seen) - 1  # the last weights are not the best ones
    with pytest.raises(Stop):
        train_model(halted, source, config, parts.valid, tmp_path / "r", "cpu", stop_at(4))
    assert list((tmp_path / "r").glob("step_*"))  # what was done is not lost
    train_model(halted, source, config, parts.valid, tmp_path / "r", "cpu")
    assert torch.equal(weights(whole), weights(halted))
    train_model(again, source, config, parts.valid, tmp_path / "r", "cpu")  # a finished run
    assert torch.equal(weights(whole), weights(again))


changes = {
    "alpha": dict(config=replace(config, alpha=2.0)),
    "ccr": dict(config=replace(config, ccr="history")),
    "batch_size": dict(config=replace(config, batch_size=16)),
    "chunk": dict(config=replace(config, chunk=5)),
    "histories": dict(source=TensorSource(parts.items[:20], parts.scenes[:20])),
    "valid": dict(valid=parts.test),
    "model": dict(model=lambda: make_baseline("SASRec", 12, 4, config)[0]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    train_model(new(), source, config, parts.valid, out, "cpu")
    return out


@pytest.mark.parametrize("name", changes)
def test_a_folder_gives_no_other_runs_weights(name, finished):
    given = dict(config=config, source=source, valid=parts.valid, model=new) | changes[name]
    with pytest.raises(ValueError, match=f"^{name}: the run in r has"):
        train_model(
            given["model"](), given["source"], given["config"], given["valid"], finished, "cpu"
        )


def test_the_same_histories_with_other_padding_are_the_same_run(finished):
    padded = TensorSource(F.pad(parts.items, (3, 0)), F.pad(parts.scenes, (3, 0)))
    train_model(new(), padded, config, parts.valid, finished, "cpu")


def test_validation_is_looked_at_unless_told_otherwise():
    _, history = train_dspnet(
        parts.items, parts.scenes, replace(config, eval_every=0), valid=parts.valid, device="cpu"
    )
    assert len(history.column("ndcg")) == 10


@pytest.mark.parametrize("long", [True, False])
def test_the_told_scene_is_cut_with_its_history(long):
    items = torch.randint(1, 11, (8, 20 if long else 6), generator=rng(0, "told"))
    how = replace(config, steps=2, eval_every=0, target_context=True)
    train_dspnet(items, items % 3 + 1, how, 10, 3, device="cpu")
    batch = make_batch(TensorSource(items, items % 3 + 1), how, rng(0, "batch"))
    told = batch.told.sum(1) > 0
    assert told.any() and torch.equal(batch.told[told], batch.scenes[told, 1:])


@pytest.mark.parametrize("extra", [dict(ccr="learned"), dict(align="adversarial")])
def test_everything_trained_follows_from_the_seed_of_the_run(extra):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        how = replace(config, steps=3, eval_every=0, **extra)
        model, _ = train_dspnet(parts.items, parts.scenes, how, 12, 4, device="cpu")
        found.append(weights(model))
        torch.manual_seed(seed)
        Objective(model, how)
        mine = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(mine, torch.rand(1))  # the caller's random state is left alone
    assert torch.equal(*found)


def test_padding_is_no_history():
    for wide in (0, 9):
        items = F.pad(world.items[:, :5], (wide, 0))
        model = make_baseline("SASRec", 12, 4, replace(config, max_len=20))[0]
        how = replace(config, steps=1, eval_every=0, max_len=20)
        train_model(model, TensorSource(items, items.sign()), how, device="cpu")
        assert int(model.trained_len) == 4


@pytest.mark.parametrize("form", [TensorSource, as_index])
def test_the_start_is_trained_where_no_history_fits(form):
    items = torch.arange(1, 11).expand(30, 10).clone()
    items[:3, :4] = 0  # some begin with another item
    how = DSPConfig(**(sizes | dict(batch_size=64)), target_context=True)
    how = replace(how, max_len=5)
    batch = make_batch(form(items, items.sign()), how, rng(0, "start"))
    begins = batch.items[:, 0] == 0
    assert 0 < int(begins.sum()) < 30
    rows = {tuple(row) for row in batch.items[begins].tolist()}
    assert rows <= {(0, 1, 2, 3, 4, 5), (0, 5, 6, 7, 8, 9)} and (0, 1, 2, 3, 4, 5) in rows
    assert {tuple(row) for row in batch.items[~begins].tolist()} == {(5, 6, 7, 8, 9, 10)}
    told = batch.told.sum(1) > 0
    assert torch.equal(batch.told[told], batch.scenes[told, 1:])


def test_sources_give_the_same_earliest_and_latest_events():
    g = rng(0, "sources")
    size = torch.randint(1, 9, (12,), generator=g)
    there = torch.arange(8) >= 8 - size[:, None]
    items = torch.randint(1, 12, (12, 8), generator=g) * there
    two = TensorSource(items, items.sign()), as_index(items, items.sign())
    for early in (False, True):
        for a, b in zip(*(x.rows(torch.arange(12), 4, early) for x in two)):
            assert torch.equal(a[:, -b.shape[1] :], b) and not a[:, : -b.shape[1]].any()
        for mine, row in zip(two[0].rows(torch.arange(12), 4, early)[0].tolist(), items.tolist()):
            row = [x for x in row if x]
            assert [x for x in mine if x] == (row[:4] if early else row[-4:])


@pytest.mark.parametrize("name", ["DSPnet", "SASRec"])
def test_pieces_of_the_softmax_hold_no_scores_of_all_items(name):
    n = 60_000
    how = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=20)
    model = (
        DSPNet(n, 3, **model_fields(how)) if name == "DSPnet" else make_baseline(name, n, 3, how)[0]
    )
    items = torch.randint(1, n + 1, (16, 21), generator=rng(0, "pieces"))
    batch = Batch(items, items % 3 + 1, None)
    full = 4 * 16 * 20 * n  # bytes of all scores
    model.train()
    peak = extra_peak(lambda: likelihood(model, batch, 0.5, 1024)[0].total.backward())
    assert peak < full / 2
    small = DSPNet(50, 3, **model_fields(how)).eval()
    batch = Batch(items % 50 + 1, items % 3 + 1, None)
    whole, cut = (likelihood(small, batch, 0.5, chunk)[0] for chunk in (0, 7))
    for a, b in zip(whole, cut):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", sorted(baselines))
def test_a_rival_leaves_an_extension_aside_or_refuses_it_by_name(name):
    how = replace(config, steps=1, eval_every=0)
    run = (name, parts.items, parts.scenes)
    plain, told = (
        train_baseline(*run, replace(how, target_context=x), device="cpu")[0] for x in (False, True)
    )
    assert told.n_items == plain.n_items  # the field is the dual network's own; it is left aside
    for kind in ("mmd", "adversarial"):
        if name == "FDSA-like":
            train_baseline(*run, replace(how, align=kind), device="cpu")
        else:
            with pytest.raises(ValueError, match="align"):
                train_baseline(*run, replace(how, align=kind), device="cpu")


def test_a_wide_scene_stream_can_be_aligned():
    how = replace(config, steps=1, eval_every=0, d=4, d_scene=8, align="mmd")
    train_dspnet(parts.items, parts.scenes, how, device="cpu")


@pytest.mark.parametrize("name", [*sorted(baselines), "DSPnet"])
def test_a_batch_of_users_without_events_has_no_loss(name):
    model = new() if name == "DSPnet" else make_baseline(name, 12, 4, config)[0]
    none = torch.zeros(3, 5, dtype=torch.long)
    loss = likelihood(model, Batch(none, none, None), 0.5)[0].total
    loss.backward()
    assert float(loss.detach()) == 0


def test_sizes_cover_validation():
    last = torch.cat([parts.items[:, :-1], torch.full((60, 1), 12)], 1)
    fewer = torch.where(parts.items == 12, 1, parts.items)
    valid = parts.valid._replace(targets=torch.full_like(parts.valid.targets, 12))
    model, _ = train_dspnet(
        fewer, parts.scenes, replace(config, steps=2), valid=valid, device="cpu"
    )
    assert model.n_items == 12
    with pytest.raises(ValueError, match="n_items=11"):
        train_dspnet(last, parts.scenes, replace(config, steps=2), 11, device="cpu")
    with pytest.raises(ValueError, match="n_items=0"):
        train_dspnet(last, parts.scenes, replace(config, steps=2), 0, device="cpu")


bad = {
    "items": lambda: train_dspnet(parts.items.numpy(), parts.scenes, config),
    "scenes": lambda: train_baseline("SASRec", parts.items, None, config),
    "valid": lambda: train_dspnet(parts.items, parts.scenes, config, valid=tuple(parts.valid)),
    "d=7": lambda: DSPConfig(d=7, n_heads=2),
    "n_layers": lambda: DSPNet(5, 2, n_layers=0),
    "n_heads": lambda: DSPNet(5, 2, n_heads=0),
    "inject_scene": lambda: DSPNet(5, 2, inject_scene="yes"),
    "width=3": lambda: make_baseline("FDSA-like", 5, 2, DSPConfig(d=8, d_scene=3)),
    "n_items": lambda: train_baseline("composite", parts.items, parts.scenes, config, 5),
    "batch": lambda: last_scores(new(), parts.items, parts.scenes, batch=0),
    "target_context": lambda: train_model(
        new(), source, replace(config, target_context=True), device="cpu"
    ),
    "target_scenes": lambda: new(target_context=True)(
        parts.items, parts.scenes, torch.full_like(parts.items, 9)
    ),
    "out": lambda: joint_nll(
        new()(parts.items, parts.scenes, logits=False), parts.items, parts.scenes
    ),
    "items has id 13": lambda: joint_nll(
        new()(parts.items, parts.scenes), parts.items.clamp(max=11) + 2, parts.scenes
    ),
    "event needs both": lambda: joint_nll(
        new()(parts.items, parts.scenes), parts.items, parts.scenes * 0
    ),
    "rows": lambda: joint_nll(new()(parts.items, parts.scenes), parts.items[:5], parts.scenes[:5]),
    "weights": lambda: ccr_loss(torch.eye(2), torch.eye(2), torch.ones(2, 2)),
    "cond": lambda: ccr_weights("history", torch.ones(3)),
    "scenes has id 5": lambda: count_scores(
        "scene markov", parts.items, parts.scenes, torch.tensor([2]), torch.tensor([5]), 12, 4
    ),
    "items has id 12": lambda: count_scores(
        "markov", parts.items, parts.scenes, torch.tensor([2]), torch.tensor([1]), 5, 4
    ),
}


@pytest.mark.parametrize("name", bad)
def test_bad_arguments_are_named(name):
    with pytest.raises((ValueError, TypeError), match=name):
        bad[name]()


def test_half_precision_has_a_discrepancy():
    x = torch.randn(6, 4, generator=rng(0, "half"))
    assert float(mmd(x.bfloat16(), x.bfloat16() + 2)) == pytest.approx(
        float(mmd(x, x + 2)), abs=0.02
    )


def test_numbers_of_numpy_are_numbers():
    assert DSPConfig(d=np.int64(8)).d == 8
