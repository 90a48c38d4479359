"""ReRe from a better start: start and rates are chosen on validation, and nothing else is"""

from dataclasses import replace

import numpy as np
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_rate_moves_its_arm_alone():
    for name, (arm, values) in choices.items():
        other = replace(small, rates=small.rates | {name: 0.3})
        assert tuned_outcome(other, arm, 0)["valid"] != tuned_outcome(small, arm, 0)["valid"]
        for fixed in (x for x, _ in choices.values() if x != arm):
            assert tuned_outcome(other, fixed, 0) == tuned_outcome(small, fixed, 0)
        assert len(set(values)) == len(values)


@pytest.mark.slow
def test_the_choice_is_the_best_mean_on_validation():
    tried = choose(small, (0, 1))
    assert [r["name"] for r in tried] == ["start"] + [k for k, (_, v) in choices.items() for _ in v]
    assert tried[0]["valid"] == [tuned_outcome(small, "SFT", k)["valid"] for k in (0, 1)]
    for r in tried:
        r["valid"] = [0.1, 0.1]
    tried[2]["valid"], tried[-1]["valid"] = [0.3, 0.0], [0.11, 0.1]
    with pytest.warns(UserWarning, match="at an end"):
        cfg = chosen_config(small, tried)
    assert cfg.rates["beam"] == tried[2]["rate"] and cfg.rates["continued"] == tried[-1]["rate"]
    assert cfg.rates["sampling"] == choices["sampling"][1][0]
    with pytest.raises(ValueError, match="no row for 'beam'"):
        chosen_config(small, [r for r in tried if r["name"] != "beam"])


def rows_of(valid, name="beam"):
    "A choice in which one way has these values, and the others are best inside their grids"
    rows = [dict(name=name, rate=10.0 ** -(3 + i), valid=v) for i, v in enumerate(valid)]
    inside = ([0.1], [0.2], [0.1])
    others = [dict(name=k, rate=10.0**-i, valid=v) for k in choices for i, v in enumerate(inside)]
    return rows + [r for r in others if r["name"] != name]


def test_a_choice_without_values_is_none():
    """No world, no number, other worlds: an error that names the way and the rate"""
    for valid, match in (
        ([[]], r"'beam' at the rate 0.001 has valid=\[\]"),
        ([[0.1], [float("nan")]], r"'beam' at the rate 0.0001 has valid=\[nan\]"),
        ([[0.1], [0.1, 0.9]], "'beam' at the rate 0.0001 has other worlds"),
    ):
        with pytest.raises(ValueError, match=match):
            chosen_config(small, rows_of(valid))
    with pytest.raises(ValueError, match="seeds is empty"):
        choose(small, ())


def test_a_rate_at_the_end_of_its_grid_is_told(recwarn):
    assert chosen_config(small, rows_of([[0.1], [0.3], [0.2]])).rates["beam"] == 1e-4
    assert chosen_config(small, rows_of([[0.1]])).rates["beam"] == 1e-3 and not recwarn.list
    for values, rate in (([[0.3], [0.2], [0.1]], 1e-3), ([[0.1], [0.2], [0.3]], 1e-5)):
        with pytest.warns(UserWarning, match=f"beam: the best rate, {rate:g}, is at an end"):
            assert chosen_config(small, rows_of(values)).rates["beam"] == pytest.approx(rate)


def test_sizes_are_checked():
    good = dict(small.rates)
    for kw, match in (
        (dict(starts=0), "starts=0"),
        (dict(starts=1.5), "starts=1.5"),
        (dict(rates={}), "rates={} must have a rate for each of beam, sampling"),
        (dict(rates=good | dict(greedy=1e-3)), "rates=.*greedy"),
        (dict(rates=None), "rates=None"),
        (dict(rates=good | dict(beam=-1)), r"rates\['beam'\]=-1"),
        (dict(rates=good | dict(sampling="x")), r"rates\['sampling'\]='x'"),
        (dict(rates=good | dict(dynamic=float("nan"))), r"rates\['dynamic'\]=nan"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(small, **kw)
    for make, kind, match in (
        (lambda: tuned_outcome("small", "SFT", 0), TypeError, "cfg is a str"),
        (lambda: tuned_start("small", 0), TypeError, "cfg is a str"),
        (lambda: tuned_outcome(small, "SFT", -1), ValueError, "seed=-1"),
        (lambda: tuned_start(small, 1.5), ValueError, "seed=1.5"),
        (lambda: tuned_outcome(small, "SFT", "0"), ValueError, "seed='0'"),
    ):
        with pytest.raises(kind, match=match):
            make()
    assert tuned_outcome(small, "SFT", np.int64(0)) == tuned_outcome(small, "SFT", 0)


def test_the_key_of_an_outcome_is_that_of_its_sizes():
    """What an arm reads, under the name of the dataclass: entries that were made stay valid"""
    from llmpapers.core.artifacts import _plain

    assert _plain(rates._read_by(TunedConfig(), "SFT")) == _plain(TunedConfig()) | dict(rates={})
    kept = _plain(rates._read_by(TunedConfig(), rates.rere))
    assert kept == _plain(TunedConfig()) | dict(rates=dict(beam=3e-4))
