"""The bundled checkpoint: the miniature, which edits drawn scenes of 64 x 64 pixels.

A checkout has it in `assets/miniature`. An installed package has it in `share/ip2p-jax` of its
environment. `examples/miniature` makes it.
"""

import json
import os
import site
import sysconfig
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ip2p_jax.errors import InputError

# The best settings of the miniature. The defaults of `Editor.edit` are for Stable Diffusion.
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
  """The diffusers folder of the miniature; InputError if it is not installed."""
  for folder in FOLDERS:
    if (folder / 'model_index.json').is_file():
      return folder
  raise InputError(
    f'the bundled miniature is not in {" or ".join(map(str, FOLDERS[:2]))}; name a checkpoint'
    ' (--ckpt), or run from a whole clone of the repository.'
  )


def is_it(ckpt: str | os.PathLike | None) -> bool:
  """Whether `ckpt` is the bundled checkpoint: None, or any path to its folder."""
  return ckpt is None or Path(ckpt).resolve() in [folder.resolve() for folder in FOLDERS]


def is_like_it(ckpt: str | os.PathLike | None) -> bool:
  """Whether the settings of the bundled checkpoint are best for `ckpt`, too.

  The UNet's architecture decides. So a copy, a converted file, and the workdir of an editor of
  drawn scenes count. A file that cannot be read does not.
  """
  if is_it(ckpt):
    return True
  own = [_architecture(folder) for folder in FOLDERS if folder.is_dir()]
  return _architecture(Path(ckpt)) in list(filter(None, own))


def _architecture(ckpt: Path) -> dict[str, Any]:
  """The shape of the UNet by its config; {} if no config can be read."""
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
