"""From a config to all that a training run holds: data, networks, and its state on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ip2p_jax import (
  attention,
  lora,
  metrics,
  optimizer,
  parameters,
  sharding,
  storage,
  train_step,
  weights,
)
from ip2p_jax import checkpoints as workdirs
from ip2p_jax.checkpoints import Checkpoints
from ip2p_jax.config import TrainConfig, knobs
from ip2p_jax.data import settings as data_settings
from ip2p_jax.data import shards, sources
from ip2p_jax.data.rows import Source
from ip2p_jax.errors import InputError
from ip2p_jax.networks import (
  Networks,
  check_is_editor,
  fingerprint,
  networks_of,
  tokenizer_of,
)
from ip2p_jax.text import ClipTokenizer
from ip2p_jax.train_step import Recipe, State
from ip2p_jax.weights import Checkpoint, names
from ip2p_jax.xla_alarms import quietly

OURS = (
  workdirs.CONFIG, workdirs.BASE, workdirs.CHECKPOINTS, metrics.LINES, metrics.EVENTS,
  metrics.PREVIEWS, metrics.CURVE, 'failures', 'profile',
)  # fmt: skip


class Run(NamedTuple):
  """What stays the same from step to step.

  Attributes:
    shardings: of the state.
    frozen: what a step uses and does not change, on the devices; see `train_step`.
    microbatch: examples of one device and accumulation step.
  """

  config: TrainConfig
  mesh: Mesh
  tokenizer: ClipTokenizer
  recipe: Recipe
  shardings: State
  frozen: dict[str, Any]
  microbatch: int

  @property
  def networks(self) -> Networks:
    return self.recipe.networks


class Data(NamedTuple):
  """Opened data sets and their weights; `validation` may be empty."""

  train: list[Source]
  weights: list[float]
  validation: Source
  is_latents: bool


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[None]:
  """Keeps a second run out of a local workdir, and this run out of folders that are something else.

  The lock is the system's, and goes with the process however it ends. InputError if another run
  has it, or if the folder holds what no run writes.
  """
  folder = storage.folder(workdir)
  if jax.process_index() or not storage.is_local(workdir):
    yield
    return
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder}: is a file, and --workdir is to be a folder; give another name.')
  folder.mkdir(parents=True, exist_ok=True)
  found = (file.name for file in folder.iterdir())
  strangers = sorted(name for name in found if name not in OURS and not name.startswith('.'))
  if strangers:
    raise InputError(f'{folder}: holds {strangers[0]}, so it is no workdir; give a new folder.')
  busy = f'{folder}: another run is writing here; wait for it, or stop it.'
  with storage.locked(folder / '.lock', busy):
    yield


def open_data(config: TrainConfig) -> Data:
  """Opens every data set of the mixture; the first that has a validation split gives it."""
  opened, mixture, validation = [], sources.mixture(config.data.path), ()
  data_settings.check_training(config, [path for path, _ in mixture])
  kinds = []
  for path, _ in mixture:
    opener = functools.partial(
      sources.open_source, path, columns=config.data.columns, task=config.task
    )
    train = opener('train')
    if not len(train):
      raise InputError(f'{path}: has no training examples, only other splits.')
    opened.append(train)
    kinds.append(shards.is_shards(path) and shards.describe(path)['kind'] == 'latents')
    validation = validation if len(validation) else opener('validation')
  sources.check_columns(config.data.columns, opened, config.data.path)
  return Data(opened, [weight for _, weight in mixture], validation, all(kinds))


def check_latents(config: TrainConfig, checkpoint: Checkpoint, tokenizer: ClipTokenizer) -> None:
  """Raises InputError if latents were made by another VAE, or at another size, than this run's."""
  ours = None
  for path, _ in sources.mixture(config.data.path):
    about = shards.describe(path) if shards.is_shards(path) else {'kind': 'pictures'}
    if about['kind'] != 'latents':
      continue
    ours = ours or fingerprint(checkpoint, tokenizer)
    if about['fingerprint'] != ours:
      raise InputError(
        f'{path}: these latents were made with another VAE or tokenizer than those of'
        f' {checkpoint.source}; pack them again with --ckpt of this checkpoint.'
      )
    if about['resolution'] != config.resolution:
      raise InputError(
        f'{path}: these latents are of {about["resolution"]} px and resolution is'
        f' {config.resolution}; set --config.resolution={about["resolution"]}, or pack them again.'
      )


def starting_checkpoint(config: TrainConfig) -> Checkpoint:
  """The checkpoint to start from; for editing, its UNet widened by input channels at zero."""
  checkpoint = weights.read(
    config.checkpoint,
    ema={'': None, 'average': True, 'live': False}[config.checkpoint_weights],
    prediction_type=config.prediction_type or None,
  )
  networks = networks_of(checkpoint)
  latents = networks.vae_config.latent_channels
  if config.task == 'text_to_image':
    if networks.unet_config.in_channels != latents:
      raise InputError(
        f'{config.checkpoint}: the UNet takes {networks.unet_config.in_channels} channels, so it is'
        " no text-to-image model; set task to 'edit'."
      )
    return checkpoint
  widened = weights.with_input_channels(checkpoint, 2 * latents)
  if widened is not checkpoint:
    rate = parameters.first_match(config.optimizer.rates, 'conv_in.kernel', 'optimizer.rates')
    if config.lora.rank or not rate:
      raise InputError(
        f'{config.checkpoint}: is a text-to-image model, whose new input channels must learn; train'
        ' all weights, or start LoRA and partial training from an editor.'
      )
  check_is_editor(networks_of(widened), config.checkpoint)
  return widened


def prepare(
  config: TrainConfig, workdir: str, mesh: Mesh, manager: Checkpoints, say: Callable[[str], None]
) -> tuple[Run, State, dict[str, Any]]:
  """Starts or resumes: (run, state, {'examples': seen so far, 'rows': of the data sets or None}).

  The run's config says what the run does: what it goes on from decides some of it.

  Raises InputError for a config, checkpoint or workdir that does not fit the others.
  """
  microbatch = sharding.check_batch(mesh, config.batch_size, config.accumulation)
  is_resumed = manager.latest_step() is not None
  if is_resumed:
    config = as_begun(config, ('task', 'lora.rank', 'lora.alpha'), workdir, say)
  checkpoint = workdirs.load_base(workdir) if is_resumed else starting_checkpoint(config)
  if checkpoint is None:
    raise InputError(f'{workdir}: has checkpoints but no {workdirs.BASE}; use a new workdir.')
  networks = networks_of(checkpoint)
  networks = networks._replace(attention=attention.dispatch(config.attention, mesh))
  config = _with_prediction_type(config, networks, workdir)
  _check_resolution(config, networks)
  tokenizer = tokenizer_of(checkpoint, networks)
  check_latents(config, checkpoint, tokenizer)
  shapes = parameters.flatten(networks.shapes['unet'])
  trained, initial = trained_shapes(config, shapes)
  transform = optimizer.adamw(config.optimizer, {*shapes, *trained}, config.steps)
  recipe = Recipe(networks, config, transform)
  abstract = jax.eval_shape(functools.partial(train_step.initial_state, recipe), trained)
  shardings = sharding.of_state(mesh, abstract, config.mesh.zero1)
  if is_resumed:
    manager.check_fits(abstract)
  in_base = [name for name in shapes if name not in trained]
  frozen = _frozen(config, checkpoint, networks, in_base, trained, tokenizer, mesh)
  run = Run(config, mesh, tokenizer, recipe, shardings, frozen, microbatch)
  say(sizes(run, abstract, f'at {config.resolution} px'))
  if is_resumed:
    return run, *resumed(manager, abstract, shardings)
  workdirs.save_base(workdir, checkpoint, set(trained) - set(initial or ()))
  values = initial or workdirs.read_unet(checkpoint, {name: shapes[name] for name in trained})
  return run, started(recipe, values, shardings), {'examples': 0, 'rows': None}


def resumed(manager: Checkpoints, abstract: State, shardings: State) -> tuple[State, dict]:
  """The latest checkpoint, on the devices."""
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
  )
  return manager.restore(target)


def started(recipe: Any, values: Mapping[str, np.ndarray], shardings: State) -> State:
  """The state before the first step, on the devices."""
  params = {name: sharding.put(values[name], where) for name, where in shardings['params'].items()}
  start = functools.partial(train_step.initial_state, recipe)
  return quietly(jax.jit(start, out_shardings=shardings, donate_argnums=0), params)


def as_begun(config: Any, fixed: Collection[str], workdir: str, say: Callable[[str], None]) -> Any:
  """The config with the starting checkpoint that the run really had, which is not read again.

  InputError for another value of a knob that gives the saved weights their meaning.
  """
  old, new = parameters.flatten(workdirs.read_config(workdir) or {}), dict(knobs(config))
  for knob in fixed:
    was, now = old.get(knob, new[knob]), new[knob]
    if was != now:
      raise InputError(f'{knob} was {was!r} in this workdir; set it so, or use a new workdir.')
  begun = {name: old[name] for name in ('checkpoint', 'checkpoint_weights') if name in old}
  if any(getattr(config, name) != value for name, value in begun.items()):
    say(
      f'checkpoint is not read again: this workdir, begun with {begun["checkpoint"]}, has its own'
      ' weights'
    )
  return dataclasses.replace(config, **begun)


def _with_prediction_type(config, networks, workdir):
  """The config, with what the network really predicts."""
  known = networks.schedule.prediction_type
  if config.prediction_type not in ('', known):
    raise InputError(
      f'prediction_type was {known!r} in {workdir}, which cannot change any more; set it so, or use'
      ' a new workdir.'
    )
  return dataclasses.replace(config, prediction_type=known)


def trained_shapes(
  config: Any, shapes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
  """({name: shape} of what learns, {name: array} of adapters, which no checkpoint has yet)."""
  if config.lora.rank:
    rng = np.random.default_rng(config.seed)
    initial = lora.adapters(shapes, config.lora, rng)
    found = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in initial.items()}
    if optimizer.trainable(found, config.optimizer.rates) != set(found):
      raise InputError('optimizer.rates freezes adapters; choose layers by lora.targets instead.')
    return found, initial
  kept = optimizer.trainable(shapes, config.optimizer.rates)
  as_float32 = lambda name: jax.ShapeDtypeStruct(shapes[name].shape, np.float32)
  return {name: as_float32(name) for name in shapes if name in kept}, None


def _frozen(config, checkpoint, networks, in_base, trained, tokenizer, mesh):
  """On the devices, in the dtype of arithmetic."""
  everywhere, shapes = sharding.replicated(mesh), parameters.flatten(networks.shapes['unet'])
  # A kernel that an adapter is added to keeps its digits until then.
  adapted = {name.rpartition('.')[0] for name in trained if '.lora_' in name}
  frozen = {'unet': {}, 'null_ids': sharding.put(tokenizer([''])[0], everywhere)}
  fixed = workdirs.read_unet(checkpoint, {name: shapes[name] for name in in_base})
  for name, value in fixed.items():
    dtype = np.float32 if name.rpartition('.')[0] in adapted else config.dtype
    where = sharding.split(mesh, value.shape, ('fsdp',))
    frozen['unet'][name] = sharding.put(value.astype(dtype), where)
  for part in ('vae', 'text_encoder'):
    place = lambda x, _: sharding.put(np.asarray(x).astype(config.dtype), everywhere)
    frozen[part] = names.to_params(
      checkpoint.tensors[part], networks.shapes[part], part, source=checkpoint.source, place=place
    )
  return frozen


def _check_resolution(config, networks):
  factor = networks.vae_config.factor
  if config.resolution % factor:
    near = max(round(config.resolution / factor), 1) * factor
    raise InputError(
      f'resolution is {config.resolution}; this VAE takes multiples of {factor}: use {near}.'
    )


def sizes(run: Any, abstract: State, each: str) -> str:
  """Lines for people: who computes what, and how many bytes each device holds.

  Args:
    run: a `Run`, or what has the same of it.
    each: how large an example is.
  """
  config, mesh = run.config, run.mesh
  kind = mesh.devices.flat[0].device_kind
  held = lambda part: _bytes(sharding.bytes_per_device(abstract[part], run.shardings[part]))
  frozen = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.frozen))
  trained = sum(x.size for x in jax.tree.leaves(abstract['params']))
  return '\n'.join([
    f'devices   {mesh.size} ({kind}) as data {mesh.shape["data"]} x fsdp {mesh.shape["fsdp"]},'
    f' in {jax.process_count()} process{"es" if jax.process_count() > 1 else ""}',
    f'batch     {config.batch_size} = {mesh.size} devices x {run.microbatch} examples'
    f' x {config.accumulation} accumulation steps, {each}',
    f'training  {trained:,} parameters in float32, arithmetic in {config.dtype}',
    f'memory    on each device: parameters {held("params")}, optimizer {held("opt_state")},'
    f' average {held("ema")}, frozen networks {_bytes(frozen)}',
  ])  # fmt: skip


def _bytes(count) -> str:
  return f'{count / 2**30:.2f} GiB' if count >= 2**28 else f'{count / 2**20:.1f} MiB'
