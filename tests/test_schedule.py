"""Milestone arithmetic against brute force: a forward pass simulated with a dictionary of slots."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pykernels.schedule import Record, longest_segment, record_for, replay_strides, segment, slot

COUNTS = (2, 3, 4, 7, 8, 64)
SCRATCHES = (1, 2, 3, 7, 32, 33, 40, 64)
MAX_STEPS = 5000


class Segment(NamedTuple):
    """One segment of a simulated forward pass: attempts start..end, and the slots while it runs."""

    start: int
    end: int
    stride: int
    slots: dict[int, int]


def forward(max_steps: int, record: Record) -> list[Segment]:
    """What `kernels.body` does with the schedule during a solve that makes `max_steps` attempts."""
    segments, slots = [], {}
    attempt, stride = 0, record.base
    while attempt < max_steps:
        slots = {**slots, slot(attempt, record): attempt}
        stride, end = segment(attempt, stride, record)
        segments.append(Segment(attempt, end, stride, slots))
        attempt = end
    return segments


def lost(piece: Segment, record: Record) -> list[tuple[int, int]]:
    """Milestones, as (stride, attempt), that a backward pass could ask for but whose slot holds another one.

    It holds for every number of attempts in start+1..end: the pass asks for the multiples of a stride below it, which
    are those up to `start`. Lanes are replayed at the coarsest stride in their block, so all coarser strides count.
    """
    missing, stride = [], piece.stride
    while stride < 4 * MAX_STEPS:
        wanted = range(0, piece.start + 1, stride)
        missing += [(stride, m) for m in wanted if piece.slots.get(slot(m, record)) != m]
        stride *= 2
    return missing


@pytest.mark.parametrize("scratch", SCRATCHES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_milestone_asked_for_is_in_its_slot(count, scratch):
    record = record_for(MAX_STEPS, count, scratch)
    attempt = 0
    for piece in forward(MAX_STEPS, record):
        assert piece.start == attempt < piece.end, "segments tile the attempts"
        assert piece.end - piece.start == piece.stride and piece.start % piece.stride == 0
        assert len(piece.slots) <= record.count and all(0 <= s < record.count for s in piece.slots)
        assert lost(piece, record) == []
        attempt = piece.end
    assert attempt >= MAX_STEPS


@pytest.mark.parametrize("scratch", SCRATCHES)
@pytest.mark.parametrize("count", COUNTS)
def test_the_stride_doubles_only_when_the_slots_are_full(count, scratch):
    record = record_for(MAX_STEPS, count, scratch)
    for piece in forward(MAX_STEPS, record):
        doublings = piece.stride // record.base
        assert piece.stride == record.base * doublings and doublings & (doublings - 1) == 0
        # One slot stays free for the milestone that would start the next segment.
        assert piece.end <= (record.count - 1) * piece.stride
        if piece.stride > record.base:
            assert piece.end > (record.count - 1) * piece.stride // 2


def test_the_checker_sees_an_even_number_of_slots():
    """With an even number of slots live milestones collide: the simulation above can fail."""
    record = Record(count=4, base=1, burst=1)
    assert any(lost(piece, record) for piece in forward(100, record))


@pytest.mark.parametrize("scratch", SCRATCHES)
@pytest.mark.parametrize("count", COUNTS)
def test_sizes_are_those_asked_for(count, scratch):
    record = record_for(MAX_STEPS, count, scratch)
    assert record.count % 2 == 1 and record.count >= 3
    assert count <= record.count <= count + 2
    assert record.base == scratch if scratch <= 32 else scratch <= record.base < scratch + 32
    assert record.scratch == record.base
    # What Milestones promises: up to count * scratch attempts nothing is dropped, and every attempt is replayed once.
    few = count * scratch
    small = record_for(few, count, scratch)
    assert all(piece.stride == small.base for piece in forward(few, small))
    assert replay_strides(few, small) == ()


@pytest.mark.parametrize(
    "max_steps", [*range(1, 70), 100, 999, 1000, 1024, 1025, 4096, 4999, 5000, 10**5, 10**6]
)
def test_default_sizes_never_thin(max_steps):
    record = record_for(max_steps)
    pieces = forward(max_steps, record)
    assert all(piece.stride == record.base for piece in pieces)
    assert replay_strides(max_steps, record) == ()
    assert longest_segment(max_steps, record) <= record.base
    root = math.isqrt(max_steps - 1) + 1
    assert record.count <= root + 3 and record.base <= root + 31, "memory is about two square roots"


def test_storage_of_a_million_attempts():
    record = record_for(10**6)
    assert record == Record(count=979, base=1024, burst=32)
    assert record.words(10**6) == 31250


@pytest.mark.parametrize("max_steps", [1, 2, 3, 31, 32, 33, 64, 65, 1000, MAX_STEPS])
@pytest.mark.parametrize("scratch", [None, *SCRATCHES])
@pytest.mark.parametrize("count", [None, 2, 3, 7, 64])
def test_nested_replays_cover_the_longest_segment(count, scratch, max_steps):
    record = record_for(max_steps, count, scratch)
    pieces = forward(max_steps, record)
    longest = max(min(piece.stride, max_steps) for piece in pieces)
    assert longest_segment(max_steps, record) == longest
    strides = replay_strides(max_steps, record)
    assert list(strides) == sorted(strides, reverse=True)
    outer = longest
    for stride in strides:
        assert stride % record.base == 0, "decision words and milestones of a level never straddle its ranges"
        assert -(-outer // stride) <= max(record.scratch, 2), "milestones of one level"
        outer = stride
    assert outer <= record.scratch, "the innermost ranges fit into the scratch buffer"


@pytest.mark.parametrize("max_steps", [1, 5, 32, 40, 1000])
@pytest.mark.parametrize("scratch", [None, *SCRATCHES])
@pytest.mark.parametrize("count", [None, 2, 7])
def test_decision_words_do_not_straddle_segments(count, scratch, max_steps):
    record = record_for(max_steps, count, scratch)
    assert 1 <= record.burst <= 32 and record.base % record.burst == 0
    writers: dict[int, set[int]] = {}
    for number, piece in enumerate(forward(max_steps, record)):
        for attempt in range(piece.start, min(piece.end, max_steps)):
            writers.setdefault(attempt // record.burst, set()).add(number)
    assert all(len(numbers) == 1 for numbers in writers.values())
    assert set(writers) == set(range(record.words(max_steps))), "a row for every word and no more"


@pytest.mark.parametrize(("count", "scratch"), [(2, 1), (3, 7), (64, 40), (7, 32)])
def test_traced_integers_give_the_same_as_python_integers(count, scratch):
    record = record_for(MAX_STEPS, count, scratch)

    @jax.jit
    def traced(attempts, strides):
        return slot(attempts, record), *segment(attempts, strides, record)

    pieces = forward(MAX_STEPS, record)
    starts = np.array([piece.start for piece in pieces], np.int32)
    before = np.array([record.base, *[piece.stride for piece in pieces]], np.int32)[:-1]
    slots, strides, ends = traced(jnp.asarray(starts), jnp.asarray(before))
    assert slots.dtype == strides.dtype == ends.dtype == np.int32
    np.testing.assert_array_equal(slots, [slot(piece.start, record) for piece in pieces])
    np.testing.assert_array_equal(strides, [piece.stride for piece in pieces])
    np.testing.assert_array_equal(ends, [piece.end for piece in pieces])
