"""The miniature's editor: its base with four more input channels, trained on exact pairs.

  python train.py --config=configs/mini.py --workdir=out/miniature/run

`python examples/miniature/make.py` makes the base and the latents for it.
"""

from ip2p_jax.config import DataConfig, LogConfig, OptimizerConfig, TrainConfig


def get_config():
  return TrainConfig(
    checkpoint='out/miniature/base',
    resolution=64,
    batch_size=32,
    steps=8000,
    dtype='float32',
    remat='none',
    data=DataConfig(path='out/miniature/edits', workers=0),
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
