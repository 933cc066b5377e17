"""Scores of pixels are scikit-image's, and pixels that do not count do not matter."""

import jax
import numpy as np
import pytest

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import scores

METRICS = {name: jax.jit(getattr(scores, name)) for name in ('l1', 'mse', 'psnr', 'ssim')}


@pytest.fixture
def pairs(rng):
  """20 pairs of images and noisy copies, from little to much noise."""
  colours = rng.random((20, 8, 9, 3), np.float32).repeat(6, 1).repeat(6, 2)
  noise = np.linspace(0.01, 0.5, 20, dtype=np.float32)[:, None, None, None]
  noisy = colours + noise * rng.standard_normal(colours.shape, np.float32)
  return colours, np.clip(noisy, 0, 1)


@pytest.fixture
def where(rng):
  return np.float32(rng.random((20, 48, 54, 1)) < 0.7)


def test_l1_and_mse_are_those_of_numpy(pairs):
  difference = np.float64(pairs[0]) - pairs[1]
  np.testing.assert_allclose(METRICS['l1'](*pairs), abs(difference).mean((1, 2, 3)), rtol=1e-5)
  np.testing.assert_allclose(METRICS['mse'](*pairs), (difference**2).mean((1, 2, 3)), rtol=1e-5)


def test_psnr_and_ssim_are_those_of_scikit_image(pairs):
  metrics = pytest.importorskip('skimage.metrics')
  options = {
    'channel_axis': -1, 'data_range': 1, 'gaussian_weights': True, 'sigma': 1.5,
    'use_sample_covariance': False,
  }  # fmt: skip
  doubles = list(zip(*map(np.float64, pairs), strict=True))
  psnr = [metrics.peak_signal_noise_ratio(*pair, data_range=1) for pair in doubles]
  ssim = [metrics.structural_similarity(*pair, **options) for pair in doubles]
  np.testing.assert_allclose(METRICS['psnr'](*pairs), psnr, rtol=1e-5)
  np.testing.assert_allclose(METRICS['ssim'](*pairs), ssim, rtol=1e-5)


@pytest.mark.parametrize('name', METRICS)
def test_all_pixels_counting_is_the_plain_score(name, pairs, where):
  metric = METRICS[name]
  np.testing.assert_allclose(metric(*pairs), metric(*pairs, np.ones_like(where)), rtol=1e-5)


@pytest.mark.parametrize('name', METRICS)
def test_other_pixels_do_not_matter(name, pairs, where, rng):
  images, others = pairs
  changed = np.where(where > 0, others, rng.random(others.shape, np.float32))
  masked = METRICS[name](images, others, where)
  np.testing.assert_allclose(masked, METRICS[name](images, changed, where), rtol=1e-5)
  assert (masked != METRICS[name](images, others)).all()


@pytest.mark.parametrize('name', METRICS)
def test_no_pixel_has_no_score(name, pairs, where):
  assert np.isnan(METRICS[name](*pairs, np.zeros_like(where))).all()


def test_zeros_flatter_psnr_by_the_share_of_pixels(pairs, where):
  """The quirk of PIE-Bench: 10 log10(1 / share) dB."""
  images, others = (scores.zeroed(x, where) for x in pairs)
  gain = METRICS['psnr'](images, others) - METRICS['psnr'](*pairs, where)
  np.testing.assert_allclose(gain, -10 * np.log10(where.mean((1, 2, 3))), rtol=1e-4)


def test_equal_images_are_perfect(pairs):
  images = pairs[0]
  assert (METRICS['psnr'](images, images) == np.inf).all()
  np.testing.assert_allclose(METRICS['ssim'](images, images), 1, rtol=1e-6)


def test_ssim_needs_a_window():
  small = np.zeros((1, 10, 20, 3), np.float32)
  with pytest.raises(InputError, match='20x10; SSIM needs 11x11'):
    scores.ssim(small, small)
