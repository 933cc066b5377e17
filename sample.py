"""Edits a picture by an instruction; the same as `ip2p edit`.

python sample.py --ckpt CKPT --input photo.jpg --edit "make it winter" --output winter.png
python sample.py --input scene.png --edit "make the circle red" --output red.png  # miniature
"""

from ip2p_jax.cli import main

if __name__ == '__main__':
  main.run(main.edit, 'sample.py')
