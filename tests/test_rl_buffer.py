"""The sample buffer under random operations: bound, no loss, no dead end, and the same future after
a round trip through JSON"""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpapers.rl.buffer import SampleBuffer
from llmpapers.rl.types import Sample

ALPHAS = [0, 0.5, 1, 1.5, 2, 3.25]


def make(n=2, version=0):
    return Sample([1], [2] * n, [True] * n, [-0.1] * n, [version] * n, 1.0)


class Run:
    "A buffer, what is out, and where every admitted group has gone"

    def __init__(self, alpha, batch=3, size=2, on_stale="wait", whole=False):
        self.b, self.whole = SampleBuffer(batch, alpha, size, on_stale), whole
        self.out, self.gone = [], {}

    def admit(self, _):
        if self.b.capacity():
            self.b.admit(dict(n=self.b.next_id))

    def dispatch(self, x):
        if p := self.b.pending(self.whole):
            g, k = p[x % len(p)]
            self.out.append((g.group_id, k, self.b.dispatch(g.group_id, k)))

    def commit(self, x):
        if self.out:
            i, k, a = self.out.pop(x % len(self.out))
            wanted = self.b.is_current(i, k, a)
            samples = [make()] * self.b.group_size if k is None else make()
            assert self.b.commit(i, k, a, samples) is wanted
            if wanted and k is None:
                assert self.b.groups[i].ready

    def fail(self, x):
        if self.out:
            i, k, a = self.out.pop(x % len(self.out))
            known = i in self.b.groups
            again = self.b.fail(i, k, a, "planned")
            if known and not again and i not in self.b.groups:
                self.gone[i] = "quarantined"

    def late(self, x):
        "A result of an attempt that is over changes nothing"
        before = json.dumps(self.b.state_dict()["groups"], sort_keys=True)
        assert self.b.commit(x, 0, 10**6, make()) is False
        assert json.dumps(self.b.state_dict()["groups"], sort_keys=True) == before

    def drop(self, x):
        if self.b.groups and x % 5 == 0:
            i = sorted(self.b.groups)[x % len(self.b.groups)]
            self.b.drop(i, "equal rewards")
            self.gone[i] = "dropped"

    def train(self, _):
        start = {i: e.version for i, e in self.b.groups.items()}
        got = self.b.take()
        if got is None:
            return
        assert len(got) == self.b.batch_size and [g.group_id for g in got] == sorted(
            g.group_id for g in got
        )
        for g in got:
            assert self.b.version - start[g.group_id] <= math.ceil(self.b.async_ratio)
            assert g.group_id not in self.gone and all(isinstance(s, Sample) for s in g.samples)
            self.gone[g.group_id] = "trained"
        self.b.publish()

    def check(self):
        b = self.b
        assert b.capacity() >= 0
        assert set(range(b.next_id)) == set(self.gone) | set(b.groups) and not set(self.gone) & set(
            b.groups
        )
        assert len(b.groups) <= (1 + math.ceil(b.async_ratio)) * b.batch_size
        assert (
            b.consumed
            == sum(v == "trained" for v in self.gone.values())
            == b.version * b.batch_size
        )

    def finish(self):
        """From here on nothing fails: everything outstanding must be trained or wait for a last
        partial batch"""
        for _ in range(10_000):
            if not self.b.groups:
                break
            while self.b.pending(self.whole):
                self.dispatch(0)
            while self.out:
                self.commit(0)
            before = self.b.version
            self.train(0)
            if self.b.version == before:
                if self.b.capacity():
                    self.admit(0)
                else:
                    raise AssertionError(f"stuck: {self.b.stats()}")
            if self.b.version > 60:
                break


OPS = (
    "admit",
    "admit",
    "dispatch",
    "dispatch",
    "dispatch",
    "commit",
    "commit",
    "commit",
    "fail",
    "late",
    "drop",
    "train",
    "train",
)
ops = st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 50)), max_size=250)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(ALPHAS), st.integers(1, 4), st.integers(1, 3), st.booleans(), ops)
def test_bound_and_no_loss(alpha, batch, size, whole, sequence):
    "Staleness is at most ceil(alpha), and every admitted group is in exactly one place"
    r = Run(alpha, batch, size, whole=whole)
    for op, x in sequence:
        getattr(r, op)(x)
        r.check()
    assert r.b.count["aborted"] == 0


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(ALPHAS), st.booleans(), ops)
def test_no_dead_end(alpha, whole, sequence):
    "From any reachable state the buffer goes on"
    r = Run(alpha, whole=whole)
    for op, x in sequence:
        getattr(r, op)(x)
    r.finish()
    r.check()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALPHAS), ops, ops)
def test_round_trip_continues_identically(alpha, first, second):
    """A buffer loaded from JSON behaves like the one that was saved, once what was out is pending
    again in both"""
    r = Run(alpha)
    for op, x in first:
        getattr(r, op)(x)
    state = json.loads(json.dumps(r.b.state_dict()))
    a, b = Run(alpha), Run(alpha)
    a.b.load_state_dict(state)
    b.b.load_state_dict(json.loads(json.dumps(a.b.state_dict())))
    a.gone, b.gone = dict(r.gone), dict(r.gone)
    for op, x in second:
        getattr(a, op)(x)
        getattr(b, op)(x)
        assert a.b.state_dict() == b.b.state_dict()
    assert a.b.stats() == b.b.stats()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3.25]), st.booleans(), ops)
def test_abort_bounds_too_and_keeps_every_prompt(alpha, whole, sequence):
    "The paper's policy keeps the bound by starting groups again; prompts stay"
    r = Run(alpha, on_stale="abort", whole=whole)
    prompts = {}
    for op, x in sequence:
        getattr(r, op)(x)
        r.check()
        prompts |= {i: e.prompt for i, e in r.b.groups.items()}
        assert all(e.prompt == dict(n=i) for i, e in r.b.groups.items())


def test_synchronous_loop():
    "alpha = 0: exactly one batch is admitted per version, and all of it is trained"
    b = SampleBuffer(4)
    for v in range(5):
        assert b.capacity() == 4
        for p in range(4):
            b.admit(p)
        assert b.capacity() == 0 and b.take() is None
        for g, k in b.pending():
            b.commit(g.group_id, k, b.dispatch(g.group_id, k), make())
        assert [g.group_id for g in b.take()] == list(range(4 * v, 4 * v + 4))
        b.publish()
    assert b.stats()["staleness_max"] == 0


def test_partial_batch_ends_the_data():
    b = SampleBuffer(4, 1)
    for p in range(3):
        b.admit(p)
    for g, k in b.pending():
        b.commit(g.group_id, k, b.dispatch(g.group_id, k), make())
    assert b.take() is None and len(b.take(partial=True)) == 3


@pytest.mark.parametrize(
    "kw,word",
    [
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=2, group_size=0), "group_size"),
        (dict(batch_size=2, async_ratio=-1), "async_ratio"),
        (dict(batch_size=2, async_ratio=float("nan")), "async_ratio"),
        (dict(batch_size=2, on_stale="drop"), "on_stale"),
    ],
)
def test_bad_arguments(kw, word):
    with pytest.raises(ValueError, match=word):
        SampleBuffer(**kw)


def test_operations_out_of_order():
    b = SampleBuffer(1)
    with pytest.raises(RuntimeError, match="no batch"):
        b.publish()
    b.admit(0)
    b.commit(0, 0, b.dispatch(0, 0), make())
    b.take()
    with pytest.raises(RuntimeError, match="not been published"):
        b.take()
    with pytest.raises(ValueError, match="not outstanding"):
        b.drop(0, "x")


def finish(b, n):
    "Finish that many members, oldest first"
    for g, k in b.pending()[:n]:
        b.commit(g.group_id, k, b.dispatch(g.group_id, k), make())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALPHAS), st.integers(1, 5), st.data())
def test_partial_batches_anywhere_leave_no_dead_end(alpha, batch, data):
    "After batches of any size the next full batch can always be had, within the bound"
    b = SampleBuffer(batch, alpha)
    for _ in range(8):
        for _ in range(b.capacity()):
            b.admit(None)
        finish(b, data.draw(st.integers(0, 6)))
        if b.take(partial=data.draw(st.booleans())):
            b.publish()
    for _ in range(20):
        for _ in range(b.capacity()):
            b.admit(None)
        finish(b, 10**6)
        assert b.take() is not None, b.stats()
        b.publish()
    assert b.staleness[2] <= math.ceil(alpha)


def test_everything_that_begins_again_is_returned():
    "Under abort: three groups that were ready and one that was running, all too old"
    b = SampleBuffer(2, 2, on_stale="abort")
    for p in range(6):
        b.admit(p)
    old = []
    for version in range(3):  # newer groups are taken out of the way, so that the old ones stay
        finish(b, 5 if version == 0 else 0)
        held = {i: b.groups.pop(i) for i in list(b.groups)}
        for _ in range(2):
            g = b.admit("new")
            b.commit(g.group_id, 0, b.dispatch(g.group_id, 0), make())
        b.take()
        b.groups |= held
        assert old == []
        old = b.publish()
    assert sorted(old) == [0, 1, 2, 3, 4, 5]
    assert sorted(g.group_id for g, _ in b.pending()) == old
    assert all(e.version == 3 for e in b.groups.values())


def test_half_a_group_begins_again_as_a_whole():
    b = SampleBuffer(1, group_size=3)
    b.admit("p")
    b.commit(0, 1, b.dispatch(0, 1), make())
    b.fail(0, 0, b.dispatch(0, 0))
    ((g, index),) = b.pending(whole=True)
    a = b.dispatch(0, None)
    assert (index, a, b.groups[0].samples) == (None, 1, [None] * 3)
    assert b.pending() == [] == b.pending(whole=True)
    with pytest.raises(ValueError, match="not pending"):
        b.dispatch(0, None)
    with pytest.raises(ValueError, match="need 3"):
        b.commit(0, None, a, [make()])
    assert not b.commit(0, 1, 0, make()) and b.commit(0, None, a, [make()] * 3)
    assert len(b.take()[0].samples) == 3
