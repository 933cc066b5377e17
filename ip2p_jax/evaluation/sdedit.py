"""Editing by a model that was not trained to edit (SDEdit, Meng et al. 2022), for comparison.

A text-to-image checkpoint gets the image's latents with noise of an intermediate level, and
denoises them with the caption of the edited image.
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
  seed: int | Sequence[int] = 0,
  indices: Sequence[int] | None = None,
) -> np.ndarray:
  """Edits images uint8 [B, H, W, 3] so that they show what the captions say.

  `strength` is the fraction of the steps that run, as in `text_to_image.first_step`; 0 returns the
  autoencoder's reconstruction. `seed` and `indices` decide the noise, as in `Editor.edit`.
  """
  drawn = model.draw_arrays(
    captions, Sampling(steps, SAMPLER), images=images, strength=strength,
    text_guidance=text_guidance, seeds=seed, indices=indices,
  )  # fmt: skip
  return np.asarray(drawn.images)
