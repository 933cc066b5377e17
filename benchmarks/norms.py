"""Group normalisation within a residual block, as the TPU compiler schedules it; needs no TPU.

  python benchmarks/norms.py --topology v5e:2x2 v6e:2x2 --out norms.jsonl
  python benchmarks/norms.py --small            (a narrow block, under two minutes on two cores)

One block of Stable Diffusion 1.5 per level that has one, bfloat16, 32 examples a chip, with
gradients as they are trained (remat `convdot`): `sums` is what `layers.GroupNorm` does, two sums of
each channel in one pass, then one scale and shift; `two passes` subtracts the mean first, then
sums the squares of what is left.

Columns: milliseconds of the forward pass and of forward and backward, by the compiler's own
estimate of cycles, and megabytes that it counts as accessed.
"""

import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from bench_tpu import append, options, schedules

from ip2p_jax.models import layers

BLOCKS = ((32, 32, 320), (32, 16, 640), (32, 8, 1280))  # examples, side, channels
SMALL = ((2, 8, 64),)
TIME = 1280


class TwoPasses(layers.GroupNorm):
  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    centred = x32 - self._mean(x32)
    variance = self._mean(jnp.square(centred))
    scale, bias = (p[...].astype(jnp.float32)[None, None, None] for p in (self.scale, self.bias))
    return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(x.dtype)

  def _mean(self, x):  # [B, H, W, C] -> [B, 1, 1, C], over each channel's group
    B, C = x.shape[0], x.shape[-1]
    means = x.mean((1, 2)).reshape(B, self.groups, -1).mean(-1)
    return jnp.repeat(means, C // self.groups, 1)[:, None, None]


def block(norm: type[layers.GroupNorm], channels: int, keys: layers.Keys) -> layers.ResnetBlock:
  made = layers.ResnetBlock(
    channels, channels, groups=32, eps=1e-5, time_width=TIME, rngs=keys
  )  # fmt: skip
  made.norm1, made.norm2 = (norm(32, channels, 1e-5) for _ in range(2))
  return made


def measure(topology: str, norm: type[layers.GroupNorm], size: tuple[int, int, int]) -> dict:
  """{'forward': (ms, MB), 'both': (ms, MB)} of one chip."""
  examples, side, channels = size
  found = schedules(
    topology,
    lambda keys: block(norm, channels, keys),
    lambda made, mesh, *inputs: made(*inputs),
    [(examples, side, side, channels), (examples, TIME)],
    by=(0, 1, 2),
  )
  return {name: (one.ms, one.accessed / 1e6) for name, one in found.items()}


def main(topologies: list[str], sizes: tuple, out: Path | None) -> None:
  print('| chip | block | group norm | forward | and backward |\n|---|---|---|---|---|')
  for topology in topologies:
    for size in sizes:
      for name, norm in (('two passes', TwoPasses), ('sums', layers.GroupNorm)):
        found = measure(topology, norm, size)
        cells = [f'{ms:.2f} ms, {mb:.0f} MB' for ms, mb in found.values()]
        shown = 'x'.join(map(str, size))
        print(f'| {topology.split(":")[0]} | {shown} | {name} | {" | ".join(cells)} |', flush=True)
        append(out, {'topology': topology, 'block': size, 'norm': name, **found})


if __name__ == '__main__':
  parser = options(__doc__, ['v5e:2x2', 'v6e:2x2'])
  parser.add_argument('--small', action='store_true')
  given = parser.parse_args()
  main(given.topology, SMALL if given.small else BLOCKS, given.out)
