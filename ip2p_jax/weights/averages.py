"""Live weights and moving average of one file: could they come from one training run?

The original's files hold both: `model.diffusion_model.*` as last trained, and `model_ema.*`. A
program that merges models or adapters changes only the live weights; then the average no longer
belongs to them. The file does not reliably say so, so this module compares the weights.

Every trainer of such files uses Adam: for any gradients, each step moves each weight by about the
learning rate. So the root mean square difference of average and live weights is nearly the same in
every tensor and in all of the first convolution, and it is small compared with the weights.
Measured: docs/parity.md.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ip2p_jax.errors import InputError
from ip2p_jax.weights import ldm_names
from ip2p_jax.weights.tensors import renamed

_log = logging.getLogger(__name__)

# Metadata keys of programs that merge checkpoints.
_MERGED = ('sd_merge_recipe', 'sd_merge_models', 'modelspec.merged_from')
FIRST = 'input_blocks.0.0.weight'
NOISY_CHANNELS = 4  # input channels that editors and text-to-image models share
UNEVEN = 5.0  # a tensor's difference over the median one; in training it was at most 3.2
UNEVEN_KINDS = 3.0  # kernels' over biases' and norms', medians; in training it was at most 1.6
LARGE = 64  # numbers of a tensor; the root mean square of a smaller one is too noisy
FEW = 0.02  # fraction of the tensors that may be uneven
FAR = 0.3  # distance of average and live kernels over their size; in training it was at most 0.02
_CHUNKS, _CHUNK = 8, 4096  # the sample of a large tensor


class Change(NamedTuple):
  """Root mean squares of one tensor."""

  difference: float  # of live weights and average
  weights: float  # of the average
  rounding: float  # twice the difference that the stored precision alone may cause


def chosen(
  path: Path,
  tensors: Mapping[str, np.ndarray],
  prefix: str,
  metadata: Mapping[str, str],
  ema: bool | None,
) -> Mapping[str, np.ndarray]:
  """The UNet's live weights or their moving average, without `prefix`; logs the choice.

  Args:
    path: the file, for messages.
    tensors: all tensors of the file.
    prefix: prefix of the live weights' names.
    metadata: metadata of the file.
    ema: whether to take the average; None takes it unless there is a `doubt`.

  Raises InputError if an average is asked for and there is none, or only part of one.
  """
  names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
  live = renamed(tensors, names)
  average = None if ema is False else _averaged(path, tensors, names)
  if average is None:
    if ema:
      raise InputError(f'{path}: holds no moving average; leave out --ema (ema=True).')
    if any(name.startswith('model_ema.') for name in tensors):
      _log.info('%s: took the live weights, not the moving average, as asked', path)
    return live
  if ema:
    _log.info('%s: took the moving average, as asked', path)
    return average
  reason = doubt(live, average)
  if note := next((name for name in _MERGED if name in metadata), ''):
    reason = f'its metadata calls it a merge ({note})'
  if reason:
    _log.warning(
      '%s: the live weights and their moving average are not of one training: %s; so this is a '
      'merge, or an adapter was added, and the live weights are taken. --ema takes the average, '
      '--no-ema the live ones without this warning.', path, reason,
    )  # fmt: skip
    return live
  if far := relative_distance(live, average):
    _log.info(
      '%s: took the moving average, %s%% away from the live weights; if this is a merge, or an '
      'adapter was added, --no-ema takes the live ones', path, f'{100 * far:.2g}',
    )  # fmt: skip
  return average


def _averaged(path, tensors, names):
  """The moving average of `names`; None if the file has none, InputError if it has only a part."""
  new_to_old = {name: ldm_names.ema_name(full) for name, full in names.items()}
  absent = [name for name in new_to_old.values() if name not in tensors]
  if len(absent) == len(new_to_old):
    return None
  if absent:
    raise InputError(f'{path}: holds only part of a moving average: {len(absent)} of '
                     f'{len(new_to_old)} tensors are missing, e.g. {absent[0]}; take the live '
                     'weights instead (ema=False, --no-ema).')  # fmt: skip
  return renamed(tensors, new_to_old)


def doubt(live: Mapping[str, np.ndarray], average: Mapping[str, np.ndarray]) -> str:
  """Why `average` and `live` cannot come from one training run; '' if they may.

  Args:
    live, average: the UNet in LDM names, both with all tensors.
  """
  if odd := [x for x in live if live[x].shape != average[x].shape]:
    return f'they have other shapes: {odd[0]}'
  if odd := [x for x in live if live[x].dtype != average[x].dtype]:
    return f'they are stored in another precision: {odd[0]} as {live[odd[0]].dtype}'
  if (far := relative_distance(live, average)) > FAR:
    return f'kernels differ by {far:.0%} of their size'
  large = [name for name in live if live[name].size >= LARGE]
  changes = {name: _change(live[name], average[name]) for name in large}
  if not any(change.difference for change in changes.values()):
    return ''  # an export of one set of weights writes it twice
  return _uneven_kinds(changes, live) or _uneven(changes) or _uneven_first(live, average)


def relative_distance(live: Mapping[str, np.ndarray], average: Mapping[str, np.ndarray]) -> float:
  """|live - average| / |average| of a kernel, the median over all of them."""
  kernels = [x for x in live if live[x].ndim > 1]
  changes = [_change(live[name], average[name]) for name in kernels]
  return (
    float(np.median([x.difference / max(x.weights, 1e-30) for x in changes])) if changes else 0.0
  )


def _uneven_kinds(changes: Mapping[str, Change], live) -> str:
  """The problem that kernels differ far more than biases and norms (adapters change no biases)."""
  kinds = {'attention': [], 'convolutions': [], 'biases': []}
  for name, change in changes.items():
    kind = 'convolutions' if live[name].ndim > 1 else 'biases'
    kinds['attention' if kind != 'biases' and 'transformer_blocks' in name else kind].append(change)
  if not kinds['biases']:
    return ''
  usual = np.median([max(x.difference, x.rounding) for x in kinds.pop('biases')])
  for kind, members in kinds.items():
    if members and np.median([x.difference for x in members]) > UNEVEN_KINDS * usual:
      return f'the kernels of {kind} differ over {UNEVEN_KINDS:g} times as much as biases and norms'
  return ''


def _uneven(changes: Mapping[str, Change]) -> str:
  """The problem that some tensors differ far more than most, or not at all while most do."""
  if not changes:
    return ''
  usual = float(np.median([max(x.difference, x.rounding) for x in changes.values()]))
  least = max(FEW * len(changes), 1)
  more = [x for x, c in changes.items() if c.difference > UNEVEN * max(usual, c.rounding)]
  if len(more) >= least:
    return f'{len(more)} of {len(changes)} tensors differ over {UNEVEN:g} times as much as most'
  none = [x for x, c in changes.items() if not c.difference and UNEVEN * c.rounding < usual]
  if len(none) >= least:
    return f'{len(none)} of {len(changes)} tensors are the same and the others are not'
  return ''


def _uneven_first(live, average) -> str:
  """The problem that the first convolution differs only in the channels of text-to-image models."""
  if FIRST not in live or live[FIRST].shape[1] <= NOISY_CHANNELS:
    return ''
  parts = [(x[:, :NOISY_CHANNELS], x[:, NOISY_CHANNELS:]) for x in (live[FIRST], average[FIRST])]
  common, own = (_change(*pair) for pair in zip(*parts, strict=True))
  if common.difference > UNEVEN * max(own.difference, own.rounding, common.rounding):
    return 'the first convolution differs only in the channels of text-to-image models'
  return ''


def _change(live: np.ndarray, average: np.ndarray) -> Change:
  live, average = _part(live), _part(average)
  epsilon = np.finfo(live.dtype).eps if live.dtype.kind == 'f' else 2.0**-7  # bfloat16
  live, average = live.astype(np.float64), average.astype(np.float64)
  size = _rms(average)
  return Change(_rms(live - average), size, float(epsilon) * size)


def _part(array):
  flat = array.reshape(-1)
  if flat.size <= _CHUNKS * _CHUNK:
    return flat
  starts = np.linspace(0, flat.size - _CHUNK, _CHUNKS).astype(int)
  return np.concatenate([flat[start : start + _CHUNK] for start in starts])


def _rms(array) -> float:
  return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
