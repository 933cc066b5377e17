"""Control of attention: hand-made cases, the released rule, and a PyTorch restatement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.attention import Site, attend
from ip2p_jax.pairs import alignment
from ip2p_jax.pairs.program import PairRequest, PairSpec, pair_program
from ip2p_jax.pairs.prompt_to_prompt import Blend, Control, Injection, blended, controlled, injected
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of

torch = peers.module('torch')

SELF = Site('down', 0, False, 16)
CROSS = Site('down', 0, True, 16)
UNET = reference.TINY_UNET | {
  'in_channels': 4,
  'down_block_types': ['CrossAttnDownBlock2D'] * 2,
  'up_block_types': ['CrossAttnUpBlock2D'] * 2,
  'sample_size': 8,
}
STEPS = 20
CAPTIONS = ['a red star on sand', 'two cats']
EDITED = ['a blue star on sand', 'two cats in a hat']


def never(pairs=1, length=5):
  """An injection without any step."""
  return Injection(
    self_window=np.zeros((pairs, 2), np.int32),
    cross_window=np.zeros((pairs, 2, length), np.int32),
    matrix=np.tile(np.eye(length, dtype=np.float32), (pairs, 1, 1)),
    has_source=np.ones((pairs, length), np.float32),
    equalizer=np.ones((pairs, length), np.float32),
  )


def qkv(rng, rows, queries=16, keys=16, heads=2, width=8):
  make = lambda tokens: rng.standard_normal((rows, tokens, heads, width), np.float32)
  return make(queries), make(keys), make(keys)


def with_scores_of(q, k, v, source):
  """Attention in numpy. Each row has the scores of row `source[row]`."""
  scores = np.einsum('bnhc,bmhc->bhnm', q, k)[source] * q.shape[-1] ** -0.5
  e = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum('bhnm,bmhc->bnhc', e / e.sum(-1, keepdims=True), v)


# Self-attention.


@pytest.mark.parametrize(('step', 'source'), [(2, [0, 0, 2, 2]), (3, [0, 1, 2, 3])])
def test_sharing_is_the_released_rule_in_both_halves(step, source, rng):
  q, k, v = qkv(rng, 4)
  attention = controlled(Control(share_until=np.array([3])), jnp.int32(step), level=1)
  expected = with_scores_of(q, k, v, source)
  np.testing.assert_allclose(attention(q, k, v, SELF), expected, atol=1e-6)


def test_each_pair_has_its_own_threshold(rng):
  q, k, v = qkv(rng, 8)  # halves x images x 2 pairs
  attention = controlled(Control(share_until=np.array([5, 2])), jnp.int32(3), level=1)
  expected = with_scores_of(q, k, v, [0, 1, 0, 3, 4, 5, 4, 7])
  np.testing.assert_allclose(attention(q, k, v, SELF), expected, atol=1e-6)


def test_sharing_does_not_change_attention_to_words(rng):
  q, k, v = qkv(rng, 4, keys=5)
  attention = controlled(Control(share_until=np.array([3])), jnp.int32(0), level=1)
  np.testing.assert_array_equal(attention(q, k, v, CROSS), attend(q, k, v))


@pytest.mark.parametrize(
  ('step', 'level', 'source'),
  [(4, 1, [0, 0, 2, 3]), (6, 1, [0, 1, 2, 3]), (4, 0, [0, 1, 2, 3])],
)
def test_injection_shares_coarse_self_attention_with_text(step, level, source, rng):
  q, k, v = qkv(rng, 4)
  injection = never()._replace(self_window=np.array([[2, 6]]))
  attention = controlled(Control(injection=injection), jnp.int32(step), level=1)
  expected = with_scores_of(q, k, v, source)
  np.testing.assert_allclose(attention(q, k, v, SELF._replace(level=level)), expected, atol=1e-6)


# Attention to words.


def probabilities(rng, *shape):
  x = rng.random(shape, np.float32)
  return x / x.sum(-1, keepdims=True)


def always(injection, steps=10):
  window = np.zeros_like(injection.cross_window)
  window[:, 1] = steps
  return injection._replace(cross_window=window)


def test_a_swapped_word_gets_the_attention_of_the_old_one(rng):
  first, second = probabilities(rng, 2, 1, 3, 4, 5)
  matrix = np.eye(5, dtype=np.float32)
  matrix[2:4] = 0
  matrix[2, 2:4] = 0.5  # two tokens replace the second word
  injection = always(never()._replace(matrix=matrix[None], has_source=(matrix.sum(0) > 0)[None]))
  out = injected(injection, jnp.int32(0), first, second)
  np.testing.assert_allclose(out[..., 2:4], np.repeat(first[..., 2:3] / 2, 2, -1), rtol=1e-6)
  np.testing.assert_allclose(out[..., [0, 1, 4]], first[..., [0, 1, 4]], rtol=1e-6)


def test_a_new_word_keeps_its_own_attention(rng):
  first, second = probabilities(rng, 2, 1, 3, 4, 5)
  matrix = np.eye(5, k=1, dtype=np.float32)  # one token is inserted at the start
  injection = always(never()._replace(matrix=matrix[None], has_source=matrix.sum(0)[None]))
  out = injected(injection, jnp.int32(0), first, second)
  np.testing.assert_allclose(out[..., 0], second[..., 0], rtol=1e-6)
  np.testing.assert_allclose(out[..., 1:], first[..., :-1], rtol=1e-6)


def test_weights_multiply_attention_and_are_not_normalised(rng):
  first, second = probabilities(rng, 2, 1, 3, 4, 5)
  injection = always(never()._replace(equalizer=np.array([[1, -2, 1, 3, 1]], np.float32)))
  out = injected(injection, jnp.int32(0), first, second)
  np.testing.assert_allclose(out, first * np.array([1, -2, 1, 3, 1]), rtol=1e-6)


def test_each_word_has_its_own_steps(rng):
  first, second = probabilities(rng, 2, 1, 3, 4, 5)
  injection = always(never())
  injection.cross_window[0, :, 3] = [4, 6]
  for step, is_on in ((3, False), (4, True), (5, True), (6, False)):
    out = injected(injection, jnp.int32(step), first, second)
    np.testing.assert_allclose(out[..., 3], (first if is_on else second)[..., 3], rtol=1e-6)
    np.testing.assert_allclose(out[..., 2], first[..., 2], rtol=1e-6)


def test_injection_changes_only_the_second_image_with_text(rng):
  q, k, v = qkv(rng, 4, keys=5)
  attention = controlled(Control(injection=always(never())), jnp.int32(0), level=1)
  out, free = np.asarray(attention(q, k, v, CROSS)), np.asarray(attend(q, k, v))
  np.testing.assert_allclose(out[[0, 2, 3]], free[[0, 2, 3]], atol=1e-6)
  expected = with_scores_of(q, k, v, [0, 0, 2, 3])[1]
  np.testing.assert_allclose(out[1], expected, atol=1e-6)


def test_blending_changes_only_the_regions_of_words():
  x = np.stack([np.zeros((1, 8, 8, 4)), np.ones((1, 8, 8, 4))]).astype(np.float32)
  seen = np.zeros((2, 1, 4, 4), np.float32)
  seen[0, 0, 0, 0], seen[1, 0, 3, 3], seen[1, 0, 0, 3] = 1.0, 2.0, 0.5  # the last: too little
  blend = Blend(np.zeros((1, 2, 5)), np.array([0.3]), np.array([2]))
  out = blended(blend, jnp.int32(2), seen, x)
  changed = np.zeros((8, 8))
  changed[:4, :4] = changed[4:, 4:] = 1  # grown by one token, enlarged twice
  np.testing.assert_array_equal(out[1, 0, ..., 0], changed)
  np.testing.assert_array_equal(blended(blend, jnp.int32(1), seen, x), x)  # too early


# Whole pairs, compared with a restatement on diffusers' UNet.


@pytest.fixture(scope='module')
def model():
  """A jitted program, networks, tokenizer, PyTorch's models, traced specs, parameters."""
  checkpoint = tiny_models.checkpoint(UNET)
  theirs = functools.cache(lambda: reference.models_of(checkpoint))
  networks = networks_of(checkpoint)
  params = params_of(checkpoint, networks, 'float32')
  tokenizer = tokenizer_of(checkpoint, networks)
  traces = []

  def traced(plan, params, request):
    traces.append(plan)
    return pair_program(networks, plan, params, request)

  program = jax.jit(traced, static_argnums=0)
  run = lambda plan, request: program(plan, params, request)
  return run, networks, tokenizer, theirs, traces, params


def request_of(model, rng, control, sampler='euler_ancestral'):
  networks, tokenizer = model[1:3]
  return PairRequest(
    token_ids=np.stack([tokenizer(CAPTIONS), tokenizer(EDITED)]),
    negative_ids=tokenizer(['']),
    guidance=np.float32([3.0, 1.5]),
    seeds=np.uint32([1, 2]),
    grid=samplers.noise_levels(networks.schedule, sampler, STEPS),
    control=control,
    init_noise=rng.standard_normal((2, 8, 8, 4), np.float32),
    step_noise=rng.standard_normal((STEPS, 2, 8, 8, 4), np.float32),
  )


def injection_of(model):
  """Refinement, with weights, of each pair."""
  tokenizer, windows, weights = model[2], [], []
  for text, word, weight in zip(EDITED, ('blue', 'hat'), (2.0, -1.0), strict=True):
    windows.append(alignment.windows(tokenizer, text, STEPS, 0.6, {word: 0.3}))
    weights.append(alignment.equalizer(tokenizer, text, {word: weight}))
  aligned = [alignment.refine(tokenizer, *texts) for texts in zip(CAPTIONS, EDITED, strict=True)]
  return Injection(
    self_window=np.int32([[0, 8], [2, 12]]),
    cross_window=np.stack(windows),
    matrix=np.stack([pair.matrix for pair in aligned]),
    has_source=np.stack([pair.has_source for pair in aligned]),
    equalizer=np.stack(weights),
  )


def blend_of(model):
  words = [(['red'], ['blue']), (['cats'], ['cats', 'hat'])]  # of caption, of edited caption
  masks = [
    [alignment.mask(model[2], *side) for side in zip(texts, both, strict=True)]
    for *texts, both in zip(CAPTIONS, EDITED, words, strict=True)
  ]
  return Blend(np.array(masks), np.float32([0.3, 0.9]), np.int32([0, 4]))


class Processor:
  """Attention of one layer, in the original's order: uncond 0, uncond 1, cond 0, cond 1."""

  def __init__(self, run, name):
    self.run, self.is_cross, self.is_mid = run, 'attn2' in name, name.startswith('mid')

  def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
    run = self.run
    context = x if encoder_hidden_states is None else encoder_hidden_states
    split = lambda y: y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    q, k, v = split(attn.to_q(x)), split(attn.to_k(context)), split(attn.to_v(context))
    scores = q @ k.transpose(-1, -2) * attn.scale
    is_coarse = x.shape[1] == 16
    if not self.is_cross and run.shares:
      scores = torch.stack([scores[0], scores[0], scores[2], scores[2]])
    p = scores.softmax(-1)
    i, injection = run.step, run.injection
    if injection is not None and not self.is_cross and is_coarse:
      if injection.self_window[0] <= i < injection.self_window[1]:
        p[3] = p[2]
    if injection is not None and self.is_cross:
      matrix, has = torch.tensor(injection.matrix), torch.tensor(injection.has_source)
      mixed = (p[2] @ matrix) * has + p[3] * (1 - has)
      start, stop = torch.tensor(injection.cross_window)
      alpha = ((start <= i) & (i < stop)).float()
      p[3] = mixed * torch.tensor(injection.equalizer) * alpha + p[3] * (1 - alpha)
    if self.is_cross and is_coarse and not self.is_mid:
      run.maps.append(p[2:].detach())
    return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


class Restatement:
  """One pair on diffusers' UNet with a sampler of k-diffusion, as in both originals."""

  def __init__(self, unet, share_until=0, injection=None, blend=None):
    self.unet, self.share_until, self.injection, self.blend = unet, share_until, injection, blend
    self.maps = []
    unet.set_attn_processor({name: Processor(self, name) for name in unet.attn_processors})

  @torch.no_grad()
  def draw(self, sampler, contexts, scale, init_noise, step_noise):
    sigmas = samplers.noise_levels(Schedule(), sampler, STEPS).sigmas.astype(np.float64)
    x = (torch.tensor(init_noise) * float(sigmas[0])).permute(2, 0, 1).repeat(2, 1, 1, 1)
    for self.step in range(STEPS):
      self.shares = self.share_until > self.step
      sigma, below = sigmas[self.step], sigmas[self.step + 1]
      eps = self.noise(x, sigma, contexts, scale)
      if sampler == 'heun':
        if below:
          count = len(self.maps)
          second = self.noise(x + eps * (below - sigma), below, contexts, scale)
          eps, self.maps = (eps + second) / 2, self.maps[:count]  # only the first maps count
        x = x + eps * (below - sigma)
      else:
        up = min(below, (below**2 * (sigma**2 - below**2) / sigma**2) ** 0.5)
        x = x + eps * ((below**2 - up**2) ** 0.5 - sigma)
        x = x + torch.tensor(step_noise[self.step]).permute(2, 0, 1) * up
      if self.blend is not None and self.step >= self.blend.start:
        x[1] = torch.where(self.mask(), x[1], x[0])
    return x.permute(0, 2, 3, 1).float().numpy()

  def noise(self, x, sigma, contexts, scale):
    t = np.interp(sigma, Schedule().sigmas, np.arange(1000))
    scaled = torch.cat([x, x]) / (sigma**2 + 1) ** 0.5
    eps = self.unet(scaled.float(), torch.tensor(t), contexts).sample
    return eps[:2] + scale * (eps[2:] - eps[:2])

  def mask(self):
    words = torch.tensor(self.blend.words)  # [2, L]
    mean = sum((m * words[:, None, None]).sum(-1).mean(1) for m in self.maps)  # [2, 16]
    pooled = torch.nn.functional.max_pool2d(mean.reshape(2, 1, 4, 4), 3, 1, 1)
    large = torch.nn.functional.interpolate(pooled, (8, 8))
    large = large / large.amax((2, 3), keepdim=True)
    return (large > self.blend.threshold)[:, 0].any(0)


CONTROLS = {
  'none': lambda model: Control(),
  'share': lambda model: Control(share_until=np.int32([12, 5])),
  'refine': lambda model: Control(injection=injection_of(model)),
  'both': lambda model: Control(np.int32([12, 5]), injection_of(model)),
  'blend': lambda model: Control(None, injection_of(model), blend_of(model)),
  'all': lambda model: Control(np.int32([12, 5]), injection_of(model), blend_of(model)),
}


@pytest.mark.long
@pytest.mark.parametrize(
  ('sampler', 'name'), [*(('euler_ancestral', name) for name in CONTROLS), ('heun', 'all')]
)
def test_whole_pairs_are_those_of_pytorch(sampler, name, model, rng):
  """The released code has no sampler with two evaluations per step, such as heun."""
  run, _, tokenizer, theirs, *_ = model
  control = CONTROLS[name](model)
  request = request_of(model, rng, control, sampler)
  ours = run(PairSpec(sampler, 8, 8), request).latents
  row = lambda part, i: None if part is None else type(part)(*(x[i] for x in part))
  for i, texts in enumerate(zip(CAPTIONS, EDITED, strict=True)):
    ids = torch.tensor(tokenizer(['', '', *texts])).long()
    with torch.no_grad():
      contexts = theirs()['text_encoder'](ids).last_hidden_state
    until = 0 if control.share_until is None else control.share_until[i]
    restated = Restatement(
      theirs()['unet'], until, row(control.injection, i), row(control.blend, i)
    ).draw(
      sampler, contexts, float(request.guidance[i]), request.init_noise[i], request.step_noise[:, i]
    )
    assert np.isfinite(restated).all()
    np.testing.assert_allclose(ours[:, i], restated, atol=1e-3)


@pytest.mark.parametrize('name', ['share', 'refine', 'both', 'blend'])
def test_no_control_changes_the_first_image(name, model, rng):
  run, plan = model[0], PairSpec('euler_ancestral', 8, 8)
  request = request_of(model, rng, CONTROLS[name](model))
  free = run(plan, request._replace(control=Control())).latents
  latents = run(plan, request).latents
  np.testing.assert_allclose(latents[0], free[0], atol=1e-5)
  assert np.abs(latents[1] - free[1]).max() > 0.01


def test_a_pair_without_control_is_two_ordinary_samples(model, rng):
  run, plan = model[0], PairSpec('euler_ancestral', 8, 8)
  request = request_of(model, rng, Control(share_until=np.int32([0, 0])))
  pairs = run(plan, request).latents
  turned = request._replace(token_ids=request.token_ids[::-1], control=Control())
  np.testing.assert_allclose(run(plan, turned).latents[::-1], pairs, atol=1e-5)


def test_one_program_serves_all_thresholds_scales_and_weights(model, rng):
  run, plan, traces = model[0], PairSpec('euler_ancestral', 8, 8), model[4]
  first = request_of(model, rng, CONTROLS['both'](model))
  run(plan, first)
  count = len(traces)
  injection = first.control.injection
  injection = injection._replace(equalizer=2 * injection.equalizer, matrix=injection.matrix[::-1])
  control = Control(np.int32([1, 2]), injection)
  run(plan, first._replace(control=control, guidance=np.float32([1.0, 15.0])))
  assert len(traces) == count


@pytest.mark.long
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_every_sampler_takes_every_control(sampler, model, rng):
  """Only traced: tracing fails if maps leave a branch."""
  networks = model[1]
  for name, shows in (('none', True), ('blend', False), ('all', True)):
    plan = PairSpec(sampler, 8, 8, shows)
    request = request_of(model, rng, CONTROLS[name](model), sampler)
    program = functools.partial(pair_program, networks, plan)
    pairs = jax.eval_shape(program, model[5], request)
    assert pairs.latents.shape == (2, 2, 8, 8, 4)
    assert (pairs.attention is not None) == shows


@pytest.mark.long
def test_attention_to_each_word_is_returned(model, rng):
  run = model[0]
  plan = PairSpec('euler_ancestral', 8, 8, shows_attention=True)
  request = request_of(model, rng, Control(share_until=np.int32([0, 0])))
  attention = run(plan, request).attention
  assert attention.shape == (2, 2, 4, 4, 77)
  np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)
