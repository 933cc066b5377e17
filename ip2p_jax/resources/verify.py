"""Repeats a stored edit in PyTorch and compares the results: is the checkpoint intact?

  pip install torch diffusers transformers
  python verify.py

Needs nothing else. verify.safetensors, beside this file, holds a small image, its noise, and the
latents and pixels that JAX made from them with these weights. Exit status 1 if PyTorch differs.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduling
from PIL import Image
from safetensors import safe_open

HERE = pathlib.Path(__file__).resolve().parent
LATENTS_TOLERANCE = 1e-3  # relative, in float32
PIXEL_TOLERANCE = 1  # of 255, in float32


def load(settings, dtype):
  """The pipeline, from this folder or from the single file beside it."""
  pipeline = StableDiffusionInstructPix2PixPipeline
  quiet = {'safety_checker': None, 'requires_safety_checker': False}
  if settings['file']:
    file = HERE.parent / settings['file']
    result = pipeline.from_single_file(file, config=str(HERE), torch_dtype=dtype, **quiet)
  else:
    variant = settings['variant']
    result = pipeline.from_pretrained(HERE, torch_dtype=dtype, variant=variant, **quiet)
  config = result.scheduler.config
  result.scheduler = EulerAncestralDiscreteScheduler.from_config(config)
  return result


def main():
  form = argparse.RawTextHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
  parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
  parser.add_argument('--dtype', default='float32', choices=['float32', 'float16', 'bfloat16'])
  flags = parser.parse_args()

  with safe_open(HERE / 'verify.safetensors', 'pt') as file:
    stored = {name: file.get_tensor(name) for name in file.keys()}
    settings = json.loads(file.metadata()['settings'])
  pipeline = load(settings, getattr(torch, flags.dtype)).to(flags.device)
  pipeline.set_progress_bar_config(disable=True)

  expected = stored['token_ids'].tolist()
  # A learned token of several vectors becomes several tokens, as in the pipeline.
  text = pipeline.maybe_convert_prompt(settings['instruction'], pipeline.tokenizer)
  ids = pipeline.tokenizer(text, padding='max_length', max_length=len(expected)).input_ids
  if ids != expected:
    sys.exit('verify: DIFFERENT: the tokenizer gives other token ids')

  # The scheduler draws its noise by this function; give it the stored noise, step by step.
  noise = iter(stored['step_noise'])
  scheduling.randn_tensor = lambda shape, **where: next(noise).to(where['device'], where['dtype'])
  with torch.no_grad():
    latents = pipeline(
      settings['instruction'],
      image=Image.fromarray(stored['image'].numpy()),
      num_inference_steps=settings['steps'],
      guidance_scale=settings['text_guidance'],
      image_guidance_scale=settings['image_guidance'],
      latents=stored['init_noise'].to(flags.device, getattr(torch, flags.dtype)),
      output_type='latent',
    ).images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
  pixels = ((decoded.float().cpu()[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
  latents, expected = latents.float().cpu(), stored['latents']
  error = float(torch.linalg.norm(latents - expected) / torch.linalg.norm(expected))
  levels = int(np.abs(pixels.numpy() - stored['result'].numpy().astype(np.float32)).max())
  agrees = error <= LATENTS_TOLERANCE and levels <= PIXEL_TOLERANCE
  exact = flags.dtype == 'float32'
  verdict = ('AGREES' if agrees else 'DIFFERENT') if exact else 'not judged in half precision'
  print(
    f'verify: {verdict}: latents differ by {error:.1e} (relative), pixels by at most {levels} of'
    f' 255, after {settings["steps"]} steps in {flags.dtype} on {flags.device}'
  )
  sys.exit(exact and not agrees)


if __name__ == '__main__':
  main()
