"""Editing without having learned to edit (SDEdit, Meng et al. 2022), to compare with.

A text-to-image checkpoint gets the image's latents with noise added up to a part of the way, and
denoises them with the caption of what should be seen.
"""

from collections.abc import Sequence

import numpy as np

from ip2p_jax.pipeline.sampling import Sampling
from ip2p_jax.pipeline.text_to_image import TextToImage

SAMPLER = 'euler_ancestral'


def edit(
  model: TextToImage,
  images: np.ndarray,
  captions: Sequence[str],
  *,
  strength: float,
  text_guidance: float,
  steps: int = 30,
  seed: int = 0,
  indices: Sequence[int] | None = None,
) -> np.ndarray:
  """Edits uint8 [B, H, W, 3] to what the captions say.

  `strength` of the steps are done, as `text_to_image.first_step` says; 0 gives back the image as
  the autoencoder sees it. `seed` and `indices` decide the noise, as in `Editor.edit`.
  """
  drawn = model.draw_arrays(
    captions, Sampling(steps, SAMPLER), images=images, strength=strength,
    text_guidance=text_guidance, seeds=seed, indices=indices,
  )  # fmt: skip
  return np.asarray(drawn.images)
