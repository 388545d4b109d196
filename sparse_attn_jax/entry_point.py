"""Calls of kernels that fold a mapped axis into the batch, and that XLA may partition by batch and heads.

An entry point says of each argument and result which axes it has, by letters:

  b  batch                      h  query heads          any other lower-case letter: an axis that is never split
  k  KV heads                   p  1 or KV heads
  an upper-case first letter: rows that divide the batch. Batch row i reads row i modulo their number, and arguments with the
  same letter have the same number.

From that follow the shapes of the results, the batching rule and the partitioning rule. An option that is off is an array
without elements and has no axes.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from sparse_attn_jax import jax_compat

BATCH, HEADS, KV_HEADS, PLAN_HEADS = "bhkp"


@dataclasses.dataclass(frozen=True)
class Result:
    """One result of an entry point: its name, its axes, and its dtype or `None` for that of the first argument."""

    name: str
    axes: str
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """What runs a call on one device, and the axes of its arguments and results. The first argument is never off.

    `run(arrays, outputs, attributes)` gets the arguments, the shapes and dtypes of the results, and the attributes; it returns
    the results.
    """

    run: Callable[[Sequence[jax.Array], Sequence[jax.ShapeDtypeStruct], Mapping[str, Any]], Sequence[jax.Array]]
    arguments: tuple[str, ...]
    results: tuple[Result, ...]

    def __call__(
        self,
        *arguments: jax.Array | None,
        sizes: Mapping[str, int] | None = None,
        without: Sequence[str] = (),
        may_partition: bool = True,
        **attributes: Any,
    ) -> tuple[jax.Array, ...]:
        """Runs it.

        Args:
          *arguments: one per name in `arguments`; `None` is an option that is off.
          sizes: lengths of the axes that only results have.
          may_partition: XLA may split the call between devices. What has side effects it cannot.
          without: names of results that are not wanted, which become arrays without elements.
          **attributes: hashable values for `run`.

        Returns:
          A tuple of arrays, as `results` says.
        """
        sizes = tuple(sorted((sizes or {}).items()))
        call = _layers(self, sizes, tuple(without), may_partition, tuple(sorted(attributes.items())))
        arrays = [jnp.zeros((0,), jnp.int32) if x is None else x for x in arguments]
        return call(*(jax_compat.vary_like(x, arrays) for x in arrays))

    def axis_sizes(self, shapes: list[tuple[int, ...]], sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
        found = dict(sizes)
        for axes, shape in zip(self.arguments, shapes, strict=True):
            if not is_off(shape):
                found |= dict(zip(axes, shape, strict=True))
        return found


def is_off(shape: tuple[int, ...]) -> bool:
    return shape == (0,)


@functools.cache
def _layers(entry, sizes, without, may_partition, attributes):
    """The call under its partitioning rule, under its batching rule."""

    def call(*arrays):
        found = entry.axis_sizes([x.shape for x in arrays], sizes)
        shapes = [(0,) if r.name in without else tuple(found[axis] for axis in r.axes) for r in entry.results]
        dtypes = [result.dtype or arrays[0].dtype for result in entry.results]
        outputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        results = entry.run(arrays, outputs, dict(attributes))
        return tuple(jax_compat.vary_like(x, arrays[0]) for x in results)

    partitioned = custom_partitioning(call)
    partitioned.def_partition(
        partition=functools.partial(_partition, entry, sizes, call),
        sharding_rule=functools.partial(_sharding_rule, entry, sizes),
    )

    @custom_vmap
    def mapped(*arrays):
        # Inside `shard_map` arrays are parts already, and `custom_partitioning` does not take them. Nor can it be lowered for a
        # device that is not here; one alone does without.
        mesh = jax.sharding.get_abstract_mesh()
        is_alone = not mesh.empty and mesh.size == 1
        may_split = may_partition and not is_alone and not jax_compat.varying_axes(arrays[0])
        return partitioned(*arrays) if may_split else call(*arrays)

    @mapped.def_vmap
    def rule(axis_size, is_mapped, *arrays):
        results = mapped(*fold(entry, axis_size, is_mapped, arrays))
        results = tuple(x if is_off(x.shape) else x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]) for x in results)
        return results, tuple(not is_off(x.shape) for x in results)

    return mapped


def forget_calls() -> None:
    """What is called from now on is traced anew, though it has been before: kernels may have other configurations."""
    _layers.cache_clear()


def fold(entry: EntryPoint, axis_size: int, is_mapped: list[bool], arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The arguments of one call for all of a mapped axis, which comes first in the arrays that have it.

    The batch becomes axis_size * batch. Arrays without the mapped axis that may have fewer rows than the batch stay as they
    are.
    """
    batch = arrays[0].shape[1 if is_mapped[0] else 0]
    mapped_groups = {axes[0] for axes, is_mapped_one in zip(entry.arguments, is_mapped, strict=True) if is_mapped_one}
    folded = []
    for axes, is_mapped_one, x in zip(entry.arguments, is_mapped, arrays, strict=True):
        if is_off(x.shape) or (axes[0] not in mapped_groups and axes[0] != BATCH):
            folded.append(x)
            continue
        if not is_mapped_one:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        x = jnp.tile(x, (1, batch // x.shape[1], *(1 for _ in x.shape[2:])))
        folded.append(x.reshape(axis_size * batch, *x.shape[2:]))
    return folded


def _sharding_rule(entry, sizes, mesh, argument_types, result_types):
    """The rule for Shardy: batch and KV heads may be split, nothing else."""
    del mesh
    shapes = [tuple(x.shape) for x in argument_types]
    found = entry.axis_sizes(shapes, sizes)
    batches = {axis for axis in found if axis == BATCH or (axis.isupper() and found[axis] == found[BATCH])}
    kv_heads = {axis for axis in (KV_HEADS, PLAN_HEADS, HEADS) if found.get(axis) == found[KV_HEADS]}
    names = (f"x{i}" for i in itertools.count())
    other = {}  # by axis, or by an object for the one axis of an option that is off

    def factors(axes, shape):
        return " ".join(map(factor, axes)) if not is_off(shape) else factor(object())

    def factor(axis):
        if axis in batches:
            return "b"
        if axis in kv_heads:
            return "k"
        if axis == HEADS:
            return "(k g)"
        if axis not in other:
            other[axis] = next(names)
        return other[axis]

    sides = [
        ", ".join(factors(axes, tuple(x.shape)) for axes, x in zip(letters, types, strict=True))
        for letters, types in (
            (entry.arguments, argument_types),
            ([result.axes for result in entry.results], result_types),
        )
    ]
    rule = " -> ".join(sides)
    # In the order in which they first stand in the rule.
    replicated = [name for name in dict.fromkeys(re.findall(r"\w+", rule)) if name not in ("b", "k")]
    options = dict(g=found[HEADS] // found[KV_HEADS]) if "g" in replicated else {}
    return rule, options | dict(need_replication_factors=tuple(replicated))


def _partition(entry, sizes, call, mesh, argument_shapes, result_shapes):
    """How each device's part is computed: the same call on whole lists of some batch rows and KV heads."""
    shapes = [tuple(x.shape) for x in argument_shapes]
    found = entry.axis_sizes(shapes, sizes)
    split = {axis: None for axis in found}
    split[BATCH], split[KV_HEADS] = _splits(mesh, found, result_shapes[0].sharding.spec, entry.results[0].axes)
    split[HEADS] = split[KV_HEADS]
    split[PLAN_HEADS] = split[KV_HEADS] if found.get(PLAN_HEADS) == found[KV_HEADS] else None
    for axis in found:
        if axis.isupper() and found[axis] == found[BATCH]:
            split[axis] = split[BATCH]

    def sharding(axes, shape):
        spec = PartitionSpec() if is_off(shape) else PartitionSpec(*(split[axis] for axis in axes))
        return NamedSharding(mesh, spec)

    argument_shardings = tuple(sharding(axes, shape) for axes, shape in zip(entry.arguments, shapes, strict=True))
    result_shardings = tuple(
        sharding(result.axes, tuple(x.shape)) for result, x in zip(entry.results, result_shapes, strict=True)
    )
    return mesh, call, result_shardings, argument_shardings


def _splits(mesh, sizes, spec, axes):
    """The mesh axes that split batch and KV heads; `None` where a split would not leave each part whole."""
    by_axis = dict(zip(axes, tuple(spec) + (None,) * len(axes)))

    def num_parts(names):
        names = (names,) if isinstance(names, str) else names or ()
        return jax.tree.reduce(lambda x, y: x * y, [mesh.shape[name] for name in names], 1)

    batch, heads = by_axis.get(BATCH), by_axis.get(HEADS, by_axis.get(KV_HEADS))
    part = sizes[BATCH] // num_parts(batch)
    rows = [size for axis, size in sizes.items() if axis.isupper() and size != sizes[BATCH]]
    if sizes[BATCH] % num_parts(batch) or any(part % size for size in rows):
        batch = None
    return batch, None if sizes[KV_HEADS] % num_parts(heads) else heads
