"""What Text2LIVE asks of an edit layer, by CLIP (Bar-Tal et al. 2022, section 3.1).

V views, T texts (templates), P width of the space that images and texts share, N tokens of an
image, S pixels of CLIP's side. Embeddings are CLIP's own, of any length; images are in 0..1.
`vision` is CLIP's vision tower.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ip2p_jax.evaluation import text2live_views as views
from ip2p_jax.models.clip import VisionEncoder
from ip2p_jax.pipeline.clip_scores import MEAN, STD


def of_layer(
  vision: VisionEncoder,
  layer: Array,
  image: Array,
  targets: dict[str, Array | None],
  key: Array,
  screen: Array,
  count: int,
  side: int,
) -> dict[str, Array]:
  """All losses of a layer [H, W, 4] for an image [H, W, 3], by name; `key` draws views and texts.

  Args:
    targets: embedded texts [T, P] 'source', 'edited' and 'layer'; 'region' [P], or None without it.
    screen: colour [3] behind the layer when it is seen alone.
    count: V, views of each of source, edit and screen.
    side: S.
  """
  edited, keys = composite(layer, image), jax.random.split(key, 6)
  alone = composite(layer, jnp.broadcast_to(screen, image.shape))
  seen = lambda key, image: views.look(image, views.draw(key, count), (side, side))
  sources = embed(vision, seen(keys[0], image))
  both = jnp.concatenate([seen(keys[1], edited), seen(keys[2], alone)])
  edits, screens = jnp.split(embed(vision, both), 2)
  changes = targets['edited'] - targets['source']
  weights = [
    drawn_weights(key, len(texts))
    for key, texts in zip(keys[3:], (changes, changes, targets['layer']), strict=True)
  ]
  whole = jnp.stack([_resized(edited, side), _resized(image, side)])
  found = {
    'composition': spherical(edits, targets['edited'], weights[0])
    + direction(edits, sources, changes, weights[1]),
    'screen': spherical(screens, targets['layer'], weights[2]),
    'structure': structure(*tokens(vision, whole)),
    'sparsity': sparsity(layer[..., 3]),
  }
  if targets['region'] is not None:
    wanted = relevancy(vision, whole[1], targets['region'])
    found['bootstrap'] = jnp.square(_resized(layer[..., 3:], side)[..., 0] - wanted).mean()
  return found


def composite(layer: Array, image: Array) -> Array:
  """The layer [H, W, 4] over an image [H, W, 3]."""
  colours, opacity = jnp.split(layer, (3,), -1)
  return (1 - opacity) * image + opacity * colours


def embed(vision: VisionEncoder, images: Array) -> Array:
  """[V, S, S, 3] -> [V, P]."""
  return vision((images - MEAN) / STD)


def tokens(vision: VisionEncoder, images: Array) -> Array:
  """[V, S, S, 3] -> states [V, N, C] that enter the last layer, the class token first."""
  model = vision.vision_model
  x = model.pre_layrnorm(model.embeddings((images - MEAN) / STD))
  for layer in model.encoder.layers[:-1]:
    x = layer(x, False)
  return x


def drawn_weights(key: Array, count: int) -> Array:
  """[T = count], sum 1: shares of 1 to T texts that are drawn with replacement."""
  count_key, key = jax.random.split(key)
  drawn = jax.random.randint(count_key, (), 1, count + 1)
  is_drawn = jnp.arange(count) < drawn
  places = jax.random.randint(key, (count,), 0, count)
  return jnp.zeros(count).at[places].add(is_drawn / drawn)


def spherical(images: Array, texts: Array, weights: Array) -> Array:
  """Half the squared angle, 2 arcsin(chord / 2)^2: mean over images [V, P] and texts [T, P].

  Texts count by their weights [T], of sum 1.
  """
  chords = unit(images)[:, None] - unit(texts)[None]
  lengths = jnp.sqrt(jnp.maximum((chords**2).sum(-1), 1e-16))  # [V, T]
  return (2 * jnp.arcsin(lengths / 2) ** 2).mean(0) @ weights


def direction(edits: Array, sources: Array, changes: Array, weights: Array) -> Array:
  """1 - cosine of the step from sources to edits [V, P] with the texts' step [T, P]."""
  return 1 - (unit(edits - sources) @ unit(changes).T).mean(0) @ weights


def structure(edit: Array, source: Array) -> Array:
  """Mean squared difference of the cosines between all tokens [N, C] of an image."""
  similarities = [unit(tokens) @ unit(tokens).T for tokens in (edit, source)]
  return jnp.square(similarities[0] - similarities[1]).mean()


def sparsity(opacity: Array) -> Array:
  """Small if few pixels are covered: L1 and an approximate L0."""
  return 0.01 * opacity.mean() + 0.01 * (2 * (jax.nn.sigmoid(5 * opacity) - 0.5)).mean()


def relevancy(vision: VisionEncoder, image: Array, text: Array) -> Array:
  """Where an image [S, S, 3] shows a text [P]: [S, S] in 0..1 (Chefer et al. 2021, equation 5).

  Attention of the class token in the last layer, times the gradient of the cosine by it; positive
  parts, mean of the heads.
  """
  model = vision.vision_model
  layer = model.encoder.layers[-1]
  x = tokens(vision, image[None])
  attention, y = layer.self_attn, layer.layer_norm1(x)
  split = lambda z: z.reshape(*z.shape[:2], attention.heads, -1)
  q, k, v = split(attention.q_proj(y)), split(attention.k_proj(y)), split(attention.v_proj(y))
  scores = jnp.einsum('bnhc,bmhc->bhnm', q[:, :1], k) * q.shape[-1] ** -0.5

  def logit(probabilities):  # of the class token, [1, heads, 1, N]
    joined = jnp.einsum('bhnm,bmhc->bnhc', probabilities, v).reshape(1, 1, -1)
    state = x[:, :1] + attention.out_proj(joined)
    state = model.post_layernorm(state + layer.mlp(layer.layer_norm2(state)))
    return unit(vision.visual_projection(state))[0, 0] @ unit(text)

  probabilities = jax.nn.softmax(scores)
  seen = jnp.maximum(jax.grad(logit)(probabilities) * probabilities, 0).mean(1)[0, 0, 1:]
  side = round(len(seen) ** 0.5)
  seen = jax.image.resize(seen.reshape(side, side), image.shape[:2], 'bilinear')
  return (seen - seen.min()) / jnp.maximum(seen.max() - seen.min(), 1e-8)


def unit(x: Array) -> Array:
  """Of length 1 over the last axis; 0 stays 0."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-16))


def _resized(image, side):
  return jax.image.resize(image, (side, side, image.shape[-1]), 'linear', antialias=False)
