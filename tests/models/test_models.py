"""Every network against its PyTorch original: random normal weights, float32, relative error."""

import jax
import numpy as np
import peers
import pytest
import torch_models as reference
from flax import nnx
from torch_models import nchw, nhwc, relative_error

from ip2p_jax.errors import InputError
from ip2p_jax.models import attention
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig, VisionConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE

torch = peers.module('torch')

TOLERANCE = 5e-5
slow = pytest.mark.slow


def unet_error(config, size, rng, timestep=301.7, text_tokens=7):
  torch_unet = reference.unet(config)
  ours = UNetConfig.from_json(dict(torch_unet.config))
  unet_def, params = reference.convert(torch_unet, lambda keys: UNet(ours, rngs=keys), 'unet')
  latents = rng.standard_normal((2, *size, ours.in_channels), np.float32)
  context = rng.standard_normal((2, text_tokens, ours.cross_attention_dim), np.float32)
  run = jax.jit(lambda params, *inputs: nnx.merge(unet_def, params)(*inputs))
  with torch.no_grad():
    theirs = torch_unet(nchw(latents), timestep, torch.from_numpy(context)).sample
  return relative_error(run(params, latents, np.float32(timestep), context), nhwc(theirs))


THREE_LEVELS = {
  **reference.TINY_UNET,
  'block_out_channels': [16, 32, 32],
  'layers_per_block': 2,
  'down_block_types': ['CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'],
}
SD2_OPTIONS = {'use_linear_projection': True, 'attention_head_dim': [2, 4]}


@pytest.mark.parametrize(
  ('config', 'size', 'text_tokens'),
  [
    *[
      pytest.param(reference.TINY_UNET | {'in_channels': channels}, (8, 8), 7,
                   marks=pytest.mark.long, id=f'{channels} channels')
      for channels in (4, 8, 9)
    ],
    pytest.param(reference.TINY_UNET | SD2_OPTIONS, (8, 8), 7, id='SD 2.x'),
    pytest.param(THREE_LEVELS, (7, 11), 7, id='odd size'),
    pytest.param(reference.SD15_UNET, (64, 64), 77, marks=slow, id='full SD 1.5'),
    pytest.param(reference.SD21_UNET, (32, 32), 77, marks=slow, id='full SD 2.1'),
  ],
)  # fmt: skip
def test_unet_agrees_with_diffusers(config, size, text_tokens, rng):
  assert unet_error(config, size, rng, text_tokens=text_tokens) <= TOLERANCE


def vae_errors(config, size, rng):
  """Errors of mean, log-variance, a sample, and the decoded image."""
  torch_vae = reference.vae(config)
  ours = VAEConfig.from_json(dict(torch_vae.config))
  vae_def, params = reference.convert(torch_vae, lambda keys: VAE(ours, rngs=keys), 'vae')
  images = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
  posterior = jax.jit(lambda params, x: nnx.merge(vae_def, params).encode(x))(params, images)
  noise = rng.standard_normal(posterior.mean.shape, np.float32)
  decoded = jax.jit(lambda params, x: nnx.merge(vae_def, params).decode(x))(params, noise)
  with torch.no_grad():
    theirs = torch_vae.encode(nchw(images)).latent_dist
    their_decoded = torch_vae.decode(nchw(noise)).sample
  their_sample = nhwc(theirs.mean) + nhwc(theirs.std) * noise
  return (
    relative_error(posterior.mode(), nhwc(theirs.mode())),
    relative_error(posterior.log_variance, nhwc(theirs.logvar)),
    relative_error(posterior.sample(noise), their_sample),
    relative_error(decoded, nhwc(their_decoded)),
  )


@pytest.mark.parametrize(
  ('config', 'size'),
  [
    pytest.param(reference.TINY_VAE, (16, 24), id='tiny'),
    pytest.param(reference.SD_VAE, (256, 256), marks=slow, id='full'),
  ],
)
def test_vae_agrees_with_diffusers(config, size, rng):
  assert max(vae_errors(config, size, rng)) <= TOLERANCE


def text_errors(config, rng):
  """Errors of the last states and of the projected state at the end of the text."""
  torch_text = reference.text_encoder(config, has_projection=True)
  ours = TextConfig.from_json(torch_text.config.to_dict())
  make = lambda keys: TextEncoder(ours, has_projection=True, rngs=keys)
  text_def, params = reference.convert(torch_text, make, 'text_encoder')
  ids = rng.integers(0, ours.vocab_size - 2, (2, 77), np.int32)
  ids[0, 9:], ids[1, 70:] = ours.vocab_size - 1, ours.vocab_size - 1
  with torch.no_grad():
    theirs = torch_text(torch.from_numpy(ids.astype(np.int64)))
  states = jax.jit(lambda params: nnx.merge(text_def, params)(ids))(params)
  embedding = jax.jit(lambda params: nnx.merge(text_def, params).embed(ids))(params)
  return (
    relative_error(states, theirs.last_hidden_state),
    relative_error(embedding, theirs.text_embeds),
  )


@pytest.mark.parametrize(
  'config',
  [
    pytest.param(reference.TINY_TEXT | {'hidden_act': 'quick_gelu'}, id='quick_gelu'),
    pytest.param(reference.TINY_TEXT | {'hidden_act': 'gelu'}, id='gelu'),
    pytest.param(reference.TINY_TEXT | {'eos_token_id': 2}, id='old config'),
    pytest.param(reference.CLIP_L_TEXT, marks=slow, id='full'),
  ],
)
def test_text_tower_agrees_with_transformers(config, rng):
  assert max(text_errors(config, rng)) <= TOLERANCE


def vision_error(config, rng):
  torch_vision = reference.vision_encoder(config)
  ours = VisionConfig.from_json(torch_vision.config.to_dict())
  make = lambda keys: VisionEncoder(ours, rngs=keys)
  vision_def, params = reference.convert(torch_vision, make, 'image_encoder')
  images = rng.standard_normal((2, ours.image_size, ours.image_size, 3), np.float32)
  with torch.no_grad():
    theirs = torch_vision(nchw(images)).image_embeds
  return relative_error(jax.jit(lambda p: nnx.merge(vision_def, p)(images))(params), theirs)


@pytest.mark.parametrize(
  'config',
  [
    pytest.param(reference.TINY_VISION | {'hidden_act': 'quick_gelu'}, id='quick_gelu'),
    pytest.param(reference.TINY_VISION | {'hidden_act': 'gelu'}, id='gelu'),
    pytest.param(reference.CLIP_L_VISION, marks=slow, id='full L/14'),
    pytest.param(reference.CLIP_B32_VISION, marks=slow, id='full B/32'),
  ],
)
def test_vision_tower_agrees_with_transformers(config, rng):
  assert vision_error(config, rng) <= TOLERANCE


@pytest.mark.long
def test_every_attention_of_the_unet_uses_the_interface(rng):
  config = UNetConfig.from_json(reference.TINY_UNET)
  torch_unet = reference.unet(reference.TINY_UNET)
  unet_def, params = reference.convert(torch_unet, lambda keys: UNet(config, rngs=keys), 'unet')
  sites = []

  def record(q, k, v, site):
    sites.append(site)
    return attention.attend(q, k, v, site)

  latents, context = np.zeros((1, 8, 8, 8), np.float32), np.zeros((1, 7, 24), np.float32)
  nnx.merge(unet_def, params)(latents, np.float32(1), context, record)
  places = [('down', 0, 64), ('mid', 1, 16), ('up', 0, 64), ('up', 0, 64)]
  assert [(s.place, s.level, s.tokens) for s in sites if not s.is_cross] == places
  assert [(s.place, s.level, s.tokens) for s in sites if s.is_cross] == places


@pytest.mark.long
def test_half_precision_unet_answers_in_float32(rng):
  config = UNetConfig.from_json(reference.TINY_UNET)
  torch_unet = reference.unet(reference.TINY_UNET)
  unet_def, params = reference.convert(torch_unet, lambda keys: UNet(config, rngs=keys), 'unet')
  params = jax.tree.map(lambda p: p.astype('bfloat16'), params)
  run = lambda params: nnx.merge(unet_def, params)(
    np.zeros((1, 8, 8, 8), np.float32), np.float32(1), np.zeros((1, 7, 24), np.float32)
  )
  text = str(jax.make_jaxpr(run)(params))
  convolutions = [line for line in text.splitlines() if 'conv_general_dilated[' in line]
  assert convolutions and all(':bf16[' in line for line in convolutions)
  assert run(params).dtype == np.float32


@pytest.mark.parametrize(
  ('key', 'value'),
  [('class_embed_type', 'timestep'), ('addition_embed_type', 'text_time'),
   ('resnet_time_scale_shift', 'scale_shift'), ('transformer_layers_per_block', 2),
   ('down_block_types', ['AttnDownBlock2D', 'DownBlock2D']), ('brand_new_key', 3)],
)  # fmt: skip
def test_an_unsupported_architecture_names_the_key(key, value):
  shown = 'block type' if key == 'down_block_types' else key
  with pytest.raises(InputError, match=shown):
    UNetConfig.from_json({**reference.TINY_UNET, key: value})


@pytest.mark.parametrize(
  ('key', 'value'),
  [('block_out_channels', 32), ('block_out_channels', '32, 64'), ('block_out_channels', []),
   ('layers_per_block', 1.5), ('norm_num_groups', 0), ('attention_head_dim', 0),
   ('attention_head_dim', 3), ('norm_eps', -1), ('in_channels', True)],
)  # fmt: skip
def test_a_wrong_value_names_the_key(key, value):
  with pytest.raises(InputError, match=key):
    UNetConfig.from_json({**reference.TINY_UNET, key: value})


def test_unet_config_survives_json():
  config = UNetConfig.from_json(reference.SD21_UNET)
  assert UNetConfig.from_json(config.to_json()) == config
