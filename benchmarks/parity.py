"""Prints how closely every network agrees with PyTorch, as a Markdown table.

  python benchmarks/parity.py            (small networks, half a minute)
  python benchmarks/parity.py --full     (full size: minutes, 12 GB of memory)
  python benchmarks/parity.py --language (small language models)
  python benchmarks/parity.py --train    (loss, gradients, optimizer; small networks)
  python benchmarks/parity.py --edit FOLDER --size 128      (a whole edit with that checkpoint)

Random normal weights, float32, the same inputs; relative error ||ours - theirs|| / ||theirs||. The
measurements are those of the tests, which hold them to 5e-5.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
sys.path.insert(0, str(Path(__file__).parent.parent / 'tests' / 'models'))
sys.path.insert(0, str(Path(__file__).parent.parent / 'tests' / 'training'))
import test_llama
import test_loss
import test_models as tests
import test_step
import tiny_models
import torch_models as reference
from diffusers import StableDiffusionInstructPix2PixPipeline

from ip2p_jax import Editor, Sampling
from ip2p_jax.editing.export import example_image


def measurements(is_full):
  """(what, relative error) one after the other."""
  rng = np.random.default_rng(0)
  if not is_full:
    yield 'UNet, small, 8 channels', tests.unet_error(reference.TINY_UNET, (8, 8), rng)
    yield 'VAE, small', max(tests.vae_errors(reference.TINY_VAE, (16, 24), rng))
    yield 'CLIP text, small', max(tests.text_errors(reference.TINY_TEXT, rng))
    yield 'CLIP vision, small', tests.vision_error(reference.TINY_VISION, rng)
    return
  sd15, sd21 = reference.SD15_UNET, reference.SD21_UNET
  yield 'UNet SD 1.5, 8 channels, 64x64 latents', tests.unet_error(sd15, (64, 64), rng, 301.7, 77)
  yield 'UNet SD 2.1, 64x64 latents', tests.unet_error(sd21, (64, 64), rng, 301.7, 77)
  mean, log_variance, sample, decoded = tests.vae_errors(reference.SD_VAE, (256, 256), rng)
  yield 'VAE encode, 256 px: mean', mean
  yield 'VAE encode, 256 px: log variance', log_variance
  yield 'VAE encode, 256 px: sample', sample
  yield 'VAE decode, 256 px', decoded
  states, embedding = tests.text_errors(reference.CLIP_L_TEXT, rng)
  yield 'CLIP ViT-L/14 text: states', states
  yield 'CLIP ViT-L/14 text: embedding', embedding
  yield 'CLIP ViT-L/14 vision', tests.vision_error(reference.CLIP_L_VISION, rng)
  yield 'CLIP ViT-B/32 vision', tests.vision_error(reference.CLIP_B32_VISION, rng)


def language_measurements():
  """(what, relative error) of the logits of a small language model of each kind."""
  rng = np.random.default_rng(0)
  for kind in test_llama.KINDS:
    pair = test_llama.Pair(kind)
    tokens = rng.integers(
      0, test_llama.tiny_llamas.VOCABULARY, (test_llama.B, test_llama.N), np.int32
    )
    yield (
      f'{kind}: logits',
      reference.relative_error(pair.run(pair.params, tokens), pair.logits(tokens)),
    )


def training_measurements():
  """(what, relative error) of one loss with its gradients, and of three whole steps."""
  models = test_loss.make_models()
  of_loss, of_gradients = test_loss.gradient_errors(
    models,
    test_loss.convert(tiny_models.checkpoint()),
    test_loss.make_batch(),
    test_loss.make_draws(),
  )
  yield 'loss of a step, from pictures', of_loss
  yield 'norm of its gradients', of_gradients.pop('norm')
  yield f'worst of its {len(of_gradients)} gradients', max(of_gradients.values())
  for what, error in test_step.errors_of_three_steps().items():
    yield f'three steps of AdamW: {what}', error


def edit_errors(folder, size, steps=10):
  """Of a whole edit at 7.5 and 1.5: latents (relative) and pixels (levels of 255)."""
  pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  editor = Editor.load(folder, 'float32')
  side = size // editor.networks.vae_config.factor
  noise = np.random.default_rng(0).standard_normal((steps + 1, 1, side, side, 4), np.float32)
  photo, text = example_image(size)[None], 'make it winter'
  scales = {'guidance_scale': 7.5, 'image_guidance_scale': 1.5}
  latents, pixels = reference.run_edit(pipeline, photo, text, noise[0], noise[1:], **scales)
  sampling = Sampling(steps)
  edit = editor.edit_arrays(photo, [text], sampling, init_noise=noise[0], step_noise=noise[1:])
  levels = np.abs(np.asarray(edit.images, np.float32) - np.round(pixels)).max()
  return reference.relative_error(edit.latents, latents), levels


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='networks of full size')
  parser.add_argument('--train', action='store_true', help='a training step')
  parser.add_argument('--language', action='store_true', help='language models')
  parser.add_argument('--edit', metavar='FOLDER', help='a diffusers folder to edit with')
  parser.add_argument('--size', type=int, default=64, help='of the edited picture, in pixels')
  arguments = parser.parse_args()
  jax.config.update('jax_default_matmul_precision', 'highest')
  if arguments.edit:
    error, levels = edit_errors(arguments.edit, arguments.size)
    print(f'10 steps at {arguments.size} px: latents {error:.1e}, pixels at most {levels:g} of 255')
    sys.exit()
  print('| what | relative error |\n|---|---|')
  if arguments.train:
    found = training_measurements()
  else:
    found = language_measurements() if arguments.language else measurements(arguments.full)
  for name, error in found:
    print(f'| {name} | {error:.1e} |', flush=True)
