"""Every Python snippet that a page shows runs: with a checkpoint folder that looks like the hub's
in place of the hub's, and small numbers in place of large ones. Snippets are collected by
themselves"""

import ast
import builtins
import json
import re
from pathlib import Path

import pytest
import torch

from hub import hub_folder, text, tokenizer
from llmpapers.core.lm import load_lm

root = Path(__file__).resolve().parents[1]
fence = re.compile(r"```python\n(.*?)```", re.S)


def snippets():
    "(where, notebook or None, code) of every snippet of the pages"
    found = []
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            codes = (
                fence.findall("".join(cell["source"])) if cell["cell_type"] == "markdown" else []
            )
            if codes:  # snippets of one cell follow each other
                found.append((f"{path.relative_to(root / 'nbs')}[{i}]", path, "\n".join(codes)))
    for name in ("README.md", "CONTRIBUTING.md"):
        codes = fence.findall((root / name).read_text(encoding="utf-8"))
        found += [(f"{name}[{i}]", None, code) for i, code in enumerate(codes)]
    return found


# what is large in a snippet -> what it is here
smaller = [
    (r"\bmax_new_tokens=\d+", "max_new_tokens=6"),
    (r"\bbatch_size=\d+", "batch_size=2"),
    (r"\bgroup_size=\d+", "group_size=2"),
    (r"\bgrad_accum=\d+", "grad_accum=1"),
    (r"\bsteps=\d+", "steps=2"),
    (r"\bsave_every=\d+", "save_every=1"),
    (r"\bslots=\d+", "slots=4"),
    (r"\bmax_(active|inflight_per_actor)=\d+", r"max_\1=4"),
    (r"\bactors=\d+", "actors=1"),
    (r"\bgpus_per_actor=1", "gpus_per_actor=0"),
    (r"\bnum_gpus=1", "num_cpus=.5"),
    (r"\bmax_model_len=\d+", "max_model_len=64"),
    (r"\bgpu_memory_utilization=\.\d+", "max_model_len=64"),
    (r"SampleBuffer\(\d+", "SampleBuffer(2"),
    (r"controller\.run\(\d+\)", "controller.run(2)"),
    (r"reward, \d+, cfg", "reward, 2, cfg"),
    (r"\"cuda\"", '"cpu"'),
    (r"\bblocks=\d+", "blocks=1"),
    (r"\blayers=\d+", "layers=1"),
    (r"\bd=128", "d=16"),
    (r"\bblock_size=\d+", "block_size=32"),
    (r"\"[A-Z]\w*/[A-Za-z][\w.-]+\"", '"hub"'),
    (r"\"model/\"", '"hub"'),
    (r"LLM\(\"tiny\"", 'LLM("hub"'),
]


def shrunk(code):
    for pattern, small in smaller:
        code = re.sub(pattern, small, code)
    return code


def imported(path):
    "Names that a notebook has imported or exported where the snippet stands"
    names = {}
    if path is None:
        return names
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.lstrip().startswith(("%", "!")):
            continue
        for node in ast.parse(source, type_comments=False).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), names)  # the notebook's own imports
    module = root / "llmpapers" / path.relative_to(root / "nbs")
    stem = re.sub(r"^\d+_", "", module.stem)
    if (module.parent / f"{stem}.py").exists():
        exec(f"from llmpapers.{module.parent.name}.{stem} import *", names)
    return names


def free_names(code):
    "Names that a snippet uses and nobody has made"
    made = {
        n.id
        for n in ast.walk(ast.parse(code))
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    made |= {
        a.arg for n in ast.walk(ast.parse(code)) if isinstance(n, ast.arguments) for a in n.args
    }
    used = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
    return used - made - set(vars(builtins))


class Ready:
    "What a snippet takes for granted, by its name"

    model = property(lambda s: load_lm("hub", dtype=torch.float32, device="cpu").model)
    policy = model
    tok = tokenizer = property(lambda s: tokenizer())
    input_ids = property(lambda s: torch.arange(3, 43).view(2, 20))
    attention_mask = property(lambda s: torch.ones(2, 20, dtype=torch.long))
    response_mask = property(lambda s: torch.arange(20).expand(2, 20) > 6)
    advantages = property(lambda s: torch.tensor([1.0, -1.0]))
    prompts = source = property(lambda s: ["what is the sum of 3 and 4", "add 12 and 30"] * 8)
    questions = property(lambda s: [f"what is {i} and {i}" for i in range(40)])
    passages = property(lambda s: [f"{i} and {i} is {2 * i}" for i in range(40)])

    @property
    def reward(self):
        return _reward

    @property
    def rollout(self):
        from llmpapers.rl.rollout import SingleTurn
        from llmpapers.rl.types import SamplingConfig

        return SingleTurn(tokenizer(), _reward, SamplingConfig(6, seed=0))

    @property
    def learners(self):
        from llmpapers.rl.losses import PolicyLossConfig
        from llmpapers.rl.trainer import PolicyTrainer

        m = load_lm("hub", device="cpu").model
        return PolicyTrainer(m, torch.optim.AdamW(m.parameters(), lr=1e-6), PolicyLossConfig())

    @property
    def dataset(self):
        from llmpapers.core.train import SupervisedDataset

        return SupervisedDataset(tokenizer(), [text[:40]] * 8)


def _reward(prompt, response, info):
    return len(response) / 100


@pytest.mark.slow
@pytest.mark.parametrize("where, path, code", [pytest.param(*s, id=s[0]) for s in snippets()])
def test_snippet_runs(where, path, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_folder(tmp_path / "hub")
    code = shrunk(code)
    names = imported(path)
    ready = Ready()
    for name in sorted(free_names(code) - set(names)):
        if hasattr(Ready, name):
            names[name] = getattr(ready, name)
    exec(compile(code, where, "exec"), names)
