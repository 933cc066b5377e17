"""Our layers beside Flax's: milliseconds of a forward pass, and of all gradients.

  python benchmarks/layers.py

Sizes are those of the miniature's UNet at a batch of 64. Both sides run in one process and take
turns; medians of 15.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ip2p_jax.models import layers

REPEATS = 15


def programs(module, x):
  """Forward pass and gradients of a sum of squares, compiled, as functions of nothing."""
  module_def, params = nnx.split(module)
  forward = lambda params, x: nnx.merge(module_def, params)(x)
  loss = lambda params, x: (forward(params, x) ** 2).sum()
  jitted = [jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1)))]
  for program in jitted:
    jax.block_until_ready(program(params, x))
  return [lambda p=program: jax.block_until_ready(p(params, x)) for program in jitted]


def milliseconds(program) -> float:
  began = time.perf_counter()
  program()
  return 1e3 * (time.perf_counter() - began)


def main() -> None:
  rngs, random = nnx.Rngs(0), np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
  cases = {
    'Linear 96 -> 768, [64, 64, 96]': (
      layers.Linear(96, 768, rngs=rngs), nnx.Linear(96, 768, rngs=rngs), array(64, 64, 96)
    ),
    'Linear 96 -> 96, [64, 64, 96]': (
      layers.Linear(96, 96, rngs=rngs), nnx.Linear(96, 96, rngs=rngs), array(64, 64, 96)
    ),
    'Conv1x1 128 -> 32, [64, 16, 16, 128]': (
      layers.Conv1x1(128, 32, rngs=rngs), nnx.Conv(128, 32, (1, 1), rngs=rngs),
      array(64, 16, 16, 128),
    ),
    'GroupNorm of 8, [64, 16, 16, 48]': (
      layers.GroupNorm(8, 48, 1e-5), nnx.GroupNorm(48, num_groups=8, epsilon=1e-5, rngs=rngs),
      array(64, 16, 16, 48),
    ),
  }  # fmt: skip
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
  print(f'{"":40}{"ours":>16}{"Flax":>16}   forward / gradients, ms')
  for name, (ours, theirs, x) in cases.items():
    pairs = [programs(ours, x), programs(theirs, x)]
    times = np.array([[[milliseconds(p) for p in side] for side in pairs] for _ in range(REPEATS)])
    shown = [f'{forward:.2f} / {gradient:.2f}' for forward, gradient in np.median(times, 0)]
    print(f'{name:40}{shown[0]:>16}{shown[1]:>16}')


if __name__ == '__main__':
  main()
