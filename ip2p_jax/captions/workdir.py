"""Files of a language model's run beside its checkpoints, and export of its model.

  base/language.json      config.json of the model; written last, so with it a base is complete
  base/model.safetensors  the weights that are not trained, in their original type
  base/...                the tokenizer and the other files of the model's folder

The rest of the workdir is as in `checkpoints`.
"""

import dataclasses
import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from ip2p_jax import parameters, storage, weights
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig
from ip2p_jax.pipeline.checkpoints import Workdir, read_part, saved_steps
from ip2p_jax.pipeline.workdir import BASE, lora_config, tensor_makers, tensor_name
from ip2p_jax.weights import Tensors, names
from ip2p_jax.weights.language_folder import LanguageCheckpoint, write_language

MODEL, TENSORS, TOKENIZER = 'language.json', 'model.safetensors', 'tokenizer.json'


def is_language_run(path: Workdir) -> bool:
  """Whether a language model was trained at `path`."""
  return (storage.folder(path) / BASE / MODEL).exists()


def shapes_of(checkpoint: LanguageCheckpoint) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """The network's definition, and {dotted name: ShapeDtypeStruct} of its parameters."""
  config = LlamaConfig.from_json(checkpoint.config, f'{checkpoint.source}: config.json')
  definition, shapes = abstract(lambda keys: Llama(config, rngs=keys))
  return definition, parameters.flatten(shapes)


def read_parameters(checkpoint: LanguageCheckpoint, shapes: dict[str, Any]) -> Tensors:
  """{dotted name: array} of the parameters in `shapes`, typed as there; read when accessed.

  Raises InputError that names missing tensors, and on access, misshapen or non-finite ones.
  """
  tensors, wanted = checkpoint.tensors, {tensor_name(name): name for name in shapes}

  def read(tensor):
    name = wanted[tensor]
    single = Tensors({tensor: lambda: tensors[tensor]})
    shape = parameters.unflatten({name: shapes[name]})
    tree = names.to_params(single, shape, 'language', source=checkpoint.source)
    return parameters.flatten(tree)[name]

  missing = [tensor for tensor in wanted if tensor not in tensors]
  if missing:
    raise InputError(f'{checkpoint.source}: lacks {len(missing)} tensors, such as {missing[0]}.')
  return Tensors({name: lambda tensor=tensor: read(tensor) for tensor, name in wanted.items()})


def save_base(workdir: Workdir, checkpoint: LanguageCheckpoint, trained: Collection[str]) -> None:
  """Saves what training does not change, so that a run reads its starting point only once.

  Does nothing if the workdir has a base and a training checkpoint. Every process must call it.

  Args:
    trained: dotted names of the parameters that are in the state instead.

  Raises OSError if writing fails, InputError if a weight is not finite.
  """
  folder = storage.folder(workdir)
  is_there = is_language_run(workdir) and saved_steps(workdir)
  if jax.process_index() == 0 and not is_there:
    _write_base(folder / BASE, checkpoint, set(map(tensor_name, trained)))
  multihost_utils.sync_global_devices('ip2p_jax language base')


def load_base(workdir: Workdir) -> LanguageCheckpoint | None:
  """Reads what `save_base` saved, tensors lazily; None if there is nothing."""
  if not is_language_run(workdir):
    return None
  folder = storage.folder(workdir) / BASE
  texts = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in _OURS}
  tensors = Tensors({})
  if (folder / TENSORS).exists():  # there is none if all weights are trained
    with storage.fetched(folder / TENSORS) as file:
      tensors = weights.read_tensors(file)[0]
  config, tokenizer = storage.read_json(folder / MODEL), texts.pop(TOKENIZER)
  return LanguageCheckpoint(config, tensors, tokenizer, str(workdir), texts)


def read(workdir: Workdir, ema: bool = True, step: int | None = None) -> LanguageCheckpoint:
  """A run's model, adapters merged in float32. The run may still be training.

  Args:
    ema: whether to read the moving average or the trained weights.
    step: None takes the latest checkpoint.

  Raises InputError if there is no checkpoint, or if a part of it is missing or damaged.
  """
  base = load_base(workdir)
  if base is None:
    raise InputError(f'{workdir}: is not the workdir of a language model; give one that is.')
  step, trained = read_part(workdir, 'ema' if ema else 'params', step)
  config = lora_config(workdir)
  fixed = {name: lambda name=name: base.tensors[name] for name in base.tensors}
  changed = _merged(base, trained, config) if config.rank else trained
  tensors = Tensors(fixed | tensor_makers(changed))
  return dataclasses.replace(base, tensors=tensors, source=f'{workdir} (step {step})')


def export_language(
  workdir: Workdir,
  dst: str | os.PathLike,
  dtype: str = 'float32',
  use_ema: bool = True,
  overwrite: bool = False,
) -> str:
  """Writes a run's model as a folder of transformers; returns its source: 'W (step 63)'.

  Raises InputError for mistakes in the workdir or the destination.
  """
  with storage.one_writer(dst):
    checkpoint = read(workdir, use_ema)
    write_language(checkpoint, dst, dtype, overwrite)
  return checkpoint.source


_OURS = (MODEL, TENSORS)


def _merged(base, adapters, config) -> Tensors:
  """{kernel: float32} of the kernels that have adapters; each is computed when accessed."""
  shapes = shapes_of(base)[1]
  halves = {}
  for name, array in adapters.items():
    halves.setdefault(f'{name.rpartition(".")[0]}.kernel', {})[name] = array
  kernels = read_parameters(base, {name: shapes[name] for name in halves})

  def merge(kernel):
    merged = lora.merged({kernel: kernels[kernel]}, halves[kernel], config)
    return np.asarray(merged[kernel])

  return Tensors({kernel: lambda kernel=kernel: merge(kernel) for kernel in halves})


def _write_base(folder, checkpoint, trained):
  (folder / MODEL).unlink(missing_ok=True)
  for name, content in {TOKENIZER: checkpoint.tokenizer, **checkpoint.others}.items():
    storage.write_bytes(folder / name, content)
  tensors = checkpoint.tensors
  base = Tensors({name: lambda name=name: tensors[name] for name in tensors if name not in trained})
  (folder / TENSORS).unlink(missing_ok=True)
  if base:
    kinds = {str(base[name].dtype) for name in base}
    with storage.sent(folder / TENSORS) as file:
      weights.write_safetensors(file, base, kinds.pop() if len(kinds) == 1 else 'float32')
  storage.write_json(folder / MODEL, checkpoint.config)
