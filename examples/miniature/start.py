"""The checkpoint that the miniature's text-to-image training starts from.

  python examples/miniature/start.py out/miniature/start --vae out/miniature/vae --clip ...

The trained autoencoder, the trained text tower and tokenizer, and a UNet of random weights that
answers zero at first.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ip2p_jax import weights
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.configs import UNetConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.weights import names

UNET = UNetConfig(
  block_out_channels=(48, 96, 128),
  layers_per_block=1,
  cross_attention_dim=128,
  attention_head_dim=2,  # heads, as in every checkpoint
  norm_num_groups=8,
  down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
  up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
  sample_size=16,
)
TOKENIZER = ('vocab.json', 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json')


def start(vae: Path, clip: Path) -> weights.Checkpoint:
  unet = nnx.to_pure_dict(nnx.split(UNet(UNET, rngs=nnx.Rngs(0)))[1])
  unet['conv_out'] = jax.tree.map(np.zeros_like, unet['conv_out'])
  clip_tensors = weights.read_tensors(clip / 'model.safetensors')[0]
  tensors = {
    'unet': names.to_tensors(unet),
    'vae': weights.read_tensors(vae / 'diffusion_pytorch_model.safetensors')[0],
    'text_encoder': {k: v for k, v in clip_tensors.items() if k.startswith('text_model.')},
  }
  configs = {
    'unet': UNET.to_json(),
    'vae': json.loads((vae / 'config.json').read_text()),
    'text_encoder': json.loads((clip / 'config.json').read_text())['text_config'],
    'scheduler': Schedule(prediction_type='v_prediction').to_json(),
  }
  tokenizer = {name: (clip / name).read_bytes() for name in TOKENIZER}
  return weights.Checkpoint(configs, tensors, tokenizer, 'the miniature')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--vae', type=Path, default=Path('out/miniature/vae'))
  parser.add_argument('--clip', type=Path, default=Path('out/miniature/clip'))
  arguments = parser.parse_args()
  weights.write(start(arguments.vae, arguments.clip), arguments.folder, overwrite=True)
  print(f'wrote {arguments.folder}')
