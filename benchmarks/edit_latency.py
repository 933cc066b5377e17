"""How fast is one edit: JAX beside PyTorch diffusers, the same random weights, the same work.

Every contender runs in a process of its own, so that its start and its memory are its own; the
processes take turns (A-B-B-A) within one run. Both sides go from PIL picture and instruction to PIL
picture. Before anything is timed, their float32 latents must agree, given the same noise.

B pictures per edit, h w latent sides, S steps.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_turns import SPAWN, Failed, machine, peak_rss, results, say, whole

EXAMPLES = """examples:
  python benchmarks/edit_latency.py --small
  python benchmarks/edit_latency.py --config sd15 --repeats 5 --out edit_latency.jsonl
  python benchmarks/edit_latency.py --config sd15 --only jax  (needs neither torch nor diffusers)
  python benchmarks/edit_latency.py --small --weights weights-small  (keeps the weights)
"""
INSTRUCTION, TEXT_GUIDANCE, IMAGE_GUIDANCE = 'make it winter', 7.5, 1.5
GATE = 1e-3  # relative error of float32 latents
SMALL = {
  'unet': {
    'block_out_channels': [48, 96, 192],
    'layers_per_block': 1,
    'down_block_types': ['CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'],
    'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'],
    'cross_attention_dim': 64,
    'attention_head_dim': 4,
    'norm_num_groups': 16,
  },
  'vae': {
    'block_out_channels': [16, 32, 48, 48],
    'down_block_types': ['DownEncoderBlock2D'] * 4,
    'up_block_types': ['UpDecoderBlock2D'] * 4,
    'layers_per_block': 1,
    'norm_num_groups': 16,
  },
  'text_encoder': {
    'hidden_size': 64,
    'intermediate_size': 256,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'projection_dim': 64,
  },
}
ARCHITECTURES = {'small': SMALL, 'sd15': {'unet': {}, 'vae': {}, 'text_encoder': {}}}
COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


class Track(NamedTuple):
  """What is run on one kind of device."""

  dtype: str
  size: int  # of the square picture, in pixels
  steps: int
  gate_steps: int
  batches: tuple[int, ...]
  contenders: tuple[str, ...]


CPU_CONTENDERS = ('jax', 'torch', 'torch channels_last')
GPU_CONTENDERS = ('jax', 'torch eager', 'torch compile', 'torch max-autotune')
TRACKS = {
  ('small', 'cpu'): Track('float32', 64, 10, 10, (1,), CPU_CONTENDERS),
  ('sd15', 'cpu'): Track('float32', 256, 2, 2, (1,), CPU_CONTENDERS),
  ('small', 'gpu'): Track('bfloat16', 64, 10, 10, (1,), GPU_CONTENDERS),
  ('sd15', 'gpu'): Track('bfloat16', 512, 100, 4, (1, 8), GPU_CONTENDERS),
}


class Setup(NamedTuple):
  """What a contender's process is told at its start."""

  folder: str
  device: str  # 'cpu', 'gpu' or 'tpu'
  dtype: str
  size: int
  batch: int
  threads: int  # on a CPU
  cache: str | None  # a folder for compiled programs


def main():
  args = arguments()
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.weights or Path(scratch) / 'weights'
    with SPAWN.Pool(1) as pool:  # so that jax and the weights do not stay in this process
      device = pool.apply(write_checkpoint, (args.config, folder))
    track = track_of(args, device)
    setup = Setup(str(folder), device, track.dtype, track.size, 1, args.threads, None)
    report = {
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'config': args.config,
      'device': device,
      'machine': machine(),
      'threads': args.threads if device == 'cpu' else None,
      'repeats': args.repeats,
      **track._asdict(),
      'gate': gate(track, setup, args.limit),
    }
    report['rows'] = [
      row
      for batch in track.batches
      for row in compare(track, setup._replace(batch=batch), args, Path(scratch) / str(batch))
    ]
  summarize(report['rows'], track.steps)
  print(table(report))
  if args.out:
    with args.out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(report) + '\n')


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--small', action='store_const', const='small', dest='config', help='10.9 M parameters'
  )
  parser.add_argument(
    '--config', choices=ARCHITECTURES, default='sd15', help='size of the networks'
  )
  parser.add_argument('--steps', type=whole, help='2 or more; by default the track has its own')
  parser.add_argument('--size', type=whole, help='of the picture, in pixels; a multiple of 64')
  parser.add_argument(
    '--repeats', type=whole, default=5, help='A-B-B-A rounds: two edits a side each'
  )
  parser.add_argument('--only', help='contenders, separated by commas, such as jax or jax,torch')
  parser.add_argument(
    '--threads', type=whole, default=2, help='on a CPU, for each side (default 2)'
  )
  parser.add_argument('--limit', type=float, default=900, help='seconds for one start or one edit')
  parser.add_argument('--weights', type=Path, help='folder to keep the weights in, or to reuse')
  parser.add_argument(
    '--out', type=results, help='file to append the figures to, one JSON line a run'
  )
  args = parser.parse_args()
  if args.steps is not None and args.steps < 2:
    parser.error('--steps must be 2 or more: the time of one step is a difference of two edits')
  if args.size is not None and (args.size < 64 or args.size % 64):
    parser.error('--size must be a multiple of 64')
  return args


def track_of(args, device) -> Track:
  track = TRACKS[args.config, 'cpu' if device == 'cpu' else 'gpu']
  contenders = track.contenders if device in ('cpu', 'gpu') else ('jax',)
  if args.only:
    chosen = tuple(name.strip() for name in args.only.split(','))
    if unknown := set(chosen) - set(contenders):
      sys.exit(f'--only: no contender {", ".join(unknown)} on this {device}; '
               f'there are {", ".join(contenders)}.')  # fmt: skip
    contenders = chosen
  return track._replace(
    contenders=contenders, steps=args.steps or track.steps, size=args.size or track.size
  )


# The weights.


def write_checkpoint(config: str, folder: Path) -> str:
  """Writes a diffusers folder with random normal weights, unless it is there; JAX's backend."""
  import jax

  from ip2p_jax import weights
  from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
  from ip2p_jax.pipeline.networks import networks_of
  from ip2p_jax.weights.tensors import COMPONENTS

  if (folder / 'model_index.json').exists():
    say(f'weights of {folder}')
    return jax.default_backend()
  architecture = ARCHITECTURES[config]
  configs = {
    'unet': UNetConfig.from_json({**architecture['unet'], 'in_channels': 8}).to_json(),
    'vae': VAEConfig.from_json(architecture['vae']).to_json(),
    'text_encoder': {**dataclasses.asdict(TextConfig()), **architecture['text_encoder']},
    'scheduler': {
      '_class_name': 'EulerAncestralDiscreteScheduler',
      'beta_start': 0.00085,
      'beta_end': 0.012,
      'beta_schedule': 'scaled_linear',
      'steps_offset': 1,
    },
  }
  checkpoint = weights.Checkpoint(configs, {}, weights.clip_tokenizer(), config)
  shapes = networks_of(checkpoint).shapes
  rng, count = np.random.default_rng(0), 0
  for component in COMPONENTS:
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: random_weight(path[-1].key, leaf.shape, rng), shapes[component]
    )
    count += sum(leaf.size for leaf in jax.tree.leaves(params))
    checkpoint.tensors[component] = weights.to_tensors(params)
  weights.write(checkpoint, folder)
  say(f'wrote {count / 1e6:.1f} M random normal weights')
  return jax.default_backend()


def random_weight(name, shape, rng) -> np.ndarray:
  """Scaled so that activations stay near one; never zero, which some hardware multiplies faster."""
  x = rng.standard_normal(shape, np.float32)
  if len(shape) == 1:
    return np.float32(0.1) * x + np.float32(name == 'scale')
  fan_in = shape[-1] if name == 'embedding' else np.prod(shape[:-1])
  return x * np.float32(fan_in**-0.5)


# The contenders. Both have the same methods; each lives in a process of its own.


class Jax:
  def __init__(self, name: str, setup: Setup):
    import jax

    from ip2p_jax import Editor

    self.compilations, self.compile_seconds, self.setup = 0, 0.0, setup
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    if setup.cache:
      jax.config.update('jax_compilation_cache_dir', setup.cache)
    else:  # the gate: full float32 on every device
      jax.config.update('jax_default_matmul_precision', 'highest')
    self.device = jax.local_devices()[0]
    self.editor = Editor.load(setup.folder, setup.dtype)

  def _on_event(self, event, seconds, **_):
    if event == COMPILE_EVENT:
      self.compilations += 1
      self.compile_seconds += seconds

  def edit(self, steps, text=INSTRUCTION, text_guidance=TEXT_GUIDANCE,
           image_guidance=IMAGE_GUIDANCE, seed=0) -> float:  # fmt: skip
    """Seconds of one edit, from PIL to PIL."""
    pictures = example_pictures(self.setup)
    start = time.perf_counter()
    self.editor.edit(
      pictures, text, steps=steps, text_guidance=text_guidance, image_guidance=image_guidance,
      seed=seed,
    )  # fmt: skip
    return time.perf_counter() - start

  def latents(self, noise) -> np.ndarray:
    """noise [S + 1, B, h, w, 4] -> scaled latents [B, h, w, 4]."""
    from ip2p_jax.editing.editor import Sampling

    pictures = np.stack([np.asarray(picture) for picture in example_pictures(self.setup)])
    edit = self.editor.edit_arrays(
      pictures, [INSTRUCTION] * len(pictures), Sampling(len(noise) - 1),
      text_guidance=TEXT_GUIDANCE, image_guidance=IMAGE_GUIDANCE,
      init_noise=noise[0], step_noise=noise[1:],
    )  # fmt: skip
    return np.asarray(edit.latents)

  def settle(self):
    """Nothing to do: the weights are in memory of their own."""

  def later_compilations(self, steps) -> int:
    """How many programs are compiled when instruction, scales and seed change."""
    before = self.compilations
    self.edit(steps, text='turn the sky into a sea of red and very small umbrellas')
    self.edit(steps, text_guidance=5.0, image_guidance=1.2)
    self.edit(steps, seed=2**32 - 1)
    return self.compilations - before

  def facts(self) -> dict[str, Any]:
    import jax

    on_cpu = self.setup.device == 'cpu'
    memory = peak_rss() if on_cpu else self.device.memory_stats()['peak_bytes_in_use']
    return {
      'peak_bytes': memory,
      'compile_seconds': self.compile_seconds,
      'versions': {'jax': jax.__version__, 'jaxlib': jax.lib.__version__},
      'hardware': self.device.device_kind,
    }


class Torch:
  def __init__(self, name: str, setup: Setup):
    import torch
    import transformers
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from diffusers.utils import logging

    for library in (logging, transformers.logging):
      library.set_verbosity_error()
      library.disable_progress_bar()
    self.torch, self.setup = torch, setup
    self.on_cpu = setup.device == 'cpu'
    self.device = 'cpu' if self.on_cpu else 'cuda'
    torch.set_num_threads(setup.threads)
    if not setup.cache:  # the gate: full float32 on every device
      torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
      setup.folder, torch_dtype=getattr(torch, setup.dtype)
    )
    pipeline.set_progress_bar_config(disable=True)
    self.pipeline = pipeline.to(self.device)
    if name != 'torch':
      pipeline.unet.to(memory_format=torch.channels_last)
      pipeline.vae.to(memory_format=torch.channels_last)
    modes = {'torch compile': 'default', 'torch max-autotune': 'max-autotune-no-cudagraphs'}
    if name in modes:
      pipeline.unet = torch.compile(pipeline.unet, mode=modes[name])
      pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=modes[name])

  def edit(self, steps, text=INSTRUCTION, text_guidance=TEXT_GUIDANCE,
           image_guidance=IMAGE_GUIDANCE, seed=0) -> float:  # fmt: skip
    """Seconds of one edit, from PIL to PIL."""
    pictures = example_pictures(self.setup)
    start = time.perf_counter()
    self.pipeline(
      [text] * len(pictures), image=pictures, num_inference_steps=steps,
      guidance_scale=text_guidance, image_guidance_scale=image_guidance,
      generator=self.torch.Generator(self.device).manual_seed(seed),
    )  # fmt: skip
    return time.perf_counter() - start

  def latents(self, noise) -> np.ndarray:
    """noise [S + 1, B, h, w, 4] -> scaled latents [B, h, w, 4]. The process is of no use after."""
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as scheduler

    noise = self.torch.from_numpy(np.moveaxis(noise, -1, 2).copy()).to(self.device)
    draws = iter(noise[1:])
    scheduler.randn_tensor = lambda *_, **__: next(draws)
    pictures = example_pictures(self.setup)
    latents = self.pipeline(
      [INSTRUCTION] * len(pictures), image=pictures, num_inference_steps=len(noise) - 1,
      guidance_scale=TEXT_GUIDANCE, image_guidance_scale=IMAGE_GUIDANCE,
      latents=noise[0], output_type='latent',
    ).images  # fmt: skip
    return np.moveaxis(latents.cpu().numpy(), 1, -1)

  def settle(self):
    """Weights mapped from a file may be dropped and read again while another side runs."""
    models = (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder)
    for tensor in (t for model in models for t in (*model.parameters(), *model.buffers())):
      tensor.data = tensor.data.clone()

  def facts(self) -> dict[str, Any]:
    import diffusers

    cuda = self.torch.cuda
    return {
      'peak_bytes': peak_rss() if self.on_cpu else cuda.max_memory_allocated(),
      'versions': {'torch': self.torch.__version__, 'diffusers': diffusers.__version__},
      'hardware': 'cpu' if self.on_cpu else cuda.get_device_name(),
    }


def example_pictures(setup: Setup) -> list:
  """Colour gradients, each picture of the batch another."""
  from PIL import Image  # here, since a training step's benchmark uses this file without

  y, x = np.mgrid[: setup.size, : setup.size] / setup.size
  pictures = []
  for i in range(setup.batch):
    channels = [x, y, 0.5 + 0.5 * np.sin((20 + i) * x) * np.cos(14 * y)]
    pictures.append(Image.fromarray(np.round(255 * np.stack(channels, -1)).astype(np.uint8)))
  return pictures


# The processes.


def serve(pipe, name: str, setup: Setup):
  """Runs one contender: answers (method, arguments) with (whether it went well, result)."""
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  os.environ['OMP_NUM_THREADS'] = str(setup.threads)
  os.environ['TRANSFORMERS_VERBOSITY'] = 'error'
  warnings.simplefilter('ignore', FutureWarning)
  if setup.cache:
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = setup.cache
  if setup.device == 'cpu' and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
  try:
    contender = (Jax if name == 'jax' else Torch)(name, setup)
    while request := pipe.recv():
      method, arguments = request
      pipe.send((True, getattr(contender, method)(*arguments)))
  except Exception:
    pipe.send((False, traceback.format_exc()))


class Process:
  """A contender as seen from outside, and its row of the table."""

  def __init__(self, name: str, setup: Setup, limit: float):
    self.limit, self.began, self.is_alive = limit, time.perf_counter(), True
    self.row = {'contender': name, 'batch': setup.batch, 'long': [], 'short': []}
    self.pipe, theirs = SPAWN.Pipe()
    self.process = SPAWN.Process(target=serve, args=(theirs, name, setup), daemon=True)
    self.process.start()
    theirs.close()

  def ask(self, method: str, *arguments):
    """The result of the contender's method."""
    try:
      self.pipe.send((method, arguments))
      if not self.pipe.poll(self.limit):
        raise Failed(f'{method} took longer than {self.limit:.0f} s')
      went_well, answer = self.pipe.recv()
    except (EOFError, OSError):
      raise Failed('the process died; was there enough memory?') from None
    if not went_well:
      raise Failed(answer)
    return answer

  def first_edit(self, steps) -> tuple[float, float]:
    """Seconds from the start of the process to its loaded weights, and to its first picture."""
    self.ask('facts')
    loaded = time.perf_counter() - self.began
    self.ask('edit', steps)
    return loaded, time.perf_counter() - self.began

  def stop(self, patience=10):
    """Lets the process end within `patience` seconds, then kills it."""
    self.is_alive = False
    if patience:
      with contextlib.suppress(OSError):
        self.pipe.send(None)
      self.process.join(patience)
    self.process.kill()
    self.process.join()


def attempt(processes, do):
  """`do` with each process that is alive; one that fails is noted and stopped, the others go on."""
  for process in processes:
    if process.is_alive:
      try:
        do(process)
      except Failed as error:
        say(f'{process.row["contender"]}: {error}')
        process.row['failed'] = str(error).splitlines()[-1]
        process.stop(patience=0)


# The measurement.


def gate(track: Track, setup: Setup, limit: float) -> float | None:
  """Relative error of the latents, float32, one picture; exits if it is too large."""
  others = [name for name in track.contenders if name != 'jax']
  if 'jax' not in track.contenders or not others:
    return None
  shape = (track.gate_steps + 1, 1, track.size // 8, track.size // 8, 4)
  noise = np.random.default_rng(1).standard_normal(shape, np.float32)
  results = []
  for name in ('jax', others[0]):
    say(f'correctness: {name}, {track.gate_steps} steps in float32')
    process = Process(name, setup._replace(dtype='float32'), limit)
    try:
      results.append(process.ask('latents', noise).astype(np.float64))
    except Failed as error:
      sys.exit(f'{name}: {error}')
    finally:
      process.stop()
  ours, theirs = results
  error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  say(f'correctness: relative error of the latents {error:.1e}')
  if not error <= GATE:
    sys.exit(f'the latents differ by {error:.1e}, more than {GATE:.0e}; nothing was timed.')
  return error


def compare(track: Track, setup: Setup, args, scratch: Path) -> list[dict[str, Any]]:
  """A row per contender: started one by one, timed in turns, then started once more."""
  long, short, processes = track.steps, track.steps // 2, []

  def start(name):
    cache = scratch / name.replace(' ', '_')
    return Process(name, setup._replace(cache=str(cache)), args.limit)

  def cold(process):
    process.row['cold_seconds'] = process.first_edit(long)
    process.row |= process.ask('facts')
    if process.row['contender'] == 'jax':
      process.row['later_compilations'] = process.ask('later_compilations', long)
    say('{}: weights after {:.1f} s, first picture after {:.1f} s'.format(
      process.row['contender'], *process.row['cold_seconds']))  # fmt: skip

  def warm_up(process):
    process.ask('settle')
    for steps in (short, long):
      process.ask('edit', steps)

  def sample(process):
    process.ask('edit', short)  # untimed: caches, clocks and pages have been another's
    for kind, steps in (('long', long), ('short', short)):
      process.row[kind].append(process.ask('edit', steps))

  try:
    for name in track.contenders:
      processes.append(start(name))
      attempt(processes[-1:], cold)
    attempt(processes, warm_up)
    for repeat in range(args.repeats):
      say(f'round {repeat + 1} of {args.repeats}, pictures per edit: {setup.batch}')
      attempt([*processes, *reversed(processes)], sample)
  finally:
    for process in processes:
      process.stop()
  rows = [process.row for process in processes]
  for row in rows:
    if 'failed' not in row:
      again = start(row['contender'])
      attempt([again], lambda process, row=row: row.update(again_seconds=process.first_edit(long)))
      row |= {key: again.row[key] for key in again.row.keys() & {'failed'}}
      again.stop()
  return rows


# The table.


def table(report: dict[str, Any]) -> str:
  """The report for people."""
  versions = {key: v for row in report['rows'] for key, v in row.get('versions', {}).items()}
  gate = 'not checked' if report['gate'] is None else f'{report["gate"]:.1e}'
  lines = [
    f'{report["config"]}, {report["dtype"]}, {report["size"]} px, {report["steps"]} steps of 3'
    f' branches, from PIL to PIL; {report["machine"]}',
    f'{", ".join(f"{key} {v}" for key, v in versions.items())};'
    f' relative error of the latents {gate}',
    '',
    row_of('contender', 'pictures', 's per edit', 'range', 's per step', 'x torch', 'peak GiB',
           'cold start', 'start again', 'compiled later'),
  ]  # fmt: skip
  for row in report['rows']:
    if 'failed' in row:
      lines.append(f'{row["contender"]}: {row["failed"]}')
      continue
    ratio = row.get('ratio')
    lines.append(
      row_of(
        row['contender'], row['batch'], f'{statistics.median(row["long"]):.3f}',
        f'{min(row["long"]):.3f}-{max(row["long"]):.3f}',
        f'{row["step_seconds"]:.4f}',
        '' if ratio is None else f'{ratio:.2f}',
        f'{row["peak_bytes"] / 2**30:.2f}',
        f'{row["cold_seconds"][1]:.1f} s',
        f'{row["again_seconds"][1]:.1f} s',
        row.get('later_compilations', ''),
      )
    )  # fmt: skip
  return '\n'.join(lines)


def row_of(*cells) -> str:
  widths = (20, 8, 10, 15, 10, 7, 8, 10, 11, 14)
  return '  '.join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))


def summarize(rows: list[dict[str, Any]], steps: int):
  """Adds the seconds of one step, and each time over that of the fastest PyTorch side."""
  good = [row for row in rows if 'failed' not in row]
  for row in good:
    pairs = zip(row['long'], row['short'], strict=True)
    row['step_seconds'] = statistics.median(a - b for a, b in pairs) / (steps - steps // 2)
  for row in good:
    rivals = [r for r in good if r['contender'] != 'jax' and r['batch'] == row['batch']]
    if rivals:
      best = min(statistics.median(rival['long']) for rival in rivals)
      row['ratio'] = statistics.median(row['long']) / best


if __name__ == '__main__':
  main()
