"""Plug-and-play: the injections restated in torch, and what each of them does."""

import functools

import jax
import method_models
import numpy as np
import peers
import pytest
import torch_models as reference

from ip2p_jax.diffusion import samplers
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods import plug_and_play
from ip2p_jax.evaluation.methods.method import request
from ip2p_jax.evaluation.methods.plug_and_play import Settings, Traced
from ip2p_jax.pairs import inversion
from ip2p_jax.pipeline import parts

torch, diffusers = peers.module('torch'), peers.module('diffusers')

STEPS, INVERSE = 4, 8


def inputs(texts, features=3, attention=2, guidance=3.0):
  model = method_models.base()
  grid, inverse = (
    samplers.noise_levels(model.networks.schedule, 'ddim', steps) for steps in (STEPS, INVERSE)
  )
  places = [list(inverse.timesteps).index(t) for t in grid.timesteps]
  traced = Traced(
    np.float32(guidance), np.int32(features), np.int32(attention), model.tokenizer(['ugly']),
    inverse, np.int32(places),
  )  # fmt: skip
  return request(model, method_models.photos(len(texts.captions)), texts, grid, traced)


@functools.cache
def compiled():
  return jax.jit(functools.partial(plug_and_play.edited, method_models.base().networks))


def latents(given):
  return np.asarray(compiled()(method_models.base().params, given).latents)


class Borrowing:
  """Attention of diffusers, with queries and keys of the first third of the rows."""

  def __call__(self, attn, x, encoder_hidden_states=None, **_):
    rows = len(x) // 3
    q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k = (y[:rows].repeat(3, 1, 1) for y in (q, k))
    q, k, v = (attn.head_to_batch_dim(y) for y in (q, k, v))
    return attn.to_out[0](attn.batch_to_head_dim(attn.get_attention_scores(q, k) @ v))


def their_edit(given, path):
  """The loop of plug-and-play on diffusers' UNet, from the inverted latents of our path."""
  traced, theirs = given.settings, reference.models_of(method_models.checkpoint())
  unet, encode = theirs['unet'], lambda ids: theirs['text_encoder'](torch.tensor(ids).long())[0]
  block, rows = unet.up_blocks[0], len(given.images)
  own = [layer.transformer_blocks[0].attn1 for layer in block.attentions[1:]]
  plain = [layer.processor for layer in own]
  with_features = lambda module, _, out: out[:rows].repeat(3, 1, 1, 1)
  texts = [encode(ids) for ids in (given.null_ids, traced.negative_ids, given.target_ids)]
  contexts = torch.cat([text.expand(rows, -1, -1) for text in texts])
  scheduler = diffusers.DDIMScheduler.from_config(
    method_models.base().networks.schedule.to_json() | {'timestep_spacing': 'leading'}
  )
  scheduler.set_timesteps(STEPS)
  x = None
  for i, t in enumerate(scheduler.timesteps):
    place = traced.places[i]
    sigma = traced.inverse_grid.sigmas[place]
    source = reference.nchw(np.asarray(path[place]) / np.sqrt(sigma**2 + 1))
    x = source if x is None else x
    for layer, processor in zip(own, plain, strict=True):
      layer.processor = Borrowing() if i < traced.attention_steps else processor
    hook = block.resnets[1].conv2.register_forward_hook(with_features)
    if i >= traced.feature_steps:
      hook.remove()
    _, without, with_text = unet(torch.cat([source, x, x]), t, contexts).sample.chunk(3)
    hook.remove()
    x = scheduler.step(without + traced.guidance.item() * (with_text - without), t, x).prev_sample
  return reference.nhwc(x)


def inverse_path(given):
  model = method_models.base()

  @jax.jit
  def path(params):
    clean = parts.scaled_latents(model.networks, params, given.images)
    ids = np.repeat(given.null_ids, len(clean), 0)
    context, _ = parts.encode_texts(model.networks, params, ids, given.null_ids)
    grid = given.settings.inverse_grid
    return inversion.ddim_path(model.networks, params, clean, context, grid)

  return path(model.params)


@pytest.mark.long
def test_edits_agree_with_injections_into_diffusers():
  given = inputs(method_models.texts(2))
  with torch.no_grad():
    expected = their_edit(given, inverse_path(given))
  np.testing.assert_allclose(latents(given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_features_and_attention_each_change_the_edit():
  texts = method_models.texts(2)
  edits = [latents(inputs(texts, *steps)) for steps in ((0, 0), (4, 0), (0, 4), (4, 4))]
  for i, edit in enumerate(edits):
    for other in edits[:i]:
      assert np.abs(edit - other).mean() > 1e-4


def test_the_steps_of_the_authors_are_40_and_25_of_50():
  assert Settings() == Settings(50, 999, 7.5, 0.8, 0.5)
  with pytest.raises(InputError, match=r'features is 1\.5; give a part of the steps'):
    plug_and_play.plug_and_play(method_models.base(), Settings(features=1.5))
