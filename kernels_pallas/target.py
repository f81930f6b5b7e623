"""Compilation target of a program, and the choice of a kernel's implementation for it.

A program may be compiled for chips that are not attached (`jax.experimental.topologies`), so it is the mesh in use
that says what it will run on, and only without a mesh the machine at hand.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.chips import CHIPS, DEVICE_KINDS, UNKNOWN, OnChip

PLATFORMS = ("cpu", "tpu", "gpu")
Implementations = Mapping[str, tuple[Callable, tuple[str, ...]]]
"""Implementations of a kernel: function and platforms of each, the preferred first."""


def platform() -> str:
    """`cpu`, `tpu` or `gpu`: where the program that is being traced will run."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def chip() -> str:
    """The chip that the program being traced will run on, as `chips.CHIPS` names it; `cpu`, or its own name."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    known = [name for name in DEVICE_KINDS if kind.startswith(name)]
    return DEVICE_KINDS[max(known, key=len)] if known else kind


def on_chip(platform: str) -> OnChip:
    """Return the limits that a kernel's blocks must fit on the chip that the program is for."""
    return CHIPS.get(chip()) or UNKNOWN[platform]


def widened(*factors: jax.Array) -> tuple[jax.Array, ...]:
    """The factors of a product, in float32 where they are narrower and the program will run on a CPU.

    A CPU's XLA multiplies bfloat16 some ten times slower than float32, and in some orders of axes not at all.
    """
    if platform() != "cpu":
        return factors
    return tuple(x.astype(jnp.float32) if jnp.dtype(x.dtype).itemsize < 4 else x for x in factors)


def choose(kernel: str, implementations: Implementations, name: str | None) -> Callable:
    """The implementation `name` of a kernel, or with None the first that the platform at hand has.

    Args:
        implementations: for each name its function and the platforms that it runs on, the preferred first.
    Raises:
        ValueError: for a name that there isn't.
        NotImplementedError: for a named implementation that this platform lacks.
    """
    here = platform()
    fitting = [key for key, (_, platforms) in implementations.items() if here in platforms]
    if name is None:
        return implementations[fitting[0]][0]
    if name not in implementations:
        raise ValueError(f"{kernel}: implementation = {name!r}: must be one of {', '.join(implementations)}.")
    if name not in fitting:
        raise NotImplementedError(
            f"{kernel}: implementation = {name!r} runs on {' and '.join(implementations[name][1])}, and this program "
            f"is for {here}. Here there are {', '.join(fitting)}; leave the choice empty to take the first that fits."
        )
    return implementations[name][0]


def run(kernel: str, implementations: Implementations, name: str | None, *args, **options):
    """Run the implementation `name` of a kernel, or with None the platform's first that takes these operands.

    Raises:
        ValueError: for a name that there isn't.
        NotImplementedError: for a named implementation that this platform lacks, or that does not take the operands.
    """
    function, here = choose(kernel, implementations, name), platform()
    others = [] if name else [other for other, platforms in implementations.values() if here in platforms][1:]
    for following in others:
        try:
            return function(*args, **options)
        except NotImplementedError:
            function = following
    return function(*args, **options)
