"""`ip2p evaluate` and `ip2p compare`: how good edits are, by published protocols."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.defaults import CFG_IMAGE, CFG_TEXT, MAX_SCALE, MAX_SEED, SAMPLER, STEPS
from ip2p_jax.errors import InputError
from ip2p_jax.progress import unwatched

REPORT = 'report'  # .md, .csv and .png
METHODS = (
  'identity, vae, sdedit-caption, sdedit-instruction, ddim, direct, null-text, edit-friendly,'
  ' plug-and-play or text2live'
)
PROTOCOLS = 'own, paper, magicbrush, magicbrush-multi, emu, pie, gedit or imgedit'


def evaluate(
  data: Annotated[Path, typer.Argument(help='The data of the protocol, as it was published.')],
  out: Annotated[Path, typer.Argument(help='A new folder, or one to continue in.')],
  protocol: Annotated[str, Option(help=f'{PROTOCOLS}.')] = 'own',
  ckpt: Annotated[
    str | None, Option(help='The editor that makes the edits, as for `ip2p edit`.')
  ] = None,
  method: Annotated[str | None, Option(help=f'Instead of --ckpt: {METHODS}.')] = None,
  base: Annotated[
    str | None,
    Option(
      help='With --method: its text-to-image checkpoint, as for `ip2p draw`; of text2live a'
      ' CLIPModel folder; of identity nothing.'
    ),
  ] = None,
  setting: Annotated[
    list[str] | None, Option('--set', help='With --method: strength=0.7, and so on.')
  ] = None,
  outputs: Annotated[
    Path | None,
    Option(help='Instead of --ckpt: a folder of edits by any method, named as OUT/edits would be.'),
  ] = None,
  samples: Annotated[int | None, Option(min=1, help='Rows to take; by default all.')] = None,
  split: Annotated[str, Option(help='Of own and emu: train, validation or test.')] = '',
  columns: Annotated[str, Option(help='Of own: unusual columns, input=a,edited=b ...')] = '',
  cfg_text: Annotated[float, Option(min=-MAX_SCALE, max=MAX_SCALE)] = CFG_TEXT,
  cfg_image: Annotated[float, Option(min=-MAX_SCALE, max=MAX_SCALE)] = CFG_IMAGE,
  steps: Annotated[int, Option(min=1, help='Steps of the sampler.')] = STEPS,
  sampler: Annotated[
    str, Option(help='euler_ancestral, euler, heun, ddim, dpmpp_2m or lcm.')
  ] = SAMPLER,
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

  ip2p evaluate instruct-pix2pix-data results --protocol paper --ckpt CKPT --clip CLIP --samples 500

  Pixel scores (l1, l2, psnr, ssim) need no weights. A score with target_ before its name compares
  with the true edited image, the others with the input. OUT/report.md has the means with 95%
  intervals, and how each score was computed. After a kill, run it again to continue.
  """
  from ip2p_jax.data.shard_writing import parse_shard
  from ip2p_jax.evaluation import protocols, report, run

  _check_method(ckpt, method, base, setting, outputs)
  part = parse_shard(shard)
  rows = protocols.read_rows(str(data), protocol, samples, split, columns)
  if drop_equal_captions:
    rows = protocols.without_equal_captions(rows)
  console.cache_compilations()
  every = _scorers(clip, clip_crop, original_range, dino, structure, levels, lpips, masked_zeros)
  how = {'seed': seed, 'resolution': resolution}
  if ckpt:
    how |= {'ckpt': ckpt, 'steps': steps, 'sampler': sampler, 'cfg_text': cfg_text,
            'cfg_image': cfg_image}  # fmt: skip
  elif method:
    how |= {'method': method, 'base': base, 'set': setting or []}
  else:
    how = {'outputs': str(outputs)}
  descriptions = [scorer.description._asdict() for scorer in every]
  run.start(out, {'protocol': protocol, 'rows': len(rows), 'scorers': descriptions} | how)
  if outputs is None:
    edit, size_of = (_editor if ckpt else _method)(rows, dtype, protocol, **how)
    at_once = 1 if _is_trained(method) else batch_size
    with console.progress('edit', compiles=True) as progress:
      run.make_edits(
        rows, edit, out / run.EDITS, size_of, batch_size=at_once, shard=part, settings=how,
        progress=progress or unwatched,
      )  # fmt: skip
  with console.progress('score', compiles=True) as progress:
    run.score_edits(
      rows, outputs or out / run.EDITS, protocol, every, out, batch_size=batch_size, shard=part,
      progress=progress or unwatched,
    )  # fmt: skip
  results = {out.name: run.read_results(out)}
  _write(out / REPORT, results, report.described(every))
  done, total = len(results[out.name]), sum(row.is_last for row in rows)
  if done < total:
    console.say(f'{done} of {total} rows so far; other workers have the rest')


def _check_method(ckpt, method, base, setting, outputs):
  if sum(option is not None for option in (ckpt, method, outputs)) != 1:
    raise InputError(
      'give one of --ckpt (an editor), --method with --base, and --outputs (a folder of edits).'
    )
  if method is None and (base is not None or setting):
    raise InputError('--base and --set: of no use without --method; leave them out.')
  if method is not None:
    from ip2p_jax.evaluation.methods import table

    table.check_base(method, base)


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


def _editor(rows, dtype, protocol, seed, resolution, ckpt, steps, sampler, cfg_text, cfg_image):
  """The editor as a method, and the size that it works at."""
  import numpy as np

  from ip2p_jax.editing.editor import Editor
  from ip2p_jax.pipeline.sampling import Sampling, check_acts

  sampling = Sampling(steps, sampler)
  check_acts(sampling, cfg_text, cfg_image, '')
  model = Editor.load(ckpt, dtype)

  def edit(images, rows, numbers):
    edits = model.edit_arrays(
      images, [row.instruction for row in rows], sampling, text_guidance=cfg_text,
      image_guidance=cfg_image, seeds=seed, indices=numbers,
    )  # fmt: skip
    return np.asarray(edits.images)

  return edit, _size_of(model.networks, protocol, resolution)


def _method(rows, dtype, protocol, seed, resolution, method, base, set):
  """A method of the table, and the size that it works at."""
  from ip2p_jax.evaluation.methods import table
  from ip2p_jax.evaluation.methods.method import Texts

  settings = dict(map(_setting, set))
  table.settings_of(method, **settings)  # before loading
  fields = {'captions': 'source_caption', 'edited_captions': 'target_caption',
            'instructions': 'instruction'}  # fmt: skip
  for column in table.METHODS[method].reads:
    if lacking := [row.id for row in rows if not getattr(row, fields[column])]:
      raise InputError(
        f'--method {method} needs {column}, which {len(lacking)} rows lack, such as {lacking[0]};'
        ' choose another method.'
      )
  model = table.load(method, base, dtype)
  edited = table.method(method, model, **settings)

  def edit(images, rows, numbers):
    texts = (list(column) for column in zip(
      *[(row.source_caption, row.target_caption, row.instruction) for row in rows], strict=True
    ))  # fmt: skip
    words = [row.words for row in rows]
    return edited(images, Texts(*texts, [seed + number for number in numbers], words))

  longest = table.METHODS[method].longest
  return edit, _size_of(getattr(model, 'networks', None), protocol, resolution, longest)


def _is_trained(method):
  """Whether the method is trained for each image: then progress counts single images."""
  from ip2p_jax.evaluation.methods import table

  return method is not None and table.METHODS[method].is_trained


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


def _size_of(networks, protocol, resolution, longest=None):
  """The size to work at; without networks the image's own, but `longest` pixels at most."""
  from ip2p_jax.images import working_size

  factor = networks.vae_config.factor if networks else 1

  def size_of(width, height):
    own = max(width, height)
    side = resolution or (networks.resolution if networks else min(own, longest or own))
    if protocol == 'paper':  # the original squashes every image
      width = height = side
    return working_size(width, height, side, factor)

  return size_of


def compare(
  folders: Annotated[list[Path], typer.Argument(help='Folders of `ip2p evaluate`.')],
  output: Annotated[Path, Option('--output', '-o', help='A folder for the report.')],
  x: Annotated[str, Option(help='The score to the right in the plot.')] = 'clip_sim_dir',
  y: Annotated[str, Option(help='The score upwards.')] = 'clip_sim_image',
) -> None:
  """Compares evaluations: a table, differences and a plot of two scores.

  ip2p compare runs/editor/* runs/sdedit/* -o figure8

  Folders of one parent folder are one curve, whose points have the folders' names. Differences are
  to the first folder, paired by image.
  """
  from ip2p_jax.evaluation import report, run

  results = {f'{folder.parent.name}/{folder.name}': run.read_results(folder) for folder in folders}
  if len(results) < len(folders):
    raise InputError('two folders have the same name and parent; give each its own.')
  output.mkdir(parents=True, exist_ok=True)
  summary = _write(output / REPORT, results, {})
  first, *others = results
  for metric in report.metrics_of(results):
    for other in others:
      estimate = report.difference(results[first], results[other], metric)
      console.say(f'{other} - {first}: {metric} {report.text(estimate)}')
  if missing := [name for name in (x, y) if name not in report.metrics_of(results)]:
    raise InputError(f'no plot: there is no score {missing[0]}; choose by --x and --y.')
  curves = {}
  for name, estimates in summary.items():
    curve, _, label = name.rpartition('/')
    curves.setdefault(curve, []).append(report.Point(estimates[x], estimates[y], label))
  report.plot(output / f'{REPORT}.png', curves, (x, y))
  console.say(f'wrote {output / REPORT}.png')


def _write(path, results, notes):
  """Prints and writes the table, and writes the CSV file; returns the summary."""
  from ip2p_jax.evaluation import report
  from ip2p_jax.storage import write_bytes

  metrics = report.metrics_of(results)
  summary = report.summarize(results, metrics)
  table = report.markdown(summary, metrics, notes)
  write_bytes(path.with_suffix('.md'), table.encode())
  report.write_csv(path.with_suffix('.csv'), summary)
  console.say(table.rstrip())
  console.say(f'wrote {path}.md and {path}.csv')
  return summary
