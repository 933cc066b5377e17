"""Pixels in and out of a network's range, and noise that is given or drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax.diffusion import noise
from ip2p_jax.diffusion.samplers import SAMPLERS, STOCHASTIC
from ip2p_jax.pipeline import parts

LEVELS = np.arange(256, dtype=np.uint8)


def test_every_level_comes_back():
  decoded = parts.to_model_range(jnp.asarray(LEVELS))
  assert decoded.dtype == jnp.float32 and decoded[0] == -1 and decoded[-1] == 1
  np.testing.assert_array_equal(parts.to_uint8(decoded), LEVELS)
  np.testing.assert_array_equal(parts.unit_to_uint8(parts.to_unit_range(decoded)), LEVELS)


def test_values_out_of_range_are_clipped_and_others_rounded():
  decoded = jnp.float32([-3, -1 + 0.6 / 127.5, -1 + 1.4 / 127.5, 1.01, 9])
  for images in (parts.to_uint8(decoded), parts.unit_to_uint8(parts.to_unit_range(decoded))):
    np.testing.assert_array_equal(images, np.uint8([0, 1, 1, 255, 255]))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_step_noise_is_drawn_taken_or_none(sampler, rng):
  shape, keys = (2, 2, 4), noise.image_keys(np.full(3, 7), np.arange(3))
  step_noise = rng.standard_normal((5, 3, *shape), np.float32)
  drawn, taken = (parts.step_noise(sampler, keys, 2, shape, some) for some in (None, step_noise))
  if sampler not in STOCHASTIC:
    assert drawn is None and taken is None
    return
  np.testing.assert_array_equal(drawn, noise.step_noise(keys, 2, shape))
  np.testing.assert_array_equal(taken, step_noise[2])
