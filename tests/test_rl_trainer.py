"The trainer, its checkpoints and its record: cut, skip, resume, damage, and several ranks"

import copy
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import root
from llmpapers.core.lm import TinyLMConfig, char_tokenizer, tiny_lm
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.checkpoint import MetricsLog, checkpoint_fault, latest, load, read_metrics, save
from llmpapers.rl.logprobs import token_logprobs
from llmpapers.rl.losses import PolicyLossConfig, losses, modes, ppo_loss, register_loss
from llmpapers.rl.trainer import PolicyTrainer, micro_batches, terminal_rewards
from llmpapers.rl.types import Group, Sample, collate

tok = char_tokenizer("0123456789=")
cfg = TinyLMConfig(layers=2, heads=2, kv_heads=1, width=16, head_dim=8, max_len=32)
base = tiny_lm(tok, cfg, seed=1)


def make_batch(step=0, groups=3, size=4, gap=False):
    g = torch.Generator().manual_seed(step)

    def draw(low, high, k):
        return torch.randint(low, high, (k,), generator=g).tolist()

    def sample():
        k = draw(1, 8, 1)[0]
        mask = [not (gap and i == 1) for i in range(k)]
        prompt, response = draw(3, 13, 3), draw(3, 13, k)
        logprobs = (-2.5 + torch.rand(k, generator=g)).tolist()
        return Sample(prompt, response, mask, logprobs, [step] * k, float(draw(0, 2, 1)[0]))

    made = [Group(i, None, step, samples=[sample() for _ in range(size)]) for i in range(groups)]
    return collate(made, tok.pad_token_id)


def make(loss="ppo", model=base, lr=1e-2, **kw):
    m = copy.deepcopy(model)
    c = loss if isinstance(loss, PolicyLossConfig) else PolicyLossConfig(loss)
    return PolicyTrainer(m, torch.optim.AdamW(m.parameters(), lr=lr), c, **kw)


@pytest.mark.parametrize("name", losses)
def test_arguments_that_a_loss_does_not_have_are_refused(name):
    with pytest.raises(ValueError, match=f"args: the loss '{name}' has no 'nonsense'"):
        PolicyLossConfig(name, args=dict(nonsense=3))


def test_a_loss_of_ones_own_has_the_arguments_of_what_it_is_like():
    def tilted(logprobs, advantages, tilt=1.0):
        return -logprobs * (advantages + tilt)

    def mine(cfg, batch, logprobs, proximal_logprobs):
        return tilted(logprobs, batch.advantages, **cfg.args)

    before = dict(losses)
    try:
        register_loss("mine", like=tilted)(mine)
        register_loss("free")(mine)
        assert PolicyLossConfig("mine", args=dict(tilt=2.0)).args == dict(tilt=2.0)
        with pytest.raises(ValueError, match="has no 'tlit'; it has: tilt"):
            PolicyLossConfig("mine", args=dict(tlit=2.0))
        assert PolicyLossConfig("free", args=dict(tlit=2.0)).args
        assert make("mine").step(make_batch())["train/updates"] == 1
        register_loss("ppo")(losses["ppo"])  # anew, without saying what it takes
        assert math.isfinite(make("tis").step(make_batch())["clip_frac/low"])
    finally:
        losses.clear()
        losses.update(before)
        register_loss("ppo", like=ppo_loss)(before["ppo"])


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True)
    )


def grad(t, batch):
    b, _ = t._credit(batch)
    ref = None if t.ref_model is None else t.score(b, t.ref_model)
    loss, metrics, _ = t._gradient(b, list(range(len(b))), None, ref)
    return torch.cat([p.grad.flatten() for p in t.model.parameters()]), loss, metrics


# ---- micro-batches -------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
@settings(deadline=None, max_examples=100)
def test_micro_batches_cover_and_fit(lengths, budget):
    cut = micro_batches(lengths, budget)
    assert sorted(i for m in cut for i in m) == list(range(len(lengths)))
    assert all(len(m) == 1 or len(m) * max(lengths[i] for i in m) <= budget for m in cut)
    firsts = [lengths[m[0]] for m in cut]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("mode", modes)
@pytest.mark.parametrize("name", sorted(losses))
def test_cut_does_not_change_the_gradient(name, mode):
    c = PolicyLossConfig(name, mode=mode, kl_coef=0.1, entropy_coef=0.01)
    ref = tiny_lm(tok, cfg, seed=2)
    b = make_batch(gap=True)
    (g, loss, m), (g2, loss2, m2) = (
        grad(make(c, ref_model=ref, max_tokens_per_micro=k), b) for k in (10**6, 16)
    )
    assert (g - g2).abs().max() < 1e-6 + 1e-5 * g.abs().max()
    assert loss == pytest.approx(loss2, abs=1e-6)
    assert m.pop("train/micro_batches") < m2.pop("train/micro_batches")
    assert m == pytest.approx(m2, abs=1e-5)


def test_padding_columns_do_not_matter():
    b = make_batch()
    fill = dict(input_ids=tok.pad_token_id, token_versions=-1)
    wide = {
        k: torch.nn.functional.pad(v, (0, 5), value=fill.get(k, 0))
        for k, v in vars(b).items()
        if v is not None and v.dim() == 2
    }
    assert torch.equal(grad(make(), b)[0], grad(make(), replace(b, **wide))[0])


def test_rows_padded_on_the_right_go_without_a_mask_and_others_do_not():
    b, t = make_batch(), make()
    seen = []
    hook = t.model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True
    )
    lp = t.forward(b)[0]
    n = b.attention_mask.sum(-1)
    shifted = {
        k: torch.stack([x.roll(int(x.shape[0] - j)) for x, j in zip(v, n)])
        for k, v in vars(b).items()
        if v is not None and v.dim() == 2
    }
    left = replace(b, **shifted)
    t.forward(left)
    hook.remove()
    assert seen[0] is None and torch.equal(seen[1].bool(), left.attention_mask)
    with torch.no_grad():
        masked = t.model(input_ids=b.input_ids, attention_mask=b.attention_mask.long()).logits
    want = token_logprobs(masked, b.input_ids)
    assert (lp - want)[b.response_mask].abs().max() < 1e-5


def test_the_gradient_is_that_of_the_plain_formula():
    b = make_batch()
    t = make("reinforce")
    got = grad(t, b)[0]
    t.optimizer.zero_grad()
    lp = t.model(b.input_ids, attention_mask=b.attention_mask.long()).logits.log_softmax(-1)
    A, total = t.default_advantages(b), 0.0
    for i in range(len(b)):
        for j in range(1, b.input_ids.shape[1]):
            if b.response_mask[i, j]:
                total = total - A[i] * lp[i, j - 1, b.input_ids[i, j]]
    (total / b.response_mask.sum()).backward()
    want = torch.cat([p.grad.flatten() for p in t.model.parameters()])
    assert torch.allclose(got, want, atol=1e-6)


# ---- steps ---------------------------------------------------------------------------------------
def test_metrics_are_floats_and_a_step_moves_the_weights():
    t = make(epochs=2, minibatches=2, scheduler=None, watch_entropy=True)
    m = t.step(make_batch())
    assert "entropy" not in make().step(make_batch())
    assert all(type(v) is float for v in m.values())
    assert {"train/loss", "train/grad_norm", "ess", "kl/behavior", "entropy"} <= set(m)
    assert not same(t, make()) and (t.n_steps, t.n_updates) == (1, 4)


def test_scheduler_critic_and_credit():
    class Critic:
        def __init__(self):
            self.n = 0

        def values(self, batch):
            return torch.full(batch.input_ids.shape, 0.5)

        def step(self, batch, returns):
            self.n += 1
            self.returns = returns
            return dict(loss=1.0)

        def state_dict(self):
            return dict(n=self.n)

        def load_state_dict(self, s):
            self.n = s["n"]

    t = make(critic=Critic())
    t.scheduler = torch.optim.lr_scheduler.LambdaLR(t.optimizer, lambda i: 1 / (1 + i))
    b = make_batch()
    m = t.step(b)
    assert m["critic/loss"] == 1.0 and t.critic.n == 1 and m["train/lr"] == pytest.approx(5e-3)
    assert terminal_rewards(b).sum(-1).tolist() == b.rewards.tolist()
    t.advantages_fn = lambda batch: batch.rewards
    with pytest.raises(ValueError, match="returns"):
        t.step(b)
    u = make()
    u.advantages_fn = lambda batch: batch.rewards[:3]
    with pytest.raises(ValueError, match="advantages_fn returned shape"):
        u.step(b)
    with pytest.raises(ValueError, match="scheduler: the saved state has one"):
        make().load_state_dict(t.state_dict())


def test_rows_without_a_sampled_token_are_left_out():
    b = make_batch()
    mask = b.response_mask.clone()
    mask[0] = False
    b = replace(b, response_mask=mask)
    assert make().step(b)["train/tokens"] == mask.sum()
    idle = make()
    before = idle.weights()
    got = idle.step(replace(b, response_mask=torch.zeros_like(mask)))
    assert got["train/tokens"] == 0 and all(v == v for v in got.values())
    assert all(torch.equal(v, before[k]) for k, v in idle.weights().items())


@pytest.mark.parametrize("kw", [{}, dict(epochs=2, minibatches=3)])
def test_resume_continues_in_the_same_bits(kw, tmp_path):
    batches = [make_batch(i) for i in range(4)]
    a, b = make(**kw), make(**kw)
    for x in batches:
        a.step(x)
    for x in batches[:2]:
        b.step(x)
    save(tmp_path, 2, trainer=b)
    c = make(model=tiny_lm(tok, cfg, seed=9), **kw)
    assert load(tmp_path, c)["step"] == 2 and c.n_steps == 2
    for x in batches[2:]:
        c.step(x)
    assert same(a, c) and c.n_updates == a.n_updates
    assert not same(a, b)


@pytest.mark.parametrize("arch", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_of_the_checkpoint_format(arch, tied, tmp_path):
    from safetensors.torch import load_file, save_file

    m = tiny_lm(tok, replace(cfg, arch=arch, tied=tied))
    t = make(model=m)
    t.step(make_batch())
    t.model.save_pretrained(tmp_path)
    saved, w = load_file(tmp_path / "model.safetensors"), t.weights()
    assert len(saved) == len(w)
    if (arch, tied) != ("gpt_neox", False):
        assert set(saved) == set(w)  # there the file says embed_out, the module lm_head
    save_file(w, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    assert same(t, make(model=type(m).from_pretrained(tmp_path)))
    t.step(make_batch())
    assert any(not torch.equal(w[k], v) for k, v in t.weights().items())  # a copy, not a view


# ---- numbers that are not finite -----------------------------------------------------------------
@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_nan_is_skipped_and_three_in_a_row_raise(minibatches, tmp_path):
    good = make_batch()
    bad = replace(good, behavior_logprobs=torch.where(good.response_mask, float("nan"), 0.0))
    t = make(minibatches=minibatches, dump_dir=tmp_path)
    m = t.step(bad)
    assert m["train/skipped"] == 1 and t.n_steps == 1 and same(t, make())
    assert t.step(good)["train/skipped"] == 1 and not same(t, make())
    w = t.state_dict()
    t.step(bad)
    t.step(bad)
    with pytest.raises(FloatingPointError, match="behavior_logprobs"):
        t.step(bad)
    assert all(torch.equal(a, b) for a, b in zip(w["model"].values(), t.weights().values()))
    assert t.n_steps == 5
    kept = torch.load(tmp_path / "nonfinite" / "step_000001.pt", weights_only=True)
    assert torch.equal(kept["input_ids"], bad.input_ids)


def test_a_nan_in_a_weight_names_the_log_probabilities():
    t = make(max_skipped=1)
    with torch.no_grad():
        next(t.model.parameters())[3] = float("inf")
    with pytest.raises(FloatingPointError, match="^logprobs is not finite"):
        t.step(make_batch())


# ---- checkpoints ---------------------------------------------------------------------------------
def filled_buffer():
    b = SampleBuffer(2, 1.0, group_size=2)
    for i in range(4):
        b.admit(dict(n=i))
    for g, k in b.pending()[:5]:
        attempt, done = b.dispatch(g.group_id, k), Sample([1], [2], [True], [-0.5], [0], 1.0)
        b.commit(g.group_id, k, attempt, done)
    return b


def test_checkpoint_keeps_buffer_cursor_and_number(tmp_path):
    t, b = make(), filled_buffer()
    for i in (1, 2, 3):
        save(tmp_path, i, trainer=t, buffer=b, cursor=[i], extra=dict(a=1), keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000002", "step_000003"]
    new = SampleBuffer(2, 1.0, group_size=2)
    info = load(tmp_path, make(), new)
    assert info["cursor"] == [3] and info["extra"] == dict(a=1)
    found, kept = (json.loads(json.dumps(x.state_dict()["groups"])) for x in (new, b))
    assert found == kept
    assert load(tmp_path / "none") is None
    save(tmp_path, 3, trainer=t, cursor="again")
    assert load(tmp_path)["cursor"] == "again"
    with pytest.raises(ValueError, match="without one"):
        load(tmp_path, buffer=new)
    with pytest.raises(TypeError, match="extra"):
        save(tmp_path, 4, trainer=t, extra=object())
    assert latest(tmp_path).name == "step_000003"


FILES = "model.safetensors optimizer.pt trainer.json rng.pt buffer.jsonl checksums.json".split()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_every_damage_is_seen_and_the_one_before_is_used(name, how, tmp_path):
    t, b = make(), filled_buffer()
    save(tmp_path, 1, trainer=t, buffer=b)
    p = save(tmp_path, 2, trainer=t, buffer=b) / name
    raw = p.read_bytes()
    if how == "remove":
        p.unlink()
    else:
        p.write_bytes(raw[: len(raw) // 2] if how == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
    assert checkpoint_fault(p.parent)
    with pytest.warns(UserWarning, match="step_000002 is damaged"):
        assert load(tmp_path, make())["step"] == 1


SAVER = """
    import sys, torch
    from llmpapers.rl.checkpoint import save
    class Holder:
        def state_dict(self):
            empty = dict(optimizer={}, scheduler=None, critic=None, counters={})
            return dict(model=dict(w=torch.zeros(400, 1000)), **empty)
    for i in range(10**6):
        save(sys.argv[1], i, trainer=Holder())
        print(i, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.013, 0.05])
def test_sigkill_while_saving_leaves_a_good_checkpoint(delay, tmp_path):
    p = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(root)),
    )
    first = p.stdout.readline()
    time.sleep(delay)
    p.send_signal(signal.SIGKILL)
    said = [int(x) for x in (first + p.communicate()[0]).split()]
    assert load(tmp_path)["step"] >= said[-1]
    save(tmp_path, 10**6, trainer=make())  # what was left behind is no obstacle
    assert load(tmp_path)["step"] == 10**6


# ---- the record ----------------------------------------------------------------------------------
def test_torn_line_is_repaired_and_resume_truncates(tmp_path):
    p = tmp_path / "a" / "m.jsonl"
    with MetricsLog(p) as log:
        for i in range(1, 6):
            log.log(i, dict(x=torch.tensor(i / 2), bad=float("inf"), name="é"))
    whole = p.read_bytes()
    p.write_bytes(whole[:-4])
    assert [r["step"] for r in read_metrics(p)] == [1, 2, 3, 4]
    with MetricsLog(p, resume_step=4) as log:
        log(dict(step=5, x=9))
    rows = read_metrics(p)
    assert [r["x"] for r in rows] == [0.5, 1, 1.5, 2, 9] and rows[0]["bad"] is None
    with MetricsLog(p, resume_step=2) as log:
        log.log(3, {})
        with pytest.raises(ValueError, match="not above 3"):
            log.log(3, {})
    assert [r["step"] for r in read_metrics(p)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="closed"):
        log.log(4, {})


# ---- ranks ---------------------------------------------------------------------------------------
def one_rank(group, batches, bad):
    t = make(
        loss="tis", group=group, max_tokens_per_micro=24, epochs=2, minibatches=2, max_grad_norm=1e9
    )
    t.optimizer = torch.optim.SGD(t.model.parameters(), lr=0.05)
    logs = [t.step(b) for b in batches]
    w = t.weights()
    u = make(group=group)
    u.step(bad)
    return w, logs, same(u, make()) and u.n_skipped == 1


@pytest.fixture(scope="module")
def two_ranks():
    "Run a function in two processes of a group"
    import dill

    def run(fn, *args):
        with tempfile.TemporaryDirectory() as folder:
            call = Path(folder) / "call.pkl"
            call.write_bytes(dill.dumps((fn, args, folder), recurse=True))
            path = os.pathsep.join(str(root / p) for p in ("", "tests", "tools"))
            env = os.environ | dict(PYTHONPATH=path)
            command = [sys.executable, "-c", RANK, str(call)]
            procs = [subprocess.Popen([*command, str(k)], env=env) for k in range(2)]
            assert [p.wait(120) for p in procs] == [0, 0]
            return [dill.loads((Path(folder) / f"{k}.pkl").read_bytes()) for k in range(2)]

    return run


RANK = """import dill, pathlib, sys, torch
from llmpapers.rl.ray import learner_group
torch.set_num_threads(1)
fn, args, folder = dill.loads(pathlib.Path(sys.argv[1]).read_bytes())
res = fn(learner_group(int(sys.argv[2]), 2, f"file://{folder}/meet", "gloo"), *args)
torch.distributed.destroy_process_group()
pathlib.Path(folder, sys.argv[2] + ".pkl").write_bytes(dill.dumps(res))"""


@pytest.mark.slow
def test_two_ranks_equal_one_process(two_ranks):
    batches = [make_batch(i, size=5) for i in range(2)]
    bad = replace(batches[0], behavior_logprobs=batches[0].behavior_logprobs.clone())
    bad.behavior_logprobs[0, 3] = float("nan")  # on one rank only
    w, logs, _ = one_rank(None, batches, bad)
    ranks = two_ranks(one_rank, batches, bad)
    for w2, logs2, kept in ranks:
        assert kept and max((w[k] - w2[k]).abs().max().item() for k in w) < 1e-6
        for a, b in zip(logs, logs2):
            assert {k: v for k, v in a.items() if "micro" not in k} == pytest.approx(
                {k: v for k, v in b.items() if "micro" not in k}, rel=1e-4, abs=1e-6
            )
    assert all(torch.equal(ranks[0][0][k], ranks[1][0][k]) for k in w)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 120), st.integers(0, 40)
)
def test_no_other_cut_is_cheaper(lengths, budget, overhead):
    "All ways to cut the sorted rows are tried"
    n, costs = sorted(lengths, reverse=True), []
    for ways in range(2 ** (len(n) - 1)):
        ends = [0] + [i + 1 for i in range(len(n) - 1) if ways >> i & 1] + [len(n)]
        sizes = [(b - a, (b - a) * n[a]) for a, b in zip(ends, ends[1:])]
        if all(rows == 1 or size <= budget for rows, size in sizes):
            costs.append(sum(size + overhead for _, size in sizes))
    cut = micro_batches(lengths, budget, overhead)
    assert sum(len(m) * max(lengths[i] for i in m) + overhead for m in cut) == min(costs)


@pytest.mark.slow
def test_memory_of_a_step_in_chunks():
    """2,048 sampled tokens over 152,000 words, each way in a fresh process: at most a quarter of
    the memory, and the same gradient to 1e-5"""
    from llmpapers.core.bench import peak_memory
    from llmpapers.rl.trainer import step_memory_job

    job = "llmpapers.rl.trainer:step_memory_job"
    plain, chunked = (peak_memory(job, 2048, 152_000, k) for k in (2**40, 2**25))
    assert chunked <= plain / 4, (chunked, plain)
    norms = [step_memory_job(512, 9000, k)() for k in (2**40, 2**16)]
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0]
