"""Two images from the same noise: the second (edited) image uses the attention of the first.

P pairs, K halves of guidance (with text first, then without), N query tokens, L text tokens (77),
C channels of one head, S steps. The network gets a flat batch [K, 2, P, ...]: all first images of a
half, then all second images. Every number here may be traced and may differ between pairs, so one
compiled program serves all pairs.

There are two families of control:

- `share`, of InstructPix2Pix's generator: all self-attention of the second image uses queries and
  keys of the first image, in both halves. (The original copies the scores, which is equal.)
- `injection`, prompt-to-prompt as published (Hertz et al. 2022): the second image's attention to
  words is computed from the first image's, and coarse self-attention is shared. This acts only on
  the half with text.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ip2p_jax.models.attention import Attention, Site, attend

WITH_TEXT = 0  # the first half
BLEND_POOL = 3  # tokens; grows the regions of words a little
LARGE = 32 * 32  # latents; from here on "coarse" is a quarter of each side, below it is half


class Injection(NamedTuple):
  """Prompt-to-prompt's control of attention. `alignment` makes the arrays of a pair.

  Attributes:
    self_window: int32 [P, 2], the first step of shared self-attention, and the step after the last.
    cross_window: int32 [P, 2, L], the same for the attention to each target token.
    matrix: float32 [P, L, L], from source tokens to target tokens.
    has_source: float32 [P, L], 0 for target tokens that keep their own attention.
    equalizer: float32 [P, L], factors of the attention to each target token.
  """

  self_window: Array
  cross_window: Array
  matrix: Array
  has_source: Array
  equalizer: Array


class Blend(NamedTuple):
  """Keeps the second image equal to the first outside of the regions of the changed words.

  Attributes:
    words: float32 [P, 2, L], 1 for the tokens of these words, in the source and in the target.
    threshold: float32 [P], of attention relative to its maximum; published as 0.3.
    start: int32 [P], the first step to blend after; with S or more there is no blend.
  """

  words: Array
  threshold: Array
  start: Array


class Control(NamedTuple):
  """The controls of a program. None leaves one out.

  Attributes:
    share_until: int32 [P]; steps before it share all self-attention.
  """

  share_until: Array | None = None
  injection: Injection | None = None
  blend: Blend | None = None


Record = Callable[[Site, Array], None]  # gets probabilities [2, P, heads, N, L] of the texts' half


def coarse_level(height: int, width: int) -> int:
  """The level of published prompt-to-prompt: 16 x 16 tokens, for 64 x 64 latents."""
  return 2 if height * width >= LARGE else 1


def controlled(
  control: Control,
  step: Array,
  level: int,
  record: Record | None = None,
  *,
  halves: int = 2,
  inner: Attention = attend,
) -> Attention:
  """The attention function of step `step`, which may be traced.

  `level` is the `coarse_level` of the latents. `record` is called during tracing, with the
  probabilities of the half with text after the control. Attention without probabilities goes to
  `inner`.
  """

  def attention(q, k, v, site):
    if not site.is_cross:
      shared = _shares_self(control, step, site.level >= level, halves)
      if shared is None:
        return inner(q, k, v, site)
      return inner(_borrowed(q, shared), _borrowed(k, shared), v, site)
    if control.injection is None and record is None:
      return inner(q, k, v, site)
    rows = q.shape[0] // halves
    out = _cross(control.injection, step, record, site, *(x[:rows] for x in (q, k, v)))
    if halves == 1:
      return out
    return jnp.concatenate([out, inner(*(x[rows:] for x in (q, k, v)), site)])

  return attention


def _shares_self(control: Control, step, is_coarse: bool, halves: int) -> Array | None:
  """bool [K, P]: whether the second image uses queries and keys of the first. None means never."""
  until = control.share_until
  injection = control.injection if is_coarse else None
  shares = None
  if until is not None:
    shares = jnp.broadcast_to((step < until)[None], (halves, len(until)))
  if injection is not None:
    start, stop = injection.self_window.T
    injects = jnp.zeros((halves, len(start)), bool)
    injects = injects.at[WITH_TEXT].set((start <= step) & (step < stop))
    shares = injects if shares is None else shares | injects
  return shares


def _borrowed(x, shares):  # [K * 2 * P, N, heads, C], [K, P]
  halves, pairs = shares.shape
  first, second = jnp.moveaxis(x.reshape(halves, 2, pairs, *x.shape[1:]), 1, 0)
  second = jnp.where(shares[..., None, None, None], first, second)
  return jnp.stack([first, second], 1).reshape(x.shape)


def _cross(injection: Injection | None, step, record, site, q, k, v):
  """Cross-attention [2 * P, ...], whose probabilities may be changed and recorded."""
  scores = jnp.einsum('bnhc,bmhc->bhnm', q, k, preferred_element_type=jnp.float32)
  probabilities = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
  first, second = probabilities.reshape(2, -1, *probabilities.shape[1:])  # [P, heads, N, L]
  if injection is not None:
    second = injected(injection, step, first, second)
  both = jnp.stack([first, second])
  if record is not None:
    record(site, both)
  both = both.reshape(probabilities.shape).astype(v.dtype)
  return jnp.einsum('bhnm,bmhc->bnhc', both, v)


def injected(injection: Injection, step: Array, first: Array, second: Array) -> Array:
  """Cross-attention replacement: the second image's probabilities, from both [P, heads, N, L].

  This is one formula for the three edits of Hertz et al. (2022), section 3.2: word swap (replace),
  new phrases (refine) and re-weighting. As published, the result does not sum to 1.
  """
  per_token = lambda x: x[:, None, None]  # [P, L] -> [P, 1, 1, L]
  mapped = jnp.einsum('phnw,pwl->phnl', first, injection.matrix)
  has_source = per_token(injection.has_source)
  mixed = mapped * has_source + second * (1 - has_source)
  start, stop = injection.cross_window[:, 0], injection.cross_window[:, 1]
  is_on = per_token((start <= step) & (step < stop))
  return jnp.where(is_on, mixed * per_token(injection.equalizer), second)


def word_map(probabilities: Array, words: Array) -> Array:
  """Attention to words: [2, P, heads, N, L] and token weights [P, 2, L] -> [2, P, N]."""
  return jnp.einsum('iphnl,pil->ipn', probabilities, words) / probabilities.shape[2]


def blended(blend: Blend, step: Array, seen: Array, x: Array) -> Array:
  """x [2, P, h, w, 4] after a step. The second image equals the first outside of the change.

  `seen` [2, P, a, b] is the sum of `word_map` over layers and steps so far. The change is the
  region of the words of either text (Hertz et al. 2022, section 4, as released).
  """
  pooled = jax.lax.reduce_window(
    seen, -jnp.inf, jax.lax.max, (1, 1, BLEND_POOL, BLEND_POOL), (1, 1, 1, 1), 'SAME'
  )
  # Nearest neighbours, relative to the maximum of each image.
  rows = jnp.arange(x.shape[2]) * seen.shape[2] // x.shape[2]
  columns = jnp.arange(x.shape[3]) * seen.shape[3] // x.shape[3]
  large = pooled[:, :, rows[:, None], columns[None]]
  relative = large / jnp.maximum(large.max((2, 3), keepdims=True), 1e-12)
  is_changed = (relative > blend.threshold[None, :, None, None]).any(0)  # [P, h, w]
  is_equal = ~is_changed & (step >= blend.start)[:, None, None]
  return jnp.stack([x[0], jnp.where(is_equal[..., None], x[0], x[1])])
