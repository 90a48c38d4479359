"""Every architecture that builds from a tiny configuration: what samples, what trains in chunks and
what recomputes agree with a plain pass, or say by name why they take it. A dozen kinds in `make
test`, all of them in `make sweep`"""

import copy

import pytest
import torch

from llmpapers.rl.decoder import Decoder
from llmpapers.rl.engines import HFEngine, generate
from llmpapers.rl.logprobs import token_logprobs
from llmpapers.rl.losses import PolicyLossConfig
from llmpapers.rl.trainer import PolicyTrainer
from llmpapers.rl.types import Group, Request, Sample, SamplingConfig, collate
from zoo import chosen, model_of

pytestmark = pytest.mark.slow


@pytest.fixture(params=chosen)
def kind(request):
    try:
        model_of(request.param)
    except ValueError as e:
        pytest.skip(f"{request.param}: {e}")
    return request.param


def plain(model, prompt, tokens):
    "Log-probabilities of a response by one plain pass"
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        return token_logprobs(model(input_ids=ids, use_cache=False).logits, ids)[0, len(prompt) :]


def batch_of(model, n=4):
    "Groups of responses of different lengths, sampled plainly"
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    requests = [
        Request(f"{g}.{k}", p, SamplingConfig(4 + 2 * g, seed=k))
        for g, p in enumerate(prompts)
        for k in range(n)
    ]
    got = generate(HFEngine(model, use_cache=False), requests)
    groups = [Group(g, None, 0) for g in range(len(prompts))]
    for r, c in zip(requests, got):
        g = int(r.request_id.split(".")[0])
        mask, versions = [True] * len(c.token_ids), c.token_versions()
        groups[g].samples.append(
            Sample(r.prompt_ids, c.token_ids, mask, c.logprobs, versions, float(c.token_ids[0] % 3))
        )
    return collate(groups, 0)


@pytest.mark.parametrize("decoder", [None, Decoder], ids=["cache", "decoder"])
def test_what_samples_is_the_model(kind, decoder):
    """Eleven tokens behind two prompts, with joins and leaves in between, beyond any window"""
    model = model_of(kind)
    engine = HFEngine(model, use_cache=True, join_every=2, decoder=decoder)
    sizes = ((3, 11), (7, 9), (4, 5))
    requests = [
        Request(str(i), list(range(5 + i, 5 + i + n)), SamplingConfig(new, seed=i))
        for i, (n, new) in enumerate(sizes)
    ]
    got = generate(engine, requests)
    for r, c in zip(requests, got):
        gap = (torch.tensor(c.logprobs) - plain(model, r.prompt_ids, c.token_ids)).abs().max()
        assert gap < 1e-4, (kind, float(gap), engine.path, engine.why_plain)
    assert engine.path is not None or engine.why_plain


def gradient(trainer, batch):
    batch, _ = trainer._credit(batch)
    trainer._gradient(batch, list(range(len(batch))), None, None)
    res = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    return res


@pytest.mark.filterwarnings("ignore:model. .* changes its logits")
@pytest.mark.filterwarnings("ignore:model. .* has no output layer")
def test_what_trains_is_the_model(kind):
    """In chunks, and with gradient checkpointing: the log-probabilities and gradients of the plain
    way, and no dropout"""
    model = copy.deepcopy(model_of(kind))
    batch = batch_of(model)

    def trainer(limit):
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        return PolicyTrainer(model, sgd, PolicyLossConfig("reinforce"), logits_limit=limit)

    whole = trainer(2**30)
    want, grads = whole.score(batch), gradient(whole, batch)
    scale = max(g.abs().max() for g in grads.values())
    assert (want - batch.behavior_logprobs).abs().max() < 1e-4
    cut = trainer(5 * 96)
    got, chunked = cut.score(batch), gradient(cut, batch)
    ways = [chunked]
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable()
        ways.append(gradient(whole, batch))
        model.gradient_checkpointing_disable()
    assert (got - want).abs().max() < 1e-4
    for other in ways:
        assert other.keys() == grads.keys()
        worst = max((other[n] - g).abs().max() for n, g in grads.items())
        assert worst < 1e-3 * scale + 1e-6, (kind, float(worst), float(scale))
