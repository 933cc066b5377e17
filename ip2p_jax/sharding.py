"""Where arrays live: a mesh ('data', 'fsdp'), and one rule that splits arrays over it.

Batches are split over both axes. Parameters are split over `fsdp` (copied along `data`), and with
ZeRO stage 1 (Rajbhandari et al. 2020) optimizer state and moving average over both.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ip2p_jax.errors import InputError

EVERYWHERE = ('data', 'fsdp')
SMALLEST_SPLIT = 4096  # numbers; what is smaller costs more to gather than to keep


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
  """All devices (of all processes) as a rectangle, `fsdp` of them side by side.

  Raises InputError if `fsdp` does not divide them.
  """
  devices = devices or jax.devices()
  count = len(devices)
  if fsdp < 1 or count % fsdp:
    raise InputError(
      f'mesh.fsdp is {fsdp}; use a divisor of the number of devices, {count} (1 splits nothing).'
    )
  # jax's default, Explicit axes, refuses convolutions with split kernels.
  types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((count // fsdp, fsdp), EVERYWHERE, axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def of_batch(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P(EVERYWHERE))


def split(mesh: Mesh, shape: tuple[int, ...], over: tuple[str, ...]) -> NamedSharding:
  """Splits the largest axis that divides by all devices, else by `fsdp`, else none."""
  if math.prod(shape) >= SMALLEST_SPLIT:
    for axes in (EVERYWHERE, ('fsdp',)):
      ways = math.prod(mesh.shape[axis] for axis in axes)
      fitting = [i for i, side in enumerate(shape) if side % ways == 0]
      if fitting:
        largest = max(fitting, key=lambda i: shape[i])
        kept = tuple(axis for axis in axes if axis in over and mesh.shape[axis] > 1)
        return NamedSharding(mesh, P(*[None] * largest, kept)) if kept else replicated(mesh)
  return replicated(mesh)


def of_state(mesh: Mesh, state: dict[str, Any], zero1: bool) -> dict[str, Any]:
  """A sharding for every leaf of a train state (of arrays or ShapeDtypeStructs)."""
  lean = EVERYWHERE if zero1 else ('fsdp',)

  def over(axes, tree):
    return jax.tree.map(lambda leaf: split(mesh, leaf.shape, axes), tree)

  by_part = {'params': ('fsdp',), 'ema': lean, 'opt_state': lean}
  return {part: over(by_part.get(part, ()), tree) for part, tree in state.items()}


def check_placed(state: dict[str, Any], shardings: dict[str, Any]) -> None:
  """Raises if an array does not lie where it should: a bug that only costs, and so would stay."""
  for (path, leaf), wanted in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
  ):
    if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
      name = jax.tree_util.keystr(path)
      raise AssertionError(f'{name} is placed as {leaf.sharding}, which should be {wanted}')


def put(value: Any, where: NamedSharding) -> jax.Array:
  """On the devices; every process has the whole array, and only its part is placed."""
  value = np.asarray(value, order='C')
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """How much of `tree` (arrays or ShapeDtypeStructs) each device holds."""
  sizes = jax.tree.map(
    lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that this process feeds, ascending."""
  index_of = of_batch(mesh).addressable_devices_indices_map((batch_size,))
  rows = [np.arange(batch_size)[index] for index in index_of.values()]
  return np.unique(np.concatenate(rows))


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> int:
  """Examples per device and accumulation step. InputError if they do not come out even."""
  if batch_size < 1 or accumulation < 1:
    raise InputError('batch_size and accumulation must be 1 or more.')
  parts = mesh.size * accumulation
  if batch_size % parts:
    near = max(round(batch_size / parts), 1) * parts
    raise InputError(
      f'batch_size is {batch_size}, which {mesh.size} devices x {accumulation} accumulation steps'
      f' cannot share evenly; use {near}.'
    )
  return batch_size // parts
