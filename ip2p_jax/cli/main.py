"""The `ip2p` command. Each subcommand is a function, whose docstring and options are its --help.

It imports its implementation inside the function, so that --help loads no library.
"""

import typer

from ip2p_jax.cli import captions
from ip2p_jax.cli.compare import compare
from ip2p_jax.cli.console import run
from ip2p_jax.cli.convert import convert
from ip2p_jax.cli.data import check, pack
from ip2p_jax.cli.draw import draw
from ip2p_jax.cli.edit import edit
from ip2p_jax.cli.evaluate import evaluate
from ip2p_jax.cli.pairs import filter, pairs
from ip2p_jax.cli.plan import plan


def app() -> typer.Typer:
  """All commands."""
  app = typer.Typer(add_completion=False, rich_markup_mode=None, help='InstructPix2Pix in JAX.')
  for command in (edit, draw, convert, check, pack):
    app.command()(command)
  app.add_typer(captions.app, name='captions')
  for command in (pairs, filter, evaluate, compare, plan):
    app.command()(command)
  return app


def main() -> None:
  """The `ip2p` command."""
  run(app(), 'ip2p')
