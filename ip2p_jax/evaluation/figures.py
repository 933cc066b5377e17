"""The paper's figures 8 and 10: which evaluations they are made of, and what these cost.

A figure is a list of points. Points of one curve differ in one number, which is their label.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.edits import ByEditor, ByMethod, How
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import networks_of
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


def figure_8(editor: ByEditor, sdedit: ByMethod) -> list[FigurePoint]:
  """The editor over its image scale, beside SDEdit over its strength (section 4 of the paper).

  SDEdit has two curves, with the edited caption and with the instruction; `sdedit.method` does not
  matter.
  """
  points = by_image_scale(short_names([editor.ckpt])[0], editor)
  for method in SDEDITS:
    points += [
      FigurePoint(
        method, f'{strength:g}',
        sdedit._replace(method=method, set=sdedit.set | {'strength': strength}),
      )
      for strength in STRENGTHS
    ]  # fmt: skip
  return points


def figure_10(ckpts: Sequence[str], editor: ByEditor) -> list[FigurePoint]:
  """One curve over the image scale for each checkpoint; `editor.ckpt` does not matter.

  The paper has training sets of three sizes, and one that CLIP did not filter.
  """
  points = []
  for name, ckpt in zip(short_names(ckpts), ckpts, strict=True):
    points += by_image_scale(name, editor._replace(ckpt=ckpt))
  return points


def by_image_scale(curve: str, editor: ByEditor) -> list[FigurePoint]:
  scales = [editor._replace(cfg_image=scale) for scale in IMAGE_SCALES]
  return [FigurePoint(curve, f'{how.cfg_image:g}', how) for how in scales]


def short_names(paths: Sequence[str]) -> list[str]:
  """Paths without the folders that they begin and end with alike: 'a/200/run' is '200'.

  InputError if two paths are the same.
  """
  if len({Path(path).absolute() for path in paths}) < len(paths):
    raise InputError('--ckpt: the same checkpoint is given twice; leave one out.')
  parts = [Path(path).absolute().parts for path in paths]
  if len(parts) == 1:
    return [parts[0][-1]]
  first = _alike(parts)
  last = _alike([part[first:][::-1] for part in parts])
  return ['-'.join(part[first : len(part) - last]) or part[first - 1] for part in parts]


def _alike(parts):
  """How many first items all sequences have in common."""
  return sum(1 for _ in itertools.takewhile(lambda x: len(set(x)) == 1, zip(*parts, strict=False)))


def costs(points: Sequence[FigurePoint], rows: int) -> list[Cost]:
  """The cost of each curve, for square images of the working size; wider ones cost less."""
  of_curve = {}
  for point in points:
    of_curve.setdefault(point.curve, []).append(point.how)
  result = []
  for curve, hows in of_curve.items():
    networks = networks_of(workdir.load(hows[0].checkpoint))
    side = (hows[0].resolution or networks.resolution) // networks.vae_config.factor
    calls = rows * sum(how.network_calls() for how in hows)
    result.append(Cost(curve, len(hows), calls, calls * flops.unet_flops(networks, (side, side))))
  return result
