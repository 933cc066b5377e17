"""InstructPix2Pix in JAX: `Editor.load(path).edit(picture, 'make it winter')`."""

from ip2p_jax.errors import InputError

__all__ = ['Editor', 'InputError', 'Sampling']


def __getattr__(name: str):
  # Late, since processes that only decode pictures need no jax, which takes a second to load.
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from ip2p_jax.editing import editor

  return getattr(editor, name)
