"""Messages about the size of a run."""

from typing import Any

import jax

from ip2p_jax import sharding
from ip2p_jax.training import logs
from ip2p_jax.training.loop import say


def describe_params(state: dict[str, Any], writer: logs.Writer) -> None:
  """Says how many parameters of each part are trained; TensorBoard gets the whole table."""
  table = logs.overview(state['params'])
  writer.text(int(state['step']), 'parameters', table)
  for line in table.splitlines()[-len({name.split('.')[0] for name in state['params']}) - 1 :]:
    say(line)


def sizes(run: Any, state: dict[str, Any], size: str) -> str:
  """Lines of text: how the devices share the batch, and how many bytes each one holds.

  Args:
    run: a `run.Run`.
    state: shapes of its state.
    size: as in `run.Task`.
  """
  config, mesh = run.config, run.mesh
  kind = mesh.devices.flat[0].device_kind
  memory = lambda part: _bytes(sharding.bytes_per_device(state[part], run.shardings[part]))
  frozen = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.frozen))
  trained = sum(x.size for x in jax.tree.leaves(state['params']))
  return '\n'.join([
    f'devices   {mesh.size} ({kind}) as data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]},'
    f' in {jax.process_count()} process{"es" if jax.process_count() > 1 else ""}',
    f'batch     {config.batch_size} = {mesh.size} devices x {run.microbatch} examples'
    f' x {config.accumulation} accumulation steps, {size}',
    f'training  {trained:,} parameters in float32, arithmetic in {config.dtype}',
    f'memory    on each device: parameters {memory("params")}, optimizer {memory("opt_state")},'
    f' average {memory("ema")}, frozen networks {_bytes(frozen)}',
  ])  # fmt: skip


def _bytes(count) -> str:
  return f'{count / 2**30:.2f} GiB' if count >= 2**28 else f'{count / 2**20:.1f} MiB'
