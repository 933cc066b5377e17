"""`ip2p plan`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.errors import InputError, check_multiple
from ip2p_jax.progress import waiting


def plan(
  topology: Annotated[
    list[str],
    Option(
      help='A slice of TPUs (v5e-16, or its shape v5e:4x4), or GPUs of one host (h100, h100x8);'
      ' repeatable.'
    ),
  ],
  config: Annotated[
    Path | None,
    Option(help='Config of the training, as for train.py; by default configs/train_256.py.'),
  ] = None,
  change: Annotated[
    list[str] | None,
    Option('--set', help='A setting of the config: accumulation=4, mesh.fsdp=4; repeatable.'),
  ] = None,
  device_batch: Annotated[
    int | None,
    Option(
      min=1, help='Examples at a time per device; sets accumulation, for each topology separately.'
    ),
  ] = None,
  ckpt: Annotated[
    Path | None, Option(help='A checkpoint of this architecture; by default Stable Diffusion 1.5.')
  ] = None,
  from_images: Annotated[
    bool,
    Option(
      '--from-images',
      '--from-pictures',
      help='Not from latents: the VAE runs in every step.',
    ),
  ] = False,
  of: Annotated[
    str, Option(help='What to plan: training, edits, or pairs (of `ip2p pairs`).')
  ] = 'training',
  size: Annotated[
    int | None, Option(min=8, help='With edits and pairs: side of images, pixels; by default 512.')
  ] = None,
  batch_size: Annotated[
    int | None,
    Option(
      min=1, help='With edits and pairs: per call, on all devices of a host; by default 8 each.'
    ),
  ] = None,
  steps: Annotated[
    int | None, Option(min=1, help='With edits and pairs: of the sampler; by default 100.')
  ] = None,
  quick: Annotated[
    bool,
    Option('--quick', help='On TPUs: compile faster; shows whether it fits, but not the time.'),
  ] = False,
) -> None:
  """Shows whether work fits on TPUs or GPUs, and what it costs. Needs neither of them.

  ip2p plan --topology v5e-16 --device-batch 32

  ip2p plan --quick --topology v6e-8 --topology v4-8 --config configs/train_512.py --device-batch 16

  ip2p plan --topology v5e-8 --of edits --size 512 --batch-size 32

  ip2p plan --topology a100-40 --topology h100x8 --device-batch 32

  The real compiler compiles the real program. At full size on two cores the compiler for TPUs takes
  7 to 60 minutes and up to 16 GB, for GPUs about 5 minutes. Install them with `pip install
  'jax[tpu]'` and `'jax[cuda13]'`. GPUs: a100-40, a100-80, a6000, h100, h200, b200.
  """
  from ip2p_jax.config_check import check_values
  from ip2p_jax.config_text import load_config
  from ip2p_jax.planning import devices, gpus
  from ip2p_jax.planning.sampling import plan_sampling, sampling_report, work_on
  from ip2p_jax.planning.training import plan_training, settled, training_report

  if of not in ('training', 'edits', 'pairs'):
    raise InputError(f'--of is {of!r}; use training, edits or pairs.')
  _check_plan_options(
    of,
    {'--size': size, '--batch-size': batch_size, '--steps': steps},
    {'--set': change, '--device-batch': device_batch, '--from-images': from_images,
     '--config': config},
  )  # fmt: skip
  for name in topology:
    if quick and gpus.is_gpu(name):
      raise InputError(f"--quick: of no use with {name}; a GPU's compiler does not know it.")
    devices.check_name(name)
  devices.use_none()
  # Refuses wrong values before it asks for a compiler, and before the first long compile.
  if of == 'training':
    loaded = load_config(config or Path('configs/train_256.py'), change or [])
    check_values(loaded)
    networks = _training_networks(loaded, ckpt)
    check_multiple('resolution', loaded.resolution, networks.vae_config.factor)
    work = {name: settled(loaded, name, device_batch) for name in topology}
  else:
    networks = _sampling_networks(of, ckpt)
    check_multiple('--size', size or 512, networks.vae_config.factor)
    work = {name: work_on(name, of, size or 512, batch_size, steps or 100) for name in topology}
  failed = 0
  for name in topology:
    with waiting('compiling, minutes to an hour'):
      if of == 'training':
        result = plan_training(work[name], networks, name, not from_images, console.say, quick)
        report = training_report(result, work[name])
      else:
        result = plan_sampling(networks, work[name], name, console.say, quick)
        report = sampling_report(result)
    print(report)
    failed += not result.compiled.fits
  if failed:
    sys.exit(1)


def _training_networks(config, ckpt):
  from ip2p_jax.pipeline.networks import networks_of
  from ip2p_jax.planning.training import stable_diffusion
  from ip2p_jax.training.start import starting_checkpoint

  if ckpt is None:
    return stable_diffusion(is_editor=config.task == 'edit')
  return networks_of(starting_checkpoint(replace(config, checkpoint=str(ckpt))))


def _sampling_networks(of, ckpt):
  from ip2p_jax.pipeline import workdir
  from ip2p_jax.pipeline.networks import check_is_editor, check_is_text_to_image, networks_of
  from ip2p_jax.planning.training import stable_diffusion

  is_editor = of == 'edits'
  if ckpt is None:
    return stable_diffusion(is_editor)
  networks = networks_of(workdir.load(ckpt))
  (check_is_editor if is_editor else check_is_text_to_image)(networks, str(ckpt))
  return networks


def _check_plan_options(of, sampling, training):
  if of == 'training':
    wrong, advice = sampling, 'say --set resolution=256, --set batch_size=1024'
  else:
    wrong, advice = training, 'say --size and --batch-size'
  flags = ' and '.join(flag for flag, value in wrong.items() if value)
  if flags:
    raise InputError(f'{flags}: of no use with --of {of}; {advice}.')
  changes = training['--set'] or ()
  if any(item.partition('=')[0] == 'checkpoint' for item in changes):
    raise InputError('--set checkpoint: only the architecture matters; give it by --ckpt.')
  if training['--device-batch'] and any(item.startswith('accumulation') for item in changes):
    raise InputError('--device-batch also sets accumulation; leave one of them out.')
