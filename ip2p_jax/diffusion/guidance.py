"""Guidance by the image and by the instruction, each with its own scale.

B batch, h w latent height and width, K branches. A branch is one condition of the network: text and
image, image alone, or neither. InstructPix2Pix, equation 3, regrouped:

  s_T * e(image, text) + (s_I - s_T) * e(image, none) + (1 - s_I) * e(none, none)

s_T is `text_guidance`, s_I is `image_guidance`. The three weights sum to one, so the formula holds
if e is the noise, the velocity or the denoised latents.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

BRANCHES = ('text_and_image', 'image', 'unconditional')
TEXT_AND_IMAGE, IMAGE, UNCONDITIONAL = BRANCHES
CONDITIONAL = (TEXT_AND_IMAGE,)  # the only branch without guidance


def branches(text_guidance, image_guidance, rescale=None) -> tuple[str, ...]:
  """The branches that are needed, in the order of BRANCHES: their weight is not 0 for some image.

  Scales are numbers or [B] numpy arrays, not traced. Equal scales, or an image guidance of 1, save
  one branch of three; both at 1 save two. A `rescale` other than None or 0 needs 'text_and_image'.
  """
  weights = _weights(np.float32(text_guidance), np.float32(image_guidance))
  used = {name for name in BRANCHES if np.any(weights[name] != 0)}
  if rescale is not None and np.any(rescale):
    used.add(TEXT_AND_IMAGE)
  return tuple(name for name in BRANCHES if name in used)


def combine(
  predictions: Array,
  branches: tuple[str, ...],
  text_guidance: Array,
  image_guidance: Array,
  rescale: Array | None = None,
) -> Array:
  """The guided prediction [B, h, w, 4] float32, from `predictions` [K, B, h, w, 4].

  K is in the order of `branches`. Scales are scalars or [B], traced or not. `rescale` in [0, 1],
  scalar or [B], moves the standard deviation of each image towards that of its 'text_and_image'
  prediction, against overexposure (Lin et al. 2023, section 3.4); None leaves out this arithmetic.
  """
  predictions = predictions.astype(jnp.float32)
  weights = _weights(_per_image(text_guidance), _per_image(image_guidance))
  guided = sum(weights[name] * predictions[k] for k, name in enumerate(branches))
  if rescale is None:
    return guided
  spread = lambda x: jnp.std(x, axis=(1, 2, 3), keepdims=True)  # [B, 1, 1, 1]
  aim = spread(predictions[branches.index(TEXT_AND_IMAGE)]) / spread(guided)
  rescale = _per_image(rescale)
  return (rescale * aim + 1 - rescale) * guided


def _weights(text_guidance, image_guidance):
  return {
    TEXT_AND_IMAGE: text_guidance,
    IMAGE: image_guidance - text_guidance,
    UNCONDITIONAL: 1 - image_guidance,
  }


def _per_image(scale):
  scale = jnp.asarray(scale, jnp.float32)
  return scale.reshape(-1, 1, 1, 1)  # [B or 1, 1, 1, 1]
