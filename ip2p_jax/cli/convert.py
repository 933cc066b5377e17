"""`ip2p convert`: a checkpoint, or what a training run made, as another format."""

import os
from collections.abc import Callable
from pathlib import Path

from ip2p_jax.captions.workdir import export_language, is_language_run
from ip2p_jax.editing.export import convert_checkpoint, refuse_options


def convert_any(
  src: str | os.PathLike,
  dst: Path,
  to: str | None = None,
  dtype: str = 'float32',
  *,
  ema: bool | None = None,
  variant: str | None = None,
  prediction_type: str | None = None,
  say: Callable[[str], None] = print,
  **options: bool,
) -> None:
  """Converts an editor, or writes a language model's run as a folder of transformers.

  Arguments are those of `convert_checkpoint`; raises InputError as it does.
  """
  if is_language_run(src):
    refuse_options(
      f'{src}: trained a language model, which is written for transformers',
      to=to, variant=variant, prediction_type=prediction_type,
    )  # fmt: skip
    step = export_language(src, dst, dtype, ema is not False, options.get('overwrite', False))
    say(f'wrote {dst} in {dtype}, from {step}')
    return
  convert_checkpoint(
    src, dst, to, dtype, ema=ema, variant=variant, prediction_type=prediction_type, say=say,
    **options,
  )  # fmt: skip
