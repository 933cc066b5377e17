"""Scorers from files: their numbers are PyTorch's, and they say what they did."""

import hashlib

import jax
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference
import torch_scores
from PIL import Image

from ip2p_jax import sharding, weights
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import preprocessing, scorers
from ip2p_jax.evaluation.scorers import Batch
from ip2p_jax.pipeline import clip_scores

torch, transformers = peers.module('torch'), peers.module('transformers')

COUNT = 20
CAPTIONS = [f'{number} cats' for number in 'abcdefghijklmnopqrst']
EDITED = [f'{number} dogs' for number in 'tsrqponmlkjihgfedcba']
TOLERANCE = 1e-4  # relative


@pytest.fixture(scope='module')
def pairs():
  return images_of(np.random.default_rng(1), (64, 80))


def images_of(rng, size):
  """Random images and their changed copies, uint8 [20, H, W, 3]."""
  cells = rng.integers(0, 256, (2, COUNT, size[0] // 8, size[1] // 8, 3), np.uint8)
  images = cells.repeat(8, 2).repeat(8, 3)
  images[1] = (np.uint16(images[0]) * 3 + images[1]) // 4
  return images


@pytest.fixture(scope='module')
def kept():
  return np.float32(np.random.default_rng(2).random((COUNT, 64, 80, 1)) < 0.6)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def unit(images):
  return reference.nchw(np.float32(images) / 255)


def torch_resize(images, size, mode):
  return torch.nn.functional.interpolate(images, size, mode=mode, align_corners=False)


def normalised(images, mean, std):
  mean, std = (torch.tensor(np.float32(x).ravel())[:, None, None] for x in (mean, std))
  return (images - mean) / std


def pillow_crop(images, side, cut):
  """As torchvision resizes and crops Pillow's images, uint8 [B, cut, cut, 3]."""
  height, width = images.shape[1:3]
  short = min(height, width)
  size = tuple(side if x == short else side * x // short for x in (width, height))
  left, top = (round((x - cut) / 2) for x in size)
  return np.stack([
    Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    .crop((left, top, left + cut, top + cut))
    for image in images
  ])  # fmt: skip


def cosine(a, b):
  return torch.nn.functional.cosine_similarity(a, b).numpy()


def check_clip(folder, images, pixels, tokens, **options):
  """Our four cosines against transformers' of prepared `pixels` [2][B, 3, S, S]."""
  scorer = scorers.clip(folder, **options)
  scored = scorer.score(Batch(images[1], images[0], EDITED, CAPTIONS))
  model = transformers.CLIPModel.from_pretrained(folder)
  seen, read = [], []
  with torch.no_grad():
    for image, ids in zip(pixels, tokens, strict=True):
      image = normalised(image, clip_scores.MEAN, clip_scores.STD)
      out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=image)
      seen.append(torch.nn.functional.normalize(out.image_embeds))
      read.append(torch.nn.functional.normalize(out.text_embeds))
  theirs = {
    'clip_sim_0': cosine(seen[0], read[0]),
    'clip_sim_1': cosine(seen[1], read[1]),
    'clip_sim_dir': cosine(seen[1] - seen[0], read[1] - read[0]),
    'clip_sim_image': cosine(seen[0], seen[1]),
  }
  assert scored.keys() == theirs.keys()
  for name, ours in scored.items():
    assert reference.relative_error(ours, theirs[name]) < TOLERANCE, name
  return scorer


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
  return tiny_models.write_clip(tmp_path_factory.mktemp('clip'), 32)


def tokens_of(folder):
  tokenizer = clip_scores.Clip.load(folder).tokenizer
  return tokenizer(CAPTIONS), tokenizer(EDITED)


@pytest.mark.long
@peers.needs_torch
@pytest.mark.parametrize('original_range', [False, True])
def test_clip_is_that_of_transformers(clip_folder, pairs, original_range):
  pixels = [torch_resize(unit(images), (32, 32), 'bicubic') for images in pairs]
  if original_range:
    pixels = [x * 2 - 1 for x in pixels]
  tokens = tokens_of(clip_folder)
  scorer = check_clip(clip_folder, pairs, pixels, tokens, original_range=original_range)
  described = scorer.description
  assert described.model == 'CLIP ViT-24/8'
  assert 'squashed to 32x32' in described.preprocessing and '-0.75' in described.resize_filter
  assert described.quirks == (('input in -1..1',) if original_range else ())
  weights_file = (clip_folder / 'model.safetensors').read_bytes()
  assert described.sha256 == {'model.safetensors': hashlib.sha256(weights_file).hexdigest()}


@pytest.mark.long
@peers.needs_torch
def test_clip_takes_images_as_openai_does(clip_folder, pairs):
  pixels = [unit(pillow_crop(images, 32, 32)) for images in pairs]
  scorer = check_clip(clip_folder, pairs, pixels, tokens_of(clip_folder), prepare='crop')
  assert 'Pillow' in scorer.description.resize_filter


@peers.needs_torch
@pytest.mark.slow
@pytest.mark.parametrize('shape', ['B/32', 'L/14'])
def test_clip_of_full_size_is_that_of_transformers(shape, pairs, tmp_path):
  text, vision = {'hidden_size': 512}, {'projection_dim': 512}
  if shape == 'L/14':
    text, vision = reference.CLIP_L_TEXT, reference.CLIP_L_VISION
  small = {'vocab_size': 600, 'bos_token_id': 598, 'eos_token_id': 599}
  width = vision['projection_dim']
  config = transformers.CLIPConfig(
    text_config=text | small | {'projection_dim': width}, vision_config=vision, projection_dim=width
  )
  reference.randomize(transformers.CLIPModel(config)).save_pretrained(tmp_path)
  for name, content in tiny_models.tokenizer_files().items():
    (tmp_path / name).write_bytes(content)
  pixels = [torch_resize(unit(images), (224, 224), 'bicubic') for images in pairs]
  scorer = check_clip(tmp_path, pairs, pixels, tokens_of(tmp_path), mesh=one_device())
  assert scorer.description.model == f'CLIP ViT-{shape}'


@pytest.mark.long
def test_clip_scores_what_the_captions_allow(clip_folder, pairs):
  scorer = scorers.clip(clip_folder)
  references, edits = pairs
  all_four = scorer.score(Batch(edits, references, EDITED, CAPTIONS))
  without = scorer.score(Batch(edits, references))
  with_one = scorer.score(Batch(edits, references, EDITED))
  assert set(without) == {'clip_sim_image'}
  assert set(with_one) == {'clip_sim_image', 'clip_sim_1'}
  for name, score in with_one.items():
    np.testing.assert_allclose(score, all_four[name], rtol=1e-5)


def test_clip_compares_the_edited_region_with_the_caption(clip_folder, pairs):
  sources, edits = pairs
  kept = np.zeros((*edits.shape[:3], 1), np.float32)
  kept[:, :20] = 1
  kept[0] = 1  # nothing may change: no such score
  scorer = scorers.clip(clip_folder)
  scored = scorer.score(Batch(edits, sources, EDITED, CAPTIONS, kept))
  alone = scorer.score(Batch(np.uint8(edits * (1 - kept)), sources, EDITED, CAPTIONS))
  edited = scored.pop('clip_sim_1_edited')
  assert np.isnan(edited[0])
  np.testing.assert_allclose(edited[1:], alone['clip_sim_1'][1:], atol=1e-6)
  whole = scorer.score(Batch(edits, sources, EDITED, CAPTIONS))
  assert {name: [*value] for name, value in scored.items()} == {
    name: [*value] for name, value in whole.items()
  }  # fmt: skip


def test_references_may_have_another_size(clip_folder, pairs):
  scored = scorers.clip(clip_folder).score(Batch(pairs[1][:, :48], pairs[0]))
  assert scored['clip_sim_image'].shape == (COUNT,)


def write(file, tensors):
  """As `.safetensors`, or by torch.save as published."""
  if file.suffix == '.safetensors':
    weights.write_safetensors(file, tensors)
  else:
    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, file)
  return file


def check_dino(file, tensors, pairs, mesh=None):
  pixels = [unit(pillow_crop(images, 256, 224)) for images in pairs]
  pixels = [normalised(x, scorers.MEAN, scorers.STD) for x in pixels]
  with torch.no_grad():
    theirs = cosine(*(torch_scores.dino(tensors, x)[0] for x in pixels))
  scorer = scorers.dino(file, mesh=mesh)
  ours = scorer.score(Batch(pairs[1], pairs[0]))['dino']
  assert reference.relative_error(ours, theirs) < TOLERANCE
  return scorer


@pytest.mark.long
@peers.needs_torch
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_dino_is_that_of_pytorch(suffix, pairs, tmp_path, rng):
  tensors = torch_scores.dino_tensors(rng)
  scorer = check_dino(write(tmp_path / f'dino{suffix}', tensors), tensors, pairs)
  assert scorer.description.model == 'dino_vit12816'
  assert 'short side to 256, centre 224x224' in scorer.description.preprocessing


@peers.needs_torch
@pytest.mark.slow
def test_dino_of_full_size_is_that_of_pytorch(pairs, tmp_path, rng):
  tensors = torch_scores.dino_tensors(rng, width=384, depth=12)
  file = write(tmp_path / 'dino_deitsmall16_pretrain.pth', tensors)
  scorer = check_dino(file, tensors, pairs, one_device())
  assert scorer.description.model == 'dino_vits16'


@pytest.mark.long
@peers.needs_torch
@pytest.mark.parametrize('levels', [False, True])
@pytest.mark.parametrize('size', [(64, 64), (64, 80)], ids=str)
def test_structure_is_that_of_pytorch(levels, size, tmp_path, rng):
  tensors = torch_scores.dino_tensors(rng, width=64, grid=14)
  pairs = images_of(rng, size)
  longer = 224 * size[1] // size[0]
  keys = []
  with torch.no_grad():
    for images in pairs:
      pixels = torch_resize(unit(images), (224, longer), 'bilinear') * (255 if levels else 1)
      keys.append(torch_scores.dino(tensors, normalised(pixels, scorers.MEAN, scorers.STD))[1])
    theirs = torch_scores.structure_distance(*keys)
  scorer = scorers.structure(write(tmp_path / 'dino.pth', tensors), levels=levels)
  ours = scorer.score(Batch(pairs[1], pairs[0]))['structure']
  assert reference.relative_error(ours, theirs) < TOLERANCE
  assert scorer.description.quirks == (('colours in 0..255',) if levels else ())


@pytest.mark.long
@peers.needs_torch
@pytest.mark.parametrize('classifier', ['squeeze', 'alex'])
def test_lpips_is_that_of_pytorch(classifier, pairs, kept, tmp_path, rng):
  features = torch_scores.classifier_tensors(classifier, rng)
  lins = torch_scores.lin_tensors(classifier, rng)
  write(tmp_path / 'net.pth', features)
  write(tmp_path / f'{classifier}.pth', lins)
  scorer = scorers.lpips(tmp_path)
  ours = scorer.score(Batch(pairs[1], pairs[0], kept=kept))
  images = [unit(x) for x in pairs]
  masked = [x * reference.nchw(kept) for x in images]
  for name, both in (('lpips', images), ('lpips_kept', masked)):
    theirs = torch_scores.lpips(features, lins, *(x * 2 - 1 for x in both))
    np.testing.assert_allclose(ours[name], theirs.numpy(), rtol=TOLERANCE)
  assert scorer.description.model == f'LPIPS 0.1 {classifier}'
  assert set(scorer.description.sha256) == {'net.pth', f'{classifier}.pth'}


def test_pixels_are_scored_with_and_without_a_mask(pairs, kept):
  batch = Batch(pairs[1], pairs[0], kept=kept)
  plain, zeros = (scorers.pixels(masked_zeros=on).score(batch) for on in (False, True))
  assert set(plain) == {
    f'{name}{end}' for name in ('l1', 'l2', 'psnr', 'ssim') for end in ('', '_kept')
  }
  np.testing.assert_array_equal(plain['psnr'], zeros['psnr'])
  gain = -10 * np.log10(kept.mean((1, 2, 3)))
  np.testing.assert_allclose(zeros['psnr_kept'] - plain['psnr_kept'], gain, rtol=1e-4)


@pytest.mark.parametrize('masked_zeros', [False, True])
def test_a_mask_that_keeps_nothing_has_no_score(masked_zeros, pairs, tmp_path, rng):
  write(tmp_path / 'net.safetensors', torch_scores.classifier_tensors('squeeze', rng))
  write(tmp_path / 'lins.safetensors', torch_scores.lin_tensors('squeeze', rng))
  kept = np.ones((2, 32, 32, 1), np.float32)
  kept[1] = 0
  batch = Batch(pairs[1][:2, :32, :32], pairs[0][:2, :32, :32], kept=kept)
  mesh = one_device()
  both = scorers.pixels(masked_zeros=masked_zeros, mesh=mesh), scorers.lpips(tmp_path, mesh=mesh)
  for scorer in both:
    for name, score in scorer.score(batch).items():
      assert [*np.isnan(score)] == [False, name.endswith('_kept')], name


def test_floats_score_as_their_levels_do(pairs):
  scorer = scorers.pixels()
  as_levels = scorer.score(Batch(pairs[1], pairs[0]))
  as_floats = scorer.score(Batch(*(np.float32(x) / 255 for x in pairs[::-1])))
  for name, score in as_levels.items():
    np.testing.assert_allclose(as_floats[name], score, rtol=1e-6)


@pytest.mark.long
def test_devices_share_the_rows(clip_folder, pairs):
  """20 rows on 8 devices, and on one."""
  batch = Batch(pairs[1], pairs[0], EDITED, CAPTIONS)
  alone = one_device()
  for make in (
    lambda mesh: scorers.clip(clip_folder, mesh=mesh),
    lambda mesh: scorers.pixels(mesh=mesh),
  ):
    many, one = make(None).score(batch), make(alone).score(batch)
    for name, score in one.items():
      assert score.shape == (COUNT,)
      np.testing.assert_allclose(many[name], score, rtol=1e-4)


@pytest.mark.parametrize('size', [(64, 80), (300, 500), (31, 29), (48, 224)], ids=str)
def test_resizing_is_that_of_pillow(size, rng):
  images = rng.integers(0, 256, (2, *size, 3), np.uint8)
  ours = np.asarray(preprocessing.crop(64, 56).prepare(np.float32(images) / 255)) * 255
  difference = np.abs(ours - pillow_crop(images, 64, 56))
  assert difference.max() <= 1.001 and (difference > 0.01).mean() < 1e-3


def test_the_long_side_has_a_limit():
  assert preprocessing.shorter(512, 512, 224, 480) == (224, 224)
  assert preprocessing.shorter(300, 200, 224, 480) == (336, 224)
  assert preprocessing.shorter(100, 400, 224, 480) == (120, 480)


def test_wrong_files_are_refused(tmp_path, rng):
  lins = write(tmp_path / 'squeeze.safetensors', torch_scores.lin_tensors('squeeze', rng))
  with pytest.raises(InputError, match=r'squeeze\.safetensors: no DINO here'):
    scorers.dino(lins)
  with pytest.raises(InputError, match='lacks the features'):
    scorers.lpips(lins)
  net = write(tmp_path / 'net.safetensors', torch_scores.classifier_tensors('alex', rng))
  with pytest.raises(InputError, match=r'lacks lin0\.model\.1\.weight'):
    scorers.lpips(net)
  with pytest.raises(InputError, match='no weights here'):
    (tmp_path / 'empty').mkdir()
    scorers.lpips(tmp_path / 'empty')
  with pytest.raises(InputError, match='is in another file, too'):
    scorers.lpips(net, net)


def test_pixels_need_equal_sizes(pairs):
  with pytest.raises(InputError, match='references are 80x64, edits 80x48; resize the edits'):
    scorers.pixels().score(Batch(pairs[1][:, :48], pairs[0]))
