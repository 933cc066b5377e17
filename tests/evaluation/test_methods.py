"""The table of methods, and the plain ones."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import method_models
import numpy as np
import pytest
import world

from ip2p_jax import sharding
from ip2p_jax.cli.evaluate import METHODS
from ip2p_jax.diffusion import samplers
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import sdedit
from ip2p_jax.evaluation.methods import prompt_to_prompt, table
from ip2p_jax.evaluation.methods.method import Texts, request
from ip2p_jax.evaluation.methods.text2live import TIMED, time_report
from ip2p_jax.evaluation.text2live import Edit, Text2Live
from ip2p_jax.models.unet import UNet
from ip2p_jax.pairs import inversion
from ip2p_jax.pipeline import parts
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


@pytest.mark.parametrize(('name', 'changes'), [
  ('identity', {}),
  ('vae', {}),
  ('sdedit-caption', {'steps': 7, 'strength': 0.5}),
  ('sdedit-caption', {'steps': 4, 'text_guidance': 1}),
  ('ddim', {'steps': 3}),
  ('direct', {'steps': 3}),
  ('null-text', {'steps': 3}),
  ('edit-friendly', {'steps': 5, 'skip': 2}),
  ('plug-and-play', {'steps': 3, 'inversion_steps': 7}),
])  # fmt: skip
def test_network_calls_are_those_that_a_method_makes(name, changes, monkeypatch):
  calls = []

  def stub(self, x, timestep, context, attention=None, remat=None):
    jax.debug.callback(lambda rows: calls.append(int(rows)), len(x))
    return 0.5 * x + 0 * context.mean()

  monkeypatch.setattr(UNet, '__call__', stub)
  monkeypatch.setattr(parts, 'scaled_latents', lambda *args: jnp.ones((2, 8, 8, 4)))
  monkeypatch.setattr(parts, 'decode', lambda *args: jnp.ones((2, 32, 32, 3)))
  monkeypatch.setattr(inversion, 'GOOD', -1.0)  # so that null-text never stops early
  model = method_models.base.__wrapped__()  # keeps no program that a test traced
  edit = table.method(name, model, **changes)
  edit(method_models.photos(2), method_models.texts(2))
  jax.effects_barrier()
  assert sum(calls) == 2 * table.network_calls(name, **changes)


def test_the_documented_network_calls_are_the_defaults():
  page = (Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text()
  lines = [line for line in page.splitlines() if line.startswith('| `')]
  for name in table.METHODS:
    (line,) = (line for line in lines if f'`{name}`' in line.split('|')[1])
    assert line.split('|')[-2].split()[-1] == f'{table.network_calls(name):,.0f}'


def test_unknown_names_are_refused():
  with pytest.raises(InputError, match="method is 'magic'"):
    table.settings_of('magic')
  with pytest.raises(InputError, match='depth is no setting of the method direct; its settings'):
    table.settings_of('direct', depth=2)
  with pytest.raises(InputError, match='steps is no setting of the method vae; it has none'):
    table.method('vae', None, steps=2)


def test_settings_of_another_kind_are_refused():
  for name, changes in (
    ('direct', {'steps': 2.5}),
    ('edit-friendly', {'drops_last': 1}),
    ('text2live', {'templates': 3}),
  ):
    with pytest.raises(InputError, match=f'the method {name} takes a value such as'):
      table.settings_of(name, **changes)
  assert table.settings_of('direct', guidance=2).guidance == 2


def test_a_base_is_given_where_it_is_needed():
  with pytest.raises(InputError, match='vae needs --base, a text-to-image checkpoint'):
    table.check_base('vae', None)
  with pytest.raises(InputError, match='text2live needs --base, the folder of a CLIPModel'):
    table.check_base('text2live', None)
  with pytest.raises(InputError, match='--base: of no use with --method identity'):
    table.check_base('identity', 'x')


def test_text2live_trains_for_one_image_after_the_other(monkeypatch):
  calls = []

  def trained(self, image, texts, seed, report):
    calls.append((texts, seed))
    report(TIMED[0], None)
    report(TIMED[1], None)
    return Edit(255 - image, np.float32(image))

  monkeypatch.setattr(Text2Live, '__init__', lambda *args: None)
  monkeypatch.setattr(Text2Live, 'edit', trained)
  photos, texts = method_models.photos(2), method_models.texts(2)
  edit = table.method('text2live', 'model', steps=20)
  np.testing.assert_array_equal(
    edit(photos, texts._replace(words=[('star', 'star'), None])), 255 - photos
  )
  caption, edited = texts.captions[0], texts.edited_captions[0]
  assert calls[0] == ((caption, edited, edited, 'star'), 7)
  assert calls[1] == ((texts.captions[1], *[texts.edited_captions[1]] * 2, ''), 8)


def test_text2live_says_once_how_long_it_takes(caplog):
  caplog.set_level('INFO')
  report = time_report(100)
  for _ in range(2):
    for step in range(20):
      report(step, {})
  assert [record.getMessage()[:22] for record in caplog.records] == ['text2live: 100 steps, ']


def test_text2live_needs_steps():
  with pytest.raises(InputError, match='steps is 0; use 1 or more'):
    table.method('text2live', None, steps=0)


def test_the_command_names_all_methods():
  assert set(METHODS.replace(' or ', ', ').split(', ')) == set(table.METHODS)


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
