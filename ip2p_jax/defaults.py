"""Defaults and limits that commands show before any library is loaded."""

# The paper's. The bundled miniature and similar checkpoints have their own (`bundled.py`).
STEPS, CFG_TEXT, CFG_IMAGE, SAMPLER = 100, 7.5, 1.5, 'euler_ancestral'
# Names, as --help lists them.
SAMPLERS = 'euler_ancestral, euler, heun, ddim, dpmpp_2m or lcm'
METHODS = (
  'identity, vae, sdedit-caption, sdedit-instruction, ddim, direct, null-text, edit-friendly,'
  ' plug-and-play or text2live'
)
PROTOCOLS = 'paper, magicbrush, magicbrush-multi, emu, pie, gedit, imgedit or own'
MIN_SIDE = 8  # pixels of an image: one latent
MAX_SEED = 2**32 - 1
MAX_SCALE = 100  # of text and image guidance, and the same below 0
MOST_TOKENS = 2**15 - 1  # of a language model's answer
