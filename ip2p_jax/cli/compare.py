"""`ip2p compare`: evaluations beside each other."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.errors import InputError

REPORT = 'report'  # .md, .csv and .png
AXES = 'clip_sim_dir', 'clip_sim_image'  # to the right and upwards, as in the paper


def compare(
  folders: Annotated[list[Path], typer.Argument(help='Folders of `ip2p evaluate`.')],
  output: Annotated[Path, Option('--output', '-o', help='A folder for the report.')],
  x: Annotated[
    str | None, Option(help=f'The score to the right in the plot.  [default: {AXES[0]}]')
  ] = None,
  y: Annotated[str | None, Option(help=f'The score upwards.  [default: {AXES[1]}]')] = None,
  scores: Annotated[
    str, Option(help='Scores of the table, such as psnr,ssim; by default all.')
  ] = '',
) -> None:
  """Compares evaluations: a table, differences and a plot of two scores.

  ip2p compare runs/editor runs/sdedit -o comparison

  ip2p compare figure8/*/* -o by-pixels --x l1 --y ssim

  Folders of one parent folder whose names are numbers are one curve. Differences are to the first
  folder, paired by image. Of curves they are at equal values of one of both scores. A single folder
  is shown by kinds of edits, without a plot.
  """
  chosen = tuple(filter(None, scores.split(',')))
  if len(folders) > 1:
    compare_folders(folders, output, x, y, chosen)
  elif x or y:
    raise InputError('--x and --y: of no use with one folder, which has no plot; leave them out.')
  else:
    write_report(folders[0], output, chosen)


def write_report(folder: Path, output: Path, scores: tuple[str, ...] = ()) -> None:
  """Prints and writes the means of one evaluation."""
  from ip2p_jax.evaluation import report, run

  results = {folder.name: run.read_results(folder)}
  shown = _shown(results, scores)
  output.mkdir(parents=True, exist_ok=True)
  text, _ = _summarized(output, results, run.read_descriptions([folder]), shown)
  groups = report.by_group(results[folder.name])
  if len(groups) > 1:
    text += '\n' + report.markdown(report.summarize(groups, shown), shown, name='group')
  _write(output, text)


def compare_folders(
  folders: list[Path],
  output: Path,
  x: str | None = None,
  y: str | None = None,
  scores: tuple[str, ...] = (),
) -> None:
  """Prints and writes the comparison. Without `x` and `y` there is a plot if CLIP scored."""
  from ip2p_jax.evaluation import report, run

  results = {f'{folder.parent.name}/{folder.name}': run.read_results(folder) for folder in folders}
  if len(results) < len(folders):
    raise InputError('two folders have the same name and parent; give each its own.')
  descriptions = run.read_descriptions(folders)
  axes = (x or AXES[0], y or AXES[1])
  shown = _shown(results, scores, [axis for axis in (x, y) if axis])
  output.mkdir(parents=True, exist_ok=True)
  text, summary = _summarized(output, results, descriptions, shown)
  curves = _curves(results)
  has_plot = not set(axes) - set(report.metrics_of(results))
  if len(curves) == len(results):
    text += '\n' + _differences(results, shown)
  elif has_plot:
    text += '\n' + _gaps(curves, results, summary, axes)
  _write(output, text)
  if not has_plot:
    console.say(f'no plot: the scores {axes[0]} and {axes[1]} are not there; choose by --x and --y')
    return
  points = {
    curve: [report.Point(*(summary[name][axis] for axis in axes), _label(name)) for name in names]
    for curve, names in curves.items()
  }  # fmt: skip
  report.plot(output / f'{REPORT}.png', points, axes)
  console.say(f'wrote {output / REPORT}.png')


def _curves(results) -> dict[str, list[str]]:
  """Evaluations by curve: those of one folder that are called by numbers, or one alone."""
  parents = [name.rpartition('/')[0] for name in results]
  curves = {}
  for name, parent in zip(results, parents, strict=True):
    is_alone = not _label(name) and parents.count(parent) > 1
    curves.setdefault(name if is_alone else parent, []).append(name)
  return curves


def _label(name) -> str:
  """The number that a folder is called by, or ''."""
  label = name.rpartition('/')[2]
  try:
    float(label)
  except ValueError:
    return ''
  return label


def _shown(results, scores, axes=()):
  """The scores of the table; InputError if one of them, or of the axes, is not there."""
  from ip2p_jax.evaluation import report

  metrics = report.metrics_of(results)
  if missing := [name for name in (*axes, *scores) if name not in metrics]:
    raise InputError(
      f'there is no score {missing[0]}; choose --x, --y and --scores among {", ".join(metrics)}.'
    )
  return scores or metrics


def _differences(results, metrics) -> str:
  """Markdown: every other evaluation against the first, paired by image."""
  from ip2p_jax.evaluation import report

  first, *others = results
  lines = []
  for metric in metrics:
    for other in others:
      estimate = report.difference(results[first], results[other], metric)
      lines.append(f'* {other} - {first}: {metric} {report.text(estimate)}\n')
  return ''.join(lines)


def _gaps(curves, results, summary, axes) -> str:
  """Markdown: the first curve against every other, at equal values of one score."""
  from ip2p_jax.evaluation import report
  from ip2p_jax.evaluation.curves import gaps

  first, *others = ([results[name] for name in names] for names in curves.values())
  name, *names = curves
  lines = []
  for other, points in zip(names, others, strict=True):
    for at, of in (axes, axes[::-1]):
      measured = gaps(first, points, at, of)
      for place, gap in measured:
        lines.append(f'* {name} - {other} at {at} {place:.3f}: {of} {report.text(gap)}\n')
      if not measured:
        ranges = [_range(summary, curves[curve], at) for curve in (name, other)]
        lines.append(f'* {name} - {other}: no common {at}, {ranges[0]} and {ranges[1]}\n')
  return ''.join(lines)


def _range(summary, points, score) -> str:
  means = [summary[point][score].mean for point in points]
  return f'{min(means):.3f} to {max(means):.3f}'


def _summarized(output, results, descriptions, shown):
  """Writes all scores as CSV; returns a table of those that are shown, and the summary of all."""
  from ip2p_jax.evaluation import report

  summary = report.summarize(results, report.metrics_of(results))
  report.write_csv(output / f'{REPORT}.csv', summary)
  return report.markdown(summary, shown, report.described(descriptions)), summary


def _write(output, text) -> None:
  from ip2p_jax.storage import write_bytes

  write_bytes(output / f'{REPORT}.md', text.encode())
  console.say(text.rstrip())
  console.say(f'wrote {output / REPORT}.md and {REPORT}.csv')
