"""Every Python snippet that a page shows runs: with a checkpoint folder that looks like the hub's
in place of the hub's, and small numbers in place of large ones. Snippets are collected by
themselves"""

import ast
import functools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from hub import hub_folder, log_files, tokenizer
from llmpapers.core.lm import load_lm
from llmpapers.rl.vllm import _beside_numba

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
    (r"\bTrainConfig\(", "TrainConfig(steps=2, "),
    (r"\bRhythmConfig\(", "RhythmConfig(max_new_tokens=6, prompts=2, group_size=2, "),
    (r"\bsave_every=\d+", "save_every=1"),
    (r"\bslots=\d+", "slots=4"),
    (r"\bmax_(active|inflight_per_actor)=\d+", r"max_\1=4"),
    (r"\bactors=\d+", "actors=1"),
    (r"\bn_actors=\d+", "n_actors=2"),
    (r"\bgpus_per_actor=1", "gpus_per_actor=0"),
    (r"\bnum_gpus=1", "num_cpus=.5"),
    (r"\bmax_model_len=\d+", "max_model_len=64"),
    (r",\s*gpu_memory_utilization=\.\d+", ""),
    (r"SampleBuffer\(\d+", "SampleBuffer(2"),
    (r"controller\.run\(\d+\)", "controller.run(2)"),
    (r"reward, \d+,", "reward, 2,"),
    (r"\basyppo_paper\b", "replace(asyppo_paper, max_new_tokens=6, batch_size=2, group_size=2)"),
    (r"\"cuda\"", '"cpu"'),
    (r"\bblocks=\d+", "blocks=1"),
    (r"\blayers=\d+", "layers=1"),
    (r"\bd=128", "d=16"),
    (r"\bblock_size=\d+", "block_size=32"),
    (r"\"EleutherAI/pythia-70m\"", '"neox"'),
    (r"\"[A-Z]\w*/[A-Za-z][\w.-]+\"", '"hub"'),
    (r"\"model/\"", '"hub"'),
    (r"\"intfloat/e5-base-v2\"", '"minilm"'),
    (r"\bquestions=\d+", "questions=2"),
    (r"LLM\(\"tiny\"", 'LLM("hub"'),
    (r"\"McAuley-Lab/Amazon-Reviews-2023\"", '"amazon"'),
    (r"\bmin_items=\d+", "min_items=5"),
    (
        r"(?<!import )\bsft_paper\b",
        "replace(sft_paper, steps=2, batch_size=2, grad_accum=1, warmup=0.0)",
    ),
    (r"(?<!import )\brere_paper\b", "replace(rere_paper, steps=2, batch_size=2, group_size=2)"),
    (r"\(study_gpu\b", "(study_small"),
    (r"\bTitleConfig\(", "TitleConfig(n_users=20, n_test=4, "),
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


def loaded_names(code):
    "Names that a snippet reads"
    nodes = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name))
    return {n.id for n in nodes if isinstance(n.ctx, ast.Load)}


class Ready:
    "What a snippet takes for granted, by its name"

    @functools.cached_property
    def model(self):
        return load_lm("hub", dtype=torch.float32, device="cpu").model

    policy = property(lambda s: s.model)
    optimizer = property(lambda s: torch.optim.AdamW(s.model.parameters(), lr=1e-3))
    batches = property(lambda s: [s.input_ids + k for k in range(3)])
    held_out_later_batch = property(lambda s: s.input_ids + 9)
    task_loss = property(lambda s: lambda m, b: m(input_ids=b, labels=b).loss)
    states = property(lambda s: torch.randn(12, 48, 8))
    actions = property(lambda s: torch.randn(12, 48))
    returns = property(lambda s: torch.rand(12))
    budget = property(lambda s: 1 + torch.rand(12))
    task = property(lambda s: torch.arange(12) % 6)
    cond = property(lambda s: torch.rand(12, 3))
    context = property(lambda s: torch.rand(12, 3 * 48, 3))
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

    dataset = property(lambda s: [dict(input_ids=torch.arange(3, 15) + k) for k in range(8)])


def _reward(prompt, response, info):
    return len(response) / 100


@pytest.mark.slow
@pytest.mark.parametrize("where, path, code", [pytest.param(*s, id=s[0]) for s in snippets()])
def test_snippet_runs(where, path, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by itself it takes most of the memory
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # ends with the test
    _beside_numba()
    hub_folder(tmp_path / "hub")
    hub_folder(tmp_path / "neox", "gpt_neox", num_hidden_layers=6)
    page = dict(id="1", contents='"Norma"\nNorma is an opera by Bellini.')
    (tmp_path / "wiki-18.jsonl").write_text(json.dumps(page) + "\n")
    log_files(tmp_path)
    if "ml-100k" in code:
        from llmpapers.dspnet.real_log import write_planted

        (tmp_path / "ml-100k").mkdir()
        write_planted("ml-100k", n_users=40, seq_len=9, seed=1)
    code = shrunk(code)
    names = imported(path)
    ready = Ready()
    for name in sorted(loaded_names(code) - set(names)):
        if hasattr(Ready, name):
            names[name] = getattr(ready, name)
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    exec(compile(code, where, "exec"), names)


def commands():
    "(where, command line) of every use of the command on a page and in its own help"
    from llmpapers.core.cli import parser

    texts = {
        name: (root / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
    }
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pages = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        texts[str(path.relative_to(root / "nbs"))] = "\n".join(pages)
    texts["help"] = parser().format_help()
    line = re.compile(r"(?:`|^)llmpapers ([a-z][^`\n]*?)(?:`|\s+#.*|$)", re.M)
    found = {(m[1].strip(), where) for where, text in texts.items() for m in line.finditer(text)}
    return [pytest.param(c, id=f"{where}: {c}") for c, where in sorted(found)]


@pytest.mark.parametrize("command", commands())
def test_command_line_is_understood(command):
    """Each is taken by the parser; words in capitals stand for anything"""
    from llmpapers.core.cli import parser

    words = [re.sub(r"^(PAPER|NAME)$", "smec", w.strip("[]")) for w in shlex.split(command)]
    words = [w for w in words if w != "..."]
    parser().parse_args(words)
