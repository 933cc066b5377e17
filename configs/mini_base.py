"""The miniature's text-to-image base: a UNet of 5.3 M parameters learns to draw captions.

  python train.py --config=configs/mini_base.py --workdir=out/miniature/base-run

`python examples/miniature/make.py` makes the first checkpoint and the latents for it.
"""

from ip2p_jax.config import DataConfig, LogConfig, OptimizerConfig, TrainConfig


def get_config():
  return TrainConfig(
    checkpoint='out/miniature/start',
    task='text_to_image',
    resolution=64,
    batch_size=32,
    steps=1000,
    dtype='float32',
    remat='none',
    conditioning_dropout=0.1 / 3,
    data=DataConfig(path='out/miniature/captions', workers=0),
    optimizer=OptimizerConfig(
      learning_rate=1e-3,
      schedule='cosine',
      warmup_steps=100,
      final_rate=0.02,
      b2=0.99,
      clip_norm=1.0,
      ema=0.998,
    ),
    log=LogConfig(every=50, checkpoint_every=500, validate_every=0, previews=8, preview_steps=20),
  )
