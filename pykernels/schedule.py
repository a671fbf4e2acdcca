"""Milestone arithmetic: which attempts are stored, in which slot, and how a segment is replayed. Integers only.

Milestones are placed online, without knowing the number of attempts. Attempt numbers that are multiples of the current
`stride` are stored; when the buffer is full every other milestone is dropped and the stride doubles. With an *odd* number
of slots nothing has to be moved: the milestone of attempt `i` always lives in slot `(i // base) % count`. Strides are
`base * 2**r` and live milestones span fewer than `count` strides, so two of them would share a slot only if `2**r * d` were
a multiple of `count` for some 0 < d < count, and 2 has an inverse modulo an odd number. The same formula holds for every
stride, so lanes whose blocks thinned differently can be replayed together at the coarsest of their strides.

All functions take Python integers or traced integers of one dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """Sizes of one solve's milestone storage. Attempts are the unit of `base` and `scratch`.

    `count` slots (odd, at least 3), first stride `base`, `scratch` states per lane and level of replay, and `burst`, the
    attempts whose accept/reject decisions share one 32-bit word (it divides `base`).
    """

    count: int
    base: int
    burst: int

    @property
    def scratch(self) -> int:
        return self.base

    def words(self, max_steps: int) -> int:
        """Rows of 32-bit decision words that `max_steps` attempts need."""
        return -(-max_steps // self.burst)


def record_for(max_steps: int, count: int | None = None, scratch: int | None = None) -> Record:
    """The storage for at most `max_steps` attempts; both sizes default to about sqrt(max_steps).

    `scratch` is rounded up to a multiple of 32 beyond 32 (a word of decisions never spans two segments), `count` up to the
    next odd number of slots. Up to `count * scratch` attempts, and so always with the defaults, the buffer never overflows
    and every attempt is replayed exactly once.
    """
    root = math.isqrt(max(max_steps, 1) - 1) + 1
    base = min(scratch if scratch is not None else root, max(max_steps, 1))
    if base > 32:
        base = -(-base // 32) * 32
    if count is None:
        count = -(-max_steps // base)
    # A milestone in the last slot doubles the stride, so `count` segments need one slot more.
    return Record(count=max((count + 1) | 1, 3), base=base, burst=min(base, 32))


def slot(attempt: Any, record: Record) -> Any:
    """Slot of the milestone stored before attempt number `attempt`, a multiple of the stride."""
    return (attempt // record.base) % record.count


def segment(attempt: Any, stride: Any, record: Record) -> tuple[Any, Any]:
    """`(stride, end)` of the segment that starts at `attempt`: the last free slot doubles the stride.

    `attempt // stride` is at most `count - 1`, an even number, so the doubled stride still divides `attempt`.
    """
    stride = stride + stride * ((attempt // stride) // (record.count - 1))
    return stride, attempt + stride


def longest_segment(max_steps: int, record: Record) -> int:
    """The most attempts between two milestones that a solve of at most `max_steps` attempts can end with."""
    attempt, stride = 0, record.base
    while attempt < max_steps:
        stride, attempt = segment(attempt, stride, record)
    return min(stride, max_steps)


def replay_strides(max_steps: int, record: Record) -> tuple[int, ...]:
    """Strides of the nested replays, outermost first; the innermost is replayed into the scratch buffer.

    A segment longer than the scratch buffer is cut by at most `scratch` further milestones of stride `scratch**j`; every
    level costs one more forward sweep over the segment and `scratch` more states per lane.
    """
    strides = [record.scratch]
    longest = longest_segment(max_steps, record)
    while strides[0] < longest:
        strides.insert(0, strides[0] * max(record.scratch, 2))
    return tuple(strides[1:])
