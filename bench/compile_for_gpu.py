"""A whole step of a fit compiles for an NVIDIA H100, through XLA, on a machine without a GPU.

    python bench/compile_for_gpu.py                    float32 and float64, with the runner that CUDA gets by default
    python bench/compile_for_gpu.py --runner pallas    with another one
    python bench/compile_for_gpu.py --dtype float32    one of the two

The step: value and gradient of a loss over an ensemble, and an update by optax's adam. Prints the kernels which the compiled
program holds, as their calls' messages name them, with what NVIDIA's assembler makes of them (JAX calls it when a kernel is
first launched), the program's memory and the compile times. The exit status is 1 if a program does not hold exactly the
kernels that it should, 2 if wheels are missing. Nothing is run: bench/gpu.py does that, where there is a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pykernels as pk
from pykernels.kernels import launch

# For CUDA 12 or for 13; of nvidia-cuda-nvcc only ptxas is used, and libdevice.
WHEELS = {
    "cuda12": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
    "cuda13": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
}
PTXAS = ("cuda_nvcc/bin/ptxas", "cu13/bin/ptxas")  # in the wheels' folder nvidia/
PARTS = ("forward", "backward")  # in the names of the kernels that a gradient needs
STATES, PARAMETERS = 3, 3
# What XLA asks about a device, for an H100 SXM: numbers from NVIDIA's data sheet and CUDA's occupancy tables.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  device_address_bits: 64
  memory_bandwidth: 3352320000000
  pcie_bandwidth: 34359738368
  clock_rate_ghz: 1.98
  ecc_enabled: true
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runner", choices=["native", "pallas"], help="the runner (default: CUDA's own)")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="one instead of both")
    parser.add_argument(
        "--lanes", type=int, default=65_536, help="trajectories of the ensemble (default 65,536)"
    )
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    jax.config.update("jax_enable_compilation_cache", False)
    config = pk.Config(runner=options.runner)
    place = h100()
    held = [
        compiles(dtype, options.lanes, config, place)
        for dtype in ([options.dtype] if options.dtype else ["float32", "float64"])
    ]
    return 0 if all(held) else 1


def missing() -> str | None:
    """Which wheels are to be installed first, or None."""
    absent = min(([name for name in names if not _installed(name)] for names in WHEELS.values()), key=len)
    if importlib.util.find_spec("optax") is None:
        absent.append("optax")
    if not absent:
        return None
    jaxlib = version("jaxlib")
    pinned = [f"{name}=={jaxlib}" if name.startswith("jax-") else name for name in absent]
    return f"nothing compiled, not installed: {', '.join(absent)}\n    pip install {' '.join(pinned)}"


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def h100() -> SingleDeviceSharding:
    """A place on an H100, described without one.

    Sets JAX's platform to the CPU: otherwise the CUDA plugin looks for a GPU, and is not registered where it finds none.
    """
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


def compiles(dtype: str, lanes: int, config: pk.Config, place: SingleDeviceSharding) -> bool:
    """Compile the step, print what it holds, and whether that is one forward and one backward kernel."""
    with jax.enable_x64(dtype == "float64"):
        start = time.perf_counter()
        lowered = jax.jit(step_of(config)).trace(*inputs(dtype, lanes, place)).lower()
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    held = list(kernels(compiled.as_text()))
    memory = compiled.memory_analysis()
    sizes = ", ".join(
        f"{kind} {getattr(memory, f'{kind}_size_in_bytes') / 1e6:.1f} MB"
        for kind in ("argument", "output", "temp")
    )
    (device,) = place.device_set
    print(f"{dtype}, {lanes:,} trajectories, {device.device_kind}")
    for name, ptx, capability in held:
        print(f"    kernel {name}, sm_{capability}: {machine_code(ptx, capability)}")
    print(f"    memory: {sizes}")
    print(f"    traced and lowered in {seconds:.2f} s, compiled in {compile_seconds:.2f} s", flush=True)
    if len(held) == 2 and all(sum(part in held[i][0] for i in (0, 1)) == 1 for part in PARTS):
        return True
    print(f"{dtype}: expected one forward and one backward kernel", file=sys.stderr)
    return False


def step_of(config: pk.Config) -> Any:
    """One step of a fit: of (parameters, optimiser's state, initial states, measured final states) to new ones of the first
    two, and the loss."""
    import optax

    optimiser = optax.adam(1e-2)

    def field(t: Any, y: Any, p: Any) -> Any:
        del t
        return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])

    def loss(p: Any, y0s: Any, measured: Any) -> Any:
        sols = pk.solve_ensemble(
            field, y0s, 0.0, 1.0, p, in_axes=(0, None), step=pk.Adaptive(1e-5, 1e-7), dt0=0.01, config=config
        )
        return jnp.mean((sols.ys - measured) ** 2)

    def step(p: Any, state: Any, y0s: Any, measured: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(p, y0s, measured)
        updates, state = optimiser.update(gradient, state, p)
        return optax.apply_updates(p, updates), state, value

    return step


def inputs(dtype: str, lanes: int, place: SingleDeviceSharding) -> tuple[Any, ...]:
    """The step's inputs, described."""
    import optax

    def at(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    p = at((PARAMETERS,), dtype)
    state = jax.tree.map(lambda a: at(a.shape, a.dtype), jax.eval_shape(optax.adam(1e-2).init, p))
    return p, state, at((lanes, STATES), dtype), at((lanes, STATES), dtype)


def kernels(program: str) -> Iterator[tuple[str, str, int]]:
    """Name, PTX and compute capability of the kernels that a compiled program launches, out of their calls' messages."""
    pattern = rf'custom_call_target="{launch.CALL}".*?backend_config="((?:[^"\\]|\\.)*)"'
    for config in re.findall(pattern, program):
        # XLA prints bytes as C does.
        message = zlib.decompress(config.encode("ascii").decode("unicode_escape").encode("latin-1"))
        kernel = fields(fields(fields(message)[1])[1])  # jaxlib/gpu/triton.proto
        yield kernel[1].decode(), kernel[4].decode(), kernel[6]


def fields(message: bytes) -> dict[int, Any]:
    """The fields of a message in protocol buffers' wire format, by number: integers or bytes; the last of repeated ones."""
    found: dict[int, Any] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            value |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        key, value = varint(), varint()
        if key & 7 == 2:
            found[key >> 3] = message[position : position + value]
            position += value
        else:
            found[key >> 3] = value
    return found


def machine_code(ptx: str, capability: int) -> str:
    """What the assembler says of a kernel, which JAX calls at a kernel's first launch: registers a thread, bytes spilled."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    places = [Path(folder) / path for folder in folders or () for path in PTXAS]
    assembler = next(path for path in places if path.exists())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            str(assembler),
            "-v",
            f"-arch=sm_{capability}",
            source,
            "-o",
            Path(folder) / "kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", said),
        re.search(r"(\d+) bytes spill stores", said),
    )
    assert registers is not None and spilled is not None, said
    return f"{registers[1]} registers, {spilled[1]} bytes spilled"


if __name__ == "__main__":
    sys.exit(main())
