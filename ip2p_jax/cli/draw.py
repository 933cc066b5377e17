"""`ip2p draw`: draws images from a text with a text-to-image checkpoint, also from an image."""

import secrets
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.cli.console import MAX_TEXT
from ip2p_jax.defaults import CFG_TEXT, MAX_SCALE, MAX_SEED, SAMPLER, SAMPLERS
from ip2p_jax.errors import InputError

STEPS, STRENGTH = 50, 0.6


def draw(
  text: Annotated[str, typer.Argument(help='What to draw, such as "a photo of a lake".')],
  output: Annotated[Path, Option('--output', '-o', help='The image to write.')],
  ckpt: Annotated[Path, Option(help='A text-to-image checkpoint, as for `ip2p edit`.')],
  init: Annotated[
    Path | None, Option(help='An image to start from; the result has its size and colour space.')
  ] = None,
  strength: Annotated[
    float | None,
    Option(
      min=0,
      max=1,
      help='With --init: share of the steps to run; 1 leaves very little of the image.'
      f'  [default: {STRENGTH}]',
    ),
  ] = None,
  size: Annotated[
    int | None,
    Option(
      min=8,
      max=8192,
      help='Side of the square image in pixels; with --init the longer side to work at; by default'
      " the checkpoint's.",
    ),
  ] = None,
  num: Annotated[int, Option(min=1, help='Variations: seed, seed + 1, ...')] = 1,
  seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help='By default random.')] = None,
  steps: Annotated[int, Option(min=1, help='Steps of the sampler.')] = STEPS,
  sampler: Annotated[str, Option(help=f'{SAMPLERS}.')] = SAMPLER,
  cfg_text: Annotated[
    float, Option(min=-MAX_SCALE, max=MAX_SCALE, help='How strongly to follow the text: 5 to 15.')
  ] = CFG_TEXT,
  negative: Annotated[str, Option(help='What the result should not show.')] = '',
  batch_size: Annotated[
    int | None,
    Option(min=1, help='Images at a time, on all devices; by default 4 per device.'),
  ] = None,
  dtype: Annotated[
    str | None, Option(help='float32, bfloat16 or float16; by default float32 on a CPU only.')
  ] = None,
) -> None:
  """Draws images from a text, or from a text and an image.

  ip2p draw --ckpt CKPT "a photo of a lake in the mountains" -o lake.png

  ip2p draw --ckpt CKPT "a lake in winter" -o winter.png --init photo.jpg --strength 0.6

  ip2p draw --ckpt CKPT "a lake" -o lake.png --num 4 --seed 1 --sampler dpmpp_2m --steps 25

  CKPT is a Stable Diffusion checkpoint, not an InstructPix2Pix one. With --init, a higher
  --strength follows the text more and the image less. The settings are stored in the result.
  """
  from ip2p_jax.editing.image_files import numbered
  from ip2p_jax.images import for_file, read
  from ip2p_jax.pipeline.sampling import Sampling
  from ip2p_jax.pipeline.text_to_image import TextToImage

  if strength is not None and init is None:
    raise InputError('--strength: of no use without --init; add that, or leave --strength out.')
  strength = STRENGTH if strength is None else strength
  outputs = numbered(output, num)
  sampling = Sampling(steps, sampler)
  seed = secrets.randbelow(2**31) if seed is None else seed
  _check(text, negative, cfg_text, sampling, init and strength, seed + num - 1)
  image = None if init is None else for_file(read(init), output)
  _check_outputs(outputs, init)
  console.cache_compilations()
  model = TextToImage.load(ckpt, dtype)
  console.say(f'seed {seed}')
  size = size or model.networks.resolution
  with console.progress('step', compiles=True) as progress:
    images = model.draw(
      text, sampling, init=image, strength=strength, size=size, text_guidance=cfg_text,
      negative=negative, seed=[seed + n for n in range(num)],
      batch_size=min(num, batch_size or 4 * model.mesh.size), progress=progress,
    )  # fmt: skip
  settings = {
    'text': text, 'ckpt': str(ckpt), 'init': init and str(init), 'strength': init and strength,
    'size': size, 'steps': steps, 'sampler': sampler, 'cfg_text': cfg_text, 'negative': negative,
    'index': 0, 'dtype': model.dtype,
  }  # fmt: skip
  for n, (path, drawn) in enumerate(zip(outputs, images, strict=True)):
    console.save(drawn, path, settings | {'seed': seed + n})


def _check(text, negative, cfg_text, sampling, strength, last_seed) -> None:
  """Refuses wrong values before loading. `strength` is None without an image."""
  from ip2p_jax.pipeline.sampling import check_acts
  from ip2p_jax.pipeline.text_to_image import check_strength

  if not text.strip():
    raise InputError('the text is empty; say what to draw, such as "a photo of a lake".')
  if len(text) + len(negative) > MAX_TEXT:
    raise InputError(f'the texts are over {MAX_TEXT:,} characters; the model reads 77 tokens.')
  if last_seed > MAX_SEED:
    raise InputError(f'--seed with --num goes past {MAX_SEED}; use a lower seed.')
  check_acts(sampling, cfg_text, cfg_text, negative)
  if strength is not None:
    check_strength(sampling.steps, strength)


def _check_outputs(outputs: list[Path], init: Path | None) -> None:
  from ip2p_jax.images import check_writable

  for path in outputs:
    if init is not None and path.exists() and path.samefile(init):
      raise InputError(f'--output {path} is the image of --init; give another name.')
    check_writable(path)
