"""Conversion end to end: what we export, PyTorch loads and paints the same picture."""

import json
import subprocess
import sys

import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference
from safetensors.numpy import load_file, save_file

from ip2p_jax import weights
from ip2p_jax.convert import convert, run_verification
from ip2p_jax.errors import InputError

diffusers = peers.module('diffusers')
transformers = peers.module('transformers')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pipeline')
  tiny_models.write(folder / 'saved')
  return folder / 'saved'


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
  """Both formats, each with its stored edit, and what was said on the way."""
  folder, said = tmp_path_factory.mktemp('exported'), []
  convert(source, folder / 'folder', 'diffusers', say=said.append)
  convert(source, folder / 'file.safetensors', 'ldm', say=said.append)
  return folder, said


def test_both_formats_paint_the_same_picture_in_pytorch(exported):
  _, said = exported
  verdicts = [line for line in said if line.startswith('verify:')]
  assert len(verdicts) == 2
  assert all(line.startswith('verify: AGREES') for line in verdicts), verdicts


def test_the_verification_notices_a_changed_weight(exported, tmp_path):
  folder, _ = exported
  (tmp_path / 'copy').mkdir()
  subprocess.run(['cp', '-r', folder / 'folder', tmp_path], check=True)
  file = tmp_path / 'folder' / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = load_file(file)
  tensors['conv_in.bias'] = tensors['conv_in.bias'] + 0.1
  save_file(tensors, file)
  agrees, verdict = run_verification(tmp_path / 'folder')
  assert not agrees and verdict.startswith('verify: DIFFERENT')


def test_an_export_that_pytorch_does_not_confirm_is_an_error(source, tmp_path, monkeypatch):
  monkeypatch.setattr('ip2p_jax.convert.run_verification', lambda _: (False, 'verify: DIFFERENT'))
  with pytest.raises(InputError, match='PyTorch does not confirm it: verify: DIFFERENT'):
    convert(source, tmp_path / 'out', say=lambda _: None)


def test_a_checkpoint_keeps_the_spacing_of_its_own_scheduler(tmp_path):
  tiny_models.write(tmp_path / 'saved', timestep_spacing='trailing')
  said = []
  convert(tmp_path / 'saved', tmp_path / 'out', say=said.append)
  assert said[-1].startswith('verify: AGREES')


def test_a_name_that_ends_in_safetensors_means_one_file(source, tmp_path):
  convert(source, tmp_path / 'x.safetensors', verify=False, say=lambda _: None)
  assert (tmp_path / 'x.safetensors').is_file()
  with pytest.raises(InputError, match='diffusers wants a folder'):
    convert(source, tmp_path / 'y.safetensors', 'diffusers')


def test_a_config_that_leaves_out_defaults_converts(source, tmp_path):
  subprocess.run(['cp', '-r', source, tmp_path / 'short'], check=True)
  file = tmp_path / 'short' / 'vae' / 'config.json'
  config = json.loads(file.read_text())
  file.write_text(json.dumps({k: v for k, v in config.items() if k != 'latent_channels'}))
  said = []
  convert(tmp_path / 'short', tmp_path / 'out', say=said.append)
  assert said[-1].startswith('verify: AGREES')


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path):
  limited = f'ulimit -f 20; exec {sys.executable} -m ip2p_jax.cli convert {source} {tmp_path}/out'
  done = subprocess.run(['bash', '-c', limited], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith('ip2p: error: ') and done.stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_cleared_by_the_next(source, tmp_path):
  (tmp_path / '.out.tmp' / 'unet').mkdir(parents=True)
  convert(source, tmp_path / 'out', verify=False, say=lambda _: None)
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_the_verification_needs_torch_and_diffusers_alone(exported):
  folder, _ = exported
  script = (folder / 'folder' / 'verify.py').read_text()
  assert 'ip2p' not in script and 'jax' not in script.lower().replace('that jax made', '')


def test_a_half_precision_folder_loads_as_its_variant(source, tmp_path):
  convert(source, tmp_path / 'half', 'diffusers', 'float16', verify=False, say=lambda _: None)
  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    tmp_path / 'half', variant='fp16'
  )
  original = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(source)
  for part in ('unet', 'vae', 'text_encoder'):
    found, wanted = (getattr(p, part).state_dict() for p in (pipeline, original))
    assert all((found[name] == wanted[name].half().float()).all() for name in wanted)


def test_text_encoders_load_in_both_ways_of_naming(exported, source, tmp_path):
  """transformers 5 leaves `text_model.` out, 4 needs it: we write it, and read both."""
  folder, _ = exported
  names = load_file(folder / 'folder' / 'text_encoder' / 'model.safetensors').keys()
  assert all(name.startswith('text_model.') for name in names)
  reference.load_pipeline(source).save_pretrained(tmp_path / 'theirs')
  saved = load_file(tmp_path / 'theirs' / 'text_encoder' / 'model.safetensors').keys()
  assert not any(name.startswith('text_model.') for name in saved)  # what transformers 5 wrote
  found, info = transformers.CLIPTextModel.from_pretrained(
    folder / 'folder' / 'text_encoder', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  wanted = transformers.CLIPTextModel.from_pretrained(source / 'text_encoder').state_dict()
  assert all((value == wanted[name]).all() for name, value in found.state_dict().items())


def test_there_and_back_again_is_byte_identical(exported, source, tmp_path):
  folder, _ = exported
  quiet = {'verify': False, 'say': lambda _: None}
  convert(folder / 'folder', tmp_path / 'a.safetensors', 'ldm', **quiet)
  convert(tmp_path / 'a.safetensors', tmp_path / 'back', 'diffusers', **quiet)
  for file in (folder / 'folder').rglob('*.safetensors'):
    if file.name != 'verify.safetensors':
      relative = file.relative_to(folder / 'folder')
      assert file.read_bytes() == (tmp_path / 'back' / relative).read_bytes(), relative


def test_a_text_to_image_checkpoint_converts_but_has_no_edit_to_verify(tmp_path):
  config = {**reference.TINY_UNET, 'in_channels': 4}
  tiny_models.write(tmp_path / 'saved', config)
  said = []
  convert(tmp_path / 'saved', tmp_path / 'out', say=said.append)
  assert said[-1] == 'no edit to verify: the UNet does not take a picture'
  assert weights.read(tmp_path / 'out').configs['unet']['in_channels'] == 4


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_broken_weight_is_named_and_nothing_is_written(source, tmp_path, value):
  subprocess.run(['cp', '-r', source, tmp_path / 'broken'], check=True)
  file = tmp_path / 'broken' / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = load_file(file)
  tensors['conv_out.bias'][1] = value
  save_file(tensors, file)
  with pytest.raises(InputError, match=r'conv_out\.bias'):
    convert(tmp_path / 'broken', tmp_path / 'out', say=lambda _: None)
  assert not (tmp_path / 'out').exists()


def test_the_command_has_help_with_examples():
  done = subprocess.run(
    [sys.executable, '-m', 'ip2p_jax.cli', 'convert', '--help'], capture_output=True, text=True
  )
  assert done.returncode == 0
  assert 'ip2p convert ip2p-folder instruct-pix2pix.safetensors --to ldm' in ' '.join(
    done.stdout.split()
  )
