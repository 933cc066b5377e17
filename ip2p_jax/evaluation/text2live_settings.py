"""What a user of Text2LIVE decides; the defaults are those of the released code for images."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

PHOTOS = ('photo', 'high quality photo', 'a photo', 'the photo', 'image', 'an image',
          'high quality image', 'a high quality image')  # fmt: skip
TEMPLATES = (*(f'{start} of {{}}.' for start in PHOTOS), 'the {}.', 'a {}.', '{}.', '{}', '{}!',
             '{}...')  # fmt: skip


class Texts(NamedTuple):
  """What the image shows, what it shall show, what the layer shows, and perhaps where it goes."""

  source: str
  edited: str
  layer: str
  region: str = ''


class Settings(NamedTuple):
  """Sizes of the generator, the course of the training, and weights of the losses.

  `bootstrap` is used if the texts name a region. It falls to 0 over `bootstrap_steps`.
  """

  levels: int = 7
  width: int = 128
  skip: int = 4
  steps: int = 1000
  views: int = 16
  whole_every: int = 75  # steps, of which the first also sees the image without a crop
  learning_rate: float = 2.5e-3
  decay: float = 0.99  # of the learning rate, per step
  least_rate: float = 1e-5
  momentum: float = 0.9
  weight_decay: float = 0.01
  composition: float = 1.0
  screen: float = 1.0
  structure: float = 2.0
  sparsity: float = 6.0
  bootstrap: float = 10.0
  bootstrap_steps: int = 1000
  templates: tuple[str, ...] = TEMPLATES
  screen_templates: tuple[str, ...] = (
    '{} over a green screen.', '{} in front of a green screen.',
  )  # fmt: skip
  screen_colour: tuple[float, float, float] = (0.0, 177 / 255, 64 / 255)


def optimizer(settings: Settings) -> optax.GradientTransformation:
  """MADGRAD (Defazio and Jelassi 2021) with a falling rate; the decay is part of the gradient."""
  rate = lambda step: jnp.maximum(
    settings.learning_rate * settings.decay**step, settings.least_rate
  )
  return optax.contrib.madgrad(rate, settings.momentum, settings.weight_decay)
