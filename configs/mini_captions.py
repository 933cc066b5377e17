"""The miniature's caption writer: learns the sentences of the drawn world, and how to edit them.

  ip2p captions train --config configs/mini_captions.py --workdir out/miniature/writer-run

`python examples/miniature/start_writer.py out/miniature/writer-start` makes its starting model and
triplets.
"""

from ip2p_jax.config import LanguageConfig, LanguageLogConfig, OptimizerConfig, TripletsConfig


def get_config():
  return LanguageConfig(
    checkpoint='out/miniature/writer-start/model',
    batch_size=32,
    steps=8000,
    dtype='float32',
    remat='none',
    data=TripletsConfig(path='out/miniature/writer-start/triplets.jsonl', holdout=0.02),
    optimizer=OptimizerConfig(
      learning_rate=3e-3,
      schedule='cosine',
      warmup_steps=100,
      final_rate=0.05,
      b2=0.98,
      clip_norm=1.0,
      ema=0.998,
    ),
    log=LanguageLogConfig(every=25, checkpoint_every=250, validate_every=250),
  )
