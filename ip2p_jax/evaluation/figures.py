"""The paper's figures 8 and 10: which evaluations they are made of, and what these cost.

A figure is a list of points. Points of one curve differ in one number, which is their label.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.edits import EDITOR, ByEditor, ByMethod, How
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import check_is_editor, check_is_text_to_image, networks_of
from ip2p_jax.training import flops

IMAGE_SCALES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SDEDITS = ('sdedit-caption', 'sdedit-instruction')
FIGURES = (8, 10)


class FigurePoint(NamedTuple):
  """One evaluation of a figure. `curve` and `label` name its folder: OUT/CURVE/LABEL."""

  curve: str
  label: str
  how: How


class Cost(NamedTuple):
  """What a curve costs at most: UNet predictions, and floating point operations in them."""

  curve: str
  points: int
  calls: float
  flops: float


def figure_8(name: str, editor: ByEditor, sdedit: ByMethod) -> list[FigurePoint]:
  """The editor over its image scale, beside SDEdit over its strength (section 4 of the paper).

  `name` is the editor's curve. SDEdit has two, with the edited caption and with the instruction;
  `sdedit.method` does not matter.
  """
  points = by_image_scale(name, editor)
  for method in SDEDITS:
    points += [
      FigurePoint(
        method, f'{strength:g}',
        sdedit._replace(method=method, set=sdedit.set | {'strength': strength}),
      )
      for strength in STRENGTHS
    ]  # fmt: skip
  return points


def figure_10(ckpts: Mapping[str, str], editor: ByEditor) -> list[FigurePoint]:
  """One curve over the image scale for each checkpoint, by name; `editor.ckpt` does not matter.

  The paper has training sets of three sizes, and one that CLIP did not filter.
  """
  points = []
  for name, ckpt in ckpts.items():
    points += by_image_scale(name, editor._replace(ckpt=ckpt))
  return points


def by_image_scale(curve: str, editor: ByEditor) -> list[FigurePoint]:
  scales = [editor._replace(cfg_image=scale) for scale in IMAGE_SCALES]
  return [FigurePoint(curve, f'{how.cfg_image:g}', how) for how in scales]


def named(ckpts: Sequence[str]) -> dict[str, str]:
  """Checkpoints by the names of their curves: 'NAME=PATH', or PATH, whose last part is the name.

  InputError if two have one name.
  """
  result = {}
  for text in ckpts:
    name, is_given, path = text.partition('=')
    if not is_given or '/' in name or os.path.exists(text):
      name, path = os.path.basename(text.rstrip('/')), text
    if name in result:
      raise InputError(f'--ckpt: two curves are called {name!r}; write NAME=PATH.')
    result[name] = path
  return result


def costs(points: Sequence[FigurePoint], rows: int) -> list[Cost]:
  """The cost of each curve, for square images of the working size; wider ones cost less.

  InputError for a checkpoint of the wrong kind.
  """
  of_curve = {}
  for point in points:
    of_curve.setdefault(point.curve, []).append(point.how)
  result = []
  for curve, hows in of_curve.items():
    checkpoint = workdir.load(hows[0].checkpoint)
    networks = networks_of(checkpoint)
    check = check_is_editor if hows[0].kind == EDITOR else check_is_text_to_image
    check(networks, checkpoint.source)
    side = (hows[0].resolution or networks.resolution) // networks.vae_config.factor
    calls = rows * sum(how.network_calls() for how in hows)
    result.append(Cost(curve, len(hows), calls, calls * flops.unet_flops(networks, (side, side))))
  return result
