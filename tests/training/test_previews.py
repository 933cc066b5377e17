"""Previews: the contents of the image, against diffusers, and a single compilation."""

import logging

import jax
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference

from ip2p_jax import sharding
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.diffusion import noise
from ip2p_jax.editing.editor import Editor, Sampling
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline.networks import networks_of, params_of
from ip2p_jax.training.previews import latent_examples, make_preview

torch = peers.module('torch')
diffusers, transformers = peers.module('diffusers'), peers.module('transformers')

TOKENIZER = ClipTokenizer(reference.tokenizer_files(), 77, 600)
SCHEDULER = {
  'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear', 'steps_offset': 1
}  # fmt: skip
INSTRUCTIONS = ('make it winter', 'add a dog to the left of the tree, and let it look at the moon')


def load(checkpoint):
  networks = networks_of(checkpoint)
  return networks, params_of(checkpoint, networks, np.float32)


def checkpoint(in_channels):
  return tiny_models.checkpoint({**tiny_models.TINY_UNET, 'in_channels': in_channels})


def made_up(seed, instruction):
  images = np.random.default_rng(seed).integers(0, 256, (2, 32, 32, 3), np.uint8)
  return {'instruction': instruction, 'input': images[0], 'edited': images[1]}


EXAMPLES = [made_up(seed, instruction) for seed, instruction in enumerate(INSTRUCTIONS)]


@pytest.fixture(scope='module')
def editor():
  return load(checkpoint(8))


@pytest.fixture(scope='module')
def preview(editor):
  return make_preview(editor[0], TOKENIZER, EXAMPLES, steps=2, seed=3)


def holds(sheet, image):
  """Whether the sheet shows the image somewhere, pixel by pixel."""
  sheet = np.asarray(sheet)
  corners = np.argwhere((sheet == image[0, 0]).all(-1))
  return any(np.array_equal(sheet[y : y + 32, x : x + 32], image) for y, x in corners)


@pytest.mark.long
def test_a_row_shows_input_target_and_edit(editor, preview, monkeypatch):
  edits, edit_arrays = [], Editor.edit_arrays

  def recorded(self, images, instructions, sampling, **options):
    np.testing.assert_array_equal(images, [example['input'] for example in EXAMPLES])
    assert (tuple(instructions), sampling) == (INSTRUCTIONS, Sampling(2))
    assert options == {'seeds': 3, 'text_guidance': 7.5, 'image_guidance': 1.5}
    edits.append(edit_arrays(self, images, instructions, sampling, **options))
    return edits[-1]

  monkeypatch.setattr(Editor, 'edit_arrays', recorded)
  sheet = preview(editor[1])
  for example, edit in zip(EXAMPLES, np.asarray(edits[0].images), strict=True):
    assert holds(sheet, example['input'])
    assert holds(sheet, example['edited'])
    assert holds(sheet, edit)
    assert not holds(sheet, 255 - edit)


def test_later_previews_show_other_weights_and_compile_nothing(editor, preview, caplog):
  params = editor[1]
  first = preview(params)
  other = {**params, 'unet': jax.tree.map(lambda leaf: np.asarray(leaf) * 0.5, params['unet'])}
  with caplog.at_level(logging.WARNING), jax.log_compiles():
    second = preview(other)
  assert np.any(np.asarray(first) != np.asarray(second))
  assert not [record for record in caplog.records if 'Compiling' in record.message]


@pytest.mark.slow
def test_parameters_may_be_on_many_devices(editor, preview):
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
  replicated, split = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)) for axis in (None, 'fsdp')
  )
  place = lambda leaf: jax.device_put(leaf, replicated if leaf.shape[0] % 8 else split)
  apart = preview(jax.tree.map(place, editor[1]))
  together = preview(editor[1])
  assert np.abs(np.asarray(apart, np.int32) - np.asarray(together, np.int32)).max() <= 1


@pytest.mark.long
def test_a_text_to_image_preview_agrees_with_diffusers(tmp_path):
  networks, params = load(checkpoint(4))
  keys = noise.image_keys(np.full(2, 5), np.arange(2))
  init_noise = noise.initial_noise(keys, (8, 8, 4))
  step_noise = [noise.step_noise(keys, i, (8, 8, 4)) for i in range(4)]
  for name, content in reference.tokenizer_files().items():
    (tmp_path / name).write_bytes(content)
  pipeline = diffusers.StableDiffusionPipeline(
    **reference.models_of(checkpoint(4)),
    tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path),
    scheduler=diffusers.EulerAncestralDiscreteScheduler(**SCHEDULER),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  with torch.no_grad(), reference.given_noise(step_noise):
    theirs = pipeline(
      list(INSTRUCTIONS), height=32, width=32, num_inference_steps=4, guidance_scale=7.5,
      latents=reference.nchw(init_noise), output_type='np',
    ).images  # fmt: skip
  mesh = sharding.make_mesh(devices=jax.devices()[:3])  # two of which make the same
  params = jax.device_put(params, sharding.replicated(mesh))
  sheet = make_preview(networks, TOKENIZER, EXAMPLES, steps=4, seed=5, mesh=mesh)(params)
  theirs = np.round(255 * theirs)
  ours = [crop(sheet, example['edited']) for example in EXAMPLES]
  for mine, other in zip(ours, theirs, strict=True):
    assert np.abs(mine - other).max() <= 1


def crop(sheet, target):
  """The image to the right of a target: it begins at the next column that is not white."""
  sheet = np.asarray(sheet, np.float32)
  corners = np.argwhere((sheet == target[0, 0]).all(-1))
  y, x = next((y, x) for y, x in corners if np.array_equal(sheet[y : y + 32, x : x + 32], target))
  x += 32
  x += int(np.argmax((sheet[y : y + 32, x:] != 255).any((0, 2))))
  return sheet[y : y + 32, x : x + 32]


def test_rows_of_latents_become_examples(editor, rng):
  networks, params = editor
  means = rng.standard_normal((2, 2, 1, 2, 8, 8, 4)).astype(np.float16)
  token_ids = TOKENIZER(['Make it winter, 256 times', 'another'])
  rows = [
    LatentRow('row', token_ids, mean, edited, edited) for mean, edited in zip(*means, strict=True)
  ]
  examples = latent_examples(networks, params['vae'], TOKENIZER, rows)
  for example, mean, edited in zip(examples, *means, strict=True):
    latents = np.stack([mean[0, 0], edited[0, 0]]).astype(np.float32)
    with torch.no_grad():
      vae = reference.models_of(checkpoint(8))['vae']
      decoded = vae.decode(reference.nchw(latents)).sample
    theirs = 127.5 * (reference.nhwc(decoded).clip(-1, 1) + 1)
    assert np.abs(np.stack([example['input'], example['edited']]) - theirs).max() <= 0.51
    np.testing.assert_array_equal(TOKENIZER([example['instruction']]), token_ids[:1])


def test_rows_of_latents_without_input_are_captions(editor, rng):
  networks, params = editor
  mean = rng.standard_normal((1, 2, 8, 8, 4)).astype(np.float16)
  row = LatentRow('row', TOKENIZER(['a tree']), None, mean, mean)
  (example,) = latent_examples(networks, params['vae'], TOKENIZER, [row])
  assert example['instruction'] == 'a tree'
  assert sorted(example) == ['edited', 'instruction']
