"""Editing by a layer that is trained for one image (Text2LIVE, Bar-Tal et al. 2022), to compare.

A small generator draws colours and opacity over the image, until CLIP finds the texts in it. The
defaults are those of the released code (omerbt/Text2LIVE). Four things differ. Crops are resampled
to the image's own size, so its random scale of 0.8 to 1.2 is missing. A view's geometry is one
look-up instead of three. Views are square, as CLIP's own input. Colours change in a fixed order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import text2live_losses as losses
from ip2p_jax.evaluation import text2live_views as views
from ip2p_jax.evaluation.text2live_settings import Settings, Texts, optimizer
from ip2p_jax.models.layers import Keys, Params, abstract
from ip2p_jax.models.text2live import LayerGenerator, least_side
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.xla_alarms import quietly


class Edit(NamedTuple):
  """The edited image uint8 [H, W, 3]; the layer float32 [H, W, 4] in 0..1, opacity last."""

  image: np.ndarray
  layer: np.ndarray


class Text2Live:
  """A CLIP and settings, compiled once per size of image."""

  def __init__(self, clip: Clip, settings: Settings = Settings()):
    self.clip, self.settings = clip, settings
    self.generator_def, _ = abstract(self._generator)
    self.optimizer = optimizer(settings)
    self._begin, self._draw, self._embed, self._gradients, self._update = (
      jax.jit(f) for f in (self._begin, self._draw, self._embed, self._gradients, self._update)
    )

  def edit(
    self,
    image: np.ndarray,
    texts: Texts,
    seed: int = 0,
    report: Callable[[int, dict[str, Array]], None] = lambda step, losses: None,
  ) -> Edit:
    """Trains a layer for an image uint8 [H, W, 3]; the authors' images have a short side of 512.

    `report` gets the number of each step, from 0, and its losses of the crop, not weighted. Raises
    InputError if the image is too small for the levels, or a text is empty.
    """
    least = least_side(self.settings.levels)
    if min(image.shape[:2]) < least:
      raise InputError(
        f'the image is {image.shape[1]} x {image.shape[0]}; {self.settings.levels} levels need'
        f' {least} pixels a side, so give a larger image or fewer levels.'
      )
    key, pixels = jax.random.key(seed, impl='threefry2x32'), jnp.float32(image) / 255
    targets = self._targets(texts)
    state = quietly(self._begin, key)
    for step in range(self.settings.steps):
      is_whole = (False, True) if step % self.settings.whole_every == 0 else (False,)
      found = [quietly(self._gradients, state[0], self.clip.params, pixels, targets,
                       jax.random.fold_in(key, 2 * step + i + 1), step, whole)
               for i, whole in enumerate(is_whole)]  # fmt: skip
      state = quietly(self._update, state, *(gradients for _, gradients in found))
      report(step, found[0][0])
    edited, layer = quietly(self._draw, state[0], pixels)
    return Edit(np.asarray(edited), np.asarray(layer))

  def _targets(self, texts):
    """Embedded texts by name: [T, P] by their templates, the region [P] or None."""
    for name in ('source', 'edited', 'layer'):
      if not getattr(texts, name).strip():
        raise InputError(f'the text {name!r} is empty; give a caption.')
    plain, screen = self.settings.templates, self.settings.screen_templates
    embed = lambda text, forms: self._embed(
      self.clip.params, self.clip.tokenizer([form.format(text) for form in forms])
    )
    return {
      'source': embed(texts.source, plain),
      'edited': embed(texts.edited, plain),
      'layer': embed(texts.layer, screen),
      'region': embed(texts.region, ['{}'])[0] if texts.region else None,
    }

  def _embed(self, params, token_ids):
    return nnx.merge(self.clip.towers.text_def, params['text']).embed(token_ids)

  def _generator(self, keys):
    return LayerGenerator(self.settings.levels, self.settings.width, self.settings.skip, rngs=keys)

  def _begin(self, key) -> tuple[Params, optax.OptState]:
    params = nnx.to_pure_dict(nnx.split(self._generator(Keys(jax.random.fold_in(key, 0))))[1])
    return params, self.optimizer.init(params)

  def _draw(self, params, image):
    layer = nnx.merge(self.generator_def, params)(image[None])[0]
    return jnp.round(losses.composite(layer, image) * 255).astype(jnp.uint8), layer

  def _gradients(self, params, clip_params, image, targets, key, step, is_whole):
    """(losses by name, gradients of their weighted sum) of a crop, or of the whole image."""
    given, keys = self.settings, jax.random.split(key)
    crop = views.look(image, views.draw_example(keys[0]), image.shape[:2])[0]
    image = jnp.where(is_whole, image, crop)
    vision = nnx.merge(self.clip.towers.vision_def, clip_params['vision'])
    side, screen = self.clip.towers.image_size, jnp.float32(given.screen_colour)
    fading = jnp.maximum(1 - (step + 1) / given.bootstrap_steps, 0)

    def loss(params):
      layer = nnx.merge(self.generator_def, params)(image[None])[0]
      found = losses.of_layer(vision, layer, image, targets, keys[1], screen, given.views, side)
      weights = given._replace(bootstrap=given.bootstrap * fading)
      return sum(getattr(weights, name) * value for name, value in found.items()), found

    gradients, found = jax.grad(loss, has_aux=True)(params)
    return found, gradients

  def _update(self, state, *gradients):
    """The state after a step along the mean of gradients."""
    params, moments = state
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    updates, moments = self.optimizer.update(mean, moments, params)
    return optax.apply_updates(params, updates), moments
