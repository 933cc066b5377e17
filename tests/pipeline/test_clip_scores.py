"""CLIP's numbers are those of transformers' CLIPModel and the original's script."""

from pathlib import Path

import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference

from ip2p_jax.errors import InputError
from ip2p_jax.pipeline import clip_scores
from ip2p_jax.pipeline.clip_scores import Clip

torch, transformers = peers.module('torch'), peers.module('transformers')

MINIATURE = Path(__file__).parents[2] / 'assets' / 'miniature-clip'
COLOURS = ('red', 'blue', 'green', 'yellow', 'pink', 'white')
SHAPES = ('star', 'ring', 'circle', 'square')
CAPTIONS = ['a red star', 'two cats', 'a ring'], ['a blue star', 'two dogs', 'a heart']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  tiny_models.write_clip(folder, 32)
  return folder, Clip.load(folder)


def their_scores(model, images, ids):
  """The original's metrics/clip_similarity.py: squashed, bicubic, no antialias; then cosines."""
  unit = torch.nn.functional.normalize
  mean = torch.tensor(clip_scores.MEAN.ravel()).reshape(1, 3, 1, 1)
  std = torch.tensor(clip_scores.STD.ravel()).reshape(1, 3, 1, 1)
  images_embedded, texts_embedded = [], []
  with torch.no_grad():
    for image, tokens in zip(images, ids, strict=True):
      small = torch.nn.functional.interpolate(
        reference.nchw(np.float32(image) / 255), (32, 32), mode='bicubic', align_corners=False
      )
      tokens = torch.from_numpy(tokens).long()
      out = model(input_ids=tokens, pixel_values=(small - mean) / std)
      images_embedded.append(unit(out.image_embeds))
      texts_embedded.append(unit(out.text_embeds))
  cosine = torch.nn.functional.cosine_similarity
  return [
    cosine(images_embedded[0], texts_embedded[0]),
    cosine(images_embedded[1], texts_embedded[1]),
    cosine(images_embedded[1] - images_embedded[0], texts_embedded[1] - texts_embedded[0]),
    cosine(images_embedded[0], images_embedded[1]),
  ]


@pytest.mark.long
@pytest.mark.parametrize('shape', [(32, 32), (64, 64), (48, 80), (24, 20)])
def test_scores_are_those_of_the_original(model, shape, rng):
  folder, clip = model
  theirs = transformers.CLIPModel.from_pretrained(folder)
  images = rng.integers(0, 256, (2, 3, *shape, 3), np.uint8)
  scores = clip.scores(*images, *CAPTIONS)
  expected = their_scores(theirs, images, [clip.tokenizer(texts) for texts in CAPTIONS])
  for ours, theirs in zip(scores, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(('size', 'new_size'), [(64, 28), (28, 64), (512, 224), (5, 3)])
def test_resizing_is_that_of_torch(size, new_size, rng):
  image = rng.random((1, size, size + 3, 3), np.float32)
  theirs = torch.nn.functional.interpolate(
    reference.nchw(image), (new_size, new_size), mode='bicubic', align_corners=False
  )
  np.testing.assert_allclose(clip_scores.resize(image, new_size), reference.nhwc(theirs), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_unchanged_image_or_caption_has_no_direction(dtype, rng):
  """With the miniature's CLIP; before, rounding gave -0.46 to 0.45."""
  clip = Clip.load(MINIATURE, dtype)
  colours = rng.integers(0, 256, (2, 24, 4, 4, 3), np.uint8)
  before, after = colours.repeat(16, 2).repeat(16, 3)
  captions = [f'a {colour} {shape} on white' for colour in COLOURS for shape in SHAPES]
  edited = [*captions[1:], captions[0]]
  for images, texts in (
    ((before, before), (captions, edited)),
    ((before, after), (captions, captions)),
    ((before, before), (captions, captions)),
  ):
    np.testing.assert_array_equal(clip.scores(*images, *texts).clip_sim_dir, 0)
  assert (clip.scores(before, after, captions, edited).clip_sim_dir != 0).all()

  # Images that are equal after rounding to 8 bits.
  noisy = np.float32(np.stack([before, before])) / 255
  noisy[1] += 1e-6 * rng.standard_normal(noisy[1].shape, np.float32)
  ids = np.stack([clip.tokenizer(captions), clip.tokenizer(edited)])
  np.testing.assert_array_equal(clip._scores(clip.params, noisy, ids).clip_sim_dir, 0)
  noisy[1, 3] = np.nan
  assert np.isnan(clip._scores(clip.params, noisy, ids).clip_sim_dir).tolist() == [
    i == 3 for i in range(24)
  ]


def test_an_unchanged_image_has_similarity_1(model, rng):
  images = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
  scores = model[1].scores(images, images, *CAPTIONS)
  np.testing.assert_array_equal(scores.clip_sim_dir, 0)
  np.testing.assert_allclose(scores.clip_sim_image, 1, atol=1e-6)


def test_a_folder_without_clip_is_refused(tmp_path):
  with pytest.raises(InputError, match='no CLIP here'):
    Clip.load(tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(InputError, match='lacks text_config'):
    Clip.load(tmp_path)
