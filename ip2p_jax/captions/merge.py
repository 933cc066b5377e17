"""Merges several files of triplets into one, each caption once."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ip2p_jax import storage
from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import plain
from ip2p_jax.errors import InputError


def merge_answers(files: Sequence[str | Path], out: str | Path) -> tuple[int, int]:
  """Writes the triplets of all files, without duplicates; returns (lines written, duplicates).

  Columns get the names in the prompts of `write_all`. Other columns stay if JSON can hold their
  values. Duplicates have the same URL, or captions that differ only in case, white space and
  punctuation at the end.
  """
  out = Path(storage.local_path(out)).expanduser()
  refusal = InputError(f'{out}: exists, or does not end in .jsonl; give a new file that does.')
  if out.exists() or out.suffix.lower() != '.jsonl':
    raise refusal
  seen, lines, duplicates = set(), [], 0
  for file in files:
    rows = triplets.TripletRows(storage.local_path(file))
    for i in range(len(rows)):
      place, triplet, others = rows.read_whole(i)
      if fault := triplets.fault(triplet):
        raise InputError(f'{place} {fault}; fix it or remove it.')
      url = triplets.text(others.get('url'))
      keys = {plain(triplet.caption)} | ({f'url {url}'} if url else set())
      if keys & seen:
        duplicates += 1
        continue
      seen |= keys
      line = dict(zip(('caption', 'edit', 'output'), triplet, strict=True))
      line |= {name: value for name, value in others.items() if _is_plain(value)}
      lines.append(json.dumps(line) + '\n')
  try:
    storage.create(storage.folder(out), ''.join(lines).encode())
  except FileExistsError:  # another merge came first
    raise refusal from None
  return len(lines), duplicates


def _is_plain(value) -> bool:
  """Whether JSON can hold the value."""
  return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
