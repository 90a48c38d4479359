"""The real vLLM as a rollout engine: weights in place, no stale cache, training through it, and two
engines in Ray actors"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(600)]

common = r"""
import json, sys, random
import llvmlite.binding  # as numba does, whose library object vLLM stumbles over
import torch
from pathlib import Path
from llmpapers.core.lm import LM, TinyLMConfig, save_lm, tiny_lm, word_tokenizer
from llmpapers.rl.engines import HFEngine, generate
from llmpapers.rl.weights import WeightSyncError, check_sync, probe_ids
from llmpapers.rl.logprobs import token_logprobs
from llmpapers.rl.types import Request, SamplingConfig
from llmpapers.rl.vllm import VLLMEngine

tok = word_tokenizer([*"abcdefghijklmnop"])


def lm(seed):
    return tiny_lm(tok, TinyLMConfig(layers=2, width=64, head_dim=32, max_len=512), seed)


def gap(m, rs, cs):
    worst = 0.0
    for r, c in zip(rs, cs):
        ids = torch.tensor([r.prompt_ids + c.token_ids])
        T = r.sampling.temperature or 1.0
        with torch.no_grad():
            lp = token_logprobs(m(input_ids=ids).logits, ids, T)[0, len(r.prompt_ids) :]
        worst = max(worst, (lp - torch.tensor(c.logprobs)).abs().max().item())
    return worst
"""

single = (
    common
    + r"""
if __name__ == "__main__":
    a, b = lm(0), lm(1)
    folder = save_lm(LM(a, tok, "a"), sys.argv[1] + "/model")
    rnd = random.Random(0)
    shared = [rnd.randrange(4, len(tok)) for _ in range(150)]

    def ask(T, n=10, name="q"):
        return [
            Request(f"{name}{i}", shared + [4 + i] * i, SamplingConfig(n, T, seed=3))
            for i in range(1, 5)
        ]

    e, out = VLLMEngine(folder, max_len=256, max_active=8, block_size=32), {}
    probe = probe_ids(len(tok))
    greedy = generate(e, ask(0.0))
    out["same_greedy"] = [c.token_ids for c in greedy] == [
        c.token_ids for c in generate(HFEngine(a), ask(0.0))
    ]
    out["gap_before"] = max(gap(a, ask(T), generate(e, ask(T))) for T in (0.0, 0.7, 1.3))
    out["repeatable"] = [c.token_ids for c in generate(e, ask(0.7))] == [
        c.token_ids for c in generate(e, ask(0.7))
    ]
    e.load_weights(b.state_dict(), 1)
    out["gap_after"] = max(gap(b, ask(T), generate(e, ask(T))) for T in (0.0, 0.7, 1.3))
    out["probe"] = check_sync(e, HFEngine(b).logprobs(probe), probe)
    try:
        check_sync(e, HFEngine(a).logprobs(probe), probe)
        out["old_passes"] = True
    except WeightSyncError:
        out["old_passes"] = False
    # what cannot be taken is refused before anything is overwritten, and costs one request
    from dataclasses import replace

    def refused(fn, *args):
        try:
            fn(*args)
        except ValueError as err:
            return str(err)
        return "accepted"

    w = a.state_dict()
    wrong = [
        {k: v for k, v in w.items() if "layers.1." not in k},
        w | {"model.norm.weight": torch.ones(3)},
        w | {"model.layers.7.norm.weight": torch.ones(64)},
    ]
    out["refused"] = [refused(e.load_weights, x, 9) for x in wrong]
    out["still_b"] = gap(b, ask(1.0), generate(e, ask(1.0)))
    odd = [
        Request("o1", [4, 10**6], SamplingConfig(4)),
        Request("o2", [4] * 250, SamplingConfig(9)),
    ]
    out["requests"] = [refused(e.add, r) for r in odd]

    class Wild:
        def allowed(self, ids):
            if len(ids) > 2:
                raise KeyError("no such item")
            return None

    e.add(replace(ask(1.0, name="w")[0], constraint=Wild()))
    for r in ask(1.0, name="v"):
        e.add(r)
    fine = []
    while e.num_active:
        fine += e.step()
    worst = gap(b, ask(1.0, name="v"), sorted(fine, key=lambda c: c.request_id))
    out["beside"] = [len(c.token_ids) for c in fine], list(e.errors), worst
    e.errors.clear()
    # a constraint that answers with an array, and another engine with the same name in work
    import copy
    from types import SimpleNamespace

    import numpy as np

    class Few:
        def __init__(self, *tokens):
            self.tokens = tokens

        def allowed(self, ids):
            return np.array(self.tokens)

    twin, idle = copy.copy(e), lambda *args: None
    twin.rows, twin.engine = {}, SimpleNamespace(add_request=idle, abort_request=idle)
    e.add(replace(ask(1.0, name="k")[0], constraint=Few(4, 5)))
    twin.add(replace(ask(1.0, name="k")[0], constraint=Few(6)))
    few = []
    while e.num_active:
        few += e.step()
    twin.abort()
    out["few"] = sorted({t for c in few for t in c.token_ids}), few[0].allowed[0], list(e.errors)
    # responses that end while a sequence is scored
    for r in ask(1.0, 1, "s"):
        e.add(r)
    e.logprobs(probe)
    out["ready"] = e.num_active, [c.request_id for c in e.step()], e.num_active
    e._forget = lambda: True  # the reset taken out
    generate(e, ask(0.0))
    e.load_weights(a.state_dict(), 2)
    out["gap_without_reset"] = gap(a, ask(0.0), generate(e, ask(0.0)))
    del e._forget
    e.load_weights(a.state_dict(), 3)
    out["gap_with_reset"] = gap(a, ask(0.0), generate(e, ask(0.0)))
    for r in ask(1.0, 20, "m"):
        e.add(r)
    done = [c for _ in range(7) for c in e.step()]
    e.load_weights(b.state_dict(), 4)
    while e.num_active:
        done += e.step()
    done = sorted(done, key=lambda c: c.request_id)
    worst = 0.0
    for r, c in zip(ask(1.0, 20, "m"), done):
        for v, i, j in c.versions:
            m = {3: a, 4: b}[v]
            ids = torch.tensor([r.prompt_ids + c.token_ids])
            with torch.no_grad():
                lp = token_logprobs(m(input_ids=ids).logits, ids)[0, len(r.prompt_ids) :]
            worst = max(worst, (lp[i:j] - torch.tensor(c.logprobs[i:j])).abs().max().item())
    out["gap_mixed"], out["spans"] = worst, [[s[0] for s in c.versions] for c in done]
    for r in ask(1.0, 20, "x"):
        e.add(r)
    for _ in range(4):
        e.step()
    parts = e.abort()
    out["partial"] = [len(p.token_ids) for p in parts]
    out["idle"] = e.num_active
    try:
        e.add(ask(1.0)[0])
        e.add(ask(1.0)[0])
        out["double"] = "accepted"
    except ValueError as x:
        out["double"] = str(x)
    e.abort()
    # training through the engine
    from llmpapers.rl.buffer import SampleBuffer
    from llmpapers.rl.loop import AsyncController
    from llmpapers.rl.rollout import SingleTurn
    from llmpapers.rl.pools import InProcessPool
    from llmpapers.rl.losses import PolicyLossConfig
    from llmpapers.rl.trainer import PolicyTrainer

    m = lm(0)
    t = PolicyTrainer(m, torch.optim.AdamW(m.parameters(), lr=3e-3), PolicyLossConfig("ppo"))
    roll = SingleTurn(
        tok, lambda p, r, i: sum(w == p for w in r.split()) / 3, SamplingConfig(3, seed=0)
    )
    c = AsyncController(
        lambda i: "abcdefgh"[i % 8], roll, t, InProcessPool(e, 8), SampleBuffer(4, 1.0, 4)
    )
    c.run(6)
    out["trained"], out["kl"], out["staleness"] = (
        sorted(c.trained) == list(range(24)),
        max(abs(r["kl/behavior"]) for r in c.rows),
        c.buffer.staleness[2],
    )
    Path(sys.argv[1], "out.json").write_text(json.dumps(out))
"""
)

actors = (
    common
    + r"""
if __name__ == "__main__":
    from llmpapers.rl.buffer import SampleBuffer
    from llmpapers.rl.loop import AsyncController
    from llmpapers.rl.rollout import SingleTurn
    from llmpapers.rl.losses import PolicyLossConfig
    from llmpapers.rl.ray import RolloutPool, start_ray
    from llmpapers.rl.trainer import PolicyTrainer

    folder = str(save_lm(LM(lm(0), tok, "a"), sys.argv[1] + "/model"))
    start_ray(2)
    m = lm(0)
    t = PolicyTrainer(
        m, torch.optim.AdamW(m.parameters(), lr=3e-3), PolicyLossConfig("ppo"), temperature=0.7
    )
    roll = SingleTurn(
        tok, lambda p, r, i: sum(w == p for w in r.split()) / 3, SamplingConfig(3, 0.7, seed=0)
    )
    gaps = []

    class Watch:
        model = m

        def step(self, batch):
            lp = t.score(batch)
            gaps.append((lp - batch.behavior_logprobs)[batch.response_mask].abs().max().item())
            return t.step(batch)

        def __getattr__(self, k):
            return getattr(t, k)

    pool = RolloutPool(
        lambda: VLLMEngine(folder, max_len=64, max_active=8),
        n_actors=2,
        max_inflight_per_actor=8,
        ray_options=dict(num_cpus=0.5),
    )
    c = AsyncController(lambda i: "abcdefgh"[i % 8], roll, Watch(), pool, SampleBuffer(4, 0.0, 4))
    c.run(4)
    Path(sys.argv[1], "out.json").write_text(
        json.dumps(dict(gaps=gaps, trained=sorted(c.trained), respawned=pool.respawned))
    )
"""
)

rhythm = r"""
import json, sys
import torch
from dataclasses import replace
from pathlib import Path
from llmpapers.attention_rhythm.train import Problems, RhythmConfig, chain_problems, train_rhythm
from llmpapers.core.lm import LM, TinyLMConfig, tiny_lm
from llmpapers.core.tasks import ChainTask

if __name__ == "__main__":
    task = ChainTask(n_start=2, n_steps=2)
    policy = LM(
        tiny_lm(task.tokenizer, TinyLMConfig(layers=3, width=64, head_dim=32, max_len=128), 0),
        task.tokenizer,
        "p",
    )
    cfg = RhythmConfig(
        strategy="coupled",
        steps=3,
        prompts=4,
        group_size=4,
        max_new_tokens=24,
        lr=1e-3,
        max_active=16,
        h_lo=4,
        engine="vllm",
        loop=sys.argv[2],
    )
    dense = Problems(
        chain_problems(task).prompt, lambda prompt, response, info: len(set(response.split())) / 24
    )  # an untrained policy solves nothing
    run = train_rhythm(policy, dense, cfg, max_len=128, kv_gib=1)
    a, b = policy.model.state_dict(), run.lm.model.state_dict()
    Path(sys.argv[1], "out.json").write_text(
        json.dumps(dict(rows=run.rows, moved=max((a[k] - b[k]).abs().max().item() for k in a)))
    )
"""


experts = (
    common
    + r"""
if __name__ == "__main__":
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from llmpapers.rl.weights import checkpoint_weights, hub_names, read_weights

    sizes = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = Qwen3MoeConfig(vocab_size=97, initializer_range=0.1, **sizes, **heads, **moe)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Qwen3MoeForCausalLM(config).eval())
    folder = Path(sys.argv[1], "moe")
    models[0].save_pretrained(folder)
    e = VLLMEngine(folder, max_len=64, block_size=32)
    rs = [Request(f"r{i}", [5, 6, 7], SamplingConfig(20, seed=i)) for i in range(3)]
    gaps = [gap(models[0], rs, generate(e, rs))]
    mine, files = hub_names(checkpoint_weights(models[0]), config), read_weights(folder)
    same = set(mine) == set(files) and all(torch.equal(mine[k], files[k]) for k in files)
    try:
        e.load_weights(checkpoint_weights(models[1]), 1)
        refused = ""
    except ValueError as x:
        refused = str(x)
    gaps.append(gap(models[0], rs, generate(e, rs)))
    found = dict(gaps=gaps, same=same, refused=refused, version=e.version)
    Path(sys.argv[1], "out.json").write_text(json.dumps(found))
"""
)


crowd = (
    common
    + r"""
if __name__ == "__main__":
    folder = save_lm(LM(lm(0), tok, "a"), sys.argv[1] + "/model")
    e = VLLMEngine(folder, max_len=256, max_active=16, max_num_batched_tokens=64)

    def ask(i, n=40):
        return Request(f"c{i}", [4 + (i + k) % 9 for k in range(100)], SamplingConfig(n, seed=i))

    alone = generate(e, [ask(3)])[0].token_ids
    among = {c.request_id: c.token_ids for c in generate(e, [ask(i) for i in range(16)])}
    for i in range(16):
        e.add(ask(i, 60))
    done = [c for _ in range(50) for c in e.step()]
    e.load_weights(lm(1).state_dict(), 1)
    while e.num_active:
        done += e.step()
    found = dict(same=alone == among["c3"], lengths=[len(c.token_ids) for c in done])
    found["versions"] = sorted({v for c in done for v, _, _ in c.versions})
    Path(sys.argv[1], "out.json").write_text(json.dumps(found))
"""
)


def vllm_or_skip():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed: its engine is left out")
    r = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True)
    if r.returncode:
        pytest.skip(f"vllm cannot be imported: {r.stderr.strip().splitlines()[-1]}")


def run(folder, text, *args):
    job = folder / "job.py"
    job.write_text(text)
    r = subprocess.run(
        [sys.executable, job, folder, *args], capture_output=True, text=True, timeout=500
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    vllm_or_skip()
    return run(tmp_path_factory.mktemp("vllm"), single)


def test_same_numbers_before_and_after_an_update(out):
    """Greedy tokens are those of HFEngine; log-probabilities agree to 1e-4 at three temperatures,
    before and after"""
    assert out["same_greedy"] and out["repeatable"]
    assert (
        out["gap_before"] < 1e-4
        and out["gap_after"] < 1e-4
        and out["probe"] < 1e-4
        and not out["old_passes"]
    )


def test_a_stale_prefix_cache_is_impossible(out):
    "With the reset there is no difference; without it there would be a large one"
    assert out["gap_with_reset"] < 1e-4 and out["gap_without_reset"] > 1e-2


def test_an_update_in_the_middle_of_a_response(out):
    assert out["gap_mixed"] < 1e-4 and out["spans"] == [[3, 4]] * 4


def test_abort_returns_what_there_is(out):
    assert min(out["partial"]) >= 3 and out["idle"] == 0 and "already active" in out["double"]


def test_training_through_vllm(out):
    assert out["trained"] and out["staleness"] <= 1 and out["kl"] < 1


@pytest.mark.ray
def test_two_vllm_actors_on_ray(tmp_path):
    """Behaviour log-probabilities of two actors equal the trainer's at every step, so every update
    arrived in both"""
    vllm_or_skip()
    o = run(tmp_path, actors)
    assert (
        o["trained"] == list(range(16))
        and o["respawned"] == 0
        and len(o["gaps"]) == 4
        and max(o["gaps"]) < 1e-4
    )


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_token_credit_trains_through_vllm(tmp_path, loop):
    """`train_rhythm` with the real engine: what vLLM says about its tokens is what the trainer
    says, the credit is applied, the weights move"""
    vllm_or_skip()
    o = run(tmp_path, rhythm, loop)
    assert len(o["rows"]) == 3 and o["moved"] > 1e-4
    first = o["rows"][0] if loop == "async" else max(o["rows"], key=lambda r: r["kl/behavior"])
    assert first["kl/behavior"] < 1e-6 and abs(first["ratio/mean"] - 1) < 1e-3
    assert all(0 < r["rhythm/coverage"] < 1 for r in o["rows"])


def test_what_does_not_fit_is_refused_whole(out):
    """Names that are missing or unknown and wrong shapes: the engine keeps the weights it had"""
    missing, shape, extra = out["refused"]
    assert "there is no" in missing and "has shape (3,)" in shape and "the model has no" in extra
    assert out["still_b"] < 1e-4


def test_one_bad_request_costs_one_request(out):
    """Unknown tokens and too long requests are refused; a constraint that fails ends its own"""
    assert "is none of the" in out["requests"][0] and "the engine takes 256" in out["requests"][1]
    lengths, errors, worst = out["beside"]
    assert lengths == [10] * 4 and errors == ["w1"] and worst < 1e-4


def test_a_constraint_may_answer_with_an_array_and_is_that_of_its_own_engine(out):
    drawn, allowed, errors = out["few"]
    assert set(drawn) <= {4, 5} and allowed == [4, 5] and not errors


def test_what_ends_while_a_sequence_is_scored_is_handed_back_once(out):
    assert out["ready"] == [4, ["s1", "s2", "s3", "s4"], 0]


def test_experts_that_would_not_arrive_are_refused(tmp_path):
    """transformers fuses the experts of a layer, the hub has them one by one, and vLLM on a CPU
    keeps a packed copy that no reload replaces: the names are undone, the reload is refused"""
    vllm_or_skip()
    out = run(tmp_path, experts)
    assert max(out["gaps"]) < 1e-4 and out["same"] and out["version"] == 0
    assert "routed experts" in out["refused"]


def test_seeds_hold_where_prompts_are_read_in_pieces(tmp_path):
    """Prompts of 100 tokens, 64 a step: a seed gives the same response alone and among sixteen, and
    an update in the middle of sixteen seeded responses ends none of them"""
    vllm_or_skip()
    found = run(tmp_path, crowd)
    assert found == dict(same=True, lengths=[60] * 16, versions=[0, 1])
