"""The mean loss over a stream and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from pykernels.stream.passes import Options, Passes
from pykernels.stream.source import Shuffle, as_source
from pykernels.stream.sums import Gradient, NanPolicy, Objective, PyTree, Terms, as_params, mean

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Float


def value_and_grad(
    terms: Callable[[PyTree, PyTree], ArrayLike | Terms],
    source: Any,
    *,
    batch_size: int | None = None,
    gradient: Gradient = "reverse",
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    shuffle: int | Shuffle | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
    has_counts: bool = False,
) -> Callable[[PyTree], tuple[Any, PyTree]]:
    """A function `params -> (value, gradient)` of the mean loss over a whole stream and its gradient.

    `terms(params, batch)` returns one loss term per row, shape (rows,), or `Terms` with weights and a mask. The value is
    sum(weight * term) / sum(weight) over all rows, whatever the batches: the sums are divided once. `source`: a pytree of
    arrays or memory maps, a source (`npy`, `npz`, `hdf5`, `parquet`), or an iterable or factory of batches. `params`: a
    pytree of floating arrays; gradients have their shapes and dtypes. Batches have `batch_size` rows
    (default: at most 8,192, or as many as the first batch of a stream); the last is filled up with a valid row, whose
    terms do not count. On CPUs big batches of small rows reach the model in pieces, which stay in the cache.

    `gradient`: "reverse"; "forward", for few parameters; "finite-difference", central and slow, to compare with. `nan`:
    what to do with terms that are not finite: "raise" NonFiniteError after the pass, "mask" the rows, or "skip" their
    batches. `compensated`: sums over batches keep their rounding errors (default: where parameters have 32 bits or
    fewer). `shuffle`: a seed, or `Shuffle`. `prefetch`: chunks that a thread reads ahead. `mesh`: rows are spread over
    all its devices (default: the mesh of `jax.set_mesh`, if any). With `has_counts` the result is `((value, Counts),
    gradient)`.

    The model is traced once for all calls with the same function, shapes and options.
    """
    options = Options.of(batch_size, shuffle, prefetch, mesh, nan, gradient, compensated)
    passes = Passes(as_source(source), options)
    objective = Objective(terms, (terms,))

    def of(params: PyTree) -> tuple[Any, PyTree]:
        sums, counts = passes.sums(objective, "gradient", as_params(params))
        value, slope = mean(sums, params)
        return ((value, counts) if has_counts else value), slope

    return of


def value(
    terms: Callable[[PyTree, PyTree], ArrayLike | Terms],
    source: Any,
    params: PyTree,
    *,
    batch_size: int | None = None,
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The mean loss over a stream, without its gradient; arguments and errors as in `value_and_grad`."""
    options = Options.of(batch_size, None, prefetch, mesh, nan, "reverse", compensated)
    sums, _ = Passes(as_source(source), options).sums(Objective(terms, (terms,)), "value", as_params(params))
    return mean(sums, params)[0]
