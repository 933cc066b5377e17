"""Names: our parameter trees <-> diffusers.

Our path is the diffusers name except for three renames, so conversion only transposes arrays.

  ours       `down_blocks.0.resnets.1.conv1.kernel`, Conv HWIO, Linear [in, out]
  diffusers  `down_blocks.0.resnets.1.conv1.weight`, Conv OIHW, Linear [out, in]
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ip2p_jax.errors import InputError
from ip2p_jax.weights.tensors import Checkpoint, Tensors, cast, renamed

# Our leaves that torch calls `weight`; all others (`bias`, bare parameters) keep their name.
_WEIGHTS = ('kernel', 'scale', 'embedding')
_RENAMES = (
  ('.to_out.', '.to_out.0.'),
  ('.ff.proj.', '.ff.net.0.proj.'),
  ('.ff.out.', '.ff.net.2.'),
)

# The prefix that transformers 5 leaves out of the names of a single CLIP tower.
_TOWER_PREFIX = {'text_encoder': 'text_model.', 'image_encoder': 'vision_model.'}
_TOWER_PART = re.compile(r'(embeddings|encoder|final_layer_norm|pre_layrnorm|post_layernorm)\.')
_CLIP_PART = re.compile(
  r'(text_model|vision_model|text_projection|visual_projection)\.|logit_scale$'
)

_OLD_VAE_ATTENTION = {
  '.query.': '.to_q.',
  '.key.': '.to_k.',
  '.value.': '.to_v.',
  '.proj_attn.': '.to_out.0.',
}
_VAE_PROJECTION = re.compile(r'.*\.attentions\.0\.to_(q|k|v|out\.0)\.weight')


def to_params(
  tensors: Mapping[str, np.ndarray],
  abstract: Mapping,
  component: str,
  tower: str | None = None,
  source: str = 'the checkpoint',
  place: Callable[[np.ndarray, Any], Any] = lambda view, leaf: np.asarray(view, order='C'),
) -> dict:
  """A parameter tree, shaped and typed as `abstract`, from torch tensors; all tensors must be used.

  Args:
    tensors: diffusers or transformers name -> array in torch's layout.
    abstract: nested dict of leaves with `.shape` and `.dtype`, as `nnx.to_pure_dict` gives.
    component: 'unet', 'vae', 'text_encoder', 'image_encoder' (CLIP's vision tower alone) or 'clip'.
    tower: 'text' or 'vision' to take one tower from a file of the whole CLIP model.
    source: origin of the tensors, for messages.
    place: puts an array on its device, by its leaf of `abstract`; the array may be a view in any
      order.

  Raises:
    InputError: names the tensors that are missing, unknown, of another shape or not finite.
  """
  where = f'{source}: {component}'
  wanted = {tensor_name(path): (path, leaf) for path, leaf in _leaves(abstract)}
  tensors = normalized(tensors, component)
  if tower is not None:
    others = {name for name in tensors if _CLIP_PART.match(name) and name not in wanted}
    tensors = renamed(tensors, {
      name: name for name in tensors if name not in others or name.startswith(f'{tower}_model.')
    })  # fmt: skip
  _refuse(where, 'lacks', [name for name in wanted if name not in tensors])
  _refuse(where, 'has unknown', [name for name in tensors if name not in wanted])
  _check_shapes(where, tensors, wanted)
  params: dict = {}
  for name, (path, leaf) in wanted.items():
    array = cast(f'{where}: tensor {name}', tensors[name], np.dtype(leaf.dtype))
    if array.dtype != leaf.dtype:
      raise InputError(f'{where}: tensor {name} holds {array.dtype}, not floating point numbers.')
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = place(_from_torch(path[-1], array), leaf)
  return params


def to_tensors(params: Mapping) -> dict[str, np.ndarray]:
  """Torch names -> contiguous arrays in torch's layout, from a parameter tree; types are kept."""
  return {
    tensor_name(path): np.asarray(_to_torch(path[-1], np.asarray(leaf)), order='C')
    for path, leaf in _leaves(params)
  }


def tensor_name(path: tuple) -> str:
  """The torch name of a parameter's path, e.g. ('mid_block', 'attentions', 0, 'norm', 'scale')."""
  *module, leaf = map(str, path)
  name = '.'.join([*module, 'weight' if leaf in _WEIGHTS else leaf])
  for ours, theirs in _RENAMES:
    name = name.replace(ours, theirs)
  return name


def _leaves(tree, path=()) -> Iterator[tuple[tuple, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, key))
    else:
      yield (*path, key), value


def _to_torch(leaf, array):
  if leaf != 'kernel':
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(leaf, array):
  if leaf != 'kernel':
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(leaf, shape):
  # By an array without memory, so that layouts are defined once.
  return _to_torch(leaf, np.broadcast_to(np.uint8(0), shape)).shape


def _refuse(where, what, tensors):
  if tensors:
    first = ', '.join(tensors[:4]) + (', ...' if len(tensors) > 4 else '')
    plural = 's' if len(tensors) > 1 else ''
    raise InputError(f'{where} {what} {len(tensors)} tensor{plural}: {first}.')


def _check_shapes(where, tensors, wanted):
  wrong = []
  for name, (path, leaf) in wanted.items():
    stored, shape = tensors[name].shape, _torch_shape(path[-1], leaf.shape)
    if stored != shape:
      wrong.append(f'{name} is {stored} and should be {shape}')
  if wrong:
    rest = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise InputError(f'{where} does not fit its config: {"; ".join(wrong[:3])}{rest}.')


def normalized(tensors: Mapping[str, np.ndarray], component: str) -> Tensors:
  """The same tensors under today's names, from any version of diffusers or transformers.

  Adds the `text_model.` that transformers 5 leaves out, drops `position_ids` buffers, and turns VAE
  attention from before diffusers 0.13, or saved as 1x1 convolutions, into linear layers.
  """
  names = [name for name in tensors if not name.endswith('position_ids')]
  prefix = _TOWER_PREFIX.get(component, '')
  if any(name.startswith(prefix) for name in names):
    prefix = ''
  new_to_old = {}
  for old in names:
    new = prefix + old if _TOWER_PART.match(old) else old
    if component == 'vae':
      for theirs, ours in _OLD_VAE_ATTENTION.items():
        new = new.replace(theirs, ours)
    new_to_old[new] = old
  result = renamed(tensors, new_to_old)
  if component != 'vae':
    return result

  def linear(name):
    array = result[name]
    is_projection = _VAE_PROJECTION.fullmatch(name) and set(array.shape[2:]) == {1}
    return array.reshape(array.shape[:2]) if is_projection else array

  return Tensors({name: lambda name=name: linear(name) for name in result})


def with_input_channels(checkpoint: Checkpoint, channels: int) -> Checkpoint:
  """The checkpoint with a UNet of `channels` input channels and the same output (paper, 3.2).

  For a text-to-image UNet of 4 channels: the new weights of the first convolution are zero; the old
  ones and the bias stay. A UNet that already takes `channels` is returned unchanged.

  Raises:
    InputError: the UNet takes neither 4 nor `channels` channels.
  """
  unet = checkpoint.tensors['unet']
  now = unet['conv_in.weight'].shape[1]
  if now == channels:
    return checkpoint
  if now != 4 or channels < now:
    raise InputError(f'{checkpoint.source}: the UNet takes {now} channels, which cannot be made '
                     f'{channels}; start from a 4-channel (text-to-image) checkpoint.')  # fmt: skip

  def widened():
    weight = unet['conv_in.weight']
    return np.pad(weight, ((0, 0), (0, channels - now), (0, 0), (0, 0)))

  makers = {name: lambda name=name: unet[name] for name in unet}
  return dataclasses.replace(
    checkpoint,
    configs=checkpoint.configs | {'unet': checkpoint.configs['unet'] | {'in_channels': channels}},
    tensors=checkpoint.tensors | {'unet': Tensors(makers | {'conv_in.weight': widened})},
  )
