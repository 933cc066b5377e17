"""Teaches a language model to write edits, from triplets of texts (the paper's first stage).

  ip2p captions train --config configs/captions.py --workdir W \
    --config.checkpoint=Qwen3-1.7B --config.data.path=assets/triplets.jsonl

The paper fine-tuned GPT-3 (davinci) on 700 triplets. Here any Llama, Qwen2 or Qwen3 works, as a
folder of transformers. Three passes over 700 triplets are 63 steps.

Every weight takes 16 bytes (weight, average and two moments in float32), split over all devices: 8
billion weights take 8 GB on each of 16 devices. On a pod slice such as v5e-16, run on every host

  python train.py --multihost --config=configs/captions.py --workdir=gs://bucket/W \
    --config.checkpoint=Llama-3.1-8B --config.data.path=triplets.jsonl --config.mesh.fsdp=16

On one GPU, train adapters. Then 8 billion frozen weights take 16 GB in bfloat16:

  ip2p captions train --config configs/captions.py --workdir W --config.checkpoint=Llama-3.1-8B \
    --config.data.path=triplets.jsonl --config.lora.rank=16 --config.optimizer.learning_rate=2e-4

If memory is short, raise --config.accumulation. `ip2p convert W DST` writes the model with merged
adapters, for `ip2p captions write` and for transformers.
"""

from ip2p_jax.config import LanguageConfig


def get_config():
  return LanguageConfig()
