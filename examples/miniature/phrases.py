"""What people say about the drawn world: captions of scenes, and instructions.

Each instruction has several phrasings in TRAINED, and others in NEW that are only used to test.
"""

import numpy as np

ARTICLE = {'orange': 'an', 'olive': 'an'}
TRAINED = {
  'recolour': (
    'make {it} {word}', 'turn {it} {word}', 'change the colour of {it} to {word}',
    'paint {it} {word}', 'colour {it} {word}', 'let {it} be {word}', '{it} should be {word}',
    'give {it} a {word} colour',
    'recolour {it} to {word}', 'show {it} in {word}', 'the colour of {it} should be {word}',
    'let the colour of {it} be {word}', 'change {it} so that it is {word}',
  ),
  'reshape': (
    'turn {it} into {a_word}', 'replace {it} with {a_word}', 'change {it} into {a_word}',
    'make {it} {a_word}', 'swap {it} for {a_word}', '{it} becomes {a_word}',
    'put {a_word} in place of {it}',
    'change the shape of {it} to {a_word}', 'draw {a_word} instead of {it}',
    '{it} should become {a_word}', 'let {it} turn into {a_word}',
    'show {a_word} in place of {it}',
  ),
  'grow': (
    'make {it} bigger', 'make {it} large', 'enlarge {it}', 'grow {it}', 'make {it} larger',
    '{it} should be bigger', 'increase the size of {it}',
    'let {it} become bigger', 'give {it} a bigger size', 'let {it} be larger',
    'turn {it} into a large one', 'change the size of {it} to large',
  ),
  'shrink': (
    'make {it} smaller', 'make {it} small', 'shrink {it}', 'let {it} shrink',
    '{it} should be smaller', 'decrease the size of {it}',
    'let {it} become smaller', 'reduce the size of {it}', 'let {it} be smaller',
    'turn {it} into a small one', 'change the size of {it} to small',
  ),
  'add': (
    'add {new} {at}', 'put {new} {at}', 'draw {new} {at}', 'place {new} {at}', '{at}, add {new}',
    'let there be {new} {at}',
    '{at}, put {new}', '{at} there should be {new}', '{at}, draw {new}', 'show {new} {at}',
    'give it {new} {at}', 'the picture with {new} {at}', '{at} draw {new}',
  ),
  'remove': (
    'remove {it}', 'delete {it}', 'take {it} away', 'erase {it}', 'get rid of {it}',
    'the picture without {it}', 'make {it} disappear',
    'show it without {it}', 'let {it} go away', 'make {it} go', 'take {it} out', 'drop {it}',
  ),
  'background': (
    'make the background {word}', 'change the background to {word}', 'turn the background {word}',
    'use {a_word} background', 'paint the background {word}', 'put it on {a_word} background',
    'let the background be {word}',
    'give the picture {a_word} background', 'the background becomes {word}',
    'let the colour of the background be {word}', 'change the background colour to {word}',
    'the colour of the background should be {word}', 'show it on {a_word} background',
  ),
  'night': (
    'make it night', 'turn day into night', 'at night', 'change it to night time',
    'let it be night', 'show it at night',
    'turn it to night', 'it is night now', 'let night fall', 'change it into night',
    'show the picture by night',
  ),
  'day': (
    'make it day', 'turn night into day', 'by day', 'change it to day time', 'let it be day',
    'show it in daylight',
    'turn it to day', 'it is day now', 'let day break', 'change it into day',
    'show the picture by day',
  ),
  'outline': (
    'make it an outline drawing', 'turn it into a line drawing', 'draw only the outlines',
    'as an outline drawing', 'make it a sketch',
    'draw it as a sketch', 'change it into a sketch', 'turn the picture into an outline drawing',
    'show it as outlines', 'only the outlines',
  ),
  'greyscale': (
    'make it black and white', 'turn it into greyscale', 'remove all colour',
    'as a black and white picture', 'make it greyscale',
    'change it to greyscale', 'take the colours away', 'show it in black and white',
    'without any colour', 'turn the picture black and white',
  ),
  'negative': (
    'invert the colours', 'make it a negative', 'turn it into a negative', 'as a negative',
    'invert the picture',
    'change it to a negative', 'show the negative', 'let all colours be inverted',
    'make the colours inverted', 'turn the picture into a negative',
  ),
}  # fmt: skip
NEW = {
  'recolour': ('change {it} to {word}', 'paint {it} in {word}', 'make the colour of {it} {word}'),
  'reshape': ('let {it} be {a_word}', 'draw {a_word} in place of {it}', '{it} should be {a_word}'),
  'grow': ('let {it} grow', 'turn {it} large', 'give {it} a larger size'),
  'shrink': ('make the size of {it} smaller', 'turn {it} small', 'give {it} a smaller size'),
  'add': ('{at} put {new}', 'give the picture {new} {at}', 'let {new} be {at}'),
  'remove': ('let {it} disappear', 'take away {it}', 'show the picture without {it}'),
  'background': (
    'give it {a_word} background', 'the background should be {word}',
    'change the colour of the background to {word}',
  ),
  'night': ('it should be night', 'turn it into night', 'change day to night'),
  'day': ('it should be day', 'turn it into day', 'change night to day'),
  'outline': ('change it into an outline drawing', 'show only the outlines', 'as a sketch'),
  'greyscale': ('change it to black and white', 'take all colour away', 'in greyscale'),
  'negative': ('change it into a negative', 'all colours should invert', 'show it as a negative'),
}  # fmt: skip
JOINTS = (
  '{} and {}',
  '{}, then {}',
  '{} and then {}',
  '{}, and {}',
  'first {}, then {}',
  '{}; then {}',
)
BACKDROPS = {
  'plain': ('on {a} {colour} background', 'on {colour}', 'over {a} {colour} background',
            'on a plain {colour} background'),
  'gradient': ('on {a} {colour} gradient', 'over {a} {colour} gradient',
               'on {a} {colour} background that fades'),
  'striped': ('on {a} {colour} striped background', 'over {colour} stripes',
              'on {colour} stripes'),
}  # fmt: skip
STYLED = {
  'outline': ('an outline drawing of {}', 'a line drawing of {}', 'a sketch of {}'),
  'greyscale': ('a black and white picture of {}', 'a greyscale picture of {}'),
  'negative': ('a negative of {}', 'an inverted picture of {}'),
}


def caption(rng: np.random.Generator, scene, habits: dict | None = None) -> str:
  """A sentence that names every object; places, sizes and daylight are sometimes left out.

  `habits` keeps what was chosen: a second scene told with the same dict is told in the same words,
  as far as it is the same.
  """
  habits = {} if habits is None else habits

  def once(what, draw):
    if what not in habits:
      habits[what] = draw()
    return habits[what]

  def pick(what, values):
    return once((what, values), lambda: _pick(rng, values))

  count = len(scene.objects)
  says_place, says_size = once('place', rng.random) < 0.6, once('size', rng.random) < 0.7
  order = once('order', lambda: [scene.objects[i].place for i in rng.permutation(count)])
  rank = lambda thing: order.index(thing.place) if thing.place in order else count
  things = []
  for thing in sorted(scene.objects, key=rank):
    words = f'{thing.size} {thing.colour}' if says_size else thing.colour
    words = f'{_a(words)} {thing.shape}'
    where = (
      once(('at', thing.place), lambda place=thing.place: at(rng, place)) if says_place else ''
    )
    things.append(f'{words} {where}' if where else words)
  text = things[0] if count == 1 else f'{", ".join(things[:-1])} and {things[-1]}'
  if scene.style != 'outline':
    words = pick('backdrop', BACKDROPS[scene.pattern])
    text += ' ' + words.format(colour=scene.background, a=_a(scene.background).split()[0])
  if scene.style:
    text = pick('style', STYLED[scene.style]).format(text)
  if scene.style != 'outline':
    if scene.is_night:
      text += pick('night', (' at night', ' by night', ', it is night'))
    elif once('day', rng.random) < 0.2:
      text += pick('by day', (' by day', ' in daylight'))
  return text if scene.style or once('plain', rng.random) < 0.8 else f'a picture of {text}'


def instruction(rng: np.random.Generator, scene, edits, is_new: bool) -> str:
  """One sentence for one or two edits, in a trained or a new phrasing."""
  phrasings, texts = NEW if is_new else TRAINED, []
  for edit in edits:
    name = edit.kind
    if name == 'resize':
      name = 'grow' if edit.word == 'large' else 'shrink'
    elif name in ('style', 'night'):
      name = edit.word
    words = {'word': edit.word, 'a_word': _a(edit.word)}
    if edit.before:
      words['it'] = reference(rng, scene, edit.before)
    if edit.kind == 'add':
      words['new'] = f'{_a(f"{edit.after.size} {edit.after.colour}")} {edit.after.shape}'
      words['at'] = at(rng, edit.after.place)
    texts.append(_pick(rng, phrasings[name]).format(**words))
  return texts[0] if len(texts) == 1 else _pick(rng, JOINTS).format(*texts)


def reference(rng: np.random.Generator, scene, thing) -> str:
  """Words for one object of the scene: its shape tells it apart."""
  colour = f'{thing.colour} ' if rng.random() < 0.75 else ''
  size = f'{thing.size} ' if rng.random() < 0.15 else ''
  return f'the {size}{colour}{thing.shape}'


def at(rng: np.random.Generator, place: str) -> str:
  if place == 'middle':
    return _pick(rng, ('in the middle', 'in the centre'))
  where = f'{place} corner' if ' ' in place and rng.random() < 0.4 else place
  return ('in the ' if where.endswith('corner') else 'at the ') + where


def _a(words):
  return f'{ARTICLE.get(words.split()[0], "a")} {words}' if words else words


def _pick(rng, values):
  return values[rng.integers(len(values))]
