"""InstructPix2Pix in JAX: `Editor.load(path).edit(picture, 'make it winter')`."""

from ip2p_jax.editor import Editor, Sampling
from ip2p_jax.errors import InputError

__all__ = ['Editor', 'InputError', 'Sampling']
