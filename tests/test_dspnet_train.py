"Runs that stop and go on, what a batch holds, and arguments that are refused by name"

from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.bench import extra_peak
from llmpapers.core.scale import rng
from llmpapers.dspnet.baselines import baselines, count_scores, make_baseline, train_baseline
from llmpapers.dspnet.data import make_interplay_world
from llmpapers.dspnet.logs import as_index, split_last
from llmpapers.dspnet.losses import ccr_loss, ccr_weights, joint_nll, mmd, next_nll
from llmpapers.dspnet.model import DSPNet, last_scores, row_groups, states_of
from llmpapers.dspnet.train import (
    Batch,
    DSPConfig,
    Objective,
    TensorSource,
    history_states,
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
    "schedule": lambda: DSPConfig(schedule="linear"),
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


plain_nll = ["DSPnet", *(k for k in sorted(baselines) if not hasattr(baselines[k][0], "own_nll"))]
many_groups = partial(row_groups, least=1)


def of_name(name, how):
    if name == "DSPnet":
        return seeded(lambda: DSPNet(12, 4, **model_fields(how)), 0)
    return make_baseline(name, 12, 4, how)[0]


def everywhere(model, batch, how):
    "The loss from scores of all items at all positions, in one pass"
    given = {} if batch.told is None or not model.takes_context else dict(target_scenes=batch.told)
    out = model(batch.items[:, :-1], batch.scenes[:, :-1], **given)
    total = next_nll(out.item_logits, batch.items)
    if out.scene_logits is not None:
        total = total + how.alpha * next_nll(out.scene_logits, batch.scenes)
    if how.ccr != "none":
        twin = model(batch.items[:, :-1], batch.scenes[:, :-1], logits=False)
        weights = ccr_weights(how.ccr, history_states(out), batch.items[:, -1], how.tau_cond)
        pair = out.z_item[:, -1], twin.z_item[:, -1]
        total = total + how.ccr_weight * ccr_loss(*pair, weights, how.tau)
    return total


def with_gradient(model, make_loss):
    model.zero_grad()
    torch.manual_seed(3)
    loss = make_loss()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach(), *(torch.zeros(1) if x is None else x.clone() for x in grads)]


def uneven(seed, n=9, longest=7, least=0, wide=0):
    "A batch of uneven rows with their start and zeros before it, scenes told in some rows"
    g = rng(seed, "uneven")
    size = torch.randint(least, longest + 1, (n,), generator=g)
    there = torch.arange(longest + 1 + wide) >= longest + 1 + wide - size[:, None]
    items, scenes = (torch.randint(1, k + 1, there.shape, generator=g) * there for k in (12, 4))
    told = scenes[:, 1:] * (torch.rand(n, 1, generator=g) < 0.5)
    return Batch(items, scenes, told)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.sampled_from(plain_nll),
    st.sampled_from([0, 5]),
    st.sampled_from(["none", "history"]),
    st.sampled_from([0, 6]),
    st.booleans(),
)
def test_padding_that_is_not_computed_changes_nothing(seed, name, chunk, ccr, wide, context):
    extra = dict(chunk=chunk, ccr=ccr, ccr_weight=0.5, dropout=0.0, target_context=context)
    how = replace(config, **extra)
    model, batch = of_name(name, how), uneven(seed, wide=wide)
    objective = Objective(model, how)
    want = with_gradient(model, lambda: everywhere(model, batch, how))
    with mock.patch("llmpapers.dspnet.model.row_groups", many_groups):
        found = with_gradient(model, lambda: objective(batch))
    for a, b in zip(want, found):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", plain_nll)
def test_rows_of_one_length_are_read_as_ever(name, chunk):
    "To the bit, with dropout: one group, and every position has its target"
    how = replace(config, dropout=0.3, chunk=chunk, target_context=name == "DSPnet")
    model, full = of_name(name, how).train(), uneven(0, least=7)
    objective = Objective(model, how)
    with mock.patch("llmpapers.dspnet.model.row_groups", many_groups):
        found = with_gradient(model, lambda: objective(full))
    want = with_gradient(model, lambda: everywhere(model, full, how))
    same = torch.equal if not chunk else partial(torch.allclose, atol=1e-5)
    assert all(same(a, b) for a, b in zip(want, found))


@pytest.mark.parametrize("name", plain_nll)
def test_scores_are_made_where_there_is_a_target(name):
    model, batch = of_name(name, config), uneven(1, wide=5)
    seen, made = [], model.item_scores

    def noted(z, context=None):
        seen.append(z.shape[:-1].numel())
        return made(z, context)

    model.item_scores = noted
    likelihood(model, batch, 0.5)
    assert seen == [int((batch.items[:, 1:] > 0).sum())]


@pytest.mark.parametrize("name", sorted(set(baselines) - set(plain_nll)))
def test_a_likelihood_of_ones_own_reads_the_batch_as_it_is(name):
    model, batch = make_baseline(name, 12, 4, config)[0], uneven(2)
    want = with_gradient(model, lambda: model.own_nll(batch.items, batch.scenes, 0.5)[0].total)
    found = with_gradient(model, lambda: likelihood(model, batch, 0.5)[0].total)
    assert all(torch.equal(a, b) for a, b in zip(want, found))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 600))
def test_groups_of_rows(lengths, least):
    sizes = torch.tensor(lengths)
    groups = row_groups(sizes, least)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(sizes)))
    widths = [int(sizes[x].max()) for x in groups]
    assert widths == sorted(set(widths))  # rows of one length stay together
    needed = sum(len(x) * w for x, w in zip(groups, widths))
    assert needed + least * (len(groups) - 1) <= len(sizes) * max(lengths)
    for rows, width in zip(groups, widths):  # nothing that pays is left uncut
        own = sizes[rows].sort().values
        assert all((i + 1) * (width - int(x)) < least for i, x in enumerate(own[:-1]))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([*plain_nll, *sorted(baselines)]))
def test_scores_of_uneven_histories(seed, name):
    how = replace(config, target_context=name == "DSPnet")
    model, batch = of_name(name, how).eval(), uneven(seed, wide=0)
    with torch.no_grad():
        out = model(batch.items[:, 1:], batch.scenes[:, 1:], logits=False)
        want = model.item_scores(out.z_item[:, -1])
        with mock.patch("llmpapers.dspnet.model.row_groups", many_groups):
            found = last_scores(model, batch.items[:, 1:], batch.scenes[:, 1:])
            some = states_of(model, batch.items[:, 1:], batch.scenes[:, 1:])
    assert torch.allclose(found.items, want, atol=1e-5)
    if out.scene_logits is not None:
        assert torch.allclose(found.scenes, out.scene_logits[:, -1], atol=1e-5)
    if name == "BERT4Rec":  # it has one position, the blank behind the history
        return
    there = F.pad(batch.items[:, 2:], (0, 1), value=1) > 0  # events, and the start before them
    for a, b in zip(out, some):
        assert a is None or torch.allclose(a[there], b[there], atol=1e-5)


@pytest.mark.parametrize("form", [TensorSource, as_index])
def test_a_batch_is_as_wide_as_its_longest_row(form):
    items = F.pad(torch.tensor([[0, 0, 3, 4], [0, 0, 0, 5], [1, 2, 3, 4]]), (9, 0))
    how = replace(config, batch_size=2)
    widths = set()
    for k in range(30):
        batch = make_batch(form(items, items.sign()), how, rng(k, "wide"))
        longest = int((batch.items > 0).sum(1).max())
        assert batch.items.shape == batch.scenes.shape == (2, longest + 1)
        assert not batch.items[:, 0].any()
        widths.add(longest)
    assert widths == {1, 2, 4}


def test_a_rate_may_be_constant():
    for schedule, constant in (("constant", True), ("cosine", False)):
        history = train_model(
            new(), source, replace(config, schedule=schedule), watch=lambda m: {}, device="cpu"
        )
        rates = history.column("lr")
        assert (set(rates) == {config.lr}) == constant and max(rates) <= config.lr
