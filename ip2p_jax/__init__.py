"""InstructPix2Pix in JAX: `Editor.load(path).edit(image, 'make it winter')`."""

import importlib

from ip2p_jax.errors import InputError

# Imported on first use: jax takes a second to load, and processes that only decode need none of it.
LATE = {
  'Editor': 'ip2p_jax.editing.editor',
  'Sampling': 'ip2p_jax.pipeline.sampling',
  'TextToImage': 'ip2p_jax.pipeline.text_to_image',
}
__all__ = ['Editor', 'InputError', 'Sampling', 'TextToImage']


def __getattr__(name: str):
  if name not in LATE:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(LATE[name]), name)
