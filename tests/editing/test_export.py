"""Conversion end to end: PyTorch loads the export and makes the same image."""

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
from ip2p_jax.editing.editor import Editor
from ip2p_jax.editing.export import convert_checkpoint, run_verification
from ip2p_jax.errors import InputError
from ip2p_jax.weights import ldm_file

diffusers = peers.module('diffusers')
torch, transformers = peers.module('torch'), peers.module('transformers')


QUIET = {'verify': False, 'say': lambda _: None}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pipeline')
  tiny_models.write(folder / 'saved')
  return folder / 'saved'


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
  """Both formats, each with its stored edit, and the printed lines."""
  folder, lines = tmp_path_factory.mktemp('exported'), []
  convert_checkpoint(source, folder / 'folder', 'diffusers', say=lines.append)
  convert_checkpoint(source, folder / 'file.safetensors', 'ldm', say=lines.append)
  return folder, lines


@pytest.mark.long
@peers.needs_torch
def test_both_formats_give_the_same_image_in_pytorch(exported):
  folder, lines = exported
  assert (folder / 'file.safetensors.verify' / 'verify.py').is_file()
  verdicts = [line for line in lines if line.startswith('verify:')]
  assert len(verdicts) == 2
  assert all(line.startswith('verify: AGREES') for line in verdicts), verdicts


@pytest.mark.long
@peers.needs_torch
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


@peers.needs_torch
def test_an_export_that_fails_verification_is_an_error(source, tmp_path, monkeypatch):
  monkeypatch.setattr(
    'ip2p_jax.editing.export.run_verification', lambda _: (False, 'verify: DIFFERENT')
  )
  with pytest.raises(InputError, match='PyTorch does not confirm it: verify: DIFFERENT'):
    convert_checkpoint(source, tmp_path / 'out', say=lambda _: None)


@pytest.mark.long
@peers.needs_torch
def test_a_checkpoint_keeps_the_spacing_of_its_scheduler(tmp_path):
  tiny_models.write(tmp_path / 'saved', timestep_spacing='trailing')
  lines = []
  convert_checkpoint(tmp_path / 'saved', tmp_path / 'out', say=lines.append)
  assert lines[-1].startswith('verify: AGREES')


def test_a_name_that_ends_in_safetensors_means_one_file(source, tmp_path):
  convert_checkpoint(source, tmp_path / 'x.safetensors', **QUIET)
  assert (tmp_path / 'x.safetensors').is_file()
  with pytest.raises(InputError, match='diffusers needs a folder'):
    convert_checkpoint(source, tmp_path / 'y.safetensors', 'diffusers')


def test_the_originals_loader_finds_all_tensors(source, tmp_path):
  """It reads `state_dict`, and samples with averages, whose names are the weights' without dots."""
  lines = []
  convert_checkpoint(source, tmp_path / 'x.ckpt', say=lines.append)
  assert lines[-1].startswith('verify: AGREES'), lines
  loaded = torch.load(tmp_path / 'x.ckpt', map_location='cpu', weights_only=True)
  state = loaded['state_dict']
  assert all(isinstance(value, torch.Tensor) for value in state.values())
  assert isinstance(loaded['global_step'], int)
  # The names of the original's LitEma: the wrapper's parameters, and two counters.
  live = {name: value for name, value in state.items() if name.startswith('model.')}
  shadow = {
    'model_ema.' + name.removeprefix('model.').replace('.', ''): value
    for name, value in live.items()
  }
  averaged = {name: value for name, value in state.items() if name.startswith('model_ema.')}
  decay, updates = averaged.pop('model_ema.decay'), averaged.pop('model_ema.num_updates')
  assert (decay.dtype, updates.dtype) == (torch.float32, torch.int32)
  assert decay.shape == updates.shape == () and updates == 0
  assert averaged.keys() == shadow.keys()
  assert all(torch.equal(averaged[name], shadow[name]) for name in shadow)
  prefixes = {name.split('.')[0] for name in state}
  assert prefixes == {'model', 'model_ema', 'first_stage_model', 'cond_stage_model'}
  # Weights and averages are stored once, and we read the source back.
  size = sum(value.nbytes for name, value in state.items() if name[:9] != 'model_ema')
  assert (tmp_path / 'x.ckpt').stat().st_size < 1.2 * size
  actual, expected = weights.read(tmp_path / 'x.ckpt'), weights.read(source)
  for part in ('unet', 'vae', 'text_encoder'):
    tensors = actual.tensors[part]
    assert set(tensors) == set(expected.tensors[part])
    assert all(np.array_equal(tensors[x], y) for x, y in expected.tensors[part].items())
  assert actual.configs == expected.configs and actual.tokenizer == expected.tokenizer
  for dtype in ('float16', 'bfloat16'):
    convert_checkpoint(
      source, tmp_path / f'{dtype}.ckpt', 'original', dtype, verify=False, say=lines.append
    )
    half = torch.load(tmp_path / f'{dtype}.ckpt', weights_only=True)['state_dict']
    name = 'model.diffusion_model.out.2.weight'
    assert torch.equal(half[name], state[name].to(getattr(torch, dtype)))


def test_a_file_for_the_original_needs_torch_and_the_right_name(source, tmp_path, monkeypatch):
  with pytest.raises(InputError, match=r"the original's file must end in \.ckpt"):
    convert_checkpoint(source, tmp_path / 'x.safetensors', 'original')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(InputError, match=r'x\.ckpt: .*needs PyTorch; pip install torch'):
    convert_checkpoint(source, tmp_path / 'x.ckpt')
  assert not list(tmp_path.iterdir())


LEARNED = ['<cat-toy>', '<cat-toy>_1', 'S*']


@pytest.fixture(scope='module')
def inverted(tmp_path_factory):
  """A pipeline with textual inversion: tokens in the tokenizer, rows in the embedding."""
  folder = tmp_path_factory.mktemp('inverted')
  pipeline = reference.pipeline(folder=folder)
  pipeline.tokenizer.add_tokens(LEARNED)
  pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
  with torch.no_grad():
    pipeline.text_encoder.get_input_embeddings().weight[-3:].normal_()
  pipeline.save_pretrained(folder / 'saved')
  return folder / 'saved'


@pytest.mark.long
def test_learned_tokens_survive_conversion(inverted, tmp_path):
  expected, lines = weights.read(inverted), []
  convert_checkpoint(inverted, tmp_path / 'folder', say=lines.append)
  assert 'kept the learned tokens <cat-toy>, <cat-toy>_1, S*' in lines
  assert lines[-1].startswith('verify: AGREES'), lines  # its edit contains <cat-toy>
  settings = weights.files.read_tensors(tmp_path / 'folder' / 'verify.safetensors')[1]['settings']
  assert json.loads(settings)['instruction'].endswith('<cat-toy>')
  for name in ('file.safetensors', 'file.ckpt'):
    lines.clear()
    is_verified = name.endswith('.safetensors')  # the other differs only by its container
    convert_checkpoint(tmp_path / 'folder', tmp_path / name, verify=is_verified, say=lines.append)
    assert any('other tools take them for ordinary text' in line for line in lines)
    assert lines[-1].startswith('verify: AGREES') or not is_verified, lines
    convert_checkpoint(tmp_path / name, tmp_path / f'{name} back', verify=False, say=lines.append)
    back = weights.read(tmp_path / f'{name} back')
    assert back.tokenizer == weights.read(tmp_path / 'folder').tokenizer
    embedding = ldm_file.EMBEDDING
    assert np.array_equal(
      back.tensors['text_encoder'][embedding], expected.tensors['text_encoder'][embedding]
    )
    assert back.configs['text_encoder']['vocab_size'] == 603
  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / 'folder')
  text = 'a <cat-toy> in S*'
  theirs = pipeline.tokenizer(pipeline.maybe_convert_prompt(text, pipeline.tokenizer))['input_ids']
  ours = Editor.load(tmp_path / 'file.safetensors').tokenizer([text])[0]
  assert ours[: len(theirs)].tolist() == theirs and {600, 601, 602} <= set(theirs)


def test_other_tools_find_an_embedding_of_the_usual_size(inverted, tmp_path):
  convert_checkpoint(inverted, tmp_path / 'x.safetensors', **QUIET)
  tensors = load_file(tmp_path / 'x.safetensors')
  assert tensors[ldm_file.CLIP + ldm_file.EMBEDDING].shape == (600, 24)
  assert tensors[ldm_file.LEARNED].shape == (3, 24)


@pytest.mark.parametrize('option', [{'variant': 'fp16'}, {'prediction_type': 'epsilon'}])
def test_options_without_effect_on_adapters_are_refused(tmp_path, option):
  with pytest.raises(InputError, match=f'leave out {next(iter(option))}='):
    convert_checkpoint(tmp_path, tmp_path / 'x', 'lora', **option)


@peers.needs_torch
def test_a_config_without_defaults_converts(source, tmp_path):
  subprocess.run(['cp', '-r', source, tmp_path / 'short'], check=True)
  file = tmp_path / 'short' / 'vae' / 'config.json'
  config = json.loads(file.read_text())
  file.write_text(json.dumps({k: v for k, v in config.items() if k != 'latent_channels'}))
  lines = []
  convert_checkpoint(tmp_path / 'short', tmp_path / 'out', say=lines.append)
  assert lines[-1].startswith('verify: AGREES')


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path):
  limited = f'ulimit -f 20; exec {sys.executable} -m ip2p_jax.cli convert {source} {tmp_path}/out'
  result = subprocess.run(['bash', '-c', limited], capture_output=True, text=True)
  assert result.returncode == 2
  assert result.stderr.startswith('ip2p: error: ') and result.stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_files_of_a_killed_run_are_removed(source, tmp_path):
  for name in ('.out.tmp', f'.out.{"0" * 16}.tmp'):
    (tmp_path / name / 'unet').mkdir(parents=True)
  (tmp_path / '.out.safetensors.0123456789abcdef.tmp').touch()  # of a running process
  convert_checkpoint(source, tmp_path / 'out', **QUIET)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'out', '.out.safetensors.0123456789abcdef.tmp'}


def test_the_verification_needs_only_torch_and_diffusers(exported):
  folder, _ = exported
  script = (folder / 'folder' / 'verify.py').read_text()
  assert 'ip2p' not in script and 'jax' not in script.lower().replace('that jax made', '')


def test_a_half_precision_folder_loads_as_its_variant(source, tmp_path):
  convert_checkpoint(source, tmp_path / 'half', 'diffusers', 'float16', **QUIET)
  pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    tmp_path / 'half', variant='fp16'
  )
  original = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(source)
  for part in ('unet', 'vae', 'text_encoder'):
    actual, expected = (getattr(p, part).state_dict() for p in (pipeline, original))
    assert all((actual[name] == expected[name].half().float()).all() for name in expected)


def test_text_encoders_load_with_both_kinds_of_names(exported, source, tmp_path):
  """transformers 5 leaves `text_model.` out, 4 needs it. We write it, and read both."""
  folder, _ = exported
  names = load_file(folder / 'folder' / 'text_encoder' / 'model.safetensors').keys()
  assert all(name.startswith('text_model.') for name in names)
  reference.text_encoder(reference.TINY_TEXT).save_pretrained(tmp_path / 'theirs')
  saved = load_file(tmp_path / 'theirs' / 'model.safetensors').keys()
  assert not any(name.startswith('text_model.') for name in saved)  # written by transformers 5
  actual, info = transformers.CLIPTextModel.from_pretrained(
    folder / 'folder' / 'text_encoder', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  expected = transformers.CLIPTextModel.from_pretrained(source / 'text_encoder').state_dict()
  assert all((value == expected[name]).all() for name, value in actual.state_dict().items())


def test_there_and_back_again_is_byte_identical(exported, source, tmp_path):
  folder, _ = exported
  convert_checkpoint(folder / 'folder', tmp_path / 'a.safetensors', 'ldm', **QUIET)
  convert_checkpoint(tmp_path / 'a.safetensors', tmp_path / 'back', 'diffusers', **QUIET)
  for file in (folder / 'folder').rglob('*.safetensors'):
    if file.name != 'verify.safetensors':
      relative = file.relative_to(folder / 'folder')
      assert file.read_bytes() == (tmp_path / 'back' / relative).read_bytes(), relative


def test_a_text_to_image_checkpoint_converts_without_an_edit(tmp_path):
  config = {**reference.TINY_UNET, 'in_channels': 4}
  tiny_models.write(tmp_path / 'saved', config)
  lines = []
  convert_checkpoint(tmp_path / 'saved', tmp_path / 'out', say=lines.append)
  assert lines[-1] == 'no edit to verify: the UNet does not take an image'
  assert weights.read(tmp_path / 'out').configs['unet']['in_channels'] == 4


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_broken_weight_stops_the_conversion(source, tmp_path, value):
  subprocess.run(['cp', '-r', source, tmp_path / 'broken'], check=True)
  file = tmp_path / 'broken' / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = load_file(file)
  tensors['conv_out.bias'][1] = value
  save_file(tensors, file)
  with pytest.raises(InputError, match=r'conv_out\.bias'):
    convert_checkpoint(tmp_path / 'broken', tmp_path / 'out', say=lambda _: None)
  assert not (tmp_path / 'out').exists()


def test_the_command_has_help_with_examples():
  result = subprocess.run(
    [sys.executable, '-m', 'ip2p_jax.cli', 'convert', '--help'], capture_output=True, text=True
  )
  assert result.returncode == 0
  words = ' '.join(result.stdout.split())
  assert 'ip2p convert ip2p-folder instruct-pix2pix.safetensors --to ldm' in words
