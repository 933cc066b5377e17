"""Names: LDM's (the original single file) and OpenCLIP's <-> diffusers'.

A table maps each module's name to the name in the other format. It is built for the number of
levels and layers that the names show, and is used in both directions. The prefixes of the three
networks in a file, such as `model.diffusion_model.`, are in `ldm_file`.

  diffusers  `down_blocks.0.resnets.1.conv1.weight`
  LDM        `input_blocks.2.0.in_layers.2.weight`
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from ip2p_jax.errors import InputError
from ip2p_jax.weights.names import normalized
from ip2p_jax.weights.tensors import Tensors, renamed

_UNET_ENDS = {
  'time_embedding.linear_1': 'time_embed.0',
  'time_embedding.linear_2': 'time_embed.2',
  'conv_in': 'input_blocks.0.0',
  'conv_norm_out': 'out.0',
  'conv_out': 'out.2',
}
_UNET_RESNET = {
  'norm1': 'in_layers.0',
  'conv1': 'in_layers.2',
  'time_emb_proj': 'emb_layers.1',
  'norm2': 'out_layers.0',
  'conv2': 'out_layers.3',
  'conv_shortcut': 'skip_connection',
}
_VAE_RESNET = {
  'norm1': 'norm1',
  'conv1': 'conv1',
  'norm2': 'norm2',
  'conv2': 'conv2',
  'conv_shortcut': 'nin_shortcut',
}
_VAE_ATTENTION = {
  'group_norm': 'norm',
  'to_q': 'q',
  'to_k': 'k',
  'to_v': 'v',
  'to_out.0': 'proj_out',
}
_LDM_VAE_PROJECTION = re.compile(r'.*\.mid\.attn_1\.(q|k|v|proj_out)\.weight')
_OPEN_CLIP_ENDS = {
  'text_model.embeddings.position_embedding.weight': 'positional_embedding',
  'text_model.embeddings.token_embedding': 'token_embedding',
  'text_model.final_layer_norm': 'ln_final',
}
_OPEN_CLIP_LAYER = {
  'layer_norm1': 'ln_1',
  'layer_norm2': 'ln_2',
  'self_attn.out_proj': 'attn.out_proj',
  'mlp.fc1': 'mlp.c_fc',
  'mlp.fc2': 'mlp.c_proj',
}
_OPEN_CLIP_UNUSED = ('text_projection', 'logit_scale', 'attn_mask')


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of a UNet, inferred from its names."""

  layers: int
  attention: bool
  sampler: bool


def to_ldm(tensors: Mapping[str, np.ndarray], component: str) -> Tensors:
  """A 'unet', 'vae' or 'text_encoder' under its LDM names, without the prefix of the component.

  Raises:
    InputError: a tensor has no place in a Stable Diffusion `component`.
  """
  result = renamed(tensors, _translated(tensors, _places(tensors, component), component))
  if component != 'vae':
    return result

  def convolution(name):
    array = result[name]
    return array[:, :, None, None] if _LDM_VAE_PROJECTION.fullmatch(name) else array

  return Tensors({name: lambda name=name: convolution(name) for name in result})


def from_ldm(tensors: Mapping[str, np.ndarray], component: str) -> Tensors:
  """The inverse of `to_ldm`: a component, without its prefix, under its diffusers names."""
  tensors = normalized(tensors, component)  # a text encoder may lack its prefix
  places = {ldm: ours for ours, ldm in _ldm_places(tensors, component).items()}
  return normalized(renamed(tensors, _translated(tensors, places, component)), component)


def levels(names: Iterable[str], side: str) -> list[Level]:
  """The levels of `side` ('down_blocks' or 'up_blocks') that a UNet's diffusers names show."""
  blocks: dict[int, set] = defaultdict(set)
  for name in names:
    if match := re.match(side + r'\.(\d+)\.(\w+)\.(\d+)\.', name):
      blocks[int(match[1])].add((match[2], int(match[3])))
  result = []
  for i in range(len(blocks)):
    kinds = [kind for kind, _ in blocks.get(i, ())]
    sampler = any(kind.endswith('samplers') for kind in kinds)
    result.append(Level(kinds.count('resnets'), 'attentions' in kinds, sampler))
  return result


def _ldm_levels(names, side):
  """`levels` from LDM names; `side` is 'input_blocks' or 'output_blocks'."""
  blocks: dict[int, set] = defaultdict(set)
  for name in names:
    if match := re.match(side + r'\.(\d+)\.(\d+)\.(\w+)', name):
      blocks[int(match[1])].add((int(match[2]), match[3]))
  if side == 'input_blocks':
    blocks.pop(0, None)  # conv_in
  result, layers, attention = [], 0, False
  for index in sorted(blocks):
    down = (0, 'op') in blocks[index]
    up = any(place > 0 and kind == 'conv' for place, kind in blocks[index])
    layers += not down
    attention |= any(place == 1 and kind != 'conv' for place, kind in blocks[index])
    if down or up:
      result.append(Level(layers, attention, True))
      layers, attention = 0, False
  return [*result, Level(layers, attention, False)]


def _unet_places(down, up):
  """Module -> its LDM name, for a UNet of these levels."""
  places = dict(_UNET_ENDS)

  def resnet(ours, ldm):
    places.update({f'{ours}.{a}': f'{ldm}.{b}' for a, b in _UNET_RESNET.items()})

  index = 1
  for i, level in enumerate(down):
    for j in range(level.layers):
      resnet(f'down_blocks.{i}.resnets.{j}', f'input_blocks.{index}.0')
      if level.attention:
        places[f'down_blocks.{i}.attentions.{j}'] = f'input_blocks.{index}.1'
      index += 1
    if level.sampler:
      places[f'down_blocks.{i}.downsamplers.0.conv'] = f'input_blocks.{index}.0.op'
      index += 1
  resnet('mid_block.resnets.0', 'middle_block.0')
  places['mid_block.attentions.0'] = 'middle_block.1'
  resnet('mid_block.resnets.1', 'middle_block.2')
  index = 0
  for i, level in enumerate(up):
    for j in range(level.layers):
      resnet(f'up_blocks.{i}.resnets.{j}', f'output_blocks.{index}.0')
      if level.attention:
        places[f'up_blocks.{i}.attentions.{j}'] = f'output_blocks.{index}.1'
      index += 1
    if level.sampler:  # in the block of the last layer, after its attention if it has one
      after = 2 if level.attention else 1
      places[f'up_blocks.{i}.upsamplers.0.conv'] = f'output_blocks.{index - 1}.{after}.conv'
  return places


def _vae_places(num_levels, layers):
  """Module -> its LDM name, for an autoencoder; `layers` is the decoder's number of resnets."""
  places = {'quant_conv': 'quant_conv', 'post_quant_conv': 'post_quant_conv'}

  def resnet(ours, ldm):
    places.update({f'{ours}.{a}': f'{ldm}.{b}' for a, b in _VAE_RESNET.items()})

  for side in ('encoder', 'decoder'):
    ends = {'conv_in': 'conv_in', 'conv_norm_out': 'norm_out', 'conv_out': 'conv_out'}
    places.update({f'{side}.{a}': f'{side}.{b}' for a, b in ends.items()})
    resnet(f'{side}.mid_block.resnets.0', f'{side}.mid.block_1')
    resnet(f'{side}.mid_block.resnets.1', f'{side}.mid.block_2')
    ours, ldm = f'{side}.mid_block.attentions.0', f'{side}.mid.attn_1'
    places.update({f'{ours}.{a}': f'{ldm}.{b}' for a, b in _VAE_ATTENTION.items()})
  for i in range(num_levels):
    down, up = (
      f'encoder.down.{i}',
      f'decoder.up.{num_levels - 1 - i}',
    )  # LDM counts up from full size
    for j in range(layers):
      resnet(f'encoder.down_blocks.{i}.resnets.{j}', f'{down}.block.{j}')
      resnet(f'decoder.up_blocks.{i}.resnets.{j}', f'{up}.block.{j}')
    places[f'encoder.down_blocks.{i}.downsamplers.0.conv'] = f'{down}.downsample.conv'
    places[f'decoder.up_blocks.{i}.upsamplers.0.conv'] = f'{up}.upsample.conv'
  return places


def _places(names, component):
  if component == 'unet':
    return _unet_places(levels(names, 'down_blocks'), levels(names, 'up_blocks'))
  if component == 'vae':
    return _vae_places(*_counts(names, r'decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.'))
  return {'text_model': 'text_model'}


def _ldm_places(names, component):
  if component == 'unet':
    return _unet_places(_ldm_levels(names, 'input_blocks'), _ldm_levels(names, 'output_blocks'))
  if component == 'vae':
    return _vae_places(*_counts(names, r'decoder\.up\.(\d+)\.block\.(\d+)\.'))
  return {'text_model': 'text_model'}


def _counts(names, pattern):
  pairs = [match.groups() for name in names if (match := re.match(pattern, name))]
  return tuple(1 + max((int(pair[i]) for pair in pairs), default=-1) for i in (0, 1))


def _translated(names, places, component):
  """{new name: old name}, by the longest module of each name in `places`."""
  new_to_old = {}
  for name in names:
    parts = name.split('.')
    heads = ['.'.join(parts[:end]) for end in range(len(parts), 0, -1)]
    head = next((head for head in heads if head in places), None)
    if head is None:
      raise InputError(f'{name} has no place in the {component} of a Stable Diffusion model.')
    new_to_old[places[head] + name[len(head) :]] = name
  return new_to_old


def from_open_clip(tensors: Mapping[str, np.ndarray], num_layers: int | None = None) -> Tensors:
  """SD 2.x's text encoder: from OpenCLIP's names to transformers' names.

  SD 2.x conditions on layer 23 of 24, so diffusers' encoder has 23: the last layer,
  `text_projection` and `logit_scale` are dropped. Without `num_layers`, a tower of SD 2.x's width
  (1024) keeps at most 23 layers. A tower of another width loses its last layer if it has a
  `text_projection`, which only whole towers have.
  """
  names = [name for name in tensors if name not in _OPEN_CLIP_UNUSED]
  count = 1 + max((_resblock(name) for name in names), default=-1)
  if num_layers is None:
    is_sd2 = tensors['positional_embedding'].shape[-1] == 1024
    num_layers = min(count, 23) if is_sd2 else count - ('text_projection' in tensors)
  names = [name for name in names if _resblock(name) < num_layers]
  fused = [name for name in names if re.search(r'\.attn\.in_proj_(weight|bias)$', name)]
  places = {ldm: ours for ours, ldm in _open_clip_places(count).items()}
  rest = [name for name in names if name not in fused]
  result = renamed(tensors, _translated(rest, places, 'text_encoder'))
  makers = {name: lambda name=name: result[name] for name in result}
  for name in fused:
    head, kind = f'text_model.encoder.layers.{_resblock(name)}.self_attn', name.split('_')[-1]
    for i, part in enumerate('qkv'):
      makers[f'{head}.{part}_proj.{kind}'] = lambda name=name, i=i: np.split(tensors[name], 3)[i]
  return Tensors(makers)


def to_open_clip(tensors: Mapping[str, np.ndarray]) -> Tensors:
  """The inverse of `from_open_clip`; the layer it drops and `text_projection` stay absent."""
  query = re.compile(
    r'(text_model\.encoder\.layers\.(\d+)\.self_attn)\.([qkv])_proj\.(weight|bias)'
  )
  fused = {name: match for name in tensors if (match := query.fullmatch(name))}
  rest = [name for name in tensors if name not in fused]
  places = _open_clip_places(len(rest))  # more layers than there can be
  result = renamed(tensors, _translated(rest, places, 'text_encoder'))
  makers = {name: lambda name=name: result[name] for name in result}

  def joined(head, kind):
    return np.concatenate([tensors[f'{head}.{part}_proj.{kind}'] for part in 'qkv'])

  for head, layer, _, kind in (match.groups() for match in fused.values()):
    name = f'transformer.resblocks.{layer}.attn.in_proj_{kind}'
    makers[name] = lambda head=head, kind=kind: joined(head, kind)
  return Tensors(makers)


def _open_clip_places(num_layers):
  places = dict(_OPEN_CLIP_ENDS)
  for i in range(num_layers):
    ours, ldm = f'text_model.encoder.layers.{i}', f'transformer.resblocks.{i}'
    places.update({f'{ours}.{a}': f'{ldm}.{b}' for a, b in _OPEN_CLIP_LAYER.items()})
  return places


def _resblock(name):
  match = re.match(r'transformer\.resblocks\.(\d+)\.', name)
  return int(match[1]) if match else -1


def ema_name(name: str) -> str:
  """LDM's name for the moving average of `model.diffusion_model...`: the same without dots."""
  return 'model_ema.' + name.removeprefix('model.').replace('.', '')
