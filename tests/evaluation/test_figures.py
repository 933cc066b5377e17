"""The paper's figures: their points, and what these cost."""

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from ip2p_jax import weights
from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.guidance import BRANCHES
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import figures
from ip2p_jax.evaluation.edits import ByEditor, ByMethod
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.pipeline.sampling import Sampling
from ip2p_jax.training import flops

EDITOR = ByEditor('editor', 4, 'euler', 7.5, 1.5)
SDEDIT = ByMethod('', 'base', {'steps': 10})


def test_figure_8_has_the_papers_scales_and_strengths():
  points = figures.figure_8('ours', EDITOR, SDEDIT)
  scales = [point.how.cfg_image for point in points if point.curve == 'ours']
  assert scales == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
  for method in ('sdedit-caption', 'sdedit-instruction'):
    curve = [point for point in points if point.curve == method]
    assert [point.label for point in curve] == ['0.3', '0.4', '0.5', '0.6', '0.7', '0.8', '0.9']
    assert curve[0].how == ByMethod(method, 'base', {'steps': 10, 'strength': 0.3})


def test_figure_10_has_a_curve_for_each_checkpoint():
  points = figures.figure_10({'few': 'runs/200/run', 'many': 'runs/2000/run'}, EDITOR)
  assert {point.curve: point.how.ckpt for point in points} == {
    'few': 'runs/200/run', 'many': 'runs/2000/run'
  }  # fmt: skip
  assert len(points) == 14


def test_curves_have_the_names_of_their_checkpoints():
  assert figures.named(['runs/a/', 'b=runs/x', 'gs://c=d/e']) == {
    'a': 'runs/a/', 'b': 'runs/x', 'e': 'gs://c=d/e'
  }  # fmt: skip
  with pytest.raises(InputError, match="two curves are called 'run'; write NAME=PATH"):
    figures.named(['200/run', '2000/run'])


@pytest.mark.parametrize('interval', [(0.0, 1.0), (0.2, 0.6)])
@pytest.mark.parametrize('sampler', [*samplers.SAMPLERS])
def test_network_calls_are_those_of_the_sampler(sampler, interval):
  sampling = Sampling(5, sampler, interval=interval)
  grid = sampling.grid(Schedule())
  low, high = sampling.guided_sigmas(grid.sigmas)
  calls = []

  def denoise(x, sigma):
    jax.debug.callback(lambda s: calls.append(len(BRANCHES) if low < s <= high else 1), sigma)
    return 0.5 * x

  noise = jnp.ones((1, 2, 2, 4))
  samplers.sample(sampler, denoise, grid, noise, lambda i: noise).block_until_ready()
  jax.effects_barrier()
  assert sampling.network_calls(BRANCHES) == sum(calls)


def test_a_cost_counts_predictions_and_their_operations(tmp_path):
  weights.write(tiny_models.checkpoint(), tmp_path / 'editor')
  editor = EDITOR._replace(ckpt=str(tmp_path / 'editor'), resolution=64)
  (cost,) = figures.costs(figures.by_image_scale('ours', editor), rows=100)
  assert (cost.curve, cost.points) == ('ours', 7)
  assert cost.calls == 100 * 4 * (2 + 6 * 3)  # an image scale of 1 saves a branch
  networks = networks_of(tiny_models.checkpoint())
  side = 64 // networks.vae_config.factor
  assert cost.flops == cost.calls * flops.unet_flops(networks, (side, side))


def test_a_checkpoint_of_the_wrong_kind_is_refused_at_once(tmp_path):
  weights.write(tiny_models.checkpoint(), tmp_path / 'editor')
  points = [figures.FigurePoint('x', '1', SDEDIT._replace(
    method='sdedit-caption', base=str(tmp_path / 'editor')))]  # fmt: skip
  with pytest.raises(InputError, match='this needs a text-to-image checkpoint'):
    figures.costs(points, rows=1)
  with pytest.raises(InputError, match='leaves none of 3 steps'):
    SDEDIT._replace(method='sdedit-caption', set={'steps': 3, 'strength': 0.3}).check([])


def test_settings_that_do_nothing_are_refused():
  with pytest.raises(InputError, match='interval'):
    EDITOR._replace(interval=(0.5, 0.5)).check([])
  with pytest.raises(InputError, match='strengh is no setting'):
    ByMethod('sdedit-caption', 'base', {'strengh': 0.5}).check([])
