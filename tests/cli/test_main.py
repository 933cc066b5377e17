"""The command line, from files to files: results and error messages."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from PIL import Image
from safetensors.numpy import load_file, save_file

from ip2p_jax import bundled, defaults, weights
from ip2p_jax.cli import console
from ip2p_jax.cli.data import check
from ip2p_jax.cli.edit import edit as edit_command
from ip2p_jax.diffusion import samplers
from ip2p_jax.editing import image_files
from ip2p_jax.evaluation import protocols
from ip2p_jax.evaluation.methods import table
from ip2p_jax.images import read_settings
from ip2p_jax.weights import ldm_names
from ip2p_jax.weights.files import read_tensors


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pipeline')
  tiny_models.write(folder / 'saved')
  return folder / 'saved'


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(console, 'cache_compilations', lambda: None)


@pytest.fixture
def photo(tmp_path, rng):
  path = tmp_path / 'photo.png'
  Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(path)
  return path


@pytest.fixture
def edit(checkpoint, photo, tmp_path, monkeypatch, capsys):
  """Runs `sample.py` with these flags over small defaults, None for none: (status, stderr)."""

  def run(**flags):
    defaults = {'ckpt': checkpoint, 'input': photo, 'edit': 'make it winter', 'steps': 2,
                'output': tmp_path / 'out.png', 'resolution': 32, 'seed': 1}  # fmt: skip
    argv = ['sample.py']
    for name, value in (defaults | flags).items():
      if value is None:
        continue
      values = value if isinstance(value, tuple) else (value,)
      argv += [f'--{name.replace("_", "-")}', *([] if value is True else map(str, values))]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as stop:
      console.run(edit_command, 'sample.py')
    return stop.value.code or 0, capsys.readouterr().err

  return run


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image, int)


def test_an_edit_has_the_size_of_its_image_and_its_settings(edit, photo, tmp_path):
  assert edit(negative='fog', cfg_image=1.2) == (0, '')
  assert pixels(tmp_path / 'out.png').shape == (40, 56, 3)
  settings = read_settings(tmp_path / 'out.png')
  assert settings['seed'] == 1 and settings['negative'] == 'fog' and settings['cfg_image'] == 1.2
  assert settings['input'] == str(photo) and settings['steps'] == 2


@pytest.fixture
def requested(monkeypatch):
  """The requested steps, text and image scale, sampler and resolution. Edits nothing."""
  values = []

  def note(editor, jobs, instruction, *, resolution, options, **_):
    scales = jobs[0].cfg_text, jobs[0].cfg_image
    values[:] = options['steps'], *scales, options['sampler'], resolution
    return iter(())

  monkeypatch.setattr(image_files, 'run_jobs', note)
  return values


NOTHING = {'steps': None, 'resolution': None}


def test_defaults_are_the_checkpoints_size_and_the_papers_settings(edit, requested):
  assert edit(**NOTHING) == (0, '')
  assert requested == [100, 7.5, 1.5, 'euler_ancestral', 16 * 4]


def test_a_script_may_repeat_defaults(edit, requested):
  defaults = {
    'index': 0,
    'num': 1,
    'batch_size': 8,
    'interval': (0, 1),
    'rescale': 0,
    'negative': '',
  }
  assert edit(seed=None, **defaults) == (0, '')
  own_spacing = {'steps': 5, 'sampler': 'dpmpp_2m', 'karras': True, 'spacing': 'linspace'}
  assert edit(**own_spacing) == (0, '')


def test_the_default_checkpoint_is_the_bundled_one(edit, requested, checkpoint, monkeypatch):
  monkeypatch.setattr(bundled, 'FOLDERS', (checkpoint.parent / 'none', checkpoint))
  own = [bundled.STEPS, bundled.TEXT_GUIDANCE, bundled.IMAGE_GUIDANCE, bundled.SAMPLER, 16 * 4]
  status, text = edit(**NOTHING, ckpt=None)
  assert (status, requested) == (0, own)
  assert str(checkpoint) in text and '--ckpt' in text and text.count('\n') == 1
  assert edit(**NOTHING) == (0, '') and requested == own  # the same checkpoint, by its path
  edit(ckpt=None, steps=7, cfg_text=1, resolution=32, sampler='heun')
  assert requested == [7, 1, bundled.IMAGE_GUIDANCE, 'heun', 32]


def test_the_miniature_has_its_own_settings_at_any_path(tmp_path, monkeypatch):
  folder = bundled.path()
  (tmp_path / 'link').symlink_to(folder)
  shutil.copytree(folder, tmp_path / 'copy')
  weights.write(weights.read(folder), tmp_path / 'one.safetensors', 'ldm')
  (tmp_path / 'workdir' / 'base').mkdir(parents=True)
  configs = {'unet': json.loads((folder / 'unet' / 'config.json').read_text())}
  (tmp_path / 'workdir' / 'base' / 'configs.json').write_text(json.dumps(configs))
  monkeypatch.chdir(folder.parent)
  same = (None, folder, str(folder) + '/', folder / '..' / folder.name, folder.name,
          tmp_path / 'link')  # fmt: skip
  for ckpt in same:
    assert bundled.is_it(ckpt) and bundled.is_like_it(ckpt), ckpt
  for name in ('copy', 'one.safetensors', 'workdir'):
    assert bundled.is_like_it(tmp_path / name) and not bundled.is_it(tmp_path / name), name
  configs['unet']['sample_size'] = 32
  (tmp_path / 'copy' / 'unet' / 'config.json').write_text(json.dumps(configs['unet']))
  (tmp_path / 'one.safetensors').write_bytes(b'damaged')
  for name in ('copy', 'one.safetensors', 'nowhere'):
    assert not bundled.is_like_it(tmp_path / name), name


def test_a_missing_bundled_checkpoint_is_one_line(edit, monkeypatch, tmp_path):
  monkeypatch.setattr(bundled, 'FOLDERS', (tmp_path / 'assets',))
  status, text = edit(ckpt=None)
  assert status == 2 and str(tmp_path / 'assets') in text and text.count('\n') == 1


@pytest.mark.long
def test_the_settings_in_an_image_repeat_it(edit, tmp_path):
  """Every setting has the name of its flag. Empty ones are left out."""
  edit(num=2, interval=(0.0, 0.5), rescale=0.3, karras=True, sampler='euler', steps=3)
  settings = read_settings(tmp_path / 'out-1.png')
  flags = {key: tuple(value) if isinstance(value, list) else value
           for key, value in settings.items()
           if value not in (None, False, '') and key not in ('ema', 'dtype')}  # fmt: skip
  assert edit(**flags, output=tmp_path / 'again.png') == (0, '')
  first, again = (pixels(tmp_path / name) for name in ('out-1.png', 'again.png'))
  assert np.abs(first - again).max() <= 1


@pytest.mark.long
def test_a_folder_gives_a_folder_and_each_image_can_be_repeated(edit, tmp_path, rng):
  (tmp_path / 'photos').mkdir()
  for name in ('a.jpg', 'b.png', 'c.png'):
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    image.save(tmp_path / 'photos' / name)
  assert edit(input=tmp_path / 'photos', output=tmp_path / 'out', num=2, batch_size=4)[0] == 0
  names = sorted(path.name for path in (tmp_path / 'out').iterdir())
  assert names == ['a-0.png', 'a-1.png', 'b-0.png', 'b-1.png', 'c-0.png', 'c-1.png']
  settings = read_settings(tmp_path / 'out' / 'b-1.png')
  assert (settings['seed'], settings['index']) == (2, 1)
  edit(input=tmp_path / 'photos' / 'b.png', seed=2, index=1)
  alone, batch = (pixels(tmp_path / name) for name in ('out.png', 'out/b-1.png'))
  assert np.abs(alone - batch).max() <= 1


@pytest.mark.long
def test_a_grid_is_one_labelled_image_of_all_scales(edit, tmp_path, monkeypatch):
  seen = []
  original = image_files.image_grid
  monkeypatch.setattr(image_files, 'image_grid', lambda *a: seen.append(a) or original(*a))
  assert edit(grid=True, grid_text='3,7.5', grid_image='1,1.5,2')[0] == 0
  ((rows, row_labels, column_labels, title),) = seen
  assert [len(row) for row in rows] == [3, 3]
  assert row_labels == ['text 3', 'text 7.5']
  assert column_labels == ['image 1', 'image 1.5', 'image 2']
  assert title == 'make it winter'
  assert pixels(tmp_path / 'out.png').shape[1] > 3 * 56


@pytest.mark.long
def test_a_mask_keeps_black_regions(edit, photo, tmp_path):
  mask = np.zeros((40, 56), np.uint8)
  mask[:20] = 255
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  assert edit(mask=tmp_path / 'mask.png')[0] == 0
  before, after = (pixels(path) for path in (photo, tmp_path / 'out.png'))
  assert (before[20:] == after[20:]).all() and (before[:20] != after[:20]).any()


def test_a_long_instruction_is_a_warning_with_its_end(edit):
  status, text = edit(edit='x ' * 80 + 'tail')
  assert status == 0
  assert text.startswith('sample.py: warning: ') and 'tail' in text and text.count('\n') == 1


@pytest.mark.long
def test_an_unreadable_profile_is_one_line(edit, photo, tmp_path):
  with Image.open(photo) as image:
    image.save(tmp_path / 'odd.png', icc_profile=b'garbage')
  status, text = edit(input=tmp_path / 'odd.png', num=2)
  assert status == 0 and text.count('\n') == 1
  assert f'warning: {tmp_path}/odd.png: its colour profile cannot be read' in text
  assert edit(num=2)[0] == 0
  for name in ('out-0.png', 'out-1.png'):
    with Image.open(tmp_path / name) as image:
      assert 'icc_profile' not in image.info


def test_a_mistake_is_one_line_and_leaves_no_file(edit, tmp_path, photo):
  broken = tmp_path / 'broken.png'
  broken.write_bytes(photo.read_bytes()[:300])
  tiny = tmp_path / 'tiny.png'
  Image.new('RGB', (1, 1)).save(tiny)
  (tmp_path / 'notes.txt').write_text('hello')
  mistakes = [
    ({'edit': ' '}, '--edit is empty'),
    ({'input': tmp_path / 'none.png'}, 'none.png'),
    ({'input': broken}, 'broken.png'),
    ({'input': tiny}, '1x1'),
    ({'input': tmp_path / 'notes.txt'}, 'not an image'),
    ({'ckpt': tmp_path / 'no-checkpoint'}, 'no-checkpoint'),
    ({'output': tmp_path / 'out.xyz'}, 'out.xyz'),
    ({'output': '/proc/out.png'}, '/proc/out.png'),
    ({'mask': tmp_path / 'none.png'}, 'none.png'),
    ({'sampler': 'magic'}, 'euler_ancestral'),
    ({'steps': 5000}, 'steps'),
    ({'seed': 2**32}, 'seed'),
    ({'seed': 2**32 - 1, 'num': 2}, 'lower seed'),
    ({'grid': True, 'num': 2}, '--num'),
    ({'grid': True, 'grid_text': '3', 'grid_image': '1', 'num': 3}, '--num'),
    ({'grid': True, 'grid_text': '1e39'}, '--grid-text'),
    ({'cfg_text': '1e39'}, '--cfg-text'),
    ({'cfg_image': 'nan'}, '--cfg-image'),
    ({'output': photo}, 'is an image of --input'),
    ({'output': tmp_path / ('n' * 300 + '.png')}, 'nnn'),
    ({'resolution': 10**8}, '--resolution'),
    ({'edit': 'x' * 70_000}, 'characters'),
    ({'grid': True, 'grid_text': 'a,b'}, '--grid-text'),
    ({'variant': 'fp99'}, 'fp99'),
    ({'dtype': 'int8'}, 'float32, bfloat16'),
    ({'stepz': 3}, '--stepz'),
    # Settings without effect.
    ({'index': 3, 'seed': None}, '--index: of no use without --seed'),
    ({'grid_text': '3'}, '--grid-text: of no use without --grid'),
    ({'grid_image': '1'}, '--grid-image: of no use without --grid'),
    ({'grid': True, 'cfg_text': 5}, '--cfg-text: of no use with --grid'),
    ({'grid': True, 'cfg_image': 1}, '--cfg-image: of no use with --grid'),
    ({'grid': True, 'grid_text': '3,5,3.0'}, 'each scale once'),
    ({'no_ema': True}, '--no-ema'),
    ({'karras': True}, 'karras changes nothing in 2 steps'),
    ({'karras': True, 'sampler': 'ddim'}, 'karras does not apply'),
    ({'spacing': 'trailing', 'sampler': 'lcm'}, 'spacing does not apply'),
    ({'karras': True, 'sampler': 'dpmpp_2m', 'spacing': 'leading'}, 'spacing changes nothing'),
    ({'rescale': 0.5, 'cfg_text': 1, 'cfg_image': 1}, 'rescale: of no use'),
    ({'negative': 'fog', 'cfg_text': 1, 'cfg_image': 1}, 'negative: of no use'),
    ({'interval': (0, 0.5), 'cfg_text': 1, 'cfg_image': 1}, 'interval: of no use'),
    ({'grid': True, 'grid_text': 1, 'grid_image': 1, 'negative': 'fog'}, 'negative: of no use'),
    ({'interval': (0.1, 0.2)}, 'interval 0.1 to 0.2 holds none of 2 steps'),
    ({'interval': (0.1, 0.9)}, 'interval 0.1 to 0.9 holds all of 2 steps'),
    ({'negative': ' '}, 'negative is blank'),
    ({'variant': 'fp16', 'ckpt': photo}, 'has no variants'),
  ]
  for flags, message in mistakes:
    status, text = edit(**flags)
    assert status == 2, flags
    assert message in text and text.count('\n') == 1 and text.startswith('sample.py: '), flags
    assert not (tmp_path / 'out.png').exists() and not (tmp_path / 'out.xyz').exists()


def test_interrupting_leaves_one_line_and_no_file(edit, tmp_path, monkeypatch):
  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(image_files, 'run_jobs', interrupted)
  monkeypatch.setattr(os, '_exit', sys.exit)
  assert edit() == (130, 'sample.py: stopped\n')
  assert not (tmp_path / 'out.png').exists()


def test_check_of_a_checkpoint_names_its_weights(tmp_path, monkeypatch, capsys):
  checkpoint = tiny_models.checkpoint()
  path = tmp_path / 'x.safetensors'
  weights.write(checkpoint, path, to='ldm')
  tensors, metadata = load_file(path), read_tensors(path)[1]
  live = {name: array for name, array in tensors.items() if name.startswith('model.')}
  average = {ldm_names.ema_name(name): array + np.float32(1e-3) for name, array in live.items()}
  save_file(tensors | average, path, metadata)

  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['ip2p', str(path), *arguments])
    with pytest.raises(SystemExit) as stop:
      console.run(check, 'ip2p')
    return stop.value.code or 0, capsys.readouterr().err

  status, text = run()
  assert status == 0 and 'x.safetensors: took the moving average, ' in text
  save_file(tensors | average, path, metadata | {'sd_merge_recipe': '{}'})
  status, text = run()
  assert status == 0 and text.startswith('ip2p: warning: ') and text.count('\n') == 1
  for option in (('--limit', '3'), ('--split', 'train'), ('--columns', 'a=b')):
    status, text = run(*option)
    assert status == 2 and f'is a checkpoint, and {option[0]} is for data sets' in text


HELP = """
import sys
import typer.main
from typer.testing import CliRunner
from ip2p_jax.cli import main

def words_of(command, before=()):
  yield before
  for name, inner in getattr(command, 'commands', {}).items():
    yield from words_of(inner, (*before, name))

app = main.app()
for words in words_of(typer.main.get_command(app)):
  result = CliRunner().invoke(app, [*words, '--help'])
  assert result.exit_code == 0 and 'Usage' in result.output, words
print(sorted({'jax', 'flax', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)))
"""


@pytest.mark.parametrize(
  ('listed', 'names'),
  [
    (defaults.SAMPLERS, samplers.SAMPLERS),
    (defaults.METHODS, table.METHODS),
    (defaults.PROTOCOLS, protocols.READERS),
  ],
)
def test_help_lists_all_names_of_a_table(listed, names):
  assert listed.replace(' or ', ', ').split(', ') == list(names)


def test_help_loads_no_library():
  result = subprocess.run([sys.executable, '-c', HELP], capture_output=True, text=True)
  assert (result.stdout, result.stderr) == ('[]\n', '')
