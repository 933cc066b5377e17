"""The checkpoint that comes along: the miniature, which edits drawn scenes of 64 x 64 pixels.

In a checkout it lies in `assets/miniature`; an installed package has it under its environment's
`share/ip2p-jax`. `examples/miniature` is how it was made.
"""

import os
import site
import sysconfig
from pathlib import Path

from ip2p_jax.errors import InputError

# Its own best, where `Editor.edit` has those of Stable Diffusion's size.
STEPS, TEXT_GUIDANCE, IMAGE_GUIDANCE, SAMPLER = 30, 2.0, 1.2, 'euler'

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
  """Whether `ckpt` is the bundled one: none is named, or its own folder."""
  return ckpt is None or Path(ckpt).absolute() in FOLDERS
