"""Thresholds of good pairs."""

from ip2p_jax.pipeline.scores import Scores

PAPER = Scores(0.2, 0.2, 0.2, 0.75)
RELEASED = Scores(0.2, 0.2, 0.2, 0.7)  # of the released data
MOST = 4  # pairs per prompt
