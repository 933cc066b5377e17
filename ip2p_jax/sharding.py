"""Placement of arrays: a mesh ('data', 'fsdp'), and one rule that splits arrays over it.

Batches are split over both axes. Parameters are split over `fsdp` (copied along `data`), and with
ZeRO stage 1 (Rajbhandari et al. 2020) optimizer state and moving average over both.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ip2p_jax.errors import InputError

EVERYWHERE = ('data', 'fsdp')
# What each device holds of an array: a part of the rows, a part of the second axis, or all.
ROWS, SECOND, WHOLE = P(EVERYWHERE), P(None, EVERYWHERE), P()
SMALLEST_SPLIT = 4096  # numbers; a smaller array costs more to gather than to keep


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
  """All devices (of all processes) as a rectangle, `fsdp` of them in a row.

  Raises InputError if `fsdp` does not divide their number.
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
  return NamedSharding(mesh, WHOLE)


def of_batch(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, ROWS)


def each_its_rows(f: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
  """`f`, run by each device on its part of the rows; devices do not communicate.

  Specs are ROWS, SECOND or WHOLE, as prefixes of the input and output trees. On one device, or
  without a mesh, it is `f` itself.
  """
  if mesh is None or mesh.size == 1:
    return f
  return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def padded_rows(mesh: Mesh, specs: Any, tree: Any, count: int) -> Any:
  """`tree` of numpy arrays with `count` rows; rows repeat until all devices have equally many."""
  rows = np.arange(-(-count // mesh.size) * mesh.size) % count

  def pad(spec, part):
    if spec == WHOLE or len(rows) == count:
      return part
    axis = 0 if spec == ROWS else 1
    return jax.tree.map(lambda x: np.take(x, rows, axis), part)

  return jax.tree.map(pad, specs, tree, is_leaf=lambda x: isinstance(x, P))


def copied(mesh: Mesh, tree: Any) -> Any:
  """A whole copy of `tree` on every device of this process's mesh; existing copies are reused."""
  devices, where = list(mesh.devices.flat), replicated(mesh)

  def copy(x):
    if not isinstance(x, jax.Array):
      return jax.device_put(x, where)
    if x.sharding.device_set == set(devices):
      return x
    copies = {shard.device: shard.data for shard in x.addressable_shards if x.is_fully_replicated}
    parts = [copies[d] if d in copies else jax.device_put(x, d) for d in devices]
    return jax.make_array_from_single_device_arrays(x.shape, where, parts)

  return jax.tree.map(copy, tree)


def placed(mesh: Mesh, specs: Any, tree: Any) -> Any:
  """Shapes, types and shardings of `tree` on a mesh; specs may be prefixes."""

  def place(spec, part):
    where = NamedSharding(mesh, spec)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(abstract, part)

  return jax.tree.map(place, specs, tree, is_leaf=lambda x: isinstance(x, P))


def split(mesh: Mesh, shape: tuple[int, ...], over: tuple[str, ...]) -> NamedSharding:
  """Splits the largest axis that divides by all devices, else by `fsdp`, else none."""
  if math.prod(shape) >= SMALLEST_SPLIT:
    for axes in (EVERYWHERE, ('fsdp',)):
      ways = math.prod(mesh.shape[axis] for axis in axes)
      fitting = [i for i, side in enumerate(shape) if side % ways == 0]
      if fitting:
        largest = max(fitting, key=lambda i: shape[i])
        used = tuple(axis for axis in axes if axis in over and mesh.shape[axis] > 1)
        return NamedSharding(mesh, P(*[None] * largest, used)) if used else replicated(mesh)
  return replicated(mesh)


# Second products of a pair: their input is split, so they are split by input.
SECONDS = ('o_proj', 'down_proj')


def of_language(mesh: Mesh, shapes: dict[str, Any]) -> dict[str, Any]:
  """A sharding over `fsdp` for every weight of a language model, for fast generation.

  Products come in pairs (Shoeybi et al. 2019): the first is split by its output, the second by its
  input, so that devices communicate once for both. Embedding and head are split by tokens. Weights
  that do not divide, and norms, are whole on every device.
  """

  def place(path, leaf):
    *_, module, kind = (str(key.key) for key in path)
    by_output, by_input = {'kernel': 1, 'bias': 0, 'embedding': 0}, {'kernel': 0}
    axis = (by_input if module in SECONDS else by_output).get(kind)
    if axis is None or leaf.shape[axis] % mesh.shape['fsdp']:
      return replicated(mesh)
    return NamedSharding(mesh, P(*[None] * axis, 'fsdp'))

  return jax.tree_util.tree_map_with_path(place, shapes)


def mesh_for(weight_bytes: int, split: int | None = None) -> Mesh:
  """All devices of this process; groups of `split` devices share one copy of the weights.

  None takes the smallest group that leaves half of the memory free, or one device if the memory is
  unknown, as on CPUs. InputError if `split` does not divide the number of devices.
  """
  devices = jax.local_devices()
  if split is None:
    memory = (devices[0].memory_stats() or {}).get('bytes_limit', math.inf)
    split = fewest(weight_bytes, memory, len(devices))
  if split < 1 or len(devices) % split:
    raise InputError(
      f'weights cannot be split over {split} of {len(devices)} devices; use a divisor of'
      f' {len(devices)}.'
    )
  return make_mesh(split, devices)


def fewest(weight_bytes: int, memory: float, devices: int) -> int:
  """The smallest number of devices that share the weights and leave half of each memory free."""
  ways = [count for count in range(1, devices + 1) if devices % count == 0]
  return next((count for count in ways if weight_bytes / count <= memory / 2), devices)


def of_state(mesh: Mesh, state: dict[str, Any], zero1: bool) -> dict[str, Any]:
  """A sharding for every leaf of a train state (of arrays or ShapeDtypeStructs)."""
  lean = EVERYWHERE if zero1 else ('fsdp',)

  def over(axes, tree):
    return jax.tree.map(lambda leaf: split(mesh, leaf.shape, axes), tree)

  by_part = {'params': ('fsdp',), 'ema': lean, 'opt_state': lean}
  return {part: over(by_part.get(part, ()), tree) for part, tree in state.items()}


def check_placed(state: dict[str, Any], shardings: dict[str, Any]) -> None:
  """Raises if an array is not where it should be: this bug only costs time, so tests miss it."""
  for (path, leaf), wanted in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
  ):
    if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
      name = jax.tree_util.keystr(path)
      raise AssertionError(f'{name} is placed as {leaf.sharding}, which should be {wanted}')


def put(value: Any, where: NamedSharding) -> jax.Array:
  """`value` on the devices; every process has the whole array and places only its part."""
  value = np.asarray(value, order='C')
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Bytes of `tree` (arrays or ShapeDtypeStructs) on each device."""
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
  """Examples per device and accumulation step; InputError if the batch does not divide evenly."""
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
