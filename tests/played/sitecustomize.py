"""Python imports this when it starts, where conftest.py put the folder on PYTHONPATH: processes of tests play the same CPU."""

import os

from cpus import CPUS, VARIABLE, play

play(CPUS[os.environ[VARIABLE]])
