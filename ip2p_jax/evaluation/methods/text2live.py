"""Text2LIVE as a method: a layer is trained for each image, one image after the other.

The released code has a text for the layer that its user writes, such as 'golden horse'. A protocol
has no such text, so the edited caption is the layer's text. The changed word of the caption, where
it is given, is the text of the region ('horse').
"""

import logging
import time
from collections.abc import Callable

import jax
import numpy as np

from ip2p_jax.evaluation import text2live_settings
from ip2p_jax.evaluation.methods.method import Method, Texts, check_texts
from ip2p_jax.evaluation.text2live import Text2Live
from ip2p_jax.evaluation.text2live_settings import Settings
from ip2p_jax.pipeline import rows
from ip2p_jax.pipeline.clip_scores import Clip

COUNTS = ('levels', 'width', 'skip', 'steps', 'views', 'whole_every', 'bootstrap_steps')
TIMED = (1, 11)  # steps; the first one waits for the compiler

_log = logging.getLogger(__name__)


def text2live(model: Clip, settings: Settings = Settings()) -> Method:
  """The method; `model` is the CLIP that trains the layers. InputError for a count below 1."""
  rows.check_positive(**{name: getattr(settings, name) for name in COUNTS})
  trainer, report = Text2Live(model, settings), time_report(settings.steps)

  def edit(images: np.ndarray, texts: Texts) -> np.ndarray:
    check_texts(texts, len(images))
    seeds = rows.counts('seed', texts.seeds, len(images)).tolist()
    words = texts.words or [None] * len(images)
    columns = zip(images, texts.captions, texts.edited_captions, words, seeds, strict=True)
    edits = [
      trainer.edit(image, layer_texts(caption, edited, pair), seed, report)
      for image, caption, edited, pair, seed in columns
    ]
    rows.check_finite('edit', np.concatenate([edit.layer.ravel() for edit in edits]))
    return np.stack([edit.image for edit in edits])

  return edit


def layer_texts(
  caption: str, edited_caption: str, words: tuple[str, str] | None
) -> text2live_settings.Texts:
  """The four texts of Text2LIVE."""
  region = words[0] if words else ''
  return text2live_settings.Texts(caption, edited_caption, edited_caption, region)


def time_report(steps: int) -> Callable[[int, dict], None]:
  """A `report` for `Text2Live.edit` that logs once how long an image takes."""
  times = []

  def report(step, losses):
    if len(times) == len(TIMED) or step != TIMED[len(times)]:
      return
    jax.block_until_ready(losses)
    times.append(time.monotonic())
    if len(times) == len(TIMED):
      seconds = (times[1] - times[0]) / (TIMED[1] - TIMED[0]) * steps
      _log.info('text2live: %d steps, about %.0f s for each image', steps, seconds)

  return report
