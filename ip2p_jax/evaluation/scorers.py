"""From a local folder or file to a scorer: a function that gives a batch of edits its numbers.

B rows, H W pixels. Every scorer says what its numbers were computed with. A published bug is a
switch, off by default, and is named among the description's quirks.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ip2p_jax import sharding, storage
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import preprocessing, scores
from ip2p_jax.evaluation.scores import Description
from ip2p_jax.models.dino import Dino, DinoConfig
from ip2p_jax.models.layers import Params, abstract
from ip2p_jax.models.lpips import CLASSIFIERS, Lpips, classifier_of
from ip2p_jax.pipeline.clip_scores import Clip, Towers
from ip2p_jax.sharding import ROWS, WHOLE
from ip2p_jax.weights import Tensors, read_tensors, to_params
from ip2p_jax.xla_alarms import quietly

MEAN = np.float32([[[(0.485, 0.456, 0.406)]]])  # of ImageNet's colours in 0..1
STD = np.float32([[[(0.229, 0.224, 0.225)]]])
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin')


class Batch(NamedTuple):
  """Rows to score. Images are [B, H, W, 3], uint8 or float in 0..1 (clipped).

  Attributes:
    references: what edits are compared with: sources, or targets. For CLIP and DINO they may have
      another size than the edits.
    captions, reference_captions: of edits and references, for CLIP.
    kept: [B, H, W, 1], 1 where an edit should not change the image; for pixels and LPIPS.
    ids: of the rows, for scorers that know the right result; None if references are targets.
  """

  edits: Any
  references: Any
  captions: Any = None
  reference_captions: Any = None
  kept: Any = None
  ids: Sequence[str] | None = None


class Scorer(NamedTuple):
  """`score(batch)` gives {name of the score: float32 [B]}; NaN where there is no such number."""

  description: Description
  score: Callable[[Batch], dict[str, np.ndarray]]


def pixels(*, masked_zeros: bool = False, mesh: Mesh | None = None) -> Scorer:
  """l1, l2, psnr and ssim; with `kept` also of the kept pixels, as l1_kept and so on.

  The latter are NaN if the mask keeps no pixel. `masked_zeros` computes them from all pixels, black
  where not kept, as PIE-Bench does; that flatters PSNR by -10 log10(share of kept pixels) dB.
  """
  quirks = ('masked pixels count as zeros',) if masked_zeros else ()
  description = Description('none', {}, 'colours in 0..1, size as given', 'none', quirks)
  program = _on_devices(functools.partial(_pixel_scores, masked_zeros), {}, mesh)

  def score(batch: Batch) -> dict[str, np.ndarray]:
    batch = _same_size(batch)
    try:
      return program(batch)
    except InputError as error:  # of SSIM
      advice = 'give larger images, or leave these rows out.'
      raise InputError(f'{str(error).rstrip(".")}; {advice}') from error

  return Scorer(description, score)


def _pixel_scores(masked_zeros, params, batch):
  del params
  images = _unit(batch.edits), _unit(batch.references)
  metrics = {'l1': scores.l1, 'l2': scores.l2, 'psnr': scores.psnr, 'ssim': scores.ssim}
  result = {name: metric(*images) for name, metric in metrics.items()}
  if batch.kept is None:
    return result
  where = kept = batch.kept.astype(jnp.float32)
  if masked_zeros:
    images, where = [scores.zeroed(x, kept) for x in images], None
  return result | _of_kept({name: f(*images, where) for name, f in metrics.items()}, kept)


def _of_kept(result, kept):
  """Scores named as those of kept pixels; NaN without such a pixel, as in PIE-Bench."""
  is_there = kept.any((1, 2, 3))
  return {f'{name}_kept': jnp.where(is_there, score, jnp.nan) for name, score in result.items()}


def clip(
  folder: str | os.PathLike,
  *,
  prepare: str = 'squash',
  original_range: bool = False,
  mesh: Mesh | None = None,
) -> Scorer:
  """CLIP's cosines, named as in `pipeline.scores.Scores`, as far as the batch has captions.

  With `kept` also clip_sim_1_edited: of the edit, black where kept, and its caption (PIE-Bench);
  NaN if all is kept.

  Args:
    folder: of a CLIPModel of transformers.
    prepare: 'squash' (the original) or 'crop' (OpenAI's own, in MagicBrush).
    original_range: gives CLIP colours in -1..1 where it expects 0..1, as the original does.
    mesh: the devices that share the rows; None takes all of this process.

  Raises InputError if there is no CLIP, or it is damaged.
  """
  model = Clip.load(folder)
  towers = model.towers
  prepared = preprocessing.named(prepare, towers.image_size)
  description = Description(
    _clip_name(towers, model.params),
    _digests(storage.folder(folder) / 'model.safetensors'),
    f"colours in {'-1..1' if original_range else '0..1'}, {prepared.text}, CLIP's mean and std",
    prepared.resize_filter,
    ('input in -1..1',) if original_range else (),
  )
  program = _on_devices(
    functools.partial(_clip_scores, towers, prepared.prepare, original_range), model.params, mesh
  )

  def score(batch: Batch) -> dict[str, np.ndarray]:
    tokens = lambda texts: None if texts is None else model.tokenizer(texts)
    texts = tokens(batch.captions), tokens(batch.reference_captions)
    return program(Batch(batch.edits, batch.references, *texts, batch.kept))

  return Scorer(description, score)


def _clip_name(towers: Towers, params: Params) -> str:
  config = nnx.merge(towers.vision_def, params['vision']).config
  size = {768: 'B', 1024: 'L', 1280: 'H'}.get(config.hidden_size, config.hidden_size)
  return f'CLIP ViT-{size}/{config.patch_size}'


def _clip_scores(towers, prepare, original_range, params, batch):
  def seen(images):
    small = prepare(_unit(images))
    return small * 2 - 1 if original_range else small

  edits, references = seen(batch.edits), seen(batch.references)
  tokens = batch.reference_captions, batch.captions
  result = {}
  if batch.kept is not None and tokens[1] is not None:
    where = 1 - batch.kept.astype(jnp.float32)
    edited = towers.embed_images(params, seen(scores.zeroed(_unit(batch.edits), where)))
    cosine = scores.cosine(edited, towers.embed_texts(params, tokens[1]))
    result['clip_sim_1_edited'] = jnp.where(where.any((1, 2, 3)), cosine, jnp.nan)
  if tokens[0] is not None and tokens[1] is not None:
    images = jnp.stack([references, edits])
    return towers.scores(params, images, jnp.stack(tokens))._asdict() | result
  embedded = [towers.embed_images(params, images) for images in (references, edits)]
  result['clip_sim_image'] = scores.cosine(*embedded)
  for name, image, caption in zip(('clip_sim_0', 'clip_sim_1'), embedded, tokens, strict=True):
    if caption is not None:
      result[name] = scores.cosine(image, towers.embed_texts(params, caption))
  return result


def dino(path: str | os.PathLike, *, mesh: Mesh | None = None) -> Scorer:
  """`dino`: the cosine of DINO's class tokens. MagicBrush has ViT-S/16.

  `path` is a backbone of facebookresearch/dino, .pth or .safetensors; InputError if it is not.
  """
  model, params, name, digests = _dino(path)
  prepared = preprocessing.crop(256, 224)
  text = f"colours in 0..1, {prepared.text}, ImageNet's mean and std"
  description = Description(name, digests, text, prepared.resize_filter)

  def compare(params, batch):
    network = nnx.merge(model, params)
    see = lambda images: network((prepared.prepare(_unit(images)) - MEAN) / STD).class_token
    return {'dino': scores.cosine(see(batch.edits), see(batch.references))}

  return _of_images(description, compare, params, mesh)


def structure(path: str | os.PathLike, *, levels: bool = False, mesh: Mesh | None = None) -> Scorer:
  """`structure`: the distance of the self-similarities of DINO's keys. PIE-Bench has ViT-B/8.

  `path` as for `dino`. `levels` gives DINO colours in 0..255 where it expects 0..1, as PIE-Bench
  does; its published numbers need it.
  """
  model, params, name, digests = _dino(path)
  prepared = preprocessing.fit(224, 480)
  text = f"colours in {'0..255' if levels else '0..1'}, {prepared.text}, ImageNet's mean and std"
  quirks = ('colours in 0..255',) if levels else ()
  description = Description(name, digests, text, prepared.resize_filter, quirks)

  def compare(params, batch):
    network = nnx.merge(model, params)

    def keys(images):
      small = prepared.prepare(_unit(images)) * (255 if levels else 1)
      return network((small - MEAN) / STD).keys

    distance = scores.structure_distance(keys(batch.edits), keys(batch.references))
    return {'structure': distance}

  return _of_images(description, compare, params, mesh)


def _dino(path):
  """Graphdef, parameters, name and digests of a DINO transformer."""
  tensors, digests = _tensors([path])
  shapes = {name: tensors[name].shape for name in tensors}
  config = DinoConfig.from_shapes(shapes, str(path))
  model, params = abstract(lambda keys: Dino(config, rngs=keys))
  size = {384: 's', 768: 'b'}.get(config.width, config.width)
  name = f'dino_vit{size}{config.patch_size}'
  return model, to_params(tensors, params, 'dino', source=str(path)), name, digests


def lpips(*paths: str | os.PathLike, mesh: Mesh | None = None) -> Scorer:
  """`lpips`, by SqueezeNet or AlexNet; with `kept` also lpips_kept, black where not kept;
  the latter is NaN if no pixel is kept.

  Args:
    paths: files, or a folder with them: torchvision's squeezenet1_1 or alexnet, and LPIPS's weights
      for it (`lpips/weights/v0.1/squeeze.pth`); .pth or .safetensors.
    mesh: as for `clip`.

  Raises InputError if one of the two is missing, or does not fit the other.
  """
  tensors, digests = _tensors(paths)
  source = ', '.join(map(str, paths))
  classifier = classifier_of(tensors, source)
  model, shapes = abstract(lambda keys: Lpips(classifier, rngs=keys))
  params = to_params(_lpips_tensors(tensors, classifier, source), shapes, 'lpips', source=source)
  text = 'colours in -1..1, size as given; black where not kept, for lpips_kept'
  description = Description(f'LPIPS 0.1 {classifier}', digests, text, 'none')

  def compare(params, batch):
    network = nnx.merge(model, params)
    images = _unit(batch.edits), _unit(batch.references)
    result = {'lpips': network(*images)}
    if batch.kept is None:
      return result
    kept = batch.kept.astype(jnp.float32)
    return result | _of_kept({'lpips': network(*(scores.zeroed(x, kept) for x in images))}, kept)

  program = _on_devices(compare, params, mesh)
  return Scorer(description, lambda batch: program(_same_size(batch)))


def _lpips_tensors(tensors, classifier, source):
  """Our names for torchvision's features and the learned weights `lin0.model.1.weight`."""
  makers = {name: lambda name=name: tensors[name] for name in tensors if name[:9] == 'features.'}
  for i in range(len(CLASSIFIERS[classifier])):
    name = f'lin{i}.model.1.weight'
    if name not in tensors:
      raise InputError(
        f"{source}: lacks {name}; add LPIPS's weights for {classifier}"
        f' (lpips/weights/v0.1/{classifier}.pth).'
      )
    makers[f'lins.{i}'] = lambda name=name: tensors[name].reshape(-1)
  return Tensors(makers)


def _of_images(description, compare, params, mesh):
  """A scorer by edits and references alone, of any size."""
  program = _on_devices(compare, params, mesh)
  return Scorer(description, lambda batch: program(Batch(batch.edits, batch.references)))


def _on_devices(
  f: Callable[[Params, Batch], dict[str, Array]], params: Params, mesh: Mesh | None
) -> Callable[[Batch], dict[str, np.ndarray]]:
  """`f(params, batch)` as one program; each device scores its rows, in full precision."""
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
  params = sharding.copied(mesh, params)
  program = jax.jit(sharding.each_its_rows(f, mesh, (WHOLE, ROWS), ROWS))

  def run(batch):
    count = len(batch.edits)
    batch = jax.tree.map(np.asarray, batch)
    batch = sharding.padded_rows(mesh, ROWS, batch, count)
    with jax.default_matmul_precision('highest'):
      result = quietly(program, params, batch)
    return {name: np.asarray(score)[:count] for name, score in result.items()}

  return run


def _same_size(batch: Batch) -> Batch:
  """The images and `kept` of a batch; InputError if their sizes differ."""
  height, width = batch.edits.shape[1:3]
  for name, array in (('references', batch.references), ('kept', batch.kept)):
    if array is not None and array.shape[1:3] != (height, width):
      raise InputError(
        f'{name} are {array.shape[2]}x{array.shape[1]}, edits {width}x{height}; resize the edits.'
      )
  return Batch(batch.edits, batch.references, kept=batch.kept)


def _unit(images):
  """float32 in 0..1, from uint8 or float."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  return jnp.clip(images.astype(jnp.float32), 0, 1)


def _tensors(paths: Sequence[str | os.PathLike]) -> tuple[Tensors, dict[str, str]]:
  """All tensors of files, or of the files in folders, and the files' digests."""
  makers, digests = {}, {}
  for path in map(Path, paths):
    files = [path]
    if path.is_dir():
      files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
      if not files:
        raise InputError(f'{path}: no weights here; give a file ({", ".join(SUFFIXES)}).')
    for file in files:
      tensors, _ = read_tensors(file)
      if twice := sorted(set(makers) & set(tensors)):
        raise InputError(f'{file}: {twice[0]} is in another file, too; give one model only.')
      makers |= {name: lambda name=name, tensors=tensors: tensors[name] for name in tensors}
      digests |= _digests(file)
  return Tensors(makers), digests


def _digests(file) -> dict[str, str]:
  """{file name: sha256}."""
  with storage.fetched(file) as path, open(path, 'rb') as stream:
    return {file.name: hashlib.file_digest(stream, 'sha256').hexdigest()}
