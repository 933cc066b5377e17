"""Dotted names, and rules over them."""

import jax
import pytest
from flax import nnx
from torch_models import TINY_UNET

from ip2p_jax.errors import InputError
from ip2p_jax.models.configs import UNetConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.unet import UNet
from ip2p_jax.parameters import check_order, check_rules, compiled, first_match, flatten, unflatten

NAMES = ['conv_in.kernel', 'conv_in.bias', 'mid_block.attentions.0.norm.scale']


@pytest.fixture(scope='module')
def unet():
  config = UNetConfig.from_json(TINY_UNET)
  return abstract(lambda keys: UNet(config, rngs=keys))


def test_names_are_paths_joined_by_dots(unet):
  flat = flatten(unet[1])
  assert flat['down_blocks.0.resnets.0.conv1.kernel'].shape == (3, 3, 32, 32)
  assert len(flat) == len(jax.tree.leaves(unet[1]))


def test_a_unet_survives_flatten_and_unflatten(unet):
  unet_def, shapes = unet
  again = unflatten(flatten(shapes))
  assert again == shapes
  assert list(again['down_blocks']) == [0, 1]
  assert isinstance(nnx.merge(unet_def, again), UNet)


def test_the_first_rule_that_matches_a_name_wins():
  rules = (('norm', 1.0), (r'\.kernel$', 2.0), ('', 3.0))
  assert [first_match(rules, name, 'rates') for name in NAMES] == [2.0, 3.0, 1.0]


def test_a_name_without_a_rule_is_named():
  with pytest.raises(InputError, match=r'optimizer\.decays: no rule matches parameter conv_in\.b'):
    first_match((('kernel', 0.1),), 'conv_in.bias', 'optimizer.decays')


def test_a_rule_that_matches_nothing_is_named():
  check_rules((('norm', 0.0), ('', 0.1)), NAMES, 'rates')
  with pytest.raises(InputError, match=r"rates: rule 'atention' matches no parameter"):
    check_rules((('atention', 0.0), ('', 0.1)), NAMES, 'rates')


def test_a_rule_hidden_by_an_earlier_one_is_no_typo():
  check_rules((('', 0.0), ('norm', 0.1)), NAMES, 'rates')


def test_a_rule_that_is_never_the_first_match_is_named():
  check_order((('norm', 0.0), ('conv', 0.5), ('', 0.1)), NAMES, 'rates')
  for rules in ((('', 0.0), ('norm', 0.1)), (('in', 1), ('norm', 1), ('conv_in', 0), ('', 2))):
    with pytest.raises(InputError, match=r"rates: rule '(norm|conv_in)' does nothing"):
      check_order(rules, NAMES, 'rates')
  check_order((('absent', 1), ('', 2)), NAMES, 'rates')  # `check_rules` names that one


@pytest.mark.parametrize('use', [first_match, check_rules])
def test_a_broken_pattern_is_named(use):
  with pytest.raises(InputError, match=r"rates: '\(' is not a regular expression"):
    use((('(', 1.0),), 'x', 'rates')
  with pytest.raises(InputError, match='rates: 3 is not a regular expression'):
    compiled(3, 'rates')


@pytest.mark.parametrize('rules', [('norm', 1.0), (('norm',),), ('ab', 'cd')])
def test_a_forgotten_comma_is_explained(rules):
  with pytest.raises(InputError, match='with the commas'):
    first_match(rules, 'x', 'rates')
