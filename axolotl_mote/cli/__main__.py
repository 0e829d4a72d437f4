"""``python -m axolotl_mote.cli``: the same commands as ``axolotl-mote``."""

from axolotl_mote.cli import main

main(prog_name="python -m axolotl_mote.cli")
