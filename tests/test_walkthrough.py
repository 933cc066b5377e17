"""The README's walkthrough: from a folder of images to an editor in diffusers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import tiny_models
import tiny_pairs
import tiny_training as tiny
from PIL import Image

torch = peers.module('torch')
diffusers = peers.module('diffusers')

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with a checkpoint and a data set of twenty pairs."""
  place = tmp_path_factory.mktemp('walkthrough')
  tiny_models.write(place / 'checkpoint', tiny.ONE_LEVEL)
  tiny_pairs.write_metadata(place / 'my-pairs', 20)
  return place


def run(place, *argv):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(place / 'cache')}
  done = subprocess.run(
    [sys.executable, *map(str, argv)], cwd=place, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  'latents', [False, pytest.param(True, marks=pytest.mark.long)], ids=['images', 'latents']
)
def test_from_a_folder_of_pairs_to_an_edit_in_diffusers(place, latents):
  ip2p = '-m', 'ip2p_jax.cli'
  data, workdir, exported = (f'{name}-{latents}' for name in ('packed', 'run', 'exported'))
  assert '20 train rows' in run(place, *ip2p, 'check', 'my-pairs')
  options = ['--latents', '--ckpt', 'checkpoint'] if latents else []
  packed = run(place, *ip2p, 'pack', 'my-pairs', data, '--size', 32, '--holdout', 0.1, *options)
  assert '18 train, 2 validation rows' in packed
  output = run(
    place, ROOT / 'train.py', f'--config={ROOT / "configs" / "tiny.py"}', f'--workdir={workdir}',
    '--config.checkpoint=checkpoint', f'--config.data.path={data}', '--config.resolution=32',
    '--config.steps=10',
  )  # fmt: skip
  assert 'validation loss' in output and 'done: 10 steps' in output
  assert list((place / workdir / 'previews').glob('*.png'))
  verdict = 'AGREES' if peers.HAS_TORCH else 'verify.py'
  assert verdict in run(place, *ip2p, 'convert', workdir, exported)

  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    place / exported, local_files_only=True
  )
  image = Image.open(place / 'my-pairs' / 'pictures' / '0_input.jpg').resize((64, 64))
  edited = pipeline(
    tiny_pairs.instruction(0),
    image,
    num_inference_steps=2,
    generator=torch.Generator().manual_seed(0),
  ).images[0]
  assert edited.size == (64, 64) and np.asarray(edited).std() > 0
