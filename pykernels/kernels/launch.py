"""How compiled GPU kernels become part of a program: the CUDA plugin's `triton_kernel_call`, for every runner that has PTX.

The call takes PTX and makes machine code of it for one compute capability. Its message is encoded here (jaxlib's
`jaxlib/gpu/triton.proto`), so that a program can be lowered for CUDA where no CUDA package is installed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

CALL = "triton_kernel_call"
# The compute capability kernels are made for where no GPU is at hand to ask.
DEFAULT_CAPABILITY = 90
# Null pointers that the call passes behind the parameters, since Triton 3.4's kernels expect them.
SCRATCH_POINTERS = 2


def capability() -> int:
    """The compute capability of this process's GPU, or the default where there is none."""
    try:
        (device, *_) = jax.devices("cuda")
    except RuntimeError:  # no CUDA plugin, or no GPU
        return DEFAULT_CAPABILITY
    major, minor = str(device.compute_capability).split(".")
    return int(major) * 10 + int(minor)


@dataclass(frozen=True)
class Image:
    """A compiled kernel: its entry's name, the PTX, threads per block in warps of 32, and bytes of shared memory a block
    needs. Its parameters: the arrays, then the scalars as 32-bit integers, then `SCRATCH_POINTERS`."""

    name: str
    ptx: str
    capability: int
    warps: int
    shared: int = 0


# The call's message, in protocol buffers' wire format (jaxlib/gpu/triton.proto): fields are numbers, everything else is
# positional, so a dozen lines write it.


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def encode(image: Image, blocks: int, arrays: int, scalars: Sequence[int]) -> bytes:
    """The compressed message of the call: the kernel, its grid, and its parameters: arrays, then scalars."""
    kernel = _bytes(1, image.name.encode()) + _number(2, image.warps)
    kernel += _number(3, image.shared) if image.shared else b""
    kernel += _bytes(4, image.ptx.encode()) + _number(6, image.capability) + _number(10, 1)
    array = _bytes(5, _bytes(1, _number(2, 8)))
    call = _bytes(1, kernel) + _number(2, blocks) + _number(3, 1) + _number(4, 1)
    call += array * arrays + b"".join(_bytes(5, _number(3, scalar)) for scalar in scalars)
    return zlib.compress(_bytes(1, call) + _bytes(4, image.name.encode()))


def launch(
    image: Image,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    scalars: Sequence[int],
    in_place: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """The call in a program lowered for CUDA: the image over so many blocks; its arrays are operands, then results.
    `in_place`: operands whose memory is a result's, operand number to result number."""
    message = encode(image, blocks, len(operands) + len(results), scalars)
    call = jax.ffi.ffi_call(  # type: ignore[call-overload]  # the configuration is bytes
        CALL,
        list(results),
        custom_call_api_version=2,
        legacy_backend_config=message,
        input_output_aliases=dict(in_place or {}),
    )
    return call(*operands)
