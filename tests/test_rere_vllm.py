"""Constrained sampling in the real vLLM: a batch of requests, of which some are restricted to a
catalogue, come, go and change places"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llmpapers.rere.decode import restrict_rows, update_rows
from llmpapers.rere.trie import ItemTrie

script = r"""
import json, sys
import torch
from llmpapers.core.lm import LM, TinyLMConfig, save_lm, tiny_lm, word_tokenizer
from llmpapers.rere.decode import score_items, trie_processor
from llmpapers.rere.trie import ItemTrie
from llmpapers.rl.vllm import VLLMEngine

if __name__ == "__main__":
    tok = word_tokenizer([*"abcdefghijklmnop"])
    model = tiny_lm(tok, TinyLMConfig(layers=2, width=64, head_dim=32, max_len=512), 0)
    folder = save_lm(LM(model, tok, "a"), sys.argv[1] + "/model")
    strings = [[4], [4, 5], [6, 7, 8], [9, 9], [10, 4, 4, 4]]
    end = tok.eos_token_id
    trie = ItemTrie.from_sequences(strings, eos_id=end)
    engine = VLLMEngine(
        folder, max_len=128, max_active=32, block_size=32, logits_processors=[trie_processor(trie)]
    )
    prompt = dict(prompt_token_ids=[11, 12, 13])

    def ask(n, trie, temperature=1.0):
        params = [
            engine.params(
                max_tokens=2 + i % 5 if not trie else 8,
                temperature=temperature,
                seed=i,
                stop_token_ids=[end],
                logprobs=0,
                detokenize=False,
                extra_args=dict(trie=trie),
            )
            for i in range(n)
        ]
        return params

    bound, free = ask(400, True), ask(40, False)
    params = [p for i in range(40) for p in (*bound[10 * i : 10 * i + 10], free[i])]
    outs = engine.llm.generate([prompt] * len(params), params, use_tqdm=False)
    items, wrong, gap, loose = [], 0, 0.0, 0
    for p, o in zip(params, outs):
        ids = list(o.outputs[0].token_ids)
        node = int(trie.walk(ids)[-1])
        item = int(trie.item_at(torch.tensor([node]))[0]) if node >= 0 else -1
        leaf = node >= 0 and bool(trie.indptr[node] == trie.indptr[node + 1])
        if p.extra_args["trie"]:
            wrong += not leaf
            items.append(item)
        else:
            loose += not leaf
    greedy = engine.llm.generate([prompt], ask(1, True, 0.0), use_tqdm=False)
    share = torch.bincount(torch.tensor(items), minlength=5) / len(items)
    p = score_items(model, [[11, 12, 13]], trie, "renorm")[0].exp()
    z = ((share - p).abs() / (p * (1 - p) / len(items)).sqrt()).max().item()
    greedy = list(greedy[0].outputs[0].token_ids)
    print(json.dumps(dict(wrong=wrong, loose=loose, z=z, greedy=greedy)))
"""


@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(600)
def test_restricted_requests_write_items_with_the_right_shares(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(script)
    r = subprocess.run([sys.executable, file, tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    out = json.loads(r.stdout.splitlines()[-1])
    assert out["wrong"] == 0 and out["loose"] > 20 and out["z"] < 4.5, out
    assert out["greedy"][-1] == 2


# ---- without the engine: rows that come, go and change places -----------------------------------
def batch(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=list(removed), added=list(added), moved=list(moved))


def params(trie):
    return SimpleNamespace(extra_args=dict(trie=True) if trie else None)


SWAP, MOVE = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")


def test_rows_follow_their_requests():
    trie = ItemTrie.from_sequences([[4, 5], [6]], eos_id=2)
    a, b, c = [], [], []
    rows = {}
    update_rows(rows, None)
    update_rows(rows, batch(added=[(0, params(True), [1], a), (1, params(False), [1], b)]))
    update_rows(rows, batch(added=[(2, params(True), [1], c)]))

    def legal():
        out = restrict_rows(trie, rows, torch.zeros(3, 8), 2)
        return [r.isfinite().nonzero()[:, 0].tolist() for r in out]

    everything = list(range(8))
    assert legal() == [[4, 6], everything, [4, 6]]
    a.append(4)
    c.append(6)
    assert legal() == [[5], everything, [2]]
    update_rows(rows, batch(moved=[(0, 1, SWAP)]))
    assert legal() == [everything, [5], [2]]
    update_rows(rows, batch(removed=[0], moved=[(2, 0, MOVE)]))
    c.append(2)
    a += [5, 2]
    assert legal() == [[2], [2], everything]
    update_rows(rows, batch(removed=[0], added=[(0, params(False), [1], [])]))
    assert legal() == [everything, [2], everything]
    b.append(7)
    d = [9]  # came with a token that begins no item
    update_rows(rows, batch(added=[(2, params(True), [1], d)]))
    assert legal()[2] == [2]
