"""Fine-tunes an editor on your own images, or on MagicBrush, as its authors did.

  python train.py --config=configs/finetune.py --workdir=W \
    --config.checkpoint=instruct-pix2pix --config.data.path=my-pairs

Starts from any 8-channel checkpoint. The learning rate is MagicBrush's, 5e-5. For a few hundred
pairs, 500 to 2000 steps are enough; look at W/previews. With --config.lora.rank=16 it trains
adapters of a few MB instead; then set --config.optimizer.learning_rate=1e-4 or more.
"""

from ip2p_jax.config import DataConfig, LogConfig, OptimizerConfig, TrainConfig


def get_config():
  return TrainConfig(
    batch_size=64,
    steps=2000,
    data=DataConfig(workers=4),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=100, clip_norm=1.0),
    log=LogConfig(every=20, checkpoint_every=500, validate_every=500),
  )
