"""Logs of a run: numbers, images and texts in its workdir, and progress lines on the screen.

  metrics.jsonl   one line per log: {"step": 50, "time": 1764000000.123, "loss": 0.0412, ...}
  tensorboard/    the same for TensorBoard, with images and texts
  previews/       the images as files
  loss.png        loss and validation loss by step

A workdir may be remote (gs://...). Remote files cannot be appended to, so lines and events are
collected in a temporary folder. Complete files are uploaded at most once a minute and at the end; a
crash loses the last minute.
"""

import contextlib
import io
import json
import math
import numbers
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from PIL import Image

from ip2p_jax import storage
from ip2p_jax.errors import InputError

LINES, EVENTS, PREVIEWS, CURVE = 'metrics.jsonl', 'tensorboard', 'previews', 'loss.png'
UPLOAD_EVERY = 60  # seconds


class Writer:
  """Writes into a workdir from process 0; in other processes its methods do nothing."""

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
    """Continues after `start_step`; drops the lines of later steps, from an interrupted run.

    InputError if the workdir cannot be written.
    """
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    from tensorboardX import SummaryWriter  # imports torch if installed, which takes seconds

    workdir = os.path.expanduser(workdir)  # shells do not expand the ~ of --workdir=~/run
    self._workdir = epath.Path(workdir)
    is_remote = '://' in workdir
    self._local = Path(tempfile.mkdtemp(prefix='ip2p-')) if is_remote else Path(workdir)
    self._is_remote, self._uploaded = is_remote, time.monotonic()
    try:
      self._workdir.mkdir(parents=True, exist_ok=True)
      lines = _lines_until(self._workdir / LINES, start_step)
      storage.write_bytes(epath.Path(self._local) / LINES, lines.encode())
      self._lines = open(self._local / LINES, 'a')
      self._events = SummaryWriter(
        str(self._local / EVENTS),
        purge_step=start_step + 1,
        flush_secs=UPLOAD_EVERY // 2,
        # Names have the time in seconds only; this keeps two files from having the same name.
        filename_suffix=f'.{start_step:08d}',
      )
    except OSError as error:
      reason = error.strerror or error
      raise InputError(
        f'the workdir {workdir} cannot be written ({reason}); choose another.'
      ) from None

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the numbers of one step, with seven digits.

    Numbers that are not finite become the strings 'nan', 'inf', '-inf', since JSON cannot hold
    them.
    """
    if not self._writes:
      return
    line = {'step': int(step), 'time': round(time.time(), 3)}
    line |= {name: _plain(value) for name, value in values.items()}
    self._lines.write(json.dumps(line, allow_nan=False) + '\n')
    self._lines.flush()
    for name, value in values.items():
      self._events.add_scalar(name, float(value), step)
    if self._is_remote and time.monotonic() - self._uploaded >= UPLOAD_EVERY:
      self._upload()

  def image(self, step: int, name: str, image: Image.Image) -> None:
    """Writes an image, also as previews/NAME_STEP.png, which is never incomplete."""
    if not self._writes:
      return
    png = io.BytesIO()
    image.save(png, 'PNG')
    storage.write_bytes(self._workdir / PREVIEWS / f'{name}_{step:08d}.png', png.getvalue())
    self._events.add_image(name, np.asarray(image.convert('RGB')), step, dataformats='HWC')

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a text for TensorBoard, which shows it unchanged in a fixed-width font."""
    if not self._writes:
      return
    code = ''.join(f'    {line}\n' for line in text.splitlines())  # a code block in Markdown
    self._events.add_text(name, code, step)

  def curve(self) -> None:
    """Draws the losses so far as loss.png, which is never incomplete."""
    if not self._writes:
      return
    lines = (json.loads(line) for line in (self._local / LINES).read_text().splitlines())
    if png := loss_curve(list(lines)):
      storage.write_bytes(self._workdir / CURVE, png)

  def close(self) -> None:
    """Writes and uploads the rest. May be called again."""
    if not self._writes:
      return
    self._writes = False
    self._lines.close()
    self._events.close()
    if self._is_remote:
      self._upload()
      shutil.rmtree(self._local)

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def _upload(self):
    for file in [self._local / LINES, *(self._local / EVENTS).iterdir()]:
      target = self._workdir / file.relative_to(self._local).as_posix()
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(file.read_bytes())
    self._uploaded = time.monotonic()


class Meter:
  """Measures the speed of training without compilation, checkpoints, validation and previews.

  meter.start(step)              # after the first step, which compiles, is done
  values |= meter.read(step)     # when logging: the mean since the last read or start
  with meter.paused(state): ...  # around everything that is not training
  """

  def __init__(
    self,
    examples_per_step: int,
    flops_per_example: float,
    num_devices: int,
    peak: float | None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """`examples_per_step` is for all devices; `peak` for one, FLOP/s, None if unknown."""
    self._examples, self._flops = examples_per_step, flops_per_example
    self._devices, self._peak, self._clock = num_devices, peak, clock
    self._made = time.perf_counter()
    self._step, self._since = None, 0.0

  def age(self) -> float:
    """Seconds since the meter was made; at the first step, the time for compiling and a batch."""
    return time.perf_counter() - self._made

  def start(self, step: int) -> None:
    """Starts measuring; `step` steps are done, and none is running."""
    self._step, self._since = step, self._clock()

  def read(self, step: int) -> dict[str, float]:
    """Means from the last call until `step`; {} before `start` or without a step since.

    step_time (seconds), examples_per_second (all devices), tflops_per_device (of the model, in
    TFLOP/s), and if the peak is known, mfu, the fraction of it that is used, 0 to 1.
    """
    if self._step is None or step == self._step:
      return {}
    now = self._clock()
    step_time = (now - self._since) / (step - self._step)
    self._step, self._since = step, now
    flops = self._examples * self._flops / step_time / self._devices
    values = {
      'step_time': step_time,
      'examples_per_second': self._examples / step_time,
      'tflops_per_device': flops / 1e12,
    }
    return values if self._peak is None else values | {'mfu': flops / self._peak}

  @contextlib.contextmanager
  def paused(self, pending: Any = ()) -> Iterator[None]:
    """Does not count the time inside; waits for the arrays in `pending` first.

    These should be the newest ones. Else the steps that still run are not counted. Whatever starts
    inside must end inside.
    """
    jax.block_until_ready(pending)
    start = self._clock()
    try:
      yield
    finally:
      self._since += self._clock() - start


def loss_curve(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
  """A PNG of `loss` and `validation_loss` by `step`; None if no line has any.

  The loss axis is logarithmic, since the losses of a run may differ by orders of magnitude.
  """
  from matplotlib import ticker  # takes half a second
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), dpi=100, layout='constrained')
  axes, is_empty = figure.subplots(), True
  for name, marker in (('loss', ''), ('validation_loss', 'o')):
    points = [(x['step'], x[name]) for x in lines if isinstance(x.get(name), numbers.Real)]
    points = [(step, loss) for step, loss in points if loss > 0]  # others have no logarithm
    if points:
      marker = 'o' if len(points) == 1 else marker  # a line of one point is invisible
      label = name.replace('_', ' ')
      axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1, label=label)
      is_empty = False
  if is_empty:
    return None
  axes.set(xlabel='step', ylabel='mean loss', yscale='log')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.yaxis.set_major_formatter('{x:g}')
  low, high = axes.get_ylim()
  axes.yaxis.set_minor_formatter('{x:g}' if high < 20 * low else ticker.NullFormatter())
  axes.grid(which='both', alpha=0.3)
  axes.legend()
  png = io.BytesIO()
  figure.savefig(png, format='png')
  return png.getvalue()


def progress_line(step: int, steps: int, values: Mapping[str, float]) -> str:
  """One line for the screen, with the values that are present.

  With loss and the values of `Meter`: 'step 1,200/10,000  loss 0.0412  577 examples/s  312 TFLOP/s
  per device (39 %)  4 h 10 min left'.
  """
  parts = [f'step {step:,}/{steps:,}']
  if 'loss' in values:
    parts.append(f'loss {shown_loss(values["loss"])}')
  if 'examples_per_second' in values:
    parts.append(f'{_three_digits(values["examples_per_second"])} examples/s')
  if 'mfu' in values:  # without it, the device is a CPU or unknown
    rate = f'{_three_digits(values["tflops_per_device"])} TFLOP/s per device'
    parts.append(f'{rate} ({100 * values["mfu"]:.0f} %)')
  if 'step_time' in values and step < steps:
    parts.append(f'{_duration((steps - step) * values["step_time"])} left')
  return '  '.join(parts)


def shown_loss(loss: float) -> str:
  """The loss with four decimals; a small one with three digits."""
  return f'{loss:.4f}' if not abs(loss) < 0.001 else f'{loss:.3g}'


def memory() -> dict[str, int]:
  """Bytes in use, now and at most, on each device of this process; {} if unknown (CPU)."""
  values = {}
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    for name, key in (('in_use', 'bytes_in_use'), ('peak', 'peak_bytes_in_use')):
      if key in stats:
        values[f'memory/{name}_{device.id}'] = stats[key]
  return values


def overview(params: Mapping[str, Any]) -> str:
  """A table of parameters by dotted name, their total, and totals by the first part of the name.

  Values are arrays or ShapeDtypeStructs.
  """
  totals: dict[str, int] = {}
  for name, value in params.items():
    part = name.split('.')[0]
    totals[part] = totals.get(part, 0) + math.prod(value.shape)
  table = parameter_overview.get_parameter_overview(dict(params), include_stats=False)
  return '\n'.join([table, *(f'  {part}: {count:,}' for part, count in totals.items())])


def _lines_until(path: epath.Path, last_step: int) -> str:
  """The lines of a metrics file up to a step, without incomplete ones; '' without a file."""
  if not path.exists():
    return ''
  lines = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError):
      if json.loads(line)['step'] <= last_step:
        lines.append(line + '\n')
  return ''.join(lines)


def _plain(value):
  if isinstance(value, numbers.Integral):
    return int(value)
  value = float(value)
  return float(f'{value:.7g}') if math.isfinite(value) else str(value)


def _three_digits(value):
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _duration(seconds):
  """The two largest units: 4 h 10 min."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days} d {hours} h'
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min' if minutes else f'{seconds} s'
