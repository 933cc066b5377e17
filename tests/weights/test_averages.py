"""Two sets of weights in one file: which is taken, and the log message."""

import json
import logging

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from ip2p_jax import weights
from ip2p_jax.config import TrainConfig
from ip2p_jax.errors import InputError
from ip2p_jax.training.start import starting_checkpoint
from ip2p_jax.weights import averages, ldm_names
from ip2p_jax.weights.files import read_tensors
from ip2p_jax.weights.ldm_file import UNET

FIRST = UNET + averages.FIRST


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  """A single file without an average, its tensors and metadata."""
  path = tmp_path_factory.mktemp('averages') / 'model.safetensors'
  weights.write(tiny_models.checkpoint(), path, to='ldm')
  return path, load_file(path), read_tensors(path)[1]


def trained(tensors, rate, steps, decay, seed=0):
  """(live, average) after AdamW on gradients that are mostly noise, as in diffusion."""
  rng = np.random.default_rng(seed)
  live, average = {}, {}
  for name, start in tensors.items():
    w, mean, first, second = (x.astype(np.float64) for x in (start, start, 0 * start, 0 * start))
    aim = start + 0.1 * rng.standard_normal(start.shape)
    scale = 10.0 ** rng.uniform(-6, -2)  # of this tensor's gradients: Adam makes steps alike
    for n in range(1, steps + 1):
      grad = scale * (0.2 * np.sign(aim - w) + rng.standard_normal(w.shape))
      first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
      step = first / (1 - 0.9**n) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
      w = w - rate * (-step + 0.01 * w)
      mean += (1 - min(decay, (1 + n) / (10 + n))) * (w - mean)
    live[name], average[name] = w.astype(np.float32), mean.astype(np.float32)
  return live, average


def unet_of(tensors):
  return {name: array for name, array in tensors.items() if name.startswith(UNET)}


@pytest.fixture(scope='module', params=[(1e-4, 30, 0.9999), (1e-4, 80, 0.99), (1e-3, 60, 0.999)])
def run(request, file):
  """(live, average) of a training run, under the names of the file."""
  return trained(unet_of(file[1]), *request.param)


def save(path, file, live, average, dtype=np.float32, **metadata):
  """A file with both, and our metadata, which a small model needs."""
  _, tensors, ours = file
  both = live | {ldm_names.ema_name(name): array for name, array in average.items()}
  save_file({k: v.astype(dtype) for k, v in (tensors | both).items()}, path, ours | metadata)
  return path


def taken(path, ema=None):
  """The first convolution of the weights that are read."""
  return weights.read(path, ema=ema).tensors['unet']['conv_in.weight']


def distance(live, average):
  both = [(live[x], average[x]) for x in live if live[x].ndim > 1]
  return float(np.median([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in both]))


@pytest.mark.parametrize('dtype', [np.float32, np.float16])
def test_the_average_of_a_training_is_taken_and_logged(tmp_path, file, run, dtype, caplog):
  live, average = run
  path = save(tmp_path / 'x.safetensors', file, live, average, dtype)
  with caplog.at_level(logging.INFO):
    assert np.array_equal(taken(path), average[FIRST].astype(dtype))
  (record,) = caplog.records
  assert record.levelno == logging.INFO
  assert 'x.safetensors: took the moving average, ' in record.getMessage()
  assert '--no-ema takes the live ones' in record.getMessage()


def merged(live, kind, size, seed=1):
  """The live weights after a merge or an adapter of a relative `size`."""
  rng, result = np.random.default_rng(seed), dict(live)
  for name, array in live.items():
    matrix = array.reshape(len(array), -1)
    if kind == 'add difference':  # text-to-image models have only 4 input channels
      change = rng.standard_normal(array.shape) * size * array.std()
      if name == FIRST:
        change[:, 4:] = 0
    elif array.ndim < 2 or (kind == 'attention adapter' and 'transformer_blocks' not in name):
      continue
    else:
      change = rng.standard_normal((len(matrix), 4)) @ rng.standard_normal((4, matrix.shape[1]))
      change *= size * np.sqrt(np.mean(matrix**2) / np.mean(change**2))
    result[name] = (array + change.reshape(array.shape)).astype(array.dtype)
  return result


@pytest.mark.long
@pytest.mark.parametrize('dtype', [np.float32, np.float16])
@pytest.mark.parametrize('kind', ['add difference', 'attention adapter', 'adapter of all kernels'])
@pytest.mark.parametrize('multiplier', [0.3, 1.0])
def test_live_weights_of_a_merge_are_taken_with_a_warning(
  tmp_path, file, run, kind, multiplier, dtype, caplog
):
  live, average = run
  size = multiplier * max(0.2, 20 * distance(live, average))
  changed = merged(live, kind, size)
  path = save(tmp_path / 'x.safetensors', file, changed, average, dtype)
  assert np.array_equal(taken(path), changed[FIRST].astype(dtype))
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert 'the live weights are taken' in record.getMessage()
  caplog.clear()
  assert np.array_equal(taken(path, ema=True), average[FIRST].astype(dtype))
  assert np.array_equal(taken(path, ema=False), changed[FIRST].astype(dtype))
  assert not caplog.records  # of warnings


@pytest.mark.parametrize('kind', ['attention adapter', 'adapter of all kernels', 'add difference'])
def test_an_average_equal_to_premerge_weights_is_not_taken(tmp_path, file, kind):
  live = unet_of(file[1])
  changed = merged(live, kind, 0.01)
  assert np.array_equal(
    taken(save(tmp_path / 'x.safetensors', file, changed, live)), changed[FIRST]
  )


def test_an_average_of_another_model_is_not_taken(tmp_path, file, caplog):
  live, _ = trained(unet_of(file[1]), 1e-4, 20, 0.9999)
  average = {
    name: array
    + np.float32(0.1) * np.random.default_rng(1).standard_normal(array.shape, np.float32)
    for name, array in live.items()
  }
  assert np.array_equal(taken(save(tmp_path / 'x.safetensors', file, live, average)), live[FIRST])
  assert 'of their size' in caplog.text


def test_equal_sets_log_nothing(tmp_path, file, caplog):
  live = unet_of(file[1])
  with caplog.at_level(logging.INFO):
    taken(save(tmp_path / 'x.safetensors', file, live, live))
  assert not caplog.records


def test_equal_sets_with_small_biases_are_no_merge(file):
  live = {
    name: array * (1e-9 if array.ndim == 1 else 1) for name, array in unet_of(file[1]).items()
  }
  assert averages.doubt(live, live) == ''


@pytest.mark.parametrize('note', ['sd_merge_recipe', 'modelspec.merged_from'])
def test_merge_metadata_is_believed(tmp_path, file, run, note, caplog):
  live, average = run
  path = save(tmp_path / 'x.safetensors', file, live, average, **{note: json.dumps({})})
  assert np.array_equal(taken(path), live[FIRST])
  assert note in caplog.text


def test_weights_in_another_precision_than_the_average_were_merged(tmp_path, file, run, caplog):
  """A1111's merger writes merged weights in float16 and does not change the average."""
  live, average = run
  half = {name: array.astype(np.float16) for name, array in live.items()}
  both = half | {ldm_names.ema_name(name): array for name, array in average.items()}
  save_file(file[1] | both, tmp_path / 'x.safetensors', file[2])
  assert np.array_equal(taken(tmp_path / 'x.safetensors'), half[FIRST])
  assert 'another precision' in caplog.text


@pytest.mark.long
def test_training_starts_from_the_weights_that_its_config_names(tmp_path, file, run):
  live, average = run
  path = save(tmp_path / 'x.safetensors', file, live, average)
  for choice, wanted in (('', average), ('average', average), ('live', live)):
    start = starting_checkpoint(TrainConfig(checkpoint=str(path), checkpoint_weights=choice))
    assert np.array_equal(start.tensors['unet']['conv_in.weight'], wanted[FIRST]), choice


def test_a_missing_set_of_weights_is_refused(tmp_path, file):
  with pytest.raises(InputError, match=r'model\.safetensors: holds no moving average'):
    weights.read(file[0], ema=True)
  assert weights.read(file[0], ema=False).tensors['unet']
  weights.write(weights.read(file[0]), tmp_path / 'folder')
  for ema in (True, False):
    with pytest.raises(InputError, match='folder: a folder holds one set of weights'):
      weights.read(tmp_path / 'folder', ema=ema)
