"""The paper's recipe at 512 px, continued from a 256 px editor (or from Stable Diffusion itself).

  python train.py --config=configs/train_512.py --workdir=W \
    --config.checkpoint=instruct-pix2pix --config.data.path=clip-filtered-latents-512

Only `resolution` changes the size of the images. A step costs 4.5 times that at 256 px.
"""

from ip2p_jax.config import OptimizerConfig, TrainConfig


def get_config():
  return TrainConfig(
    resolution=512,
    batch_size=256,
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=500),
  )
