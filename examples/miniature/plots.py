"""What the scripts show: estimates as text, tables in Markdown, and sheets of edits."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import world
from PIL import Image, ImageDraw, ImageFont

from ip2p_jax.storage import replacing

LIMIT = 150_000  # bytes of a figure


class Estimate(NamedTuple):
  """A mean and its 95% interval; nan where there was nothing to measure."""

  mean: float
  low: float
  high: float


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


def gallery(
  path: Path,
  examples: Sequence[world.Example],
  edits: Sequence[np.ndarray],
  is_done: Sequence[bool],
) -> None:
  """Cells of input, edit and truth, with the instruction below; edits are uint8 [64, 64, 3]."""
  columns, gap, line = 2, 6, 18
  side = 2 * world.SIDE
  width, height = 3 * (side + gap) + 2 * gap, side + line + gap
  sheet = Image.new('RGB', (columns * width, line + -(-len(examples) // columns) * height), 'white')
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
  for i, (one, edit, done) in enumerate(zip(examples, edits, is_done, strict=True)):
    left, top = i % columns * width + gap, line + i // columns * height
    shown = {'input': world.picture(one.scene), 'edit': edit,
             'truth': world.picture(one.edited_scene)}  # fmt: skip
    for j, (name, image) in enumerate(shown.items()):
      x = left + j * (side + gap)
      large = Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.NEAREST)
      sheet.paste(large, (x, top))
      if i < columns:
        draw.text((x + side // 2, line // 2), name, 'black', font, 'mm')
    words = textwrap.shorten(one.instruction, 48, placeholder=' ...')
    words += '' if done else '  (not done)'
    draw.text((left, top + side + 2), words, 'black' if done else 'firebrick', font)
  save_small(sheet, path)


def save_small(image: Image.Image, path: Path) -> None:
  """As PNG with as many colours as fit into LIMIT."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as unfinished:
    for colours in (256, 128, 64, 32, 16, 8, 4):
      few = image.convert('RGB').quantize(colours, dither=Image.Dither.NONE)
      few.save(unfinished, 'PNG', optimize=True)
      if unfinished.stat().st_size <= LIMIT:
        break
