"""The portable runner: a body's Refs discharged into XLA loops, block after block.

It runs wherever XLA does, is what other platforms fall back on, and the oracle for their kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pykernels.field import Field
from pykernels.kernels.body import Kernel
from pykernels.kernels.buffers import Buffer
from pykernels.kernels.stepper import Solve

# Measured with `bench/lifts.py`. XLA:CPU compiles a loop to one function without dispatch per operation while its state is
# small. Single components want to stay there: lane vectors of twice this many bytes leave that regime (two to five times
# slower), half as many show the loops' own overhead. Whole arrays want to be well beyond it, where matrix products are no
# longer naive loops: three times faster for 24 dense states.
VECTOR_BYTES = 512
STATE_BYTES = 48 * 1024
MOST_LANES = 1024
# Fewer lanes than this and components cost more than arrays, except backwards.
FEW_LANES = 16


def default_block(field: Field, lift: str) -> int:
    """Wanted lanes per block."""
    size = field.dtype.itemsize
    if lift in ("components", "small"):
        return VECTOR_BYTES // size
    return min(max(STATE_BYTES // (max(field.elements, 1) * size), VECTOR_BYTES // size), MOST_LANES)


def wanted_block(solve: Solve) -> int:
    """Lanes per block: what was asked for, else by default."""
    return solve.block or default_block(solve.field, solve.kind)


def resolve(solve: Solve, lanes: int, *, differentiated: bool) -> Solve:
    """Settle the lift of a small field, which is this runner's to choose.

    Backwards, components are always faster. Forward, XLA computes an attempt again for every component, which only pays when
    there are lanes to fill the vectors.
    """
    if solve.kind != "small":
        return solve
    kind = "components" if differentiated or lanes >= FEW_LANES else "arrays"
    return dataclasses.replace(solve, kind=kind)


def block_size(lanes: int, block: int) -> int:
    """Lanes per block for an ensemble: as equal as possible, so that padding is under one lane per block."""
    blocks = max(-(-lanes // block), 1)
    return -(-lanes // blocks)


def run(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    """Run a kernel over all blocks of an ensemble of `lanes` lanes; operands end with the lane axis where they have one.

    Returns the results, with a last axis of `lanes`; those without lanes are the sum of the blocks' partial results, added
    in the order of the blocks.
    """
    results, body = kernel.results, kernel.body
    operands = [*operands, *map(jnp.asarray, kernel.tables)]
    if lanes == 0:
        return [jnp.zeros((*b.shape, 0) if b.lanes else b.shape, b.dtype) for b in results]
    has_lanes = [buffer.lanes for buffer in kernel.operands]
    size = block_size(lanes, wanted_block(kernel.solve))
    blocks = -(-lanes // size)

    def one(blocked: Sequence[jax.Array]) -> list[jax.Array]:
        mine = iter(blocked)
        values = [next(mine) if has else operand for operand, has in zip(operands, has_lanes, strict=True)]
        inputs = [jax.new_ref(value) for value in values]
        outputs = [_empty(buffer, size) for buffer in (*results, *kernel.scratch)]
        body(*inputs, *outputs)
        return [jax.freeze(ref) for ref in outputs[: len(results)]]

    places = [i for i, has in enumerate(has_lanes) if has]
    if blocks == 1:
        return one([operands[i] for i in places])
    stacked = jax.lax.map(one, [_split(operands[i], blocks, size, i == kernel.silent) for i in places])
    return [
        _join(value, lanes) if buffer.lanes else jnp.sum(value, axis=0)
        for value, buffer in zip(stacked, results, strict=True)
    ]


def _empty(buffer: Buffer, size: int) -> jax.Ref:
    return jax.new_ref(jnp.zeros((*buffer.shape, size) if buffer.lanes else buffer.shape, buffer.dtype))


def _split(operand: jax.Array, blocks: int, size: int, silent: bool = False) -> jax.Array:
    """(..., lanes) -> (blocks, ..., size); missing lanes repeat the last one."""
    missing = blocks * size - operand.shape[-1]
    if missing:
        last = jnp.broadcast_to(operand[..., -1:], (*operand.shape[:-1], missing))
        last = jnp.zeros_like(last) if silent else last
        operand = jnp.concatenate([operand, last], axis=-1)
    return jnp.moveaxis(operand.reshape(*operand.shape[:-1], blocks, size), -2, 0)


def _join(value: jax.Array, lanes: int) -> jax.Array:
    """(blocks, ..., size) -> (..., lanes)."""
    value = jnp.moveaxis(value, 0, -2)
    return value.reshape(*value.shape[:-2], -1)[..., :lanes]
