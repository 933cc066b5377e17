"""Settings of a sampler, and checks that each setting of an edit has an effect."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of the way from noise to latents.

  Attributes:
    sampler: 'euler_ancestral', 'euler', 'heun', 'ddim', 'dpmpp_2m' or 'lcm'.
    spacing: of the timesteps: 'linspace', 'leading', 'trailing'; None is the sampler's default.
    karras: whether to space the noise levels as Karras et al. (2022) do.
    rescale: 0 to 1, against overexposure at high scales (Lin et al. 2023).
    interval: the part of the steps with guidance, as in (0.2, 0.8); in other steps the network runs
      once instead of up to three times (Kynkaanniemi et al. 2024).
  """

  steps: int = 100
  sampler: str = 'euler_ancestral'
  spacing: str | None = None
  karras: bool = False
  rescale: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)

  def __post_init__(self):
    self.grid(Schedule())  # finds most mistakes before a checkpoint is read
    if not 0 <= self.rescale <= 1:
      raise InputError(f'rescale is {self.rescale}; it goes from 0 (none) to 1.')
    start, stop = self.interval
    if not 0 <= start <= stop <= 1:
      raise InputError(f'interval is {start} to {stop}; give two fractions of the steps, 0 to 1.')
    self._check_acts()

  def _check_acts(self):
    """Raises InputError for a setting that changes no noise level."""
    plain = dataclasses.replace(self, karras=False) if self.karras else self
    own, plain = (sampling.grid(Schedule()).sigmas for sampling in (self, plain))
    if self.karras and np.array_equal(own, plain):
      raise InputError(f'karras changes nothing in {self.steps} steps; leave it out.')
    # These levels always span the whole schedule; 'linspace' is the default.
    if self.karras and self.sampler == 'dpmpp_2m' and self.spacing not in (None, 'linspace'):
      raise InputError('spacing changes nothing in dpmpp_2m with karras; leave one of them out.')

  def grid(self, schedule: Schedule) -> samplers.Grid:
    return samplers.noise_levels(schedule, self.sampler, self.steps, self.spacing, self.karras)

  def has_interval(self, branches: tuple[str, ...]) -> bool:
    """Whether only some steps are guided; `branches` are those of the guided steps."""
    return tuple(self.interval) != (0.0, 1.0) and branches != guidance.CONDITIONAL

  def guided_steps(self) -> tuple[int, int]:
    """The first guided step, and the first step after the guided ones."""
    start, stop = (round(fraction * self.steps) for fraction in self.interval)
    return start, stop

  def guided_sigmas(self, sigmas: np.ndarray) -> np.ndarray:
    """float32 [2]: guide at noise levels above the first and up to the second."""
    start, stop = self.guided_steps()
    return np.float32([sigmas[stop], np.inf if start == 0 else sigmas[start]])

  def network_calls(self, branches: tuple[str, ...]) -> int:
    """How often the network predicts for one image; `branches` are those of the guided steps."""
    sigmas = self.grid(Schedule()).sigmas
    levels = sigmas[:-1]
    if self.sampler == 'heun':  # again at the end of each step, but for the last
      levels = np.concatenate([levels, levels[1:]])
    guided = len(levels)
    if self.has_interval(branches):
      low, high = self.guided_sigmas(sigmas)
      guided = int(np.sum((levels > low) & (levels <= high)))
    return guided * len(branches) + len(levels) - guided


def check_acts(
  sampling: Sampling,
  text_guidance: float | Sequence[float],
  image_guidance: float | Sequence[float],
  negative: str = '',
) -> None:
  """Raises InputError for a setting of the guidance that changes no image at these scales."""
  start, stop = sampling.guided_steps()
  low, high = sampling.interval
  window, steps = f'interval {low:g} to {high:g}', sampling.steps
  if negative and not negative.strip():
    raise InputError('negative is blank, which is the default; leave it out.')
  scales = np.asarray(text_guidance), np.asarray(image_guidance)
  if guidance.branches(*scales) != (guidance.TEXT_AND_IMAGE,):
    if start == stop:
      raise InputError(f'{window} holds none of {steps} steps; widen it, or set both scales to 1.')
    if (low, high) != (0, 1) and (start, stop) == (0, steps):
      raise InputError(f'{window} holds all of {steps} steps; leave it out.')
    return
  options = {'negative': negative, 'rescale': sampling.rescale, 'interval': (low, high) != (0, 1)}
  if idle := ' and '.join(name for name, value in options.items() if value):
    raise InputError(
      f'{idle}: of no use with guidance of scale 1, which guides nothing; leave it out, or give'
      ' another scale.'
    )


def check_noise_acts(
  sampler: str,
  seed: int | Sequence[int] | None,
  indices: Sequence[int] | None,
  init_noise: np.ndarray | None,
  step_noise: np.ndarray | None,
) -> None:
  """Raises InputError for noise that the sampler does not use, or a seed that has no effect."""
  if step_noise is not None and sampler not in samplers.STOCHASTIC:
    raise InputError(f'step_noise: the sampler {sampler} takes none; leave it out.')
  is_given = init_noise is not None and (
    step_noise is not None or sampler not in samplers.STOCHASTIC
  )
  if is_given and not (seed is None and indices is None):
    raise InputError('seed and indices make noise, and all noise is given; leave them out.')
  if seed is None and indices is not None:
    raise InputError('indices: of no use without a seed, which is then random; give one.')
