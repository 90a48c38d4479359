"""ReRe from a better start: start and rates are chosen on validation, and nothing else is"""

from dataclasses import replace

import pytest

from llmpapers.core.lm import TinyLMConfig
from llmpapers.core.train import TrainConfig
from llmpapers.rere import rates
from llmpapers.rere.rates import (
    TunedConfig,
    choices,
    choose,
    chosen_config,
    tuned_arms,
    tuned_outcome,
    tuned_start,
    valid_ndcg,
)
from llmpapers.rere.sft import SidConfig, best_items, sid_task
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
small = TunedConfig(
    sid,
    starts=2,
    first=TrainConfig(steps=5, **quick),
    rl=RereConfig(steps=2, batch_size=8, group_size=16),
    rates=dict(beam=1e-2, sampling=1e-2, dynamic=1e-2, continued=1e-3),
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "A cache of this file, so that policies are trained once"
    monkeypatch.setenv("LLMPAPERS_CACHE", str(tmp_path_factory.getbasetemp() / "rere-rates"))


@pytest.mark.parametrize("arm", tuned_arms)
def test_every_arm_runs(arm):
    found = tuned_outcome(small, arm, 0)
    metrics = found["metrics"]
    assert 0 <= metrics["HR@1"] <= metrics["HR@50"] <= 1 and 0 <= found["valid"] <= 1
    assert bool(found["curves"]["rollout/reward"]) == (arm in rates.ways)
    assert tuned_outcome(small, arm, 0) == found


def test_a_rate_of_zero_leaves_the_start():
    start = tuned_outcome(small, "SFT", 0)["metrics"]
    still = replace(small, rates=dict.fromkeys(small.rates, 0.0))
    for arm in rates.ways:
        assert tuned_outcome(still, arm, 0)["metrics"] == start
    with pytest.raises(ValueError, match="arm='ReRe' must be one of"):
        tuned_outcome(small, "ReRe", 0)


def test_the_best_start_on_validation_goes_on(monkeypatch):
    seen, train = [], rates.train_sft

    def look(policy, *args, **how):
        seen.append(policy)
        return train(policy, *args, **how)

    monkeypatch.setattr(rates, "train_sft", look)
    tries = tuned_start(small, 3)[1]
    task = sid_task(sid, 3)
    assert len(seen) == small.starts + 2 and len(set(tries)) == len(tries) == small.starts
    assert valid_ndcg(best_items(seen[2], task.coder, task.valid, 5), task) == max(tries)


def test_every_rate_moves_its_arm_alone():
    for name, (arm, values) in choices.items():
        other = replace(small, rates=small.rates | {name: 0.3})
        assert tuned_outcome(other, arm, 0)["valid"] != tuned_outcome(small, arm, 0)["valid"]
        for fixed in (x for x, _ in choices.values() if x != arm):
            assert tuned_outcome(other, fixed, 0) == tuned_outcome(small, fixed, 0)
        assert len(set(values)) == len(values)


def test_the_choice_is_the_best_mean_on_validation():
    tried = choose(small, (0, 1))
    assert [r["name"] for r in tried] == ["start"] + [k for k, (_, v) in choices.items() for _ in v]
    assert tried[0]["valid"] == [tuned_outcome(small, "SFT", k)["valid"] for k in (0, 1)]
    for r in tried:
        r["valid"] = [0.1, 0.1]
    tried[2]["valid"], tried[-1]["valid"] = [0.3, 0.0], [0.11, 0.1]
    cfg = chosen_config(small, tried)
    assert cfg.rates["beam"] == tried[2]["rate"] and cfg.rates["continued"] == tried[-1]["rate"]
    assert cfg.rates["sampling"] == choices["sampling"][1][0]
    with pytest.raises(ValueError, match="no row for 'beam'"):
        chosen_config(small, [r for r in tried if r["name"] != "beam"])
