"""One file of the triplets of several, each caption once."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ip2p_jax import storage
from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import plain
from ip2p_jax.errors import InputError


def merge_answers(files: Sequence[str | Path], out: str | Path) -> tuple[int, int]:
  """Writes the triplets of all files that were not there before: (lines written, duplicates).

  Columns are called as in the prompts of `write_all`; others come along, if JSON has their values.
  Duplicates have the same caption, but for case, white space and a last stop, or the same URL.
  """
  out = Path(storage.local_path(out)).expanduser()
  taken = InputError(f'{out}: exists, or does not end in .jsonl; give a new file that does.')
  if out.exists() or out.suffix.lower() != '.jsonl':
    raise taken
  seen, lines, duplicates = set(), [], 0
  for file in files:
    rows = triplets.TripletRows(storage.local_path(file))
    for i in range(len(rows)):
      place, triplet, others = rows.read_whole(i)
      if fault := triplets.fault(triplet):
        raise InputError(f'{place} {fault}; mend it or take it out.')
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
    raise taken from None
  return len(lines), duplicates


def _is_plain(value) -> bool:
  """Whether JSON has it."""
  return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
