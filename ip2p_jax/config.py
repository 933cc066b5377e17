"""Every setting of a training run, with its unit and default; the defaults are the paper's run.

`configs/*.py` make these. `--config.optimizer.learning_rate=3e-5` overrides one. The workdir keeps
them as `config.json`. Rules are ((pattern, value), ...) over dotted parameter names, such as
'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.kernel'; `re.search`, first match wins.
On the command line they are 'pattern=value,pattern=value': --config.optimizer.rates='attn2=1,.*=0'.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

Rules = tuple[tuple[str, float], ...]


@dataclasses.dataclass
class DataConfig:
  """Where examples come from and how an image becomes a training example.

  Attributes:
    path: one data set, or several with weights: 'a', 'a=3,b=1'. Packed shards, precomputed latents,
      the original's folders, a folder with metadata, parquet files.
    columns: names of columns where they are unusual: 'input=before,edited=after,instruction=text'.
    resize: 'crop' keeps the aspect ratio (resize and cut); 'squash' does not (as the original).
    largest_resize: pixels; the short side is drawn between resolution and this before a random
      crop (the paper's text has 288 for 256); 0 for no augmentation (the released config).
    flip_rate: how often both images are mirrored.
    flip_directions: whether to mirror even when the instruction says left or right.
    max_corrupt: broken records to skip in each pass of the data before the run stops.
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
    final_rate: the end of 'cosine', as a fraction of `learning_rate`.
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
    every: metrics. Between logs the host waits only for the step before last, so that it is at most
      two steps ahead; checkpoints, validation and previews also wait.
    checkpoint_every, keep: checkpoints, and how many of the newest stay. The last one after which
      the loss was near its running mean stays, too.
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
    checkpoint_weights: 'average' or 'live', for a single file that holds both. '' takes the average
      unless the live weights seem to be merged, or to have an adapter added.
    prediction_type: 'epsilon' or 'v_prediction'; '' takes the checkpoint's. Most single files do
      not say, and count as 'epsilon'; SD 2.x at 768 px is 'v_prediction'.
    task: 'edit' (a UNet of 4 input channels gets 4 more, at zero) or 'text_to_image'.
    resolution: side of the square training images, pixels.
    batch_size: examples per optimizer step, over all devices and accumulation steps.
    accumulation: parts of a batch, computed one after the other; devices exchange gradients once
      for each.
    conditioning_dropout: rate of each of three cases: text, both, or image is dropped.
    min_snr_gamma: loss weights of Hang et al. 2023 (5 is theirs); 0 weighs all timesteps alike.
    dtype: of arithmetic, 'bfloat16' or 'float32'; master weights are float32.
    remat: operations that are computed twice to save memory: 'none', 'convdot' (all except
      convolutions, matrix products and attention), 'full'.
    attention: 'auto' takes the fastest kernel for the devices, see `attention.KERNELS`; 'xla' takes
      none; 'splash' (TPU) and 'cudnn' (NVIDIA) are used where they can run.
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
    holdout: fraction of the rows, spread evenly, for the validation loss only; 0 none. Rows that
      share a caption stay together.
    max_tokens: longest triplet, in tokens; a longer one stops the run before it starts.
  """

  path: str = ''
  holdout: float = 0.05
  max_tokens: int = 512


@dataclasses.dataclass
class LanguageLogConfig:
  """What is written, and how often, in steps.

  Attributes:
    every, checkpoint_every, keep: as in `LogConfig`.
    validate_every: loss of the held-out triplets; 0 never.
    profile: as in `LogConfig`.
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
    accumulation: parts of a batch, computed one after the other; devices exchange gradients once
      for each.
    steps: optimizer steps; one pass of 700 triplets, 5 % of them held out, is 21 steps of 32.
    dtype: of arithmetic, 'bfloat16' or 'float32'; master weights are float32. With LoRA it is also
      the dtype of the frozen weights.
    remat: operations that are computed twice to save memory: 'none', 'convdot' (all except matrix
      products and attention), 'full' (all of a layer except its input).
    seed: of the order, and of the weights of new adapters.
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


def knobs(config: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Every (dotted name, value)."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from knobs(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value


def set_knob(config: Any, name: str, value: Any) -> None:
  *sections, knob = name.split('.')
  setattr(functools.reduce(getattr, sections, config), knob, value)
