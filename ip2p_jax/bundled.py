"""The checkpoint that comes along: the miniature, which edits drawn scenes of 64 x 64 pixels.

In a checkout it lies in `assets/miniature`; an installed package has it under its environment's
`share/ip2p-jax`. `examples/miniature` is how it was made.
"""

import json
import os
import site
import sysconfig
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ip2p_jax.errors import InputError

# Its own best, where `Editor.edit` has those of Stable Diffusion's size.
STEPS, TEXT_GUIDANCE, IMAGE_GUIDANCE, SAMPLER = 30, 2.0, 1.2, 'euler'

ARCHITECTURE = (
  'sample_size', 'in_channels', 'block_out_channels', 'layers_per_block', 'cross_attention_dim',
)  # fmt: skip
SHARE = Path('share', 'ip2p-jax', 'miniature')
FOLDERS = (
  Path(__file__).parent.parent / 'assets' / 'miniature',
  Path(sysconfig.get_path('data')) / SHARE,
  Path(site.getuserbase()) / SHARE,  # of pip install --user
)


def path() -> Path:
  """Its diffusers folder; InputError if it did not come along."""
  for folder in FOLDERS:
    if (folder / 'model_index.json').is_file():
      return folder
  raise InputError(
    f'the bundled miniature is not in {" or ".join(map(str, FOLDERS[:2]))}; name a checkpoint'
    ' (--ckpt), or run from a whole clone of the repository.'
  )


def is_it(ckpt: str | os.PathLike | None) -> bool:
  """Whether `ckpt` is the bundled one: none is named, or its own folder, however it is reached."""
  return ckpt is None or Path(ckpt).resolve() in [folder.resolve() for folder in FOLDERS]


def is_like_it(ckpt: str | os.PathLike | None) -> bool:
  """Whether `ckpt` is for drawn scenes as the bundled one is, so that its settings are the best.

  That is told by the UNet's architecture, since a copy, a converted file, and the workdir of an
  editor that was trained in the drawn world are as good. A file that cannot be read is not.
  """
  if is_it(ckpt):
    return True
  own = [_architecture(folder) for folder in FOLDERS if folder.is_dir()]
  return _architecture(Path(ckpt)) in list(filter(None, own))


def _architecture(ckpt: Path) -> dict[str, Any]:
  """What the UNet's config says of its shape; {} if there is none to read."""
  try:
    if ckpt.suffix == '.safetensors':  # as `ip2p convert` writes it
      with safe_open(ckpt, 'np') as file:
        config = json.loads(file.metadata()['ip2p_jax'])['configs']['unet']
    elif (ckpt / 'unet').is_dir():
      config = json.loads((ckpt / 'unet' / 'config.json').read_bytes())
    else:  # the workdir of a run
      config = json.loads((ckpt / 'base' / 'configs.json').read_bytes())['unet']
    return {key: config[key] for key in ARCHITECTURE}
  except (OSError, ValueError, KeyError, TypeError, SafetensorError):
    return {}
