"""What inspect_ai finds by the entry point: the provider ``mote/DIR``, the scorers and the tasks.

Importing it registers them. inspect_ai imports it at every command: no torch here.
"""

from axolotl_mote.evaluation import provider, scorers, tasks

__all__ = ["provider", "scorers", "tasks"]
