"""What the TPU compiler says of one layer of a network; needs no TPU, only libtpu."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench_turns import results
from flax import nnx

from ip2p_jax import sharding
from ip2p_jax.errors import InputError
from ip2p_jax.models.layers import REMATS, abstract
from ip2p_jax.planning import devices, program_text


def options(doc: str, slices: list[str]) -> argparse.ArgumentParser:
  """--topology, these slices by default, and --out."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', type=_known, nargs='+', default=slices)
  parser.add_argument('--out', type=results, help='a file to append a JSON line per row to')
  return parser


def _known(text):
  """An argument that the compiler knows."""
  try:
    devices.describe(text)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from None
  return text


def append(out: Path | None, row: dict) -> None:
  """Adds a JSON line to the file, if there is one."""
  if out:
    with out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')


class Schedule(NamedTuple):
  """Of one chip: time by the compiler's estimate of cycles, bytes accessed and held meanwhile."""

  ms: float
  accessed: float
  temporary: int


def schedule_of(topology: str, compiled: jax.stages.Compiled) -> Schedule:
  ms = 1e3 * program_text.cycles_of(compiled.as_text()) / devices.chip_of(topology).clock
  accessed = compiled.cost_analysis()['bytes accessed']
  return Schedule(ms, accessed, compiled.memory_analysis().temp_size_in_bytes)


def schedules(
  topology: str, make: Callable, call: Callable, shapes: list[tuple], by: tuple[int, ...]
) -> dict[str, Schedule]:
  """Of a layer's 'forward' pass, and of 'both' with gradients, remat `convdot`; all in bfloat16.

  Args:
    make: keys -> layer.
    call: (layer, mesh, *inputs) -> array.
    shapes: of the inputs, examples of one chip first.
    by: what gradients are of; 0 is the parameters, then the inputs.
  """
  mesh = sharding.make_mesh(devices=devices.describe(topology))
  definition, params = abstract(make)
  place = lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
  params = jax.tree.map(lambda leaf: place(leaf.shape, sharding.replicated(mesh)), params)
  rows = sharding.of_batch(mesh)
  inputs = [place((count * mesh.size, *shape), rows) for count, *shape in shapes]
  forward = lambda params, *inputs: call(nnx.merge(definition, params), mesh, *inputs)
  kept = REMATS['convdot'](forward)
  both = jax.grad(lambda *args: kept(*args).astype(jnp.float32).sum(), by)

  def schedule(function):
    return schedule_of(topology, jax.jit(function).lower(params, *inputs).compile())

  return {'forward': schedule(forward), 'both': schedule(both)}
