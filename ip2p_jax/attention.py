"""The one seam for attention: every attention of the UNet is a function of this type.

  attention(q, k, v, site) -> out

B batch, N query tokens, M key tokens, C channels of one head: q [B, N, heads, C], k and v
[B, M, heads, C], out like q. Prompt-to-prompt, recording of maps, and other kernels are other
functions of the type; they close over whatever traced arrays they need.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Site(NamedTuple):
  """Where in the UNet an attention stands; static under jit.

  Attributes:
    place: 'down', 'mid' or 'up'.
    level: 0 is the full latent resolution; each level below halves it.
    is_cross: whether keys and values come from the text.
    tokens: number of query tokens, latent height times width at this level.
  """

  place: str
  level: int
  is_cross: bool
  tokens: int


Attention = Callable[[Array, Array, Array, Site | None], Array]


def attend(q: Array, k: Array, v: Array, site: Site | None = None, *, is_causal: bool = False):
  """Softmax attention with scale C ** -0.5; scores and softmax in float32."""
  del site
  scores = jnp.einsum('bnhc,bmhc->bhnm', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  if is_causal:
    seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
  return jnp.einsum('bhnm,bmhc->bnhc', jax.nn.softmax(scores).astype(v.dtype), v)
