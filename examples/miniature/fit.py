"""A small training loop for what full-size users fetch from the hub: the autoencoder and CLIP."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm


def fit(
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  params: Any,
  batch: Callable[[int], tuple],
  folder: Path,
  *,
  steps: int,
  learning_rate: float,
  check: Callable[[Any], dict[str, float]],
  every: int = 250,
) -> Any:
  """AdamW with warm-up and a cosine; killed and called again, it goes on from its checkpoint.

  Args:
    loss: `loss(params, key, *batch)` -> (scalar, what to log).
    params: to start from.
    batch: the arrays of a step, decided by its number alone.
    folder: holds the checkpoints, and `metrics.jsonl` with one line per `every` steps.
    check: what to measure of the parameters every `every` steps.

  Returns the trained parameters.
  """
  rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01)
  )

  @jax.jit
  def advance(params, state, step, *arrays):
    key = jax.random.fold_in(jax.random.key(0), step)
    (value, logs), grads = jax.value_and_grad(loss, has_aux=True)(params, key, *arrays)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, {'loss': value, **logs}

  folder = folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(max_to_keep=1)
  with ocp.CheckpointManager(folder / 'checkpoints', options=options) as manager:
    values = {'params': params, 'state': optimizer.init(params)}
    start = manager.latest_step() or 0
    if start:
      shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, values)
      values = manager.restore(start, args=ocp.args.StandardRestore(shapes))
    params, state = values['params'], values['state']
    began = time.time()
    for step in tqdm(range(start, steps), folder.name, initial=start, total=steps, mininterval=5):
      params, state, logs = advance(params, state, step, *batch(step))
      if (step + 1) % every == 0 or step + 1 == steps:
        line = {'step': step + 1, **{k: float(v) for k, v in logs.items()}, **check(params)}
        line['seconds'] = round(time.time() - began, 1)
        tqdm.write(json.dumps({k: round(v, 4) for k, v in line.items()}))
        with (folder / 'metrics.jsonl').open('a') as file:
          file.write(json.dumps(line) + '\n')
        manager.save(step + 1, args=ocp.args.StandardSave({'params': params, 'state': state}))
  return params
