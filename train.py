"""Trains InstructPix2Pix.

  python train.py --config=configs/train_256.py --workdir=gs://bucket/run \\
    --config.checkpoint=stable-diffusion-v1-5 --config.data.path=clip-filtered-latents
  python train.py --config=configs/finetune.py --workdir=W --config.checkpoint=instruct-pix2pix \\
    --config.data.path=my-pairs --config.optimizer.learning_rate=3e-5

Run the same command again to resume. ip2p_jax/config.py explains every setting.
"""

from absl import app, flags
from ml_collections import config_flags

from ip2p_jax.cli import train

config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics and previews; may be gs://.')
flags.DEFINE_bool('multihost', False, 'Whether this is one process of several, as on a TPU pod.')
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, if JAX cannot detect it.')
flags.DEFINE_integer('num_processes', None, 'With --coordinator: the number of processes.')
flags.DEFINE_integer('process_id', None, 'With --coordinator: the number of this process, from 0.')

if __name__ == '__main__':
  app.run(train.train, flags_parser=train.parse)
