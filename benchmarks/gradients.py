"""How a slice of TPUs puts gradients together, as the TPU compiler schedules it; needs no TPU.

  python benchmarks/gradients.py --topology v5e:4x4 --out gradients.jsonl
  python benchmarks/gradients.py --small           (narrow blocks)

Two residual blocks of Stable Diffusion's finest level at 256 px, bfloat16, remat `convdot`, 32
examples a chip, gradients of two batches accumulated in float32, of which every device keeps a
part. Either they are said to lie in parts at once, or whole at first, as the package does.

Columns: milliseconds by the compiler's own estimate of cycles, without the exchanges; megabytes
exchanged by kind; megabytes of temporary memory.
"""

import argparse
import collections
import json
import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from bench_tpu import topology
from bench_turns import results
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ip2p_jax import plan, sharding
from ip2p_jax.models import layers
from ip2p_jax.train_step import sum_gradients

FULL, SMALL = (32, 32, 320), (2, 8, 64)  # examples a chip, side, channels
TIME = 1280


class Blocks(nnx.Module):
  def __init__(self, channels, rngs):
    make = lambda: layers.ResnetBlock(
      channels, channels, groups=32, eps=1e-5, time_width=TIME, rngs=rngs
    )
    self.blocks = nnx.List([make(), make()])

  def __call__(self, x, time):
    for block in self.blocks:
      x = layers.REMATS['convdot'](block)(x, time)
    return x


def measure(slice_name: str, size: tuple[int, int, int], is_whole: bool) -> dict:
  examples, side, channels = size
  mesh = sharding.make_mesh(devices=plan.describe(slice_name))
  definition, params = layers.abstract(lambda keys: Blocks(channels, keys))
  parts = jax.tree.map(lambda leaf: sharding.split(mesh, leaf.shape, mesh.axis_names), params)
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), params)
  rows = NamedSharding(mesh, P(mesh.axis_names))
  place = lambda shape, where, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  count = 2 * examples * mesh.size
  batch = {
    'x': place((count, side, side, channels), rows, jnp.bfloat16),
    'time': place((count, TIME), rows, jnp.bfloat16),
  }

  def step(params, batch):
    loss = lambda params, batch: (
      nnx.merge(definition, params)(batch['x'], batch['time']).astype(jnp.float32) ** 2
    ).mean()
    copy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    shardings = {'params': whole if is_whole else parts, 'ema': parts}
    return sum_gradients(loss, copy, batch, 2, shardings)[1]

  replicated = sharding.replicated(mesh)
  params = jax.tree.map(lambda leaf: place(leaf.shape, replicated, jnp.float32), params)
  compiled = jax.jit(step, out_shardings=parts).lower(params, batch).compile()
  program, exchanged = compiled.as_text(), collections.Counter()
  for one in plan.collectives_of(program):
    exchanged[one.kind] += one.bytes * one.times / 1e6
  return {
    'ms': 1e3 * plan.cycles_of(program) / plan.chip_of(slice_name).clock,
    'exchanged': dict(exchanged),
    'temporary': compiled.memory_analysis().temp_size_in_bytes / 1e6,
  }


def main(slices: list[str], size: tuple[int, int, int], out: Path | None) -> None:
  print('| slice | gradients | time | exchanged | temporary |\n|---|---|---|---|---|')
  for name in slices:
    for words, is_whole in (('in parts at once', False), ('whole, then in parts', True)):
      found = measure(name, size, is_whole)
      exchanged = ', '.join(f'{mb:.1f} MB {kind}' for kind, mb in found['exchanged'].items())
      cells = [name, words, f'{found["ms"]:.2f} ms', exchanged, f'{found["temporary"]:.0f} MB']
      print(f'| {" | ".join(cells)} |', flush=True)
      if out:
        with out.open('a') as file:
          file.write(json.dumps({'topology': name, 'gradients': words, **found}) + '\n')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', type=topology, nargs='+', default=['v5e:4x4'])
  parser.add_argument('--small', action='store_true')
  parser.add_argument('--out', type=results, help='a file to append JSON lines to')
  given = parser.parse_args()
  main(given.topology, SMALL if given.small else FULL, given.out)
