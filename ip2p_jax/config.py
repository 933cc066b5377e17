"""Every knob of a training run, once, with its unit and default; the defaults are the paper's run.

`configs/*.py` make these, `--config.optimizer.learning_rate=3e-5` overrides them, and the workdir
keeps them as `config.json`. Rules are ((pattern, value), ...) over dotted parameter names, such as
'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.kernel'; `re.search`, first match wins.
On the command line they are 'pattern=value,pattern=value': --config.optimizer.rates='attn2=1,.*=0'.
"""

import dataclasses
import difflib
import functools
import math
import os
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

from ip2p_jax.config_text import parse
from ip2p_jax.errors import InputError, check_choice

Rules = tuple[tuple[str, float], ...]


@dataclasses.dataclass
class DataConfig:
  """Where examples come from and how a picture becomes a training example.

  Attributes:
    path: one data set, or several with weights: 'a', 'a=3,b=1'. Packed shards, precomputed latents,
      the original's folders, a folder with metadata, parquet files.
    columns: names of columns where they are unusual: 'input=before,edited=after,instruction=text'.
    resize: 'crop' keeps the aspect (resize and cut), 'squash' does not (as the original).
    largest_resize: pixels; the short side is drawn between resolution and this before a random
      crop (the paper's text has 288 for 256); 0 for no augmentation (the released config).
    flip_rate: how often both pictures are mirrored.
    flip_directions: whether to mirror even when the instruction says left or right.
    max_corrupt: broken records that are skipped, in a pass of the data, before the run stops.
    workers: processes that decode; 0 decodes in threads of this process.
    prefetch: batches that wait on the device.
  """

  path: str = ''
  columns: str = ''
  resize: str = 'crop'
  largest_resize: int = 0
  flip_rate: float = 0.5
  flip_directions: bool = False
  max_corrupt: int = 100
  workers: int = 8
  prefetch: int = 2


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter 2019).

  Attributes:
    schedule: 'constant' or 'cosine', after `warmup_steps` of linear growth.
    final_rate: where 'cosine' ends, as a part of `learning_rate`.
    rates: learning rate multipliers by parameter name; 0 freezes, and costs no memory.
    decays: weight decay by parameter name; every parameter must match a rule.
    clip_norm: largest global norm of the gradient; 0 does not clip.
    ema: largest decay of the moving average, min(ema, (1 + n) / (10 + n)) after n steps.
  """

  learning_rate: float = 1e-4
  schedule: str = 'constant'
  warmup_steps: int = 0
  final_rate: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  rates: Rules = (('', 1.0),)
  decays: Rules = (('', 0.01),)
  clip_norm: float = 0.0
  ema: float = 0.9999


@dataclasses.dataclass
class LoraConfig:
  """Low-rank adapters (Hu et al. 2021) instead of all weights.

  Attributes:
    rank: 0 trains the weights themselves.
    alpha: the adapters' product is scaled by alpha / rank.
    targets: pattern of the kernels that get an adapter; by default the attentions' projections.
  """

  rank: int = 0
  alpha: float = 4.0
  targets: str = r'\.attn[12]\.to_(q|k|v|out)\.kernel$'


@dataclasses.dataclass
class MeshConfig:
  """Devices in a rectangle ('data', 'fsdp'); batches go over both.

  Attributes:
    fsdp: devices that parameters are split over; 1 keeps a copy on each.
    zero1: whether optimizer state and moving average are split over all devices.
  """

  fsdp: int = 1
  zero1: bool = True


@dataclasses.dataclass
class LogConfig:
  """What is written, and how often, in steps.

  Attributes:
    every: metrics. Between them, and but for checkpoints, validation and previews, the host only
      waits for the step before last, to be no further ahead.
    checkpoint_every, keep: checkpoints, and how many of the newest stay; the last after which the
      loss was near its running mean does, too.
    validate_every: validation loss; 0 never.
    validation_examples: how many examples that loss is over.
    previews: validation examples edited at every checkpoint; 0 none.
    preview_steps: sampler steps of a preview.
    profile: steps (first, number) that the profiler records into the workdir; number 0 none. The
      first step of a start compiles, and is not recorded.
  """

  every: int = 50
  checkpoint_every: int = 1000
  keep: int = 3
  validate_every: int = 1000
  validation_examples: int = 512
  previews: int = 4
  preview_steps: int = 20
  profile: tuple[int, int] = (0, 0)


@dataclasses.dataclass
class TrainConfig:
  """One run.

  Attributes:
    checkpoint: diffusers folder or single file to start from.
    checkpoint_weights: of a single file that holds both, 'average' or 'live'; '' takes the average
      unless the file shows that its live weights were merged, or had an adapter added.
    prediction_type: 'epsilon' or 'v_prediction', over what the checkpoint says; '' believes it.
      Most single files cannot say, and count as 'epsilon'; SD 2.x at 768 px is 'v_prediction'.
    task: 'edit' (a UNet of 4 input channels gets 4 more, at zero) or 'text_to_image'.
    resolution: side of the square training pictures, pixels.
    batch_size: examples per optimizer step, over all devices and accumulation steps.
    accumulation: parts a batch is worked through in; gradients travel once for each.
    conditioning_dropout: rate at which text alone, both, and image alone are dropped.
    min_snr_gamma: loss weights of Hang et al. 2023 (5 is theirs); 0 weighs all timesteps alike.
    dtype: of arithmetic, 'bfloat16' or 'float32'; master weights are float32.
    remat: what is computed twice to save memory: 'none', 'convdot' (all but convolutions, matrix
      products and attention), 'full'.
    attention: 'auto' uses the fastest kernel for the devices, see `attention.KERNELS`; 'xla' none;
      'splash' (TPU) and 'cudnn' (NVIDIA) wherever they can run.
    seed: of order, noise, timesteps, dropout, flips.
  """

  checkpoint: str = ''
  checkpoint_weights: str = ''
  prediction_type: str = ''
  task: str = 'edit'
  resolution: int = 256
  batch_size: int = 1024
  accumulation: int = 1
  steps: int = 10_000
  seed: int = 0
  conditioning_dropout: float = 0.05
  min_snr_gamma: float = 0.0
  dtype: str = 'bfloat16'
  remat: str = 'convdot'
  attention: str = 'auto'
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  log: LogConfig = dataclasses.field(default_factory=LogConfig)


@dataclasses.dataclass
class TripletsConfig:
  """Where (caption, instruction, edited caption) come from.

  Attributes:
    path: a file of triplets, JSON lines, CSV or Parquet.
    holdout: part of the rows, spread evenly, that only the validation loss is over; 0 none. Rows
      that share a caption stay together.
    max_tokens: longest triplet, in tokens; one that is longer stops the run before it starts.
  """

  path: str = ''
  holdout: float = 0.05
  max_tokens: int = 512


@dataclasses.dataclass
class LanguageLogConfig:
  """What is written, and how often, in steps.

  Attributes:
    every, checkpoint_every, keep: as of `LogConfig`.
    validate_every: loss of the held-out triplets; 0 never.
    profile: as of `LogConfig`.
  """

  every: int = 10
  checkpoint_every: int = 50
  keep: int = 3
  validate_every: int = 25
  profile: tuple[int, int] = (0, 0)


@dataclasses.dataclass
class LanguageConfig:
  """One run of a language model that learns to write instructions (the paper's first stage).

  Attributes:
    checkpoint: Hugging Face folder of a Llama, Qwen2 or Qwen3 to start from.
    batch_size: triplets per optimizer step, over all devices and accumulation steps.
    accumulation: parts a batch is worked through in; gradients travel once for each.
    steps: optimizer steps; 700 triplets, 5 % of them held out, come once in 21 steps of 32.
    dtype: of arithmetic, 'bfloat16' or 'float32'; master weights are float32. With LoRA it is also
      that of the weights that stay as they are.
    remat: what is computed twice to save memory: 'none', 'convdot' (all but matrix products and
      attention), 'full' (all of a layer but its input).
    seed: of the order, and of new adapters.
  """

  checkpoint: str = ''
  batch_size: int = 32
  accumulation: int = 1
  steps: int = 63
  seed: int = 0
  dtype: str = 'bfloat16'
  remat: str = 'full'
  data: TripletsConfig = dataclasses.field(default_factory=TripletsConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      learning_rate=1e-5, schedule='cosine', warmup_steps=6, clip_norm=1.0, decays=(('', 0.0),),
    )
  )  # fmt: skip
  lora: LoraConfig = dataclasses.field(
    default_factory=lambda: LoraConfig(
      alpha=32.0, targets=r'\.(q|k|v|o|gate|up|down)_proj\.kernel$'
    )
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  log: LanguageLogConfig = dataclasses.field(default_factory=LanguageLogConfig)


MAX_SEED = 2**32 - 1
CHOICES = {
  'task': ('edit', 'text_to_image'),
  'checkpoint_weights': ('', 'average', 'live'),
  'prediction_type': ('', 'epsilon', 'v_prediction'),
  'dtype': ('bfloat16', 'float32'),
  'remat': ('none', 'convdot', 'full'),
  'attention': ('auto', 'xla', 'splash', 'cudnn'),
  'data.resize': ('crop', 'squash'),
}
AT_LEAST_ONE = ('resolution', 'batch_size', 'accumulation', 'steps', 'data.prefetch',
                'data.max_tokens', 'log.every', 'log.checkpoint_every', 'log.keep',
                'log.preview_steps')  # fmt: skip
AT_LEAST_ZERO = ('seed', 'min_snr_gamma', 'lora.rank', 'data.workers', 'data.max_corrupt',
                 'data.largest_resize', 'log.validate_every', 'log.validation_examples',
                 'log.previews')  # fmt: skip


# A setting, and the one without which it does nothing.
NEEDS = (
  ('lora.alpha', 'lora.rank'),
  ('lora.targets', 'lora.rank'),
  ('optimizer.final_rate', 'optimizer.schedule'),
  ('log.validate_every', 'log.validation_examples'),
  ('log.validation_examples', 'log.validate_every'),
  ('log.preview_steps', 'log.previews'),
)


def check_config(config: TrainConfig) -> None:
  """Raises an InputError that names the first knob whose value makes no sense."""
  check_values(config)
  _check_paths(config)


def check_values(config: TrainConfig) -> None:
  """`check` of all but whether checkpoint and data are named."""
  _check_common(config)
  if config.attention == 'cudnn' and config.dtype == 'float32':
    raise InputError(
      "attention is 'cudnn', which does not compute in dtype='float32'; use attention='auto' or"
      " dtype='bfloat16'."
    )
  if not 0 <= config.conditioning_dropout <= 1 / 3:
    raise InputError(
      f'conditioning_dropout is {config.conditioning_dropout}; it is the rate of each of three'
      ' kinds of dropout, 0 to 0.33.'
    )
  if not 0 <= config.data.flip_rate <= 1:
    raise InputError(f'data.flip_rate is {config.data.flip_rate}; use 0 to 1.')
  if config.data.largest_resize and config.data.largest_resize < config.resolution:
    raise InputError(
      f'data.largest_resize is {config.data.largest_resize}, smaller than the resolution'
      f' {config.resolution}; use 0 for no random crop.'
    )


def check_language(config: LanguageConfig) -> None:
  """The same for a run of a language model."""
  _check_common(config)
  if not 0 <= config.data.holdout < 1:
    raise InputError(f'data.holdout is {config.data.holdout}; use 0 to below 1.')
  _check_paths(config)


def _check_common(config):
  values = dict(knobs(config))
  for name, choices in CHOICES.items():
    if name in values:
      check_choice(name, values[name], choices)
  for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
    for name in names:
      if name in values and not least <= values[name] < math.inf:  # and not nan
        raise InputError(f'{name} is {values[name]}; use {least} or more.')
  if config.seed > MAX_SEED:
    raise InputError(f'seed is {config.seed}; use at most {MAX_SEED}.')
  if config.lora.rank and not 0 < config.lora.alpha < math.inf:
    raise InputError(f'lora.alpha is {config.lora.alpha}; use a number above 0.')
  _check_acting(config, values)


def _check_acting(config, values):
  """Refuses what was set and would do nothing."""
  usual = dict(knobs(type(config)()))
  for name, other in NEEDS:
    is_set = name in values and values[name] and values[name] != usual[name]
    if is_set and values.get(other, 1) in (0, 'constant'):
      raise InputError(
        f'{name} is {values[name]!r}, which does nothing while {other} is {values[other]!r}; change'
        f' {other}, or leave {name} at {usual[name]!r}.'
      )
  window = config.log.profile
  if len(window) != 2 or not all(isinstance(x, int) and x >= 0 for x in window):
    raise InputError(f'log.profile is {window!r}; give the first step and how many, as in 100,5.')
  first, count = window
  if first and not count:
    raise InputError(f'log.profile is {window!r}, no step; give how many, as in {first},5.')
  if count and max(first, 2) > config.steps:
    raise InputError(
      f'log.profile begins at step {max(first, 2)}, and the run ends at step {config.steps}; name'
      ' earlier steps.'
    )


def _check_paths(config):
  for name, path in (('checkpoint', config.checkpoint), ('data.path', config.data.path)):
    if not path:
      raise InputError(f'{name} is empty; say where it is: --config.{name}=PATH.')


def knobs(config: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Every (dotted name, value)."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from knobs(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value


def check_overrides(argv: Sequence[str], kinds: Sequence[type] = (TrainConfig,)) -> None:
  """Raises an InputError for a `--config.KEY` that is no knob of any, naming the nearest one."""
  known = [name for kind in kinds for name, _ in knobs(kind())]
  for argument in argv:
    name = argument.lstrip('-').partition('=')[0].removeprefix('config.')
    if argument.startswith(('--config.', '-config.')) and name not in known:
      near = _nearest(name, known)
      hint = f'did you mean --config.{near}?' if near else 'ip2p_jax/config.py lists them all.'
      raise InputError(f'--config.{name} is no setting of a training run; {hint}')


def plain_overrides(argv: Sequence[str], kinds: Sequence[type]) -> list[str]:
  """The arguments, with tuples as absl reads them, where they are written as `parse` takes them."""
  known = {name: value for kind in kinds for name, value in knobs(kind())}
  argv = list(argv)
  for i, argument in enumerate(argv):
    flag, is_joined, text = argument.partition('=')
    name = flag.lstrip('-').removeprefix('config.')
    if not flag.startswith(('--config.', '-config.')) or not isinstance(known.get(name), tuple):
      continue
    if is_joined:
      argv[i] = f'{flag}={parse(name, text, known[name])!r}'
    elif i + 1 < len(argv):
      argv[i + 1] = repr(parse(name, argv[i + 1], known[name]))
  return argv


def load_config(
  path: str | os.PathLike, changes: Sequence[str] = (), kind: type = TrainConfig
) -> Any:
  """What `get_config()` of a file gives, with changes such as 'optimizer.learning_rate=3e-5'.

  `kind` is what it is to give: `TrainConfig` or `LanguageConfig`. InputError for a file that gives
  something else, a name that is no knob, or a value of another type.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path}: no such file; see configs/.')
  try:
    config = runpy.run_path(os.fspath(path)).get('get_config', lambda: None)()
  except Exception as error:  # whatever a file that is no config does
    raise InputError(f'{path}: cannot be run ({type(error).__name__}: {error}).') from error
  if not isinstance(config, kind):
    raise InputError(
      f'{path}: is no config for this, a file whose get_config() gives a {kind.__name__}.'
    )
  check_overrides([f'--config.{change}' for change in changes], [kind])
  for change in changes:
    name, is_given, text = change.partition('=')
    *sections, knob = name.split('.')
    owner = functools.reduce(getattr, sections, config)
    if not is_given:
      raise InputError(f'{change}: has no value; write {name}=VALUE.')
    setattr(owner, knob, parse(name, text, getattr(owner, knob)))
  return config


def _nearest(name, known):
  section, _, word = name.rpartition('.')
  for full in sorted(known, key=lambda full: full.rpartition('.')[0] != section):
    last = full.rpartition('.')[2]
    if word in (last, ''.join(part[0] for part in last.split('_') if '_' in last)):  # lr
      return full
  by_word = {full.rpartition('.')[2]: full for full in known}
  near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(word, by_word, 1)
  return by_word.get(near[0], near[0]) if near else None
