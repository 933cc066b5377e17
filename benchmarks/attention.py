"""What attention costs on a TPU, with XLA's own and with the kernel, by the TPU compiler.

  python benchmarks/attention.py                       (no TPU; pip install libtpu; two minutes)
  python benchmarks/attention.py --topology v6e:2x2 --out attention.jsonl

One layer with its projections, forward, and forward and backward under `remat=convdot`, at the
lengths of Stable Diffusion 1.5. Milliseconds are the compiler's schedule at an assumed clock, and
leave out the kernel itself, of which it has no estimate. Nothing is timed.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from flax import nnx

from ip2p_jax import attention, plan, sharding
from ip2p_jax.errors import InputError
from ip2p_jax.models.layers import REMATS, abstract
from ip2p_jax.models.unet import MultiHeadAttention

HEADS = 8
LAYERS = {  # examples on a chip, tokens, width
  '256 px, finest': (32, 1024, 320),
  '512 px, finest': (8, 4096, 320),
  '512 px, next': (8, 1024, 640),
}


def compiled(topology: str, choice: str, examples: int, tokens: int, width: int, backward: bool):
  mesh = sharding.make_mesh(devices=plan.describe(topology))
  attend = attention.dispatch(choice, mesh)
  graph, shapes = abstract(lambda keys: MultiHeadAttention(width, width, HEADS, rngs=keys))
  site = attention.Site('down', 0, False, tokens)
  layer = lambda params, x: nnx.merge(graph, params)(x, x, attend, site)
  loss = lambda params, x: REMATS['convdot'](layer)(params, x).astype(jnp.float32).sum()
  placed = lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
  params = jax.tree.map(lambda x: placed(x.shape, sharding.replicated(mesh)), shapes)
  x = placed((examples * mesh.size, tokens, width), sharding.of_batch(mesh))
  return jax.jit(jax.grad(loss, (0, 1)) if backward else layer).lower(params, x).compile()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', nargs='+', default=['v5e:2x2', 'v6e:2x2'])
  parser.add_argument('--out', help='appends a JSON line per row')
  arguments = parser.parse_args()
  print('| chip | layer | attention | forward | and backward | temporary |')
  print('|---|---|---|---|---|---|')
  for topology in arguments.topology:
    clock = plan.chip_of(topology).clock
    for name, shape in LAYERS.items():
      for choice in ('xla', 'splash'):
        began = time.time()
        both = [compiled(topology, choice, *shape, backward) for backward in (False, True)]
        times = [1e3 * plan.cycles_of(one.as_text()) / clock for one in both]
        memory = both[1].memory_analysis().temp_size_in_bytes / 2**20
        kind = plan.generation(topology)
        cells = [kind, name, choice, *(f'{time:.2f} ms' for time in times), f'{memory:.0f} MiB']
        print(f'| {" | ".join(cells)} |', flush=True)
        row = {'topology': topology, 'layer': name, 'attention': choice, 'forward_ms': times[0]}
        row |= {'backward_ms': times[1], 'temporary_mib': memory, 'jax': jax.__version__}
        if arguments.out:
          with open(arguments.out, 'a') as file:
            file.write(json.dumps(row | {'compile_s': round(time.time() - began, 1)}) + '\n')


if __name__ == '__main__':
  try:
    main()
  except InputError as error:
    sys.exit(f'attention.py: error: {error}')
