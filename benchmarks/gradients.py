"""How a slice of TPUs puts gradients together, as the TPU compiler schedules it; needs no TPU.

  python benchmarks/gradients.py --topology v5e:4x4 --out gradients.jsonl
  python benchmarks/gradients.py --small           (narrow blocks)

Two residual blocks of Stable Diffusion's finest level at 256 px, bfloat16, remat `convdot`, 32
examples a chip, gradients of two batches accumulated in float32, of which every device keeps a
part. Either they are said to lie in parts at once, or whole at first, as the package does.

Columns: milliseconds by the compiler's own estimate of cycles, without the exchanges; megabytes
exchanged by kind; megabytes of temporary memory.
"""

import collections
import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from bench_tpu import append, options, schedule_of
from flax import nnx

from ip2p_jax import sharding
from ip2p_jax.models import layers
from ip2p_jax.planning import devices, program_text
from ip2p_jax.training.step import cast, sum_gradients

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


def measure(topology: str, size: tuple[int, int, int], is_whole: bool) -> dict:
  examples, side, channels = size
  mesh = sharding.make_mesh(devices=devices.describe(topology))
  definition, params = layers.abstract(lambda keys: Blocks(channels, keys))
  parts = jax.tree.map(lambda leaf: sharding.split(mesh, leaf.shape, mesh.axis_names), params)
  everywhere, rows = sharding.replicated(mesh), sharding.of_batch(mesh)
  whole = jax.tree.map(lambda _: everywhere, params)
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
    copy = cast(params, jnp.bfloat16)
    shardings = {'params': whole if is_whole else parts, 'ema': parts}
    return sum_gradients(loss, copy, batch, 2, shardings)[1]

  params = jax.tree.map(lambda leaf: place(leaf.shape, everywhere, jnp.float32), params)
  compiled = jax.jit(step, out_shardings=parts).lower(params, batch).compile()
  exchanged, schedule = collections.Counter(), schedule_of(topology, compiled)
  for one in program_text.collectives_of(compiled.as_text()):
    exchanged[one.kind] += one.bytes * one.times / 1e6
  return {
    'ms': schedule.ms, 'exchanged': dict(exchanged), 'temporary': schedule.temporary / 1e6
  }  # fmt: skip


def main(slices: list[str], size: tuple[int, int, int], out: Path | None) -> None:
  print('| slice | gradients | time | exchanged | temporary |\n|---|---|---|---|---|')
  for name in slices:
    for words, is_whole in (('in parts at once', False), ('whole, then in parts', True)):
      found = measure(name, size, is_whole)
      exchanged = ', '.join(f'{mb:.1f} MB {kind}' for kind, mb in found['exchanged'].items())
      cells = [name, words, f'{found["ms"]:.2f} ms', exchanged, f'{found["temporary"]:.0f} MB']
      print(f'| {" | ".join(cells)} |', flush=True)
      append(out, {'topology': name, 'gradients': words, **found})


if __name__ == '__main__':
  parser = options(__doc__, ['v5e:4x4'])
  parser.add_argument('--small', action='store_true')
  given = parser.parse_args()
  main(given.topology, SMALL if given.small else FULL, given.out)
