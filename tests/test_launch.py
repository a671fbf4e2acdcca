"""The message that launches a kernel is the one that JAX's CUDA plugin writes itself, and its launcher does what it says.

The plugin is not among what the tests install: importing JAX beside it writes on stderr wherever there is no GPU. Where it
is (`pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`, of jaxlib's version), nothing is left out.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import pytest

from pykernels.kernels import launch

IMAGE = launch.Image("entry", "the PTX", 90, 2, shared=77)
BLOCKS, ARRAYS, SCALARS = 5, 2, (37, 0, -3)
# What the plugins of JAX 0.10.2 and of JAX 0.12.0.1 write for it: newer fields are optional, and absent here.
MESSAGE = (
    b"\nA\n\x18\n\x05entry\x10\x02\x18M\"\x07the PTX0ZP\x01\x10\x05\x18\x01 \x01*\x04\n\x02\x10\x08*\x04\n\x02\x10\x08"
    b"*\x02\x18%*\x02\x18\x00*\x0b\x18\xfd\xff\xff\xff\xff\xff\xff\xff\xff\x01\"\x05entry"
)  # fmt: skip


def test_the_message() -> None:
    assert zlib.decompress(launch.encode(IMAGE, BLOCKS, ARRAYS, SCALARS)) == MESSAGE


def plugin() -> Any:
    """jaxlib's interface to the CUDA plugin."""
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernel"):
        pytest.skip("no CUDA plugin is installed")
    return gpu_triton


@pytest.mark.parametrize("shared", [0, 77])
def test_the_message_is_the_plugins(shared: int) -> None:
    triton = plugin()
    image = launch.Image(IMAGE.name, IMAGE.ptx, IMAGE.capability, IMAGE.warps, shared)
    kernel = triton.TritonKernel(image.name, image.warps, 1, image.shared, image.ptx, "", image.capability)
    parameters = [triton.create_array_parameter(0, 8) for _ in range(ARRAYS)]
    parameters += [triton.create_scalar_parameter(scalar, "i32") for scalar in SCALARS]
    call = triton.TritonKernelCall(kernel, BLOCKS, 1, 1, parameters)
    message = call.to_proto(image.name, b"")
    assert zlib.decompress(launch.encode(image, BLOCKS, ARRAYS, SCALARS)) == message
    assert shared == 0 or message == MESSAGE


# An empty kernel with the parameters of the launch: arrays, scalars, scratch pointers.
PTX = f"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry entry({
    ", ".join(
        f".param .{kind} p{i}"
        for i, kind in enumerate(
            ["u64"] * ARRAYS + ["u32"] * len(SCALARS) + ["u64"] * launch.SCRATCH_POINTERS
        )
    )
}) {{
  ret;
}}
"""


def test_what_the_launcher_passes(tmp_path: Path) -> None:
    """The plugin's own launcher, with a driver that only prints: it takes the message, assembles the PTX, launches the grid,
    and passes arrays, scalars and null pointers, as many as the kernels expect behind their own parameters."""
    plugin()
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not any(name.startswith("nvidia-cuda-nvcc") for name in installed()):
        pytest.skip("no C compiler, or nvidia-cuda-nvcc-cu12 is not installed")
    parameters = ARRAYS + len(SCALARS) + launch.SCRATCH_POINTERS
    sizes = {"ARRAYS": ARRAYS, "SCALARS": len(SCALARS), "PARAMETERS": parameters}
    command = [compiler, "-shared", "-fPIC", *[f"-D{name}={size}" for name, size in sizes.items()]]
    driver = Path(__file__).parent / "fake_cuda.c"
    subprocess.run([*command, driver, "-o", tmp_path / "libcuda.so.1"], check=True)
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "module ELF",
        "function entry",
        f"launch {BLOCKS} 1 1 {32 * IMAGE.warps} 1 1 {IMAGE.shared}",
        *[f"pointer {hex(pointer)}" for pointer in buffers()],
        *[f"integer {scalar}" for scalar in SCALARS],
        *["scratch (nil)"] * launch.SCRATCH_POINTERS,
    ]


def installed() -> list[str]:
    return [distribution.name for distribution in importlib.metadata.distributions()]


def buffers() -> list[int]:
    """The addresses of the arrays, which nobody follows."""
    return [0x1000 * (i + 1) for i in range(ARRAYS)]


def call_launcher() -> None:
    """Call the function that the plugin registers for `launch.CALL` as XLA would."""
    from jaxlib import gpu_triton

    capsule = gpu_triton.get_custom_call()
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, b"xla._CUSTOM_CALL_TARGET")
    pointers, status = ctypes.POINTER(ctypes.c_void_p), ctypes.create_string_buffer(256)
    signature = [ctypes.c_void_p, pointers, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    function = ctypes.CFUNCTYPE(None, *signature)(address)
    image = launch.Image(IMAGE.name, PTX, IMAGE.capability, IMAGE.warps, IMAGE.shared)
    message = launch.encode(image, BLOCKS, ARRAYS, SCALARS)
    function(None, (ctypes.c_void_p * ARRAYS)(*buffers()), message, len(message), status)
    # A failure leaves a message in XLA's status object.
    assert not any(status.raw), status.raw


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    call_launcher()
