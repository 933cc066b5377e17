"""Architectures as data: the `config.json` of a diffusers or transformers component.

Field names are the JSON's. An unsupported key that would change the mathematics raises an error
with its name; keys for training or bookkeeping only are ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ip2p_jax.errors import InputError

# Keys with the only values the modules implement. None always means "not used".
_UNET_FIXED = {
  'act_fn': ('silu', 'swish'),
  'attention_type': ('default',),
  'center_input_sample': (False,),
  'class_embeddings_concat': (False,),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
  'downsample_padding': (1,),
  'dual_cross_attention': (False,),
  'mid_block_scale_factor': (1,),
  'mid_block_type': ('UNetMidBlock2DCrossAttn',),
  'only_cross_attention': (False,),
  'mid_block_only_cross_attention': (False,),
  'resnet_out_scale_factor': (1,),
  'resnet_skip_time_act': (False,),
  'resnet_time_scale_shift': ('default',),
  'time_embedding_type': ('positional',),
  'transformer_layers_per_block': (1,),
  # None means unused.
  'addition_embed_type': (),
  'class_embed_type': (),
  'cross_attention_norm': (),
  'encoder_hid_dim': (),
  'encoder_hid_dim_type': (),
  'num_attention_heads': (),  # diffusers refuses it as well
  'num_class_embeds': (),
  'reverse_transformer_layers_per_block': (),
  'time_cond_proj_dim': (),
  'time_embedding_act_fn': (),
  'time_embedding_dim': (),
  'timestep_post_act': (),
}
# Scores and softmax are always float32 here, so `upcast_attention` changes nothing.
_UNET_IGNORED = {
  'addition_embed_type_num_heads',
  'addition_time_embed_dim',
  'dropout',
  'projection_class_embeddings_input_dim',
}
_VAE_FIXED = {
  'act_fn': ('silu', 'swish'),
  'latents_mean': (),
  'latents_std': (),
  'mid_block_add_attention': (True,),
  'shift_factor': (0,),
  'use_post_quant_conv': (True,),
  'use_quant_conv': (True,),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """A Stable Diffusion 1.x or 2.x UNet; the defaults are SD 1.5's.

  Despite its name, `attention_head_dim` is the *number* of heads (diffusers kept the name for old
  files). SD 1.x has one number, SD 2.x one per level, so that heads are 64 wide.
  """

  in_channels: int = 4
  out_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  cross_attention_dim: int = 768
  attention_head_dim: int | tuple[int, ...] = 8
  use_linear_projection: bool = False
  down_block_types: tuple[str, ...] = ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',)
  up_block_types: tuple[str, ...] = ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  sample_size: int = 64
  upcast_attention: bool = False

  @property
  def heads(self) -> tuple[int, ...]:
    """Number of attention heads per level."""
    heads = self.attention_head_dim
    return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

  @classmethod
  def from_json(cls, config: Mapping[str, Any], name: str = 'unet/config.json') -> Self:
    result = _from_json(cls, config, name, _UNET_FIXED, _UNET_IGNORED)
    levels = len(result.block_out_channels)
    for key in ('down_block_types', 'up_block_types', 'heads'):
      if len(getattr(result, key)) != levels:
        shown = 'attention_head_dim' if key == 'heads' else key
        raise InputError(f'{name}: {shown} has {len(getattr(result, key))} entries for {levels} '
                         'levels of block_out_channels; give one per level.')  # fmt: skip
    for width, heads in zip(result.block_out_channels, result.heads, strict=True):
      if width % heads:
        raise InputError(f'{name}: attention_head_dim has {heads} heads, which do not divide the '
                         f'width {width}.')  # fmt: skip
    _check_blocks(result.down_block_types, ('DownBlock2D', 'CrossAttnDownBlock2D'), name)
    _check_blocks(result.up_block_types, ('UpBlock2D', 'CrossAttnUpBlock2D'), name)
    _check_groups(result, name)
    return result

  def to_json(self) -> dict[str, Any]:
    return {'_class_name': 'UNet2DConditionModel', **_plain(self)}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The autoencoder (diffusers' AutoencoderKL); the defaults are Stable Diffusion's, factor 8."""

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  down_block_types: tuple[str, ...] = ('DownEncoderBlock2D',) * 4
  up_block_types: tuple[str, ...] = ('UpDecoderBlock2D',) * 4
  sample_size: int = 512

  @property
  def factor(self) -> int:
    """Pixels per latent along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def from_json(cls, config: Mapping[str, Any], name: str = 'vae/config.json') -> Self:
    result = _from_json(cls, config, name, _VAE_FIXED, {'force_upcast'})
    _check_blocks(result.down_block_types, ('DownEncoderBlock2D',), name)
    _check_blocks(result.up_block_types, ('UpDecoderBlock2D',), name)
    _check_groups(result, name)
    return result

  def to_json(self) -> dict[str, Any]:
    return {'_class_name': 'AutoencoderKL', 'act_fn': 'silu', **_plain(self)}


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """CLIP's text tower; the defaults are ViT-L/14's, as Stable Diffusion 1.x uses it."""

  vocab_size: int = 49408
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 77
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  projection_dim: int = 768
  eos_token_id: int = 49407

  @classmethod
  def from_json(cls, config: Mapping[str, Any], name: str = 'text_encoder/config.json') -> Self:
    # A missing key means transformers' default, which differs from ViT-L/14's.
    defaults = {'hidden_size': 512, 'intermediate_size': 2048, 'num_attention_heads': 8,
                'projection_dim': 512}  # fmt: skip
    result = _clip_from_json(cls, {**defaults, **config}, name)
    _check_model_type(config, ('clip_text_model', 'clip'), name)
    return result

  def to_json(self) -> dict[str, Any]:
    return {'model_type': 'clip_text_model', 'bos_token_id': self.eos_token_id - 1, **_plain(self)}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """CLIP's vision tower; the defaults are ViT-L/14's."""

  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  image_size: int = 224
  patch_size: int = 14
  num_channels: int = 3
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  projection_dim: int = 768

  @classmethod
  def from_json(cls, config: Mapping[str, Any], name: str = 'vision_model/config.json') -> Self:
    defaults = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
                'num_attention_heads': 12, 'patch_size': 32, 'projection_dim': 512}  # fmt: skip
    result = _clip_from_json(cls, {**defaults, **config}, name)
    _check_model_type(config, ('clip_vision_model', 'clip'), name)
    return result


ACTIVATIONS = ('quick_gelu', 'gelu')
_MAY_BE_ZERO = ('freq_shift', 'eos_token_id')


def _from_json(cls, config, name, fixed, ignored):
  """The dataclass of `config`; InputError names the first key that is not supported."""
  fields = {field.name for field in dataclasses.fields(cls)}
  for key, value in config.items():
    if key.startswith('_') or key in fields or key in ignored or value is None:
      continue
    if key not in fixed:
      raise InputError(f'{name}: unknown key {key!r}; this architecture is not supported.')
    if value not in fixed[key] and value is not False:
      allowed = ' or '.join(map(repr, fixed[key])) or 'null'
      raise InputError(f'{name}: {key}={value!r} is not supported, only {allowed}.')
  return _build(cls, config, name)


def _clip_from_json(cls, config, name):
  """The dataclass of a CLIP config; its dozens of other keys are not checked."""
  result = _build(cls, config, name)
  if result.hidden_act not in ACTIVATIONS:
    allowed = ' or '.join(ACTIVATIONS)
    raise InputError(f'{name}: hidden_act={result.hidden_act!r} is not supported, only {allowed}.')
  if result.hidden_size % result.num_attention_heads:
    raise InputError(f'{name}: hidden_size={result.hidden_size} is not a multiple of '
                     f'num_attention_heads={result.num_attention_heads}.')  # fmt: skip
  return result


def _build(cls, config, name):
  """The dataclass with the values of `config`; null means the default."""
  values = {}
  for field in dataclasses.fields(cls):
    value = config.get(field.name)
    if value is not None:
      values[field.name] = value = tuple(value) if isinstance(value, list) else value
      if not _fits(value, field.type, field.name):
        raise InputError(f'{name}: {field.name}={config[field.name]!r} is not a value for it; a '
                         f'usual one is {field.default!r}.')  # fmt: skip
  return cls(**values)


def _fits(value, kind, key):
  if kind is float:
    return type(value) in (int, float) and 0 < value < float('inf')
  if kind in (bool, str):
    return type(value) is kind
  if kind == tuple[str, ...]:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
  least = 0 if key in _MAY_BE_ZERO else 1
  counts = value if isinstance(value, tuple) and kind is not int else (value,)
  is_list_at_least = kind != tuple[int, ...] or isinstance(value, tuple)
  return is_list_at_least and all(type(item) is int and item >= least for item in counts)


def _check_blocks(blocks, allowed, name):
  for block in blocks:
    if block not in allowed:
      raise InputError(f'{name}: block type {block!r} is not supported, only '
                       f'{" and ".join(allowed)}.')  # fmt: skip


def _check_groups(config, name):
  for width in config.block_out_channels:
    if width % config.norm_num_groups:
      raise InputError(f'{name}: block_out_channels has {width}, not a multiple of '
                       f'norm_num_groups={config.norm_num_groups}.')  # fmt: skip


def _check_model_type(config, allowed, name):
  if config.get('model_type', allowed[0]) not in allowed:
    raise InputError(f'{name}: model_type={config["model_type"]!r} is not supported, only '
                     f'{allowed[0]}.')  # fmt: skip


def _plain(config) -> dict[str, Any]:
  lists = dataclasses.asdict(config)
  return {key: list(value) if isinstance(value, tuple) else value for key, value in lists.items()}
