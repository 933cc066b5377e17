"""What the miniature's caption writer starts from: a language model that knows nothing, and texts.

  python examples/miniature/start_writer.py out/miniature/writer-start

  OUT/model               a Llama of random weights with a tokenizer made for the world's sentences
  OUT/triplets.jsonl      what it learns from: caption, instruction, edited caption
  OUT/several.jsonl       the hardest of them: of two or three objects, often one is taken away
  OUT/captions.txt        captions that are not among them, to write edits for

A real writer starts from a language model that has read the web, and needs 700 triplets; this one
learns its language from them, too, and so gets many.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import phrases
import world
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ip2p_jax.captions import generate, triplets
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig
from ip2p_jax.storage import write_bytes
from ip2p_jax.weights import names
from ip2p_jax.weights.language_folder import LanguageCheckpoint, write_language

END = '<|end|>'
FIRST = 2_000_000  # seed of the first scene, far from those of the pairs
UNSEEN = 4_000_000  # seed of the first scene that no triplet is of
CONFIG = {
  'model_type': 'llama',
  'hidden_size': 160,
  'intermediate_size': 448,
  'num_hidden_layers': 4,
  'num_attention_heads': 5,
  'num_key_value_heads': 5,
  'max_position_embeddings': 256,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'hidden_act': 'silu',
  'tie_word_embeddings': True,
  'attention_bias': False,
  'mlp_bias': False,
}
VOCABULARY = 512
LONGEST = 96  # tokens of a triplet; one in a thousand is longer


def triplet(seed: int, example=world.example) -> triplets.Triplet:
  """Scene and edit of the seed; the edited caption keeps the caption's words, as far as it can."""
  one = example(seed)
  rng, habits = np.random.default_rng((seed, 2)), {}
  if any(edit.kind == 'resize' for edit in one.edits):
    habits['size'] = 0.0  # is told, else the captions would be the same
  before, after = (phrases.caption(rng, scene, habits) for scene in (one.scene, one.edited_scene))
  return triplets.Triplet(before, one.instruction, after)


def several(seed: int) -> world.Example:
  """An example of two objects or three, about as many of each; one is taken away in four of 11."""
  rng = np.random.default_rng((seed, 3))
  while True:
    scene = world.random_scene(rng)
    if len(scene.objects) < 2 or (len(scene.objects) == 2 and rng.random() < 0.7):
      continue
    edit, edited = world.random_edit(rng, scene, (*world.KINDS, *('remove',) * 3))
    if edit and world.split_of(scene) == world.split_of(edited) == 'train':
      words = phrases.instruction(rng, scene, (edit,), is_new=False)
      return world.Example(scene, (edit,), edited, words, '', '', False)


def tokenizer_of(texts: list[str]) -> Tokenizer:
  """Byte-level BPE; words keep the space before them, as in every Llama since the third."""
  bpe = Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY,
    special_tokens=[END],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  return bpe


def start(texts: list[str]) -> LanguageCheckpoint:
  """A model of random weights: standard deviation width**-0.5, less where layers add up.

  With 0.02, which larger networks take, one of this width does not copy a word after 2,500 steps.
  """
  tokenizer = tokenizer_of(texts)
  end = tokenizer.token_to_id(END)
  config = CONFIG | {
    'vocab_size': tokenizer.get_vocab_size(), 'bos_token_id': end, 'eos_token_id': end,
  }  # fmt: skip
  params = nnx.to_pure_dict(nnx.split(Llama(LlamaConfig.from_json(config), rngs=nnx.Rngs(0)))[1])
  tensors, rng = names.to_tensors(params), np.random.default_rng(0)
  for name in sorted(tensors):
    if tensors[name].ndim == 2:
      spread = tensors[name].shape[1] ** -0.5
      if name.endswith(('o_proj.weight', 'down_proj.weight')):
        spread /= (2 * CONFIG['num_hidden_layers']) ** 0.5
      tensors[name] = rng.normal(0, spread, tensors[name].shape).astype(np.float32)
  return LanguageCheckpoint(config, tensors, tokenizer.to_str().encode(), 'the miniature')


def main(folder: Path, count: int, captions: int) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  learned = [triplet(seed) for seed in range(FIRST, FIRST + count)]
  checkpoint = start([_text(one) for one in learned])
  write_language(checkpoint, folder / 'model', overwrite=True)
  hardest = (triplet(seed, several) for seed in range(FIRST, FIRST + count))
  encode = generate.tokenizer_of(checkpoint).encode
  # Rows are padded to the longest, so the few long ones would be work for all.
  fits = lambda one: one.caption != one.edited and len(encode(_text(one))) <= LONGEST
  learned, hardest = ([one for one in ones if fits(one)] for ones in (learned, hardest))
  _write(folder / 'triplets.jsonl', map(_line, learned))
  _write(folder / 'several.jsonl', map(_line, hardest))
  known = {one.caption for one in (*learned, *hardest)}
  others = (triplet(seed).caption for seed in itertools.count(UNSEEN))
  others = itertools.islice((text for text in others if text not in known), captions)
  others = list(dict.fromkeys(others))
  _write(folder / 'captions.txt', others)
  print(f'wrote {folder}: {len(learned):,} triplets, {len(others):,} different captions')


def _text(one):
  return triplets.prompt(one.caption) + triplets.completion(one)


def _line(one):
  return json.dumps({'input': one.caption, 'edit': one.instruction, 'output': one.edited})


def _write(file, lines):
  write_bytes(file, ''.join(f'{line}\n' for line in lines).encode())


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--triplets', type=int, default=200_000)
  parser.add_argument('--captions', type=int, default=2_000)
  arguments = parser.parse_args()
  main(arguments.folder, arguments.triplets, arguments.captions)
