"""The four numbers that CLIP has for a pair; without CLIP, so that it is read in no time."""

from typing import Any, NamedTuple


class Scores(NamedTuple):
  """Cosines, each [B] or one number, named as in the original's metadata."""

  clip_sim_0: Any  # first image and its caption
  clip_sim_1: Any  # second image and its caption
  clip_sim_dir: Any  # difference of the images and of the captions (Gal et al. 2021)
  clip_sim_image: Any  # both images
