"""Makes pairs for training out of photos, by edits that need no model, to try the tools with.

  python examples/pairs_from_photos.py assets/photos out/my-pairs --count 20

Writes pictures and a metadata.jsonl, the layout to use for pairs of your own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ip2p_jax import images

SIDE = 256  # of the crops; their long side is half as long again
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
  'make it black and white': lambda image: ImageOps.grayscale(image).convert('RGB'),
  'make it a photographic negative': ImageOps.invert,
  'blur it': lambda image: image.filter(ImageFilter.GaussianBlur(4)),
  'make it a sepia print': lambda image: ImageOps.colorize(
    ImageOps.grayscale(image), '#2b1d0e', '#f3e3c3'
  ),
  'make the colors stronger': lambda image: ImageEnhance.Color(image).enhance(2.5),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('photos', type=Path, help='a folder of pictures')
  parser.add_argument('out', type=Path, help='a new folder')
  parser.add_argument('--count', type=int, default=20)
  args = parser.parse_args()
  photos = [images.shown(images.read(path)) for path in images.find_images(args.photos)]
  args.out.mkdir(parents=True)
  rng, lines = np.random.default_rng(0), []
  for i in range(args.count):
    photo, (instruction, edit) = photos[i % len(photos)], list(EDITS.items())[i % len(EDITS)]
    width, height = min(3 * SIDE // 2, photo.width), min(SIDE, photo.height)
    left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
    before = photo.crop((left, top, left + width, top + height))
    row = {'input_image': f'{i:03d}_before.jpg', 'edited_image': f'{i:03d}_after.jpg'}
    before.save(args.out / row['input_image'], quality=95)
    edit(before).save(args.out / row['edited_image'], quality=95)
    lines.append(json.dumps(row | {'instruction': instruction}) + '\n')
  (args.out / 'metadata.jsonl').write_text(''.join(lines))
  print(f'wrote {args.count} pairs to {args.out}')


if __name__ == '__main__':
  main()
