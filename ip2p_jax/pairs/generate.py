"""Draws pairs of images for pairs of captions, with CLIP's scores of each pair.

A sample is one pair of one prompt; S samples per prompt, B samples per call of the program. Whole
runs are in `run`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ip2p_jax import images, sharding
from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError, check_choice, check_multiple
from ip2p_jax.models import attention
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pairs import alignment, inversion
from ip2p_jax.pairs.program import PairRequest, PairSpec, scored_pairs
from ip2p_jax.pairs.prompt_to_prompt import Blend, Control, Injection
from ip2p_jax.pairs.prompts import Prompt, listed
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.clip_scores import Clip, Towers
from ip2p_jax.pipeline.networks import Networks, check_is_text_to_image
from ip2p_jax.pipeline.scores import Scores
from ip2p_jax.sharding import ROWS, SECOND, WHOLE
from ip2p_jax.xla_alarms import quietly

INJECTIONS = ('replace', 'refine', 'auto')
CONTROLS = ('none', 'share', *INJECTIONS, *(f'share+{name}' for name in INJECTIONS))
KEEPS = ('all', 'passing')


class Sample(NamedTuple):
  """The random values of one pair of images. Captions and settings decide the rest."""

  seed: int  # uint32, of the noise
  threshold: float  # share of the steps that share self-attention
  guidance: float


@dataclasses.dataclass(frozen=True)
class PairSettings:
  """How pairs are drawn; the defaults are the paper's.

  Attributes:
    samples: number per prompt.
    control: 'share', the rule of the released generator; 'replace' or 'refine', prompt-to-prompt as
      published; 'auto', whichever of these two fits the captions; 'share+auto' and the like; or
      'none'.
    threshold, guidance: ranges from which each sample draws its value uniformly.
    cross, self: share of the steps in which replace and refine control the attention to words and
      self-attention.
    size: side of the images, pixels.
    seed: of the run.
    keep: which images to write: 'all', or those 'passing' the thresholds of the released data.
      The scores of all pairs are written.
    batch_size: samples per call of the program.
  """

  samples: int = 100
  steps: int = 100
  sampler: str = 'euler_ancestral'
  control: str = 'share'
  threshold: tuple[float, float] = (0.1, 0.9)
  guidance: tuple[float, float] = (7.5, 15.0)
  cross: float = 0.8
  self: float = 0.4
  negative: str = ''
  size: int = 512
  seed: int = 0
  keep: str = 'all'
  batch_size: int = 8

  def __post_init__(self):
    samplers.noise_levels(Schedule(), self.sampler, self.steps)  # refuses unknown samplers
    for name, choices in (('control', CONTROLS), ('keep', KEEPS)):
      check_choice(name, getattr(self, name), choices)
    for name in ('samples', 'batch_size', 'size'):
      if getattr(self, name) < 1:
        raise InputError(f'{name} is {getattr(self, name)}; use 1 or more.')
    for name, most in (('threshold', 1), ('guidance', 100)):
      low, high = getattr(self, name)
      if not 0 <= low <= high <= most:
        raise InputError(f'{name} is {low} to {high}; give two numbers from 0 to {most}, in order.')
    for name in ('cross', 'self'):
      alignment.step_window(getattr(self, name), self.steps)

  def sample(self, prompt: int, number: int) -> Sample:
    """Sample `number` of prompt `prompt`, from a hash, so that each can be drawn alone.

    The original code seeds each sample by the previous one, and soon repeats itself.
    """
    return _samples(self.seed, prompt, self.samples, self.threshold, self.guidance)[number]


@functools.lru_cache(maxsize=1024)
def _samples(seed, prompt, count, threshold, guidance) -> list[Sample]:
  """The samples of a prompt. Their seeds differ, since they name the files."""
  samples: dict[int, Sample] = {}
  attempt = 0
  while len(samples) < count:
    digest = hashlib.blake2b(f'{seed} {prompt} {attempt}'.encode(), digest_size=12).digest()
    own_seed, *parts = (int.from_bytes(digest[i : i + 4], 'little') for i in (0, 4, 8))
    between = [low + (high - low) * part / 2**32
               for part, (low, high) in zip(parts, (threshold, guidance), strict=True)]  # fmt: skip
    samples.setdefault(own_seed, Sample(own_seed, *between))
    attempt += 1
  return list(samples.values())


# How devices share the inputs of `program`.
SPLIT = PairRequest(
  SECOND, WHOLE, ROWS, ROWS, WHOLE, ROWS, init_noise=ROWS, step_noise=SECOND, null_contexts=SECOND
)
SPECS = WHOLE, SPLIT, SECOND, ROWS


def program(networks: Networks, towers: Towers, mesh: Mesh) -> Callable:
  """A jitted function. Each device of the mesh draws its own pairs, without communication.

  The function takes a PairSpec (static), parameters with 'clip', a PairRequest, CLIP's tokens
  [2, P, L], and first images uint8 [P, H, W, 3] or None. It returns what `PairGenerator.draw` does.
  """

  def draw(spec, params, request, clip_ids, first_images):
    if first_images is not None:
      start = inversion.invert(
        networks, params, first_images, request.token_ids[0], request.negative_ids,
        request.guidance, request.grid,
      )  # fmt: skip
      request = request._replace(**start._asdict())
    pairs, scores = scored_pairs(networks, towers, spec, params, request, clip_ids)
    return parts.unit_to_uint8(pairs.images), scores, pairs.attention

  def run(spec, *inputs):
    on_devices = sharding.each_its_rows(
      functools.partial(draw, spec),
      mesh,
      in_specs=SPECS,
      out_specs=(SECOND, ROWS, SECOND),
    )
    return on_devices(*inputs)

  return jax.jit(run, static_argnums=0)


def faults(prompt: Prompt, drawing: PairSettings, tokenizer: ClipTokenizer) -> Iterator[str]:
  """All reasons why a prompt cannot be drawn, each as the text after 'line 7: '."""
  control = drawing.control.removeprefix('share+')
  options = {'weights': prompt.weights, 'cross_steps': prompt.spans, 'blend': prompt.blend}
  names = [name for name, value in options.items() if value]
  if names and control not in INJECTIONS:
    yield f'{" and ".join(names)} do nothing with the control {control!r}; use auto or share+auto'
  elif names or control == 'replace':
    yield from _word_faults(prompt, control, tokenizer)
  if prompt.image is not None:
    if drawing.sampler != inversion.SAMPLER:
      yield f'pairs from an image need the sampler {inversion.SAMPLER}'
    try:
      if prompt.image.is_file():  # else `read_prompts` reports it
        images.read(prompt.image)
    except InputError as error:
      yield str(error)


def _word_faults(prompt, control, tokenizer):
  caption, edited = prompt.caption, prompt.edited_caption
  before, after = prompt.blend or ((), ())
  words = [(edited, word) for word in (*prompt.weights, *prompt.spans)]
  words += [(caption, word) for word in before] + [(edited, word) for word in after]
  checks = [(alignment.places, text, word) for text, word in dict.fromkeys(words)]
  if control == 'replace':
    checks.append((alignment.replace, caption, edited))
  for check, *texts in checks:
    try:
      check(tokenizer, *texts)
    except InputError as error:
      yield str(error).rstrip('.')


class PairGenerator:
  """Draws batches of pairs on all local devices."""

  def __init__(
    self,
    networks: Networks,
    params: dict[str, Any],
    tokenizer: ClipTokenizer,
    clip: Clip,
    drawing: PairSettings,
    mesh: Mesh | None = None,
    source: str = 'the checkpoint',
  ):
    """Raises InputError if `source` is not text-to-image, or the settings do not fit it."""
    check_is_text_to_image(networks, source)
    factor = networks.vae_config.factor
    check_multiple('size', drawing.size, factor)
    self.mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
    if drawing.batch_size % self.mesh.size:
      raise InputError(
        f'batch_size is {drawing.batch_size}; use a multiple of the {self.mesh.size} devices.'
      )
    self.networks = networks._replace(attention=attention.dispatch(mesh=self.mesh))
    self.drawing = drawing
    self.tokenizer, self.clip = tokenizer, clip
    self.spec = PairSpec(drawing.sampler, *[drawing.size // factor] * 2)
    self.grid = samplers.noise_levels(networks.schedule, drawing.sampler, drawing.steps)
    params = {**params, 'clip': clip.params}
    self.params = jax.device_put(params, sharding.replicated(self.mesh))
    self._negative = tokenizer([drawing.negative])
    self._program = program(self.networks, clip.towers, self.mesh)

  def check(self, prompts: Sequence[Prompt]) -> None:
    """Raises InputError with all lines that cannot be drawn, and why. Warns of cut off captions."""
    problems = [
      f'line {prompt.index + 1}: {fault}'
      for prompt in prompts
      for fault in faults(prompt, self.drawing, self.tokenizer)
    ]
    if problems:
      raise InputError(f'the prompts cannot be drawn: {listed(problems)}; mend this first.')
    texts = [('the negative text', self.drawing.negative)]
    for prompt in prompts:
      name = f'line {prompt.index + 1}'
      texts += [(name, prompt.caption), (f'{name}, output', prompt.edited_caption)]
    cut = [f'{name} (ignored: {end!r})' for name, text in texts if (end := self._cut_off(text))]
    if cut:
      warnings.warn(
        f'{len(cut)} of the captions are longer than the {self.tokenizer.length} tokens that are'
        f' read: {listed(cut)}',
        stacklevel=2,
      )

  def _cut_off(self, text: str) -> str:
    """The end of a text that the network or CLIP does not read; '' if both read all of it."""
    readers = (self.tokenizer, self.clip.tokenizer)
    if len(text.encode()) <= min(reader.length for reader in readers) - 2:  # a token has a byte
      return ''
    return max((reader.cut_off(text).strip() for reader in readers), key=len)

  def draw(
    self, prompts: Sequence[Prompt], samples: Sequence[Sample], shows_attention: bool = False
  ) -> tuple[np.ndarray, Scores, np.ndarray | None]:
    """Draws at most B pairs. Does not wait for the device.

    Returns uint8 images [2, B, H, W, 3], the scores of each pair, and the attention to each token
    (see `program.Pairs`). Rows after the requested ones are padding.
    """
    count = self.drawing.batch_size
    padded = lambda rows: (list(rows) * count)[:count]
    prompts, samples = padded(prompts), padded(samples)
    texts = [p.caption for p in prompts], [p.edited_caption for p in prompts]
    request = PairRequest(
      token_ids=np.stack([self.tokenizer(side) for side in texts]),
      negative_ids=self._negative,
      guidance=np.float32([sample.guidance for sample in samples]),
      seeds=np.uint32([sample.seed for sample in samples]),
      grid=self.grid,
      control=self._control(prompts, samples),
    )
    spec = self.spec._replace(shows_attention=shows_attention)
    clip_ids = np.stack([self.clip.tokenizer(side) for side in texts])
    first_images = None
    if prompts[0].image is not None:
      if self.drawing.sampler != inversion.SAMPLER:
        raise InputError(f'pairs from an image need the sampler {inversion.SAMPLER}.')
      first_images = np.stack([_square(prompt.image, self.drawing.size) for prompt in prompts])
    return quietly(self._program, spec, self.params, request, clip_ids, first_images)

  def _control(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Control:
    control, steps = self.drawing.control, self.drawing.steps
    if control == 'none':
      return Control()
    until = None
    if control.startswith('share'):
      until = np.int32([shared_steps(sample.threshold, steps) for sample in samples])
    if control == 'share':
      return Control(until)
    kind = control.removeprefix('share+')
    injection = jax.tree.map(lambda *rows: np.stack(rows), *map(self._injection(kind), prompts))
    blend = None
    if any(prompt.blend for prompt in prompts):
      blend = jax.tree.map(lambda *rows: np.stack(rows), *map(self._blend, prompts))
    return Control(until, injection, blend)

  def _injection(self, kind):
    align = {
      'auto': lambda *texts: alignment.align(*texts)[1],
      'replace': alignment.replace,
      'refine': alignment.refine,
    }[kind]
    steps = self.drawing.steps

    def injection(prompt: Prompt) -> Injection:
      with _naming(prompt):
        result = align(self.tokenizer, prompt.caption, prompt.edited_caption)
        text = prompt.edited_caption
        return Injection(
          np.int32(alignment.step_window(self.drawing.self, steps)),
          alignment.windows(self.tokenizer, text, steps, self.drawing.cross, prompt.spans),
          result.matrix,
          result.has_source,
          alignment.equalizer(self.tokenizer, text, prompt.weights),
        )

    return injection

  def _blend(self, prompt: Prompt) -> Blend:
    if prompt.blend is None:
      nothing = np.zeros((2, self.tokenizer.length), np.float32)
      return Blend(nothing, np.float32(0.3), np.int32(self.drawing.steps))
    with _naming(prompt):
      words = [
        alignment.mask(self.tokenizer, text, side)
        for text, side in zip((prompt.caption, prompt.edited_caption), prompt.blend, strict=True)
      ]
    return Blend(np.stack(words), np.float32(0.3), np.int32(0))


def _square(path: Path, size: int) -> np.ndarray:
  """The centre of an image, uint8 [size, size, 3]."""
  image = images.read(path)
  side = min(image.size)
  left, top = ((length - side) // 2 for length in image.size)
  return images.to_array(image.crop((left, top, left + side, top + side)), (size, size))


def shared_steps(threshold: float, steps: int) -> int:
  """The number of steps that share: with threshold > i / (steps - 1), as in the released generator.

  Computed in double precision on the host, so that a device's rounding does not matter.
  """
  return sum(threshold > i / max(steps - 1, 1) for i in range(steps))


@contextlib.contextmanager
def _naming(prompt: Prompt) -> Iterator[None]:
  try:
    yield
  except InputError as error:
    raise InputError(f'line {prompt.index + 1} of the prompts: {error}') from None
