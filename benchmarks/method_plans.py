"""Does each method of ip2p evaluate compile for a TPU or GPU, and fit? Needs neither of them.

  python benchmarks/method_plans.py v5e-1 h100 --out method_plans.jsonl     (minutes a row)
  python benchmarks/method_plans.py --out method_plans.jsonl --show         (the rows, as Markdown)

Stable Diffusion 1.5 in bfloat16, one image of 512 px, each method's own settings. Rows that the
file has are not made again.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax import sharding
from ip2p_jax.evaluation.methods import method, table
from ip2p_jax.evaluation.methods.method import SPLIT, Texts
from ip2p_jax.models import attention
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.planning import compiler, gpus
from ip2p_jax.planning.sampling import host_mesh
from ip2p_jax.planning.training import stable_diffusion
from ip2p_jax.sharding import WHOLE

SIDE = 512
ASSETS = Path(__file__).parents[1] / 'assets'
METHODS = ('vae', 'ddim', 'direct', 'null-text', 'edit-friendly', 'plug-and-play')
TEXTS = Texts(['a red circle'], ['a blue circle'], ['make the circle blue'], [0])


def model_on(mesh) -> SimpleNamespace:
  """What methods read of a `TextToImage`, with shapes instead of weights."""
  networks = stable_diffusion(is_editor=False)._replace(attention=attention.dispatch(mesh=mesh))
  files = (ASSETS / 'miniature-base' / 'tokenizer').iterdir()  # only shapes matter
  bfloat16 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  return SimpleNamespace(
    networks=networks,
    mesh=mesh,
    params=jax.tree.map(bfloat16, networks.shapes),
    tokenizer=ClipTokenizer({file.name: file.read_bytes() for file in files}),
  )


class Call(Exception):
  """Carries the program that a method would run, and its inputs."""


def lowered(name: str, mesh) -> jax.stages.Lowered:
  """The program of a method for the device of a mesh."""

  def stop(run, *inputs):
    raise Call(run, inputs)

  method.quietly = stop
  try:
    table.method(name, model_on(mesh))(np.zeros((1, SIDE, SIDE, 3), np.uint8), TEXTS)
  except Call as call:
    run, inputs = call.args
  inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), inputs)
  with gpus.lowering_for(mesh.devices.flat[0]):
    return run.lower(*sharding.placed(mesh, (WHOLE, SPLIT), inputs))


def plan(topology: str, name: str) -> dict:
  compiled = compiler.compiled_for(topology, lowered(name, host_mesh(topology)))
  return {
    'topology': topology,
    'method': name,
    'fits': compiled.fits,
    'memory': round(compiled.needed_bytes / 2**30, 2),
    'problem': compiled.problem,
    'kernels': dict(compiled.kernels),
    'seconds': round(compiled.seconds),
  }


def show(rows: list[dict]) -> None:
  print('| method | ' + ' | '.join(topologies := sorted({row['topology'] for row in rows})) + ' |')
  print('|---' * (1 + len(topologies)) + '|')
  cells = {(row['method'], row['topology']): row for row in rows}
  for name in METHODS:
    line = [cells.get((name, topology)) for topology in topologies]
    texts = [f'{row["memory"]} GiB' if row and row['fits'] else
             row['problem'] if row else 'not compiled' for row in line]  # fmt: skip
    print(f'| {name} | ' + ' | '.join(texts) + ' |')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('topologies', nargs='*')
  parser.add_argument('--methods', nargs='*', choices=METHODS, default=METHODS)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--show', action='store_true')
  given = parser.parse_args()
  text = given.out.read_text() if given.out.exists() else ''
  rows = [json.loads(line) for line in text.splitlines()]
  for name in given.methods:
    for topology in given.topologies:
      if not any((row['topology'], row['method']) == (topology, name) for row in rows):
        rows.append(plan(topology, name))
        with given.out.open('a') as file:
          file.write(json.dumps(rows[-1]) + '\n')
        print(rows[-1], flush=True)
  if given.show:
    show(rows)
