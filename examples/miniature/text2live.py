"""One edit by Text2LIVE: a layer that is trained for a single scene of the drawn world.

  python examples/miniature/text2live.py docs/text2live.png

Prints what CLIP and the oracle say before and after, and writes them with the images.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import oracle
import world
from first_look import SCENE
from PIL import Image

from ip2p_jax.evaluation.text2live import Text2Live
from ip2p_jax.evaluation.text2live_settings import Settings, Texts
from ip2p_jax.images import image_grid
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.storage import replacing

CLIP = Path(__file__).parents[2] / 'assets' / 'miniature-clip'
CIRCLE, STAR = SCENE.objects
EDIT = world.Edit('recolour', CIRCLE, CIRCLE._replace(colour='red'), 'red')
TEXTS = Texts(
  'a large yellow circle and a large pink star on a lavender gradient',
  'a large red circle and a large pink star on a lavender gradient',
  'a large red circle',
)
# For 64 pixels and a small CLIP that knows the world's captions alone. `sparsity` was chosen on
# this very scene: with the authors' 6 and a region, the mean opacity outside the circle was 0.16.
SETTINGS = Settings(
  levels=4, width=64, views=8, steps=300, sparsity=40.0,
  templates=('{}', '{}.'), screen_templates=('{} on a green background', '{} on green'),
)  # fmt: skip
SCALE = 3


def numbers(clip: Clip, image: np.ndarray) -> dict[str, float]:
  """What the image is like, beside the scene: by CLIP, and by the pixels that the edit is about."""
  before, shown = world.picture(SCENE), oracle.seen
  found = clip.scores(before[None], image[None], [TEXTS.source], [TEXTS.edited])
  target = shown(oracle.applied(SCENE, EDIT))
  changed = np.abs(target - shown(SCENE)).max(-1) > oracle.CHANGE
  rest = ~oracle.dilated(changed, oracle.REACH)
  return {
    'CLIP, edited caption': float(found.clip_sim_1[0]),
    'CLIP direction': float(found.clip_sim_dir[0]),
    'CLIP image': float(found.clip_sim_image[0]),
    'way to the true image': oracle.way(image / 255, shown(SCENE), target),
    'kept outside, dB': oracle.psnr((image / 255)[rest], shown(SCENE)[rest]),
  }


def main(out: Path, steps: int, seed: int) -> None:
  clip, before = Clip.load(CLIP), world.picture(SCENE)
  method = Text2Live(clip, SETTINGS._replace(steps=steps))
  start = time.perf_counter()

  def report(step, losses):
    if step % 50 == 0 or step == steps - 1:
      parts = '  '.join(f'{name} {float(value):.3f}' for name, value in losses.items())
      print(f'step {step + 1}, {time.perf_counter() - start:.0f} s: {parts}', flush=True)

  edit = method.edit(before, TEXTS, seed, report)
  rows = [numbers(clip, image) for image in (before, edit.image)]
  for name in rows[0]:
    print('{:22} before {:6.3f}   after {:6.3f}'.format(name, *(row[name] for row in rows)))
  grey = np.full_like(edit.layer[..., :3], 0.5)
  opacity = edit.layer[..., 3:]
  layer = opacity * edit.layer[..., :3] + (1 - opacity) * grey
  pixels = lambda x: np.uint8(np.round(255 * np.broadcast_to(x, before.shape)))
  cells = (before, pixels(layer), pixels(opacity), edit.image)
  large = [Image.fromarray(cell).resize((64 * SCALE,) * 2, Image.Resampling.NEAREST)
           for cell in cells]  # fmt: skip
  title = '; '.join(
    '{} {:.2f} to {:.2f}'.format(name, *(row[name] for row in rows))
    for name in ('CLIP, edited caption', 'CLIP direction', 'way to the true image')
  )
  title += f'; kept outside {rows[1]["kept outside, dB"]:.1f} dB'
  sheet = image_grid([large], [''], ['source', 'layer on grey', 'opacity', 'composite'], title)
  out.parent.mkdir(parents=True, exist_ok=True)
  with replacing(out) as unfinished:
    sheet.quantize(128).save(unfinished, 'PNG', optimize=True)
  print(f'wrote {out}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path, nargs='?', default=Path('out/miniature/text2live.png'))
  parser.add_argument('--steps', type=int, default=SETTINGS.steps)
  parser.add_argument('--seed', type=int, default=0)
  main(**vars(parser.parse_args()))
