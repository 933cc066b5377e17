"""Measures one setting on held-out examples, and keeps what was measured.

B pictures of one call, N examples of a point. A point is one line of `OUT/points.jsonl`: the
setting, what it was measured of (a fingerprint of weights, world and oracle), and a list of N
values for each of `done` (0 or 1), `kept` (dB, None where nothing is outside the change),
`direction` and `consistency`.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import world
from plots import Estimate
from tqdm import tqdm

from ip2p_jax import Editor
from ip2p_jax.evaluation import sdedit
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.pipeline.text_to_image import TextToImage

HERE = Path(__file__).parent
MEASURES = ('done', 'kept', 'direction', 'consistency')
Z = 1.959964  # of the normal distribution, for intervals of 95%


class Setting(NamedTuple):
  """How pictures are edited.

  Attributes:
    method: 'editor'; 'averaged' or 'raw', the weights of a training run; 'sdedit', the base.
    strength: of SDEdit.
    guided_from, guided_to: the part of the steps to guide in, 0 to 1.
  """

  method: str
  steps: int
  text_guidance: float
  image_guidance: float
  sampler: str = 'euler_ancestral'
  strength: float = 0.0
  seed: int = 0
  guided_from: float = 0.0
  guided_to: float = 1.0
  karras: bool = False


class Bench:
  """Held-out examples `first` to `first + count`, and what edits them, loaded when asked for."""

  def __init__(self, paths: dict[str, Path], out: Path, count: int, batch: int, first: int = 0):
    """`paths` has 'editor', 'base', 'clip' and 'run' (a workdir)."""
    self.paths, self.out, self.batch, self.first = paths, out, batch, first
    self.examples = [world.example(seed, 'test') for seed in range(first, first + count)]
    self.scenes = np.stack([world.picture(one.scene) for one in self.examples])

  def measure(self, setting: Setting, count: int) -> dict:
    """The point of the first `count` examples, from the file if it holds as many."""
    known = setting._asdict() | {'of': self._fingerprint(setting.method), 'first': self.first}
    for point in self._points():
      told = Setting._field_defaults | point  # an older point lacks what came later
      if all(told[name] == value for name, value in known.items()) and len(point['done']) >= count:
        return point | {name: point[name][:count] for name in MEASURES}
    values = {name: [] for name in MEASURES}
    label = ' '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in setting)
    with tqdm(total=count, desc=label, leave=False) as bar:
      for start in range(0, count, self.batch):
        rows = range(start, min(start + self.batch, count))
        for name, found in self._measured(rows, self.edit(setting, rows)).items():
          values[name] += found
        bar.update(len(rows))
    point = known | values
    self.out.mkdir(parents=True, exist_ok=True)
    with (self.out / 'points.jsonl').open('a') as file:
      file.write(json.dumps(point) + '\n')
    return point

  def summary(self, setting: Setting, count: int, seeds: int = 1) -> dict[str, Estimate]:
    return summary([self.measure(setting._replace(seed=seed), count) for seed in range(seeds)])

  def edit(self, setting: Setting, rows: Sequence[int], **scales: Sequence[float]) -> np.ndarray:
    """uint8 [B, 64, 64, 3] of the examples `rows`; `scales` may give each a scale of its own."""
    rows, scenes = list(rows), self.scenes[list(rows)]
    examples = [self.examples[row] for row in rows]
    if setting.method == 'sdedit':
      return sdedit.edit(
        self._base, scenes, [one.edited_caption for one in examples], strength=setting.strength,
        text_guidance=setting.text_guidance, steps=setting.steps, seed=setting.seed, indices=rows,
      )  # fmt: skip
    scales = {'text_guidance': setting.text_guidance, 'image_guidance': setting.image_guidance} | {
      name: list(of) for name, of in scales.items()
    }
    return self._editor(setting.method).edit(
      scenes, [one.instruction for one in examples], steps=setting.steps, sampler=setting.sampler,
      seed=setting.seed, indices=rows, interval=(setting.guided_from, setting.guided_to),
      karras=setting.karras, **scales,
    )  # fmt: skip

  @functools.cached_property
  def clip(self) -> Clip:
    return Clip.load(self.paths['clip'])

  @functools.cached_property
  def _base(self):
    return TextToImage.load(self.paths['base'], 'float32')

  @functools.cache  # noqa: B019  one bench lives as long as the program
  def _editor(self, method):
    if method == 'editor':
      return Editor.load(self.paths['editor'], dtype='float32')
    run = workdir.read(self.paths['run'], ema=method == 'averaged')
    return Editor.from_checkpoint(run, dtype='float32')

  def _measured(self, rows, edits):
    examples = [self.examples[row] for row in rows]
    judged = [oracle.judge(*pair) for pair in zip(examples, edits, strict=True)]
    captions = [[getattr(one, name) for one in examples] for name in ('caption', 'edited_caption')]
    scores = self.clip.scores(self.scenes[list(rows)], edits, *captions)
    return {
      'done': [int(verdict.is_done) for verdict in judged],
      'kept': [None if math.isnan(v.kept) else round(v.kept, 3) for v in judged],
      'direction': np.round(scores.clip_sim_dir, 5).tolist(),
      'consistency': np.round(scores.clip_sim_image, 5).tolist(),
    }

  @functools.cache  # noqa: B019
  def _fingerprint(self, method):
    """Of the weights, the world and the oracle."""
    kind = {'sdedit': 'base', 'editor': 'editor'}.get(method, 'run')
    files = [HERE / name for name in ('world.py', 'phrases.py', 'oracle.py')]
    for path in (self.paths[kind], self.paths['clip']):
      files += sorted(file for file in path.rglob('*') if file.is_file() and _is_weights(file))
    content = hashlib.sha256()
    for file in files:
      content.update(file.read_bytes())
    return content.hexdigest()[:16]

  def _points(self):
    file = self.out / 'points.jsonl'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _is_weights(file):
  return file.suffix == '.safetensors' or 'checkpoints' in file.parts


def verdicts(point: dict) -> list[oracle.Verdict]:
  """What the oracle said of each example of a point, without its reasons."""
  return [
    oracle.Verdict(bool(done), math.nan if kept is None else kept, ())
    for done, kept in zip(point['done'], point['kept'], strict=True)
  ]


def summary(points: Sequence[dict]) -> dict[str, Estimate]:
  """Means and their 95% intervals over the examples of points that differ in the seed only.

  The seeds of an example are averaged first: they say nothing about other examples.
  """
  found = {}
  for name in MEASURES:
    values = np.array([point[name] for point in points], float).mean(0)  # None becomes nan
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else math.nan
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    found[name] = Estimate(mean, mean - half, mean + half)
    if name == 'done':
      found[name] = Estimate(mean, *oracle.wilson(mean, len(values)))
  return found


def oracle_summary(judged: Sequence[oracle.Verdict]) -> dict[str, Estimate]:
  """'done' and 'kept' of verdicts."""
  found = oracle.summary(judged)
  return {name: Estimate(found[name], *found[f'{name}_interval']) for name in ('done', 'kept')}
