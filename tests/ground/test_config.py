"""Settings: their forms on the command line, and settings without effect."""

import re

import pytest

from ip2p_jax.config import LanguageConfig, TrainConfig, knobs
from ip2p_jax.config_check import NEEDS, check_language, check_values
from ip2p_jax.config_text import load_config, parse, plain_overrides
from ip2p_jax.errors import InputError

RATES = TrainConfig().optimizer.rates


@pytest.mark.parametrize(
  'text, value',
  [
    ('attn2=0.5,.*=1', (('attn2', 0.5), ('.*', 1.0))),
    ('attn2=0.5,=0', (('attn2', 0.5), ('', 0.0))),
    (' attn = 1e-1 , conv_in=.5 ', (('attn', 0.1), ('conv_in', 0.5))),
    (r'\.(q|k)_proj\.kernel$=2', ((r'\.(q|k)_proj\.kernel$', 2.0),)),
    ('a{1,2}=0,b=1', (('a{1,2}', 0.0), ('b', 1.0))),
    ('{"attn": 0.1, "": 0}', (('attn', 0.1), ('', 0.0))),
    ("(('attn', 1.0), ('', 0.0))", (('attn', 1.0), ('', 0.0))),
    ("[['attn', 1.0]]", (('attn', 1.0),)),
  ],
)
def test_rules_may_be_written_in_many_forms(text, value):
  assert parse('optimizer.rates', text, RATES) == value
  flags = [f'--config.optimizer.rates={text}', '--config.optimizer.rates', text, '--config.steps=3']
  written = plain_overrides(flags, [TrainConfig, LanguageConfig])
  shown = [written[0].partition('=')[2], written[2]]
  assert [eval(x) for x in shown] == [value, value] and written[3] == flags[3]


@pytest.mark.parametrize('text', ['attn', 'attn=fast', '3', '', 'attn=1,b'])
def test_a_wrong_rule_gives_an_error_with_an_example(text):
  with pytest.raises(InputError, match=r"optimizer\.rates takes rules, as in .*'attn2=0.5,\.\*=1'"):
    parse('optimizer.rates', text, RATES)


@pytest.mark.parametrize(
  'name, text, current, value',
  [
    ('log.profile', '100,5', (0, 0), (100, 5)),
    ('log.profile', '(100, 5)', (0, 0), (100, 5)),
    ('mesh.zero1', 'false', True, False),
    ('mesh.zero1', 'False', True, False),
    ('steps', '10_000', 1, 10_000),
    ('optimizer.learning_rate', '1', 1e-4, 1.0),
    ('data.path', 'a=3,b=1', '', 'a=3,b=1'),
  ],
)
def test_a_value_gets_the_type_of_its_setting(name, text, current, value):
  result = parse(name, text, current)
  assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
  'name, text, current',
  [
    ('log.profile', '100', (0, 0)),
    ('log.profile', '1,2,3', (0, 0)),
    ('log.profile', '1,x', (0, 0)),
    ('log.profile', '1.5,2', (0, 0)),
    ('steps', '1.5', 1),
    ('steps', 'True', 1),
    ('mesh.zero1', '1', True),
    ('optimizer.learning_rate', 'True', 1e-4),
  ],
)
def test_a_value_of_another_type_names_the_setting(name, text, current):
  with pytest.raises(InputError, match=re.escape(f'{name} takes ')):
    parse(name, text, current)


def changed(kind, **values):
  """A config with changed settings; '__' stands for the dot."""
  config = kind()
  for name, value in values.items():
    *sections, knob = name.split('__')
    owner = config
    for section in sections:
      owner = getattr(owner, section)
    setattr(owner, knob, value)
  return config


BOTH = (TrainConfig, LanguageConfig)
# Settings without effect, and a part of the message.
INERT = [
  (BOTH, {'lora__alpha': 8.0}, 'lora.alpha is 8.0, which does nothing while lora.rank is 0'),
  (BOTH, {'lora__targets': 'attn'}, 'lora.targets .* while lora.rank is 0'),
  (BOTH, {'optimizer__schedule': 'constant', 'optimizer__final_rate': 0.1},
   "optimizer.final_rate is 0.1, which does nothing while optimizer.schedule is 'constant'"),
  (BOTH, {'log__profile': (5, 0)}, 'log.profile is .5, 0., no step'),
  (BOTH, {'log__profile': (20, 5), 'steps': 10}, 'begins at step 20, and the run ends at step 10'),
  (BOTH, {'log__profile': (5,)}, 'give the first step and how many'),
  (BOTH, {'log__profile': (-5, 1)}, 'give the first step and how many'),
  (TrainConfig, {'log__validation_examples': 64, 'log__validate_every': 0},
   'log.validation_examples .* while log.validate_every is 0'),
  (TrainConfig, {'log__validation_examples': 0, 'log__validate_every': 20},
   'log.validate_every .* while log.validation_examples is 0'),
  (TrainConfig, {'log__previews': 0, 'log__preview_steps': 50},
   'log.preview_steps .* while log.previews is 0'),
]  # fmt: skip


@pytest.mark.parametrize('kinds, values, message', INERT)
def test_a_setting_without_effect_is_refused(kinds, values, message):
  for kind in kinds if isinstance(kinds, tuple) else (kinds,):
    config = changed(kind, **values)
    with pytest.raises(InputError, match=message):
      if kind is TrainConfig:
        check_values(config)
      else:
        config.checkpoint = config.data.path = 'x'
        check_language(config)


def test_a_feature_may_be_switched_off_as_a_whole():
  check_values(changed(TrainConfig, log__validate_every=0, log__previews=0))
  check_values(changed(TrainConfig, log__validate_every=0, log__validation_examples=0))
  check_values(changed(TrainConfig, optimizer__schedule='cosine', optimizer__final_rate=0.1))
  check_values(changed(TrainConfig, lora__rank=4, lora__alpha=8.0, lora__targets='attn'))
  check_values(changed(TrainConfig, log__profile=(100, 5)))


SWITCHED = [  # (settings of a file, changes of a run, resulting value of the file's setting)
  ({'log.validate_every': 20}, {'log.validation_examples': 0}, {'log.validate_every': 1000}),
  ({'log.validation_examples': 64}, {'log.validate_every': 0}, {'log.validation_examples': 512}),
  ({'log.preview_steps': 50}, {'log.previews': 0}, {'log.preview_steps': 20}),
  ({'lora.rank': 4, 'lora.alpha': 8.0}, {'lora.rank': 0}, {'lora.alpha': 4.0}),
  ({'optimizer.schedule': 'cosine', 'optimizer.final_rate': 0.1},
   {'optimizer.schedule': 'constant'}, {'optimizer.final_rate': 0.0}),
]  # fmt: skip


@pytest.mark.parametrize('in_file, changes, left', SWITCHED)
def test_idle_settings_of_a_file_become_defaults(in_file, changes, left, tmp_path):
  file = tmp_path / 'config.py'

  def write(settings):
    lines = [f'  config.{name} = {value!r}' for name, value in settings.items()]
    head = [
      'from ip2p_jax.config import TrainConfig',
      'def get_config():',
      '  config = TrainConfig()',
    ]
    file.write_text('\n'.join([*head, *lines, '  return config', '']))

  def loaded(settings):
    return load_config(file, [f'{name}={value}' for name, value in settings.items()])

  write(in_file)
  config = loaded(changes)
  check_values(config)
  assert dict(knobs(config)) == dict(knobs(TrainConfig())) | changes | left
  (name,) = left  # an error if the run sets it, too, or if the file sets both
  with pytest.raises(InputError, match=f'{name} .* does nothing'):
    check_values(loaded({name: in_file[name]} | changes))
  write(in_file | changes)
  with pytest.raises(InputError, match=f'{name} .* does nothing'):
    check_values(loaded({}))


def test_every_setting_that_needs_another_exists():
  names = {name for kind in BOTH for name, _ in knobs(kind())}
  assert {name for pair in NEEDS for name in pair} <= names
