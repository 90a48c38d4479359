"Supervised training: equivalent configurations, checkpoints, kills and resumes"

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmpapers.core.lm import TinyLMConfig, char_tokenizer, tiny_lm
from llmpapers.core.scale import rng
from llmpapers.core.train import (
    History,
    TrainConfig,
    checkpoint_fault,
    lm_loss,
    lr_factor,
    n_targets,
    newest_checkpoint,
    param_groups,
    read_metrics,
    train,
    write_checkpoint,
)

tok = char_tokenizer("0123456789^=;")


def net(seed=0, **k):
    return tiny_lm(tok, TinyLMConfig(layers=2, width=32, heads=2, kv_heads=1, **k), seed)


def data(step, g):
    ids = torch.randint(4, len(tok), (4, 12), generator=g)
    lengths = torch.randint(3, 13, (4, 1), generator=g)
    return dict(input_ids=ids, labels=ids.masked_fill(torch.arange(12) >= lengths, -100))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        return {k: v[0] for k, v in data(0, rng(7, "row", i)).items()}


def flat(m):
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def run(m, d=data, out=None, **k):
    extra = {e: k.pop(e) for e in ("loss_fn", "eval_fn", "resume", "count_fn", "collate") if e in k}
    return train(m, d, TrainConfig(**k), out=out, progress=False, device="cpu", **extra)


# ---- equivalent configurations -------------------------------------------------------------------


def test_same_as_a_plain_loop():
    a, b = net(), net()
    c = TrainConfig(steps=6, lr=1e-2, seed=3)
    hist = train(a, data, c, progress=False, device="cpu")
    opt = torch.optim.AdamW(param_groups(b, c.weight_decay), lr=c.lr, betas=c.betas, fused=True)
    losses = []
    for s in range(c.steps):
        batch = data(s, rng(c.seed, "data", s, 0))
        logits = b(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(b.parameters(), c.max_grad_norm)
        for g in opt.param_groups:
            g["lr"] = c.lr * lr_factor(s, c)
        opt.step()
        losses.append(loss.item())
    assert (flat(a) - flat(b)).abs().max() < 1e-6
    assert hist.last["loss"] == pytest.approx(np.mean(losses), abs=1e-6) and hist.last["step"] == 6


@pytest.mark.parametrize("size,k", [(4, 2), (2, 4), (1, 8)])
def test_accumulation_equals_one_batch(size, k):
    a, b = net().double(), net().double()
    ha = run(a, Rows(), steps=20, batch_size=8)
    hb = run(b, Rows(), steps=20, batch_size=size, grad_accum=k)
    assert (flat(a) - flat(b)).abs().max() < 1e-6
    assert (
        ha.last["loss"] == pytest.approx(hb.last["loss"], abs=1e-6)
        and ha.last["tokens"] == hb.last["tokens"]
    )


ddp = textwrap.dedent("""
    import sys, torch

    sys.path.insert(0, sys.argv[1])
    from test_train import *

    m = net().double()
    h = train(
        m,
        Rows(),
        TrainConfig(steps=8, batch_size=4, save_every=4),
        out=sys.argv[2],
        progress=False,
        device="cpu",
    )
    print("rank done", h.last["tokens"])
    torch.distributed.destroy_process_group()
""")


@pytest.mark.slow
def test_two_processes_equal_two_micro_batches(tmp_path):
    (tmp_path / "ddp.py").write_text(ddp)
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join(p for p in sys.path if p),
        ACCELERATE_USE_CPU="1",
        OMP_NUM_THREADS="1",
    )
    p = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(tmp_path / "ddp.py"),
            str(Path(__file__).parent),
            str(tmp_path / "two"),
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr[-3000:]
    one = net().double()
    run(one, Rows(), steps=8, batch_size=4, grad_accum=2, out=tmp_path / "one", save_every=4)
    two = net().double()
    from safetensors.torch import load_model

    load_model(two, str(newest_checkpoint(tmp_path / "two") / "model.safetensors"))
    assert (flat(one) - flat(two)).abs().max() < 1e-6
    assert [r["tokens"] for r in read_metrics(tmp_path / "two").rows] == [
        r["tokens"] for r in read_metrics(tmp_path / "one").rows
    ]


def test_order_comes_from_the_seed_alone():
    seen = {}

    def record(tag):
        def d(step, g):
            b = data(step, g)
            seen.setdefault(tag, []).append(b["input_ids"])
            torch.rand(3)
            random.random()
            return b

        return d

    run(net(), record("a"), steps=5, seed=1)
    torch.rand(17)
    run(net(1), record("b"), steps=5, seed=1)
    run(net(), record("c"), steps=5, seed=2)
    assert torch.equal(torch.stack(seen["a"]), torch.stack(seen["b"])) and not torch.equal(
        torch.stack(seen["a"]), torch.stack(seen["c"])
    )


def test_epochs_are_permutations_and_collate_is_used():
    got = []
    run(
        net(),
        Rows(),
        steps=9,
        batch_size=16,
        loss_fn=lambda m, b: got.append(b["i"]) or sum(p.sum() for p in m.parameters()) * 0,
        collate=lambda items: dict(
            i=torch.tensor([hash(tuple(x["input_ids"].tolist())) for x in items])
        ),
    )
    epochs = torch.cat(got).view(3, 48)
    assert (
        torch.equal(epochs.sort(1).values[0], epochs.sort(1).values[2])
        and len(epochs[0].unique()) == 48
    )
    assert not torch.equal(epochs[0], epochs[1])


def test_hub_data_set():
    datasets = pytest.importorskip("datasets")
    ds = datasets.Dataset.from_dict(
        dict(input_ids=[[4, 5, 6, 7]] * 6, labels=[[4, 5, 6, 7]] * 6)
    ).with_format("torch")
    h = run(net(), ds, steps=30, batch_size=2, lr=1e-2, log_every=10)
    assert h.losses[-1] < h.losses[0] / 2


# ---- what training leaves behind -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_model_and_random_state_are_given_back(precision):
    m = net().train()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    want = torch.rand(2), np.random.rand(2).tolist(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    run(m, steps=3, mixed_precision=precision)
    assert (
        torch.equal(torch.rand(2), want[0])
        and np.random.rand(2).tolist() == want[1]
        and random.random() == want[2]
    )
    assert (
        m.training
        and "forward" not in m.__dict__
        and m(data(0, rng(0))["input_ids"]).logits.dtype == torch.float32
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bf16_computes_in_bf16():
    kinds = []

    def spy(m, b):
        with torch.no_grad():
            h = m.model.layers[0].mlp.up_proj.register_forward_hook(
                lambda mod, i, o: kinds.append(o.dtype)
            )
        loss = lm_loss(m, b)
        h.remove()
        return loss

    run(net(), steps=1, mixed_precision="bf16", loss_fn=spy)
    run(net(), steps=1, mixed_precision="no", loss_fn=spy)
    assert kinds == [torch.bfloat16, torch.float32]


def test_norms_and_biases_do_not_decay():
    m = tiny_lm(tok, TinyLMConfig("gpt_neox", layers=1, width=32))
    decay, plain = ({id(p) for p in g["params"]} for g in param_groups(m, 0.1))
    for name, p in m.named_parameters():
        assert (id(p) in plain) == ("norm" in name or "bias" in name), name
    assert len(decay) + len(plain) == len(list(m.parameters()))


def test_eval_values_are_in_the_rows_and_change_nothing():
    a, b = net(dropout=0.1), net(dropout=0.1)

    def look(m):
        assert not m.training
        return dict(score=torch.rand(1).item())

    ha = run(a, steps=12, log_every=3, eval_every=6, eval_fn=look)
    run(b, steps=12, log_every=3)
    assert (
        torch.equal(flat(a), flat(b)) and len(ha.column("score")) == 2 and ha.steps == [3, 6, 9, 12]
    )
    with pytest.raises(ValueError, match="eval_fn: the name 'loss'"):
        run(net(), steps=2, eval_fn=lambda m: dict(loss=0.0))


# ---- interruptions -------------------------------------------------------------------------------

full = dict(steps=40, grad_accum=2, log_every=7, save_every=10)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out, m = tmp_path_factory.mktemp("straight"), net(dropout=0.1)
    run(m, out=out, **full)
    return flat(m), (out / "metrics.jsonl").read_bytes()


def same_as(straight, out, seed=9):  # other initial weights: all must come from the checkpoint
    m = net(seed=seed, dropout=0.1)
    run(m, out=out, **full)
    assert torch.equal(flat(m), straight[0]) and (out / "metrics.jsonl").read_bytes() == straight[1]


child = textwrap.dedent("""
    import sys, time

    sys.path.insert(0, sys.argv[1])
    from test_train import *

    def slow(step, g):
        print(step, flush=True)
        time.sleep(0.02)
        return data(step, g)

    run(net(dropout=0.1), slow, out=sys.argv[2], **full)
""")


def start(tmp_path):
    (tmp_path / "child.py").write_text(child)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    return subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / "child.py"),
            str(Path(__file__).parent),
            str(tmp_path / "run"),
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(p, step):
    for line in p.stdout:
        if int(line) >= step:
            return
    raise AssertionError(p.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 24, 33])
def test_sigkill_then_resume(step, straight, tmp_path):
    p = start(tmp_path)
    wait_for(p, step)
    time.sleep(0.01 * (step % 3))
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert p.returncode == -signal.SIGKILL
    found = newest_checkpoint(tmp_path / "run")
    assert (found is None) == (step < 10)
    same_as(straight, tmp_path / "run", seed=0 if found is None else 9)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves(straight, tmp_path):
    p = start(tmp_path)
    wait_for(p, 15)
    p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    assert p.returncode != 0 and "KeyboardInterrupt: stopped after step" in err
    step = int(err.rsplit("stopped after step ", 1)[1].split()[0])
    assert 15 <= step < 40 and newest_checkpoint(tmp_path / "run").name == f"step_{step:06d}"
    same_as(straight, tmp_path / "run")


def test_interrupt_raised_by_the_data(straight, tmp_path):
    def cut(step, g):
        if step == 25:
            raise KeyboardInterrupt
        return data(step, g)

    with pytest.raises(KeyboardInterrupt):
        run(net(dropout=0.1), cut, out=tmp_path, **full)
    assert (tmp_path / "latest").read_text() == "step_000025\n"
    same_as(straight, tmp_path)


def damage_byte(d):
    p = d / "optimizer.pt"
    b = bytearray(p.read_bytes())
    b[len(b) // 2] ^= 1
    p.write_bytes(b)


def damage_cut(d):
    p = d / "model.safetensors"
    p.write_bytes(p.read_bytes()[:100])


def damage_missing(d):
    (d / "state.json").unlink()


def damage_sums(d):
    (d / "checksums.json").write_text('{"model.')


def damage_list(d):
    (d / "checksums.json").write_text("{}")


@pytest.mark.parametrize(
    "damage", [damage_byte, damage_cut, damage_missing, damage_sums, damage_list]
)
@pytest.mark.slow
def test_damaged_checkpoint_is_noticed(damage, straight, tmp_path):
    run(net(dropout=0.1), out=tmp_path, **full)
    damage(tmp_path / "step_000040")
    assert checkpoint_fault(tmp_path / "step_000040")
    with pytest.warns(UserWarning, match="step_000040 is damaged"):
        same_as(straight, tmp_path)
    assert checkpoint_fault(tmp_path / "step_000040") is None
    for s in (30, 40):
        damage(tmp_path / f"step_{s:06d}")
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="all 2 checkpoints"):
        run(net(dropout=0.1), out=tmp_path, **full)


@pytest.mark.slow
def test_crash_while_writing_a_checkpoint(straight, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def fail(a, b):
        if str(b).endswith("step_000030"):
            calls.append(b)
            raise OSError("disk full")
        return real(a, b)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(net(dropout=0.1), out=tmp_path, **full)
    monkeypatch.undo()
    assert (
        calls
        and (tmp_path / "step_000030.tmp").exists()
        and (tmp_path / "latest").read_text() == "step_000020\n"
    )
    with pytest.warns(UserWarning, match="step_000030.tmp was not finished"):
        same_as(straight, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_cut_off_metrics_line_is_mended(straight, tmp_path):
    def cut(step, g):
        if step == 25:
            raise KeyboardInterrupt
        return data(step, g)

    with pytest.raises(KeyboardInterrupt):
        run(net(dropout=0.1), cut, out=tmp_path, **full)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 28, "lo')
    assert read_metrics(tmp_path).steps == [7, 14, 21]
    same_as(straight, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(tmp_path)


def test_finished_run_returns_at_once(straight, tmp_path):
    m = net(dropout=0.1)
    h1 = run(m, out=tmp_path, **full)

    def never(step, g):
        raise AssertionError("no data should be asked for")

    h2 = run(net(4, dropout=0.1), never, out=tmp_path, **full)
    assert h1.rows == h2.rows and sorted(p.name for p in tmp_path.glob("step_*")) == [
        "step_000030",
        "step_000040",
    ]


@pytest.mark.slow
def test_start_again(straight, tmp_path):
    run(net(3, dropout=0.1), out=tmp_path, **(full | dict(steps=50)))
    m = net(dropout=0.1)
    run(m, out=tmp_path, resume=False, **full)
    assert (
        torch.equal(flat(m), straight[0])
        and (tmp_path / "metrics.jsonl").read_bytes() == straight[1]
    )
    assert (tmp_path / "latest").read_text() == "step_000040\n" and not (
        tmp_path / "step_000050"
    ).exists()


@pytest.mark.parametrize(
    "field,value",
    [("lr", 1e-4), ("steps", 80), ("grad_accum", 1), ("seed", 5), ("betas", (0.9, 0.99))],
)
def test_other_recipe_is_refused(field, value, tmp_path):
    run(net(), out=tmp_path, steps=4, grad_accum=2)
    with pytest.raises(ValueError, match=f"^{field}:"):
        run(net(), out=tmp_path, **(dict(steps=4, grad_accum=2) | {field: value}))
    run(net(), out=tmp_path, steps=4, grad_accum=2, log_every=1, keep_last=5)  # these may change


def test_other_model_is_refused(tmp_path):
    run(net(), out=tmp_path, steps=2)
    with pytest.raises(ValueError, match="^model:"):
        run(tiny_lm(tok, TinyLMConfig(layers=3, width=32)), out=tmp_path, steps=2)


# ---- losses that are not numbers, bad values -----------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_not_finite_names_the_step(bad, where, tmp_path):
    n = []

    def loss_fn(m, b):
        n.append(1)
        loss = lm_loss(m, b)
        if len(n) != 13:
            return loss
        if where == "loss":
            return loss * bad
        p = next(m.parameters())
        p.register_hook(lambda g: (p.register_hook(lambda g: g), g * bad)[1])
        return loss

    good = net()
    run(good, steps=12, schedule="constant", warmup=0)
    m = net()
    with pytest.raises(FloatingPointError, match=rf"{where} is .* in step 13 of 20.*step_000010"):
        run(m, out=tmp_path, steps=20, save_every=5, loss_fn=loss_fn, schedule="constant", warmup=0)
    assert newest_checkpoint(tmp_path).name == "step_000010"
    assert torch.equal(flat(m), flat(good))  # the weights are those of step 12, not a bit further


@pytest.mark.parametrize(
    "field,value",
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", 0),
        ("lr", 0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "1e-3"),
        ("weight_decay", -1),
        ("warmup", 1),
        ("warmup", -0.1),
        ("schedule", "step"),
        ("min_lr", 2),
        ("grad_accum", 0),
        ("max_grad_norm", 0),
        ("mixed_precision", "fp8"),
        ("seed", -1),
        ("log_every", 0),
        ("save_every", -1),
        ("keep_last", 0),
        ("betas", (1.0, 0.9)),
        ("eval_every", 7),
    ],
)
def test_bad_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}:"):
        TrainConfig(**{field: value})


def test_fp16_needs_a_gpu():
    with pytest.raises(ValueError, match="^mixed_precision:"):
        run(net(), steps=1, mixed_precision="fp16")
    run(net(), steps=1)


def test_count_of_targets():
    b = data(0, rng(0))
    assert n_targets(b) == int((b["labels"][:, 1:] != -100).sum())
    assert n_targets(dict(input_ids=b["input_ids"])) == 4 * 11
    assert (
        n_targets(dict(input_ids=b["input_ids"], attention_mask=torch.arange(12).expand(4, 12) < 5))
        == 4 * 4
    )
    assert n_targets(dict(x=torch.zeros(7, 3))) == 7


def test_history():
    h = History([dict(step=1, loss=2.0), dict(step=2, loss=1.0, acc=0.5)])
    assert (h.steps, h.losses, h.last["acc"], h.column("acc")) == ([1, 2], [2.0, 1.0], 0.5, [0.5])
    with pytest.raises(ValueError, match="rows"):
        _ = History([]).last


def test_a_folder_is_that_of_one_run_at_a_time(tmp_path):
    "A second run is refused at once, the first goes on undisturbed; afterwards it is free"
    refused = []

    def meanwhile(step, g):
        if step == 2:
            with pytest.raises(ValueError, match="is in use by another run") as e:
                run(net(1), out=tmp_path, steps=4, save_every=1, log_every=1)
            refused.append(e)
        return data(step, g)

    kw = dict(steps=4, save_every=1, log_every=1)
    m = net()
    first = run(m, meanwhile, tmp_path, **kw)
    want = net()
    run(want, data, tmp_path / "other", **kw)
    assert len(refused) == 1 and torch.equal(flat(m), flat(want)) and first.steps == [1, 2, 3, 4]
    assert run(net(1), data, tmp_path, **kw).rows == first.rows
    with pytest.raises(RuntimeError, match="no batch"):
        run(net(), lambda step, g: no_batch(), tmp_path, resume=False, **kw)
    run(net(), data, tmp_path, resume=False, **kw)


def no_batch():
    raise RuntimeError("no batch")


@pytest.mark.parametrize("last", [False, True])
def test_a_step_written_anew_is_never_half_there(tmp_path, monkeypatch, last):
    "Killed between moving the old folder away and giving the new one its name, or right after"
    m = net()
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    write_checkpoint(tmp_path, 5, m, optimizer, dict(what="old"))
    real = os.replace

    def killed(a, b):
        if str(a).endswith(".tmp") and str(b).endswith("step_000005"):
            if last:
                real(a, b)
            raise KeyboardInterrupt
        return real(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 5, m, optimizer, dict(what="new"))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = newest_checkpoint(tmp_path)
    assert json.loads((found / "state.json").read_text())["what"] == ("new" if last else "old")
    write_checkpoint(tmp_path, 6, m, optimizer, {})
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000005", "step_000006"]


def test_starting_again_leaves_folders_of_others_alone(tmp_path):
    others = ["step_best.old", "step_mine.tmp", "step_notes"]
    for name in (*others, "step_000050.tmp", "step_000040.old"):
        (tmp_path / name).mkdir()
    run(net(), out=tmp_path, resume=False, steps=2, save_every=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", *others]
