"""One file in the layout of the original (LDM) code, as A1111, ComfyUI and `.ckpt` hubs use it.

Such a file holds three models under three prefixes and no configs, so the configs are inferred from
the shapes. Files that we write also hold the configs, and a tokenizer that is not CLIP's, in their
metadata; those are used instead.

Other programs know only CLIP's tokenizer and refuse an embedding with more rows. So the rows of
learned tokens are in a separate tensor, which only we read.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ip2p_jax.errors import InputError
from ip2p_jax.weights import averages, ldm_names, names, tokenizer_files, torch_file
from ip2p_jax.weights.files import read_tensors, write_safetensors
from ip2p_jax.weights.tensors import COMPONENTS, Checkpoint, Tensors, renamed
from ip2p_jax.weights.tokenizer_files import VOCABULARY, clip_tokenizer

UNET, VAE = 'model.diffusion_model.', 'first_stage_model.'
CLIP, OPEN_CLIP = 'cond_stage_model.transformer.', 'cond_stage_model.model.'
METADATA = 'ip2p_jax'
EMBEDDING = 'text_model.embeddings.token_embedding.weight'
LEARNED = 'ip2p_jax.learned_tokens'  # the embedding's rows of learned tokens

# Parts of names that show another kind of file; the first match names it.
_OTHER_KINDS = (
  ('conditioner.embedders.', 'an SDXL checkpoint'),
  ('joint_blocks.', 'an SD 3 checkpoint'),
  ('double_blocks.', 'a Flux checkpoint'),
  ('control_model.', 'a ControlNet'),
  ('label_emb.', 'a class-conditional checkpoint, as SDXL and unCLIP are'),
)
_LORA_MARKS = ('lora_down.', 'lora_up.', 'lora_A.', 'lora_B.', 'lora_unet_', '.lora.')


def read(path: str | os.PathLike, ema: bool | None = None) -> Checkpoint:
  """Reads a single-file checkpoint, `.safetensors` or `.ckpt`.

  If it holds two sets of weights, the choice is logged.

  Args:
    path: the file.
    ema: for a file with the UNet's moving average: whether to take it. None takes it unless the
      live weights were changed without it (`averages.doubt`).

  Raises:
    InputError: the file is not Stable Diffusion 1.x or 2.x, lacks a component, has part of a moving
      average, or cannot be read.
  """
  path = Path(path)
  tensors, metadata = read_tensors(path)
  _check_kind(path, tensors)
  vae = _under(tensors, VAE)
  unet = averages.chosen(path, tensors, UNET, metadata, ema)
  # The loss networks of its training do not belong to the autoencoder.
  vae = renamed(vae, {name: name for name in vae if not name.startswith('loss.')})
  is_open_clip = any(name.startswith(OPEN_CLIP) for name in tensors)
  ours = _metadata(path, metadata)
  text_config = ours.get('configs', {}).get('text_encoder', {})
  try:
    if is_open_clip:
      text = ldm_names.from_open_clip(
        _under(tensors, OPEN_CLIP), text_config.get('num_hidden_layers')
      )
    else:
      text = ldm_names.from_ldm(_under(tensors, CLIP), 'text_encoder')
    if LEARNED in tensors:
      text = _with_rows(text, tensors)
    components = {
      'unet': ldm_names.from_ldm(unet, 'unet'),
      'vae': ldm_names.from_ldm(vae, 'vae'),
      'text_encoder': text,
    }
    configs = ours.get('configs') or _configs(components, tensors, is_open_clip)
  except (InputError, KeyError) as error:
    reason = f'lacks tensor {error}' if isinstance(error, KeyError) else error
    raise InputError(f'{path}: {reason}') from None
  tokenizer = _with_standard(ours.get('tokenizer'), clip_tokenizer('!' if is_open_clip else None))
  return Checkpoint(configs, components, tokenizer, str(path))


def write(checkpoint: Checkpoint, path: str | os.PathLike, dtype: str = 'float32') -> None:
  """Writes one safetensors file in LDM names, atomically; floats are cast to `dtype`.

  A text encoder with SD 2.x's activation (`gelu`) gets OpenCLIP's names, any other SD 1.x's.

  Raises:
    InputError: a tensor has no LDM name, or does not fit `dtype`.
  """
  tensors, ours = _in_ldm(checkpoint)
  write_safetensors(path, tensors, dtype, {METADATA: ours})


def write_original(checkpoint: Checkpoint, path: str | os.PathLike, dtype: str = 'float32') -> None:
  """Writes the `.ckpt` that the original's code loads: a torch file of weights and averages.

  The original samples with the averages, `model_ema.*`, and uses random ones if a file has none. We
  have one set of weights; it is stored once, under both names.

  Raises:
    InputError: torch is not installed, or the cases of `write`.
  """
  if _is_open_clip(checkpoint):
    raise InputError(f"{path}: the original's code reads SD 1.x's text encoder, and this is SD "
                     '2.x; use --to ldm or diffusers.')  # fmt: skip
  tensors, ours = _in_ldm(checkpoint)
  averaged = {ldm_names.ema_name(name): name for name in tensors if name.startswith(UNET)}
  counters = {'model_ema.decay': np.float32(0.9999), 'model_ema.num_updates': np.int32(0)}
  torch_file.write(path, tensors, dtype, averaged, counters, {'global_step': 0, METADATA: ours})


def _in_ldm(checkpoint: Checkpoint) -> tuple[Tensors, str]:
  """All tensors under the names of the file, and our metadata."""
  is_open_clip, tensors = _is_open_clip(checkpoint), checkpoint.tensors
  text = names.normalized(tensors['text_encoder'], 'text_encoder')
  parts = {
    UNET: ldm_names.to_ldm(tensors['unet'], 'unet'),
    VAE: ldm_names.to_ldm(names.normalized(tensors['vae'], 'vae'), 'vae'),
  }
  if is_open_clip:
    parts[OPEN_CLIP] = ldm_names.to_open_clip(text)
  else:
    parts[CLIP] = ldm_names.to_ldm(text, 'text_encoder')
  makers = {
    prefix + name: lambda part=part, name=name: part[name]
    for prefix, part in parts.items()
    for name in part
  }
  rows = base_rows(checkpoint)
  if text[EMBEDDING].shape[0] > rows:
    prefix, name = (OPEN_CLIP, 'token_embedding.weight') if is_open_clip else (CLIP, EMBEDDING)
    makers[prefix + name] = lambda: text[EMBEDDING][:rows]
    makers[LEARNED] = lambda: text[EMBEDDING][rows:]
  standard = clip_tokenizer('!' if is_open_clip else None)
  ours = {
    'configs': checkpoint.configs,
    'tokenizer': {
      name: None if _same_file(name, content, standard.get(name)) else content.decode()
      for name, content in checkpoint.tokenizer.items()
    },
  }
  return Tensors(makers), json.dumps(ours)


def _is_open_clip(checkpoint):
  return checkpoint.configs['text_encoder'].get('hidden_act', 'quick_gelu') != 'quick_gelu'


def without_learned(checkpoint: Checkpoint) -> Checkpoint:
  """The checkpoint as other programs read the single file: without learned tokens."""
  text = names.normalized(checkpoint.tensors['text_encoder'], 'text_encoder')
  rows = base_rows(checkpoint)
  if text[EMBEDDING].shape[0] <= rows:
    return checkpoint
  makers = {name: lambda name=name: text[name] for name in text}
  makers[EMBEDDING] = lambda: text[EMBEDDING][:rows]
  config = checkpoint.configs['text_encoder'] | {'vocab_size': rows}
  return dataclasses.replace(
    checkpoint,
    configs=checkpoint.configs | {'text_encoder': config},
    tensors=checkpoint.tensors | {'text_encoder': Tensors(makers)},
    tokenizer=tokenizer_files.without_learned(checkpoint.tokenizer),
  )


def base_rows(checkpoint: Checkpoint) -> int:
  """Rows of the embedding without learned tokens: 49,408 for CLIP."""
  return 1 + max(json.loads(checkpoint.tokenizer[VOCABULARY]).values())


def _check_kind(path, tensors):
  for mark, kind in _OTHER_KINDS:
    if any(name.startswith(mark) or f'.{mark}' in name for name in tensors):
      raise InputError(f'{path}: this is {kind}; only Stable Diffusion 1.x and 2.x are supported.')
  has = {prefix: any(name.startswith(prefix) for name in tensors)
         for prefix in (UNET, VAE, CLIP, OPEN_CLIP)}  # fmt: skip
  if not has[UNET] and any(mark in name for name in tensors for mark in _LORA_MARKS):
    raise InputError(f'{path}: this is a LoRA, which only changes a model; give the full '
                     'checkpoint, or merge the LoRA into it first.')  # fmt: skip
  if not has[UNET] and any(name.startswith(('conv_in.', 'decoder.conv_in.', 'text_model.'))
                           for name in tensors):  # fmt: skip
    raise InputError(f'{path}: this is one component in diffusers\' layout; give the folder that '
                     'holds model_index.json.')  # fmt: skip
  absent = {
    f'a UNet ({UNET}*)': not has[UNET],
    f'a VAE ({VAE}*)': not has[VAE],
    f'a text encoder ({CLIP}* or {OPEN_CLIP}*)': not (has[CLIP] or has[OPEN_CLIP]),
  }
  lacks = [part for part, is_absent in absent.items() if is_absent]
  if lacks:
    raise InputError(f'{path}: lacks {" and ".join(lacks)}; give a full checkpoint.')


def _under(tensors, prefix):
  new_to_old = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
  return renamed(tensors, new_to_old)


def _with_rows(text, tensors):
  """The text encoder with the rows of learned tokens appended to its embedding."""
  makers = {name: lambda name=name: text[name] for name in text}
  makers[EMBEDDING] = lambda: np.concatenate([text[EMBEDDING], tensors[LEARNED]])
  return Tensors(makers)


def _metadata(path, metadata) -> dict[str, Any]:
  if METADATA not in metadata:
    return {}
  try:
    ours = json.loads(metadata[METADATA])
    complete = {*COMPONENTS, 'scheduler'} <= ours['configs'].keys() and ours['tokenizer']
  except (ValueError, KeyError, TypeError, AttributeError):
    complete = False
  if not complete:
    raise InputError(f'{path}: its metadata {METADATA!r} is damaged; write the file again.')
  return ours


def _with_standard(stored, standard):
  if stored is None:
    return standard
  return {name: standard[name] if text is None else text.encode() for name, text in stored.items()}


def _same_file(name, content, standard):
  """Whether a tokenizer file equals CLIP's; hubs format the two large files differently."""
  if standard is None:
    return False
  if name == 'vocab.json':
    return json.loads(content) == json.loads(standard)
  if name == 'merges.txt':
    return content.splitlines() == standard.splitlines()
  return content == standard


def _configs(tensors: Mapping[str, Tensors], file: Tensors, is_open_clip: bool) -> dict[str, dict]:
  """The configs that the shapes imply; other values are Stable Diffusion's constants.

  Shapes do not show the parameterization: `prediction_type` is epsilon here. That is wrong for SD
  2.x at 768 px (v_prediction); the caller must say so.
  """
  configs = {
    'unet': _unet_config(tensors['unet']),
    'vae': _vae_config(tensors['vae']),
    'text_encoder': _text_config(tensors['text_encoder'], is_open_clip),
    'scheduler': {
      '_class_name': 'EulerAncestralDiscreteScheduler',
      'beta_end': 0.012,
      'beta_schedule': 'scaled_linear',
      'beta_start': 0.00085,
      'num_train_timesteps': 1000,
      'prediction_type': 'epsilon',
      'steps_offset': 1,
      'trained_betas': None,
    },
  }
  if 'scale_factor' in file:  # a buffer, in models with a measured factor instead of SD's
    configs['vae']['scaling_factor'] = float(str(np.float32(file['scale_factor'])))
  return configs


def _unet_config(tensors):
  down, up = ldm_names.levels(tensors, 'down_blocks'), ldm_names.levels(tensors, 'up_blocks')
  widths = [tensors[f'down_blocks.{i}.resnets.0.conv1.weight'].shape[0] for i in range(len(down))]
  attention = 'mid_block.attentions.0'
  is_linear = tensors[f'{attention}.proj_in.weight'].ndim == 2  # SD 2.x
  return {
    '_class_name': 'UNet2DConditionModel',
    'act_fn': 'silu',
    # Despite its name the number of heads: always 8 in SD 1.x; heads are 64 wide in SD 2.x.
    'attention_head_dim': [_heads(width) for width in widths] if is_linear else 8,
    'block_out_channels': widths,
    'center_input_sample': False,
    'cross_attention_dim': tensors[f'{attention}.transformer_blocks.0.attn2.to_k.weight'].shape[1],
    'down_block_types': [
      'CrossAttnDownBlock2D' if level.attention else 'DownBlock2D' for level in down
    ],
    'downsample_padding': 1,
    'dual_cross_attention': False,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'in_channels': tensors['conv_in.weight'].shape[1],
    'layers_per_block': _uniform([level.layers for level in down], 'UNet'),
    'mid_block_scale_factor': 1,
    'norm_eps': 1e-5,
    'norm_num_groups': _groups(widths, 'UNet'),
    'only_cross_attention': False,
    'out_channels': tensors['conv_out.weight'].shape[0],
    'sample_size': 64,
    'up_block_types': ['CrossAttnUpBlock2D' if level.attention else 'UpBlock2D' for level in up],
    'use_linear_projection': is_linear,
  }


def _vae_config(tensors):
  down = ldm_names.levels([name.removeprefix('encoder.') for name in tensors], 'down_blocks')
  widths = [
    tensors[f'encoder.down_blocks.{i}.resnets.0.conv1.weight'].shape[0] for i in range(len(down))
  ]
  return {
    '_class_name': 'AutoencoderKL',
    'act_fn': 'silu',
    'block_out_channels': widths,
    'down_block_types': ['DownEncoderBlock2D'] * len(down),
    'in_channels': tensors['encoder.conv_in.weight'].shape[1],
    'latent_channels': tensors['post_quant_conv.weight'].shape[0],
    'layers_per_block': _uniform([level.layers for level in down], 'VAE'),
    'norm_num_groups': _groups(widths, 'VAE'),
    'out_channels': tensors['decoder.conv_out.weight'].shape[0],
    'sample_size': 512,
    'scaling_factor': 0.18215,
    'up_block_types': ['UpDecoderBlock2D'] * len(down),
  }


def _text_config(tensors, is_open_clip):
  vocabulary, width = tensors['text_model.embeddings.token_embedding.weight'].shape
  layers = {name.split('.')[3] for name in tensors if name.startswith('text_model.encoder.layers.')}
  return {
    'architectures': ['CLIPTextModel'],
    'attention_dropout': 0.0,
    'bos_token_id': 0,
    'dropout': 0.0,
    'eos_token_id': 2,
    'hidden_act': 'gelu' if is_open_clip else 'quick_gelu',
    'hidden_size': width,
    'initializer_factor': 1.0,
    'initializer_range': 0.02,
    'intermediate_size': tensors['text_model.encoder.layers.0.mlp.fc1.weight'].shape[0],
    'layer_norm_eps': 1e-5,
    'max_position_embeddings': tensors['text_model.embeddings.position_embedding.weight'].shape[0],
    'model_type': 'clip_text_model',
    'num_attention_heads': _heads(width),
    'num_hidden_layers': len(layers),
    'pad_token_id': 1,
    'projection_dim': 512 if is_open_clip else 768,
    'vocab_size': vocabulary,
  }


def _uniform(counts, model):
  if len(set(counts)) != 1:
    raise InputError(
      f'the {model} has {counts} layers per level; only equal numbers are supported.'
    )
  return counts[0]


def _heads(width):
  if width % 64:
    raise InputError(f'attention is {width} wide, not a multiple of 64, and no metadata says how '
                     'many heads it has; give the diffusers folder instead.')  # fmt: skip
  return width // 64


def _groups(widths, model):
  if any(width % 32 for width in widths):
    raise InputError(f'the {model} has widths {widths}, not multiples of 32, and no metadata says '
                     'how they are normalized; give the diffusers folder instead.')  # fmt: skip
  return 32
