"""Converts checkpoints, and stores an edit that PyTorch can repeat."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ip2p_jax import storage, weights
from ip2p_jax.editing.editor import Editor, Sampling
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import Networks, is_editor, networks_of, tokenizer_of
from ip2p_jax.weights import diffusers_folder, lora_file, names
from ip2p_jax.weights.tensors import COMPONENTS

VERIFY = Path(__file__).parents[1] / 'resources' / 'verify.py'
INSTRUCTION, STEPS, TEXT_GUIDANCE, IMAGE_GUIDANCE = 'make it winter', 4, 7.5, 1.5
LATENT_SIDE = 16


def convert_checkpoint(
  src: str | os.PathLike,
  dst: Path,
  to: str | None = None,
  dtype: str = 'float32',
  *,
  ema: bool | None = None,
  variant: str | None = None,
  prediction_type: str | None = None,
  verify: bool = True,
  overwrite: bool = False,
  say: Callable[[str], None] = print,
) -> None:
  """Reads SRC, checks every tensor against its architecture, writes DST and reads it back.

  Args:
    src: a diffusers folder, a single file, or the workdir of an editor's run (local or gs://).
    dst: a folder for `to='diffusers'`, a `.safetensors` file for 'ldm', a `.ckpt` file for
      'original', either of the first two for 'lora': only the adapters of a LoRA run, for
      diffusers' `load_lora_weights`.
    to: None decides by the name of `dst`.
    dtype: of the written weights. float16 names a folder's files as variant fp16.
    ema: whether to use averaged weights, if a single file or a workdir has them; None uses them
      unless only the live weights of a file were changed, for instance by merging.
    verify: whether to run a short edit from the written files and store it with `verify.py`: in
      the folder, or in `DST.verify/` beside the file.
    say: gets a line for each finished part.

  Raises InputError for anything wrong with SRC or DST.
  """
  dst = Path(dst)
  with storage.one_writer(dst):
    _convert(src, dst, to, dtype, ema, variant, prediction_type, verify, overwrite, say)


def _convert(src, dst, to, dtype, ema, variant, prediction_type, verify, overwrite, say):
  if to == 'lora':
    refuse_options(
      'adapters have no such setting', variant=variant, prediction_type=prediction_type
    )
    adapters, config = workdir.read_adapters(src, ema is not False)
    say(f'wrote {lora_file.write(adapters, config, dst, dtype, overwrite)} in {dtype}')
    return
  by_name = {suffix: kind for kind, suffix in weights.SUFFIXES.items()}
  to = to or by_name.get(dst.suffix, 'diffusers')
  written_variant = 'fp16' if to == 'diffusers' and dtype == 'float16' else None
  weights.check_destination(dst, to, dtype, written_variant, overwrite)
  checkpoint = workdir.load(src, variant=variant, ema=ema, prediction_type=prediction_type)
  networks = check_checkpoint(checkpoint)
  tokenizer = tokenizer_of(checkpoint, networks)
  counts = ', '.join(f'{len(checkpoint.tensors[name])} {name}' for name in COMPONENTS)
  say(f'read {checkpoint.source}: {counts} tensors, which fit its architecture')
  weights.write(checkpoint, dst, to, dtype, variant=written_variant, overwrite=overwrite)
  say(f'wrote {dst} in {dtype}, read it back, and found no difference')
  _report_limits(checkpoint, tokenizer.learned, to, say)
  if not verify:
    return
  if not is_editor(networks):
    say('no edit to verify: the UNet does not take an image')
    return
  written, folder, file = weights.read(dst), dst, None
  if to != 'diffusers':
    # Has the whole file name, since a .safetensors and a .ckpt may be in one folder.
    written, file = weights.without_learned(written), dst.name
    folder = dst.with_name(f'{file}.verify')
    diffusers_folder.write_configs(written, folder)
  settings = {'file': file, 'variant': written_variant}
  store_edit(Editor.from_checkpoint(written, 'float32'), folder, settings)
  say(f'stored an edit and {folder / "verify.py"}')
  if importlib.util.find_spec('torch') and importlib.util.find_spec('diffusers'):
    agrees, verdict = run_verification(folder)
    if not agrees:
      raise InputError(f'{dst} was written, but PyTorch does not confirm it: {verdict}')
    say(verdict)


def refuse_options(reason: str, **options: str | None) -> None:
  """Raises InputError if one of the options is not None, since it has no effect."""
  for name, value in options.items():
    if value is not None:
      raise InputError(f'{reason}; leave out {name}={value!r}.')


def _report_limits(checkpoint, learned, to, say) -> None:
  """Reports what readers of the written format ignore."""
  names = ', '.join(learned)
  if learned and to == 'diffusers':
    say(f'kept the learned tokens {names}')
  elif learned:
    say(f'warning: only ip2p reads the learned tokens {names} of a single file; other tools take '
        'them for ordinary text, so give those a diffusers folder')  # fmt: skip
  if to == 'original' and checkpoint.configs['scheduler'].get('prediction_type') == 'v_prediction':
    say("warning: the original's code takes this model's v_prediction for noise, so its images"
        ' will be wrong')  # fmt: skip


def check_checkpoint(checkpoint: weights.Checkpoint) -> Networks:
  """The checkpoint's networks.

  Raises InputError with the name of a tensor that is missing, unknown, misshapen or not finite.
  """
  networks = networks_of(checkpoint)
  for component in COMPONENTS:
    tensors, shapes = checkpoint.tensors[component], networks.shapes[component]
    names.to_params(tensors, shapes, component, source=checkpoint.source)
  return networks


def store_edit(editor: Editor, folder: Path, settings: dict) -> None:
  """Runs a short edit with fixed noise. Stores it in `folder` with the script that repeats it."""
  rng = np.random.default_rng(0)
  side = LATENT_SIDE * editor.networks.vae_config.factor
  image = example_image(side)
  noise = rng.standard_normal((STEPS + 1, 1, LATENT_SIDE, LATENT_SIDE, 4), np.float32)
  # A token in lower case, since every version of transformers finds it.
  learned = [token for token in editor.tokenizer.learned if token == token.lower()]
  instruction = ' '.join([INSTRUCTION, *learned[:1]])
  edit = editor.edit_arrays(
    image[None],
    [instruction],
    Sampling(STEPS),
    text_guidance=TEXT_GUIDANCE,
    image_guidance=IMAGE_GUIDANCE,
    init_noise=noise[0],
    step_noise=noise[1:],
  )
  nchw = lambda x: np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3))
  tensors = {
    'image': image,
    'token_ids': editor.tokenizer([instruction])[0],
    'init_noise': nchw(noise[0]),
    'step_noise': nchw(noise[1:]),
    'latents': nchw(edit.latents),
    'result': np.asarray(edit.images[0]),
  }
  settings = settings | {
    'instruction': instruction,
    'steps': STEPS,
    'text_guidance': TEXT_GUIDANCE,
    'image_guidance': IMAGE_GUIDANCE,
  }
  weights.write_safetensors(
    folder / 'verify.safetensors', tensors, metadata={'settings': json.dumps(settings)}
  )
  shutil.copy(VERIFY, folder / 'verify.py')


def example_image(side: int) -> np.ndarray:
  """uint8 [side, side, 3]: colour gradients and waves, so that every pixel matters."""
  y, x = np.mgrid[:side, :side] / side
  channels = [x, y, 0.5 + 0.5 * np.sin(20 * x) * np.cos(14 * y)]
  return np.round(255 * np.stack(channels, -1)).astype(np.uint8)


def run_verification(folder: Path) -> tuple[bool, str]:
  """Whether `verify.py` succeeds, and its last line."""
  result = subprocess.run(
    [sys.executable, folder / 'verify.py', '--device', 'cpu'], capture_output=True, text=True
  )
  lines = (result.stdout.strip() or result.stderr.strip() or 'verify: no output').splitlines()
  return result.returncode == 0, lines[-1]
