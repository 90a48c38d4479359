"Rollouts: tokens are those sampled, environments are closed, tools are asked together"

import asyncio
import gc
import pickle
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmpapers.core.lm import TinyLMConfig, char_tokenizer, tiny_lm
from llmpapers.rl import rewards
from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.engines import HFEngine, ScriptedEngine
from llmpapers.rl.loop import AsyncController, train_sync
from llmpapers.rl.pools import EngineProxy, InProcessPool, play_rollout
from llmpapers.rl.rollout import (
    EngineClient,
    EpisodeRollout,
    EpisodeTimeout,
    RolloutError,
    SingleTurn,
    StepResult,
    Threads,
    ToolBatcher,
    ToolError,
    member_seed,
)
from llmpapers.rl.types import Completion, Group, SamplingConfig, collate

tok = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,:?[]\n")


def ids_of(text, tokenizer=tok):
    return tokenizer(text, add_special_tokens=False).input_ids


class Talker:
    "A client that says given texts, or token ids, one after the other, and remembers what it read"

    def __init__(self, *texts, finish="stop", version=2):
        self.texts, self.finish, self.version, self.read, self.asked = (
            list(texts),
            finish,
            version,
            [],
            [],
        )

    async def generate(self, prompt_ids, sampling, constraint=None):
        self.read.append(list(prompt_ids))
        self.asked.append((sampling, constraint))
        text = self.texts[min(len(self.read), len(self.texts)) - 1]
        ids = ids_of(text) if isinstance(text, str) else list(text)
        spans = [(self.version, 0, len(ids))] if ids else []
        return Completion("x", ids, [-0.1] * len(ids), self.finish, spans)


# ---- rewards -------------------------------------------------------------------------------------
def verified(monkeypatch, answer=0.0):
    "What math-verify would say"
    monkeypatch.setattr(rewards, "_verified", lambda gold, response: answer)


@pytest.mark.parametrize(
    "answer, response",
    [
        (r"$\frac{1}{2}$", "it is 2"),
        (r"$[0,2]$", "it is 2"),
        (r"$2\sqrt{3}$", "it is 3"),
        (r"$x^2$", "2"),
        ("none", "0"),
    ],
)
def test_the_last_number_inside_latex_is_no_answer(monkeypatch, answer, response):
    verified(monkeypatch)
    assert rewards.numeric_match(latex=True)("", response, dict(answer=answer)) == 0.0


@pytest.mark.parametrize(
    "answer, response",
    [
        ("$18", "18"),
        ("1,080", "so 1080"),
        ("2/4", "0.5"),
        ("\u22125", "-5"),
        (" 50% ", "50%"),
        (7, "7"),
        (0.5, "1/2"),
    ],
)
def test_a_number_alone_is_still_read_plainly_where_math_verify_says_no(
    monkeypatch, answer, response
):
    verified(monkeypatch)
    assert rewards.numeric_match(latex=True)("", response, dict(answer=answer)) == 1.0
    verified(monkeypatch, 1.0)
    assert rewards.numeric_match(latex=True)("", "?", dict(answer=r"\boxed{18}")) == 1.0


async def slow_length(prompt, response, info):
    await asyncio.sleep(0)
    return len(response)


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_sum_waits_for_the_rewards_that_are_coroutines(in_thread):
    "Also within another sum; without one the sum is a number at once"
    plain = rewards.weighted_sum(((0.5, rewards.exact_match),))
    assert plain("", "ab", dict(answer="ab")) == 0.5 and rewards.weighted_sum(())("", "", {}) == 0
    both = rewards.weighted_sum(((0.25, slow_length), (2.0, plain)))
    assert asyncio.run(both("", "ab", dict(answer="ab"))) == 1.5
    form = SingleTurn(tok, rewards.weighted_sum(((3.0, both),)), SamplingConfig(4), in_thread)
    group = Group(0, dict(prompt="x", answer="ab"), 0)
    assert asyncio.run(form(Talker("ab"), group, 0)).reward == 4.5


class Turns:
    "Answers the same for a number of turns, and counts what is open"

    live = 0

    def __init__(self, n=3, answer="b"):
        self.n, self.answer, self.k, self.closed = n, answer, 0, 0
        Turns.live += 1

    def reset(self, prompt, seed):
        self.seed = seed
        return "go"

    def step(self, action):
        self.k += 1
        return StepResult(self.answer, 0.5, self.k == self.n, dict(k=self.k, action=action))

    def close(self):
        assert not self.closed
        self.closed += 1
        Turns.live -= 1


class AsyncTurns(Turns):
    async def step(self, action):
        await asyncio.sleep(0)
        return Turns.step(self, action)

    async def aclose(self):
        await asyncio.sleep(0)
        Turns.close(self)


def episode(client, env=Turns, sampling=None, group=None, index=0, **kw):
    roll = EpisodeRollout(env, tok, sampling or SamplingConfig(4), **kw)
    return asyncio.run(roll(client, group or Group(0, None, 0), index))


def test_tokens_are_those_that_were_sampled_even_if_the_text_has_others():
    vocab = {"a": 0, "b": 1, "ab": 2}
    inner = Tokenizer(models.BPE(vocab, [("a", "b")]))
    two_ways = PreTrainedTokenizerFast(tokenizer_object=inner)
    two_ways.clean_up_tokenization_spaces = False
    assert ids_of("ab", two_ways) == [2]
    client = Talker([0, 1], [2], [0, 1, 0])

    class Repeats(Turns):
        def reset(self, prompt, seed):
            return "ab"

    roll = EpisodeRollout(lambda: Repeats(3, "ab"), two_ways, SamplingConfig(4))
    s = asyncio.run(roll(client, Group(0, None, 0), 0))
    assert s.prompt_ids == [2] and s.response_ids == [0, 1, 2, 2, 2, 0, 1, 0]
    assert s.response_mask == [True, True, False, True, False, True, True, True]
    assert client.read == [[2], [2, 0, 1, 2], [2, 0, 1, 2, 2, 2]]
    assert [(t.start, t.end) for t in s.turns] == [(0, 2), (3, 4), (5, 8)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
    st.integers(4, 40),
)
def test_masks_spans_rewards_and_context(turns, done_at, sizes, context):
    "Policy and environment alternate, contexts are prefixes, and nothing outgrows the context"

    class E(Turns):
        def step(self, action):
            self.k += 1
            return StepResult("c" * sizes[self.k - 1], 0.5 * self.k, self.k == done_at)

    client = Talker("xy")
    s = episode(client, E, SamplingConfig(2), max_turns=turns, max_context=context, in_thread=False)
    n, used = 0, 2
    for k in range(min(turns, done_at)):
        more = sizes[k - 1] if k else 0
        if used + more + 2 > context:
            break
        n, used = n + 1, used + more + 2
    assert len(client.read) == n == len(s.turns) == s.info["turns"] >= 1
    assert len(s.prompt_ids + s.response_ids) == used <= context
    full = s.prompt_ids + s.response_ids
    assert all(full[: len(c)] == c for c in client.read)
    marked = [i for t in s.turns for i in range(t.start, t.end)]
    assert marked == [i for i, m in enumerate(s.response_mask) if m] and s.response_mask[-1]
    assert s.reward == sum(t.reward for t in s.turns) == sum(0.5 * (k + 1) for k in range(n))
    assert s.finish_reason == ("stop" if n == done_at else "length")
    batch = collate([Group(0, None, 0, samples=[s])], 0)
    assert batch.response_mask.sum() == 2 * n


def test_long_observation_is_cut_where_it_can_be_seen():
    answer = "".join(chr(97 + i % 26) for i in range(100))
    s = episode(Talker("x"), lambda: Turns(3, answer), max_observation=40)
    text = tok.decode(s.response_ids)
    mark = "[... 84 tokens cut ...]"
    assert text.count(mark) == 2 and s.info["cut_tokens"] == 168
    assert text == f"x{answer[:8]}{mark}{answer[-8:]}x{answer[:8]}{mark}{answer[-8:]}x"
    with pytest.raises(ValueError, match="max_observation=20"):
        EpisodeRollout(Turns, tok, SamplingConfig(4), max_observation=20)


def test_an_engine_never_sees_what_is_too_long_for_it():
    model = tiny_lm(tok, TinyLMConfig(layers=1, width=16, head_dim=8, max_len=24), 0)
    proxy = EngineProxy(HFEngine(model))
    roll = EpisodeRollout(
        lambda: Turns(50, "abcde"), tok, SamplingConfig(4, seed=0), max_context=24, max_turns=50
    )
    s = asyncio.run(play_rollout(roll, proxy, Group(0, None, 0), 0))
    assert s.finish_reason == "length" and s.info["ended"] == "max_context"
    assert len(s.turns) == 3 and len(s.prompt_ids + s.response_ids) <= 24
    with pytest.raises(RolloutError, match="max_context=5"):
        episode(Talker("x"), max_context=5)


def test_turns_have_their_own_stops_limits_and_constraints():
    class Only:
        def __init__(self, text):
            self.ids = ids_of(text)

        def allowed(self, token_ids):
            return () if token_ids else tuple(self.ids)

    class E(Turns):
        def reset(self, prompt, seed):
            return StepResult("go", constraint=Only("xyz"))

        def step(self, action):
            self.k += 1
            return StepResult(
                "b", 1.0, self.k == 3, sampling=SamplingConfig(1) if self.k == 1 else None
            )

    seen = []

    def sampling(turn, so_far):
        seen.append((turn, so_far))
        return SamplingConfig(4 + turn, stop_token_ids=(ids_of(".")[0],) if turn else (), seed=0)

    client = Talker("ab", "c", "d.")
    s = episode(client, E, sampling)
    asked = [(c.max_new_tokens, len(c.stop_token_ids)) for c, _ in client.asked]
    assert asked == [(4, 0), (1, 0), (6, 1)]
    assert [c is not None for _, c in client.asked] == [True, False, False]
    assert [t for t, _ in seen] == [0, 2] and seen[1][1] == "goabbcb"
    assert s.finish_reason == "stop" and tok.decode(s.response_ids) == "abbcbd."

    model = tiny_lm(tok, TinyLMConfig(layers=1, width=16, head_dim=8, max_len=64), 0)
    roll = EpisodeRollout(E, tok, SamplingConfig(3, seed=0))
    s = asyncio.run(play_rollout(roll, EngineProxy(HFEngine(model)), Group(0, None, 0), 0))
    assert s.allowed[0] == tuple(ids_of("xyz")) and s.response_ids[0] in s.allowed[0]
    assert s.allowed[1:] == [None] * (len(s.response_ids) - 1) and s.turns[0].end == 1


def test_cut_actions_and_empty_ones():
    stop = SamplingConfig(4, stop_token_ids=(ids_of(".")[0],))
    s = episode(Talker("abcd", finish="length"), sampling=stop)
    assert s.finish_reason == "length" and s.info["ended"] == "cut" and len(s.turns) == 1
    assert s.turns[0].finish_reason == "length" and s.reward == 0
    s = episode(Talker([], "a", []), group=Group(0, None, 2))
    assert s.reward == 1.5 and [(t.start, t.end) for t in s.turns] == [(1, 2)]
    assert s.versions == [2, 2, 2] and [x["action"] for x in s.info["steps"]] == ["", "a", ""]
    with pytest.raises(RolloutError, match="before the policy wrote a token"):
        episode(Talker([]))


def test_information_of_steps_is_kept_and_seeds_are_fixed():
    s = episode(Talker("a"), max_turns=2)
    assert s.info["steps"] == [dict(k=1, action="a"), dict(k=2, action="a")]
    seeds = [member_seed(s_, g, k) for s_ in range(3) for g in range(5) for k in range(4)]
    assert len(set(seeds)) == 60 and max(seeds) < 2**31
    assert member_seed(0, 1, 2) == 2038493621  # the same in every process and version


@pytest.mark.parametrize("env", [Turns, AsyncTurns])
@pytest.mark.parametrize(
    "end", ["done", "turns", "context", "cut", "error", "reset", "timeout", "cancel"]
)
def test_every_end_closes_the_environment_once(env, end):
    Turns.live, made = 0, []
    release = threading.Event()

    class E(env):
        def __init__(self):
            super().__init__()
            made.append(self)

    if end in ("error", "reset"):

        def broken(self, *a):
            raise OSError("broken")

        setattr(E, "step" if end == "error" else end, broken)
    if end in ("timeout", "cancel"):
        if env is AsyncTurns:

            async def hang(self, action):
                await asyncio.sleep(60)
        else:

            def hang(self, action):
                release.wait(0.3 if end == "cancel" else 20)
                return StepResult("late")

        E.step = hang
    kw = dict(
        turns=dict(max_turns=2), context=dict(max_context=8), timeout=dict(step_timeout_s=0.1)
    )
    stop = SamplingConfig(4, stop_token_ids=(1,)) if end == "cut" else SamplingConfig(4)
    roll = EpisodeRollout(E, tok, stop, **kw.get(end, {}))

    async def main():
        client = Talker("ab", finish="length" if end == "cut" else "stop")
        task = asyncio.ensure_future(roll(client, Group(0, None, 0), 0))
        if end == "cancel":
            await asyncio.sleep(0.1)
            task.cancel()
        await asyncio.wait([task])
        return task

    task = asyncio.run(main())
    release.set()
    assert len(made) == 1 and made[0].closed == 1 and Turns.live == 0
    if end == "cancel":
        assert task.cancelled()
    elif end == "timeout":
        assert isinstance(task.exception(), EpisodeTimeout)
        assert "step 0 of the environment took longer than step_timeout_s=0.1" in str(
            task.exception()
        )
    elif end in ("error", "reset"):
        assert isinstance(task.exception(), OSError)
    else:
        assert task.result().finish_reason == ("stop" if end == "done" else "length")


def test_an_environment_that_is_still_being_made_when_nobody_wants_it_is_closed():
    Turns.live = 0

    def slow_factory():
        time.sleep(0.2)
        return Turns()

    async def main():
        roll = EpisodeRollout(slow_factory, tok, SamplingConfig(4))
        task = asyncio.ensure_future(roll(Talker("a"), Group(0, None, 0), 0))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert Turns.live == 0


def test_a_blocking_step_does_not_stop_the_others():
    "The first episode blocks in its thread until the second has played all of its turns"
    order, gate = [], threading.Event()

    class E(Turns):
        def reset(self, prompt, seed):
            self.name = prompt
            return "go"

        def step(self, action):
            if self.name == "blocks":
                order.append(("opened", gate.wait(60)))
            order.append((self.name, self.k))
            if self.name == "quick" and self.k == 4:
                gate.set()
            self.k += 1
            return StepResult("b", 0.0, self.k == 5 or self.name == "blocks")

    async def main(threaded):
        proxy = EngineProxy(ScriptedEngine(lambda r: 3), threaded)
        roll = EpisodeRollout(E, tok, SamplingConfig(4))
        groups = [Group(0, "blocks", 0), Group(1, "quick", 0)]
        return await asyncio.gather(*(play_rollout(roll, proxy, g, 0) for g in groups))

    for threaded in (True, False):
        order.clear()
        gate.clear()
        asyncio.run(main(threaded))
        assert order == [("quick", k) for k in range(5)] + [("opened", True), ("blocks", 0)]


def test_waiting_episodes_hold_no_place_in_the_engine():
    "An engine with one place; the environments go on only when all five episodes wait in them"

    async def main():
        waiting, together = [], asyncio.Event()

        class E(AsyncTurns):
            async def step(self, action):
                waiting.append(self)
                if len(waiting) == 5:
                    together.set()
                await asyncio.wait_for(together.wait(), 60)
                return StepResult("b", 1.0, True)

        pool = InProcessPool(ScriptedEngine(lambda r: 2, max_active=1), max_inflight=5)
        await pool.start(EpisodeRollout(E, tok, SamplingConfig(4)), None, 0)
        samples = await asyncio.gather(*(pool.submit(Group(g, None, 0), 0) for g in range(5)))
        await pool.close()
        return samples

    assert [s.reward for s in asyncio.run(main())] == [1.0] * 5


TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m.role + '\n' + m.content + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def chat_tokenizer():
    t = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,:?[]<>\n")
    t.chat_template = TEMPLATE
    return t


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_conversation_grows_as_its_template_says(role):
    t = chat_tokenizer()
    eos = t.eos_token_id
    seen = []

    class E(Turns):
        def reset(self, prompt, seed):
            return [dict(role="system", content="be short"), dict(role="user", content="hi")]

        def step(self, action):
            self.k += 1
            return StepResult(f"no {self.k}", 0.0, self.k == 3, role=role)

    def sampling(turn, so_far):
        seen.append([m["role"] for m in so_far])
        return SamplingConfig(8, stop_token_ids=(eos,))

    says = [[*ids_of(x, t), eos] for x in ("one", "two", "three")]
    roll = EpisodeRollout(E, t, sampling, chat_template=True)
    s = asyncio.run(roll(Talker(*says), Group(0, None, 0), 0))
    messages = [("system", "be short"), ("user", "hi"), ("assistant", "one"), (role, "no 1")]
    messages += [("assistant", "two"), (role, "no 2"), ("assistant", "three")]
    whole = t.apply_chat_template([dict(role=r, content=c) for r, c in messages], tokenize=False)
    assert t.decode(s.prompt_ids + s.response_ids) + "\n" == whole
    written = [t.decode(s.response_ids[x.start : x.end]) for x in s.turns]
    assert written == ["one<eos>", "two<eos>", "three<eos>"]
    assert seen[2] == ["system", "user", "assistant", role, "assistant", role]


def test_a_turn_that_was_not_closed_is_closed_and_observations_give_no_orders():
    t = chat_tokenizer()
    client = Talker(ids_of("one", t))
    roll = EpisodeRollout(lambda: Turns(2, "a<eos>b"), t, SamplingConfig(8), chat_template=True)
    s = asyncio.run(roll(client, Group(0, None, 0), 0))
    assert t.decode(s.response_ids) == "one<eos>\n<bos>user\na<eos>b<eos>\n<bos>assistant\none"
    assert s.response_ids.count(t.eos_token_id) == 2  # those of the template alone
    with pytest.raises(ValueError, match="chat_template"):
        EpisodeRollout(Turns, tok, SamplingConfig(4), chat_template=True)


def test_single_turn_with_a_template_and_rewards_in_threads():
    t = chat_tokenizer()
    said = []

    async def reward(prompt, response, info):
        said.append((prompt, response, info["answer"]))
        return 1.0

    messages = [dict(role="user", content="hi")]
    for in_thread in (False, True):
        turn = SingleTurn(t, reward, SamplingConfig(4), in_thread, chat_template=True)
        group = Group(0, dict(prompt=messages, answer="x"), 0)
        s = asyncio.run(turn(Talker("yo"), group, 0))
        assert s.reward == 1.0 and t.decode(s.prompt_ids) == "<bos>user\nhi<eos>\n<bos>assistant\n"
    assert said == [(messages, "yo", "x")] * 2


def test_rewards_that_block_leave_the_default_executor_alone():
    gate = threading.Event()

    def reward(prompt, response, info):
        return float(gate.wait(60))

    async def main():
        turn = SingleTurn(tok, reward, SamplingConfig(4), in_thread=True)
        jobs = [asyncio.ensure_future(turn(Talker("a"), Group(0, "b", 0), k)) for k in range(40)]
        await asyncio.sleep(0.05)
        answers = await asyncio.wait_for(
            asyncio.gather(*(asyncio.to_thread(int, k) for k in range(8))), 30
        )
        gate.set()
        return answers, [s.reward for s in await asyncio.gather(*jobs)]

    answers, rewards = asyncio.run(main())
    assert answers == list(range(8)) and rewards == [1.0] * 40


def test_threads_keep_order_and_end():
    before = threading.active_count()

    async def main():
        threads, seen = Threads(), []
        await asyncio.gather(*(threads.call(seen.append, k) for k in range(50)))
        names = {await threads.call(threading.get_ident) for _ in range(3)}
        threads.stop()
        return seen, names

    seen, names = asyncio.run(main())
    assert seen == list(range(50)) and len(names) == 1
    for _ in range(200):
        if threading.active_count() <= before:
            break
        time.sleep(0.01)
    assert threading.active_count() <= before


# the tool batcher


class Asks(AsyncTurns):
    def __init__(self, tool, n=3):
        super().__init__(n)
        self.tool = tool

    async def step(self, action):
        answer = await self.tool(self.k)
        self.k += 1
        return StepResult("b", float(answer), self.k == self.n)


class Counting:
    "A trainer without a model"

    def __init__(self):
        self.groups, self.rewards = [], []

    def step(self, batch):
        self.groups += batch.group_ids.tolist()
        self.rewards += batch.rewards.tolist()
        return {}

    def weights(self):
        return {}


@pytest.mark.parametrize("loop", ["sync", "async"])
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_one_call_a_turn_for_a_batch_of_64_episodes(loop, kind):
    sizes = []

    def answer(items):
        sizes.append(len(items))
        return [1] * len(items)

    async def answer_later(items):
        await asyncio.sleep(0)
        return answer(items)

    tool = ToolBatcher(answer if kind == "thread" else answer_later, 64, max_wait_s=60)
    roll = EpisodeRollout(lambda: Asks(tool), tok, SamplingConfig(2), in_thread=False)
    engine, trainer = ScriptedEngine(lambda r: 2, max_active=64), Counting()
    if loop == "sync":
        train_sync(engine, lambda i: i, roll, trainer, 2, batch_size=16, group_size=4)
    else:
        pool = InProcessPool(engine, 64)
        AsyncController(lambda i: i, roll, trainer, pool, SampleBuffer(16, 0.0, 4)).run(2)
    assert sizes == [64] * 6 and (tool.calls, tool.items) == (6, 384)
    assert trainer.rewards == [3.0] * 128


@pytest.mark.slow
def test_ten_thousand_calls_leave_nothing_behind():
    def echo(items):
        return items

    async def main():
        tool = ToolBatcher(echo, max_items=50)
        roll = EpisodeRollout(lambda: Asks(tool, 10), tok, SamplingConfig(2), max_turns=10)
        sizes = []
        for wave in range(20):
            jobs = (roll(Talker("a"), Group(wave, None, 0), k) for k in range(50))
            await asyncio.gather(*jobs)
            if wave in (3, 19):
                await asyncio.sleep(0.05)  # the loop lets go of the wave's tasks
                gc.collect()
                end = time.monotonic() + 10  # threads that were told to end need a moment for it
                while threading.active_count() > before + 1 and time.monotonic() < end:
                    await asyncio.sleep(0.01)
                gc.collect()
                sizes.append((len(gc.get_objects()), threading.active_count()))
        (box,) = tool.boxes.values()
        left = len(box.waiting), len(box.tasks), len(asyncio.all_tasks())
        return tool.items, sizes, left

    Turns.live, before = 0, threading.active_count()
    items, (early, late), left = asyncio.run(main())
    assert items == 10_000 and left == (0, 0, 1) and Turns.live == 0
    assert late[0] - early[0] < 500 and max(early[1], late[1]) <= before + 1


def test_faults_of_a_tool_stay_where_they_belong():
    async def ask(tool, items):
        return await asyncio.gather(*(tool(i) for i in items), return_exceptions=True)

    def picky(items):
        if "all" in items:
            raise OSError("down")
        if "exit" in items:
            raise SystemExit(1)
        return [ValueError(i) if i == "bad" else i.upper() for i in items]

    got = asyncio.run(ask(ToolBatcher(picky), ["a", "bad", "b"]))
    assert got[0] == "A" and got[2] == "B" and isinstance(got[1], ValueError)
    for word, text in (("all", "OSError: down"), ("exit", "SystemExit: 1")):
        got = asyncio.run(ask(ToolBatcher(picky), ["a", word]))
        assert all(str(e).endswith(text) and "the tool failed" in str(e) for e in got)
        assert all(isinstance(e, ToolError) for e in got) and got[0] is not got[1]
    got = asyncio.run(ask(ToolBatcher(lambda items: items * 2), [1, 2, 3]))
    assert [str(e) for e in got] == ["the tool failed: ValueError: 6 answers to 3 items"] * 3
    got = asyncio.run(ask(ToolBatcher(lambda items: 5), [1]))
    assert "TypeError" in str(got[0])


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_tool_that_hangs_is_given_up_and_asked_again(kind):
    gate, seen = threading.Event(), []

    def hang(items):
        seen.append(items)
        if len(seen) == 1:
            gate.wait(20)
        return items

    async def hang_async(items):
        seen.append(items)
        if len(seen) == 1:
            await asyncio.sleep(20)
        return items

    async def main():
        tool = ToolBatcher(hang if kind == "thread" else hang_async, timeout_s=0.2)
        with pytest.raises(ToolError, match="timeout_s=0.2"):
            await tool(1)
        return await tool(2)

    assert asyncio.run(main()) == 2 and seen == [[1], [2]]
    gate.set()


def test_waiters_merging_splitting_and_copies():
    calls = []

    def double(items):
        calls.append(list(items))
        return [2 * i for i in items]

    async def main(tool, items, cancel=()):
        jobs = [asyncio.ensure_future(tool(i)) for i in items]
        await asyncio.sleep(0)
        for k in cancel:
            jobs[k].cancel()
        return await asyncio.gather(*jobs, return_exceptions=True)

    got = asyncio.run(main(ToolBatcher(double, max_wait_s=0.05), [1, 2, 3], cancel=[1]))
    assert got[0] == 2 and got[2] == 6 and isinstance(got[1], asyncio.CancelledError)
    assert calls == [[1, 3]]
    calls.clear()
    assert asyncio.run(main(ToolBatcher(double, max_wait_s=0.01), [1], cancel=[0])) and not calls
    merging = ToolBatcher(double, merge=True)
    assert asyncio.run(main(merging, [1, 1, 1.0, 2])) == [2, 2, 2.0, 4] and calls == [[1, 1.0, 2]]
    calls.clear()
    assert asyncio.run(main(merging, [5, 5], cancel=[0]))[1] == 10 and calls == [[5]]
    with pytest.raises(TypeError, match="hashable"):
        asyncio.run(merging([1]))
    calls.clear()
    asyncio.run(main(ToolBatcher(double, max_items=2), range(5)))
    assert sorted(map(len, calls)) == [1, 2, 2]
    copy = pickle.loads(pickle.dumps(ToolBatcher(sorted, 7, 0.5, merge=True)))
    assert (copy.max_items, copy.max_wait_s, copy.merge, copy.calls) == (7, 0.5, True, 0)
    for word, kw in (("max_items", dict(max_items=0)), ("max_wait_s", dict(max_wait_s=-1))):
        with pytest.raises(ValueError, match=word):
            ToolBatcher(double, **kw)


def test_rollouts_travel():
    for roll in (
        SingleTurn(tok, len, SamplingConfig(4)),
        EpisodeRollout(Turns, tok, SamplingConfig(4), max_context=99, step_timeout_s=1.0),
    ):
        copy = pickle.loads(pickle.dumps(roll))
        assert copy.sampling == roll.sampling and type(copy) is type(roll)
    a, b = (asyncio.run(r(Talker("a"), Group(3, None, 0), 1)) for r in (roll, copy))
    assert a == b


def test_a_client_reaches_the_engine_between_two_steps():
    async def main():
        proxy = EngineProxy(ScriptedEngine(lambda r: 3))
        client = EngineClient(proxy.generate, 4, None, proxy.call)
        one, active = await asyncio.gather(
            client.member(2).generate([1], SamplingConfig(3)),
            client.engine(lambda e: e.num_active),
        )
        return one.request_id, active, client.name

    assert asyncio.run(main()) == ("4.2.0", 0, "4.all")


@pytest.mark.parametrize("word", ["turn", "answer"])
def test_a_template_may_hold_any_word(word):
    "Gemma's template writes <start_of_turn>; whatever a template says, only its frame is taken"
    t = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,:?[]<>_\n")
    t.chat_template = (
        "{% for m in messages %}{{ '<start_of_WORD>' + m.role + '\n' + m.content | trim }}"
        "{{ '<end_of_WORD>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_WORD>assistant\n' }}{% endif %}"
    ).replace("WORD", word)
    roll = EpisodeRollout(lambda: Turns(2, "no"), t, SamplingConfig(4), chat_template=True)
    s = asyncio.run(roll(Talker("yo", "so"), Group(0, None, 0), 0))
    frame = (
        f"<end_of_{word}>\n<start_of_{word}>user\nno<end_of_{word}>\n<start_of_{word}>assistant\n"
    )
    assert t.decode(s.response_ids) == f"yo{frame}so"


def test_a_thread_that_takes_the_next_job_is_not_counted_as_idle():
    "A job that comes in just before a thread says that it is idle leaves no false place behind"

    async def main():
        threads = Threads(4)
        gate, asked, said = threading.Event(), threading.Event(), []
        release, acquire = threads.idle.release, threads.idle.acquire

        def late():
            said.append(1)
            if len(said) == 1:
                asked.wait(0.5)
            release()

        def acquired(**kw):
            got = acquire(**kw)
            if len(said) == 1:
                asked.set()
                time.sleep(0.05)
            return got

        threads.idle.release, threads.idle.acquire = late, acquired
        await threads.call(int)
        await asyncio.sleep(0.05)
        blocked = []
        for _ in range(3):
            blocked.append(asyncio.ensure_future(threads.call(gate.wait, 20)))
            await asyncio.sleep(0.2)
        await asyncio.wait_for(threads.call(int), 10)
        gate.set()
        await asyncio.gather(*blocked)
        threads.stop()

    asyncio.run(main())


class Refused(ToolError):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


class Status(ToolError):
    def __init__(self, code):
        super().__init__(f"HTTP {code:03d}")


@pytest.mark.parametrize("error", [Refused(3, "down"), Status(7)])
def test_an_error_of_a_tool_that_takes_more_than_a_text_reaches_all_who_wait(error):
    def tool(items):
        raise error

    async def main():
        ask = ToolBatcher(tool, 4, 0.01)
        return await asyncio.wait_for(
            asyncio.gather(*(ask(k) for k in range(4)), return_exceptions=True), 10
        )

    found = asyncio.run(main())
    assert [type(e) for e in found] == 4 * [ToolError] and {str(e) for e in found} == {str(error)}
