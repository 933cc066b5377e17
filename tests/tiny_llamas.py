"""Tiny language models of every kind with random normal weights, ours and transformers'."""

from pathlib import Path

import peers
import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import MODEL_TYPES, LlamaConfig
from ip2p_jax.weights.language_folder import LanguageCheckpoint, write_language

torch, transformers = peers.module('torch'), peers.module('transformers')

TEXT = (
  'a photograph of a girl riding a horse, make it a dragon, have her ride a dragon, winter, snow, '
  'oil painting of mountains at sunset; add a rainbow to the sky. swap sunflowers with roses '
)
VOCABULARY = 320
END = '<|endoftext|>'
SIZES = {
  'vocab_size': VOCABULARY,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  'bos_token_id': None,
  'eos_token_id': 0,
  'pad_token_id': None,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 48,
}
CONFIGS = {
  'llama3': {'model_type': 'llama', 'rope_parameters': _LLAMA3},
  'llama-linear': {
    'model_type': 'llama',
    'rope_parameters': {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 3.0},
    'attention_bias': True,
    'mlp_bias': True,
    'head_dim': 16,
  },
  'smollm2': {
    'model_type': 'llama',
    'num_attention_heads': 3,
    'num_key_value_heads': 1,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 100000.0},
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-5,
  },
  'qwen2': {'model_type': 'qwen2'},
  'qwen3': {'model_type': 'qwen3', 'head_dim': 16, 'tie_word_embeddings': True},
}


def checkpoint(kind: str = 'smollm2', **changes) -> LanguageCheckpoint:
  """One of CONFIGS with random normal weights; `changes` are keys such as `num_hidden_layers=3`."""
  config = {**SIZES, **CONFIGS[kind], **changes}
  config['architectures'] = [MODEL_TYPES[config['model_type']]]
  make = lambda keys: Llama(LlamaConfig.from_json(config), rngs=keys)
  tensors = tiny_models.random_tensors(abstract(make)[1])
  return LanguageCheckpoint(config, tensors, tokenizer().to_str().encode(), kind)


def build(kind: str, **changes):
  """transformers' model with the same weights."""
  source = checkpoint(kind, **changes)
  config = transformers.AutoConfig.for_model(**source.config)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
  model.load_state_dict({name: torch.from_numpy(x) for name, x in source.tensors.items()}, False)
  return model.eval()


def tokenizer() -> Tokenizer:
  """A byte-level BPE of VOCABULARY tokens; token 0 is the end of text, as in SmolLM2."""
  result = Tokenizer(models.BPE())
  result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  result.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  result.train_from_iterator([TEXT] * 4, trainer)
  assert result.get_vocab_size() == VOCABULARY
  return result


def write(folder: Path, kind: str = 'smollm2', **changes) -> Path:
  """Saves such a model and tokenizer as on a hub."""
  write_language(checkpoint(kind, **changes), folder)
  return folder
