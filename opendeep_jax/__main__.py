"""`python -m opendeep_jax ...` is `opendeep ...`."""

import sys

from opendeep_jax.cli.main import script

sys.exit(script())
