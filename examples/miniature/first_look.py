"""The picture at the top of README.md: one drawn scene, and edits of it by the bundled miniature.

python examples/miniature/first_look.py docs/edits.png --scene examples/scene.png
"""

import argparse
from pathlib import Path

import numpy as np
import world
from PIL import Image

from ip2p_jax import Editor, bundled
from ip2p_jax.images import image_grid

SCENE = world.Scene(
  'lavender',
  'gradient',
  False,
  (
    world.Object('circle', 'yellow', 'large', 'top right', 48.0, 16.0),
    world.Object('star', 'pink', 'large', 'bottom left', 16.0, 46.0),
  ),
)
INSTRUCTIONS = (
  'make the circle red', 'it is night now', 'as a sketch', 'make the star disappear',
  'make the background teal', 'make the star a heart',
)  # fmt: skip
SCALE, SEED = 2, 1


def enlarged(image: np.ndarray | Image.Image) -> Image.Image:
  image = Image.fromarray(np.asarray(image))
  return image.resize([SCALE * side for side in image.size], Image.Resampling.NEAREST)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', type=Path)
  parser.add_argument('--scene', type=Path, help='where the scene itself goes')
  given = parser.parse_args()
  scene = world.picture(SCENE)
  edits = Editor.load(str(bundled.path())).edit(
    np.stack([scene] * len(INSTRUCTIONS)),
    list(INSTRUCTIONS),
    steps=bundled.STEPS,
    text_guidance=bundled.TEXT_GUIDANCE,
    image_guidance=bundled.IMAGE_GUIDANCE,
    sampler=bundled.SAMPLER,
    seed=SEED,
  )
  labels = ['input', *INSTRUCTIONS]
  image_grid([[enlarged(image) for image in (scene, *edits)]], [''], labels).save(given.out)
  if given.scene:
    Image.fromarray(scene).save(given.scene)


if __name__ == '__main__':
  main()
