"""How fast is one training step from latents: JAX beside PyTorch, same weights, same work.

  python benchmarks/train_step.py --small                    (two minutes on two CPU cores)
  python benchmarks/train_step.py --out train_step.jsonl     (Stable Diffusion 1.5 at 256 px)
  python benchmarks/train_step.py --gradients --alone        (the same where memory is 24 GiB)
  python benchmarks/train_step.py --only jax,torch --batches 64,128

A step is: a sample of the target's latents, noise, timestep and dropout drawn; the text encoder on
token ids; the UNet forward and backward; AdamW with float32 weights and moments; the moving
average. On a CPU all of it is float32; on a GPU arithmetic is bfloat16. The batch is on the device.
With --gradients a step ends with the gradients: no AdamW, no average.

JAX is the package's own `train_step`, with remat as trained with (convdot) and without. PyTorch is
diffusers' UNet (where diffusers is not installed, `bench_unet`, which is the same) with
transformers' text encoder, scaled_dot_product_attention, fused AdamW and foreach for the average:
eager, with channels_last, and on a GPU with torch.compile in its modes. First the same draws must
give the same loss and norm of the gradients on both sides, or nothing is timed. "x torch" is the
time of an example over that of the fastest PyTorch contender. "CPU ms" is what
all cores spent on a step: on a busy machine, with --threads 1, the figure to compare.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_turns import SPAWN, Contender, Failed, machine, peak_rss, results, say, whole
from edit_latency import write_checkpoint

TOLERANCES = {'float32': (1e-4, 1e-3), 'bfloat16': (1e-2, 2e-2)}  # of loss, of gradients' norm
CPU = ('jax', 'jax no remat', 'torch', 'torch channels_last')
GPU = ('jax', 'jax no remat', 'torch channels_last', 'torch compile', 'torch max-autotune',
       'torch reduce-overhead')  # fmt: skip
MANY = '32,64,128,256'  # examples, on a GPU
MODES = {
  'torch compile': 'default',
  'torch max-autotune': 'max-autotune-no-cudagraphs',
  'torch reduce-overhead': 'reduce-overhead',
}


class Setup(NamedTuple):
  """What a side is told at its start; `side` is that of the latents."""

  name: str
  folder: str
  device: str  # 'cpu' or 'gpu'
  dtype: str
  batch: int
  side: int
  threads: int | None  # on a CPU
  cache: str
  is_whole: bool  # with AdamW and the average


def batch_of(setup: Setup) -> dict[str, np.ndarray]:
  """One batch of latents and texts, as the loader gives it."""
  rng = np.random.default_rng(1)
  shape = (setup.batch, setup.side, setup.side, 4)
  normal = lambda scale: np.float16(scale * rng.standard_normal(shape))
  ids = np.full((setup.batch, 77), 49407, np.int32)
  ids[:, 0], ids[:, 1:12] = 49406, rng.integers(300, 40_000, (setup.batch, 11))
  return {
    'input_mean': normal(5.5),
    'edited_mean': normal(5.5),
    'edited_log_variance': normal(1.0) - np.float16(8),
    'token_ids': ids,
    'weight': np.ones(setup.batch, np.float32),
    'index': np.arange(setup.batch, dtype=np.int32),
  }


NULL_IDS = np.int32([49406] + 76 * [49407])


class Jax:
  """The package's training step."""

  def __init__(self, setup: Setup):
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
    import jax
    import optax

    jax.config.update('jax_compilation_cache_dir', setup.cache)
    from ip2p_jax import parameters, sharding, weights
    from ip2p_jax.config import TrainConfig
    from ip2p_jax.models import attention
    from ip2p_jax.pipeline.networks import networks_of
    from ip2p_jax.training import optimizer
    from ip2p_jax.training.step import Recipe, initial_state, jitted, mean_gradients
    from ip2p_jax.weights import names

    self.jax, self.setup = jax, setup
    checkpoint = weights.read(setup.folder)
    networks = networks_of(checkpoint)
    remat = 'none' if setup.name.endswith('no remat') else 'convdot'
    config = TrainConfig(
      resolution=setup.side * networks.vae_config.factor, batch_size=setup.batch,
      dtype=setup.dtype, remat=remat,
    )  # fmt: skip
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    networks = networks._replace(attention=attention.dispatch(config.attention, mesh))
    read = lambda part, dtype: names.to_params(
      checkpoint.tensors[part],
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), networks.shapes[part]),
      part,
      place=lambda view, _: jax.block_until_ready(jax.device_put(np.array(view, order='C'))),
    )
    unet = parameters.flatten(read('unet', np.float32))
    recipe = Recipe(networks, config, optimizer.adamw(config.optimizer, unet, config.steps))
    if setup.is_whole:
      self.state = initial_state(recipe, unet)
      shardings = sharding.of_state(mesh, self.state, config.mesh.zero1)
      self.state = jax.device_put(self.state, shardings)
      step = jitted(recipe, mesh, shardings)
    else:
      self.state = {'step': jax.numpy.int32(0), 'params': unet}
      everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), unet)
      shardings = {'params': everywhere, 'ema': everywhere}

      @jax.jit
      def step(state, frozen, batch):
        loss, grads = mean_gradients(
          recipe, shardings, state['params'], frozen, batch, state['step']
        )
        return grads, {'loss': loss, 'grad_norm': optax.global_norm(grads)}

    encoder = jax.tree.map(lambda x: x.astype(setup.dtype), read('text_encoder', np.float32))
    frozen = {'unet': {}, 'vae': {}, 'text_encoder': encoder, 'null_ids': jax.device_put(NULL_IDS)}
    batch = jax.device_put(batch_of(setup), sharding.of_batch(mesh))
    began = time.perf_counter()
    self.compiled = step.lower(self.state, frozen, batch).compile()
    self.compile_seconds = time.perf_counter() - began

    def one():
      """One step; returns its metrics. Gradients stay until the next, if they are all there is."""
      self.grads = None
      result, metrics = self.compiled(self.state, frozen, batch)
      if setup.is_whole:
        self.state = result
      else:
        self.grads = result
      return metrics

    self.step = one
    self.networks, self.resolution = networks, config.resolution

  def first(self, _draws) -> dict[str, Any]:
    """The first step: its loss, the norm of its gradients, and what it drew."""
    from ip2p_jax.training import loss

    batch = batch_of(self.setup)
    shape = (self.setup.side, self.setup.side, 4)
    draws = loss.draw(0, self.jax.numpy.int32(0), batch['index'], shape, self.networks.schedule)
    metrics = self.step()
    return {
      'loss': float(metrics['loss']),
      'norm': float(metrics['grad_norm']),
      'draws': {key: np.array(value) for key, value in draws._asdict().items()},
    }

  def seconds(self, steps: int) -> tuple[float, float]:
    """Of one step, of so many in a row: by the clock, and of all cores together."""
    began = time.perf_counter(), time.process_time()
    for _ in range(steps):
      metrics = self.step()
    self.jax.block_until_ready((self.state, self.grads, metrics))
    return (time.perf_counter() - began[0]) / steps, (time.process_time() - began[1]) / steps

  def facts(self) -> dict[str, Any]:
    from ip2p_jax.training import flops

    device, jax = self.jax.devices()[0], self.jax
    peak = peak_rss() if self.setup.device == 'cpu' else device.memory_stats()['peak_bytes_in_use']
    return {
      'peak_bytes': peak,
      'start_seconds': self.compile_seconds,
      'step_flops': self.setup.batch * flops.training_flops(
        self.networks, self.resolution, latents=True
      ),
      'parameters': sum(x.size for x in jax.tree.leaves(self.state['params'])),
      'hardware': device.device_kind,
      'versions': {'jax': jax.__version__},
    }  # fmt: skip


class Torch:
  """The same step, as PyTorch is at its best."""

  def __init__(self, setup: Setup):
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, logging

    logging.set_verbosity_error()
    self.torch, self.setup = torch, setup
    torch.manual_seed(0)
    if setup.threads:
      torch.set_num_threads(setup.threads)
    self.on_cpu = setup.device == 'cpu'
    self.device = 'cpu' if self.on_cpu else 'cuda'
    if not self.on_cpu and setup.dtype == 'bfloat16':
      torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
      torch.backends.cudnn.benchmark = True
    folder = Path(setup.folder)
    config = json.loads((folder / 'unet' / 'config.json').read_text())
    self.peer, unet = unet_of(config)
    unet.load_state_dict(load_file(folder / 'unet' / 'diffusion_pytorch_model.safetensors'))
    text = CLIPTextConfig(**json.loads((folder / 'text_encoder' / 'config.json').read_text()))
    encoder = CLIPTextModel(text)
    tensors = load_file(folder / 'text_encoder' / 'model.safetensors')
    prefix = '' if any('text_model.' in name for name in encoder.state_dict()) else 'text_model.'
    encoder.load_state_dict({name.removeprefix(prefix): x for name, x in tensors.items()}, False)
    dtype = getattr(torch, setup.dtype)
    self.encoder = encoder.to(self.device, dtype).eval().requires_grad_(False)
    self.unet = unet.to(self.device).train()
    if setup.name != 'torch':
      self.unet.to(memory_format=torch.channels_last)
    self.parameters = list(self.unet.parameters())
    if setup.is_whole:
      self.average = [p.detach().clone() for p in self.parameters]
    self.adamw = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)
    self.count = 0
    if setup.name in MODES:
      self.unet = torch.compile(self.unet, mode=MODES[setup.name])
    vae = json.loads((folder / 'vae' / 'config.json').read_text())
    self.scale = vae.get('scaling_factor', 0.18215)
    schedule = json.loads((folder / 'scheduler' / 'scheduler_config.json').read_text())
    betas = torch.linspace(
      schedule['beta_start'] ** 0.5, schedule['beta_end'] ** 0.5, 1000, dtype=torch.float64
    )
    self.alphas = (1 - betas**2).cumprod(0).float().to(self.device)
    self.batch = {
      key: (self._channels_first(value) if value.ndim == 4 else torch.from_numpy(value)).to(
        self.device
      )
      for key, value in batch_of(setup).items()
    }
    self.null_ids = torch.from_numpy(NULL_IDS).to(self.device)

  def _channels_first(self, x):
    x = self.torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    return x if self.setup.name == 'torch' else x.to(memory_format=self.torch.channels_last)

  def draw(self) -> dict[str, Any]:
    torch, like, size = self.torch, self.batch['edited_mean'], self.setup.batch
    normal = lambda: torch.randn_like(like, dtype=torch.float32)
    return {
      'posterior_noise': normal(),
      'noise': normal(),
      'timesteps': torch.randint(0, 1000, (size,), device=self.device),
      'dropout': torch.rand(size, device=self.device),
    }

  def loss(self, draws):
    torch, batch, r, rate = self.torch, self.batch, draws['dropout'], 0.05
    spread = torch.exp(0.5 * batch['edited_log_variance'].float().clamp(-30, 20))
    latents = batch['edited_mean'].float() + spread * draws['posterior_noise']
    alpha = self.alphas[draws['timesteps']][:, None, None, None]
    noisy = alpha.sqrt() * (latents * self.scale) + (1 - alpha).sqrt() * draws['noise']
    is_dropped = ((rate <= r) & (r < 3 * rate))[:, None, None, None]
    picture = batch['input_mean'].float().masked_fill(is_dropped, 0)
    ids = torch.where((r < 2 * rate)[:, None], self.null_ids[None], batch['token_ids'])
    with torch.no_grad():
      context = self.encoder(ids.long()).last_hidden_state
    is_half = self.setup.dtype == 'bfloat16'
    with torch.autocast(self.device, torch.bfloat16, enabled=is_half):
      out = self.unet(torch.cat([noisy, picture], 1), draws['timesteps'], context)
    out = out if torch.is_tensor(out) else out[0]
    return torch.nn.functional.mse_loss(out.float(), draws['noise'])

  def step(self, draws=None):
    """One whole step; returns the loss, on the device. Gradients stay until the next."""
    self.adamw.zero_grad(set_to_none=True)
    loss = self.loss(draws or self.draw())
    loss.backward()
    if not self.setup.is_whole:
      return loss
    self.adamw.step()
    self.count += 1
    decay = min(0.9999, (1 + self.count) / (10 + self.count))
    with self.torch.no_grad():
      self.torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
    return loss

  def first(self, draws: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """The first step, with these draws if given: its loss, and the norm of its gradients."""
    torch = self.torch
    place = lambda x: self._channels_first(x) if x.ndim == 4 else torch.from_numpy(x.copy())
    began = time.perf_counter()
    given = draws and {key: place(value).to(self.device) for key, value in draws.items()}
    loss = self.step(given)
    norms = torch._foreach_norm([p.grad for p in self.parameters])
    result = {'loss': loss.item(), 'norm': torch.stack(norms).norm().item()}
    self.start_seconds = time.perf_counter() - began
    return result

  def seconds(self, steps: int) -> tuple[float, float]:
    """Of one step, of so many in a row: by the clock, and of all cores together."""
    began = time.perf_counter(), time.process_time()
    for _ in range(steps):
      self.step()
    if not self.on_cpu:
      self.torch.cuda.synchronize()
    return (time.perf_counter() - began[0]) / steps, (time.process_time() - began[1]) / steps

  def facts(self) -> dict[str, Any]:
    cuda = self.torch.cuda
    return {
      'peak_bytes': peak_rss() if self.on_cpu else cuda.max_memory_allocated(),
      'start_seconds': self.start_seconds,
      'peer': self.peer,
      'parameters': sum(p.numel() for p in self.parameters),
      'hardware': 'cpu' if self.on_cpu else cuda.get_device_name(),
      'versions': {'torch': self.torch.__version__},
    }


def unet_of(config: dict) -> tuple[str, Any]:
  """(whose, the UNet in PyTorch): diffusers' where it is installed."""
  if importlib.util.find_spec('diffusers'):
    import diffusers
    from diffusers import UNet2DConditionModel

    return f'diffusers {diffusers.__version__}', UNet2DConditionModel.from_config(config)
  import bench_unet

  return 'bench_unet', bench_unet.UNet(config)


class Ceilings:
  """What the device does at best: a product of square matrices, and a copy; by JAX and PyTorch."""

  def __init__(self, device: str, threads: int | None):
    self.is_small, self.threads = device == 'cpu', threads

  def measure(self, library: str) -> dict[str, float]:
    """{'matmul': FLOP/s, 'copy': bytes/s read and written}; the best of ten."""
    size, numbers = (2048, 2**26) if self.is_small else (8192, 2**29)
    rng = np.random.default_rng(0)  # not zeros, which some hardware multiplies faster
    a = rng.standard_normal((size, size), np.float32)
    if library == 'jax':
      import jax
      import jax.numpy as jnp

      a = jnp.asarray(a, 'float32' if self.is_small else 'bfloat16')
      x = jnp.ones(numbers, jnp.float32) * 1.5
      product = jax.jit(jnp.matmul)
      copy = jax.jit(lambda x: x + 1)
      runs = [lambda: jax.block_until_ready(product(a, a)), lambda: jax.block_until_ready(copy(x))]
    else:
      import torch

      if self.threads:
        torch.set_num_threads(self.threads)
      device = 'cpu' if self.is_small else 'cuda'
      a = torch.from_numpy(a).to(device, torch.float32 if self.is_small else torch.bfloat16)
      x = torch.full((numbers,), 1.5, device=device)
      y = torch.empty_like(x)
      wait = (lambda: None) if self.is_small else torch.cuda.synchronize
      runs = [lambda: (a @ a, wait()), lambda: (torch.add(x, 1, out=y), wait())]
    times = []
    for run in runs:
      run()
      times.append(min(_timed(run) for _ in range(10)))
    return {'matmul': 2 * size**3 / times[0], 'copy': 8 * numbers / times[1]}


def _timed(run) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def backend() -> str:
  import jax

  return 'cpu' if jax.default_backend() == 'cpu' else 'gpu'


def ceilings(device: str, threads: int | None, limit: float) -> dict[str, dict[str, float]]:
  found = {}
  for library in ('jax', 'torch'):
    side = Contender(Ceilings, device, threads, threads=threads, limit=limit)
    try:
      found[library] = side.ask('measure', library)
    except Failed as error:
      say(f'ceilings by {library}: {error}')
    finally:
      side.stop()
  return found


def compare(setups: list[Setup], args) -> list[dict[str, Any]]:
  """A row per contender: all checked, then timed in turns A-B-C-C-B-A.

  With `--alone` no two are in memory at a time, and each turn is a new process.
  """
  alive: dict[str, Contender] = {}
  rows = [
    {'contender': setup.name, 'batch': setup.batch, 'seconds': [], 'cpu_seconds': []}
    for setup in setups
  ]
  expected: dict[str, Any] = {}

  def turn(setup, row):
    side = alive.get(setup.name)
    if side is None:
      say(f'{setup.name}, batch {setup.batch}: starts')
      make = Jax if setup.name.startswith('jax') else Torch
      side = alive[setup.name] = Contender(make, setup, threads=setup.threads, limit=args.limit)
      found = side.ask('first', expected.get('draws'))
      if not expected and 'draws' in found:
        expected.update(found)
      if 'errors' not in row:
        row['errors'] = check(found, expected, setup)
      side.ask('seconds', 1)  # untimed: whatever is still to be compiled or settled
    for _ in range(2):
      for key, value in zip(
        ('seconds', 'cpu_seconds'), side.ask('seconds', args.steps), strict=True
      ):
        row[key].append(value)
    row |= side.ask('facts')
    if args.alone:
      side.stop()
      del alive[setup.name]

  try:
    for number in range(args.rounds):
      say(f'round {number + 1} of {args.rounds}')
      pairs = list(zip(setups, rows, strict=True))
      for setup, row in pairs if number % 2 == 0 else reversed(pairs):
        if 'failed' in row:
          continue
        try:
          turn(setup, row)
        except Failed as error:
          say(f'{setup.name}: {error}')
          row['failed'] = str(error)[:200]
          if setup.name in alive:
            alive.pop(setup.name).stop()
  finally:
    for side in alive.values():
      side.stop()
  return rows


def check(found, expected, setup) -> dict[str, float] | None:
  """Relative differences to the first side's numbers; exits where they are too large."""
  if not expected:
    return None
  errors = {key: abs(found[key] / expected[key] - 1) for key in ('loss', 'norm')}
  say(f'{setup.name}: loss {found["loss"]:.5f}, norm of the gradients {found["norm"]:.5f}')
  for (key, error), most in zip(errors.items(), TOLERANCES[setup.dtype], strict=True):
    if not error <= most:
      sys.exit(f'{setup.name}: its {key} differs by {error:.1e}, more than {most:.0e}: no figures.')
  return errors


def table(report: dict[str, Any]) -> str:
  lines = [
    f'{report["config"]}{", gradients only" * report["gradients"]}, {report["device"]},'
    f' {report["dtype"]}, latents of {report["side"]} x {report["side"]}; {report["machine"]}'
  ]
  for library, best in report['ceilings'].items():
    lines.append(
      f'{library} at best: {best["matmul"] / 1e12:.3f} TFLOP/s, {best["copy"] / 1e9:.1f} GB/s'
    )
  lines += ['', _line('contender', 'batch', 'ms a step', 'range', 'CPU ms', 'samples/s', 'x torch',
                      'TFLOP/s', 'of matmul', 'peak GiB', 'first step')]  # fmt: skip
  rivals = [row for row in report['rows'] if 'samples' in row and 'torch' in row['contender']]
  best = max((row['samples'] for row in rivals), default=None)
  for row in report['rows']:
    if 'failed' in row:
      lines.append(f'{row["contender"]}, batch {row["batch"]}: {row["failed"]}')
      continue
    times, matmul = row['seconds'], report['ceilings'].get('jax', {}).get('matmul')
    lines.append(
      _line(
        row['contender'], row['batch'], f'{1e3 * statistics.median(times):.1f}',
        f'{1e3 * min(times):.1f}-{1e3 * max(times):.1f}',
        f'{1e3 * statistics.median(row["cpu_seconds"]):.1f}', f'{row["samples"]:.3f}',
        f'{best / row["samples"]:.2f}' if best else '', f'{row["flops"] / 1e12:.3f}',
        f'{row["flops"] / matmul:.0%}' if matmul else '', f'{row["peak_bytes"] / 2**30:.2f}',
        f'{row["start_seconds"]:.1f} s',
      )
    )  # fmt: skip
    if peer := row.get('peer'):
      lines[-1] += f'  ({peer})'
  return '\n'.join(lines)


def _line(*cells) -> str:
  widths = (22, 6, 10, 16, 9, 10, 8, 8, 10, 9, 11)
  return ' '.join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))


def main() -> None:
  args = arguments()
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.weights or Path(scratch) / 'weights'
    config = 'small' if args.small else 'sd15'
    with SPAWN.Pool(1) as pool:  # so that neither jax nor the weights stay in this process
      pool.apply(write_checkpoint, (config, folder))
      device = pool.apply(backend)
    names = CPU if device == 'cpu' else GPU
    if args.only:
      names = [name.strip() for name in args.only.split(',')]
      if unknown := set(names) - {*CPU, *GPU}:
        sys.exit(f'--only: no contender {", ".join(unknown)}; there are {", ".join({*CPU, *GPU})}.')
    batches = args.batches or several('8' if args.small else '1' if device == 'cpu' else MANY)
    dtype = 'float32' if device == 'cpu' else 'bfloat16'
    side, rows = (8 if args.small else 32), []
    threads = args.threads if device == 'cpu' else None
    best = ceilings(device, threads, args.limit)
    for batch in batches:
      setups = [
        Setup(name, str(folder), device, dtype, batch, side, threads,
              str(args.cache or Path(scratch) / 'cache'), not args.gradients)
        for name in names
      ]  # fmt: skip
      rows += compare(setups, args)
  flops = {row['batch']: row['step_flops'] for row in rows if 'step_flops' in row}
  for row in rows:
    if row['seconds'] and 'failed' not in row:
      row['samples'] = row['batch'] / statistics.median(row['seconds'])
      row['flops'] = flops.get(row['batch'], 0) / statistics.median(row['seconds'])
  report = {
    'benchmark': 'train_step', 'config': config, 'device': device, 'dtype': dtype, 'side': side,
    'gradients': args.gradients,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'machine': machine(), 'ceilings': best, 'rows': rows,
  }  # fmt: skip
  print(table(report))
  if args.out:
    with args.out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(report) + '\n')


def several(text: str) -> list[int]:
  """An argument of numbers of 1 or more."""
  return [whole(part) for part in text.split(',')]


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--small', action='store_true', help='10 M parameters, 64 px, batch 8')
  parser.add_argument('--gradients', action='store_true', help='no optimizer, no average')
  parser.add_argument('--batches', type=several, help='per device, as in 64,128')
  parser.add_argument('--rounds', type=whole, default=4, help='turns of each contender')
  parser.add_argument('--steps', type=whole, default=5, help='of a timing; two timings a turn')
  parser.add_argument('--only', help='contenders, separated by commas')
  parser.add_argument('--alone', action='store_true', help='one in memory at a time')
  parser.add_argument('--threads', type=whole, default=2, help='on a CPU, for each side')
  parser.add_argument('--limit', type=float, default=1800, help='seconds for one answer')
  parser.add_argument('--weights', type=Path, help='folder to keep the weights in, or to reuse')
  parser.add_argument('--cache', type=Path, help='folder to keep compiled programs in')
  parser.add_argument('--out', type=results, help='a file to append a JSON line to')
  return parser.parse_args()


if __name__ == '__main__':
  main()
