"""ReRe's study: every arm runs, is made once, starts from one policy, and is what its name says"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hub import hub_folder
from llmpapers.core.lm import TinyLMConfig
from llmpapers.core.train import TrainConfig
from llmpapers.rere.baselines import Markov, NetConfig
from llmpapers.rere.results import (
    StudyConfig,
    TitleConfig,
    _after_last,
    arms,
    depths,
    grid,
    rere,
    rival_lists,
    rivals,
    shuffled,
    study_outcome,
    supervised,
    title_arms,
    title_outcome,
    title_task,
    variants,
    word_coder,
)
from llmpapers.rere.sft import SidConfig, sid_policy, sid_task
from llmpapers.rere.train import RereConfig

quick = dict(batch_size=8, log_every=5)
sid = SidConfig(
    n_items=60,
    n_codes=4,
    n_users=20,
    n_test=20,
    lm=TinyLMConfig(layers=1, heads=1, kv_heads=1, width=8, head_dim=8, max_len=32),
    sft=TrainConfig(steps=10, **quick),
    last=TrainConfig(steps=5, **quick),
)
small = StudyConfig(sid, RereConfig(steps=2, batch_size=4, group_size=8, lr=1e-2))
trained = [a for a in (*supervised, *grid, *variants, *shuffled)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "A cache of this file, so that policies are trained once"
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path_factory.getbasetemp() / "rere-study"))


@pytest.mark.parametrize("arm", trained)
@pytest.mark.slow
def test_every_arm_runs(arm):
    found = study_outcome(small, arm, 0)
    metrics = found["metrics"]
    assert 0 <= metrics["HR@1"] <= metrics["HR@50"] <= 1 and metrics["valid"] == 1
    learned = not arm.startswith("SFT")
    assert bool(found["curves"]["rollout/reward"]) == learned
    assert study_outcome(small, arm, 0) == found


def test_arms_start_from_one_policy():
    start = study_outcome(small, "SFT", 0)["metrics"]
    still = replace(small, rl=replace(small.rl, lr=0.0))
    for arm in (rere, "sampling, rule"):
        assert study_outcome(still, arm, 0)["metrics"] == start
    assert study_outcome(small, rere, 0)["metrics"] != start
    assert study_outcome(small, rere, 1)["metrics"] != study_outcome(small, rere, 0)["metrics"]


def test_shuffled_codes_keep_the_catalogue():
    plain, mixed = sid_task(sid, 0), sid_task(sid, 0, True)
    assert torch.equal(plain.train.target, mixed.train.target)
    assert sorted(plain.coder.strings) == sorted(mixed.coder.strings)
    assert plain.coder.strings != mixed.coder.strings


def test_names_of_arms():
    assert len(set(arms)) == len(arms) == 3 + 15 + 13 + 2 + len(rivals)
    assert grid[rere] == dict(generation="beam", reward="ranking")
    with pytest.raises(ValueError, match="arm='ReRe' must be one of"):
        study_outcome(small, "ReRe", 0)


def test_scores_of_the_last_item():
    task = sid_task(sid, 0)
    scores = partial(_after_last, Markov(task.train, 60))
    table = scores([[1, 2], [2]])
    assert torch.equal(table[0], table[1]) and torch.allclose(table.exp().sum(1), torch.ones(2))
    last, target = int(task.train.history[0, -1]), int(task.train.target[0])
    seen = task.train.history[:, -1] == last
    most = torch.bincount(task.train.target[seen], minlength=60)
    assert scores([[last]])[0].argmax() in (most == most.max()).nonzero() and most[target] > 0


@pytest.mark.parametrize("name", rivals)
def test_rivals_give_lists(name, monkeypatch):
    from llmpapers.rere import results

    short = NetConfig(width=8, layers=1, heads=1, steps=4, eval_every=4)
    monkeypatch.setattr(results, "NetConfig", lambda seed: replace(short, seed=seed))
    plain = results.SDPOConfig
    monkeypatch.setattr(results, "SDPOConfig", lambda seed: plain(steps=2, batch_size=4, seed=seed))
    task = sid_task(sid, 0)
    lists = rival_lists(name, task, sid_policy(sid, 0), 0)
    assert lists.shape == (20, max(depths))
    assert all(len(set(row)) == max(depths) for row in lists.tolist())


# ---- titles --------------------------------------------------------------------------------------
titles = TitleConfig(
    n_users=4,
    n_test=4,
    sft=TrainConfig(steps=2, batch_size=4, log_every=1),
    rl=RereConfig(steps=2, batch_size=2, group_size=4),
)


@pytest.mark.parametrize("arm", ["SFT", "SFT continued", *title_arms])
def test_titles(arm):
    found = title_outcome(titles, arm, 0)
    assert found["valid"] == found["distinct"] == 1 and 0 <= found["HR@50"] <= 1


def test_titles_as_words():
    c = word_coder(("red mug", "red mug set", "blue mug"))
    assert c.strings[0] == c.strings[1][:2] + [c.tokenizer.eos_token_id]
    task = title_task(titles, 0)
    assert {len(s) for s in task.coder.strings} > {3, 4}
    read = task.coder.tokenizer.decode(task.coder.prompts(task.train)[0])
    names = [task.world.titles[i] for i in task.train.history[0]]
    assert read == " ; ".join(names)


@pytest.mark.slow
def test_titles_with_a_model_of_the_hub(tmp_path):
    folder = hub_folder(tmp_path / "hub")
    found = title_outcome(titles, "ReRe", 0, folder)
    assert found["valid"] == 1
