"The dual network: causal, indifferent to padding, and SASRec where it should be"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.scale import rng
from llmpapers.dspnet.baselines import SASRec, baselines, count_scores, make_baseline
from llmpapers.dspnet.evaluate import compare_all, expected_metrics, ranking_metrics
from llmpapers.dspnet.losses import ccr_loss, joint_nll
from llmpapers.dspnet.model import DSPNet, last_scores, positions_of, recommend
from llmpapers.dspnet.train import DSPConfig, TensorSource, model_fields, train_dspnet, train_model

n_items, n_scenes = 23, 3
config = DSPConfig(d=8, d_scene=4, n_layers=2, max_len=12, dropout=0.0)
forms = st.fixed_dictionaries(
    dict(
        fusion=st.sampled_from(["mlp", "gate", "none"]),
        inject_scene=st.booleans(),
        target_context=st.booleans(),
    )
)


def network(seed=0, **kw):
    torch.manual_seed(seed)
    return DSPNet(n_items, n_scenes, **(model_fields(config) | kw)).eval()


@st.composite
def histories(draw, least=0, most=9):
    "Left-padded histories of several users"
    g = rng(draw(st.integers(0, 10**6)), "histories")
    width = draw(st.integers(max(1, least), most))
    size = torch.randint(least, width + 1, (draw(st.integers(1, 4)),), generator=g)
    there = torch.arange(width) >= width - size[:, None]
    items, scenes = (
        torch.randint(1, n + 1, there.shape, generator=g) * there for n in (n_items, n_scenes)
    )
    return items, scenes


@settings(deadline=None, max_examples=25)
@given(histories(), forms, st.data())
def test_the_future_changes_nothing(pair, form, data):
    items, scenes = pair
    model = network(**form)
    t = data.draw(st.integers(0, items.shape[1] - 1))
    later = torch.arange(items.shape[1]) > t
    changed = [
        torch.where(later & (x > 0), x % n + 1, x)
        for x, n in ((items, n_items), (scenes, n_scenes))
    ]
    for a, b in zip(model(items, scenes), model(*changed)):
        assert torch.equal(a[:, : t + 1], b[:, : t + 1])


@settings(deadline=None, max_examples=25)
@given(histories(), forms, st.integers(1, 4))
def test_padding_in_front_changes_nothing(pair, form, k):
    model = network(**form)
    plain = model(*pair)
    padded = model(*(F.pad(x, (k, 0)) for x in pair))
    for a, b in zip(plain, padded):
        assert a.isfinite().all() and (a - b[:, k:]).abs().max() < 1e-5


@settings(deadline=None, max_examples=25)
@given(histories(least=2), st.booleans())
def test_who_knows_what(pair, injected):
    "Without injection no item state hears of a scene; enhanced states hear of both"
    items, scenes = pair
    model = network(inject_scene=injected)
    other = scenes % n_scenes + (scenes > 0)
    a, b = model(items, scenes), model(items, other)
    assert torch.equal(a.h_item, b.h_item) != injected
    assert not torch.equal(a.z_item[:, -1], b.z_item[:, -1])
    moved = items % n_items + (items > 0)
    assert torch.equal(a.h_scene, model(moved, scenes).h_scene)
    assert not torch.equal(a.z_scene[:, -1], model(moved, scenes).z_scene[:, -1])


@settings(deadline=None, max_examples=15)
@given(histories(), st.integers(0, 99))
def test_without_enhancement_it_is_sasrec(pair, seed):
    dual = network(seed, fusion="none")
    single = SASRec(n_items, n_scenes, config).eval()
    single.item_stream.load_state_dict(dual.item_stream.state_dict())
    assert torch.equal(dual(*pair).item_logits, single(pair[0]).item_logits)


@settings(deadline=None, max_examples=25)
@given(histories(), st.integers(0, n_scenes))
def test_the_scene_of_the_target_counts_only_where_it_is_told(pair, scene):
    model = network(target_context=True)
    plain, told = last_scores(model, *pair), last_scores(model, *pair, scene)
    assert torch.equal(plain.items, told.items) == (scene == 0)
    assert torch.equal(plain.scenes, told.scenes)


@settings(deadline=None, max_examples=20)
@given(histories(), st.integers(1, n_items))
def test_lists_hold_each_item_once(pair, k):
    model = network()
    lists = recommend(model, *pair, k)
    assert all(len(set(row)) == k for row in lists.tolist())
    new = recommend(model, *pair, k, exclude_seen=True)
    for row, taken in zip(new.tolist(), pair[0].tolist()):
        assert not (set(row) - {0}) & set(taken)


@settings(deadline=None, max_examples=20)
@given(histories(least=1), st.floats(0, 3))
def test_the_loss_is_two_cross_entropies(pair, alpha):
    items, scenes = (F.pad(x, (1, 0)) for x in pair)
    out = network()(items, scenes)
    loss = joint_nll(out, items, scenes, alpha)
    there = items[:, 1:] > 0
    parts = [
        F.cross_entropy(x[:, :-1][there], y[:, 1:][there] - 1)
        for x, y in ((out.item_logits, items), (out.scene_logits, scenes))
    ]
    assert torch.allclose(loss.item, parts[0], atol=1e-5)
    assert torch.allclose(loss.total, parts[0] + alpha * parts[1], atol=1e-5)


causal = sorted(k for k in baselines if k != "BERT4Rec")  # One position, after the whole history


@pytest.mark.parametrize("name", causal)
@settings(deadline=None, max_examples=10)
@given(pair=histories(), data=st.data())
def test_the_future_changes_nothing_for_a_rival(name, pair, data):
    items, scenes = pair
    model = make_baseline(name, n_items, n_scenes, config)[0].eval()
    t = data.draw(st.integers(0, items.shape[1] - 1))
    later = torch.arange(items.shape[1]) > t
    changed = [
        torch.where(later & (x > 0), x % n + 1, x)
        for x, n in ((items, n_items), (scenes, n_scenes))
    ]
    before, after = model(items, scenes), model(*changed)
    assert torch.equal(before.item_logits[:, : t + 1], after.item_logits[:, : t + 1])
    if later.any() and (there := items[:, -1] > 0).any():
        assert not torch.equal(before.z_item[there, -1], after.z_item[there, -1])


@pytest.mark.parametrize("name", sorted(baselines))
@settings(deadline=None, max_examples=10)
@given(pair=histories(), k=st.integers(1, 4))
def test_padding_in_front_changes_nothing_for_a_rival(name, pair, k):
    model = make_baseline(name, n_items, n_scenes, config)[0].eval()
    plain, padded = (last_scores(model, *x) for x in (pair, [F.pad(x, (k, 0)) for x in pair]))
    assert plain.items.isfinite().all() and (plain.items - padded.items).abs().max() < 1e-5


def test_narm_looks_back_on_events_alone():
    "Equation (1) of the rivals by a loop, and nothing to look back on before the first event"
    model = make_baseline("NARM", n_items, n_scenes, config)[0].eval()
    items = torch.tensor([[0, 0, 4, 7, 1], [3, 9, 9, 2, 5]])
    with torch.no_grad():
        z, states = model(items).z_item, model.states(items)[0]
        for row, n in ((0, 3), (1, 5)):
            h = states[row]
            for t in range(1, n + 1):
                seen = [model.weigh((model.ask(h[t]) + model.answer(x)).sigmoid()) for x in h[1:]]
                back = sum(w * x for w, x in zip(seen[:t], h[1 : t + 1]))
                mine = model.decode(torch.cat([h[t], back]))
                assert torch.allclose(mine, z[row, items.shape[1] - n + t - 1], atol=1e-5)
        assert not model.look_back(states)[:, 0].any()


@pytest.mark.parametrize("name", sorted(baselines))
def test_empty_and_one_event_histories_are_finite(name):
    model, _ = make_baseline(name, n_items, n_scenes, config)
    for items in (torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[0, 1], [0, 0]])):
        items = items.long()
        scores = last_scores(model, items, items)
        assert scores.items.isfinite().all() and scores.items.shape == (2, n_items)


def test_one_scene_and_one_item_are_legal():
    items = torch.ones(6, 5, dtype=torch.long)
    how = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=5, steps=2, batch_size=4)
    model, history = train_dspnet(items, items, how, 1, 1, device="cpu")
    assert history.last["loss"] == 0 and model.recommend(items, items, 1).unique().item() == 1


def test_training_follows_its_seed():
    g = rng(0, "train")
    items = torch.randint(1, n_items + 1, (20, 6), generator=g)
    scenes = torch.randint(1, n_scenes + 1, (20, 6), generator=g)

    def scores(seed):
        how = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=6, steps=3, batch_size=8, seed=seed)
        model, _ = train_dspnet(items, scenes, how, n_items, n_scenes, device="cpu")
        return last_scores(model, items, scenes).items

    assert torch.equal(scores(0), scores(0)) and not torch.equal(scores(0), scores(1))


def test_a_test_history_uses_no_position_that_training_did_not():
    items = torch.randint(1, n_items + 1, (8, 5), generator=rng(0, "short"))
    how = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=12, steps=2, batch_size=4)
    model, _ = make_baseline("SASRec", n_items, n_scenes, how)
    train_model(model, TensorSource(items, items.sign()), how, device="cpu")
    assert int(model.trained_len) == 4
    longer = torch.randint(1, n_items + 1, (3, 9), generator=rng(1, "long"))
    whole, cut = (last_scores(model, x, x.sign()).items for x in (longer, longer[:, -4:]))
    assert torch.equal(whole, cut)


@settings(deadline=None, max_examples=50)
@given(histories())
def test_positions_count_events(pair):
    items = pair[0]
    place = positions_of(items)
    assert torch.equal(place > 0, items > 0)
    assert torch.equal(place.amax(1), (items > 0).sum(1))


def test_an_unknown_scene_of_the_target_is_no_question():
    items = torch.randint(1, 11, (3, 4))
    config = DSPConfig(d=8, d_scene=4, n_layers=1, max_len=6)
    sizes = dict(d=8, d_scene=4, n_layers=1, max_len=6)
    for model in (DSPNet(10, 3, **sizes), make_baseline("SASRec", 10, 3, config)[0]):
        lists = model.recommend(items, items % 3 + 1, 3, target_context=0)
        assert torch.equal(lists, model.recommend(items, items % 3 + 1, 3))
        with pytest.raises(ValueError, match="target_context"):
            model.recommend(items, items % 3 + 1, 3, target_context=1)


def test_measures_name_what_they_cannot_use():
    last = (torch.tensor([1]), torch.tensor([4]))
    scores, law = torch.rand(2, 5), torch.full((2, 5), 0.2)
    for bad, name in (
        (lambda: ranking_metrics(scores, torch.tensor([1, 2]), 10), "ks"),
        (lambda: ranking_metrics(scores, torch.tensor([1.0, 2.0])), "targets"),
        (lambda: expected_metrics(torch.tensor([[1], [2]]), 2 * law, (1,)), "probs"),
        (lambda: compare_all(dict(ours=[1.0, 2.0]), "ours"), "nothing to compare"),
        (lambda: ccr_loss(scores, scores, torch.ones(2, 2)), "weights"),
        (lambda: count_scores("markov", *[torch.tensor([[1, 2]])] * 2, *last, 5, 3), "last_scenes"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            bad()
