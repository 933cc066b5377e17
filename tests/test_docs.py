"""The documentation: every command exists and has the options shown."""

import configparser
import itertools
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from ip2p_jax.cli import main
from ip2p_jax.config import LanguageConfig, TrainConfig
from ip2p_jax.config_text import check_overrides

ROOT = Path(__file__).parent.parent
SCRIPTS = {('python', 'train.py'), ('python', 'sample.py')}
ENDS = ('>', '&', '&&', '|', ';')
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), *ROOT.glob('examples/*/*.md')]


def commands(text: str) -> list[list[str]]:
  """The words of every command of ours in code blocks."""
  result = []
  blocks = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.DOTALL | re.M)
  for block in (code for language, code in blocks if language in ('', 'sh')):
    for line in re.sub(r'\\\n', ' ', block).splitlines():
      words = re.sub('["\']', ' ', line.split(' #')[0]).split()
      starts = [i for i in range(len(words)) if tuple(words[i : i + 2]) in SCRIPTS]
      # A machine and a container image are also called ip2p; no subcommand follows their names.
      pairs = itertools.pairwise(words)
      starts += [
        i for i, pair in enumerate(pairs) if re.fullmatch('ip2p (?!ip2p)[a-z]+', ' '.join(pair))
      ]
      for i in starts:
        end = next((j for j in range(i, len(words)) if words[j] in ENDS), len(words))
        result.append(words[i:end])
  return result


def subcommand(words: list[str]):
  command = typer.main.get_command(main.app())
  for i, word in enumerate(words):
    if not hasattr(command, 'commands'):
      return command, words[i:]
    command = command.commands[word]
  return command, []


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_have_options_that_exist(page):
  for words in commands(page.read_text()):
    shown = shlex.join(words)
    if words[1] == 'train.py':
      settings = [word for word in words if word.startswith('--config.')]
      check_overrides(settings, (TrainConfig, LanguageConfig))
      continue
    words = ['edit', *words[2:]] if words[1] == 'sample.py' else words[1:]
    command, rest = subcommand(words)
    flags = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word in rest:
      word = word.rstrip(',')
      flag = word.partition('=')[0]
      if re.match(r'--?[a-z]', word) and not word.startswith('--config.'):
        assert flag in flags | {'--help', '--config'}, f'{page.name}: {flag} of {shown}'


def test_train_py_accepts_the_command_of_the_jobset(tmp_path):
  (job,) = yaml.safe_load((ROOT / 'docs' / 'jobset.yaml').read_text())['spec']['replicatedJobs']
  job = job['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  hosts, chips = job['parallelism'], container['resources']['limits']['google.com/tpu']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  assert hosts == job['completions'] and hosts * chips == math.prod(map(int, topology.split('x')))
  program, script, *flags = container['command']
  assert (program, script) == ('python', 'train.py') and '--multihost' in flags
  flags.remove('--multihost')  # the test has one process
  flags = [flag.replace('gs://BUCKET', str(tmp_path)) for flag in flags]
  message = subprocess.run(
    [sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True
  ).stderr
  assert re.match('train.py: error: (CKPT|DATA)', message)  # the only error


def test_commands_for_a_slice_use_the_planned_accumulation():
  """A v5e fits 32 examples at a time by the table of plans."""
  commands = '\n'.join((ROOT / 'docs' / name).read_text() for name in ('tpu.md', 'jobset.yaml'))
  runs = re.findall(r'train\.py.*?data\.path=DATA', commands.replace('\\\n', ' '), re.DOTALL)
  assert len(runs) == 4
  for run in runs:
    devices = 16 if '--multihost' in run else 8
    assert int(re.search(r'--config\.accumulation=(\d+)', run)[1]) == 1024 // devices // 32


def test_the_tpu_extra_has_the_library_for_buckets():
  settings = configparser.ConfigParser()
  settings.read(ROOT / 'setup.cfg')
  assert 'gs://BUCKET' in (ROOT / 'docs' / 'tpu.md').read_text()
  assert 'gcsfs' in settings['options.extras_require']['tpu']


def test_the_docker_image_gets_all_data_files():
  settings = configparser.ConfigParser()
  settings.read(ROOT / 'setup.cfg')
  data = settings['options.data_files'].values()
  files = {word.strip(',') for value in data for word in value.split()}
  copied = re.findall(r'^COPY (.*) \S+$', (ROOT / 'Dockerfile').read_text(), re.M)
  copied = {word for line in copied for word in line.split()}
  let_in = (ROOT / '.dockerignore').read_text().splitlines()
  assert len(files) > 5 and copied <= {line.removeprefix('!') for line in let_in if line[0] == '!'}
  for file in files:
    assert any(file == path or file.startswith(f'{path}/') for path in copied), file
