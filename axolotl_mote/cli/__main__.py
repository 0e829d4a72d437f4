"""``python -m axolotl_mote.cli``: the same commands where axolotl is not installed, and without its banner."""

from axolotl_mote.cli import main

main(prog_name="python -m axolotl_mote.cli")
