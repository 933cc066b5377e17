"""The interface of attention: every attention of the UNet is a function of this type.

  attention(q, k, v, site) -> out

B batch, N query tokens, M key tokens, C channels of one head: q [B, N, heads, C], k and v
[B, M, heads, C], out like q. Prompt-to-prompt, recording of maps, and other kernels are other
functions of this type; they close over the traced arrays that they need.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ip2p_jax.config_check import CHOICES
from ip2p_jax.errors import InputError, check_choice


class Site(NamedTuple):
  """The position of an attention in the UNet; static under jit.

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


# The name of attention's results, by which a remat policy keeps them.
ATTENTION_OUT = 'attention_out'


class AttentionKernel(NamedTuple):
  """Where a kernel can run, and from how many queries on it is faster.

  Attributes:
    capability: least compute capability of a GPU (9.0 is Hopper), or generation of a TPU.
    before: the first capability that is too high.
    width: largest number of channels of a head.
    multiple: a divisor of the number of channels.
    tokens: least number of queries; our choice, while the other limits are the kernel's.
    block: divides the numbers of queries and keys.
    types: dtypes it computes in.
  """

  kernel: str
  platform: str
  capability: float
  before: float
  width: int
  multiple: int
  tokens: int
  block: int
  types: tuple[str, ...]


HALVES = ('bfloat16', 'float16')
# The first row that fits is used; if none fits, XLA's own attention. XLA writes all scores to
# memory, which takes most of the time of a long attention; shorter ones have few scores.
KERNELS = (
  # Splash attention needs TPU v4 or newer.
  AttentionKernel('splash', 'tpu', 4.0, math.inf, 256, 8, 1024, 128, ('bfloat16', 'float32')),
  # cuDNN 9.18 has gradients of heads of over 128 channels on Hopper only.
  AttentionKernel('cudnn', 'gpu', 9.0, 10.0, 256, 8, 256, 1, HALVES),
  AttentionKernel('cudnn', 'gpu', 8.0, math.inf, 128, 8, 256, 1, HALVES),
)


def dispatch(choice: str = 'auto', mesh: Mesh | None = None) -> Attention:
  """The attention for the devices of a mesh; without one, for jax's default device.

  Args:
    choice: 'auto' follows KERNELS; 'xla' uses no kernel; 'splash' and 'cudnn' are used where they
      can run, for attentions of any length.
    mesh: batches are split over all its axes; kernels need to know it.

  Raises InputError for a kernel that the devices do not have.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  platform = 'gpu' if device.platform in ('cuda', 'rocm') else device.platform
  capability = _capability(platform, device)
  check_choice('attention', choice, CHOICES['attention'])
  if choice not in ('auto', 'xla') and not any(
    row.kernel == choice and row.platform == platform and row.capability <= capability < row.before
    for row in KERNELS
  ):
    raise InputError(
      f"attention is {choice!r}, which {device.device_kind} does not have; use 'auto'."
    )
  if choice == 'xla' or platform not in {row.platform for row in KERNELS}:
    return attend
  kernels = {kernel.__name__: functools.partial(kernel, mesh=mesh) for kernel in (splash, cudnn)}
  kernels['xla'] = attend

  def attention(q, k, v, site=None):
    shape = (q.shape[1], k.shape[1], q.shape[-1])
    return kernels[kernel_for(platform, capability, *shape, str(q.dtype), choice)](q, k, v)

  return attention


def _capability(platform, device) -> float:
  if platform == 'tpu':  # 'TPU v3', 'TPU v5 lite', 'TPU7x'
    match = re.search(r'\d+', device.device_kind)
    return float(match[0]) if match else math.inf
  number = str(getattr(device, 'compute_capability', ''))  # for AMD 'gfx942'
  return float(number) if platform == 'gpu' and re.fullmatch(r'\d+(\.\d+)?', number) else 0.0


def kernel_for(
  platform: str,
  capability: float,
  queries: int,
  keys: int,
  width: int,
  dtype: str,
  choice: str = 'auto',
) -> str:
  """'splash', 'cudnn' or 'xla', by KERNELS."""
  for row in KERNELS:
    if (
      (row.platform, choice) in ((platform, 'auto'), (platform, row.kernel))
      and row.capability <= capability < row.before
      and width <= row.width
      and width % row.multiple == 0
      and (choice != 'auto' or queries >= row.tokens)
      and queries % row.block == keys % row.block == 0
      and dtype in row.types
    ):
      return row.kernel
  return 'xla'


def cudnn(q: Array, k: Array, v: Array, *, mesh: Mesh | None = None) -> Array:
  """A GPU's flash attention, of NVIDIA's cuDNN.

  Its gradients need even numbers of queries and keys. An odd number, such as the 77 tokens of a
  text, gets one token of padding, which the lengths mask.
  """
  queries, keys = q.shape[1], k.shape[1]
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

  def kernel(q, k, v):
    lengths = {}
    if queries % 2 or keys % 2:
      per_row = lambda count: jnp.full(q.shape[0], count, jnp.int32)
      lengths = {'query_seq_lengths': per_row(queries), 'key_value_seq_lengths': per_row(keys)}
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn', **lengths)

  # jax can split this kernel, but not its lengths.
  return _split(kernel, mesh, q.shape[0])(even(q), even(k), even(v))[:, :queries]


def splash(
  q: Array, k: Array, v: Array, *, mesh: Mesh | None = None, interpret: bool = False
) -> Array:
  """A TPU's attention, a tile of scores at a time (jax's kernel); `interpret` runs on any device.

  Numbers of queries and keys must be multiples of 128. Heads are not padded to 128 lanes: that
  would cost more than the kernel saves.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
  rows, columns = _tile(queries), _tile(keys)
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=rows,
      block_kv=columns,
      block_q_dkv=rows,
      block_kv_dkv=columns,
      block_q_dq=rows,
      block_kv_dq=columns,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENTION_OUT,
    interpret=interpret,
  )

  def heads_first(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

  # Saves q after scaling. Otherwise the backward pass scales it again, in a pass of its own.
  q = checkpoint_name(q * q.shape[-1] ** -0.5, ATTENTION_OUT)
  return _split(heads_first, mesh, q.shape[0])(q, k, v)


def _split(kernel, mesh: Mesh | None, batch: int):
  """The kernel, with each device on its rows of q, k and v; XLA cannot split it by itself.

  If the batch cannot be split evenly, every device computes all of it.
  """
  if mesh is None or mesh.size == 1 or _is_split(mesh):
    return kernel
  rows = P(mesh.axis_names) if batch % mesh.size == 0 else P()
  return jax.shard_map(kernel, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False)


def _is_split(mesh):
  """Whether this runs inside a shard_map over the mesh: then each device has its rows already."""
  return set(mesh.axis_names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _tile(length):
  return next(size for size in (512, 256, 128) if length % size == 0)


# On a CPU, the scores of one head and BLOCK queries stay in the cache. With fewer than BLOCKED_FROM
# scores, plain attention is as fast.
BLOCK = 512
BLOCKED_FROM = 1024 * 1024


def attend(q: Array, k: Array, v: Array, site: Site | None = None, *, is_causal: bool = False):
  """Softmax attention with scale C ** -0.5; scores and softmax in float32."""
  del site
  if is_causal or q.shape[1] * k.shape[1] < BLOCKED_FROM:
    return _plain(q, k, v, is_causal)
  return jax.lax.platform_dependent(q, k, v, cpu=_blocked, default=_plain)


def _plain(q, k, v, is_causal=False):
  scores = jnp.einsum('bnhc,bmhc->bhnm', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  if is_causal:
    seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
  return jnp.einsum('bhnm,bmhc->bnhc', jax.nn.softmax(scores).astype(v.dtype), v)


def _blocked(q, k, v):
  """`_plain`, one head and block at a time: on a CPU 4 to 8 times as fast, with less memory."""
  B, N, H, C = q.shape
  heads_first = lambda x: x.swapaxes(1, 2).reshape(B * H, x.shape[1], C)
  padded = jnp.pad(q, ((0, 0), (0, -N % BLOCK), (0, 0), (0, 0)))
  blocks = heads_first(padded).reshape(B * H, -1, BLOCK, 1, C)

  def one_head(args):
    blocks, k, v = args
    return jax.lax.map(lambda q: _plain(q[None], k, v)[0], blocks)

  single = lambda x: heads_first(x)[:, None, :, None]  # [B * H, 1, M, 1, C]
  out = jax.lax.map(one_head, (blocks, single(k), single(v)))  # [B * H, blocks, BLOCK, 1, C]
  return out.reshape(B, H, -1, C)[:, :, :N].swapaxes(1, 2)
