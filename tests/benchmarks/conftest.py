"""Makes the scripts of benchmarks/ importable, for tests and for the processes that they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
