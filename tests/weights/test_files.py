"""Containers: safetensors, shards and torch files, read lazily and strictly, written atomically."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import peers
import pytest
import safetensors
import safetensors.numpy

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.networks import bytes_digest
from ip2p_jax.weights.files import read_tensors, write_safetensors
from ip2p_jax.weights.tensors import Tensors

torch = peers.module('torch')


@pytest.fixture
def arrays(rng):
  return {
    'b.weight': rng.normal(size=(3, 5)).astype(np.float32),
    'a.bias': rng.normal(size=(7,)).astype(np.float32),
    'scalar': np.array(2.5, np.float32),
    'empty': np.zeros((0, 4), np.float32),
    'position_ids': np.arange(6)[None],
  }


def equal(tensors, wanted):
  return tensors.keys() == wanted.keys() and all(
    tensors[name].dtype == wanted[name].dtype
    and tensors[name].tobytes() == wanted[name].tobytes()
    and tensors[name].shape == wanted[name].shape
    for name in wanted
  )


def test_what_is_written_reads_back(tmp_path, arrays):
  write_safetensors(tmp_path / 'a.safetensors', arrays, metadata={'who': 'me'})
  tensors, metadata = read_tensors(tmp_path / 'a.safetensors')
  assert equal(tensors, arrays)
  assert metadata == {'format': 'pt', 'who': 'me'}


@peers.needs_torch
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_files_are_those_of_the_safetensors_library(tmp_path, arrays, dtype):
  kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
  wanted = {name: array.astype(kind) for name, array in arrays.items() if name != 'position_ids'}
  write_safetensors(tmp_path / 'ours.safetensors', arrays, dtype)
  theirs = safetensors.safe_open(tmp_path / 'ours.safetensors', 'pt')
  for name, array in wanted.items():
    assert torch.equal(theirs.get_tensor(name).float(), torch.tensor(array.astype(np.float32)))
  safetensors.numpy.save_file(wanted, tmp_path / 'theirs.safetensors')
  assert equal(read_tensors(tmp_path / 'theirs.safetensors')[0], wanted)


def test_float64_is_read_and_written_as_asked(tmp_path):
  safetensors.numpy.save_file({'x': np.array([1 / 3])}, tmp_path / 'x.safetensors')
  tensors, _ = read_tensors(tmp_path / 'x.safetensors')
  assert tensors['x'].dtype == np.float64
  write_safetensors(tmp_path / 'y.safetensors', tensors)
  assert read_tensors(tmp_path / 'y.safetensors')[0]['x'].dtype == np.float32


def test_a_tensor_is_made_on_access_only():
  asked = []
  tensors = Tensors({name: lambda name=name: asked.append(name) for name in 'abc'})
  assert 'a' in tensors and len(tensors) == 3 and list(tensors) == ['a', 'b', 'c'] and not asked
  tensors['b']
  assert asked == ['b']


@pytest.mark.parametrize(
  'change',
  [
    lambda content: content[:4],
    lambda content: content[:60],
    lambda content: content[:-1],
    lambda content: content + b'\0',
    lambda content: pickle.dumps({'x': 1}),
  ],
  ids=['4 bytes', '60 bytes', 'cut short', 'too long', 'pickle'],
)
def test_a_damaged_file_is_named(tmp_path, arrays, change):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, arrays)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(InputError, match=r'x\.safetensors: damaged'):
    read_tensors(path)


@pytest.mark.parametrize(
  'header',
  [
    b'{]',
    b'[]',
    b'{"a": 1}',
    b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},'
    b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
  ],
)
def test_a_damaged_header_is_named(tmp_path, header):
  (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
  with pytest.raises(InputError, match=r'x\.safetensors: damaged'):
    read_tensors(tmp_path / 'x.safetensors')


def test_a_quantized_file_is_refused_by_its_type(tmp_path):
  header = b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
  (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
  with pytest.raises(InputError, match='a is stored as F8_E4M3'):
    read_tensors(tmp_path / 'x.safetensors')


def test_shards_are_one_set_of_tensors(tmp_path, arrays):
  write_safetensors(tmp_path / 'one.safetensors', {'a.bias': arrays['a.bias']})
  write_safetensors(tmp_path / 'two.safetensors', {'b.weight': arrays['b.weight']})
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(
    json.dumps({'weight_map': {'a.bias': 'one.safetensors', 'b.weight': 'two.safetensors'}})
  )
  assert equal(read_tensors(index)[0], {name: arrays[name] for name in ('a.bias', 'b.weight')})
  index.write_text(json.dumps({'weight_map': {'c': 'one.safetensors'}}))
  with pytest.raises(InputError, match=r'index\.json: says that c is in one\.safetensors'):
    read_tensors(index)
  index.write_text(json.dumps({'weight_map': {'c': 'gone.safetensors'}}))
  with pytest.raises(InputError, match=r'gone\.safetensors: no such file'):
    read_tensors(index)
  index.write_text('{}')
  with pytest.raises(InputError, match='has no weight_map'):
    read_tensors(index)


def test_a_nested_state_dict_of_torch_is_unpacked(tmp_path, rng):
  half = torch.tensor(rng.normal(size=(4,))).bfloat16()
  whole = torch.nn.Parameter(torch.ones(2, 3))
  nested = {'epoch': 3, 'state_dict': {'state_dict': {'half': half, 'whole': whole, 'step': 7}}}
  torch.save(nested, tmp_path / 'x.ckpt')
  tensors, _ = read_tensors(tmp_path / 'x.ckpt')
  assert set(tensors) == {'half', 'whole'}
  assert tensors['half'].dtype == ml_dtypes.bfloat16
  assert np.array_equal(tensors['half'].astype(np.float32), half.float().numpy())
  assert np.array_equal(tensors['whole'], np.ones((2, 3), np.float32))


def test_torch_files_from_before_zip_are_read(tmp_path):
  torch.save({'x': torch.ones(2)}, tmp_path / 'x.bin', _use_new_zipfile_serialization=False)
  assert read_tensors(tmp_path / 'x.bin')[0]['x'].tolist() == [1, 1]


class Callback:
  def __reduce__(self):
    return os.mkdir, ('should-not-exist',)


def test_a_file_that_runs_code_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  torch.save({'state_dict': {'x': torch.ones(2)}, 'callbacks': Callback()}, 'x.ckpt')
  with pytest.raises(InputError, match=r'x\.ckpt: refused, because loading it would run code'):
    read_tensors('x.ckpt')
  assert not (tmp_path / 'should-not-exist').exists()


def test_lightning_callbacks_are_read_without_their_code(tmp_path, monkeypatch):
  name = 'pytorch_lightning.callbacks.model_checkpoint'
  kind = type('ModelCheckpoint', (), {'__module__': name})
  callback = kind()
  callback.best_score = np.float64(0.5)
  with monkeypatch.context() as patch:
    for parent in (name.rsplit('.', 2)[0], name.rsplit('.', 1)[0], name):
      patch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[name].ModelCheckpoint = kind
    state = {'state_dict': {'x': torch.ones(2)}, 'callbacks': {kind: callback}}
    torch.save(state, tmp_path / 'x.ckpt')
  tensors, _ = read_tensors(tmp_path / 'x.ckpt')
  assert list(tensors) == ['x'] and tensors['x'].tolist() == [1, 1]
  assert name not in sys.modules


@peers.needs_torch
@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'PK\x03\x04 half a zip'])
def test_a_damaged_torch_file_is_named(tmp_path, content):
  (tmp_path / 'x.ckpt').write_bytes(content)
  with pytest.raises(InputError, match=r'x\.ckpt: damaged'):
    read_tensors(tmp_path / 'x.ckpt')


def test_a_truncated_torch_file_is_named(tmp_path):
  torch.save({'x': torch.ones(1000)}, tmp_path / 'x.ckpt')
  (tmp_path / 'x.ckpt').write_bytes((tmp_path / 'x.ckpt').read_bytes()[:2000])
  with pytest.raises(InputError, match=r'x\.ckpt: damaged'):
    read_tensors(tmp_path / 'x.ckpt')


def test_a_torch_file_of_something_else_is_refused(tmp_path):
  torch.save([torch.ones(2)], tmp_path / 'x.pt')
  with pytest.raises(InputError, match=r'x\.pt: holds a list'):
    read_tensors(tmp_path / 'x.pt')


def test_without_torch_a_ckpt_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'x.ckpt').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(InputError, match='pip install torch'):
    read_tensors(tmp_path / 'x.ckpt')


def test_reading_and_writing_does_not_need_torch():
  code = "import sys; sys.modules['torch'] = None; import ip2p_jax.weights"
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize(
  'name, message', [('gone.safetensors', 'no such file'), ('x.txt', 'not a checkpoint file')]
)
def test_a_path_that_holds_no_checkpoint_is_named(tmp_path, name, message):
  (tmp_path / 'x.txt').write_text('')
  with pytest.raises(InputError, match=f'{name}: {message}'):
    read_tensors(tmp_path / name)


@pytest.mark.parametrize(
  ('value', 'dtype', 'message'),
  [
    (1e5, 'float16', 'x has values too large for float16'),
    (np.nan, 'float32', 'x holds NaN or infinity'),
    (1.0, 'half', "dtype 'half' is unknown; use float32, float16, bfloat16"),
  ],
)
def test_a_value_or_dtype_that_cannot_be_written_is_refused(tmp_path, value, dtype, message):
  with pytest.raises(InputError, match=message):
    write_safetensors(tmp_path / 'x.safetensors', {'x': np.float32([value])}, dtype)
  assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, arrays):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, arrays)
  old = path.read_bytes()
  asked = []

  def fails_while_written():
    asked.append(1)
    if len(asked) > 1:  # first for its shape
      raise OSError('disk full')
    return np.ones(3, np.float32)

  with pytest.raises(OSError, match='disk full'):
    write_safetensors(path, Tensors({'a': lambda: np.zeros(2), 'b': fails_while_written}))
  assert path.read_bytes() == old
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_does_not_read_back_is_not_left(tmp_path):
  changing = iter(range(9))
  tensors = Tensors({'x': lambda: np.float32([next(changing)])})
  with pytest.raises(OSError, match='x does not read back'):
    write_safetensors(tmp_path / 'x.safetensors', tensors)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_concurrent_writers_share_no_temporary_name(tmp_path, kind):
  """The last writer's content stays, whole; nothing else is left."""
  path, together = tmp_path / 'made', threading.Barrier(8, timeout=60)

  def write(i):
    for n in range(20):
      together.wait()
      with storage.replacing(path) as unfinished:
        place = unfinished
        if kind == 'folder':
          unfinished.mkdir()
          (unfinished / 'other').write_text(f'{i} {n}')
          place = unfinished / 'one'
        place.write_text(f'{i} {n}')
        together.wait()

  with ThreadPoolExecutor(8) as pool:
    for done in [pool.submit(write, i) for i in range(8)]:
      done.result()
  assert [file.name for file in tmp_path.iterdir()] == ['made']
  texts = {file.read_text() for file in ([path] if kind == 'file' else path.iterdir())}
  assert len(texts) == 1 and texts.pop().endswith(' 19')


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
  path = tmp_path / 'made'
  path.mkdir()
  (path / 'old').write_text('old')
  rename = os.rename

  def refused(old, new):
    if (old / 'new').exists():
      raise PermissionError(errno.EACCES, 'refused')
    rename(old, new)

  monkeypatch.setattr(os, 'rename', refused)
  with pytest.raises(PermissionError), storage.replacing(path) as unfinished:
    unfinished.mkdir()
    (unfinished / 'new').write_text('new')
  assert [file.name for file in tmp_path.iterdir()] == ['made']
  assert [file.name for file in path.iterdir()] == ['old']


def test_bytes_digest_depends_on_every_number(arrays, tmp_path):
  write_safetensors(tmp_path / 'one.safetensors', arrays)
  digest = bytes_digest(arrays)
  assert bytes_digest(read_tensors(tmp_path / 'one.safetensors')[0]) == digest
  large = {'w': np.arange(300.0, dtype=np.float32).reshape(20, 15)}
  assert bytes_digest({'w': np.asfortranarray(large['w'])}) == bytes_digest(large)
  seen = {digest, bytes_digest(large)}
  for place in range(300):
    changed = large['w'].copy()
    changed.flat[place] += 1
    seen.add(bytes_digest({'w': changed}))
  seen |= {bytes_digest({'w': large['w'].reshape(15, 20)}), bytes_digest({'v': large['w']})}
  seen |= {bytes_digest({'w': large['w'].view(np.int32)})}
  assert len(seen) == 305
