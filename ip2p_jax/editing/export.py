"""Converting checkpoints, with a stored edit beside the result that PyTorch can repeat."""

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
      'original', either of the first two for 'lora': the adapters alone of a LoRA run, for
      diffusers' `load_lora_weights`.
    to: None goes by the name of `dst`.
    dtype: of the written weights. float16 names a folder's files as variant fp16.
    ema: whether to take averaged weights, of a single file or a workdir that holds them too; None
      takes them unless the live ones of a file were changed without them, as merging does.
    verify: whether to run a short edit from the written files and store it with `verify.py`: in
      the folder, or in `DST.verify/` beside the file.
    say: told each thing done, a line of text.

  Raises InputError for anything wrong with SRC or DST.
  """
  dst = Path(dst)
  with storage.one_writer(dst):
    _convert(src, dst, to, dtype, ema, variant, prediction_type, verify, overwrite, say)


def _convert(src, dst, to, dtype, ema, variant, prediction_type, verify, overwrite, say):
  if to == 'lora':
    refuse_options(
      'adapters alone say nothing of these', variant=variant, prediction_type=prediction_type
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
  say(f'read {checkpoint.source}: {counts} tensors, all as its architecture wants them')
  weights.write(checkpoint, dst, to, dtype, variant=written_variant, overwrite=overwrite)
  say(f'wrote {dst} in {dtype}, read it back, and it is the same')
  _tell_limits(checkpoint, tokenizer.learned, to, say)
  if not verify:
    return
  if not is_editor(networks):
    say('no edit to verify: the UNet does not take an image')
    return
  written, folder, file = weights.read(dst), dst, None
  if to != 'diffusers':
    # Named after the whole of it, since a .safetensors and a .ckpt may lie side by side.
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


def refuse_options(why: str, **options: str | None) -> None:
  """Raises an InputError if one of the options is given, which could not act."""
  for name, value in options.items():
    if value is not None:
      raise InputError(f'{why}; leave out {name}={value!r}.')


def _tell_limits(checkpoint, learned, to, say) -> None:
  """Says what the readers of the written format will not see."""
  names = ', '.join(learned)
  if learned and to == 'diffusers':
    say(f'kept the learned tokens {names}')
  elif learned:
    say(f'warning: of a single file only ip2p reads the learned tokens {names}; other tools take '
        'them for ordinary text, so give those a diffusers folder')  # fmt: skip
  if to == 'original' and checkpoint.configs['scheduler'].get('prediction_type') == 'v_prediction':
    say("warning: the original's code takes what this model predicts (v_prediction) for noise; its "
        'images will be wrong')  # fmt: skip


def check_checkpoint(checkpoint: weights.Checkpoint) -> Networks:
  """The checkpoint's networks, if every tensor is as they want it.

  Raises InputError naming any tensor that is missing, left over, misshapen or not finite.
  """
  networks = networks_of(checkpoint)
  for component in COMPONENTS:
    tensors, shapes = checkpoint.tensors[component], networks.shapes[component]
    names.to_params(tensors, shapes, component, source=checkpoint.source)
  return networks


def store_edit(editor: Editor, folder: Path, settings: dict) -> None:
  """Runs a short edit with known noise; stores it in `folder` with the script that repeats it."""
  rng = np.random.default_rng(0)
  side = LATENT_SIDE * editor.networks.vae_config.factor
  image = example_image(side)
  noise = rng.standard_normal((STEPS + 1, 1, LATENT_SIDE, LATENT_SIDE, 4), np.float32)
  # A token in lower case, which every version of transformers finds.
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
  """uint8 [side, side, 3]: colour gradients under a grid, so that every pixel counts."""
  y, x = np.mgrid[:side, :side] / side
  channels = [x, y, 0.5 + 0.5 * np.sin(20 * x) * np.cos(14 * y)]
  return np.round(255 * np.stack(channels, -1)).astype(np.uint8)


def run_verification(folder: Path) -> tuple[bool, str]:
  """Whether `verify.py` is content, and what it says at the end."""
  done = subprocess.run(
    [sys.executable, folder / 'verify.py', '--device', 'cpu'], capture_output=True, text=True
  )
  lines = (done.stdout.strip() or done.stderr.strip() or 'verify: said nothing').splitlines()
  return done.returncode == 0, lines[-1]
