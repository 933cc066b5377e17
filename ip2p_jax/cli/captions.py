"""`ip2p captions`: trains a language model to write edits, and writes edits for many captions."""

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm
from typer import Argument, Option

from ip2p_jax.cli import console
from ip2p_jax.cli.captions_write import write
from ip2p_jax.errors import InputError

app = typer.Typer(
  rich_markup_mode=None,
  help='Captions and their edits, from which `ip2p pairs` draws pairs of images.',
)


@app.command(context_settings={'allow_extra_args': True, 'ignore_unknown_options': True})
def train(
  context: typer.Context,
  workdir: Annotated[str, Option(help='Folder for checkpoints and metrics; may be gs://.')],
  config: Annotated[Path, Option(help='Its settings change by --config.KEY=V.')] = Path(
    'configs/captions.py'
  ),
) -> None:
  """Trains a language model on triplets: caption, instruction, edited caption.

  ip2p captions train --workdir W --config.checkpoint=SmolLM2-360M
  --config.data.path=my-triplets.jsonl

  ip2p captions train --config configs/captions.py --workdir W --config.checkpoint=CKPT
  --config.data.path=my-triplets.jsonl --config.lora.rank=16

  Run the same command again to resume. On several hosts: python train.py --multihost
  --config=configs/captions.py. docs/captions.md explains how to write triplets.
  """
  from ip2p_jax.captions.train import train_language
  from ip2p_jax.config import LanguageConfig
  from ip2p_jax.config_text import load_config

  changes = []
  for word in context.args:
    name, equals, _ = word.partition('=')
    if not name.startswith('--config.') or not equals:
      raise InputError(f'does not know {word!r}; change a setting by --config.KEY=VALUE.')
    changes.append(word.removeprefix('--config.'))
  settings = load_config(config, changes, LanguageConfig)
  console.cache_compilations()
  raise typer.Exit(train_language(settings, workdir))


app.command()(write)


@app.command()
def check(
  file: Annotated[
    Path, Argument(metavar='FILE', help='Triplets, or prompts: .jsonl, .csv or .parquet.')
  ],
) -> None:
  """Checks every triplet for duplicates, faults of form, and edits that cannot be drawn.

  ip2p captions check my-triplets.jsonl

  Prints a line per finding, and how varied the instructions are. Exit status 1 if there is any.
  """
  from ip2p_jax.captions.check import check_triplets, diversity

  with tqdm(unit='row', dynamic_ncols=True, disable=None) as bar:

    def progress(done, total):
      bar.total = total
      bar.update(done - bar.n)

    read, findings = check_triplets(file, tqdm.write, progress)
  for line in diversity([triplet.instruction for triplet in read]):
    tqdm.write(line)
  tqdm.write(
    f'{file}: {console.counted(len(read), "triplet")}, {console.counted(findings, "finding")}'
  )
  if findings:
    raise typer.Exit(1)


@app.command()
def merge(
  files: Annotated[
    list[str], Argument(metavar='FILES... OUT', help='Files of `write`, then a new file.')
  ],
) -> None:
  """Merges the prompts of several runs into one file, each caption once.

  ip2p captions merge edits-a/prompts.jsonl edits-b/prompts.jsonl prompts.jsonl

  Workers of one run (--shard) do not need it.
  """
  from ip2p_jax.captions.merge import merge_answers

  *sources, out = files
  if not sources:
    raise InputError('give the files to merge, and then a new file to write.')
  count, duplicates = merge_answers(sources, out)
  prompts = console.counted(count, 'prompt')
  tqdm.write(f'{out}: {prompts}; {duplicates:,} left out as duplicate captions')
