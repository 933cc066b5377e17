"""The table of methods, and the plain ones."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import method_models
import numpy as np
import pytest
import world

from ip2p_jax import sharding
from ip2p_jax.diffusion import samplers
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import sdedit
from ip2p_jax.evaluation.methods import prompt_to_prompt, table
from ip2p_jax.evaluation.methods.method import Texts, request
from ip2p_jax.pipeline.text_to_image import TextToImage


def test_identity_changes_nothing():
  photos = method_models.photos(2)
  edits = table.method('identity', None)(photos, method_models.texts(2))
  np.testing.assert_array_equal(edits, photos)


@pytest.mark.parametrize('name', ['sdedit-caption', 'sdedit-instruction'])
def test_sdedit_reads_its_text(name, monkeypatch):
  calls = []
  monkeypatch.setattr(sdedit, 'edit', lambda *args, **options: calls.append((args, options)))
  photos, texts = method_models.photos(2), method_models.texts(2)
  table.method(name, 'model', strength=0.5, steps=4)(photos, texts)
  expected = texts.edited_captions if name == 'sdedit-caption' else texts.instructions
  assert calls[0][0][2] == expected
  settings = {'strength': 0.5, 'steps': 4, 'text_guidance': 7.5}
  assert calls[0][1] == settings | {'seed': texts.seeds, 'indices': [0, 0]}


@pytest.mark.long
def test_sdedit_without_noise_is_the_autoencoder_alone():
  model, photos, texts = method_models.base(), method_models.photos(2), method_models.texts(2)
  seen = table.method('vae', model)(photos, texts)
  edits = sdedit.edit(model, photos, texts.edited_captions, strength=0.0, text_guidance=7.5)
  np.testing.assert_allclose(edits.astype(int), seen, atol=1)


@pytest.mark.parametrize('name', table.METHODS)
def test_every_method_has_its_settings(name):
  entry = table.METHODS[name]
  assert set(entry.reads) <= set(Texts._fields)
  settings = table.settings_of(name)
  assert (settings is not None) == entry.has_settings
  if settings is not None:
    assert table.settings_of(name, steps=7).steps == 7


def test_unknown_names_are_refused():
  with pytest.raises(InputError, match="method is 'magic'"):
    table.settings_of('magic')
  with pytest.raises(InputError, match='depth is no setting of the method direct; its settings'):
    table.settings_of('direct', depth=2)
  with pytest.raises(InputError, match='steps is no setting of the method vae; it has none'):
    table.method('vae', None, steps=2)


def test_a_caption_for_each_image_is_needed():
  edit = table.method('edit-friendly', method_models.base())
  with pytest.raises(InputError, match='1 captions for 2 images; give one each'):
    edit(method_models.photos(2), method_models.texts(1))


def test_the_table_of_names_imports_no_jax():
  code = 'import sys, ip2p_jax.evaluation.methods.table; assert "jax" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True)


@functools.cache
def miniature():
  """The miniature's drawing model, two of its scenes and their texts."""
  folder = Path(__file__).parents[2] / 'assets' / 'miniature-base'
  examples = [world.example(seed, 'test') for seed in range(2)]
  captions = [example.caption for example in examples]
  model = TextToImage.load(folder, 'float32')
  model.mesh = sharding.make_mesh(devices=jax.devices()[:1])
  scenes = np.stack([world.picture(example.scene) for example in examples])
  return model, scenes, Texts(captions, captions, captions, [0, 1])


def psnr(images, others):
  """In dB, [N]."""
  error = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
  return 10 * np.log10(255**2 / error)


@pytest.mark.long
def test_equal_captions_keep_a_scene_as_the_autoencoder_does():
  model, scenes, texts = miniature()
  best = psnr(table.method('vae', model)(scenes, texts), scenes)
  same = {'source_guidance': 3.5, 'target_guidance': 3.5}
  edits = table.method('edit-friendly', model, steps=10, skip=3, **same)(scenes, texts)
  assert (psnr(edits, scenes) >= best - 0.5).all()


@pytest.mark.long
def test_direct_inversion_draws_a_scene_as_the_autoencoder_does():
  model, scenes, texts = miniature()
  grid = samplers.noise_levels(model.networks.schedule, 'ddim', 10)
  control = prompt_to_prompt.controls(model.tokenizer, texts, prompt_to_prompt.Settings(10))
  given = request(model, scenes, texts, grid, np.float32(7.5), control)
  pairs = functools.partial(prompt_to_prompt.pairs, prompt_to_prompt.own_path, model.networks)
  drawn = np.asarray(jax.jit(pairs)(model.params, given).images) * 255
  best = psnr(table.method('vae', model)(scenes, texts), scenes)
  assert (psnr(drawn[0], scenes) >= best - 0.5).all()
