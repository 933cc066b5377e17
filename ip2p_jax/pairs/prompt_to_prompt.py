"""Two images from one noise: attention of the second, the edited one, borrows from the first.

P pairs, K halves of guidance (with text first, then without), N query tokens, L text tokens (77),
C channels of one head, S steps. The network sees a batch [K, 2, P, ...] laid out flat: all first
images of a half, then all second ones. Every number here may be traced, and differ from pair to
pair, so that one compiled program serves all.

The two families of control:

- `share`, of InstructPix2Pix's generator: all self-attention of the second image uses queries and
  keys of the first, in both halves. (The original copies the scores, which is the same.)
- `injection`, prompt-to-prompt as published (Hertz et al. 2022): the second image's attention to
  words is made from the first's, and coarse self-attention is shared, in the half with text only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ip2p_jax.models.attention import Attention, Site, attend

WITH_TEXT = 0  # the first half
BLEND_POOL = 3  # tokens, to grow the words' regions a little
LARGE = 32 * 32  # latents: from here on "coarse" is a quarter of each side, below it half


class Injection(NamedTuple):
  """Prompt-to-prompt's control of attention; `alignment` makes the arrays of a pair.

  Attributes:
    self_window: int32 [P, 2], the first step of shared self-attention and the one after the last.
    cross_window: int32 [P, 2, L], the same of each target token's attention.
    matrix: float32 [P, L, L], from source tokens to target tokens.
    has_source: float32 [P, L], 0 for target tokens that keep their own attention.
    equalizer: float32 [P, L], what the attention to each target token is multiplied by.
  """

  self_window: Array
  cross_window: Array
  matrix: Array
  has_source: Array
  equalizer: Array


class Blend(NamedTuple):
  """Keeps the second image equal to the first but where words of the change look.

  Attributes:
    words: float32 [P, 2, L], 1 for the tokens that count, of the source and of the target.
    threshold: float32 [P], of attention relative to its greatest; 0.3 as published.
    start: int32 [P], the first step to blend after; S or more never does.
  """

  words: Array
  threshold: Array
  start: Array


class Control(NamedTuple):
  """What is borrowed; None leaves a part out of the program.

  Attributes:
    share_until: int32 [P], the steps before it share all self-attention.
  """

  share_until: Array | None = None
  injection: Injection | None = None
  blend: Blend | None = None


Record = Callable[[Site, Array], None]  # gets probabilities [2, P, heads, N, L] of the texts' half


def coarse_level(height: int, width: int) -> int:
  """The level at which published prompt-to-prompt acts: 16 x 16 tokens, of 64 x 64 latents."""
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
  """The attention of step `step`, which may be traced.

  `level` is the `coarse_level` of the latents. `record` is called, while tracing, with what the
  texts' half attends to after the control. Everything that needs no probabilities goes to `inner`.
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
  """bool [K, P]: whether the second image takes queries and keys of the first; None is never."""
  until, injection = control.share_until, control.injection if is_coarse else None
  shares = None
  if until is not None:
    shares = jnp.broadcast_to((step < until)[None], (halves, len(until)))
  if injection is not None:
    start, stop = injection.self_window.T
    of_injection = jnp.zeros((halves, len(start)), bool)
    of_injection = of_injection.at[WITH_TEXT].set((start <= step) & (step < stop))
    shares = of_injection if shares is None else shares | of_injection
  return shares


def _borrowed(x, shares):  # [K * 2 * P, N, heads, C], [K, P]
  halves, pairs = shares.shape
  first, second = jnp.moveaxis(x.reshape(halves, 2, pairs, *x.shape[1:]), 1, 0)
  second = jnp.where(shares[..., None, None, None], first, second)
  return jnp.stack([first, second], 1).reshape(x.shape)


def _cross(injection: Injection | None, step, record, site, q, k, v):
  """Attention to the texts, [2 * P, ...], by probabilities that can be changed and recorded."""
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
  """What the second image attends to, from both images' probabilities [P, heads, N, L].

  (Hertz et al. 2022, section 3.2: word swap, new phrases and re-weighting are one formula.) The
  probabilities do not sum to 1 afterwards, as published.
  """
  per_token = lambda x: x[:, None, None]  # [P, L] -> [P, 1, 1, L]
  mapped = jnp.einsum('phnw,pwl->phnl', first, injection.matrix)
  has_source = per_token(injection.has_source)
  mixed = mapped * has_source + second * (1 - has_source)
  start, stop = injection.cross_window[:, 0], injection.cross_window[:, 1]
  is_on = per_token((start <= step) & (step < stop))
  return jnp.where(is_on, mixed * per_token(injection.equalizer), second)


def word_map(probabilities: Array, words: Array) -> Array:
  """Where tokens look: [2, P, heads, N, L] and their weights [P, 2, L] -> [2, P, N]."""
  return jnp.einsum('iphnl,pil->ipn', probabilities, words) / probabilities.shape[2]


def blended(blend: Blend, step: Array, seen: Array, x: Array) -> Array:
  """x [2, P, h, w, 4] after a step, the second image being the first outside of the change.

  `seen` [2, P, a, b] is the sum of `word_map` over layers and steps so far. The change is where
  either text's words look (Hertz et al. 2022, section 4, as released).
  """
  pooled = jax.lax.reduce_window(
    seen, -jnp.inf, jax.lax.max, (1, 1, BLEND_POOL, BLEND_POOL), (1, 1, 1, 1), 'SAME'
  )
  # Nearest neighbours, and relative to each image's greatest.
  rows = jnp.arange(x.shape[2]) * seen.shape[2] // x.shape[2]
  columns = jnp.arange(x.shape[3]) * seen.shape[3] // x.shape[3]
  large = pooled[:, :, rows[:, None], columns[None]]
  relative = large / jnp.maximum(large.max((2, 3), keepdims=True), 1e-12)
  is_changed = (relative > blend.threshold[None, :, None, None]).any(0)  # [P, h, w]
  is_kept = ~is_changed & (step >= blend.start)[:, None, None]
  return jnp.stack([x[0], jnp.where(is_kept[..., None], x[0], x[1])])
