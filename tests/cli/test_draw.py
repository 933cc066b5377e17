"""`ip2p draw`, from a text to files, and its error messages."""

import numpy as np
import pytest
import tiny_models
from PIL import Image, ImageCms

from ip2p_jax import weights
from ip2p_jax.images import read_settings


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('draw') / 'ckpt'
  weights.write(tiny_models.checkpoint(tiny_models.TINY_UNET | {'in_channels': 4}), folder)
  return folder


@pytest.fixture
def ip2p_draw(ip2p, checkpoint, tmp_path):
  """Runs the command with these words after small defaults: (status, output)."""

  def run(*words, text='a boat'):
    defaults = ('--ckpt', checkpoint, '-o', tmp_path / 'out.png', '--steps', 2, '--size', 32)
    return ip2p('draw', text, *defaults, *words)

  return run


@pytest.mark.long
def test_variations_are_files_with_their_settings(ip2p_draw, tmp_path):
  status, output = ip2p_draw('--num', 2, '--seed', 5, '--negative', 'fog', '--cfg-text', 4)
  assert status == 0 and 'seed 5' in output
  for n in range(2):
    with Image.open(tmp_path / f'out-{n}.png') as image:
      assert image.size == (32, 32)
    settings = read_settings(tmp_path / f'out-{n}.png')
    assert settings['seed'] == 5 + n and settings['text'] == 'a boat' and settings['init'] is None
    assert settings['cfg_text'] == 4 and settings['negative'] == 'fog' and settings['steps'] == 2


@pytest.mark.long
def test_an_image_drawn_from_another_has_its_size_and_profile(ip2p_draw, tmp_path, rng):
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  photo = Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8))
  photo.save(tmp_path / 'photo.png', icc_profile=profile, dpi=(300, 300))
  status, _ = ip2p_draw('--init', tmp_path / 'photo.png', '--seed', 1, '--strength', 0.5)
  assert status == 0
  with Image.open(tmp_path / 'out.png') as image:
    assert image.size == (56, 40) and image.info['icc_profile'] == profile
    assert round(image.info['dpi'][0]) == 300
  settings = read_settings(tmp_path / 'out.png')
  assert settings['init'] == str(tmp_path / 'photo.png') and settings['strength'] == 0.5


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--strength', 0.5), '--strength: of no use without --init'),
    (('--seed', 2**32 - 1, '--num', 2), 'goes past'),
    (('--sampler', 'magic'), 'sampler is'),
    (('--cfg-text', 1, '--negative', 'fog'), 'negative: of no use'),
    (('--size', 30), 'size is 30x30; sides must be multiples of 4'),
    (('-o', 'out.txt'), 'must end in one of'),
    (('--init', 'missing.png'), 'missing.png was not found'),
  ],
)
def test_a_mistake_is_one_sentence(ip2p_draw, words, message):
  status, output = ip2p_draw(*words)
  assert status == 2 and message in output and output.splitlines()[-1].startswith('ip2p: error: ')


def test_an_init_image_must_change_and_is_not_overwritten(ip2p_draw, tmp_path):
  Image.new('RGB', (32, 32)).save(tmp_path / 'out.png')
  status, output = ip2p_draw('--init', tmp_path / 'out.png')
  assert status == 2 and 'is the image of --init' in output
  Image.new('RGB', (32, 32)).save(tmp_path / 'photo.png')
  status, output = ip2p_draw('--init', tmp_path / 'photo.png', '--strength', 0.1)
  assert status == 2 and 'strength 0.1 leaves none of 2 steps' in output


def test_an_empty_text_is_refused(ip2p_draw):
  status, output = ip2p_draw(text=' ')
  assert status == 2 and 'the text is empty' in output
