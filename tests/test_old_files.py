"""Files of earlier versions are read, and their unfinished runs end with the same results."""

import json
import shutil

import jax
import numpy as np
import old_files
import pytest
from old_files import ARCHIVES, JOBS, lines_of
from PIL import Image
from safetensors import safe_open

from ip2p_jax.data.sources import open_source

QUICK = 'asked', 'shards'
SHARDS = 'shards', 'latents'
TOLERANCE = 1e-3  # on other machines, for numbers around 1


@pytest.fixture(params=ARCHIVES, ids=lambda file: file.name.partition('.')[0])
def old(request, tmp_path, monkeypatch):
  """An unpacked archive of old files; the current folder."""
  shutil.unpack_archive(request.param, tmp_path, filter='data')
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def is_exact(old):
  """Whether numbers must be equal: other machines give other last digits."""
  return json.loads((old / 'made.json').read_text()) == old_files.machine()


@pytest.mark.parametrize(
  'name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_old_work_ends_with_the_same_results(name, old, is_exact):
  begun = old / 'begun' / name
  records = {file: file.read_text() for file in begun.rglob('*.jsonl')}
  assert bool(records) == bool(JOBS[name].is_begun)
  old_files.go_on(name, old_files.ROOT, old, 'ours')
  for file, text in records.items():
    assert file.read_text().startswith(text), f'{file}: was begun anew'
  files = sorted((old / 'ours').iterdir())
  assert files
  for ours in files:
    assert_same(ours, old / 'done' / ours.name, is_exact)


@pytest.mark.slow
def test_old_pairs_are_not_drawn_again(old):
  """Files of an archive have the date 1970; new files do not."""
  begun = old / 'begun' / 'pairs'
  seeds = [
    str(json.loads(line)['seed'])
    for file in begun.glob('*/scores.jsonl')
    for line in lines_of(file)
  ]
  drawn = [file for file in begun.glob('*/*.jpg') if file.name.partition('_')[0] in seeds]
  assert len(drawn) == 2 * len(seeds) > 0
  old_files.go_on('pairs', old_files.ROOT, old, 'ours')
  assert all(file.stat().st_mtime == 0 for file in drawn)


@pytest.mark.parametrize(
  ('source', 'target'),
  [('exported', 'exported.safetensors'), ('exported.safetensors', 'exported')],
)
def test_old_exports_convert_into_each_other(source, target, old, ip2p):
  status, output = ip2p('convert', f'done/{source}', target, '--no-verify')
  assert not status, output
  assert_same(old / target, old / 'done' / target, True)


@pytest.mark.parametrize('name', ['filtered', 'shards', 'latents', 'exported'])
def test_old_files_pass_the_check(name, old, ip2p):
  status, output = ip2p('check', f'done/{name}')
  assert not status, output


def assert_same(ours, theirs, is_exact):
  """Compares files: equal bytes, or equal names and texts, and close numbers.

  Bytes of safetensors may differ: their metadata has no order.
  """
  if theirs.is_dir():
    names, expected = (names_in(folder) for folder in (ours, theirs))
    assert names == expected, ours
    if theirs.name in SHARDS and not is_exact:  # compressed
      assert_close(rows(ours), rows(theirs), ours)
      return
    for name in names:
      assert_same(ours / name, theirs / name, is_exact)
  elif theirs.name == 'pairs.json':  # newer versions have one more setting
    assert json.loads(theirs.read_text()).items() <= json.loads(ours.read_text()).items()
  elif theirs.name.startswith('answers-'):  # a server may answer in any order
    assert sorted(lines_of(ours)) == sorted(lines_of(theirs))
  elif ours.read_bytes() != theirs.read_bytes():
    assert not is_exact or ours.suffix == '.safetensors', f'{ours}: other bytes'
    assert_close(read(ours), read(theirs), ours, 0 if is_exact else TOLERANCE)


def assert_close(ours, theirs, file, tolerance=TOLERANCE):
  """Compares trees of texts, numbers and arrays."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs), file
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if isinstance(b, str | bytes | bool):
      assert a == b, file
    else:
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=str(file))


def names_in(folder):
  return sorted(file.name for file in folder.iterdir() if not old_files.is_unkept(file))


def read(file):
  if file.suffix == '.safetensors':
    with safe_open(file, 'np') as opened:
      about = {name: read_json(text) for name, text in opened.metadata().items()}
      return about, {name: opened.get_tensor(name) for name in opened.keys()}
  if file.suffix in ('.png', '.jpg'):
    return np.asarray(Image.open(file), np.float32) / 255
  return [json.loads(line) for line in lines_of(file)]


def read_json(text):
  return json.loads(text) if text.startswith('{') else text


def rows(folder):
  sources = [open_source(str(folder), split) for split in ('train', 'validation')]
  return [tuple(row)[1:] for source in sources for row in source]  # without the row's place
