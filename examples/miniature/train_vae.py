"""Trains the miniature's autoencoder: 64 px pictures to 16 x 16 x 4 latents and back.

  python examples/miniature/train_vae.py out/miniature/vae

Prints the PSNR on scenes it never saw, and writes the weights in diffusers' layout.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import world
from fit import fit
from flax import nnx

from ip2p_jax import weights
from ip2p_jax.models.configs import VAEConfig
from ip2p_jax.models.vae import VAE
from ip2p_jax.weights import names

CONFIG = VAEConfig(
  block_out_channels=(16, 32, 64),
  layers_per_block=1,
  norm_num_groups=8,
  down_block_types=('DownEncoderBlock2D',) * 3,
  up_block_types=('UpDecoderBlock2D',) * 3,
  sample_size=world.SIDE,
)
JITTER = 3.0  # pixels; so that it can draw an object anywhere
KL_WEIGHT = 1e-4  # per latent, beside the mean error per colour value


def pictures(step: int, count: int, split: str = 'train') -> np.ndarray:
  """float32 [count, 64, 64, 3] in [-1, 1]; every other one is an edited scene."""
  shown = []
  for seed in range(step * count, (step + 1) * count):
    one = world.example(seed, split, JITTER)
    shown.append(world.picture(one.edited_scene if seed % 2 else one.scene))
  return np.stack(shown).astype(np.float32) / 127.5 - 1


def psnr(truth: np.ndarray, shown: np.ndarray) -> float:
  """Mean over pictures [N, 64, 64, 3] in [-1, 1], in decibels."""
  error = ((np.clip(shown, -1, 1) - truth) ** 2).mean((1, 2, 3))
  return float((10 * np.log10(4 / error)).mean())


def main(folder: Path, steps: int, batch_size: int) -> None:
  vae_def, params = nnx.split(VAE(CONFIG, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(params)
  held_out = pictures(0, 64, 'test')

  def loss(params, key, images):
    vae = nnx.merge(vae_def, params)
    posterior = vae.encode(images)
    latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
    error = vae.decode(latents) - images
    log_variance = posterior.log_variance
    kl = 0.5 * (posterior.mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    squared = (error**2).mean()
    return squared + 0.1 * jnp.abs(error).mean() + KL_WEIGHT * kl, {'squared': squared, 'kl': kl}

  @jax.jit
  def through(params, images):
    vae = nnx.merge(vae_def, params)
    latents = vae.encode(images).mode()
    return vae.decode(latents), latents

  check = lambda params: {'psnr': psnr(held_out, np.asarray(through(params, held_out)[0]))}
  params = fit(
    loss,
    params,
    lambda step: (pictures(step, batch_size),),
    folder,
    steps=steps,
    learning_rate=2e-3,
    check=check,
  )
  spread = float(through(params, held_out)[1].std())
  config = {**CONFIG.to_json(), 'scaling_factor': round(1 / spread, 5)}
  file = folder / 'diffusion_pytorch_model.safetensors'
  weights.write_safetensors(file, names.to_tensors(params))
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  print(
    f'wrote {folder}: {check(params)["psnr"]:.2f} dB on new scenes, latents spread {spread:.3f}'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--batch-size', type=int, default=16)
  arguments = parser.parse_args()
  main(arguments.folder, arguments.steps, arguments.batch_size)
