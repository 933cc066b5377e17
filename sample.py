"""Edits an image by an instruction, like `ip2p edit`.

python sample.py --ckpt CKPT --input photo.jpg --edit "make it winter" --output winter.png
python sample.py --input scene.png --edit "make the circle red" --output red.png  # miniature
"""

from ip2p_jax.cli.console import run
from ip2p_jax.cli.edit import edit

if __name__ == '__main__':
  run(edit, 'sample.py')
