"""Counts the floating point operations of a function, and lists the peak rates of devices.

A multiplication and the addition after it are two operations. Only matrix products and convolutions
count, but with all their operations: padding zeros and values that a causal mask hides count, too
(as in torch.utils.flop_counter and the papers). Nothing runs: functions are traced on shapes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from ip2p_jax.pipeline.networks import Networks, is_editor

# TFLOP/s by `device_kind`, for dense bfloat16 products with float32 sums (float16 on devices
# without bfloat16); from the data sheets of NVIDIA and the system pages of Google Cloud TPU. A name
# that no pattern matches fully (laptops, slices of a GPU) is an unknown device.
# A device of TPU v2, v3 and v7x is a core, half a chip; of other TPUs, a chip.
PEAKS = (
  (r'TPU v2', 23),
  (r'TPU v3', 61.5),
  (r'TPU v4', 275),
  (r'TPU v4 lite', 138),
  (r'TPU v5( lite|e)', 197),
  (r'TPU v5p?', 459),
  (r'TPU v6( lite|e)', 918),
  (r'TPU7x', 1153.5),
  (r'(NVIDIA )?B200', 2250),
  (r'(NVIDIA )?H200', 989.4),
  (r'(NVIDIA )?H100 80GB HBM3', 989.4),  # SXM
  (r'(NVIDIA )?H100 PCIe', 756),
  (r'(NVIDIA )?A100-(SXM4|PCIE|PCIe)-(40|80)GB', 312),
  (r'(NVIDIA )?A100 80GB PCIe', 312),
  (r'(NVIDIA )?RTX A6000', 154.8),
  (r'(NVIDIA )?L4', 121),
  (r'(NVIDIA )?A10G', 70),
  (r'(NVIDIA )?GeForce RTX 4090', 165.2),
  (r'(NVIDIA )?GeForce RTX 3090', 71),
  (r'(Tesla )?V100-(SXM2|SXM3)-(16|32)GB', 125),  # float16
  (r'(Tesla )?V100-PCIE-(16|32)GB', 112),  # float16
  (r'(Tesla )?T4', 65),  # float16
)
# How names of operations with unknown contents start; shard_map shows only one device's part.
OPAQUE = ('pallas_call', 'ffi_call', 'custom_partitioning', 'ragged_dot', 'dot_product_attention')
OPAQUE += ('shard_map',)


def count(f: Callable, *args: Any) -> int:
  """Operations of one call `f(*args)`; arguments are arrays or ShapeDtypeStructs.

  Counts the traced program: operations that remat repeats count twice; of a scan all steps count,
  of a cond the largest branch, of `jax.lax.platform_dependent` the default. ValueError if the count
  is unknown: for products in a while loop, kernels, shard_map.
  """
  return _jaxpr(jax.make_jaxpr(f)(*args))


def training_flops(
  networks: Networks, resolution: int, *, latents: bool, trained_fraction: float = 1.0
) -> float:
  """Operations that one training example requires, however they are carried out.

  The UNet three times (forward, gradient of the activations, gradient of the weights), the text
  encoder, and for pixels one VAE encoding each of the input image, if any, and of the target.
  Operations that are repeated to save memory count once.

  Args:
    resolution: side of the square images, pixels.
    latents: whether examples are latents, so that the VAE is not needed.
    trained_fraction: of the UNet's weights, 0 to 1; for LoRA almost 0. Assumes that frozen and
      trained weights are used equally often.
  """
  side = resolution // networks.vae_config.factor
  total = (2 + trained_fraction) * unet_flops(networks, (side, side)) + text_flops(networks)
  if not latents:
    total += (1 + is_editor(networks)) * encode_flops(networks, resolution)
  return float(total)


def trained_fraction(networks: Networks, fixed: Mapping[str, Any]) -> float:
  """The trained fraction of the UNet's weights; `fixed` are not trained. 0 for LoRA."""
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(networks.shapes['unet']))
  return 1 - sum(math.prod(x.shape) for x in fixed.values()) / total


def unet_flops(networks: Networks, size: tuple[int, int]) -> int:
  """FLOPs of one prediction; `size` is that of the latents."""
  text = networks.text_config
  latents = _array(1, *size, networks.unet_config.in_channels)
  context = _array(1, text.max_position_embeddings, networks.unet_config.cross_attention_dim)
  unet = lambda params, *args: nnx.merge(networks.unet_def, params)(*args)
  return count(unet, networks.shapes['unet'], latents, _array(1), context)


def encode_flops(networks: Networks, resolution: int) -> int:
  """FLOPs of the VAE's encoder for one square image."""
  encode = lambda params, images: nnx.merge(networks.vae_def, params).encode(images)
  return count(encode, networks.shapes['vae'], _array(1, resolution, resolution, 3))


def text_flops(networks: Networks) -> int:
  """FLOPs of the text encoder for one text."""
  token_ids = _array(1, networks.text_config.max_position_embeddings, dtype=jnp.int32)
  encoder = lambda params, ids: nnx.merge(networks.text_encoder_def, params)(ids)
  return count(encoder, networks.shapes['text_encoder'], token_ids)


def peak(device: jax.Device) -> float | None:
  """Peak FLOP/s of the device with bfloat16 products; None for an unknown device."""
  return peak_of_kind(device.device_kind)


def peak_of_kind(kind: str) -> float | None:
  """The same by `device_kind`."""
  for pattern, tera in PEAKS:
    if re.fullmatch(pattern, kind):
      return tera * 1e12
  return None


def _array(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> int:
  return sum(_RULES.get(eqn.primitive.name, _calls)(eqn) for eqn in jaxpr.eqns)


def _dot(eqn) -> int:
  (contracted, _), _ = eqn.params['dimension_numbers']
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _conv(eqn) -> int:
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  out_channels = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
  # With groups, the kernel has only the input channels of its group. The gradient of a strided
  # convolution puts zeros between pixels; these do not count.
  window = math.prod(kernel) // out_channels
  return 2 * math.prod(out) * window // math.prod(eqn.params['lhs_dilation'])


def _scan(eqn) -> int:
  return eqn.params['length'] * _jaxpr(eqn.params['jaxpr'])


def _while(eqn) -> int:
  if _jaxpr(eqn.params['body_jaxpr']) or _jaxpr(eqn.params['cond_jaxpr']):
    raise ValueError('matrix products in a while loop: its number of steps is unknown; use scan.')
  return 0


def _cond(eqn) -> int:
  branches = eqn.params['branches']
  platforms = eqn.params.get('branches_platforms')
  if platforms and None in platforms:
    return _jaxpr(branches[platforms.index(None)])
  return max(map(_jaxpr, branches))


def _calls(eqn) -> int:
  """Any other operation: everything that it calls, once each (jit, remat, custom derivatives)."""
  if eqn.primitive.name.startswith(OPAQUE):
    raise ValueError(f'the operations in {eqn.primitive.name} are unknown; count without it.')
  values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
  return sum(_jaxpr(value) for value in values if _is_jaxpr(value))


def _is_jaxpr(value) -> bool:
  return isinstance(value, Jaxpr | ClosedJaxpr)


_RULES = {
  'dot_general': _dot,
  'conv_general_dilated': _conv,
  'scan': _scan,
  'while': _while,
  'cond': _cond,
}
