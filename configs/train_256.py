"""The paper's run: 256 px, 10,000 steps of 1024 examples, from Stable Diffusion 1.5.

  python train.py --config=configs/train_256.py --workdir=W \
    --config.checkpoint=stable-diffusion-v1-5 --config.data.path=clip-filtered-latents

Expect 5.5 EFLOP with precomputed latents (`ip2p pack --latents`), 11.3 from images. The paper
took 25.5 hours on 8 A100. On smaller devices raise `accumulation`; with 16 GB set `mesh.fsdp`, too.
"""

from ip2p_jax.config import TrainConfig


def get_config():
  return TrainConfig()
