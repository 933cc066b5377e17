"""`ip2p evaluate`: how good edits are, by published protocols."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.cli.compare import compare_folders, write_report
from ip2p_jax.defaults import (
  MAX_SEED,
  METHODS,
  PROTOCOLS,
)
from ip2p_jax.errors import InputError
from ip2p_jax.progress import unwatched

EDITOR_OPTIONS = (
  'cfg_text', 'cfg_image', 'steps', 'sampler', 'spacing', 'karras', 'rescale', 'interval',
)  # fmt: skip
MAKING_OPTIONS = ('seed', 'resolution', 'dtype')  # of whatever makes edits
FIGURE = (
  '8: an editor over its image scale, beside SDEdit (of --base) over its strength. 10: several'
  ' editors over their image scale. Every point has a folder, OUT/CURVE/POINT.'
)


def evaluate(
  context: typer.Context,
  data: Annotated[Path, typer.Argument(help='The data of the protocol, as it was published.')],
  out: Annotated[Path, typer.Argument(help='A new folder, or one to continue in.')],
  protocol: Annotated[str, Option(help=f'{PROTOCOLS}.')] = 'own',
  ckpt: Annotated[
    list[str] | None,
    Option(
      help='The editor that makes the edits, as for `ip2p edit`; --figure 10 takes several. In'
      ' figures also NAME=PATH, for the name of the curve.'
    ),
  ] = None,
  method: Annotated[str | None, Option(help=f'Instead of --ckpt: {METHODS}.')] = None,
  base: Annotated[
    str | None,
    Option(
      help='With --method: its text-to-image checkpoint, as for `ip2p draw`; of text2live a'
      ' CLIPModel folder; of identity nothing. With --figure 8: of SDEdit.'
    ),
  ] = None,
  setting: Annotated[
    list[str] | None,
    Option('--set', help='With --method, or of SDEdit in --figure 8: text_guidance=5 ...'),
  ] = None,
  outputs: Annotated[
    Path | None,
    Option(help='Instead of --ckpt: a folder of edits by any method, named as OUT/edits would be.'),
  ] = None,
  figure: Annotated[int | None, Option(help=FIGURE)] = None,
  samples: Annotated[int | None, Option(min=1, help='Rows to take; by default all.')] = None,
  split: Annotated[str, Option(help='Of own and emu: train, validation or test.')] = '',
  columns: Annotated[str, Option(help='Of own: unusual columns, input=a,edited=b ...')] = '',
  cfg_text: console.CfgText = None,
  cfg_image: console.CfgImage = None,
  steps: console.Steps = None,
  sampler: console.SamplerName = None,
  spacing: console.Spacing = None,
  karras: console.Karras = False,
  rescale: console.Rescale = 0.0,
  interval: console.Interval = (0.0, 1.0),
  seed: Annotated[int, Option(min=0, max=MAX_SEED, help='Of the noise.')] = 0,
  resolution: Annotated[
    int | None,
    Option(min=8, help="Longer side to work at, in pixels; by default the checkpoint's."),
  ] = None,
  clip: Annotated[Path | None, Option(help='A CLIPModel folder: CLIP scores.')] = None,
  clip_crop: Annotated[
    bool, Option('--clip-crop', help="OpenAI's crop before CLIP (MagicBrush), not squash.")
  ] = False,
  original_range: Annotated[
    bool, Option('--original-range', help="Colours in -1..1 for CLIP, as the original's script.")
  ] = False,
  dino: Annotated[Path | None, Option(help='DINO ViT-S/16 weights: similarity.')] = None,
  structure: Annotated[
    Path | None, Option(help='DINO ViT-B/8 weights: structure distance.')
  ] = None,
  levels: Annotated[
    bool, Option('--levels', help='Colours in 0..255 for --structure, as PIE-Bench.')
  ] = False,
  lpips: Annotated[Path | None, Option(help='A folder: SqueezeNet or AlexNet, and LPIPS.')] = None,
  scorer: Annotated[
    list[str] | None,
    Option(metavar='FILE.py:FUNCTION', help='Your own scores: a function that returns a Scorer.'),
  ] = None,
  masked_zeros: Annotated[
    bool, Option('--masked-zeros', help='Scores of kept pixels as PIE-Bench: the rest is black.')
  ] = False,
  drop_equal_captions: Annotated[
    bool, Option('--drop-equal-captions', help='Leave out rows whose two captions are equal.')
  ] = False,
  batch_size: Annotated[int, Option(min=1, help='Images at a time, on all devices.')] = 8,
  shard: Annotated[str, Option(help='i/n: this worker of n that share the rows.')] = '0/1',
  dtype: Annotated[
    str | None, Option(help='float32, bfloat16 or float16; by default float32 on a CPU only.')
  ] = None,
) -> None:
  """Edits the images of a protocol, and scores the edits.

  ip2p evaluate my-pairs results --ckpt CKPT --clip clip-vit-large-patch14

  ip2p evaluate MagicBrush/test results --protocol magicbrush --outputs edits-of-any-method

  ip2p evaluate my-pairs results --method sdedit-caption --base CKPT --set strength=0.7

  ip2p evaluate instruct-pix2pix-data figure8 --protocol paper --figure 8 --ckpt CKPT
  --base stable-diffusion-v1-5 --clip clip-vit-large-patch14 --samples 500

  Pixel scores (l1, l2, psnr, ssim) need no weights. A score with target_ before its name compares
  with the true edited image, the others with the input. OUT/report.md has the means with 95%
  intervals, and how each score was computed. After a kill, run it again to continue.
  """
  from ip2p_jax.data.shard_writing import parse_shard
  from ip2p_jax.evaluation import edits, protocols, run

  ckpts = ckpt or []
  _check_sources(figure, ckpts, method, base, setting, outputs, clip)
  _check_acts(context, figure, method, outputs)
  part = parse_shard(shard)
  steps, cfg_text, cfg_image, sampler = console.editor_defaults(
    ckpts, steps, cfg_text, cfg_image, sampler
  )
  editor = edits.ByEditor(
    ckpts[0] if ckpts else '', steps, sampler, cfg_text, cfg_image, spacing, karras, rescale,
    interval, seed, resolution,
  )  # fmt: skip
  changes = dict(map(_setting, setting or []))
  by_method = edits.ByMethod(method or '', base, changes, seed, resolution)
  points = _points(figure, ckpts, editor if ckpts else by_method if method else None, by_method)
  rows = protocols.read_rows(str(data), protocol, samples, split, columns)
  if drop_equal_captions:
    rows = protocols.without_equal_captions(rows)
  _check_rows(rows, points, figure)
  console.cache_compilations()
  every = _scorers(clip, clip_crop, original_range, dino, structure, levels, lpips, masked_zeros)
  every += [console.imported('--scorer', name)() for name in scorer or []]
  if figure:
    _say_costs(points, len(rows))
  about = {
    'protocol': protocol, 'rows': len(rows), 'data': run.digest_of(rows),
    'scorers': [scorer.description._asdict() for scorer in every],
  }  # fmt: skip
  folders = [out / point.curve / point.label for point in points]
  for folder, point in zip(folders, points, strict=True):
    if figure:
      console.say(f'{point.curve}, {point.label}: {folder}')
    _make_and_score(rows, point.how, folder, about, every, outputs, batch_size, part, dtype)
  done, total = run.number_of_results(folders[-1]), sum(row.is_last for row in rows)
  if done and figure:
    compare_folders(folders, out)
  elif done:
    write_report(out, out)
  if done < total:
    console.say(f'{done} of {total} rows so far; other workers have the rest')


def _check_sources(figure, ckpts, method, base, setting, outputs, clip) -> None:
  """Raises InputError if it is not clear what makes the edits."""
  if figure is None:
    if len(ckpts) + (method is not None) + (outputs is not None) != 1:
      raise InputError(
        'give one of --ckpt (an editor), --method with --base, and --outputs (a folder of edits).'
      )
    if method is None and (base is not None or setting):
      raise InputError(
        '--base and --set: of no use without --method or --figure 8; leave them out.'
      )
    if method is not None:
      from ip2p_jax.evaluation.methods import table

      table.check_base(method, base)
    return
  if figure not in (8, 10):
    raise InputError(f"--figure is {figure}; this command has the paper's figures 8 and 10.")
  if method is not None or outputs is not None:
    raise InputError(f'--figure {figure} makes its own edits; leave --method and --outputs out.')
  if clip is None:
    raise InputError(f'--figure {figure} needs --clip, whose scores are its axes.')
  if figure == 8 and (len(ckpts) != 1 or base is None):
    raise InputError('--figure 8 needs one --ckpt, an editor, and --base for SDEdit.')
  if figure == 10 and (not ckpts or base is not None or setting):
    raise InputError('--figure 10 needs --ckpt once for each editor, without --base and --set.')
  if any(text.startswith('strength=') for text in setting or []):
    raise InputError('--set strength: --figure 8 has seven strengths of its own; leave it out.')


def _check_acts(context, figure, method, outputs) -> None:
  """Raises InputError for an option that would change nothing."""
  idle, why = (), ''
  if figure is not None:
    idle, why = ('cfg_image',), f'--figure {figure} has seven image scales of its own'
  elif outputs is not None:
    idle, why = (*EDITOR_OPTIONS, *MAKING_OPTIONS), 'the edits of --outputs are there'
  elif method is not None:
    idle, why = EDITOR_OPTIONS, 'it is of --ckpt; a method takes --set steps=50, and so on'
  for name, flag in console.changed_options(context).items():
    if name in idle:
      raise InputError(f'{flag} would do nothing: {why}; leave it out.')


def _check_rows(rows, points, figure) -> None:
  """Raises InputError for settings that do not fit the rows."""
  for point in points:
    if point.how:
      point.how.check(rows)
  if figure:
    lacking = [row.id for row in rows if not (row.source_caption and row.target_caption)]
    if lacking:
      raise InputError(
        f'--figure {figure} needs both captions, which {len(lacking)} rows lack, such as'
        f' {lacking[0]}; CLIP cannot tell a direction without them.'
      )


def _points(figure, ckpts, how, sdedit):
  """The evaluations to make."""
  from ip2p_jax.evaluation import figures

  if figure == 8:
    ((name, ckpt),) = figures.named(ckpts).items()
    return figures.figure_8(name, how._replace(ckpt=ckpt), sdedit)
  if figure == 10:
    return figures.figure_10(figures.named(ckpts), how)
  return [figures.FigurePoint('', '', how)]


def _say_costs(points, count) -> None:
  """Says what a figure costs, before it starts."""
  from ip2p_jax.evaluation import figures

  costs = figures.costs(points, count)
  for cost in costs:
    console.say(
      f'{cost.curve}: {cost.points} points of {console.counted(count, "row")},'
      f' {cost.calls:,.0f} predictions of the network, {cost.flops / 1e12:,.1f} TFLOPs'
    )
  total = sum(cost.flops for cost in costs)
  console.say(
    f'altogether {sum(cost.calls for cost in costs):,.0f} predictions and'
    f' {total / 1e12:,.1f} TFLOPs, besides scores; --samples makes it less'
  )


@functools.lru_cache(maxsize=1)  # points of one curve share a checkpoint and its programs
def _model(kind, checkpoint, dtype):
  """A model, and the digest of its weights."""
  from ip2p_jax.evaluation import edits

  model = edits.load(kind, checkpoint, dtype)
  return model, edits.weights_of(model)


def _make_and_score(rows, how, folder, about, scorers, outputs, batch_size, shard, dtype):
  """One evaluation; `how` is None for edits that are there, `about` is what all points share."""
  from ip2p_jax.evaluation import edits, layouts, run

  if how is None:
    mine = [row for _, row in run.share_of(rows, shard) if row.is_last]
    layouts.find_edits(outputs, mine)  # refuses before the folder is claimed
    run.start(folder, about | {'outputs': str(outputs)})
  else:
    model, weights = _model(how.kind, how.checkpoint, dtype)
    edit, settings = how.edit(model), how._asdict() | {'dtype': getattr(model, 'dtype', None)}
    run.start(folder, about | settings | {'weights': weights})
    with console.progress('edit', compiles=True) as progress:
      run.make_edits(
        rows, edit, folder / run.EDITS,
        edits.size_of(how, model, about['protocol']),
        batch_size=1 if how.is_trained else batch_size, shard=shard, settings=settings,
        progress=progress or unwatched,
      )  # fmt: skip
  with console.progress('score', compiles=True) as progress:
    run.score_edits(
      rows, outputs or folder / run.EDITS, about['protocol'], scorers, folder,
      batch_size=batch_size, shard=shard, progress=progress or unwatched,
    )  # fmt: skip


def _scorers(clip, clip_crop, original_range, dino, structure, levels, lpips, masked_zeros):
  """The scorers that the options ask for."""
  from ip2p_jax.evaluation import scorers

  for name, is_on, needs in (
    ('--original-range', original_range, clip), ('--clip-crop', clip_crop, clip),
    ('--levels', levels, structure),
  ):  # fmt: skip
    if is_on and needs is None:
      raise InputError(f'{name}: of no use here; leave it out, or give the weights it is about.')
  every = [scorers.pixels(masked_zeros=masked_zeros)]
  if clip:
    prepare = 'crop' if clip_crop else 'squash'
    every.append(scorers.clip(clip, prepare=prepare, original_range=original_range))
  if dino:
    every.append(scorers.dino(dino))
  if structure:
    every.append(scorers.structure(structure, levels=levels))
  if lpips:
    every.append(scorers.lpips(lpips))
  return every


def _setting(text):
  """(name, value) of 'name=value'; a value is a number, true, false or a text."""
  name, is_given, value = text.partition('=')
  if not is_given:
    raise InputError(f'--set {text}: give a name and a value, such as strength=0.7.')
  words = {'true': True, 'false': False}
  try:
    return name, words[value] if value in words else float(value) if '.' in value else int(value)
  except ValueError:
    return name, value
