"""Judges an edited picture of the drawn world against the one right answer, to the pixel.

`judge` answers two questions apart. Is the instructed change done? And how well was the rest kept?
Done means that the picture reads as the edited scene; all of this must hold:

- It went over half of the way: from the scene as it was, and, of an edit in two steps, from what
  either step alone would give, the picture has come at least 60% of the way to the target. This is
  a projection over the pixels in which the two differ, so half an edit and half a picture fail.
- No other word fits better: of background, pattern, time of day, style, or an object's shape,
  colour and size, none can be replaced to give a scene that is nearer than the target, as far as
  the two can be told apart.
- Objects have their mean colour; those that the change touches have their shape: in a window
  around one, the pixels nearer to its colour than to what is behind it must be its mask (IoU).
  Pixels in which the two differ by less than CONTRAST count neither way, and an object most of
  which is such (a grey one on the same grey) is judged without its shape.
- Of a removed object nothing is left.
- The background has its mean colour, nowhere something that does not belong there, and where it
  was to change, hardly a place that did not.
- Of an outline drawing, dark lines and white paper are where they should be instead.
- The changed pixels are like the target's, so that noise never passes.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import world
from world import Edit, Example, Object, Scene

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.scorers import Batch, Scorer
from ip2p_jax.evaluation.scores import Description

CHANGE = 8 / 255  # of a colour value: more is a changed pixel
REACH = 2  # pixels around the changed ones that do not count as the rest
LEAST_REST = 0.05  # of the picture: with less outside the change, `kept` means nothing
BEST_KEPT = 60.0  # dB, of a rest that is equal
PROGRESS = 0.6  # of the way from a picture without the edit, or half of it, to the target
VISIBLE = 0.05  # distance of colours (Euclidean, 0..1): scenes nearer than this look alike
COLOUR = 0.15  # distance of mean colours that still counts as the same colour
STRAY = 0.2  # the same of a pixel of background that may belong to something else
MOST_STRAY = 32  # pixels; the smallest object covers 64
CONTRAST = 0.15  # distance of colours that tells an object from what is behind it
SHAPE_IOU = 0.75
LINE_IOU = 0.5
LEFTOVER = 0.1  # share of a removed object, or of a background to change, that may look the same
CHANGED_PSNR = 15.0  # dB
TILE = 8  # pixels
_Z = 1.959964  # of the normal distribution, for intervals of 95%


class Verdict(NamedTuple):
  """`kept` is PSNR outside the change in dB, nan if there is no such; `reasons` why not done."""

  is_done: bool
  kept: float
  reasons: tuple[str, ...]


def judge(example: Example, edited: np.ndarray) -> Verdict:
  """Compares an edited picture, uint8 [64, 64, 3], to the exact target."""
  edited = np.asarray(edited)
  if edited.shape != (world.SIDE, world.SIDE, 3) or edited.dtype != np.uint8:
    raise InputError(
      f'the edited picture is {edited.dtype} {list(edited.shape)}; the oracle judges uint8 '
      f'[{world.SIDE}, {world.SIDE}, 3]'
    )
  shown, before, target = edited / 255, seen(example.scene), seen(example.edited_scene)
  changed = np.abs(target - before).max(-1) > CHANGE
  region = dilated(changed, REACH)
  reasons = [
    *_progress(example, shown, target),
    *_other_words(example, shown, target),
    *_things(example, shown, target, changed),
    *_leftovers(example, shown, target),
    *_background(example, shown, before, target),
  ]
  if psnr(shown[region], target[region]) < CHANGED_PSNR:
    reasons.append('the changed part is far from the truth')
  rest = ~region
  kept = psnr(shown[rest], before[rest]) if rest.mean() >= LEAST_REST else math.nan
  return Verdict(not reasons, kept, tuple(reasons))


def scorer() -> Scorer:
  """`done` (0 or 1) and `kept` for `ip2p evaluate --scorer`; a row's id is its example's seed."""
  files = [Path(__file__).with_name(name) for name in ('world.py', 'oracle.py')]
  digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
  description = Description('oracle', digests, 'size as given', 'none')

  def score(batch: Batch) -> dict[str, np.ndarray]:
    if batch.ids is None:
      return {}
    examples = [world.example(int(id), 'test') for id in batch.ids]
    verdicts = [judge(*pair) for pair in zip(examples, batch.edits, strict=True)]
    return {
      'done': np.array([verdict.is_done for verdict in verdicts], np.float32),
      'kept': np.array([verdict.kept for verdict in verdicts], np.float32),
    }

  return Scorer(description, score)


def summary(verdicts: Sequence[Verdict]) -> dict[str, float | int | tuple[float, float]]:
  """Share done (Wilson's interval), and mean dB kept of those that have one (normal interval)."""
  count = len(verdicts)
  done = sum(verdict.is_done for verdict in verdicts) / count if count else math.nan
  kept = np.array([verdict.kept for verdict in verdicts if not math.isnan(verdict.kept)])
  mean = float(kept.mean()) if len(kept) else math.nan
  half = _Z * float(kept.std(ddof=1)) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
  return {
    'done': done,
    'done_interval': wilson(done, count),
    'kept': mean,
    'kept_interval': (mean - half, mean + half),
    'count': count,
  }


def wilson(share: float, count: int) -> tuple[float, float]:
  """The 95% interval of a share of `count` (Wilson 1927)."""
  if not count:
    return math.nan, math.nan
  z = _Z**2 / count
  middle = (share + z / 2) / (1 + z)
  half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
  return max(0.0, middle - half), min(1.0, middle + half)


# Scenes.


def applied(scene: Scene, edit: Edit) -> Scene:
  """The scene after one edit."""
  if edit.kind == 'background':
    return scene._replace(background=edit.word)
  if edit.kind == 'night':
    return scene._replace(is_night=edit.word == 'night')
  if edit.kind == 'style':
    return scene._replace(style=edit.word)
  if edit.before is None:
    return scene._replace(objects=(*scene.objects, edit.after))
  after = () if edit.after is None else (edit.after,)
  things = [after if thing == edit.before else (thing,) for thing in scene.objects]
  return scene._replace(objects=sum(things, ()))


def with_another_word(scene: Scene) -> Iterator[tuple[str, Scene]]:
  """What it is like, and the scene; in greyscale colours are no words."""
  if scene.style != 'greyscale':
    for name in world.BACKGROUNDS:
      yield f'a {name} background', scene._replace(background=name)
    yield ('day' if scene.is_night else 'night'), scene._replace(is_night=not scene.is_night)
  for style in world.STYLES:
    yield f'{style} style', scene._replace(style=style)
  for pattern in world.PATTERNS:
    yield f'a {pattern} background', scene._replace(pattern=pattern)
  fields = {'shape': world.SHAPES, 'colour': world.COLOURS, 'size': world.SIZES}
  for i, thing in enumerate(scene.objects):
    for field, words in fields.items():
      if scene.style == 'greyscale' and field == 'colour':
        continue
      for word in words:
        other = thing._replace(**{field: word})
        things = (*scene.objects[:i], other, *scene.objects[i + 1 :])
        yield _named(other), scene._replace(objects=things)


@functools.lru_cache(maxsize=128)  # an example's, for many pictures of it
def seen(scene: Scene) -> np.ndarray:
  """float64 [64, 64, 3] in 0..1, rounded as files are."""
  return world.picture(scene) / 255


def _named(thing):
  return f'the {thing.size} {thing.colour} {thing.shape}'


# Pixels: masks are bool [64, 64].


def psnr(shown: np.ndarray, truth: np.ndarray) -> float:
  """Of colour values in 0..1, in dB, at most BEST_KEPT."""
  error = float(((shown - truth) ** 2).mean())
  return min(BEST_KEPT, -10 * math.log10(error)) if error else BEST_KEPT


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Euclidean distance of colours [..., 3]."""
  return np.sqrt(((a - b) ** 2).sum(-1))


def iou(a: np.ndarray, b: np.ndarray) -> float:
  either = (a | b).sum()
  return float((a & b).sum() / either) if either else 1.0


def dilated(mask: np.ndarray, reach: int) -> np.ndarray:
  """Every pixel at most `reach` rows and columns from one of the mask."""
  for axis in (0, 1):
    padded = np.pad(mask, [(reach, reach) if i == axis else (0, 0) for i in (0, 1)])
    mask = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis).any(-1)
  return mask


def core(mask: np.ndarray) -> np.ndarray:
  """The mask without its outermost pixels, unless nothing else is left."""
  inside = ~dilated(~mask, 1)
  return inside if inside.any() else mask


def way(shown: np.ndarray, start: np.ndarray, target: np.ndarray) -> float:
  """How far `shown` has come from `start` (0) to `target` (1)."""
  step = target - start
  return float(((shown - start) * step).sum() / (step**2).sum())


# What can be wrong.


def _progress(example, shown, target):
  if way(shown, seen(example.scene), target) < PROGRESS:
    yield 'the picture is too much as it was'
  if len(example.edits) == 2:
    for done, missing in (example.edits, example.edits[::-1]):
      if way(shown, seen(applied(example.scene, done)), target) < PROGRESS:
        yield f'the step {missing.kind} is missing'


def _other_words(example, shown, target):
  for name, scene in with_another_word(example.edited_scene):
    rival = seen(scene)
    if apart(rival, target).max() > VISIBLE and way(shown, rival, target) < 0.5:
      yield f'it looks more like {name}'


def _things(example, shown, target, changed):
  """Colours of all objects, shapes of those that the change touches."""
  scene = example.edited_scene
  for thing in scene.objects:
    if scene.style == 'outline':
      window = dilated(world.distance(thing) < 2, 5)
      if iou(_dark(shown) & window, _dark(target) & window) < LINE_IOU:
        yield f'the lines of {_named(thing)} are not there'
      continue
    inside = core(world.coverage(thing) >= 0.5)
    if apart(shown[inside].mean(0), target[inside].mean(0)) > COLOUR:
      yield f'the colour of {_named(thing)} is wrong'
    if (changed & (world.coverage(thing) > 0)).any() and not _has_shape(scene, thing, shown):
      yield f'the shape of {_named(thing)} is wrong'


def _dark(picture):
  return picture.mean(-1) < 0.5


def _has_shape(scene, thing, shown):
  mask = world.coverage(thing) >= 0.5
  looks_like_it, is_clear = _nearer_to(scene, thing, shown)
  if (mask & is_clear).sum() < 0.5 * mask.sum():
    return True
  counted = dilated(mask, 5) & is_clear
  return iou(looks_like_it & counted, mask & counted) >= SHAPE_IOU


def _nearer_to(scene, thing: Object, shown):
  """Where `shown` is nearer to the object's colour than to what is behind; where that counts."""
  colour = world.styled(world.colour_of(thing, scene.is_night), scene.style)
  others = tuple(other for other in scene.objects if other != thing)
  behind = seen(scene._replace(objects=others))
  return apart(shown, colour) < apart(shown, behind), apart(colour, behind) >= CONTRAST


def _leftovers(example, shown, target):
  scene = example.edited_scene
  for edit in example.edits:
    if edit.kind != 'remove':
      continue
    mask = world.coverage(edit.before) >= 0.5
    looks_like_it, is_clear = _nearer_to(scene, edit.before, shown)
    is_left = looks_like_it[mask & is_clear]
    inside = core(mask)
    if apart(shown[inside].mean(0), target[inside].mean(0)) > COLOUR or (
      is_left.size and is_left.mean() > LEFTOVER
    ):
      yield f'{_named(edit.before)} is not gone'


def _background(example, shown, before, target):
  """By mean colours of tiles, without the objects; of an outline drawing, the paper."""
  scene = example.edited_scene
  if scene.style == 'outline':
    if iou(_dark(shown), _dark(target)) < LINE_IOU:
      yield 'the lines are not those of the outlines'
    taken = dilated(target.min(-1) < 1, 1)
  else:
    covers = [world.coverage(thing) > 0 for thing in scene.objects]
    taken = dilated(np.any([np.zeros_like(shown[..., 0], bool), *covers], 0), REACH)
  errors = apart(shown, target)[~taken]
  if apart(shown[~taken].mean(0), target[~taken].mean(0)) > COLOUR:
    yield 'the colour of the background is wrong'
  elif (errors > STRAY).sum() > MOST_STRAY:
    yield 'something in the background does not belong there'
  shown, before, target = (tiles(picture, ~taken) for picture in (shown, before, target))
  differs = apart(before, target) > VISIBLE
  is_as_before = apart(shown, before) < apart(shown, target)
  if differs.any() and is_as_before[differs].mean() > LEFTOVER:
    yield 'part of the background is as it was'


def tiles(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Mean colours [N, 3] of the mask in those 8 x 8 tiles that hold at least 16 of its pixels."""
  side = world.SIDE // TILE
  fold = lambda x: x.reshape(side, TILE, side, TILE, -1).sum((1, 3)).reshape(side * side, -1)
  sums, counts = fold(picture * mask[..., None]), fold(mask)
  is_enough = counts[:, 0] >= TILE * TILE // 4
  return sums[is_enough] / counts[is_enough]
