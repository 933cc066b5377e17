"""Transformer blocks of Stable Diffusion 1.5 as the TPU compiler schedules them; needs no TPU.

  python benchmarks/blocks.py --topology v5e:2x2 --out blocks.jsonl
  python benchmarks/blocks.py --small           (a narrow one, under two minutes on two cores)

One block per level, bfloat16, 32 examples of 256 px a chip, forward and with gradients as they are
trained (remat `convdot`). Run it before and after a change of the layers.

Columns: milliseconds by the compiler's own estimate of cycles (the time within an attention kernel
is not in it), gigabytes that it counts as accessed, megabytes of temporary memory.
"""

import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from bench_tpu import append, options, schedules

from ip2p_jax.models import attention
from ip2p_jax.models.configs import UNetConfig
from ip2p_jax.models.unet import SpatialTransformer

BLOCKS = ((32, 32, 320, 0), (32, 16, 640, 1), (32, 8, 1280, 2))  # examples, side, channels, level
SMALL = ((2, 8, 64, 0),)
TEXT = (77, 768)


def measure(topology: str, size: tuple[int, int, int, int]) -> dict:
  """{'forward': (ms, GB, MB), 'both': (ms, GB, MB)} of one chip."""
  examples, side, channels, level = size
  found = schedules(
    topology,
    lambda keys: SpatialTransformer('down', level, channels, UNetConfig(), rngs=keys),
    lambda block, mesh, *inputs: block(*inputs, attention.dispatch('auto', mesh)),
    [(examples, side, side, channels), (examples, *TEXT)],
    by=(0, 1),
  )
  return {name: (one.ms, one.accessed / 1e9, one.temporary / 1e6) for name, one in found.items()}


def main(topologies: list[str], sizes: tuple, out: Path | None) -> None:
  print('| chip | block | forward | and backward |\n|---|---|---|---|')
  for topology in topologies:
    for size in sizes:
      found = measure(topology, size)
      cells = [f'{ms:.2f} ms, {gb:.2f} GB, {mb:.0f} MB' for ms, gb, mb in found.values()]
      shown = 'x'.join(map(str, size[:3]))
      print(f'| {topology.split(":")[0]} | {shown} | {" | ".join(cells)} |', flush=True)
      append(out, {'topology': topology, 'block': size, **found})


if __name__ == '__main__':
  parser = options(__doc__, ['v5e:2x2'])
  parser.add_argument('--small', action='store_true')
  given = parser.parse_args()
  main(given.topology, SMALL if given.small else BLOCKS, given.out)
