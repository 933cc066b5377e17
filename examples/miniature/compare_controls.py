"""What attention control does to pairs: preservation, success and yield, where the truth is known.

  python examples/miniature/compare_controls.py

Draws a pair for each of 200 pairs of captions, with the same noise under each control, and measures
it against the scenes that the captions describe:

- kept: PSNR between both pictures outside of what the edit changes, in dB;
- changed: how far the second picture went from the scene before to the scene after, 0 to 1;
- drawn: pairs whose second picture the oracle takes for the edited scene;
- yield: pairs that pass the paper's thresholds on CLIP's numbers.

Writes OUT/controls.json and OUT/controls.png.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import oracle
import world
from phrases import ARTICLE
from PIL import Image

from ip2p_jax import images
from ip2p_jax.pairs import filter
from ip2p_jax.pairs.generate import PairGenerator, PairSettings
from ip2p_jax.pairs.pair_files import passes, round_scores
from ip2p_jax.pairs.prompts import Prompt
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of
from ip2p_jax.pipeline.scores import Scores

ASSETS = Path(__file__).parent.parent.parent / 'assets'
CONTROLS = ('none', 'share', 'auto', 'share+auto')
KINDS = ('recolour', 'reshape', 'background', 'night', 'add')  # what a caption can say


def full_caption(scene: world.Scene) -> str:
  """A caption that leaves nothing out, so that there is one right picture."""
  a = lambda words: f'{ARTICLE.get(words.split()[0], "a")} {words}'
  where = {'middle': 'in the middle'}
  things = [
    f'{a(f"{t.size} {t.colour}")} {t.shape} {where.get(t.place, f"at the {t.place}")}'
    for t in scene.objects
  ]
  text = ' and '.join([', '.join(things[:-1])] * (len(things) > 1) + things[-1:])
  ground = {'plain': ' background', 'gradient': ' gradient', 'striped': ' striped background'}
  text += f' on {a(scene.background)}{ground[scene.pattern]}'
  return text + ' at night' * scene.is_night


def examples(count: int) -> list[world.Example]:
  """Held-out examples of one edit that captions can tell."""
  found, seed = [], 0
  while len(found) < count:
    one = world.example(seed, 'test')
    if len(one.edits) == 1 and one.edits[0].kind in KINDS:
      found.append(one)
    seed += 1
  return found


def measure(
  generator: PairGenerator, some: list[world.Example], prompts: list[Prompt], sample: int = 0
):
  """(pictures uint8 [2, N, 64, 64, 3], a dict of lists of N: what is measured, and CLIP's scores).

  `sample` is which one of each prompt is drawn.
  """
  drawing, pictures, scores = generator.drawing, [], []
  for start in range(0, len(prompts), drawing.batch_size):
    part = prompts[start : start + drawing.batch_size]
    samples = [drawing.sample(prompt.index, sample) for prompt in part]
    drawn, found, _ = generator.draw(part, samples)
    pictures.append(np.asarray(drawn)[:, : len(part)])
    rows = zip(*(np.asarray(x)[: len(part)].tolist() for x in found), strict=True)
    scores += [round_scores(Scores(*row)) for row in rows]
  pictures = np.concatenate(pictures, 1)
  values = {'kept': [], 'changed': [], 'drawn': [], 'yield': []}
  for i, one in enumerate(some):
    before, after = oracle.seen(one.scene), oracle.seen(one.edited_scene)
    changed = oracle.dilated(np.abs(after - before).max(-1) > oracle.CHANGE, oracle.REACH)
    first, second = pictures[:, i] / 255
    rest = ~changed
    is_enough = rest.mean() >= oracle.LEAST_REST
    values['kept'].append(oracle.psnr(second[rest], first[rest]) if is_enough else None)
    values['changed'].append(min(1.0, max(0.0, oracle.way(second, before, after))))
    values['drawn'].append(int(oracle.judge(one, pictures[1, i]).is_done))
    values['yield'].append(int(passes(scores[i], filter.PAPER)))
  columns = zip(*scores, strict=True)
  return pictures, values | dict(zip(Scores._fields, map(list, columns), strict=True))


def mean(values: list) -> str:
  values = np.array([value for value in values if value is not None], float)
  half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
  return f'{values.mean():.2f} ± {half:.2f}'


def main(base: Path, clip: Path, out: Path, count: int, steps: int, guidance: float) -> None:
  some = examples(count)
  prompts = [
    Prompt(i, '', full_caption(one.scene), full_caption(one.edited_scene))
    for i, one in enumerate(some)
  ]
  checkpoint = workdir.load(base)
  networks = networks_of(checkpoint)
  parts = networks, params_of(checkpoint, networks, 'float32'), tokenizer_of(checkpoint, networks)
  towers, found, shown = Clip.load(clip), {}, []
  for control in CONTROLS:
    drawing = PairSettings(
      samples=1, steps=steps, control=control, guidance=(guidance, guidance), size=world.SIDE,
      batch_size=25 * jax.local_device_count(),
    )  # fmt: skip
    pictures, found[control] = measure(PairGenerator(*parts, towers, drawing), some, prompts)
    if not shown:
      shown.append(pictures[0, :8])
    shown.append(pictures[1, :8])
    shown_of = ('kept', 'changed', 'drawn', 'yield')
    row = '  '.join(f'{name} {mean(found[control][name])}' for name in shown_of)
    print(f'{control}: {row}', flush=True)
  out.mkdir(parents=True, exist_ok=True)
  (out / 'controls.json').write_text(json.dumps(found) + '\n')
  shown.append(np.stack([world.picture(one.edited_scene) for one in some[:8]]))
  large = lambda picture: Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST)
  rows = [[large(column[i]) for column in shown] for i in range(len(shown[0]))]
  labels = [f'{one.edits[0].kind} {one.edits[0].word}' for one in some[: len(rows)]]
  sheet = images.image_grid(rows, labels, ['first', *CONTROLS, 'meant'])
  sheet.save(out / 'controls.png')
  print(f'wrote {out / "controls.json"} and {out / "controls.png"}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--base', type=Path, default=ASSETS / 'miniature-base')
  parser.add_argument('--clip', type=Path, default=ASSETS / 'miniature-clip')
  parser.add_argument('--out', type=Path, default=Path('out/miniature/controls'))
  parser.add_argument('--count', type=int, default=200)
  parser.add_argument('--steps', type=int, default=50)
  parser.add_argument('--guidance', type=float, default=3.0)
  arguments = parser.parse_args()
  main(**vars(arguments))
