"""`ip2p convert`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ip2p_jax.cli import console


def convert(
  src: Annotated[
    str, typer.Argument(help='A diffusers folder, a .safetensors or .ckpt file, or a workdir.')
  ],
  dst: Annotated[
    Path,
    typer.Argument(help='A new folder (diffusers), .safetensors (ldm) or .ckpt file (original).'),
  ],
  to: Annotated[
    str | None,
    Option(help='diffusers, ldm, original, lora (only adapters); by default from DST.'),
  ] = None,
  dtype: Annotated[str, Option(help='Of the written weights: float32, float16, bfloat16.')] = (
    'float32'
  ),
  ema: console.Ema = None,
  variant: Annotated[
    str | None, Option(help="Variant of a source folder's files to read, such as fp16.")
  ] = None,
  prediction_type: Annotated[
    str | None, Option(help='epsilon or v_prediction, for single files without this setting.')
  ] = None,
  verify: Annotated[
    bool, Option(help='Whether to store a short edit and a verify.py that repeats it in PyTorch.')
  ] = True,
  overwrite: Annotated[bool, Option('--overwrite', help='Replace DST if it exists.')] = False,
) -> None:
  """Converts a checkpoint, or a training run, to a diffusers folder or an LDM file.

  ip2p convert instruct-pix2pix-00-22000.ckpt ip2p-folder --to diffusers --dtype float16

  ip2p convert ip2p-folder instruct-pix2pix.safetensors --to ldm

  ip2p convert workdir trained.safetensors

  ip2p convert workdir trained.ckpt

  ip2p convert workdir adapters --to lora

  A1111 and ComfyUI load the LDM file. The original's edit_cli.py loads the .ckpt file, which has a
  state_dict with weights and averages; writing it needs torch. The command also stores an edit and
  a verify.py, which repeats the edit with only torch and diffusers, and prints the difference.
  """
  console.cache_compilations()
  convert_any(
    src, dst, to, dtype, ema=ema, variant=variant, prediction_type=prediction_type,
    verify=verify, overwrite=overwrite, say=console.say,
  )  # fmt: skip


def convert_any(
  src: str | os.PathLike,
  dst: Path,
  to: str | None = None,
  dtype: str = 'float32',
  *,
  say: Callable[[str], None] = print,
  **options: Any,
) -> None:
  """Converts an editor, or writes a language model's run as a transformers folder.

  Arguments and errors are those of `convert_checkpoint`.
  """
  from ip2p_jax.captions.workdir import export_language, is_language_run
  from ip2p_jax.editing.export import convert_checkpoint, refuse_options

  if not is_language_run(src):
    convert_checkpoint(src, dst, to, dtype, say=say, **options)
    return
  idle = {'to': to} | {name: options.get(name) for name in ('variant', 'prediction_type')}
  refuse_options(f'{src}: trained a language model, which is written for transformers', **idle)
  use_ema, overwrite = options.get('ema') is not False, options.get('overwrite', False)
  say(f'wrote {dst} in {dtype}, from {export_language(src, dst, dtype, use_ema, overwrite)}')
