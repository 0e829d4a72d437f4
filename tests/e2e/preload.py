"""What the processes of the end-to-end tests share: imported once, before they fork.

Importing takes 10 to 40 seconds, most of the time of a run on a tiny model.
"""

# ruff: noqa: F401

import axolotl.cli.evaluate
import axolotl.cli.inference
import axolotl.cli.main
import axolotl.cli.preprocess
import axolotl.cli.train
import axolotl.core.builders
import axolotl.core.trainers.base
import axolotl.evaluate
import axolotl.loaders
import axolotl.train
import deepspeed

import axolotl_mote.training.dataset
import axolotl_mote.training.plugin
import axolotl_mote.training.trainer
