"""The diffusers folder: one subfolder per component, each with its JSON and its weights."""

import json
import os
from pathlib import Path
from typing import Any

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.weights import ldm_names, names, tokenizer_files
from ip2p_jax.weights.files import read_tensors, write_safetensors
from ip2p_jax.weights.tensors import COMPONENTS, Checkpoint, float_dtype

_CONFIGS = {
  'unet': 'config.json',
  'vae': 'config.json',
  'text_encoder': 'config.json',
  'scheduler': 'scheduler_config.json',
}
_CLASSES = {
  'unet': ('diffusers', 'UNet2DConditionModel'),
  'vae': ('diffusers', 'AutoencoderKL'),
  'text_encoder': ('transformers', 'CLIPTextModel'),
}
_STEMS = {
  'unet': ('diffusion_pytorch_model', 'diffusion_pytorch_model'),
  'vae': ('diffusion_pytorch_model', 'diffusion_pytorch_model'),
  'text_encoder': ('model', 'pytorch_model'),  # .safetensors, .bin
}
_PIPELINES = {8: 'StableDiffusionInstructPix2PixPipeline', 9: 'StableDiffusionInpaintPipeline'}
# Keys of a scheduler's JSON that describe training; the others describe one sampler.
_SCHEDULE = ('beta_end', 'beta_schedule', 'beta_start', 'num_train_timesteps', 'prediction_type',
             'rescale_betas_zero_snr', 'steps_offset', 'trained_betas')  # fmt: skip


def read(path: str | os.PathLike, variant: str | None = None) -> Checkpoint:
  """Reads a Stable Diffusion 1.x or 2.x folder, its tensors lazily.

  Args:
    path: the folder that holds `unet/`, `vae/`, `text_encoder/`, `scheduler/` and `tokenizer/`.
    variant: of the weight files: 'fp16', 'non_ema', ... The UNet must have it; other components
      fall back to their plain files, since hubs store only the UNet twice. None takes the plain
      files, or fp16 if there are no others.

  Raises:
    InputError: it is another kind of pipeline, or a file is missing or damaged.
  """
  path = Path(path)
  if not (path / 'unet').exists():
    raise InputError(f'{path}: is no checkpoint: it has no unet folder; give a diffusers folder.')
  _check_kind(path)
  configs = {part: storage.read_json(path / part / file, dict) for part, file in _CONFIGS.items()}
  for part, (_, wanted) in _CLASSES.items():
    kind = configs[part].get('_class_name', wanted)
    if kind != wanted:
      raise InputError(f'{path / part / "config.json"}: is a {kind}; only {wanted} is supported.')
  tensors = {}
  for part in COMPONENTS:
    stored, _ = read_tensors(_weight_file(path / part, part, variant))
    tensors[part] = names.normalized(stored, part)
  return Checkpoint(configs, tensors, tokenizer_files.read(path / 'tokenizer'), str(path))


def write(
  checkpoint: Checkpoint,
  path: str | os.PathLike,
  dtype: str = 'float32',
  variant: str | None = None,
  overwrite: bool = False,
) -> None:
  """Writes the folder that diffusers' `from_pretrained` loads; a failed write leaves nothing.

  Args:
    checkpoint: what to write; its scheduler becomes EulerAncestral with the same noise schedule.
    path: the folder, which may exist if it is empty.
    dtype: 'float32', 'float16' or 'bfloat16'.
    variant: None, or 'fp16' in the names of the weight files; then dtype must be 'float16'.
    overwrite: replace an older folder of this kind.

  Raises:
    InputError: the destination is taken, an argument is unknown, or a tensor does not fit `dtype`.
  """
  path = Path(path).resolve()
  float_dtype(dtype)
  if variant not in (None, 'fp16') or (variant == 'fp16' and dtype != 'float16'):
    raise InputError(f'variant {variant!r} with dtype {dtype}: only variant fp16 with dtype '
                     'float16 can be written, or no variant.')  # fmt: skip
  check_free(path, overwrite)
  with storage.replacing(path) as folder:
    folder.mkdir()
    for part in COMPONENTS:
      stem = _STEMS[part][0] + (f'.{variant}' if variant else '')
      tensors = names.normalized(checkpoint.tensors[part], part)
      ldm_names.to_ldm(tensors, part)  # refuses names that are not Stable Diffusion's
      (folder / part).mkdir()
      write_safetensors(folder / part / f'{stem}.safetensors', tensors, dtype)
    write_configs(checkpoint, folder)
    (folder / 'README.md').write_text(model_card(checkpoint, dtype, variant), encoding='utf-8')


def write_configs(checkpoint: Checkpoint, folder: str | os.PathLike) -> None:
  """Writes a folder without its weights, as `from_single_file(..., config=folder)` needs it."""
  folder = Path(folder)
  for part, config in _written_configs(checkpoint).items():
    _write_json(folder / part / _CONFIGS[part], config)
  _write_json(folder / 'model_index.json', _model_index(checkpoint))
  (folder / 'tokenizer').mkdir(exist_ok=True)
  for name, content in checkpoint.tokenizer.items():
    (folder / 'tokenizer' / name).write_bytes(content)


def check_free(path: Path, overwrite: bool) -> None:
  """Raises InputError if the destination is not empty, unless an older folder may be replaced."""
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not overwrite:
    storage.refuse_existing(path)
  if not (path / 'model_index.json').is_file():
    raise InputError(f'{path}: is not a diffusers folder, so it is not overwritten; remove it '
                     'yourself or choose another name.')  # fmt: skip


def _check_kind(path):
  if not (path / 'model_index.json').is_file():
    return
  index = storage.read_json(path / 'model_index.json', dict)
  kind = index.get('_class_name', 'unknown')
  # A missing component is listed as [null, null].
  present = {key: value[1] for key, value in index.items()
             if isinstance(value, list) and len(value) == 2 and value[1]}  # fmt: skip
  extra = [part for part in ('text_encoder_2', 'transformer', 'prior') if part in present]
  if extra or any(present.get(part) != wanted for part, (_, wanted) in _CLASSES.items()):
    raise InputError(f'{path / "model_index.json"}: this is a {kind}; only Stable Diffusion 1.x '
                     'and 2.x are supported (UNet2DConditionModel, AutoencoderKL and one '
                     'CLIPTextModel).')  # fmt: skip


def _weight_file(folder, part, variant):
  choices = [variant, None] if variant else [None, 'fp16']
  if variant and part == 'unet':
    choices = [variant]
  candidates = [file for choice in choices for file in _file_names(part, choice)]
  for file in candidates:
    if (folder / file).is_file():
      return folder / file
  if not folder.is_dir():
    raise InputError(f'{folder}: no such folder; a diffusers checkpoint has one per component.')
  raise InputError(f'{folder}: has no weights; expected {candidates[0]} (or {candidates[1]}, or a '
                   '.bin file).')  # fmt: skip


def _file_names(part, variant):
  safetensors, torch = _STEMS[part]
  infix = f'.{variant}' if variant else ''
  return [
    f'{safetensors}{infix}.safetensors',
    f'{safetensors}.safetensors.index{infix}.json',
    f'{torch}{infix}.bin',
    f'{torch}.bin.index{infix}.json',
  ]


def _written_configs(checkpoint) -> dict[str, dict[str, Any]]:
  configs = {part: dict(checkpoint.configs[part]) for part in COMPONENTS}
  for part in ('unet', 'vae'):
    configs[part] = {'_class_name': _CLASSES[part][1], **configs[part]}
  configs['text_encoder'] |= {'architectures': ['CLIPTextModel'], 'model_type': 'clip_text_model'}
  scheduler = checkpoint.configs['scheduler']
  keys = _SCHEDULE
  if scheduler.get('_class_name') == 'EulerAncestralDiscreteScheduler':
    keys += ('timestep_spacing',)
  schedule = {key: scheduler[key] for key in keys if key in scheduler}
  configs['scheduler'] = {'_class_name': 'EulerAncestralDiscreteScheduler', **schedule}
  return configs


def _pipeline(checkpoint):
  return _PIPELINES.get(checkpoint.configs['unet'].get('in_channels', 4), 'StableDiffusionPipeline')


def _model_index(checkpoint):
  return {
    '_class_name': _pipeline(checkpoint),
    '_diffusers_version': '0.35.0',
    'feature_extractor': [None, None],
    'requires_safety_checker': False,
    'safety_checker': [None, None],
    'scheduler': ['diffusers', 'EulerAncestralDiscreteScheduler'],
    'tokenizer': ['transformers', 'CLIPTokenizer'],
    **{part: list(kind) for part, kind in _CLASSES.items()},
  }


def _write_json(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def model_card(checkpoint: Checkpoint, dtype: str, variant: str | None = None) -> str:
  """The README.md of a written folder: its content, and how to run it in other programs."""
  pipeline = _pipeline(checkpoint)
  is_editor = pipeline == _PIPELINES[8]
  side = checkpoint.configs['unet'].get('sample_size', 64) * 2 ** (
    len(checkpoint.configs['vae'].get('block_out_channels', [1] * 4)) - 1
  )
  prediction = checkpoint.configs['scheduler'].get('prediction_type', 'epsilon')
  arguments = f'"PATH", torch_dtype=torch.{dtype}' + (f', variant="{variant}"' if variant else '')
  task, use = _EDITOR if is_editor else _TEXT_TO_IMAGE
  return _CARD.format(
    tag='image-to-image' if is_editor else 'text-to-image', task=task, pipeline=pipeline,
    arguments=arguments, use=use, dtype=dtype, prediction=prediction, side=side,
  )  # fmt: skip


_EDITOR = (
  'Edits an image by a written instruction (InstructPix2Pix, arXiv 2211.09800): its UNet takes 8\n'
  'channels, the noisy latents and the latents of the image to edit.',
  'edited = pipeline("make it snow", image=image, num_inference_steps=100,\n'
  '                  guidance_scale=7.5, image_guidance_scale=1.5).images[0]',
)
_TEXT_TO_IMAGE = (
  'Makes images from text (Stable Diffusion).',
  'image = pipeline("a red fox", num_inference_steps=50, guidance_scale=7.5).images[0]',
)
_CARD = """---
library_name: diffusers
pipeline_tag: {tag}
license: other
tags:
- stable-diffusion
- instruct-pix2pix
- jax
---

# Weights written by ip2p-jax

{task}

Weights are {dtype}, the UNet predicts `{prediction}`, images are about {side} pixels on a side.

## diffusers

```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained({arguments})
{use}
```

Start from text guidance 7.5 and image guidance 1.5. Raise text guidance, or lower image guidance
towards 1, if the image changes too little; do the opposite if it changes too much. diffusers turns
all guidance off when image guidance is below 1.

## A1111 and ComfyUI

These want one file: `ip2p convert FOLDER model.safetensors --to ldm --dtype float16`. A1111's
img2img tab shows an Image CFG Scale for a UNet of 8 channels; in ComfyUI use
InstructPixToPixConditioning with DualCFGGuider.

## Licence

The weights keep the licence of the checkpoint that training started from (for Stable Diffusion 1.x,
CreativeML OpenRAIL-M) and the terms of the training data. No safety checker is included.
"""
