"""What makes the edits of an evaluation: an editor, or a method of the table.

Settings are named tuples of JSON values, since an evaluation stores them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ip2p_jax.diffusion import guidance
from ip2p_jax.editing.editor import Editor
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods import table
from ip2p_jax.evaluation.methods.method import Texts
from ip2p_jax.evaluation.protocols import EditRow
from ip2p_jax.evaluation.run import Edit
from ip2p_jax.images import working_size
from ip2p_jax.parameters import flatten
from ip2p_jax.pipeline.networks import weights_digest
from ip2p_jax.pipeline.sampling import Sampling, check_acts
from ip2p_jax.pipeline.text_to_image import check_strength

EDITOR = 'an editor'
TEXTS = {  # what a method reads, and the field of a row
  'captions': 'source_caption', 'edited_captions': 'target_caption', 'instructions': 'instruction',
}  # fmt: skip


class ByEditor(NamedTuple):
  """Edits by an editor; `ckpt` is as for `Editor.load`, the rest as for `Editor.edit`."""

  ckpt: str
  steps: int
  sampler: str
  cfg_text: float
  cfg_image: float
  spacing: str | None = None
  karras: bool = False
  rescale: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)
  seed: int = 0
  resolution: int | None = None

  def sampling(self) -> Sampling:
    return Sampling(
      self.steps, self.sampler, self.spacing, self.karras, self.rescale, tuple(self.interval)
    )

  def check(self, rows: Sequence[EditRow]) -> None:
    """Raises InputError for settings that are wrong or change nothing."""
    del rows
    check_acts(self.sampling(), self.cfg_text, self.cfg_image, '')

  kind = EDITOR
  is_trained = False

  @property
  def checkpoint(self) -> str:
    return self.ckpt

  def edit(self, model: Editor) -> Edit:
    """A function that edits a batch by these settings."""

    def edit(images, rows, numbers):
      edits = model.edit_arrays(
        images, [row.instruction for row in rows], self.sampling(),
        text_guidance=self.cfg_text, image_guidance=self.cfg_image, seeds=self.seed,
        indices=numbers,
      )  # fmt: skip
      return np.asarray(edits.images)

    return edit

  def network_calls(self) -> int:
    """How often the UNet predicts for one edit."""
    branches = guidance.branches(self.cfg_text, self.cfg_image, self.rescale)
    return self.sampling().network_calls(branches)


class ByMethod(NamedTuple):
  """Edits by a method of the table.

  Attributes:
    base: what the method edits with, a local path; see `table.Entry.base`.
    set: the settings that are not the method's own, such as {'strength': 0.7}.
  """

  method: str
  base: str | None
  set: dict[str, float]
  seed: int = 0
  resolution: int | None = None

  def check(self, rows: Sequence[EditRow]) -> None:
    """Raises InputError for an unknown method or setting, or rows without a text it needs."""
    table.check_base(self.method, self.base)
    settings = table.settings_of(self.method, **self.set)
    if hasattr(settings, 'strength'):
      check_strength(settings.steps, settings.strength)
    for column in table.METHODS[self.method].reads:
      if lacking := [row.id for row in rows if not getattr(row, TEXTS[column])]:
        raise InputError(
          f'--method {self.method} needs {column}, which {len(lacking)} rows lack, such as'
          f' {lacking[0]}; choose another method.'
        )

  @property
  def kind(self) -> str:
    return table.METHODS[self.method].base

  @property
  def is_trained(self) -> bool:
    """Whether it is trained for each image: then progress counts single images."""
    return table.METHODS[self.method].is_trained

  @property
  def checkpoint(self) -> str | None:
    return self.base

  def edit(self, model: Any) -> Edit:
    """A function that edits a batch by these settings."""
    edited = table.method(self.method, model, **self.set)

    def edit(images, rows, numbers):
      texts = ([getattr(row, field) for row in rows] for field in TEXTS.values())
      seeds = [self.seed + number for number in numbers]
      return edited(images, Texts(*texts, seeds, [row.words for row in rows]))

    return edit

  def network_calls(self) -> float:
    """How often the UNet predicts for one edit."""
    return table.network_calls(self.method, **self.set)


How = ByEditor | ByMethod


def load(kind: str, checkpoint: str | None, dtype: str | None) -> Any:
  """What `How.edit` needs; `kind` and `checkpoint` are those of the settings."""
  if kind == EDITOR:
    return Editor.load(checkpoint, dtype)
  return table.load(kind, checkpoint, dtype)


def weights_of(model: Any) -> str:
  """A digest of a few numbers of each tensor of a model; '' if it has none."""
  if model is None:
    return ''
  few = jax.jit(lambda tree: jax.tree.map(lambda x: x.reshape(-1)[:64], tree))(model.params)
  return weights_digest(flatten(few))


def size_of(how: How, model: Any, protocol: str) -> Callable[[int, int], tuple[int, int]]:
  """(width, height) of an image -> the size to work at.

  The longer side is the resolution of `how`, or else of the model. A model without a resolution
  works at the image's own size, within the method's limit.
  """
  networks = getattr(model, 'networks', None)
  factor = networks.vae_config.factor if networks else 1
  longest = None if how.kind == EDITOR else table.METHODS[how.method].longest

  def size_of(width, height):
    own = max(width, height)
    side = how.resolution or (networks.resolution if networks else min(own, longest or own))
    if protocol == 'paper':  # the original squashes every image
      width = height = side
    return working_size(width, height, side, factor)

  return size_of
