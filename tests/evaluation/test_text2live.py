"""Text2LIVE: its losses, views and optimizer are the published ones, and it edits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import tiny_models
import torch_models as reference
from flax import nnx

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import text2live_losses as losses
from ip2p_jax.evaluation import text2live_views as views
from ip2p_jax.evaluation.text2live import Text2Live
from ip2p_jax.evaluation.text2live_settings import TEMPLATES, Settings, Texts, optimizer
from ip2p_jax.pipeline.clip_scores import MEAN, STD, Clip

torch, transformers = peers.module('torch'), peers.module('transformers')

SIDE = 32  # of the small CLIP
SMALL = Settings(levels=2, width=4, steps=3, views=2, whole_every=2, templates=('{}', 'a {}'))
TEXTS = Texts('a red star', 'a blue star', 'blue star')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  tiny_models.write_clip(folder, SIDE)
  return folder


@pytest.fixture(scope='module')
def clip(folder):
  return Clip.load(folder)


@pytest.fixture(scope='module')
def vision(clip):
  return nnx.merge(clip.towers.vision_def, clip.params['vision'])


@pytest.fixture
def their_clip(folder):
  return transformers.CLIPModel.from_pretrained(folder, attn_implementation='eager').eval()


def normed(images):
  return reference.nchw((images - MEAN) / STD)


def cosines(x, y):
  unit = torch.nn.functional.normalize
  return unit(x, dim=-1) @ unit(y, dim=-1).T


# Losses.


def test_distances_to_texts_are_those_of_torch(rng):
  images, texts = rng.standard_normal((2, 3, 8)).astype(np.float32)
  weights = np.float32([0.5, 0.25, 0.25])
  unit = torch.nn.functional.normalize
  x, y = (unit(torch.from_numpy(a), dim=-1) for a in (images, texts))
  angles = (x[:, None] - y[None]).norm(dim=-1).div(2).arcsin().pow(2).mul(2)
  expected = (angles.mean(0) * torch.from_numpy(weights)).sum()
  np.testing.assert_allclose(losses.spherical(images, texts, weights), expected, rtol=1e-5)


def test_directions_are_those_of_torch(rng):
  edits, sources, changes = rng.standard_normal((3, 4, 8)).astype(np.float32)
  weights = np.float32([0.5, 0.5, 0, 0])
  x, y = torch.from_numpy(edits - sources), torch.from_numpy(changes)
  expected = ((1 - cosines(x, y)).mean(0) * torch.from_numpy(weights)).sum()
  ours = losses.direction(edits, sources, changes, weights)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_embeddings_and_structure_are_those_of_transformers(vision, their_clip, rng):
  images = rng.random((2, SIDE, SIDE, 3), np.float32)
  with torch.no_grad():
    out = their_clip.vision_model(normed(images), output_hidden_states=True)
    embedded = their_clip.visual_projection(out.pooler_output)
    expected = torch.square(
      cosines(*(out.hidden_states[-2][0],) * 2) - cosines(*(out.hidden_states[-2][1],) * 2)
    ).mean()
  np.testing.assert_allclose(losses.embed(vision, images), embedded, rtol=1e-5, atol=1e-5)
  ours = losses.structure(*losses.tokens(vision, images))
  np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_relevancy_is_that_of_torch(vision, their_clip, rng):
  image, text = rng.random((SIDE, SIDE, 3), np.float32), rng.standard_normal(20, np.float32)
  out = their_clip.vision_model(normed(image[None]), output_attentions=True)
  attention = out.attentions[-1]
  embedded = their_clip.visual_projection(out.pooler_output)
  logit = 100 * cosines(embedded, torch.from_numpy(text)[None])[0, 0]
  (gradient,) = torch.autograd.grad(logit, attention)
  cam = (gradient * attention).clamp(min=0).mean(1)[0]
  identity = torch.eye(len(cam))
  seen = (identity + cam @ identity)[0, 1:].reshape(1, 1, SIDE // 8, SIDE // 8)
  seen = torch.nn.functional.interpolate(seen, (SIDE, SIDE), mode='bilinear')[0, 0]
  expected = ((seen - seen.min()) / (seen.max() - seen.min())).detach()
  ours = jax.jit(lambda image, text: losses.relevancy(vision, image, text))(image, text)
  np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_sparsity_is_that_of_torch(rng):
  opacity = rng.random((5, 6), np.float32)
  x = torch.from_numpy(opacity)
  expected = 0.01 * x.mean() + 0.01 * (2 * (torch.sigmoid(5 * x) - 0.5)).mean()
  np.testing.assert_allclose(losses.sparsity(opacity), expected, rtol=1e-5)


def test_an_empty_layer_leaves_the_image_and_its_structure(vision, rng):
  image = rng.random((SIDE, SIDE, 3), np.float32)
  layer = np.concatenate([rng.random((SIDE, SIDE, 3), np.float32), image[..., :1] * 0], -1)
  edit = losses.composite(layer, image)
  np.testing.assert_array_equal(edit, image)
  assert losses.structure(*losses.tokens(vision, np.stack([edit, image]))) == 0
  slope = jax.grad(lambda x: losses.structure(*losses.tokens(vision, jnp.stack([x, image]))))
  assert np.isfinite(jax.jit(slope)(image)).all()


def test_a_region_adds_a_loss(vision):
  texts = {name: jnp.ones((2, 20)) for name in ('source', 'edited', 'layer')}

  def names(region):
    layer, image = jnp.zeros((20, 24, 4)), jnp.zeros((20, 24, 3))
    rest = jax.random.key(0), jnp.zeros(3), 2, SIDE
    of_layer = lambda: losses.of_layer(vision, layer, image, texts | {'region': region}, *rest)
    return set(jax.eval_shape(of_layer))

  assert names(None) == {'composition', 'screen', 'structure', 'sparsity'}
  assert names(jnp.ones(20)) == names(None) | {'bootstrap'}


def test_texts_are_drawn_as_shares():
  keys = jax.random.split(jax.random.key(0), 2000)
  weights = jax.vmap(lambda key: losses.drawn_weights(key, 3))(keys)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.03)
  # One text alone: always if one is drawn, else 1 in 3 of two, and 1 in 9 of three.
  np.testing.assert_allclose((weights.max(1) > 0.99).mean(), (1 + 1 / 3 + 1 / 9) / 3, atol=0.04)


# Views.


def still(count):
  """Views that show the whole image as it is."""
  same = jnp.tile(jnp.eye(3), (count, 1, 1))
  crops, colours = (jnp.tile(jnp.float32(row), (count, 1)) for row in ([1, 1, 0, 0], [1, 1, 1, 0]))
  return views.Views(crops, same, same, colours, jnp.zeros(count, bool))


def test_a_view_without_changes_is_the_image(rng):
  image = rng.random((6, 8, 3), np.float32)
  look = jax.jit(views.look, static_argnums=2)
  np.testing.assert_allclose(look(image, still(1), (6, 8))[0], image, atol=1e-5)


def test_geometry_is_that_of_torch(rng):
  """Of an image without white, so that only places inside the view and the image count."""
  image = 0.9 * rng.random((12, 16, 3), np.float32)
  turns = views.turned(jnp.float32([0.2]), jnp.float32([[0.1, -0.15]]))
  ends = views.CORNERS[None] * (1 - 0.4 * rng.random((1, 4, 2)).astype(np.float32))
  bends = views.homographies(ends, views.CORNERS)
  some = still(1)._replace(
    crops=jnp.float32([[-0.7, 0.6, 0.2, -0.1]]), turns=turns, perspectives=bends
  )
  ours = np.asarray(views.look(image, some, (10, 10))[0])
  matrix = np.float32([[-0.7, 0, 0.2], [0, 0.6, -0.1], [0, 0, 1]]) @ turns[0] @ bends[0]
  axis = (np.arange(10) + 0.5) / 5 - 1
  places = np.stack([*np.meshgrid(axis, axis), np.ones((10, 10))], -1).astype(np.float32)
  moved = places @ np.asarray(matrix).T
  grid = torch.from_numpy(moved[..., :2] / moved[..., 2:])[None]
  expected = reference.nhwc(
    torch.nn.functional.grid_sample(
      reference.nchw(image[None]), grid, 'bilinear', 'border', align_corners=False
    )
  )[0]
  is_white = (ours == 1).all(-1)
  assert 10 < is_white.sum() < 80
  np.testing.assert_allclose(ours[~is_white], expected[~is_white], atol=1e-4)


def test_a_perspective_moves_its_corners(rng):
  ends = views.CORNERS[None] * (1 - 0.4 * rng.random((3, 4, 2)).astype(np.float32))
  moved = views._moved(views.homographies(ends, views.CORNERS), jnp.asarray(ends)[:, None])
  np.testing.assert_allclose(moved, np.tile(views.CORNERS, (3, 1, 1, 1)), atol=1e-4)


def test_hue_is_that_of_hsv(rng):
  import colorsys

  images = rng.random((1, 4, 5, 3), np.float32)
  images[0, 0] = 0.4  # greys
  expected = [
    colorsys.hsv_to_rgb((h + 0.07) % 1, s, v)
    for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in images.reshape(-1, 3).tolist())
  ]
  ours = views.with_hue(jnp.asarray(images), jnp.full((1, 1, 1), 0.07))
  np.testing.assert_allclose(ours.reshape(-1, 3), expected, atol=1e-5)


def test_views_have_finite_gradients(rng):
  image = rng.random((SIDE, SIDE, 3), np.float32)
  image[:9] = 0.5  # greys have no hue

  @jax.jit
  @jax.grad
  def slope(image):
    return (views.look(image, views.draw(jax.random.key(1), 12), (SIDE, SIDE)) ** 2).sum()

  gradient = slope(image)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_draws_stay_in_their_ranges():
  drawn = jax.jit(views.draw, static_argnums=1)(jax.random.key(2), 500)
  drawn = views.Views(*map(np.asarray, drawn))
  half, centre = np.abs(drawn.crops[:, :2]), np.abs(drawn.crops[:, 2:])
  assert half[0].tolist() == [1, 1]
  assert half.min() >= 0.6 and (half + centre).max() <= 1 + 1e-6
  np.testing.assert_allclose((drawn.crops[:, 0] < 0).mean(), 0.5, atol=0.1)
  np.testing.assert_allclose(drawn.is_grey.mean(), 0.15, atol=0.06)
  moves = lambda matrices: (np.asarray(matrices) != np.eye(3)).any((1, 2)).mean()
  np.testing.assert_allclose((moves(drawn.turns), moves(drawn.perspectives)), (0.8, 0.5), atol=0.1)
  np.testing.assert_allclose((drawn.colours[:, 3] != 0).mean(), 0.7, atol=0.1)
  assert (np.abs(drawn.colours - np.float32([[1, 1, 1, 0]])) <= 0.1 + 1e-6).all()


# The course of a training.


def test_the_optimizer_is_the_published_one(rng):
  """Defazio and Jelassi 2021, algorithm 1; like the authors' code, with eps in the rate."""
  settings = Settings(learning_rate=0.1, decay=0.5, least_rate=0.02)
  start, gradients = rng.standard_normal(5), rng.standard_normal((6, 5))
  x, s, v = start, 0, 0
  for k, gradient in enumerate(gradients):
    gradient = gradient + settings.weight_decay * x
    step = (max(0.1 * 0.5**k, 0.02) + 1e-6) * np.sqrt(k + 1)
    s, v = s + step * gradient, v + step * gradient**2
    x = 0.9 * x + 0.1 * (start - s / (np.cbrt(v) + 1e-6))
  ours = optimizer(settings)
  params, state = jnp.float32(start), ours.init(jnp.float32(start))
  for gradient in gradients:
    updates, state = ours.update(jnp.float32(gradient), state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params, x, rtol=1e-4)


def test_the_templates_are_the_published_ones():
  assert len(TEMPLATES) == 14 and all(form.count('{}') == 1 for form in TEMPLATES)


@pytest.mark.long
def test_an_edit_depends_on_texts_and_seed(clip, rng):
  image = rng.integers(0, 256, (20, 24, 3), np.uint8)
  method, seen = Text2Live(clip, SMALL), []
  edit = method.edit(image, TEXTS, report=lambda step, found: seen.append((step, *found)))
  assert [step for step, *_ in seen] == [0, 1, 2]
  assert edit.image.shape == image.shape and edit.layer.shape == (20, 24, 4)
  np.testing.assert_array_equal(method.edit(image, TEXTS).image, edit.image)
  assert not np.array_equal(method.edit(image, TEXTS, seed=1).layer, edit.layer)
  assert not np.array_equal(method.edit(image, TEXTS._replace(layer='a dog')).layer, edit.layer)


def test_a_wrong_image_or_text_is_refused(clip):
  method = Text2Live(clip, SMALL)
  with pytest.raises(InputError, match='the image is 4 x 20; 2 levels need 5 pixels a side'):
    method.edit(np.zeros((20, 4, 3), np.uint8), TEXTS)
  with pytest.raises(InputError, match="the text 'edited' is empty"):
    method.edit(np.zeros((20, 20, 3), np.uint8), TEXTS._replace(edited=' '))
