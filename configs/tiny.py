"""A run of a minute on a laptop, to see that everything works (it learns almost nothing).

  python examples/random_checkpoint.py out/tiny
  python train.py --config=configs/tiny.py --workdir=out/run \
    --config.checkpoint=out/tiny --config.data.path=my-pairs
"""

from ip2p_jax.config import DataConfig, LogConfig, TrainConfig


def get_config():
  return TrainConfig(
    resolution=64,
    batch_size=8,
    steps=20,
    dtype='float32',
    data=DataConfig(workers=0),
    log=LogConfig(every=5, checkpoint_every=10, validate_every=10, previews=2),
  )
