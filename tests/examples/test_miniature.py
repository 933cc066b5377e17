"""The shipped miniature: what it can do, and that PyTorch has the same of it.

Scenes and phrasings are those that no training sees.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import oracle
import peers
import pytest
import reproduce
import torch_models
import train_clip
import train_vae
import world
from flax import nnx
from PIL import Image

from ip2p_jax import Editor, bundled
from ip2p_jax.editing.editor import Sampling

torch = peers.module('torch')
diffusers = peers.module('diffusers')
transformers = peers.module('transformers')

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / 'assets'
EDITOR, BASE, CLIP, WRITER = (
  ASSETS / f'miniature{part}' for part in ('', '-base', '-clip', '-writer')
)
SCALES = {'text_guidance': bundled.TEXT_GUIDANCE, 'image_guidance': bundled.IMAGE_GUIDANCE}


@pytest.fixture(scope='module')
def editor():
  return Editor.load(dtype='float32')


def held_out(count):
  """Examples, and their scenes as uint8 [count, 64, 64, 3]."""
  examples = [world.example(seed, 'test') for seed in range(count)]
  return examples, np.stack([world.picture(one.scene) for one in examples])


@pytest.mark.long
def test_of_32_held_out_edits_80_percent_are_done_in_90_seconds_of_two_cores():
  examples, scenes = held_out(32)
  instructions = [one.instruction for one in examples]
  began = time.process_time()  # of all threads
  edited = Editor.load().edit(
    scenes, instructions, steps=bundled.STEPS, sampler=bundled.SAMPLER, seed=0, **SCALES
  )
  seconds = time.process_time() - began
  verdicts = [oracle.judge(*pair) for pair in zip(examples, edited, strict=True)]
  found = oracle.summary(verdicts)
  assert found['done'] >= 0.8
  assert found['kept'] >= 25
  assert seconds <= 2 * 90


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1])
def test_pytorch_makes_the_same_pictures_within_2_of_255(editor, seed):
  one, noise = world.example(seed, 'test'), np.random.default_rng(seed)
  scene = world.picture(one.scene)[None]
  init_noise = noise.standard_normal((1, 16, 16, 4), np.float32)
  step_noise = noise.standard_normal((bundled.STEPS, 1, 16, 16, 4), np.float32)
  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    EDITOR, local_files_only=True
  )
  pipeline = pipeline.to(torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  _, expected = torch_models.run_edit(
    pipeline, scene, one.instruction, init_noise, step_noise,
    guidance_scale=bundled.TEXT_GUIDANCE, image_guidance_scale=bundled.IMAGE_GUIDANCE,
  )  # fmt: skip
  edit = editor.edit_arrays(
    scene, [one.instruction], Sampling(bundled.STEPS), **SCALES,
    init_noise=init_noise, step_noise=step_noise,
  )  # fmt: skip
  assert np.abs(np.asarray(edit.images, np.float32) - np.round(expected)).max() <= 2


@pytest.mark.long
def test_sample_py_edits_a_scene_without_naming_a_checkpoint(tmp_path):
  one = next(
    one
    for one in held_out(32)[0]
    if not one.is_new_phrasing and [edit.kind for edit in one.edits] == ['recolour']
  )
  Image.fromarray(world.picture(one.scene)).save(tmp_path / 'scene.png')
  command = [sys.executable, str(ROOT / 'sample.py'), '--input', 'scene.png', '--seed', '0']
  command += ['--edit', one.instruction, '--output', 'edited.png']
  environment = os.environ | {'XLA_FLAGS': '', 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert str(EDITOR) in done.stderr and '64 pixels' in done.stderr
  edited = np.asarray(Image.open(tmp_path / 'edited.png'))
  assert oracle.judge(one, edited).is_done


def test_transformers_finds_a_captions_picture_among_64_9_times_of_10():
  model, found = transformers.CLIPModel.from_pretrained(
    CLIP, local_files_only=True, output_loading_info=True
  )
  assert not found['missing_keys'] and not found['unexpected_keys']
  tokenizer = transformers.CLIPTokenizer.from_pretrained(CLIP, local_files_only=True)
  examples, scenes = held_out(64)
  captions = [one.caption for one in examples]
  pixels = np.moveaxis(train_clip.normalised(scenes), -1, 1)
  words = tokenizer(captions, padding='max_length', max_length=tokenizer.model_max_length)
  inputs = {'input_ids': torch.tensor(words.input_ids), 'pixel_values': torch.from_numpy(pixels)}
  with torch.no_grad():
    scores = model.float().eval()(**inputs).logits_per_text.numpy()
  assert (scores.argmax(1) == np.arange(64)).mean() >= 0.9


def test_the_autoencoder_gives_held_out_scenes_back_at_30_decibels(editor):
  @jax.jit
  def through(params, images):
    vae = nnx.merge(editor.networks.vae_def, params)
    return vae.decode(vae.encode(images).mode())

  pictures = train_vae.pictures(0, 64, 'test')
  assert train_vae.psnr(pictures, np.asarray(through(editor.params['vae'], pictures))) >= 30


def test_the_assets_are_small_and_have_a_model_card():
  folders = EDITOR, BASE, CLIP, WRITER
  sizes = [file.stat().st_size for each in folders for file in each.rglob('*') if file.is_file()]
  assert sum(sizes) <= 40e6
  assert max(sizes) <= 12 * 2**20
  assert all((folder / 'README.md').stat().st_size > 500 for folder in folders)


@pytest.mark.parametrize('folder', [EDITOR / 'tokenizer', BASE / 'tokenizer', CLIP], ids=str)
def test_transformers_reads_captions_and_instructions_as_the_same_tokens(editor, folder):
  theirs = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
  texts = [text for one in held_out(300)[0] for text in (one.caption, one.instruction)]
  texts += ['', 'Make it RED', "the circle's colour, 50%!", 'make it winter, été']
  words = theirs(texts, padding='max_length', max_length=editor.tokenizer.length, truncation=True)
  assert editor.tokenizer(texts).tolist() == words.input_ids
  assert not any(map(editor.tokenizer.cut_off, texts))


@pytest.mark.long
@peers.needs_torch
@pytest.mark.parametrize('name', ['export', 'export.safetensors'])
def test_pytorch_confirms_its_export(tmp_path, name):
  command = [sys.executable, '-m', 'ip2p_jax.cli', 'convert', str(EDITOR), str(tmp_path / name)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'verify: AGREES' in done.stdout + done.stderr


@pytest.mark.slow
def test_the_factory_goes_from_captions_to_a_score_and_on_where_it_was(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(reproduce, 'THRESHOLDS', reproduce.ALL)  # few steps draw nothing good
  size = reproduce.Size(4, 1, 2, 8, 2, 2, ('factory', 'exact'))
  reproduce.main(tmp_path, size)
  table = (tmp_path / 'table.md').read_text()
  assert '| factory |' in table and '| exact |' in table
  assert 'sentences of the world: 4 of 4' in capfd.readouterr().out
  reproduce.main(tmp_path, size)
  assert '==' not in capfd.readouterr().out  # nothing is run again
  assert (tmp_path / 'table.md').read_text() == table
  with pytest.raises(SystemExit, match='at another size'):
    reproduce.main(tmp_path, size._replace(samples=2))
