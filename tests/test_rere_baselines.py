"The rivals: no look into the future, losses by their definition, lists that obey their masks"

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm, word_tokenizer
from llmpapers.core.train import TrainConfig, sft_batch
from llmpapers.rere.baselines import (
    D3,
    BIGRec,
    GRU4Rec,
    LMScorer,
    Markov,
    NetConfig,
    Popularity,
    SASRec,
    Scorer,
    SDPOConfig,
    answer_logps,
    every_position,
    free_tokens,
    negatives_of,
    packed,
    s_dpo_loss,
    train_gru4rec,
    train_s_dpo,
    train_sasrec,
    tune,
)
from llmpapers.rere.data import sequence_windows, sid_format
from llmpapers.rere.sft import ItemCoder, sft_examples, train_sft
from llmpapers.rere.world import make_sid_world


class Fixed(Scorer):
    "Scores that are given"

    def __init__(self, table):
        self.table = table

    def scores(self, rows):
        return self.table[: len(rows)]


histories = st.lists(
    st.lists(st.integers(0, 6), min_size=0, max_size=5), min_size=1, max_size=6
).map(lambda rows: torch.tensor([[-1] * (5 - len(r)) + r for r in rows]))


# ---- lists ---------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_lists_are_distinct_allowed_and_in_order(rows, k, seed, exclude):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (len(rows), 7), generator=g).float()
    allowed = torch.rand(len(rows), 7, generator=g) < 0.6
    lists = Fixed(scores).recommend(rows, k, allowed, exclude)
    assert lists.shape == (len(rows), k)
    for h, s, ok, found in zip(rows.tolist(), scores.tolist(), allowed.tolist(), lists.tolist()):
        can = [i for i in range(7) if ok[i] and not (exclude and i in h)]
        want = sorted(can, key=lambda i: (-s[i], i))[:k]
        assert found == want + [-1] * (k - len(want))


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="not numbers"):
        Fixed(torch.full((1, 3), torch.nan)).recommend(torch.zeros(1, 2, dtype=torch.int64))


def test_counts():
    w = sequence_windows(torch.tensor([[0, 1, 2], [0, 1, 1]]), 2)
    assert Popularity(w, 4).recommend(w, 2)[0].tolist() == [1, 2]
    law = Markov(w, 4, prior=1.0).scores(torch.tensor([[-1, 1], [-1, -1]])).exp()
    share = Popularity(w, 4).share
    torch.testing.assert_close(law[1], share.float())
    pairs = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(law[0], ((pairs + share) / 3).float())


# ---- nets ----------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(histories)
def test_packing_and_labels(rows):
    items, size = packed(rows)
    target = torch.arange(len(rows)) % 7
    labels = every_position(rows, target)["labels"].tolist()
    for h, moved, n, y, label in zip(
        rows.tolist(), items.tolist(), size.tolist(), target.tolist(), labels
    ):
        kept = [i for i in h if i >= 0]
        assert moved[:n] == kept and n == len(kept)
        assert label == kept + [y] + [-100] * (5 - n)


@pytest.mark.parametrize("kind", [SASRec, GRU4Rec])
def test_scores_see_only_what_came_before(kind):
    torch.manual_seed(0)
    net = kind(9, NetConfig(width=8, layers=2, heads=2), 5).eval()
    items = torch.tensor([[1, 2, 3, 4, 5]])
    for t in range(5):
        other = items.clone()
        other[:, t:] = (other[:, t:] + 3) % 9
        with torch.no_grad():
            same = torch.isclose(net(items), net(other), atol=1e-6).all(-1)[0]
        assert same[: t + 1].all() and not same[t + 1 :].any()


@pytest.mark.parametrize("kind", [SASRec, GRU4Rec])
def test_scores_do_not_depend_on_padding_or_company(kind):
    torch.manual_seed(1)
    net = kind(9, NetConfig(width=8, layers=1, heads=2), 4)
    rows = torch.tensor([[-1, -1, 3, 4], [1, 2, 3, 4], [-1, -1, -1, -1]])
    together = net.scores(rows)
    alone = torch.cat(
        [net.scores(r[r >= 0][None]) if (r >= 0).any() else net.scores(r[None]) for r in rows]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    longer = torch.cat([torch.tensor([[7], [7], [7]]), rows], 1)
    torch.testing.assert_close(net.scores(longer)[1], together[1])  # the latest four count
    assert net.training and not net.scores(rows).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("fit", [train_sasrec, train_gru4rec])
def test_a_rule_is_learnt_and_a_run_repeats(fit):
    start = torch.randint(0, 8, (200, 1), generator=torch.Generator().manual_seed(0))
    w = sequence_windows((start + 3 * torch.arange(6)) % 8, 4)
    cfg = NetConfig(width=16, layers=1, heads=2, dropout=0.0, lr=1e-2, steps=120, batch_size=64)
    net = fit(w.take(slice(0, 600)), 8, w.take(slice(600, None)), cfg)
    best = net.recommend(w.take(slice(600, None)), 1)[:, 0]
    assert (best == w.target[600:]).float().mean() > 0.95
    again = fit(w.take(slice(0, 600)), 8, w.take(slice(600, None)), cfg)
    assert torch.equal(net.scores(w), again.scores(w))
    assert net.history.losses[-1] < net.history.losses[0]


def test_the_best_of_a_grid_is_kept():
    w = sequence_windows(torch.randint(0, 5, (30, 4)), 2)
    tables = {k: F.one_hot(w.target if k == 2 else (w.target + k) % 5, 5).float() for k in (1, 2)}
    found = tune(lambda k: Fixed(tables[k]), dict(k=(1, 2)), w)
    assert found.params == dict(k=2) and found.best.table is tables[2]
    assert [row["k"] for row in found.table] == [1, 2]
    assert found.table[0]["ndcg@10"] < 1 == found.table[1]["ndcg@10"]


# ---- language models -----------------------------------------------------------------------------
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.05, 4))
def test_s_dpo_is_its_definition_and_dpo_for_one(seed, n, beta):
    g = torch.Generator().manual_seed(seed)
    pos, ref_pos = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    neg, ref_neg = (torch.randn(5, n, generator=g, dtype=torch.float64) for _ in range(2))
    lead = beta * ((neg - ref_neg) - (pos - ref_pos)[:, None])
    want = -torch.sigmoid(-lead.exp().sum(1).log()).log().mean()
    got = s_dpo_loss(pos, neg, ref_pos, ref_neg, beta)
    torch.testing.assert_close(got, want)
    dpo = -F.logsigmoid(-lead[:, 0]).mean()
    torch.testing.assert_close(s_dpo_loss(pos, neg[:, :1], ref_pos, ref_neg[:, :1], beta), dpo)


@pytest.mark.parametrize("name", ["logp_pos", "logp_neg", "ref_pos", "ref_neg"])
def test_s_dpo_names_the_argument_with_nan(name):
    given = dict(logp_pos=(2,), logp_neg=(2, 3), ref_pos=(2,), ref_neg=(2, 3))
    given = {k: -torch.ones(n) for k, n in given.items()}
    assert s_dpo_loss(**given).isfinite()
    given[name][1] = torch.nan
    with pytest.raises(ValueError, match=f"^{name} has"):
        s_dpo_loss(**given)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_negatives_are_everything_but_the_target(seed, n_items):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, n_items, (300,), generator=g)
    found = negatives_of(target, n_items, 4, g)
    assert not (found == target[:, None]).any()
    assert found.min() >= 0 and found.max() < n_items
    if n_items > 2:
        assert len(found[target == target[0]].unique()) == n_items - 1


@pytest.fixture(scope="module")
def policy():
    "A small world, a coder, and a policy that was trained a little"
    world = make_sid_world(20, n_users=60, seq_len=6, seed=0, n_codes=3)
    fmt = sid_format(world.sid, [3, 3, 3], sep=" ")
    coder = ItemCoder(word_tokenizer(fmt.words), fmt, terminated=False, bare=True)
    rows = sequence_windows(world.sequences, 3, 3)
    cfg = TinyLMConfig(layers=1, heads=1, kv_heads=1, width=16, head_dim=16, max_len=16)
    lm = LM(tiny_lm(coder.tokenizer, cfg), coder.tokenizer, "test")
    run = train_sft(lm, coder, rows, TrainConfig(steps=60, batch_size=32, lr=1e-2), device="cpu")
    return coder, rows, run.lm


def test_log_probabilities_of_answers_are_the_scores_of_items(policy):
    coder, rows, lm = policy
    some = rows.take(slice(0, 6))
    scores = LMScorer(lm, coder, batch=4).scores(some)
    assert scores.shape == (6, 20) and (scores.exp().sum(1) <= 1 + 1e-4).all()
    for item in (0, 7, 19):
        pairs = dataclasses.replace(some, target=torch.full((6,), item))
        batch = sft_batch(sft_examples(coder, pairs), lm.tokenizer.pad_token_id)
        with torch.no_grad():
            got = answer_logps(lm.model, batch)
        torch.testing.assert_close(got, scores[:, item], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(LMScorer(lm, coder).scores(some.history), scores)


def test_d3_is_a_mean_of_two_laws(policy):
    coder, rows, lm = policy
    some = rows.take(slice(0, 5))
    own, helper = LMScorer(lm, coder), Popularity(rows, 20)
    mixed = D3(own, helper, 0.3).scores(some)
    torch.testing.assert_close(mixed, 0.3 * own.scores(some) + 0.7 * helper.scores(some))
    assert torch.equal(D3(own, helper, 1.0).recommend(some, 5), own.recommend(some, 5))
    assert torch.equal(D3(own, helper, 0.0).recommend(some, 5), helper.recommend(some, 5))


def test_what_is_an_item_is_grounded_to_itself(policy):
    coder, rows, lm = policy
    rival = BIGRec(lm, coder)
    items = rival.vectors(coder.strings)
    assert torch.equal((items @ items.T).argmax(1), torch.arange(20))
    seen = []

    def embed(texts):
        seen.extend(texts)
        return torch.stack([F.one_hot(torch.tensor(len(t)), 40) for t in texts]).numpy()

    other = BIGRec(lm, coder, embed)
    assert other.recommend(rows.take([0, 1]), 3).shape == (2, 3)
    assert set(coder.fmt.answers) <= set(seen)


def test_free_writing_ignores_the_settings_of_the_model(policy):
    coder, rows, lm = policy
    some = rows.take(slice(0, 8))
    plain = free_tokens(lm, coder, some)
    lm.model.generation_config.do_sample = True
    lm.model.generation_config.temperature = 5.0
    try:
        assert free_tokens(lm, coder, some, batch=3) == plain
    finally:
        lm.model.generation_config.do_sample = False
        lm.model.generation_config.temperature = None


def test_preference_training_widens_the_margin_and_leaves_the_start_alone(policy):
    coder, rows, lm = policy
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    cfg = SDPOConfig(steps=40, batch_size=16, n_negatives=2, lr=3e-3)
    better, history = train_s_dpo(lm, coder, rows, cfg)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())

    def margin(lm):
        scores = LMScorer(lm, coder).scores(rows)
        return (scores.gather(1, rows.target[:, None])[:, 0] - scores.mean(1)).mean()

    assert margin(better) > margin(lm)
    first = train_s_dpo(lm, coder, rows, dataclasses.replace(cfg, steps=1))[1].losses[0]
    assert abs(first - torch.tensor(3.0).log().item()) < 1e-4  # nothing has moved: log(1 + D)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: NetConfig(dropout=1.0), "dropout=1.0"),
        (lambda: SDPOConfig(n_negatives=0), "n_negatives=0"),
        (lambda: s_dpo_loss(*(torch.zeros(2), torch.zeros(2, 0)) * 2), "needs|D is 1"),
        (lambda: negatives_of(torch.zeros(2), 1, 1, torch.Generator()), "n_items=1"),
        (lambda: Fixed(torch.zeros(1, 3)).recommend(torch.zeros(1, 2).long(), 0), "k=0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_items_that_are_none_are_refused_by_every_rival():
    rows = sequence_windows(torch.tensor([[0, 1, 2], [1, 2, 0]]), 2)
    cfg = NetConfig(width=8, layers=1, heads=2, steps=2, batch_size=4)
    makers = [
        Popularity,
        Markov,
        lambda r, n: train_sasrec(r, n, cfg=cfg),
        lambda r, n: train_gru4rec(r, n, cfg=cfg),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="rows has (item|target) 2, the catalogue has 2"):
            make(rows, 2)
        wrong = dataclasses.replace(rows, target=rows.target.clone().fill_(-100))
        with pytest.raises(ValueError, match="rows has target -100"):
            make(wrong, 3)
        rival = make(rows, 3)
        for item in (3, 4, 99):
            with pytest.raises(ValueError, match=f"rows has item {item}, the catalogue has 3"):
                rival.scores(torch.tensor([[0, item]]))
        with pytest.raises(ValueError, match="rows has item -2"):
            rival.scores(torch.tensor([[-2, 0]]))
        with pytest.raises(ValueError, match="width 0"):
            rival.scores(torch.zeros(2, 0, dtype=torch.int64))
        left, right = torch.tensor([[-1, 1]]), torch.tensor([[1, -1]])
        assert torch.equal(rival.scores(left), rival.scores(right))
        one = make(sequence_windows(torch.tensor([[0, 0]]), 2), 1)
        assert one.recommend(torch.tensor([[0], [-1]]), 2).tolist() == [[0, -1], [0, -1]]
        for allowed in (torch.ones(2, dtype=torch.bool), torch.ones(5, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match="allowed has shape"):
                rival.recommend(left, 2, allowed=allowed)
        for allowed in ([True, False, True], torch.tensor([0, 1, 2])):
            with pytest.raises(TypeError, match="allowed: need a bool tensor"):
                rival.recommend(left, 2, allowed=allowed)
    with pytest.raises(ValueError, match="rows has item 9"):
        Fixed(torch.zeros(1, 3)).recommend(torch.tensor([[9]]), 2, exclude_seen=True)
    with pytest.raises(ValueError, match="valid: need at least one row"):
        train_sasrec(rows, 3, valid=rows.take([]), cfg=cfg)
    with pytest.raises(ValueError, match="has no combination"):
        tune(lambda prior: Markov(rows, 3, prior), dict(prior=[]), rows)
