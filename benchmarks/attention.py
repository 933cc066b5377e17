"""What attention costs on a TPU, with XLA's own and with the kernel, by the TPU compiler.

  python benchmarks/attention.py                       (no TPU; pip install libtpu; two minutes)
  python benchmarks/attention.py --topology v6e:2x2 --out attention.jsonl

One layer with its projections, forward, and forward and backward under `remat=convdot`, at the
lengths of Stable Diffusion 1.5. Milliseconds are the compiler's schedule at an assumed clock, and
leave out the kernel itself, of which it has no estimate. Nothing is timed.
"""

import os
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
from bench_tpu import append, options, schedules

from ip2p_jax.models import attention
from ip2p_jax.models.unet import MultiHeadAttention
from ip2p_jax.planning import devices

HEADS = 8
LAYERS = {  # examples on a chip, tokens, width
  '256 px, finest': (32, 1024, 320),
  '512 px, finest': (8, 4096, 320),
  '512 px, next': (8, 1024, 640),
}


def measure(topology: str, choice: str, examples: int, tokens: int, width: int):
  site = attention.Site('down', 0, False, tokens)
  return schedules(
    topology,
    lambda keys: MultiHeadAttention(width, width, HEADS, rngs=keys),
    lambda layer, mesh, x: layer(x, x, attention.dispatch(choice, mesh), site),
    [(examples, tokens, width)],
    by=(0, 1),
  ).values()


def main() -> None:
  parser = options(__doc__, ['v5e:2x2', 'v6e:2x2'])
  arguments = parser.parse_args()
  print('| chip | layer | attention | forward | and backward | temporary |')
  print('|---|---|---|---|---|---|')
  for topology in arguments.topology:
    for name, shape in LAYERS.items():
      for choice in ('xla', 'splash'):
        began = time.time()
        both = [*measure(topology, choice, *shape)]
        times, memory = [one.ms for one in both], both[1].temporary / 2**20
        kind = devices.generation(topology)
        cells = [kind, name, choice, *(f'{time:.2f} ms' for time in times), f'{memory:.0f} MiB']
        print(f'| {" | ".join(cells)} |', flush=True)
        row = {'topology': topology, 'layer': name, 'attention': choice, 'forward_ms': times[0]}
        row |= {'backward_ms': times[1], 'temporary_mib': memory, 'jax': jax.__version__}
        append(arguments.out, row | {'compile_s': round(time.time() - began, 1)})


if __name__ == '__main__':
  main()
