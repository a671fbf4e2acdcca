"""Programs for TPUs, without one: XLA's TPU compiler, which the libtpu wheel brings, takes the portable loops as they are.

Float32 only: a TPU has no other float, and though XLA compiles float64 by emulation, that takes a minute a program.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pykernels as pk
from pykernels.kernels import launch, native

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: install pykernels[tpu]"
)

LANES = 8


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch) -> SingleDeviceSharding:
    """A place on a v5e, described without one."""
    # Where there is no chip, libtpu would ask a cloud's metadata server about it.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    # libtpu wants to be the machine's only one and holds a lock file as long as its process lives. As every JAX process
    # loads it where it is installed, the lock is mostly another process's: a parallel worker's, or a subprocess's.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=lambda problem: problem.name)
def test_value_and_gradient_compile(problem: problems.Problem, on_tpu: SingleDeviceSharding) -> None:
    """The program holds no kernel that only another platform has, and XLA's TPU compiler compiles the rest."""

    def loss(y0s: Any, args: Any) -> Any:
        sols = pk.solve_ensemble(
            problem.field, y0s, problem.t0, problem.t1, args, in_axes=(0, None), step=pk.Adaptive(1e-4, 1e-6),
            adjoint=pk.Milestones(), max_steps=64, throw=False,
        )  # fmt: skip
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sols.ys))

    y0s = problems.spread(problem.y0(dtype=np.float32), LANES)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_tpu),
        (y0s, problem.args(dtype=np.float32)),
    )
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*inputs)
    lowered = traced.lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert "stablehlo.while" in text
    assert launch.CALL not in text and native.TARGET not in text
    compiled = lowered.compile()
    (device,) = compiled.output_shardings[0].device_set
    assert device.platform == "tpu"
    assert compiled.memory_analysis().generated_code_size_in_bytes > 0
