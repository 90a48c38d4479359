"""ReRe's training: targets bound to their rows, no other split is seen, lists are checked, runs
resume exactly, both loops, a checkpoint as it comes from the hub"""

import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hub import hub_folder
from llmpapers.core.lm import LM, TinyLMConfig, load_lm, tiny_lm
from llmpapers.core.scale import rng
from llmpapers.rere.data import Windows, title_format
from llmpapers.rere.rewards import ItemReward
from llmpapers.rere.sft import ItemCoder, SidConfig, sid_task
from llmpapers.rere.train import (
    CollapsedLists,
    Lists,
    RereConfig,
    RereRollout,
    RereTrainer,
    RowSource,
    check_lists,
    dynamic_choice,
    list_numbers,
    make_lists,
    put_target,
    rank_metrics,
    rere_paper,
    rere_reward,
    train_rere,
)
from llmpapers.rere.trie import ItemTrie
from llmpapers.rl.types import Group, collate

quick = settings(max_examples=40, deadline=None)
world = SidConfig(
    n_items=30,
    n_codes=4,
    n_users=20,
    n_test=20,
    lm=TinyLMConfig(layers=1, heads=1, kv_heads=1, width=8, head_dim=8, max_len=32),
)
task = sid_task(world, 0)
small = RereConfig(steps=3, batch_size=4, group_size=4, lr=1e-2, save_every=1, warmup=0.0)


def policy(seed=0):
    return LM(tiny_lm(task.coder.tokenizer, world.lm, seed), task.coder.tokenizer, "tiny")


def run(cfg=small, windows=task.train, **more):
    return train_rere(policy(), task.coder, windows, cfg, **more)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def listed(items):
    "Lists of items of the small world"
    items = torch.tensor(items)
    strings = task.coder.trie.strings(items.flatten()).view(*items.shape, -1)
    return Lists(items, strings, torch.full(items.shape, 3))


def rollout(cfg=small, **more):
    return RereRollout(task.coder.trie, rere_reward(task.coder, cfg, **more), cfg)


def prompt_of(row, target, history=(1, 2, 3, 4)):
    return dict(row=row, ids=[4, 5, 6], target=target, history=list(history))


# ---- the target of a row -------------------------------------------------------------------------
def test_equal_histories_keep_their_targets():
    twins = replace(
        task.train.take([0, 1, 2]),
        history=task.train.history[[0, 0, 0]],
        target=torch.tensor([3, 17, 3]),
    )
    source = RowSource(task.coder, twins)
    asked = [source(i) for i in range(3)]
    assert len({tuple(p["ids"]) for p in asked}) == 1
    made = rollout().samples(asked, listed([[3, 17, 5, 6]] * 3), 0)
    for p, group in zip(asked, made):
        hit = [s.info["item"] for s in group if s.info["hit"]]
        assert hit == [p["target"]] and {s.info["row"] for s in group} == {p["row"]}
        assert group[hit == [17]].reward > 0.5


def test_every_row_once_an_epoch():
    source = RowSource(task.coder, task.train, seed=5)
    n = len(task.train)
    for epoch in range(2):
        rows = [source(i)["row"] for i in range(epoch * n, (epoch + 1) * n)]
        assert sorted(rows) == task.train.row.tolist()
    by_row = dict(zip(task.train.row.tolist(), task.train.target.tolist()))
    assert all(source(i)["target"] == by_row[source(i)["row"]] for i in range(n))
    again = pickle.loads(pickle.dumps(source))
    other = RowSource(task.coder, task.train, 6)
    assert again(7) == source(7)
    assert [other(i)["row"] for i in range(n)] != [source(i)["row"] for i in range(n)]


def test_validation_rows_change_nothing():
    "Other validation rows with the same histories: same steps, to the bit"
    later = replace(task.valid, time=task.valid.time + 100)
    other = replace(later, target=(later.target + 1) % 30, history=later.history.flip(0))
    a, b, c = run(), run(valid=later), run(valid=other)
    assert same(a.lm.model, b.lm.model) and same(a.lm.model, c.lm.model)
    assert a.rows[-1]["train/loss"] == b.rows[-1]["train/loss"]
    assert "NDCG@10" in b.rows[-1] and "NDCG@10" not in a.rows[-1]


def test_rows_of_the_future_are_refused():
    with pytest.raises(ValueError, match="valid begins at time 0, training rows go on until"):
        run(valid=replace(task.valid, time=task.valid.time * 0))


def test_only_rows_that_are_given_are_asked(monkeypatch):
    asked = []
    plain = RereRollout.samples
    monkeypatch.setattr(RereRollout, "samples", lambda s, p, *a: asked.extend(p) or plain(s, p, *a))
    few = task.train.take(slice(5, 17))
    run(windows=few)
    assert {p["row"] for p in asked} <= set(few.row.tolist()) and len(asked) == 12
    by_row = dict(zip(few.row.tolist(), few.target.tolist()))
    assert all(p["target"] == by_row[p["row"]] for p in asked)


# ---- lists ---------------------------------------------------------------------------------------
@quick
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 8))
def test_dynamic_sampling(seed, n_items, G):
    drawn = torch.randint(n_items, (5, G + G // 2), generator=rng(seed, "dynamic"))
    target = torch.randint(n_items, (5,), generator=rng(seed, "t"))
    kept = drawn.gather(1, dynamic_choice(drawn, target, G)).tolist()
    for row, t, got in zip(drawn.tolist(), target.tolist(), kept):
        want = [i for i in row if i == t]
        wrong = list(dict.fromkeys(i for i in row if i != t))
        want += sorted(wrong, key=lambda i: -row.count(i))
        left = [i for k, i in enumerate(row) if i != t and i in row[:k]]
        assert got == (want + left)[:G]


@pytest.mark.parametrize("generation", ["beam", "sampling", "dynamic"])
@pytest.mark.parametrize("score", ["raw", "renorm"])
def test_lists_are_items_best_first(generation, score):
    cfg = replace(small, generation=generation, score=score, group_size=8)
    asked = [RowSource(task.coder, task.train)(i) for i in range(6)]
    target = torch.tensor([p["target"] for p in asked])
    ids = [p["ids"] for p in asked]
    lists = make_lists(policy().model, ids, task.coder.trie, target, cfg, rng(0, "draws"))
    assert (lists.items >= 0).all() and lists.items.shape == (6, 8)
    check_lists(lists, task.coder.trie, generation == "beam")
    names = task.coder.trie.strings(lists.items.flatten())
    assert torch.equal(names.view(6, 8, -1), lists.tokens[..., : names.shape[-1]])
    alone = make_lists(policy().model, ids[:1], task.coder.trie, target[:1], cfg, rng(0, "draws"))
    if generation == "beam":
        assert torch.equal(alone.items, lists.items[:1])


def test_fewer_items_than_slots():
    trie = ItemTrie.from_sequences(task.coder.strings[:3])
    cfg = replace(small, group_size=5)
    asked = [prompt_of(0, 1), prompt_of(1, 2)]
    lists = make_lists(policy().model, [p["ids"] for p in asked], trie, torch.tensor([1, 2]), cfg)
    made = RereRollout(trie, ItemReward(), cfg).samples(asked, lists, 0)
    groups = [Group(i, p, 0, 0, s) for i, (p, s) in enumerate(zip(asked, made))]
    batch = collate(groups, 0)
    trainer = RereTrainer(policy().model, cfg)
    A = trainer.list_advantages(batch).view(2, 5)
    assert (A[:, 3:] == 0).all() and (A[:, :3].sum(-1).abs() < 1e-5).all() and A[:, :3].any()
    seen = list_numbers(batch, 5)
    assert seen["rere/empty"] == pytest.approx(0.4) and seen["rere/diversity"] == pytest.approx(0.6)
    assert trainer.step(batch)["train/tokens"] == 18


def test_collapsed_lists_are_seen():
    good = listed([[3, 17, 5, 6]])
    check_lists(good, task.coder.trie)
    with pytest.raises(CollapsedLists, match="hold an item twice"):
        check_lists(listed([[3, 17, 3, 6]]), task.coder.trie)
    check_lists(listed([[3, 17, 3, 6]]), task.coder.trie, distinct=False)
    ends = good._replace(lengths=torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(CollapsedLists, match="mean length 1.00 of up to 3"):
        check_lists(ends, task.coder.trie)
    with pytest.raises(CollapsedLists, match="no list has a single item"):
        check_lists(good._replace(lengths=torch.zeros(1, 4, dtype=torch.int64)), task.coder.trie)


def test_a_run_of_collapsed_lists_stops(monkeypatch):
    from llmpapers.rere import train as module

    def dead(model, prompts, trie, target, cfg, generator=None, pad=0):
        one = listed([[3] * cfg.group_size] * len(prompts))
        return one._replace(lengths=torch.ones_like(one.lengths))

    monkeypatch.setattr(module, "make_lists", dead)
    with pytest.raises(RuntimeError, match="are no items"):
        run()


def test_the_target_is_put_into_the_last_slot():
    strings = task.coder.trie.strings()
    lists = listed([[3, 17, 5, 6], [1, 2, 8, 9]])
    target = torch.tensor([20, 2])
    got = put_target(lists, target, strings, torch.tensor([True, False]))
    assert got.items.tolist() == [[3, 17, 5, 20], [1, 2, 8, 9]]
    assert got.tokens[0, -1].tolist() == task.coder.strings[20]
    for cfg, want in (
        (replace(small, zero_groups="repair"), [[3, 17, 5, 20], [1, 2, 8, 9]]),
        (replace(small, add_gt=True), [[3, 17, 5, 20], [1, 2, 8, 2]]),
    ):
        asked = [prompt_of(0, 20), prompt_of(1, 2)]
        made = rollout(cfg).samples(asked, lists, 0)
        assert [[s.info["item"] for s in group] for group in made] == want
        assert not any(s.drawn for group in made for s in group)


# ---- steps ---------------------------------------------------------------------------------------
def a_batch(cfg=small, n=4):
    asked = [RowSource(task.coder, task.train)(i) for i in range(n)]
    target = torch.tensor([p["target"] for p in asked])
    lists = make_lists(policy().model, [p["ids"] for p in asked], task.coder.trie, target, cfg)
    made = rollout(cfg).samples(asked, lists, 0)
    return collate([Group(i, p, 0, 0, s) for i, (p, s) in enumerate(zip(asked, made))], 0)


def test_micro_batches_change_nothing():
    a, b = (RereTrainer(policy().model, replace(small, max_tokens_per_micro=m)) for m in (40, 9999))
    batch = a_batch()
    x, y = a.step(batch), b.step(batch)
    assert x["train/micro_batches"] > y["train/micro_batches"]
    assert (
        max((p - q).abs().max() for p, q in zip(a.model.parameters(), b.model.parameters())) < 1e-5
    )


@pytest.mark.parametrize("zero_groups", ["keep", "skip", "repair"])
def test_lists_without_advantage(zero_groups):
    cfg = replace(small, zero_groups=zero_groups, beta=0.0)
    asked = [prompt_of(0, 20), prompt_of(1, 2)]
    lists = listed([[3, 17, 5, 6], [1, 2, 8, 9]])  # the first list lacks its target
    made = rollout(cfg).samples(asked, lists, 0)
    batch = collate([Group(i, p, 0, 0, s) for i, (p, s) in enumerate(zip(asked, made))], 0)
    trainer = RereTrainer(policy().model, cfg)
    A = trainer.list_advantages(batch).view(2, 4)
    got = trainer.step(batch)
    if zero_groups == "repair":
        assert A.tolist() == [[-1, 0, 0, 1], [-1, 1, 0, 0]] and got["rere/zero_groups"] == 0
    else:
        assert (A[0] == 0).all() and A[1].any() and got["rere/zero_groups"] == 0.5
    assert got["train/tokens"] == (12 if zero_groups == "skip" else 24)


def test_only_adapters_learn():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    lm = policy()._replace(model=peft.get_peft_model(policy().model, config))
    done = train_rere(lm, task.coder, task.train, small)
    for (name, p), q in zip(done.lm.model.named_parameters(), lm.model.parameters()):
        assert torch.equal(p, q) != ("lora_" in name), name


def test_nothing_to_learn_moves_nothing():
    "Only lists without advantage and no divergence: the weights stay"
    cfg = replace(small, beta=0.0)
    made = rollout(cfg).samples([prompt_of(0, 20)], listed([[3, 17, 5, 6]]), 0)
    trainer = RereTrainer(policy().model, cfg)
    got = trainer.step(collate([Group(0, {}, 0, 0, made[0])], 0))
    assert got["train/grad_norm"] == 0 and same(trainer.model, policy().model)


def test_more_updates_need_draws():
    for bad in (dict(), dict(generation="dynamic"), dict(generation="sampling", add_gt=True)):
        with pytest.raises(ValueError, match="not drawn"):
            RereConfig(updates=2, **bad)
    two = run(replace(small, generation="sampling", updates=2))
    assert two.trainer.n_updates == 6


def test_the_learning_rate_ends_where_it_should():
    rows = run(replace(small, steps=10)).rows
    rates = [r["train/lr"] for r in rows]
    assert rates[0] < small.lr * 1.001 and rates == sorted(rates, reverse=True) and rates[-1] < 1e-8


# ---- runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg", [small, replace(small, generation="sampling", sync_every=1)])
def test_a_run_resumes_to_the_same_bits(tmp_path, cfg):
    cfg = replace(cfg, schedule="constant", steps=4)
    whole = run(cfg)
    run(replace(cfg, steps=2), out=tmp_path)
    rest = run(cfg, out=tmp_path)
    assert [r["step"] for r in rest.rows] == [3, 4]
    assert same(whole.lm.model, rest.lm.model)
    assert same(whole.trainer.ref_model, rest.trainer.ref_model)
    assert whole.rows[-1]["rere/zero_groups"] == rest.rows[-1]["rere/zero_groups"]


def test_a_run_is_the_same_twice_and_another_with_another_seed():
    a, b, c = run(), run(), run(replace(small, seed=1))
    assert same(a.lm.model, b.lm.model) and not same(a.lm.model, c.lm.model)
    assert same(policy().model, policy().model)


def test_the_reference_follows_when_it_is_due():
    stays = run(replace(small, sync_every=0)).trainer
    moves = run(replace(small, sync_every=2)).trainer
    assert same(stays.ref_model, policy().model) and stays.moved == 0
    assert not same(moves.ref_model, policy().model) and moves.moved == 1
    assert run(replace(small, beta=0.0)).trainer.ref_model is None


@pytest.mark.parametrize("generation", ["beam", "sampling"])
def test_the_asynchronous_loop(generation):
    cfg = replace(small, loop="async", async_ratio=1.0, generation=generation, steps=5)
    done = run(cfg)
    assert [r["step"] for r in done.rows] == [1, 2, 3, 4, 5]
    assert max(r["buffer/staleness_max"] for r in done.rows) <= 1
    assert not same(done.lm.model, policy().model)


def test_the_asynchronous_loop_without_a_lead_is_the_synchronous_one():
    a = run()
    b = run(replace(small, loop="async", async_ratio=0.0))
    gap = max((x - y).abs().max() for x, y in zip(a.lm.model.parameters(), b.lm.model.parameters()))
    assert gap < 1e-6


@pytest.mark.ray
@pytest.mark.slow
def test_lists_are_made_in_a_ray_actor():
    pytest.importorskip("ray", reason="ray is not installed")
    a, b = run(replace(small, steps=2)), run(replace(small, steps=2, actors=1))
    gap = max((x - y).abs().max() for x, y in zip(a.lm.model.parameters(), b.lm.model.parameters()))
    assert gap < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        dict(reward="rule"),
        dict(reward="ranking_only", normalize="negatives"),
        dict(loss="dapo"),
        dict(loss="gspo"),
        dict(score="renorm"),
        dict(score="renorm", generation="sampling", updates=2),
        dict(generation="dynamic", temperature=0.7),
        dict(zero_groups="repair"),
        dict(zero_groups="skip", add_gt=True, width=8),
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_design_space_runs(change):
    done = run(replace(small, **change))
    assert len(done.rows) == 3 and all(torch.isfinite(p).all() for p in done.lm.model.parameters())


def test_strings_of_one_length_make_one_loss_of_three():
    runs = [run(replace(small, loss=kind)).lm.model for kind in ("grpo", "dapo", "gspo")]
    for other in runs[1:]:
        pairs = zip(runs[0].parameters(), other.parameters())
        assert max((a - b).abs().max() for a, b in pairs) < 1e-5


def test_rewards_of_another_recommender_and_of_vectors():
    table = torch.randn(30, generator=rng(0, "table"))
    vectors = torch.randn(30, 5, generator=rng(0, "vectors"))
    a = run(replace(small, reward="collaborative"), scores=lambda h: table.expand(len(h), -1))
    b = run(replace(small, reward="semantic"), embeddings=vectors)
    assert a.rows[0]["rere/zero_groups"] == b.rows[0]["rere/zero_groups"] == 0
    with pytest.raises(ValueError, match="scores is None"):
        run(replace(small, reward="collaborative"))


# ---- a checkpoint as it comes from the hub -------------------------------------------------------
@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False)])
def test_the_published_recipe_runs_on_a_hub_checkpoint(tmp_path, kind, tied):
    "Two steps of `rere_paper` on titles of unequal length, bfloat16 weights, opinions on sampling"
    folder = hub_folder(tmp_path / "hub", kind, tied)
    names = ["red mug", "red mug set", "red cup", "blue cup", "steel pot", "red mug"]
    coder = ItemCoder(load_lm(folder).tokenizer, title_format(names), max_prompt=400)
    history = torch.tensor([[-1, 0, 1], [2, 3, 4], [-1, -1, 3], [4, 5, 0]])
    target = torch.tensor([5, 0, 1, 2])
    w = Windows(history, target, torch.arange(4), torch.arange(4), torch.arange(4))
    valid = replace(w, time=w.time + 10)
    cfg = replace(
        rere_paper, steps=2, batch_size=2, group_size=4, eval_every=1, save_every=1, lr=1e-3
    )
    done = train_rere(folder, coder, w, cfg, valid=valid, out=tmp_path / "run", device="cpu")
    assert {p.dtype for p in done.lm.model.parameters()} == {torch.float32}
    assert done.trainer.autocast_dtype == torch.bfloat16 and len(done.rows) == 2
    found = rank_metrics(done.lm, coder, w, (1, 5))
    assert found["HR@5"] == 1.0  # five strings in all, and the twins "red mug" are one of them
    assert all("HR@10" in r for r in done.rows)


def test_twins_are_hits_of_each_other(tmp_path):
    names = ["red mug", "blue cup", "red mug"]
    folder = hub_folder(tmp_path / "hub")
    coder = ItemCoder(load_lm(folder).tokenizer, title_format(names))
    reward = rere_reward(coder, RereConfig())
    assert reward.leaf.tolist() == [0, 1, 0]
    assert reward(torch.tensor([[0, 1]]), torch.tensor([2])).hit.tolist() == [[True, False]]


# ---- bad input -----------------------------------------------------------------------------------
def bad_values(field):
    "Values that no field of its kind may have"
    if "bool" in str(field.type):
        return [2, "x"]
    if "str" in str(field.type):
        return ["x", 3]
    return [float("nan"), "x", -1, True] if "int" in str(field.type) else [float("nan"), "x", -1.0]


def test_every_field_is_checked_by_name():
    for f in fields(RereConfig):
        for bad in bad_values(f):
            with pytest.raises((ValueError, TypeError)) as e:
                RereConfig(**{f.name: bad})
            assert f"{f.name}=" in str(e.value), (f.name, bad, e.value)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="windows is empty"):
        run(windows=task.train.take([]))
    with pytest.raises(ValueError, match="no multiple of group_size=3"):
        RereTrainer(policy().model, replace(small, group_size=3)).step(a_batch())
    with pytest.raises(ValueError, match="has no model to search with"):
        rollout().search(object(), [prompt_of(0, 1)], None)


def test_a_folder_belongs_to_its_rows(tmp_path):
    run(out=tmp_path / "run")
    with pytest.raises(ValueError, match="out: run holds a run on other rows"):
        run(windows=task.train.take(list(range(10))), out=tmp_path / "run")


def test_targets_beyond_the_catalogue_are_named():
    for value in (-1, world.n_items):
        wrong = replace(task.train, target=task.train.target.clone().fill_(value))
        with pytest.raises(ValueError, match="windows: a target is none of the 30 items"):
            run(windows=wrong)
