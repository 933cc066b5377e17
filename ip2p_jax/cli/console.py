"""Shared parts of all commands: errors as one line, progress, the cache of compiled programs."""

import contextlib
import errno
import functools
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm
from typer import Option

from ip2p_jax import bundled
from ip2p_jax.defaults import CFG_IMAGE, CFG_TEXT, MAX_SCALE, SAMPLER, SAMPLERS, STEPS
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import INTERRUPTED, interruptible
from ip2p_jax.progress import waiting

MISTAKE = 2  # exit status
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk without room
MAX_TEXT = 10_000  # characters; more would not fit into the metadata of a JPEG

Ema = Annotated[
  bool | None,
  Option(
    '--ema/--no-ema',
    help='Averaged or live weights, if a single file or workdir holds both; by default averaged,'
    ' unless the file shows that its live weights were merged, or got an adapter.',
  ),
]


def _defaults_of(usual: float | str, miniature: float | str) -> str:
  """Ends the help of an option of `editor_defaults`."""
  return f'  [default: {usual}, with the miniature {miniature}]'


# An editor's, whose defaults `editor_defaults` chooses.
Steps = Annotated[
  int | None, Option(min=1, help='Steps of the sampler.' + _defaults_of(STEPS, bundled.STEPS))
]
CfgText = Annotated[
  float | None,
  Option(
    min=-MAX_SCALE,
    max=MAX_SCALE,
    help='How strongly to follow the text: 3 to 12.'
    + _defaults_of(CFG_TEXT, bundled.TEXT_GUIDANCE),
  ),
]
CfgImage = Annotated[
  float | None,
  Option(
    min=-MAX_SCALE,
    max=MAX_SCALE,
    help='How strongly to keep the image: 1 to 2.2.'
    + _defaults_of(CFG_IMAGE, bundled.IMAGE_GUIDANCE),
  ),
]
SamplerName = Annotated[
  str | None, Option(help=f'{SAMPLERS}.' + _defaults_of(SAMPLER, bundled.SAMPLER))
]
Spacing = Annotated[
  str | None, Option(help="linspace, leading or trailing; by default the sampler's.")
]
Karras = Annotated[bool, Option('--karras', help='Noise levels of Karras et al.')]
Rescale = Annotated[float, Option(help='0 to 1, against overexposure at high scales.')]
Interval = Annotated[
  tuple[float, float], Option(help='Part of the steps with guidance, as in 0.2 0.8; saves time.')
]


def editor_defaults(ckpts: Sequence[str | None], *values):
  """Steps, text and image scale, sampler; what is None becomes what the checkpoints are best with.

  `ckpts` that are None are the bundled miniature.
  """
  own = bundled.STEPS, bundled.TEXT_GUIDANCE, bundled.IMAGE_GUIDANCE, bundled.SAMPLER
  is_small = bool(ckpts) and all(map(bundled.is_like_it, ckpts))
  defaults = own if is_small else (STEPS, CFG_TEXT, CFG_IMAGE, SAMPLER)
  return [x if value is None else value for value, x in zip(values, defaults, strict=True)]


@contextlib.contextmanager
def one_line(name: str, when_out_of_memory: str) -> Iterator[None]:
  """Turns errors that a user can mend into one line on stderr and status 2. Shows our log there."""
  try:
    with _log_shown(name):
      yield
    return
  except InputError as error:
    complain(name, f'error: {error}')
  except OSError as error:  # no space, no permission, a name too long, a file in the way
    advice = '; make room, then run the same command again' if error.errno in FULL else ''
    complain(name, f'error: {error.filename or "the disk"}: {error.strerror or error}{advice}.')
  except Exception as error:
    if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    complain(name, f'error: out of memory; {when_out_of_memory}')
  sys.exit(MISTAKE)


@contextlib.contextmanager
def _log_shown(name: str) -> Iterator[None]:
  """Shows the log of our modules as lines on the first process's stderr."""
  ours, handler = logging.getLogger('ip2p_jax'), logging.Handler()

  def emit(record):
    import jax

    kind = 'warning: ' if record.levelno >= logging.WARNING else ''
    if jax.process_index() == 0:
      complain(name, kind + record.getMessage())

  handler.emit, before = emit, (ours.level, ours.propagate)
  ours.addHandler(handler)
  ours.setLevel(logging.INFO)
  ours.propagate = False  # else absl's handler shows it again
  try:
    yield
  finally:
    ours.removeHandler(handler)
    ours.level, ours.propagate = before


def complain(name: str, text: str) -> None:
  print(f'{name}: {" ".join(text.split())}', file=sys.stderr, flush=True)


def cache_compilations() -> None:
  """Keeps compiled programs on disk, so that the next start is fast."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'ip2p-jax'
    with contextlib.suppress(OSError):  # works without a cache, too
      folder.mkdir(parents=True, exist_ok=True)
      jax.config.update('jax_compilation_cache_dir', str(folder))
      _drop_damaged(folder)


def _drop_damaged(folder: Path) -> None:
  """Removes files from a cache that jax cannot read, so that jax writes them again.

  jax writes its files in place and never overwrites one, so a kill or a full disk leaves a partial
  file.
  """
  show = warnings.showwarning

  def remove_and_show(message, *rest):
    if match := re.match(r"Error reading persistent compilation cache.*'([\w<>]+)'", str(message)):
      for file in folder.glob(f'{match[1]}-*'):
        file.unlink(missing_ok=True)
    show(message, *rest)

  warnings.showwarning = remove_and_show


def run(app: typer.Typer | Callable, name: str) -> None:
  """Runs a command line. A user's mistake is one line on stderr and exit status 2."""
  if not isinstance(app, typer.Typer):
    function, app = app, typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
  with warnings.catch_warnings():
    warnings.simplefilter('default', UserWarning)
    warn = functools.cache(lambda message: complain(name, f'warning: {message}'))  # each once
    warnings.showwarning = lambda message, *_: warn(str(message))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to clean up first

    def end(_number):
      complain(name, 'stopped')
      os._exit(INTERRUPTED)

    with interruptible(end):
      status = _status(app, name)
  if status == INTERRUPTED:  # a normal exit could fail while the device works
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)


def _status(app: typer.Typer, name: str) -> int:
  try:
    with one_line(name, 'lower --batch-size or --resolution.'):
      status = typer.main.get_command(app)(prog_name=name, standalone_mode=False)
    if status != INTERRUPTED:
      return status or 0
  except typer.Abort:  # the same in older versions of typer
    pass
  except Exception as error:
    if not hasattr(error, 'format_message'):  # errors of wrong flags have it
      raise
    command = getattr(getattr(error, 'ctx', None), 'command_path', name)
    complain(name, f'error: {error.format_message()} (see {command} --help)')
    return MISTAKE
  complain(name, 'stopped')
  return INTERRUPTED


def changed_options(context: typer.Context) -> dict[str, str]:
  """The flags of the options on the command line that differ from their defaults, by name.

  So a script may repeat defaults.
  """
  return {
    parameter.name: parameter.opts[0]
    for parameter in context.command.params
    if context.get_parameter_source(parameter.name).name == 'COMMANDLINE'
    and context.params[parameter.name] != parameter.get_default(context)
  }


def imported(flag: str, spec: str) -> Callable:
  """The user's function 'MODULE:FUNCTION' or 'FILE.py:FUNCTION'; InputError if there is none.

  A module may be in the current folder, and what a file imports beside it.
  """
  module, _, name = spec.rpartition(':')
  folder, file = os.path.split(module)
  is_file = file.endswith('.py')
  sys.path.insert(0, os.path.abspath(folder) if is_file else os.getcwd())
  try:
    return getattr(importlib.import_module(file[:-3] if is_file else module), name)
  except (Exception, SystemExit) as error:  # the module may raise anything
    raise InputError(
      f'{flag} {spec}: cannot be imported ({error}); write MODULE:FUNCTION or FILE.py:FUNCTION.'
    ) from error
  finally:
    if not is_file:
      sys.path.pop(0)


def counted(count: int, noun: str) -> str:
  """A number with its noun: 1 row, 2,000 rows."""
  return f'{count:,} {noun}{"s" * (count != 1)}'


def say(text: str) -> None:
  tqdm.write(text)


def save(image, path: Path, settings: dict) -> None:
  """Writes an image with its settings, and prints its path."""
  from ip2p_jax import images

  images.save(image, path, settings)
  say(f'wrote {path}')


@contextlib.contextmanager
def progress(unit: str, compiles: bool = False) -> Iterator[Callable[[int, int], None] | None]:
  """Counts steps or rows on a terminal. Gives None without a terminal.

  `compiles`: whether the first of them waits for the compiler, which is then announced.
  """
  is_watched = sys.stderr.isatty()
  with contextlib.ExitStack() as stack:
    starting = stack.enter_context(contextlib.ExitStack())
    if compiles:
      starting.enter_context(waiting(f'compiling, about a minute, then the first {unit}'))
    if not is_watched:
      yield None
      return
    bars = []

    def count(done, total):
      if not bars:
        starting.close()
        bars.append(stack.enter_context(tqdm(unit=unit, dynamic_ncols=True)))
      bars[0].total = total
      bars[0].update(done - bars[0].n)

    yield count
