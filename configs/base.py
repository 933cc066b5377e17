"""Text-to-image training: Stable Diffusion's own objective, in the same step without input image.

  python train.py --config=configs/base.py --workdir=W \
    --config.checkpoint=stable-diffusion-v1-5 --config.data.path=images-with-captions

Takes any data set of images with captions; from edit data sets, the edited images and captions.
"""

from ip2p_jax.config import OptimizerConfig, TrainConfig


def get_config():
  return TrainConfig(
    task='text_to_image',
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000),
  )
