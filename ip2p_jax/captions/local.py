"""Captions from a language model on the devices of this machine."""

from ip2p_jax.captions import generate, triplets
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.write import Complete


def local_backend(model: generate.Language, writing: Writing, slots: int | None = None) -> Complete:
  """Asks a model on the devices of this machine; `slots` as in `generate.write`."""

  def complete(captions, seeds):
    prompts = [triplets.prompt(caption) for caption in captions]
    is_short = generate.has_room(model, prompts)
    yield from ((i, None) for i, fits in enumerate(is_short) if not fits)
    chosen = [i for i, fits in enumerate(is_short) if fits]
    written = generate.write(
      model,
      [prompts[i] for i in chosen],
      seeds=[seeds[i] for i in chosen],
      temperature=writing.temperature,
      top_p=writing.top_p,
      frequency_penalty=writing.frequency_penalty,
      stop=triplets.STOP,
      max_tokens=writing.max_tokens,
      slots=slots,
    )
    for answer in written:
      text = triplets.clean(answer.text)
      yield chosen[answer.index], text + (triplets.STOP if answer.is_finished else '')

  return complete
