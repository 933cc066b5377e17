"""Whether a language model that writes captions fits a host's TPUs, by the TPU compiler alone.

python benchmarks/writer_plan.py --topology v5e-4 --split 2

The model has the shape of Qwen2.5-7B, in bfloat16. What `ip2p captions write` runs is compiled: the
program that writes tokens, and the one that reads prompts.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax import sharding
from ip2p_jax.captions import generate
from ip2p_jax.captions.program import Knobs, TextRows, text_programs
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig, Rope
from ip2p_jax.planning import compiler, devices, table

QWEN = LlamaConfig(
  vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
  num_attention_heads=28, num_key_value_heads=4, head_dim=128, max_position_embeddings=32768,
  model_type='qwen2', rope=Rope(rope_theta=1e6), eos_token_id=(151643,),
)  # fmt: skip


def lowered(config: LlamaConfig, mesh, slots: int, length: int, prompt: int):
  """Both programs for rows of `length` tokens and prompts of `prompt`, and all that they hold."""
  definition, shapes = abstract(lambda keys: Llama(config, rngs=keys))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
  params = generate.placed(mesh, shapes)
  programs = text_programs(definition, config, mesh)
  begun = programs.begin.lower(slots, length, 'bfloat16').out_info
  cache, counts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), begun)
  rows = TextRows(*np.zeros((3, slots), np.int32), np.zeros((slots, 2), np.uint32))
  knobs = Knobs(*np.float32((0.7, 1, 0.1)))
  read = mesh.shape['data'] * generate.READ_AT_ONCE
  slots_of, tokens = np.zeros(read, np.int32), np.zeros((read, prompt), np.int32)
  return params, {
    'write': programs.step.lower(params, cache, counts, rows, np.int32(8), knobs),
    'read': programs.read.lower(params, cache, counts, slots_of, tokens, tokens),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--topology', default='v5e-4')
  parser.add_argument('--split', type=int, default=2, help='devices to one copy of the weights')
  parser.add_argument('--slots', type=int, default=256)
  parser.add_argument('--length', type=int, default=320, help='tokens of a row, prompt and answer')
  parser.add_argument('--prompt', type=int, default=64, help='tokens of a prompt')
  parser.add_argument('--layers', type=int, default=QWEN.num_hidden_layers)
  parser.add_argument('--quick', action='store_true')
  given = parser.parse_args()
  config = QWEN.__class__(**{**vars(QWEN), 'num_hidden_layers': given.layers})
  mesh = sharding.make_mesh(given.split, devices.describe(given.topology))
  params, programs = lowered(config, mesh, given.slots, given.length, given.prompt)
  chip = devices.chip_of(given.topology)
  held = sharding.bytes_per_device(params, jax.tree.map(lambda x: x.sharding, params))
  for name, program in programs.items():
    compiled = compiler.compiled_for_tpu(program, given.quick)
    rows = [
      ('devices', f'{mesh.size} of {devices.gib(chip.memory)}, {given.split} to a copy'),
      ('rows', f'{given.slots} of {given.length} tokens'),
      ('weights on a device', devices.gib(held)),
    ]
    if compiled.fits:
      rows += [
        *table.memory_rows(given.topology, compiled),
        ('time as scheduled', table.scheduled_time(compiled, chip)),
        *table.collective_rows(compiled.collectives),
      ]
    print(table.table(f'{given.topology}, {name}', compiled, rows, ()), flush=True)


if __name__ == '__main__':
  main()
