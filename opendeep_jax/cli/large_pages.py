"""Large memory pages for training on a CPU."""

import os
import sys

SETTING = "GLIBC_TUNABLES"


def restart_with_large_pages() -> None:
    """Start this very command again, once, with glibc asking the kernel for large pages; elsewhere it does nothing.

    JAX on a CPU allocates the buffers of a step anew each time, and the kernel clears them page by page: with pages of
    4 KiB that took 13% of the benchmark's processor time (benchmarks/train_cpu.py). glibc reads this setting only when
    a process begins. A GLIBC_TUNABLES of the user's own stays as it is.
    """
    if sys.platform == "linux" and SETTING not in os.environ:
        os.environ[SETTING] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
