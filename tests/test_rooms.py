"""Imports go one way: a file imports its own folder, and folders further to the right."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'ip2p_jax'
# Folders, from left to right; folders of one group do not import each other. Files outside folders
# have their own names.
ORDER = (
  'cli web',
  'planning',
  'captions evaluation',
  'training',
  'data editing pairs',
  'pipeline',
  'weights',
  'models diffusion',
  'bundled config_text images progress sharding',
  'colour config_check image_errors interrupts metadata parameters storage',
  'config defaults xla_alarms',
  'errors',
)
ANYWHERE = ('__init__', 'resources')  # the public names; scripts that are copied with exports
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))


def place(room: str) -> int:
  return next(i for i, names in enumerate(ORDER) if room in names.split())


def room(path: Path) -> str:
  return path.parts[0].removesuffix('.py')


def imported(path: Path) -> set[str]:
  """Folders and files of the package that a file imports."""
  rooms = set()
  for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'ip2p_jax':
      rooms |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('ip2p_jax.'):
      rooms.add(node.module.split('.')[1])
    elif isinstance(node, ast.Import):
      rooms |= {a.name.split('.')[1] for a in node.names if a.name.startswith('ip2p_jax.')}
  return rooms


@pytest.mark.parametrize('path', FILES, ids=str)
def test_a_file_imports_only_folders_to_the_right(path):
  if room(path) in ANYWHERE:
    return
  others = imported(path) - {room(path)}
  assert not {other for other in others if place(other) <= place(room(path))}


def test_no_two_files_import_each_other():
  names = {_dotted(path): path for path in FILES}
  graph = {name: _files_imported(path, names) for name, path in names.items()}
  done, open_now = set(), []

  def visit(name):
    assert name not in open_now, ' -> '.join([*open_now[open_now.index(name) :], name])
    if name in done:
      return
    open_now.append(name)
    for other in graph[name]:
      visit(other)
    done.add(open_now.pop())

  for name in graph:
    visit(name)


def _files_imported(path: Path, names: dict[str, Path]) -> set[str]:
  """Files that a file imports at its top, as dotted names; `x/__init__.py` is `x`."""
  wanted = set()
  for node in ast.parse((PACKAGE / path).read_text()).body:
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'ip2p_jax':
      folder = '.'.join(node.module.split('.')[1:])
      for alias in node.names:
        file = f'{folder}.{alias.name}'.strip('.')
        wanted.add(file if file in names else folder)
  return {name for name in wanted if name in names} - {_dotted(path)}


def _dotted(path: Path) -> str:
  return '.'.join(path.with_suffix('').parts).removesuffix('.__init__')


@pytest.mark.parametrize('path', FILES, ids=str)
def test_nothing_needs_torch_or_tensorflow_to_be_imported(path):
  if path.parts[0] == 'resources':
    return
  tree = ast.parse((PACKAGE / path).read_text())
  names = set()
  for node in tree.body:  # only the top of the file
    if isinstance(node, ast.Import):
      names |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add((node.module or '').split('.')[0])
  assert not names & {'torch', 'diffusers', 'transformers', 'tensorflow'}
