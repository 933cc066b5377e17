"""Imports run one way: a file of the package imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'ip2p_jax'
FLOORS = (
  ('errors',),
  ('config_text', 'xla_alarms'),
  (
    'attention',
    'bundled',
    'colour',
    'config',
    'console',
    'metadata',
    'parameters',
    'sharding',
    'storage',
  ),
  ('models', 'diffusion', 'weights', 'images'),
  ('text',),
  ('networks', 'alignment', 'prompt_to_prompt', 'sampling', 'similarity', 'language_program'),
  ('language', 'prompts'),
  ('optimizer', 'lora', 'loss', 'flops', 'gpus', 'metrics', 'loss_course', 'program_text', 'data'),
  (
    'checkpoints',
    'plan_devices',
    'edit_program',
    'inversion',
    'pair_files',
    'pair_program',
    'train_step',
  ),
  ('train_step', 'triplets'),
  ('editor', 'plan_compiler', 'language_step', 'language_workdir', 'triplet_rules'),
  ('edit_files', 'convert', 'previews', 'setup_run', 'captions', 'training_loop'),
  ('training', 'language_training', 'pairs', 'plan', 'caption_server', 'triplet_check'),
  ('filtering', 'captions_cli', 'pair_run', 'plan_sampling'),
  ('cli', 'launch'),
)
ANYONE = ('__init__', 'resources')  # the public names; scripts that travel with exports
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))


def floor(name: str) -> int:
  return next(i for i, names in enumerate(FLOORS) if name in names)


def imported(path: Path) -> set[str]:
  """Files and folders of the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'ip2p_jax':
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('ip2p_jax.'):
      found.add(node.module.split('.')[1])
    elif isinstance(node, ast.Import):
      found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('ip2p_jax.')}
  return found


@pytest.mark.parametrize('path', FILES, ids=str)
def test_a_file_imports_only_from_floors_below(path):
  here = path.parts[0].removesuffix('.py')
  if here in ANYONE:
    return
  above = {name for name in imported(path) if name != here and floor(name) >= floor(here)}
  assert not above


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
