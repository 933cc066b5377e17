"""PyTorch reference models with random normal weights, tiny or full size, and their conversion."""

import contextlib
import math

import jax
import numpy as np
import peers
import pytest
import tiny_models
from PIL import Image
from tiny_models import TINY_TEXT as TINY_TEXT
from tiny_models import TINY_UNET as TINY_UNET
from tiny_models import TINY_VAE as TINY_VAE
from tiny_models import TINY_VISION as TINY_VISION
from tiny_models import tokenizer_files as tokenizer_files

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.layers import abstract
from ip2p_jax.weights import names

torch, diffusers, transformers = map(peers.module, ('torch', 'diffusers', 'transformers'))

SD15_UNET = {'in_channels': 8, 'cross_attention_dim': 768, 'sample_size': 64}
SD21_UNET = {
  'in_channels': 4,
  'cross_attention_dim': 1024,
  'attention_head_dim': [5, 10, 20, 20],
  'use_linear_projection': True,
  'upcast_attention': True,
  'sample_size': 96,
}
SD_VAE = {
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
CLIP_L_TEXT = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'projection_dim': 768,
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
  return randomize(diffusers.UNet2DConditionModel(**config))


def vae(config):
  return randomize(diffusers.AutoencoderKL(**config))


def text_encoder(config, has_projection=False):
  kind = 'CLIPTextModelWithProjection' if has_projection else 'CLIPTextModel'
  return randomize(getattr(transformers, kind)(transformers.CLIPTextConfig(**config)))


def vision_encoder(config):
  model = transformers.CLIPVisionModelWithProjection
  return randomize(model(transformers.CLIPVisionConfig(**config)))


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


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x) -> np.ndarray:
  return np.moveaxis(x.detach().numpy(), 1, -1)


def pipeline(unet_config=TINY_UNET, folder=None, **scheduler):
  """A small InstructPix2Pix pipeline of random weights; `folder` / 'saved' gets its files."""
  tiny_models.write(folder / 'saved', unet_config, **scheduler)
  return load_pipeline(folder / 'saved')


def load_pipeline(folder):
  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    folder, local_files_only=True
  )
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


@contextlib.contextmanager
def given_noise(step_noise):
  """Makes diffusers' stochastic schedulers draw these arrays [S, B, h, w, 4]."""
  schedulers, draws = diffusers.schedulers, iter(step_noise)
  with pytest.MonkeyPatch.context() as patch:
    for module in (schedulers.scheduling_euler_ancestral_discrete, schedulers.scheduling_lcm):
      patch.setattr(module, 'randn_tensor', lambda *_, **__: nchw(next(draws)))
    yield


@contextlib.contextmanager
def noisy_image(init_noise):
  """Makes diffusers' img2img add this noise [B, h, w, 4] to the mode of the posterior."""
  pipelines = diffusers.pipelines.stable_diffusion
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      pipelines.pipeline_stable_diffusion_img2img, 'randn_tensor', lambda *_, **__: nchw(init_noise)
    )
    patch.setattr(
      diffusers.models.autoencoders.vae, 'randn_tensor', lambda shape, **_: torch.zeros(shape)
    )
    yield


def scheduler(sampler, schedule=Schedule(), **options):
  """diffusers' scheduler for a sampler, with its default spacing."""
  kind = {
    'euler_ancestral': diffusers.EulerAncestralDiscreteScheduler,
    'euler': diffusers.EulerDiscreteScheduler,
    'heun': diffusers.HeunDiscreteScheduler,
    'ddim': diffusers.DDIMScheduler,
    'dpmpp_2m': diffusers.DPMSolverMultistepScheduler,
    'lcm': diffusers.LCMScheduler,
  }[sampler]
  config = schedule.to_json()
  if 'timestep_spacing' not in options:
    del config['timestep_spacing']  # so that each takes its default
  return kind.from_config(config | options)


def models_of(checkpoint):
  """The PyTorch models of a small checkpoint, by component."""
  modules = {
    'unet': diffusers.UNet2DConditionModel(**checkpoint.configs['unet']),
    'vae': diffusers.AutoencoderKL(**checkpoint.configs['vae']),
    'text_encoder': transformers.CLIPTextModel(transformers.CLIPTextConfig(**TINY_TEXT)),
  }
  return {name: loaded(model, checkpoint.tensors[name]) for name, model in modules.items()}


def loaded(model, tensors):
  """The model with these weights, under either of transformers' names of CLIP's."""
  own = model.state_dict()
  by_name = {name if name in own else name.removeprefix('text_model.'): torch.from_numpy(value)
             for name, value in tensors.items()}  # fmt: skip
  result = model.load_state_dict(by_name, strict=False)
  assert not result.unexpected_keys
  assert all('position_ids' in name for name in result.missing_keys)
  return model.eval()


def checkpoint(unet_config, schedule=Schedule()):
  """A small checkpoint of random weights, and its PyTorch models."""
  result = tiny_models.checkpoint(unet_config, schedule)
  return result, models_of(result)


def run_edit(pipeline, photo, instruction, init_noise, step_noise, **options):
  """(scaled latents, pixels in 0..255) of diffusers' pipeline, both NHWC."""
  with torch.no_grad(), given_noise(step_noise):
    latents = pipeline(
      instruction,
      image=[Image.fromarray(image) for image in photo],
      num_inference_steps=len(step_noise),
      latents=nchw(init_noise),
      output_type='latent',
      **options,
    ).images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
  return nhwc(latents), 255 * (nhwc(decoded) / 2 + 0.5).clip(0, 1)
