"""A drawn world in which every edit has one right answer.

A scene of 64 x 64 pixels has a background (colour, pattern, day or night) and one to three objects
(shape, colour, size, place); an edit turns one scene into another. Both are drawn without chance,
so the right result of every instruction is known to the pixel. `example(seed, split)` gives a
scene, an instruction and the edited scene; what the seed does not decide does not exist.

  python examples/miniature/world.py out/scenes.png            (a sheet to look at)
  python examples/miniature/world.py out/pairs --train 40000   (a data set for ip2p and train.py)
"""

import argparse
import io
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from phrases import caption, instruction
from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE = 64
COLOURS = {
  'red': (0.86, 0.15, 0.16),
  'green': (0.13, 0.60, 0.22),
  'blue': (0.13, 0.28, 0.85),
  'yellow': (0.97, 0.86, 0.12),
  'orange': (0.96, 0.52, 0.07),
  'purple': (0.52, 0.16, 0.66),
  'pink': (0.97, 0.55, 0.76),
  'white': (1.0, 1.0, 1.0),
}
BACKGROUNDS = {
  'grey': (0.55, 0.56, 0.58),
  'beige': (0.86, 0.79, 0.64),
  'brown': (0.48, 0.33, 0.22),
  'teal': (0.16, 0.55, 0.56),
  'cyan': (0.58, 0.86, 0.92),
  'olive': (0.50, 0.53, 0.22),
  'lavender': (0.73, 0.69, 0.90),
  'mint': (0.66, 0.90, 0.72),
}
# From top to bottom. No edit of this file has it, so nothing in assets/ was trained on it.
SUNSET = ((0.6, 0.3, 0.25), (0.95, 0.6, 0.35))
PATTERNS = ('plain', 'gradient', 'striped')
SHAPES = ('circle', 'square', 'triangle', 'star', 'heart', 'ring')
SIZES = {'small': 8.0, 'large': 12.0}  # radius, pixels
PLACES = {
  'top left': (14, 14),
  'top right': (50, 14),
  'middle': (32, 32),
  'bottom left': (14, 50),
  'bottom right': (50, 50),
}
STYLES = ('outline', 'greyscale', 'negative')
INK = (0.1, 0.1, 0.1)  # of outlines


class Object(NamedTuple):
  """`x` and `y` are the centre in pixels; `place` is the nearest of PLACES."""

  shape: str
  colour: str
  size: str
  place: str
  x: float
  y: float


class Scene(NamedTuple):
  """Objects do not overlap, and no two agree in shape, or in both colour and size."""

  background: str
  pattern: str
  is_night: bool
  objects: tuple[Object, ...]
  style: str = ''


class Edit(NamedTuple):
  """One change: its kind, the object it is about as it was and as it will be, and the new word."""

  kind: str
  before: Object | None = None
  after: Object | None = None
  word: str = ''


class Example(NamedTuple):
  """A scene, what to do, and what must come out."""

  scene: Scene
  edits: tuple[Edit, ...]
  edited_scene: Scene
  instruction: str
  caption: str
  edited_caption: str
  is_new_phrasing: bool


# Drawing.


def render(scene: Scene) -> np.ndarray:
  """The picture, float32 [64, 64, 3] in 0..1."""
  if scene.style == 'outline':
    picture = np.ones((SIDE, SIDE, 3), np.float32)
    for thing in scene.objects:
      line = np.clip(1.5 - np.abs(distance(thing)), 0, 1)[..., None]
      picture = picture * (1 - line) + np.float32(INK) * line
    return picture
  picture = background(scene)
  for thing in scene.objects:
    cover = coverage(thing)[..., None]
    picture = picture * (1 - cover) + colour_of(thing, scene.is_night) * cover
  return styled(picture, scene.style)


def picture(scene: Scene) -> np.ndarray:
  """The picture as files hold it, uint8 [64, 64, 3]."""
  return np.round(render(scene) * 255).astype(np.uint8)


def background(scene: Scene) -> np.ndarray:
  """The background alone and without style, float32 [64, 64, 3]."""
  y = np.arange(SIDE, dtype=np.float32)[:, None, None]
  if scene.background == 'sunset':
    top, bottom = np.float32(SUNSET)
    return np.broadcast_to(top + (bottom - top) * y / (SIDE - 1), (SIDE, SIDE, 3))
  colour = np.float32(BACKGROUNDS[scene.background])
  if scene.pattern == 'gradient':  # darker towards the ground
    colour = colour * (1.1 - 0.45 * y / (SIDE - 1))
  elif scene.pattern == 'striped':
    colour = colour * np.where(y // 8 % 2 == 0, 1.0, 0.8)
  colour = np.clip(colour, 0, 1)
  if scene.is_night:
    colour = 0.3 * colour + np.float32((0.0, 0.01, 0.08))
  return np.broadcast_to(colour, (SIDE, SIDE, 3)).astype(np.float32)


def colour_of(thing: Object, is_night: bool) -> np.ndarray:
  """float32 [3]: at night things are darker, and bluer."""
  colour = np.float32(COLOURS[thing.colour])
  return colour * np.float32((0.65, 0.65, 0.75)) if is_night else colour


def styled(picture: np.ndarray, style: str) -> np.ndarray:
  """Greyscale and negative of float32 [..., 3]."""
  if style == 'greyscale':
    grey = picture @ np.float32((0.299, 0.587, 0.114))
    return np.repeat(grey[..., None], 3, -1)
  return 1 - picture if style == 'negative' else picture


def coverage(thing: Object) -> np.ndarray:
  """float32 [64, 64]: how much of each pixel the object covers."""
  return np.clip(0.5 - distance(thing), 0, 1).astype(np.float32)


def distance(thing: Object) -> np.ndarray:
  """float [64, 64]: pixels to the object's edge, negative inside."""
  axis = np.arange(SIDE) + 0.5
  x, y = np.meshgrid(axis - thing.x, axis - thing.y)
  return _DISTANCES[thing.shape](x, y, SIZES[thing.size])


def _circle(x, y, radius):
  return np.hypot(x, y) - radius


def _ring(x, y, radius):
  return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius


def _square(x, y, radius):
  side = 0.85 * radius
  dx, dy = np.abs(x) - side, np.abs(y) - side
  return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _triangle(x, y, radius):
  return _polygon(x, y + 0.15 * radius, _corners(3, radius * 1.1))


def _star(x, y, radius):
  outer, inner = _corners(5, radius * 1.1), _corners(5, radius * 0.55, np.pi / 5)
  return _polygon(x, y, np.stack([outer, inner], 1).reshape(-1, 2))


def _heart(x, y, radius):
  """Two discs above a square that stands on its corner."""
  lobe = 0.5 * radius
  discs = np.hypot(np.abs(x) - lobe * 0.94, y + lobe * 0.7) - lobe
  tip = _polygon(x, y, np.array([(-1.72, -0.05), (0.0, -0.75), (1.72, -0.05), (0.0, 1.85)]) * lobe)
  return np.minimum(discs, tip)


def _corners(count, radius, turn=0.0):
  angles = 2 * np.pi * np.arange(count) / count + turn
  return radius * np.stack([np.sin(angles), -np.cos(angles)], -1)


def _polygon(x, y, corners):
  """Signed distance to a polygon of `corners` [N, 2]."""
  nearest, is_inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
  for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
    dx, dy = bx - ax, by - ay
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
    crosses = (ay > y) != (by > y)
    is_inside ^= crosses & (x < (y - ay) * dx / (dy if dy else 1.0) + ax)
  return np.where(is_inside, -nearest, nearest)


_DISTANCES = {
  'circle': _circle,
  'square': _square,
  'triangle': _triangle,
  'star': _star,
  'heart': _heart,
  'ring': _ring,
}


# Chance.


def example(seed: int, split: str = 'train', jitter: float = 0.0) -> Example:
  """Scenes, edit and words of a seed. Splits 'train' and 'test' share no picture.

  Half of the instructions of 'test' are phrased in ways that 'train' never uses. With `jitter`
  pixels, objects may stand that far beside their places.
  """
  rng = np.random.default_rng((seed, {'train': 0, 'test': 1}[split]))
  while True:
    scene = random_scene(rng, jitter)
    edits, edited_scene = random_edits(rng, scene)
    if edits and split_of(scene) == split_of(edited_scene) == split:
      break
  is_new = split == 'test' and seed % 2 == 1
  return Example(
    scene,
    edits,
    edited_scene,
    instruction(rng, scene, edits, is_new),
    caption(rng, scene),
    caption(rng, edited_scene),
    is_new,
  )


def split_of(scene: Scene) -> str:
  """'test' for every fourth picture that there can be."""
  things = sorted(scene.objects)  # no order of objects shows, and in an outline drawing no colour
  if scene.style == 'outline':
    scene = Scene('', '', False, (), scene.style)
    things = [thing._replace(colour='') for thing in things]
  shown = repr(scene._replace(objects=tuple(things)))
  return 'train' if zlib.crc32(shown.encode()) % 4 else 'test'


def random_scene(rng: np.random.Generator, jitter: float = 0.0) -> Scene:
  background = _choose(rng, BACKGROUNDS)
  pattern = _choose(rng, ('plain', 'plain', 'gradient', 'striped'))
  scene = Scene(background, pattern, rng.random() < 0.2, ())
  for _ in range(rng.choice((1, 2, 3), p=(0.55, 0.35, 0.1))):
    thing = random_object(rng, scene, jitter)
    scene = scene._replace(objects=(*scene.objects, thing)) if thing else scene
  return scene if scene.objects else random_scene(rng, jitter)


def random_object(rng: np.random.Generator, scene: Scene, jitter: float = 0.0) -> Object | None:
  """An object for which there is room; with `jitter` pixels it may stand beside its place."""
  for _ in range(20):
    place = _choose(rng, PLACES)
    x, y = np.round(np.add(PLACES[place], rng.uniform(-jitter, jitter, 2)), 1).tolist()
    size = _choose(rng, SIZES)
    thing = Object(_choose(rng, SHAPES), _choose(rng, COLOURS), size, place, x, y)
    if _fits(thing, scene.objects):
      return thing
  return None


def _fits(thing, others):
  reach = SIZES[thing.size] * 1.1
  if not all(reach <= centre <= SIDE - reach for centre in (thing.x, thing.y)):
    return False
  for other in others:
    gap = np.hypot(thing.x - other.x, thing.y - other.y) - SIZES[thing.size] - SIZES[other.size]
    is_twin = thing.shape == other.shape or (thing.colour, thing.size) == (other.colour, other.size)
    if gap < 2 or is_twin or thing.place == other.place:
      return False
  return True


def random_edits(
  rng: np.random.Generator, scene: Scene
) -> tuple[tuple[Edit, ...], Scene] | tuple[tuple[()], Scene]:
  """One edit, or two of different kinds and about different things; none if no try fits."""
  first, edited = random_edit(rng, scene, KINDS)
  if first is None or first.kind == 'style' or rng.random() > 0.12:
    return (first,) * (first is not None), edited
  kinds = [kind for kind in KINDS if kind not in (first.kind, 'style')]
  taken = (first.before, first.after)
  second, both = random_edit(rng, edited, kinds, taken)
  return ((first, second), both) if second else ((first,), edited)


def random_edit(rng, scene: Scene, kinds, taken=()) -> tuple[Edit | None, Scene]:
  kind = _choose(rng, kinds)
  return _EDITS[kind](rng, scene, [thing for thing in scene.objects if thing not in taken])


def _change(rng, scene, free, kind, field, values):
  if not free:
    return None, scene
  before = free[rng.integers(len(free))]
  word = _choose(rng, [value for value in values if value != getattr(before, field)])
  after = before._replace(**{field: word})
  others = tuple(thing for thing in scene.objects if thing != before)
  if not _fits(after, others):
    return None, scene
  things = tuple(after if thing == before else thing for thing in scene.objects)
  return Edit(kind, before, after, word), scene._replace(objects=things)


def _recolour(rng, scene, free):
  return _change(rng, scene, free, 'recolour', 'colour', COLOURS)


def _reshape(rng, scene, free):
  return _change(rng, scene, free, 'reshape', 'shape', SHAPES)


def _resize(rng, scene, free):
  return _change(rng, scene, free, 'resize', 'size', SIZES)


def _add(rng, scene, free):
  thing = random_object(rng, scene) if len(scene.objects) < 3 else None
  if thing is None:
    return None, scene
  return Edit('add', None, thing), scene._replace(objects=(*scene.objects, thing))


def _remove(rng, scene, free):
  if len(scene.objects) < 2 or not free:
    return None, scene
  thing = free[rng.integers(len(free))]
  things = tuple(other for other in scene.objects if other != thing)
  return Edit('remove', thing), scene._replace(objects=things)


def _background(rng, scene, free):
  word = _choose(rng, [name for name in BACKGROUNDS if name != scene.background])
  return Edit('background', word=word), scene._replace(background=word)


def _night(rng, scene, free):
  word = 'day' if scene.is_night else 'night'
  return Edit('night', word=word), scene._replace(is_night=not scene.is_night)


def _style(rng, scene, free):
  style = _choose(rng, STYLES)
  return Edit('style', word=style), scene._replace(style=style)


_EDITS: dict[str, Callable] = {
  'recolour': _recolour,
  'reshape': _reshape,
  'resize': _resize,
  'add': _add,
  'remove': _remove,
  'background': _background,
  'night': _night,
  'style': _style,
}
KINDS = tuple(_EDITS)
TWO_STEPS = 'two steps'


def _choose(rng, values):
  values = list(values)
  return values[rng.integers(len(values))]


# Files.


def sheet(count: int = 24, split: str = 'train', first: int = 0, scale: int = 3) -> Image.Image:
  """Examples to look at: scene, edited scene and the instruction below."""
  columns, width, height = 4, (2 * SIDE + 2) * scale, SIDE * scale + 16
  rows = -(-count // columns)
  result = Image.new('RGB', (columns * (width + 8), rows * (height + 8)), 'white')
  draw = ImageDraw.Draw(result)
  for i in range(count):
    one = example(first + i, split)
    left, top = i % columns * (width + 8), i // columns * (height + 8)
    for j, scene in enumerate((one.scene, one.edited_scene)):
      shown = Image.fromarray(picture(scene)).resize((SIDE * scale,) * 2, Image.Resampling.NEAREST)
      result.paste(shown, (left + j * (SIDE + 2) * scale, top))
    draw.text((left, top + SIDE * scale + 2), one.instruction[:70], 'black')
  return result


def png(scene: Scene) -> bytes:
  file = io.BytesIO()
  Image.fromarray(picture(scene)).save(file, 'PNG')
  return file.getvalue()


def kind_of(example: Example) -> str:
  """One of KINDS, or TWO_STEPS."""
  return example.edits[0].kind if len(example.edits) == 1 else TWO_STEPS


def seeds(count: int, first: int = 0, kinds: Sequence[str] = ()) -> list[int]:
  """The `count` seeds from `first` on; of examples of `kinds` alone, as many of each, if given."""
  if not kinds:
    return list(range(first, first + count))
  wanted = {kind: count // len(kinds) + (i < count % len(kinds)) for i, kind in enumerate(kinds)}
  found = []
  for seed in itertools.count(first):
    if len(found) == count:
      return found
    kind = kind_of(example(seed))
    if wanted.get(kind):
      wanted[kind] -= 1
      found.append(seed)


def write_pairs(
  folder: Path, train: int, validation: int, first: int = 0, kinds: Sequence[str] = ()
) -> None:
  """A data set in the layout of timbrooks/instructpix2pix-clip-filtered: Parquet files by split.

  The validation examples are the last of the split 'train': 'test' stays unseen. `first` and
  `kinds` as of `seeds`.
  """
  chosen = seeds(train + validation, first, kinds)
  for name, part in (('train', chosen[:train]), ('validation', chosen[train:])):
    _write_table(folder, name, len(part), lambda: (
      _columns(seed, example(seed)) for seed in tqdm(part, name)  # noqa: B023  called at once
    ))  # fmt: skip


def write_held_out(folder: Path, count: int, first: int = 0) -> None:
  """Examples of the split 'test' for `ip2p evaluate`: also with the seed as id, and their kind."""

  def row(seed):
    one = example(seed, 'test')
    return {'id': str(seed), 'group': kind_of(one), **_columns(seed, one)}

  _write_table(folder, 'test', count, lambda: map(row, range(first, first + count)))


def _columns(seed, one):
  return {
    'original_image': {'bytes': png(one.scene), 'path': f'{seed}_0.png'},
    'original_prompt': one.caption,
    'edit_prompt': one.instruction,
    'edited_prompt': one.edited_caption,
    'edited_image': {'bytes': png(one.edited_scene), 'path': f'{seed}_1.png'},
  }


def _write_table(folder, split, count, rows):
  """Writes `count` rows, which `rows()` makes, unless they are there."""
  import pyarrow  # only data sets need it
  from pyarrow import parquet

  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f'{split}-00000-of-00001.parquet'
  if file.exists() and parquet.read_metadata(file).num_rows == count:
    return
  unfinished = file.with_suffix('.part')
  parquet.write_table(pyarrow.Table.from_pylist(list(rows())), unfinished, row_group_size=256)
  unfinished.rename(file)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path, help='a .png, or a folder for a data set')
  parser.add_argument('--train', type=int, default=40_000, help='examples to train on')
  parser.add_argument('--validation', type=int, default=500)
  parser.add_argument('--test', type=int, help='instead: held-out examples for `ip2p evaluate`')
  parser.add_argument('--first', type=int, default=0, metavar='SEED', help='seeds count from here')
  parser.add_argument(
    '--kinds', nargs='*', choices=(*KINDS, TWO_STEPS), help='only such edits, as many of each'
  )
  arguments = parser.parse_args()
  if arguments.out.suffix == '.png':
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet().save(arguments.out)
  elif arguments.test:
    write_held_out(arguments.out, arguments.test, arguments.first)
  else:
    write_pairs(
      *(arguments.out, arguments.train, arguments.validation),
      *(arguments.first, arguments.kinds or ()),
    )
  print(f'wrote {arguments.out}')
