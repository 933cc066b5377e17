"""Files of one version of the code, which every later version must read and continue.

  python tests/old_files.py tests/fixtures/NAME.tar.xz                  by the code of this tree
  python tests/old_files.py tests/fixtures/NAME.tar.xz --code FOLDER    by the code of another tree

All work goes through the command line, so this script runs on any version. The archive holds

  inputs/      tiny models, captions and triplets, the same in every archive
  begun/       runs that were stopped half way
  done/        the results of these runs, and files made from them
  made.json    the machine and the libraries that made the archive

`tests/test_old_files.py` finishes each job of an archive, and compares the results with `done`.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import fake_server

ROOT = Path(__file__).parent.parent
ARCHIVES = sorted((ROOT / 'tests' / 'fixtures').glob('*.tar.xz'))
LIBRARIES = 'array_record', 'jax', 'jaxlib', 'numpy', 'optax', 'pillow', 'safetensors', 'simplejpeg'
NUMBERS = 'step', 'loss', 'grad_norm', 'learning_rate', 'validation_loss', 'skipped'
UNKEPT = '*.lock', 'tensorboard', 'loss.png', 'histograms.png'  # drawings, and a machine's name


class Job(NamedTuple):
  """One kind of work.

  Attributes:
    commands: of the whole job. OUT is the folder for new files, URL the fake server's.
    is_begun: folder -> whether the first command has done enough to be stopped; None if it is not
      stopped.
    signal: stops the first command.
  """

  commands: Sequence[str]
  is_begun: Callable[[Path], bool] | None = None
  signal: int = signal.SIGKILL


def lines_of(file: Path) -> list[str]:
  return file.read_text().splitlines() if file.exists() else []


def _has_step(step: int) -> Callable[[Path], bool]:
  lines = lambda folder: lines_of(folder / 'metrics.jsonl')
  return lambda folder: any(json.loads(line)['step'] >= step for line in lines(folder))


def _has_answers(folder: Path) -> bool:
  return len(lines_of(folder / 'answers-00000-of-00001.jsonl')) >= 4


def _is_torn(folder: Path) -> bool:
  """Whether there are two batches of pairs, and images of the next one without lines."""
  places = list(folder.glob('0*'))
  lines = [len(lines_of(place / 'scores.jsonl')) for place in places]
  images = [len(list(place.glob('*_0.jpg'))) for place in places]
  return sum(lines) >= 4 and sum(images) > sum(lines)


TRAIN = (
  'train.py --config=configs/tiny.py --config.resolution=16 --config.batch_size=4'
  ' --config.log.every=1 --config.log.previews=0 --config.optimizer.schedule=cosine'
  ' --config.optimizer.learning_rate=0.001 --config.optimizer.ema=0.9 --config.steps=20'
)
WRITE = 'ip2p captions write inputs/captions.txt'
JOBS = {
  'language': Job(
    [
      'ip2p captions train --config configs/captions.py --workdir begun/language'
      ' --config.checkpoint=inputs/language --config.data.path=inputs/triplets.jsonl'
      ' --config.data.holdout=0.15 --config.batch_size=16 --config.steps=400 --config.dtype=float32'
      ' --config.remat=none --config.optimizer.learning_rate=0.02 --config.optimizer.ema=0.9'
      ' --config.log.every=5 --config.log.checkpoint_every=1000 --config.log.validate_every=10',
      'ip2p convert begun/language OUT/writer',
    ],
    _has_step(300),
    signal.SIGTERM,
  ),
  'captions': Job(
    [f'{WRITE} begun/captions --model done/writer --slots 2 --max-tokens 32'],
    _has_answers,
  ),
  'asked': Job(
    [f'{WRITE} begun/asked --server URL --server-model tiny --concurrency 1 --examples 2 --yes'],
    _has_answers,
  ),
  'pairs': Job(
    [
      'ip2p pairs done/captions/prompts.jsonl begun/pairs --ckpt inputs/checkpoint'
      ' --clip inputs/clip --samples 2 --steps 20 --control share+auto --batch-size 2',
      'ip2p filter begun/pairs OUT/filtered --image -1 --caption -1 --direction -1',
    ],
    _is_torn,
  ),
  'shards': Job(['ip2p pack done/filtered OUT/shards --size 16 --holdout 0.2 --workers 0']),
  'latents': Job(
    ['ip2p pack done/shards OUT/latents --latents --ckpt inputs/checkpoint --workers 0']
  ),
  'editor': Job(
    [
      f'{TRAIN} --workdir=begun/editor --config.checkpoint=inputs/checkpoint'
      ' --config.data.path=done/latents',
      'ip2p convert begun/editor OUT/exported --no-verify',
      'ip2p convert begun/editor OUT/exported.safetensors --no-verify',
    ],
    _has_step(3),
    signal.SIGTERM,
  ),
  'lora': Job(
    [
      f'{TRAIN} --workdir=begun/lora --config.checkpoint=done/exported --config.lora.rank=2'
      ' --config.data.path=done/shards',
      'ip2p convert begun/lora OUT/adapters.safetensors --to lora',
    ],
    _has_step(3),
    signal.SIGTERM,
  ),
  'edit': Job(
    [
      'ip2p edit --ckpt done/exported.safetensors -i inputs/photo.png -e winter -o OUT/edit.png'
      ' --steps 4 --seed 1'
    ]
  ),
}


def go_on(name: str, code: Path, folder: Path, out: str) -> None:
  """Finishes a job by the code of a tree; the results go to `out`.

  `folder` is an unpacked archive.
  """
  with _started(JOBS[name].commands, code, folder, out) as process:
    output = process.communicate()[0]
  assert process.returncode == 0, output
  begun, end = folder / 'begun' / name, folder / out / name
  if (begun / 'metrics.jsonl').exists():  # without the times of its lines
    lines = map(json.loads, lines_of(begun / 'metrics.jsonl'))
    numbers = [{key: line[key] for key in NUMBERS if key in line} for line in lines]
    end.mkdir(parents=True)
    (end / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in numbers))
  elif begun.exists():
    shutil.copytree(begun, end, ignore=shutil.ignore_patterns('*.jpg'))  # `filter` has them all


@contextlib.contextmanager
def _started(commands, code, folder, out, delay=0.0) -> Iterator[subprocess.Popen]:
  """The commands in a new process, with a fake server if they need one."""
  with contextlib.ExitStack() as stack:
    marks = {'OUT/': f'{out}/', 'configs/': f'{code}/configs/', 'train.py': f'{code}/train.py'}
    if any(' URL ' in command for command in commands):
      server = stack.enter_context(fake_server.running())
      server.delay, marks['URL'] = delay, server.url
    for mark, value in marks.items():
      commands = [command.replace(mark, value) for command in commands]
    environment = os.environ | {
      'PYTHONPATH': str(code),
      'JAX_PLATFORMS': 'cpu',
      'HF_HUB_OFFLINE': '1',
      # These programs compile longer than they run. Other settings change the last digits.
      'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
    }
    yield stack.enter_context(
      subprocess.Popen(
        [sys.executable, __file__, '--run', *commands], cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      )
    )  # fmt: skip


def run(commands: Sequence[str]) -> None:
  """Runs commands in this process, one after the other, until one fails."""
  sys.path[0] = ''  # not the folder of this file
  for command in commands:
    sys.argv = command.split()
    try:
      if sys.argv[0] == 'ip2p':
        runpy.run_module('ip2p_jax.cli', run_name='__main__', alter_sys=True)
      else:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
      if stop.code:
        raise


def machine() -> dict[str, str]:
  """The machine and libraries; equal ones must give the numbers of an archive bit for bit."""
  about = {line for line in lines_of(Path('/proc/cpuinfo')) if line[:5] in ('model', 'flags')}
  processor = '\n'.join(sorted(about)) or platform.processor()
  digest = hashlib.blake2b(processor.encode(), digest_size=8).hexdigest()
  return {name: version(name) for name in LIBRARIES} | {'processor': digest}


def make(archive: Path, code: Path) -> None:
  """Makes an archive by the code of a tree."""
  with tempfile.TemporaryDirectory() as place:
    folder = Path(place)
    os.environ['XDG_CACHE_HOME'] = f'{place}/cache'
    if ARCHIVES:
      shutil.unpack_archive(ARCHIVES[0], folder / 'first', filter='data')
      (folder / 'first' / 'inputs').rename(folder / 'inputs')
    else:
      make_inputs(folder / 'inputs')
    for name, job in JOBS.items():
      begun, copy = folder / 'begun' / name, folder / 'kept'
      if job.is_begun:
        _begin(name, code, folder)
        shutil.copytree(begun, copy, ignore=shutil.ignore_patterns(*UNKEPT))
      go_on(name, code, folder, 'done')
      if job.is_begun:
        shutil.rmtree(begun)
        copy.rename(begun)
      print(f'{name}: done', flush=True)
    (folder / 'made.json').write_text(json.dumps(machine(), indent=2) + '\n')
    with tarfile.open(archive, 'w:xz', preset=9) as written:
      for name in ('inputs', 'begun', 'done', 'made.json'):
        written.add(folder / name, name, filter=_plain)


def _begin(name, code, folder) -> None:
  """Runs the job's first command and stops it half way."""
  job, place = JOBS[name], folder / 'begun' / name
  while True:
    with _started(job.commands[:1], code, folder, 'done', delay=0.1) as process:
      while process.poll() is None and not job.is_begun(place):
        time.sleep(1e-4)
      process.send_signal(job.signal)
      output = process.communicate()[0]
    if process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[job.signal]:
      return
    assert process.returncode == 0, output
    shutil.rmtree(place)  # it ended before it was stopped


def is_unkept(file: Path) -> bool:
  return any(fnmatch.fnmatch(file.name, pattern) for pattern in UNKEPT)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
  """The entry without user and time; None for a file that is only for people."""
  if is_unkept(Path(entry.name)):
    return None
  entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, 0, '', ''
  return entry


COLOURS = 'red', 'blue', 'green', 'golden'
THINGS = 'cat', 'house', 'tree', 'boat', 'chair', 'hat', 'lamp'
UNET = {
  'in_channels': 4,
  'block_out_channels': [4],
  'layers_per_block': 1,
  'down_block_types': ['CrossAttnDownBlock2D'],
  'up_block_types': ['UpBlock2D'],
  'cross_attention_dim': 8,
  'attention_head_dim': 2,
  'norm_num_groups': 2,
  'sample_size': 8,
}
VAE = {
  'block_out_channels': [4, 4],
  'down_block_types': ['DownEncoderBlock2D'] * 2,
  'up_block_types': ['UpDecoderBlock2D'] * 2,
  'norm_num_groups': 2,
}
TEXT = {'hidden_size': 8, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}


def make_inputs(folder: Path) -> None:
  """Models of random weights, and texts for them."""
  import tiny_llamas
  import tiny_models
  from PIL import Image

  from ip2p_jax import weights

  tiny_models.TINY_TEXT.update(TEXT)
  tiny_models.TINY_VISION.update(TEXT)
  weights.write(
    tiny_models.checkpoint(UNET, vae_config=tiny_models.TINY_VAE | VAE), folder / 'checkpoint'
  )
  tiny_models.write_clip(folder / 'clip', 32)
  triplets = [
    (f'a {old} {thing}', f'make it {new}', f'a {new} {thing}')
    for thing in THINGS
    for old in COLOURS
    for new in COLOURS
    if old != new
  ]
  keys = 'caption', 'instruction', 'edited_caption'
  lines = [json.dumps(dict(zip(keys, triplet, strict=True))) + '\n' for triplet in triplets]
  (folder / 'triplets.jsonl').write_text(''.join(lines))
  captions = [f'a {COLOURS[i % 4]} {THINGS[i % 5]}' for i in range(8)]
  (folder / 'captions.txt').write_text(''.join(f'{caption}\n' for caption in captions))
  tiny_llamas.TEXT = '\n##\n'.join('\n%%\n'.join(triplet) for triplet in triplets) + '\nEND'
  tiny_llamas.VOCABULARY = 290
  tiny_llamas.write(
    folder / 'language', vocab_size=290, hidden_size=16, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=1,
  )  # fmt: skip
  Image.linear_gradient('L').resize((16, 16)).convert('RGB').save(folder / 'photo.png')


if __name__ == '__main__':
  if sys.argv[1:2] == ['--run']:
    run(sys.argv[2:])
    sys.exit()
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('archive', type=Path)
  parser.add_argument('--code', type=Path, default=ROOT)
  arguments = parser.parse_args()
  make(arguments.archive.resolve(), arguments.code.resolve())
