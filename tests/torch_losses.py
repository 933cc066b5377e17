"""The loss of a training step with diffusers' modules."""

import numpy as np
import peers
import torch_models as ref

torch = peers.module('torch')
DDPMScheduler = peers.module('diffusers').DDPMScheduler

DROPOUT = 0.05
SCHEDULE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}


def torch_losses(models, batch, draws, prediction_type='epsilon', gamma=0.0):
  """Each example's loss in a training step with diffusers' modules."""
  # The dropout as in the original's source.
  r = torch.from_numpy(np.array(draws.dropout))
  drops_text, drops_image = r < 2 * DROPOUT, (r >= DROPOUT) & (r < 3 * DROPOUT)
  ids = torch.from_numpy(batch['token_ids']).long()
  ids[drops_text] = torch.tensor([598] + 76 * [599])
  timesteps = torch.from_numpy(np.array(draws.timesteps)).long()
  scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction_type)
  with torch.no_grad():
    mean, std, image_latents = torch_posteriors(models, batch)
    latents = 0.18215 * (mean + std * ref.nchw(draws.posterior_noise))
    image_latents = torch.where(drops_image[:, None, None, None], 0.0, image_latents)
    context = models['text_encoder'](ids)[0]
  noise = ref.nchw(draws.noise)
  noisy = torch.cat([scheduler.add_noise(latents, noise, timesteps), image_latents], 1)
  predicted = models['unet'](noisy, timesteps, context).sample
  velocity = prediction_type == 'v_prediction'
  target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
  losses = ((predicted - target) ** 2).mean((1, 2, 3))
  if gamma:
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    losses = losses * torch.clamp(snr, max=gamma) / (snr + velocity)
  return losses


def torch_posteriors(models, batch):
  """Mean and deviation of the edited image's latents, mode of the input's."""
  if 'edited_mean' in batch:
    as_float = lambda name: ref.nchw(batch[name].astype(np.float32))
    std = torch.exp(0.5 * as_float('edited_log_variance'))
    return as_float('edited_mean'), std, as_float('input_mean')
  edited, source = (
    models['vae'].encode(ref.nchw(batch[name].astype(np.float32)) / 127.5 - 1).latent_dist
    for name in ('edited_image', 'input_image')
  )
  return edited.mean, edited.std, source.mode()
