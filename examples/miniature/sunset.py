"""A kind of edit that no model of the miniature was trained on: sunset.

  python examples/miniature/sunset.py out/sunset     (200 pairs and metadata.jsonl)

Everything in the scene becomes warmer and darker (`world.SUNSET`). So the right result is known to
the pixel, and the oracle judges it as any other edit.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import world
from phrases import caption
from PIL import Image

INSTRUCTIONS = (
  'at sunset', 'make it sunset', 'show it at sunset', 'let the sun set', 'turn it into a sunset',
  'the sun goes down',
)  # fmt: skip


def example(seed: int, split: str = 'train') -> world.Example:
  """A scene by day, and the same at sunset. Splits 'train' and 'test' share no scene."""
  scene = world.example(seed, split).scene._replace(is_night=False)
  edited_scene = scene._replace(background='sunset')
  rng = np.random.default_rng(seed)
  return world.Example(
    scene,
    (world.Edit('background', word='sunset'),),
    edited_scene,
    INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))],
    caption(rng, scene),
    f'{caption(rng, scene)} at sunset',
    is_new_phrasing=False,
  )


def write_pairs(folder: Path, count: int) -> None:
  """A folder as users make it: images and metadata.jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for seed in range(count):
    pair = example(seed)
    row = {'input_image': f'{seed:04d}_0.png', 'edited_image': f'{seed:04d}_1.png'}
    for name, scene in zip(row.values(), (pair.scene, pair.edited_scene), strict=True):
      Image.fromarray(world.picture(scene)).save(folder / name)
    rows.append(json.dumps({**row, 'instruction': pair.instruction}))
  (folder / 'metadata.jsonl').write_text('\n'.join(rows) + '\n')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path, help='a folder for the pairs')
  parser.add_argument('--count', type=int, default=200)
  arguments = parser.parse_args()
  write_pairs(arguments.out, arguments.count)
  print(f'wrote {arguments.count} pairs to {arguments.out}')
