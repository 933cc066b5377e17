"""How a long job tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called with (what is done, what there is in all)


def unwatched(done: int, total: int) -> None:
  """The progress of a job that nobody watches."""


def part_of(progress: Progress | None, done: int, parts: int) -> Progress | None:
  """Progress over several runs as one; `done` of the `parts` are over."""
  if progress is None:
    return None
  return lambda step, steps: progress(done * steps + step, parts * steps)
