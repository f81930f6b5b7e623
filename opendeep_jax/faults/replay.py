"""Silent data corruption: devices that compute or remember wrongly without a word.

Two looks. Copies of weights and moments on different devices must be equal to the bit (`digests.deviating_devices`).
And what every device computes from its own rows must come out the same again, on the same device and on another one
(`Replay`): a device that is wrong then disagrees wherever it works, which names it.
"""

import functools
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from opendeep_jax.checkpoint.digests import deviating_devices
from opendeep_jax.data.batch import Batch
from opendeep_jax.parallel.distributed import host_of


def compare_copies(state, before: str) -> str | None:
    """Compare all copies of every array of the state over the devices; return a sentence on those that differ, or None.

    Args:
        before: what is about to happen, for the sentence.
    """
    deviating = deviating_devices(state)
    if not deviating:
        return None
    devices = Counter((device, process) for _, device, process in deviating)
    names = [name for name, *_ in deviating]
    which = ", ".join(name_device(device, process) for (device, process), _ in devices.most_common(4))
    arrays = f"{names[0]}" + (f" and {len(set(names)) - 1} more arrays" if len(set(names)) > 1 else "")
    return f"silent corruption found before {before}: copies of {arrays} differ; deviating: {which}"


def name_device(device: int, process: int) -> str:
    """Return a device's name for messages: host, process, device."""
    return f"device {device} of process {process} on {host_of(process)}"


class Replay:
    """Replay of a step's gradients on the same devices and on others, compared device by device.

    The other assignment moves each process's work on by one of its own devices, so nothing crosses hosts but weights
    that do so anyway. Weights are held twice while it runs. Not for a pipeline, whose stages hold different layers.
    """

    def __init__(self, local_digests: Callable[..., jax.Array], mesh: Mesh):
        """
        Args:
            local_digests: (state, batch) -> digests of what each device of the mesh in use computes from its rows
                before it tells others, uint32 [devices, arrays, 2]; traced.
        """
        self.local_digests, self.mesh, self.other = local_digests, mesh, _rotated(mesh)
        self._programs: dict = {}

    def compare(self, state, batch: Batch) -> str | None:
        """Compute a step's gradients three times; return a sentence on the devices that disagree, or None."""
        first, again = self._run(self.mesh, state, batch), self._run(self.mesh, state, batch)
        devices = list(self.mesh.devices.flat)
        if wrong := [devices[i] for i in np.flatnonzero((first != again).any(axis=(1, 2)))]:
            names = ", ".join(name_device(d.id, d.process_index) for d in wrong[:4])
            return f"silent corruption: the same computation, done twice, came out differently on {names}"
        if self.other is None:
            return None
        with jax.set_mesh(self.other):  # device_put looks at the mesh in use where it crosses processes
            elsewhere = _moved((state, batch), self.other)
        moved = self._run(self.other, *elsewhere)
        differ = np.flatnonzero((first != moved).any(axis=(1, 2)))
        if not len(differ):
            return None
        others = list(self.other.devices.flat)
        seen = Counter(device for i in differ for device in {devices[i], others[i]})
        # One wrong device spoils its own place in each assignment; what else is wrong came from it by exchange.
        suspects = [device for device, count in seen.most_common() if count == seen.most_common(1)[0][1]]
        names = ", ".join(name_device(d.id, d.process_index) for d in suspects[:4])
        return f"silent corruption: a computation came out differently on other devices; suspected: {names}"

    def _run(self, mesh: Mesh, state, batch: Batch) -> np.ndarray:
        """Return the digests that each position of the mesh computes: uint32 [devices, arrays, 2]."""
        key = mesh is self.mesh, batch.tokens.shape
        with jax.set_mesh(mesh):
            if key not in self._programs:
                self._programs[key] = jax.jit(functools.partial(self.local_digests))  # traced for each mesh
            return np.asarray(self._programs[key](state, batch))


def _rotated(mesh: Mesh) -> Mesh | None:
    """The mesh with each process's devices moved on by one; None where no process has two."""
    devices = list(mesh.devices.flat)
    places: dict[int, list[int]] = {}
    for place, device in enumerate(devices):
        places.setdefault(device.process_index, []).append(place)
    if all(len(own) == 1 for own in places.values()):
        return None
    moved = list(devices)
    for own in places.values():
        for place, source in zip(own, own[1:] + own[:1], strict=True):
            moved[place] = devices[source]
    return Mesh(np.array(moved).reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def _moved(tree, mesh: Mesh):
    """Copy arrays to another mesh of the same shape, one after the other: of several such copies at once, a CPU's
    devices may each wait in another one for the rest."""
    jax.block_until_ready(tree)
    return jax.tree.map(lambda x: jax.block_until_ready(jax.device_put(x, NamedSharding(mesh, x.sharding.spec))), tree)
