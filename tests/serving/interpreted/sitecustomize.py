"""With this folder on PYTHONPATH, every process of a server sets itself up for a CPU, as conftest.py does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import conftest

conftest.prepare()
