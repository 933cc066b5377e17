"""CLIP's four scores of a pair; this file needs no CLIP, so that it loads fast."""

from typing import Any, NamedTuple


class Scores(NamedTuple):
  """Cosines, each [B] or one number, named as in the original's metadata."""

  clip_sim_0: Any  # first image and its caption
  clip_sim_1: Any  # second image and its caption
  clip_sim_dir: Any  # difference of the images and of the captions (Gal et al. 2021)
  clip_sim_image: Any  # both images
