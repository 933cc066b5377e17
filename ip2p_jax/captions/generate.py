"""Texts from a language model: many rows at once, each continues its own prompt.

A batch has a fixed number of slots. When a row ends, the next prompt takes its slot while the other
rows go on. Every step has to read all weights, and so the batch stays full. S slots, R prompts read
at once, P tokens of a prompt, V vocabulary, M places of the cache.

Slots are split over `data` of the mesh, weights over `fsdp`. Groups of devices that share the
weights do not communicate with other groups.
"""

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ip2p_jax import sharding
from ip2p_jax.captions.program import STEPS, Knobs, TextRows, text_programs
from ip2p_jax.errors import InputError
from ip2p_jax.models import llama
from ip2p_jax.models.layers import Params, abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig
from ip2p_jax.weights import names
from ip2p_jax.weights.language_folder import LanguageCheckpoint, read_language
from ip2p_jax.weights.tensors import float_dtype
from ip2p_jax.xla_alarms import quietly

SLOTS = 64  # for each copy of the weights
READ_AT_ONCE = 8  # prompts, by each group of devices
# One program for each length of prompts and of the cache, so these are rounded up.
LEAST_PROMPT = 16  # tokens; lengths of prompts are powers of two from this on
CACHE_BLOCK = 64  # tokens; lengths of the cache are multiples of this


class Completion(NamedTuple):
  """The text that continues a prompt.

  Attributes:
    index: of the prompt.
    text: without the stop.
    tokens: up to and including the one that completed the stop or ended the text.
    is_finished: whether it reached the stop or an end token; else it ran out of tokens.
  """

  index: int
  text: str
  tokens: tuple[int, ...]
  is_finished: bool


class Language(NamedTuple):
  """A language model ready to run; `nnx.merge(definition, params)` is the module."""

  config: LlamaConfig
  definition: nnx.GraphDef
  params: Params
  tokenizer: Tokenizer
  source: str
  mesh: Mesh  # its `fsdp` devices share the weights

  @classmethod
  def load(cls, path: str | os.PathLike, dtype: str = 'float32', split: int | None = None) -> Self:
    """Reads a folder of transformers, onto all devices of this process.

    Args:
      path: the folder.
      dtype: of the weights and of the arithmetic.
      split: how many devices share one copy of the weights; None takes the fewest that leave half
        of their memory free.

    Raises InputError that names the file, key or tensor that is wrong.
    """
    return cls.of(read_language(path), dtype, split)

  @classmethod
  def of(
    cls, checkpoint: LanguageCheckpoint, dtype: str = 'float32', split: int | None = None
  ) -> Self:
    kind, source = float_dtype(dtype), checkpoint.source
    config = LlamaConfig.from_json(checkpoint.config, f'{source}/config.json')
    tokenizer = tokenizer_of(checkpoint)
    definition, shapes = abstract(lambda keys: Llama(config, rngs=keys))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), shapes)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    mesh = sharding.mesh_for(size, split)
    target = placed(mesh, target)
    params = names.to_params(
      checkpoint.tensors, target, 'language', source=source, place=_on_devices
    )
    return cls(config, definition, params, tokenizer, source, mesh)


def placed(mesh: Mesh, shapes: Params) -> Params:
  """Shapes of weights, with their shardings on a mesh."""
  of = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.tree.map(of, shapes, sharding.of_language(mesh, shapes))


def tokenizer_of(checkpoint: LanguageCheckpoint) -> Tokenizer:
  """Raises InputError if tokenizer.json is damaged, or has more tokens than the model."""
  where = f'{checkpoint.source}/tokenizer.json'
  try:
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.decode())
  except Exception as error:  # the library raises bare Exceptions
    raise InputError(f'{where}: cannot be read ({error}); fetch the file again.') from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  size, count = checkpoint.config.get('vocab_size', 0), tokenizer.get_vocab_size()
  if count > size:
    raise InputError(f'{where}: has {count} tokens, but the model has {size}; use the tokenizer '
                     'of the model.')  # fmt: skip
  return tokenizer


def write(
  language: Language,
  prompts: Sequence[str],
  *,
  seeds: Sequence[int],
  temperature: float = 0.7,
  top_p: float = 1.0,
  frequency_penalty: float = 0.0,
  stop: str | None = '\nEND',
  max_tokens: int = 256,
  slots: int | None = None,
) -> Iterator[Completion]:
  """Continues every prompt; yields completions as rows end, in any order.

  A text depends on its prompt and its seed, not on the other prompts, their order or `slots`
  (except by rounding, if two tokens are equally likely to the last digit).

  Args:
    language: the model.
    prompts: any number; texts in the format of the model's training, without a chat template.
    seeds: one per prompt, 0 to 2 ** 64 - 1.
    temperature: the logits are divided by it; 0 always takes the likeliest token.
    top_p: tokens are drawn from the likeliest ones that together have this probability.
    frequency_penalty: subtracted from a token's logit for each time that the row has the token.
    stop: a text ends before it; None for no stop.
    max_tokens: the most tokens of a text; the model's context limits it, too.
    slots: rows at a time, on all devices together; more are faster in total and take more memory.
      None takes SLOTS for each copy of the weights.

  Raises:
    InputError: an argument is out of range, or a prompt is empty or too long for the model.
  """
  slots = SLOTS * language.mesh.shape['data'] if slots is None else slots
  knobs = _knobs(temperature, top_p, frequency_penalty)
  for name, count in (('max_tokens', max_tokens), ('slots', slots)):
    if not 1 <= count < 2**15:
      raise InputError(f'{name} is {count}; it has to be from 1 to {2**15 - 1}.')
  if len(seeds) != len(prompts):
    raise InputError(f'seeds: {len(seeds)} for {len(prompts)} prompts; give one for each.')
  if any(not 0 <= seed < 2**64 for seed in seeds):
    raise InputError('seeds: each has to be a whole number from 0 to 2 ** 64 - 1.')
  if stop == '':
    raise InputError('stop is empty, so every text would be empty; give None for no stop.')
  tokens = _encoded(language, prompts)
  slots = Slots(language, min(slots, _power_of_two(len(prompts))), max_tokens)
  return _write(slots, list(zip(tokens, map(int, seeds), strict=True)), knobs, stop)


def has_room(language: Language, prompts: Sequence[str]) -> list[bool]:
  """Whether each prompt leaves room for at least one token in the model's context."""
  most = language.config.max_position_embeddings
  return [len(tokens) < most for tokens in _tokens(language, prompts)]


class Slots:
  """A batch of rows: caches on the devices, states of the rows on the host."""

  def __init__(self, language: Language, count: int, max_tokens: int):
    self.language, self.max_tokens = language, max_tokens
    self.groups = language.mesh.shape['data']
    count = -(-count // language.mesh.size) * language.mesh.size
    self.each = count // self.groups  # slots of a group
    self.programs = text_programs(language.definition, language.config, language.mesh)
    dtype = jax.tree.leaves(language.params)[0].dtype
    self.cache, self.counts = self.programs.begin(count, CACHE_BLOCK, str(dtype))
    self.rows = TextRows(*np.full((3, count), -1, np.int32), np.zeros((count, 2), np.uint32))

  def room(self, taken: Collection[int]) -> list[int]:
    """Free slots for prompts that are read at once, from all groups in turn."""
    slots = np.arange(len(self.rows.token)).reshape(self.groups, -1)
    free = ([slot for slot in group if slot not in taken][:READ_AT_ONCE] for group in slots)
    return [slot for turn in itertools.zip_longest(*free) for slot in turn if slot is not None]

  def fill(self, prompts: Mapping[int, tuple[np.ndarray, int]]):
    """Begins rows: slot -> prompt's tokens and seed; the slots come from one call of `room`."""
    longest = max(len(tokens) for tokens, _ in prompts.values())
    shape = self.groups, READ_AT_ONCE, max(LEAST_PROMPT, _power_of_two(longest))
    slots = np.full(shape[:2], self.each, np.int32)  # no slot at all
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    filled = [0] * self.groups
    for slot, (prompt, seed) in prompts.items():
      group, read = slot // self.each, len(prompt) - 1
      place, filled[group] = (group, filled[group]), filled[group] + 1
      slots[place] = slot % self.each
      tokens[place][:read], positions[place][:read] = prompt[:-1], np.arange(read)
      # The last token is read when the row goes on.
      room = min(self.max_tokens, self.language.config.max_position_embeddings - len(prompt))
      self.rows.token[slot], self.rows.position[slot] = prompt[-1], read
      self.rows.last[slot], self.rows.seeds[slot] = read + room, divmod(seed, 2**32)
    self._make_room()
    flat = (x.reshape(-1, *x.shape[2:]) for x in (slots, tokens, positions))
    self.cache, self.counts = quietly(
      self.programs.read, self.language.params, self.cache, self.counts, *flat
    )

  def go_on(self, knobs: Knobs) -> np.ndarray:
    """STEPS more tokens of each row, int32 [S, STEPS]; -1 after the end of a row."""
    rows = self.rows
    busy = rows.position >= 0
    self._make_room()
    steps = min(STEPS, (rows.last - rows.position)[busy].max())
    self.cache, self.counts, new = quietly(
      self.programs.step,
      self.language.params,
      self.cache,
      self.counts,
      rows,
      np.int32(steps),
      knobs,
    )
    new = np.asarray(new)
    grown = (new >= 0).sum(1)
    rows.position[busy] += grown[busy]
    rows.token[busy] = new[busy, grown[busy] - 1]
    return new

  def is_full(self, slot: int) -> bool:
    return self.rows.position[slot] == self.rows.last[slot]

  def free(self, slot: int):
    self.rows.position[slot] = -1

  def _make_room(self):
    read = np.minimum(self.rows.position + STEPS, self.rows.last)[self.rows.position >= 0]
    length = -(-int(read.max()) // CACHE_BLOCK) * CACHE_BLOCK
    if length != llama.cache_length(self.cache):
      self.cache = self.programs.resized(self.cache, length)


def _write(slots, prompts, knobs, stop):
  tokenizer, ends = slots.language.tokenizer, slots.language.config.eos_token_id
  waiting, texts = iter(enumerate(prompts)), {}  # slot -> index of the prompt, tokens so far
  while True:
    while begun := list(zip(slots.room(texts), waiting, strict=False)):
      slots.fill({slot: prompt for slot, (_, prompt) in begun})
      texts |= {slot: (index, []) for slot, (index, _) in begun}
    if not texts:
      return
    for slot, new in enumerate(slots.go_on(knobs)):
      if slot not in texts:
        continue
      index, tokens = texts[slot]
      count = len(tokens)
      tokens.extend(new[new >= 0].tolist())
      result = _ended(tokenizer, tokens, count, stop, ends)
      if result is None and slots.is_full(slot):
        result = tokenizer.decode(tokens), len(tokens), False
      if result is not None:
        text, length, is_finished = result
        slots.free(slot)
        del texts[slot]
        yield Completion(index, text, tuple(tokens[:length]), is_finished)


def _ended(tokenizer, tokens, count, stop, ends):
  """(text, number of tokens, True) if one of tokens[count:] ended the row; None if it goes on."""
  text = tokenizer.decode(tokens)
  at = text.find(stop) if stop else -1
  if at >= 0:
    lengths = range(count + 1, len(tokens))
    length = next((n for n in lengths if stop in tokenizer.decode(tokens[:n])), len(tokens))
    return text[:at], length, True
  if tokens[-1] in ends:
    return tokenizer.decode(tokens[:-1]), len(tokens), True
  return None


def _power_of_two(count):
  return 1 << max(0, count - 1).bit_length()


def _knobs(temperature, top_p, frequency_penalty):
  if not 0 <= temperature < float('inf'):
    raise InputError(f'temperature is {temperature}; it has to be 0 or more.')
  if not 0 < top_p <= 1:
    raise InputError(f'top_p is {top_p}; it has to be above 0 and at most 1.')
  if not -2 <= frequency_penalty <= 2:
    raise InputError(f'frequency_penalty is {frequency_penalty}; it has to be from -2 to 2.')
  return Knobs(*map(np.float32, (temperature, top_p, frequency_penalty)))


def _encoded(language, prompts) -> list[np.ndarray]:
  room, encoded = language.config.max_position_embeddings, []
  for i, tokens in enumerate(_tokens(language, prompts)):
    if not 0 < len(tokens) < room:
      fault = f'has {len(tokens)} tokens, and the model reads fewer than {room}'
      raise InputError(f'prompt {i} {fault if tokens else "is empty"}: {prompts[i][:60]!r}.')
    encoded.append(np.array(tokens, np.int32))
  return encoded


def _tokens(language, prompts) -> Iterator[list[int]]:
  for begin in range(0, len(prompts), 1024):  # the library's results are large
    for encoding in language.tokenizer.encode_batch(list(prompts[begin : begin + 1024])):
      yield encoding.ids


def _on_devices(view, leaf):
  # Waits, so that at most one array is in memory twice.
  return jax.block_until_ready(sharding.put(view, leaf.sharding))
