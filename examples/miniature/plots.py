"""What the evaluation shows: estimates as text, Markdown tables, curves and sheets of pictures."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ip2p_jax import images
from ip2p_jax.storage import replacing

matplotlib.use('Agg')
from matplotlib import pyplot

LIMIT = 150_000  # bytes of a figure
COLOURS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e')
LABELS = {
  'done': 'instructed change done, %',
  'kept': 'PSNR outside the change, dB',
  'direction': 'CLIP text-image direction similarity',
  'consistency': 'CLIP image-image similarity',
}


class Estimate(NamedTuple):
  """A mean and its 95% interval; nan where there was nothing to measure."""

  mean: float
  low: float
  high: float


Summary = Mapping[str, Estimate]  # by the keys of LABELS; 'done' is a share
Curve = Sequence[tuple[float, Summary]]  # (the setting that varies, what it gave)


# Text.


def text(name: str, estimate: Estimate) -> str:
  """An estimate as tables show it, '87% (84-90)'."""
  if np.isnan(estimate.mean):
    return '-'
  if name == 'done':
    return '{:.0f}% ({:.0f}-{:.0f})'.format(*(100 * value for value in estimate))
  if name == 'kept':
    return '{:.1f} dB ({:.1f}-{:.1f})'.format(*estimate)
  return '{:.3f} ({:.3f}-{:.3f})'.format(*estimate)


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
  """In Markdown."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines) + '\n'


def summary_table(what: str, rows: Sequence[tuple], names: Sequence[str] = tuple(LABELS)) -> str:
  """One row per (setting, Summary), one column per measure."""
  short = {
    'done': 'done',
    'kept': 'kept',
    'direction': 'CLIP direction',
    'consistency': 'CLIP image',
  }
  shown = [[setting, *(text(name, found[name]) for name in names)] for setting, found in rows]
  return table([what, *(short[name] for name in names)], shown)


# Curves.


def scales(path: Path, panels: Sequence[tuple[str, Curve, float]]) -> None:
  """'done' and 'kept' against a scale; a panel is (axis label, curve, the default)."""
  figure, all_axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.6))
  for axes, (label, curve, default) in zip(np.atleast_1d(all_axes), panels, strict=True):
    x = [setting for setting, _ in curve]
    right = axes.twinx()
    for name, side, colour in (('done', axes, COLOURS[0]), ('kept', right, COLOURS[1])):
      _band(side, x, name, [found for _, found in curve], colour)
      side.set_ylabel(LABELS[name], color=colour)
    axes.axvline(default, color='0.8', linestyle='--', zorder=0)
    axes.set_xlabel(f'{label} (dashed: default)')
    axes.set_ylim(0, 100)
  _save(figure, path)


def trade_off(path: Path, curves: Mapping[str, Curve]) -> None:
  """The paper's figure 8 by CLIP, and beside it the same by the oracle: up and right is better."""
  figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2))
  for axes, names in zip(panels, (('direction', 'consistency'), ('done', 'kept')), strict=True):
    for (label, curve), colour in zip(curves.items(), COLOURS, strict=False):
      points = [[_shown(name, found[name]) for name in names] for _, found in curve]
      (x, x_low, x_high), (y, y_low, y_high) = np.array(points).transpose(1, 2, 0)
      axes.errorbar(
        x, y, (y - y_low, y_high - y), (x - x_low, x_high - x),
        fmt='.-', color=colour, ecolor=(*matplotlib.colors.to_rgb(colour), 0.25), label=label,
      )  # fmt: skip
      for (setting, _), *place in zip(curve, x, y, strict=True):
        axes.annotate(
          f'{setting:g}', place, xytext=(4, 4), textcoords='offset points', fontsize=7, color=colour
        )
    axes.set_xlabel(LABELS[names[0]])
    axes.set_ylabel(LABELS[names[1]])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  _save(figure, path)


def by_steps(path: Path, curves: Mapping[str, Curve]) -> None:
  """'done' and 'kept' against the number of steps, a line per sampler."""
  figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8))
  for axes, name in zip(panels, ('done', 'kept'), strict=True):
    for (label, curve), colour in zip(curves.items(), COLOURS, strict=False):
      x = [steps for steps, _ in curve]
      _band(axes, x, name, [found for _, found in curve], colour, label)
    axes.set_xlabel('steps')
    axes.set_ylabel(LABELS[name])
    axes.grid(alpha=0.3)
  panels[0].legend(fontsize=8)
  _save(figure, path)


def _band(axes, x, name, found, colour, label=None):
  mean, low, high = np.array([_shown(name, summary[name]) for summary in found]).T
  axes.plot(x, mean, '.-', color=colour, label=label)
  axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _shown(name, estimate):
  return np.array(estimate) * (100 if name == 'done' else 1)


def _save(figure, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.tight_layout()
  with replacing(path) as unfinished:
    figure.savefig(unfinished, dpi=90, format='png')
  pyplot.close(figure)


# Pictures.


def scale_grid(
  path: Path,
  edits: np.ndarray,
  is_done: np.ndarray,
  scales: tuple[Sequence[float], Sequence[float]],
  title: str,
) -> None:
  """Edits uint8 [T, I, H, W, 3] by text scale (down) and image scale (across), done ones framed."""
  rows = [
    [_framed(edit, 'green' if done else 'lightgrey') for edit, done in zip(*row, strict=True)]
    for row in zip(edits, is_done, strict=True)
  ]
  downs, across = (
    [f'{name} {s:g}' for s in of] for name, of in zip(('text', 'image'), scales, strict=True)
  )
  _save_picture(images.image_grid(rows, downs, across, title), path)


def gallery(path: Path, rows: Sequence[tuple[np.ndarray, str, np.ndarray, bool, np.ndarray]]):
  """Cells of input, edit and truth, with the instruction below.

  Rows are (input, instruction, edit, whether it is done, truth), pictures uint8 [H, W, 3].
  """
  columns, gap, line = 2, 6, 18
  side = 2 * rows[0][0].shape[0]
  width, height = 3 * (side + gap) + 2 * gap, side + line + gap
  sheet = Image.new('RGB', (columns * width, line + -(-len(rows) // columns) * height), 'white')
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
  for i, (before, instruction, edit, done, truth) in enumerate(rows):
    left, top = i % columns * width + gap, line + i // columns * height
    for j, (name, picture) in enumerate((('input', before), ('edit', edit), ('truth', truth))):
      x = left + j * (side + gap)
      sheet.paste(_enlarged(picture), (x, top))
      if i < columns:
        draw.text((x + side // 2, line // 2), name, 'black', font, 'mm')
    words = textwrap.shorten(instruction, 48, placeholder=' ...') + ('' if done else '  (not done)')
    draw.text((left, top + side + 2), words, 'black' if done else 'firebrick', font)
  _save_picture(sheet, path)


def _enlarged(picture):
  image = Image.fromarray(picture)
  return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def _framed(picture, colour):
  image = _enlarged(picture)
  framed = Image.new('RGB', (image.width + 6, image.height + 6), colour)
  framed.paste(image, (3, 3))
  return framed


def _save_picture(sheet, path):
  """As PNG with as many colours as fit into LIMIT."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as unfinished:
    for colours in (256, 128, 64, 32, 16, 8, 4):
      few = sheet.quantize(colours, dither=Image.Dither.NONE)
      few.save(unfinished, 'PNG', optimize=True)
      if unfinished.stat().st_size <= LIMIT:
        break
