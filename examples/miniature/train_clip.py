"""Trains the miniature's CLIP: a tokenizer, a text tower and a vision tower.

  python examples/miniature/train_clip.py out/miniature/clip

The towers learn which caption belongs to which picture (Radford et al. 2021). CLIP has read the
web, but ours would never meet the words of instructions, so its text tower also learns to tell,
from an instruction's last state and by linear heads that are thrown away, what each of its edits is
about. Prints how often the right one of 64 captions is found for a picture it never saw and how
often an instruction in words that were never trained is understood, and writes a folder as
transformers' CLIPModel has it.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import world
from fit import fit
from flax import nnx
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ip2p_jax import weights
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.tokenizer import END, PIECES, START, ClipTokenizer
from ip2p_jax.pipeline.clip_scores import MEAN, STD
from ip2p_jax.weights import names

VOCABULARY, LENGTH, WIDTH, SHARED = 768, 40, 128, 64
TEXT = TextConfig(
  vocab_size=VOCABULARY,
  hidden_size=WIDTH,
  intermediate_size=4 * WIDTH,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=LENGTH,
  projection_dim=SHARED,
  eos_token_id=VOCABULARY - 1,
)
VISION = VisionConfig(
  hidden_size=WIDTH,
  intermediate_size=4 * WIDTH,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=world.SIDE,
  patch_size=8,
  projection_dim=SHARED,
)


def train_tokenizer(count: int = 10_000) -> dict[str, bytes]:
  """CLIP's kind of BPE over captions and instructions: the contents of its files by name."""
  texts = [
    t for i in range(count) for t in (world.example(i).caption, world.example(i).instruction)
  ]
  split = pre_tokenizers.Split(Regex(PIECES), 'removed', invert=True)
  bpe = Tokenizer(models.BPE(end_of_word_suffix='</w>'))
  bpe.normalizer = normalizers.Lowercase()
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY, end_of_word_suffix='</w>', show_progress=False
  )
  bpe.train_from_iterator(texts, trainer)
  merges = [' '.join(pair) for pair in json.loads(bpe.to_str())['model']['merges']]
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  known = [*letters, *(f'{letter}</w>' for letter in letters)]
  merges = merges[: VOCABULARY - len(known) - 2]
  known += [merge.replace(' ', '') for merge in merges]
  vocab = {token: i for i, token in enumerate([*known, START, END])}
  config = {
    'tokenizer_class': 'CLIPTokenizer',
    'model_max_length': LENGTH,
    'bos_token': START,
    'eos_token': END,
    'unk_token': END,
    'pad_token': END,
  }
  special = {key: value for key, value in config.items() if key.endswith('_token')}
  return {
    'vocab.json': json.dumps(vocab, ensure_ascii=False).encode(),
    'merges.txt': '\n'.join(['#version: 0.2', *merges, '']).encode(),
    'tokenizer_config.json': json.dumps(config, indent=2).encode(),
    'special_tokens_map.json': json.dumps(special, indent=2).encode(),
  }


def normalised(pictures: np.ndarray) -> np.ndarray:
  """uint8 [N, 64, 64, 3] as the vision tower wants it."""
  return (pictures.astype(np.float32) / 255 - MEAN) / STD


def batch(tokenizer: ClipTokenizer, step: int, count: int, split: str = 'train'):
  """Pictures, their captions' tokens, as many instructions' tokens, and their meanings."""
  examples = [world.example(seed, split) for seed in range(step * count, (step + 1) * count)]
  scenes = [one.edited_scene if i % 2 else one.scene for i, one in enumerate(examples)]
  captions = [one.edited_caption if i % 2 else one.caption for i, one in enumerate(examples)]
  pictures = normalised(np.stack([world.picture(scene) for scene in scenes]))
  meanings = np.array([meaning(one) for one in examples])
  return pictures, tokenizer(captions), tokenizer([one.instruction for one in examples]), meanings


WORDS = {
  'kind': world.KINDS,
  'word': (*world.COLOURS, *world.SHAPES, *world.SIZES, *world.BACKGROUNDS, *world.STYLES,
           'night', 'day'),
  'subject': world.SHAPES,
  'shape': world.SHAPES,
  'colour': tuple(world.COLOURS),
  'size': tuple(world.SIZES),
  'place': tuple(world.PLACES),
}  # fmt: skip
"""What there is to tell of an edit; 'shape' to 'place' are of a new object."""
EDITS = 2  # of one instruction, at most
HEADS = [1 + len(words) for words in WORDS.values()] * EDITS  # answers; 0 is none


def meaning(example: world.Example) -> list[int]:
  """The right answer of each head."""
  answers = []
  for edit in example.edits:
    told = {'kind': edit.kind, 'word': edit.word, 'subject': edit.before and edit.before.shape}
    if edit.kind == 'add':
      told |= edit.after._asdict()
    answers += [1 + words.index(told[name]) if told.get(name) else 0
                for name, words in WORDS.items()]  # fmt: skip
  return answers + [0] * (len(HEADS) - len(answers))


def answers(heads: dict[str, jax.Array], states: jax.Array) -> list[jax.Array]:
  """Logits [B, answers] of each head, from states [B, C]."""
  return jnp.split(states @ heads['kernel'] + heads['bias'][None], np.cumsum(HEADS)[:-1], -1)


def main(folder: Path, steps: int, batch_size: int) -> None:
  files = train_tokenizer()
  tokenizer = ClipTokenizer(files, LENGTH, VOCABULARY, str(folder))
  rngs = nnx.Rngs(0)
  text_def, text = nnx.split(TextEncoder(TEXT, has_projection=True, rngs=rngs))
  vision_def, vision = nnx.split(VisionEncoder(VISION, rngs=rngs))
  text, vision = nnx.to_pure_dict(text), nnx.to_pure_dict(vision)
  for table in text['text_model']['embeddings'].values():  # as CLIP's begin
    table['embedding'] = table['embedding'] * (0.02 / table['embedding'].std())
  heads = {'kernel': jnp.zeros((WIDTH, sum(HEADS))), 'bias': jnp.zeros(sum(HEADS))}
  params = {'text': text, 'vision': vision, 'heads': heads}
  params['logit_scale'] = jnp.float32(np.log(1 / 0.07))

  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def last_states(tower, ids):
    return tower(ids)[jnp.arange(len(ids)), (ids == TEXT.eos_token_id).argmax(-1)]

  def towers(params, pictures, ids, instructions):
    """Unit vectors of pictures and of captions, and the logits of instructions."""
    tower = nnx.merge(text_def, params['text'])
    states = last_states(tower, jnp.concatenate([ids, instructions]))
    images = nnx.merge(vision_def, params['vision'])(pictures)
    texts, told = states[: len(ids)], answers(params['heads'], states[len(ids) :])
    return unit(images), unit(tower.text_projection(texts)), told

  def loss(params, key, pictures, ids, instructions, meanings):
    del key
    images, texts, told = towers(params, pictures, ids, instructions)
    scores = jnp.exp(jnp.minimum(params['logit_scale'], np.log(100))) * images @ texts.T
    right = lambda scores: -jnp.diagonal(jax.nn.log_softmax(scores)).mean()
    contrast = (right(scores) + right(scores.T)) / 2
    understood = sum(
      optax.softmax_cross_entropy_with_integer_labels(logits, meanings[:, i]).mean()
      for i, logits in enumerate(told)
    )
    return contrast + 0.5 * understood, {'contrast': contrast, 'understood': understood}

  held_out = [batch(tokenizer, step, 64, 'test') for step in range(8)]
  towers_of = jax.jit(towers)

  def check(params):
    """How often the right caption of 64 is found, and an instruction wholly understood."""
    found, understood = [], []
    for *inputs, meanings in held_out:
      images, texts, told = towers_of(params, *inputs)
      found.append((images @ texts.T).argmax(1) == np.arange(64))
      said = np.stack([logits.argmax(-1) for logits in told], 1)
      understood.append((said == meanings).all(1))
    return {'retrieval': float(np.mean(found)), 'understood': float(np.mean(understood))}

  make = lambda step: batch(tokenizer, step, batch_size)
  params = fit(loss, params, make, folder, steps=steps, learning_rate=1e-3, check=check)
  write(folder, params, files)
  found = check(params)
  print(
    f'wrote {folder}: finds {100 * found["retrieval"]:.1f}% of 64 captions, understands'
    f' {100 * found["understood"]:.1f}% of instructions'
  )


def write(folder: Path, params: dict, files: dict[str, bytes]) -> None:
  """The folder that transformers' CLIPModel and CLIPTokenizer read."""
  tensors = {**names.to_tensors(params['text']), **names.to_tensors(params['vision'])}
  tensors['logit_scale'] = np.asarray(params['logit_scale'])
  weights.write_safetensors(folder / 'model.safetensors', tensors)
  vision = {'model_type': 'clip_vision_model', **vars(VISION)}
  config = {
    'architectures': ['CLIPModel'],
    'model_type': 'clip',
    'projection_dim': SHARED,
    'text_config': TEXT.to_json(),
    'vision_config': vision,
  }
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  for name, content in files.items():
    (folder / name).write_bytes(content)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--steps', type=int, default=1200)
  parser.add_argument('--batch-size', type=int, default=64)
  arguments = parser.parse_args()
  main(arguments.folder, arguments.steps, arguments.batch_size)
