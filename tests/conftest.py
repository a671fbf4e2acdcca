"""Every test runs in float64 with strict dtype promotion; warnings are errors (see pyproject.toml)."""

from __future__ import annotations

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
