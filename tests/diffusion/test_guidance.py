"""Two-scale guidance: fewer branches give the same result as all three."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from ip2p_jax.diffusion.guidance import BRANCHES, branches, combine

torch = peers.module('torch')
rescale_noise_cfg = peers.module(
  'diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion'
).rescale_noise_cfg


@pytest.fixture
def predictions(rng):
  return rng.standard_normal((3, 2, 4, 4, 4), dtype=np.float32)  # in the order of BRANCHES


def guided(predictions, text_guidance, image_guidance):
  """InstructPix2Pix, equation 3, in float64."""
  both, image, neither = predictions.astype(np.float64)
  s_T, s_I = (np.reshape(s, (-1, 1, 1, 1)) for s in (text_guidance, image_guidance))
  return neither + s_I * (image - neither) + s_T * (both - image)


def chosen(predictions, names):
  return jnp.asarray(predictions[[BRANCHES.index(name) for name in names]])


CASES = [
  (7.5, 1.5, ('text_and_image', 'image', 'unconditional')),
  (7.5, 1.0, ('text_and_image', 'image')),
  (1.5, 1.5, ('text_and_image', 'unconditional')),
  (1.0, 1.0, ('text_and_image',)),
  (0.0, 1.0, ('image',)),
  (0.0, 0.0, ('unconditional',)),
  (0.0, 1.5, ('image', 'unconditional')),
  ([7.5, 7.5], [1.0, 1.5], ('text_and_image', 'image', 'unconditional')),
  ([7.5, 1.0], [1.0, 1.0], ('text_and_image', 'image')),
  ([1.1, 2.3], [1.1, 2.3], ('text_and_image', 'unconditional')),
]


@pytest.mark.parametrize(('text_guidance', 'image_guidance', 'expected'), CASES)
def test_only_needed_branches_run_and_the_result_is_the_same(
  predictions, text_guidance, image_guidance, expected
):
  text_guidance, image_guidance = np.array(text_guidance), np.array(image_guidance)
  names = branches(text_guidance, image_guidance)
  assert names == expected
  ours = jax.jit(combine, static_argnums=1)(
    chosen(predictions, names), names, text_guidance, image_guidance
  )
  np.testing.assert_allclose(ours, guided(predictions, text_guidance, image_guidance), atol=1e-5)


def test_guidance_of_one_is_the_conditional_prediction(predictions):
  np.testing.assert_array_equal(combine(predictions, BRANCHES, 1.0, 1.0), predictions[0])
  np.testing.assert_array_equal(
    combine(predictions[:1], ('text_and_image',), 1.0, 1.0), predictions[0]
  )


def test_each_image_may_have_its_own_scales(predictions):
  together = combine(predictions, BRANCHES, np.array([7.5, 3.0]), np.array([1.5, 1.0]))
  for i, scales in enumerate([(7.5, 1.5), (3.0, 1.0)]):
    alone = combine(predictions[:, i : i + 1], BRANCHES, *scales)
    np.testing.assert_array_equal(together[i : i + 1], alone)


def test_predictions_of_low_precision_are_combined_in_float32(predictions):
  low = jnp.asarray(predictions, jnp.bfloat16)
  ours = combine(low, BRANCHES, 7.5, 1.5)
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, guided(np.asarray(low, np.float32), 7.5, 1.5), atol=1e-5)


@pytest.mark.parametrize('rescale', [0.0, 0.7, 1.0])
def test_rescaling_agrees_with_diffusers(predictions, rescale):
  text = torch.tensor(predictions[0])
  expected = rescale_noise_cfg(torch.tensor(guided(predictions, 7.5, 1.5)), text, rescale)
  ours = jax.jit(combine, static_argnums=1)(predictions, BRANCHES, 7.5, 1.5, rescale)
  np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_rescaling_may_differ_between_images(predictions):
  ours = combine(predictions, BRANCHES, 7.5, 1.5, np.array([0.0, 1.0]))
  np.testing.assert_allclose(ours[0], guided(predictions, 7.5, 1.5)[0], atol=1e-5)
  np.testing.assert_allclose(ours[1].std(), predictions[0, 1].std(), rtol=1e-5)


def test_rescaling_needs_the_text_branch():
  assert branches(0.0, 1.5, rescale=0.5) == BRANCHES
  assert branches(0.0, 1.5, rescale=np.array([0.0, 0.5])) == BRANCHES
  assert branches(0.0, 1.5, rescale=0.0) == ('image', 'unconditional')


def test_changing_scales_does_not_recompile(predictions):
  traces = []

  @jax.jit
  def run(text_guidance, image_guidance, rescale):
    traces.append(1)
    return combine(predictions, BRANCHES, text_guidance, image_guidance, rescale)

  results = [run(7.5, 1.5, 0.1), run(3.0, 1.2, 0.7)]
  assert len(traces) == 1
  assert np.abs(results[0] - results[1]).max() > 0.1
