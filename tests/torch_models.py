"""PyTorch reference models with random normal weights, small or full size, and their conversion."""

import contextlib
import json
import math

import diffusers
import jax
import numpy as np
import torch
from diffusers import (
  AutoencoderKL,
  EulerAncestralDiscreteScheduler,
  StableDiffusionInstructPix2PixPipeline,
  UNet2DConditionModel,
)
from transformers import (
  CLIPConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPTokenizer,
  CLIPVisionConfig,
  CLIPVisionModelWithProjection,
)

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.layers import abstract
from ip2p_jax.weights import Checkpoint, clip_tokenizer, names

TINY_UNET = {
  'in_channels': 8,
  'block_out_channels': [32, 64],
  'layers_per_block': 1,
  'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
  'cross_attention_dim': 24,
  'attention_head_dim': 4,
  'norm_num_groups': 8,
  'sample_size': 16,
}
SD15_UNET = {'in_channels': 8, 'cross_attention_dim': 768, 'sample_size': 64}
SD21_UNET = {
  'in_channels': 4,
  'cross_attention_dim': 1024,
  'attention_head_dim': [5, 10, 20, 20],
  'use_linear_projection': True,
  'upcast_attention': True,
  'sample_size': 96,
}
TINY_VAE = {
  'block_out_channels': [16, 32, 32],
  'down_block_types': ['DownEncoderBlock2D'] * 3,
  'up_block_types': ['UpDecoderBlock2D'] * 3,
  'layers_per_block': 1,
  'norm_num_groups': 8,
  'latent_channels': 4,
}
SD_VAE = {
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
TINY_TEXT = {
  'vocab_size': 600,
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'projection_dim': 20,
  'bos_token_id': 598,
  'eos_token_id': 599,
}
CLIP_L_TEXT = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'projection_dim': 768,
}
TINY_VISION = {
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'image_size': 32,
  'patch_size': 8,
  'projection_dim': 20,
}
CLIP_L_VISION = {
  'hidden_size': 1024,
  'intermediate_size': 4096,
  'num_hidden_layers': 24,
  'num_attention_heads': 16,
  'patch_size': 14,
  'projection_dim': 768,
}
CLIP_B32_VISION = {'projection_dim': 512}


def unet(config):
  return randomize(UNet2DConditionModel(**config))


def vae(config):
  return randomize(AutoencoderKL(**config))


def text_encoder(config, has_projection=False):
  model = CLIPTextModelWithProjection if has_projection else CLIPTextModel
  return randomize(model(CLIPTextConfig(**config)))


def vision_encoder(config):
  return randomize(CLIPVisionModelWithProjection(CLIPVisionConfig(**config)))


def randomize(model, seed=0):
  """Normal weights everywhere, norms and biases too, scaled so that activations stay near one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.normal_(generator=generator)
      if parameter.ndim > 1:
        parameter.mul_(1 / math.sqrt(parameter[0].numel()))
      else:
        parameter.mul_(0.1).add_(1.0 if 'norm' in name and name.endswith('weight') else 0.0)
  return model.eval()


def tensors(model) -> dict[str, np.ndarray]:
  return {name: value.numpy() for name, value in model.state_dict().items()}


def convert(model, make, component):
  """Our graphdef and parameters with the PyTorch model's weights."""
  graphdef, shapes = abstract(make)
  return graphdef, jax.device_put(names.to_params(tensors(model), shapes, component))


def relative_error(ours, theirs) -> float:
  ours = np.asarray(ours, np.float64)
  theirs = theirs.detach().numpy().astype(np.float64) if hasattr(theirs, 'detach') else theirs
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def nchw(x) -> torch.Tensor:
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x) -> np.ndarray:
  return np.moveaxis(x.detach().numpy(), 1, -1)


def tokenizer_files() -> dict[str, bytes]:
  """A CLIP tokenizer of 600 tokens: all bytes and the first merges of the real one."""
  full = clip_tokenizer()
  merges = full['merges.txt'].decode().splitlines()[:87]
  tokens = sorted(json.loads(full['vocab.json']).items(), key=lambda item: item[1])[:598]
  vocab = dict(tokens) | {'<|startoftext|>': 598, '<|endoftext|>': 599}
  return full | {
    'vocab.json': json.dumps(vocab).encode(),
    'merges.txt': '\n'.join([*merges, '']).encode(),
  }


def pipeline(
  unet_config=TINY_UNET, folder=None, **scheduler
) -> StableDiffusionInstructPix2PixPipeline:
  """A small InstructPix2Pix pipeline, random weights; `folder` gets the tokenizer's files."""
  for name, content in tokenizer_files().items():
    (folder / name).write_bytes(content)
  return StableDiffusionInstructPix2PixPipeline(
    unet=unet(unet_config),
    vae=vae(TINY_VAE),
    text_encoder=text_encoder(TINY_TEXT),
    tokenizer=CLIPTokenizer.from_pretrained(folder),
    scheduler=EulerAncestralDiscreteScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1, **scheduler
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )


@contextlib.contextmanager
def given_noise(step_noise):
  """Makes diffusers' Euler ancestral scheduler draw these arrays [S, B, h, w, 4]."""
  module = diffusers.schedulers.scheduling_euler_ancestral_discrete
  draws, original = iter(step_noise), module.randn_tensor
  module.randn_tensor = lambda *_, **__: nchw(next(draws))
  try:
    yield
  finally:
    module.randn_tensor = original


def write_clip(folder, image_size=64):
  """A CLIP of random weights, as transformers writes it; returns its model."""
  text, vision = TINY_TEXT, TINY_VISION | {'image_size': image_size}
  config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
  model = randomize(CLIPModel(config))
  model.save_pretrained(folder)
  for name, content in tokenizer_files().items():
    (folder / name).write_bytes(content)
  return model


def checkpoint(unet_config, schedule=Schedule()):
  """A small checkpoint of random weights, and the PyTorch models it is made of."""
  models = {
    'unet': unet(unet_config),
    'vae': vae(TINY_VAE),
    'text_encoder': text_encoder(TINY_TEXT),
  }
  configs = {name: model.config.to_dict() if name == 'text_encoder' else dict(model.config)
             for name, model in models.items()}  # fmt: skip
  configs['scheduler'] = schedule.to_json()
  parts = {name: tensors(model) for name, model in models.items()}
  return Checkpoint(configs, parts, tokenizer_files(), 'test'), models
