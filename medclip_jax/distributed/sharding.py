"""Where arrays live: one mesh axis over all devices of all processes, rows spread along it.

Rows are episodes in training and images in encoding and scoring; params are copied to every device.
Row i of n belongs to device i // ceil(n / devices); what is missing at the end is filled with
copies of the last row, marked as not valid.
"""

import logging
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from medclip_jax.errors import ConfigError, one_line

AXIS = "rows"


def devices() -> list[jax.Device]:
    """All devices. Raises ConfigError where JAX cannot use what $JAX_PLATFORMS names."""
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # not of absent TPUs
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first, without a message, for "cuda"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms in ("", "cpu"):  # which are always there: another fault
            raise
        reason = one_line(error).partition(" (set JAX")[0] if str(error) else "there is none"
        raise ConfigError(
            f"JAX_PLATFORMS is {platforms!r}, which JAX cannot use here ({reason}): unset it, give "
            "cpu, or install JAX for that device"
        ) from error


def log_devices() -> None:
    """Log what the run computes on; raises as `devices`."""
    kinds = sorted({device.device_kind for device in devices()})
    logging.info("%d device(s): %s", jax.device_count(), ", ".join(kinds))


def is_main() -> bool:
    """True in the one process that writes files."""
    return jax.process_index() == 0


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis over `devices` (all of all processes if None), those of a process side by side."""
    devices = jax.devices() if devices is None else devices
    # jax.make_mesh may reorder devices; the rows of every process must be contiguous
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(ordered), (AXIS,), axis_types=(AxisType.Auto,))


def by_rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy a tree to every device; every process must hold the same values.

    Always a copy, so that a donated result leaves `tree` alive.
    """

    # Not jax.device_put: even with may_alias=False the copy on the array's own device shares its
    # buffer, and donation then deletes the original (jax 0.10.2).
    def one(x):
        host = np.array(jax.device_get(x))
        return jax.make_array_from_process_local_data(replicated(mesh), host, host.shape)

    return jax.tree.map(one, tree)


def share(tree: PyTree, mesh: Mesh) -> PyTree:
    """As `replicate`, but on a device that holds an array it stays the same: never donate it."""
    if jax.process_count() > 1:
        return replicate(tree, mesh)
    return jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)), tree)


def local_rows(n: int, mesh: Mesh) -> Int[np.ndarray, " m"]:
    """Which of `n` rows this process holds, in order.

    Where n does not divide by the devices, the index n - 1 is repeated to fill the last ones.
    """
    return np.minimum(_positions(n, mesh), n - 1)


def valid_rows(n: int, mesh: Mesh) -> Bool[Array, " m"]:
    """Which rows of a placed array are real when `n` were placed; placed like the rows."""
    return place(_positions(n, mesh) < n, mesh)


def place(local: PyTree, mesh: Mesh) -> PyTree:
    """Join the rows of every process (its `local_rows`, on the host, axis 0) to global arrays.

    They may share memory with `local`: do not change it, nor donate the result.
    """
    local_devices = int(_is_local(mesh).sum())

    def one(x):
        shape = (x.shape[0] // local_devices * mesh.size, *x.shape[1:])
        host = np.asarray(jax.device_get(x))
        return jax.make_array_from_process_local_data(by_rows(mesh), host, shape)

    return jax.tree.map(one, local)


def spread(tree: PyTree, mesh: Mesh) -> tuple[PyTree, Bool[Array, " n"]]:
    """Spread axis 0 over all devices; every process passes the same, whole tree.

    Returns the tree, its rows filled up to a multiple of the devices, and which rows are valid.
    As of `place`, it may share memory with what is passed. To read only a part in each process,
    use `local_rows` and `place`.
    """
    n = np.shape(jax.tree.leaves(tree)[0])[0]
    return place(_take(tree, local_rows(n, mesh)), mesh), valid_rows(n, mesh)


def fill_rows(tree: PyTree, rows: int) -> tuple[PyTree, int]:
    """Rows on this process's devices, the last repeated up to a multiple of `rows`; how many.

    Raises:
        ValueError: there are more than `rows`.
    """
    n = len(jax.tree.leaves(tree)[0])
    if n > rows:
        raise ValueError(f"{n} rows do not fit in {rows}")
    full = _take(tree, np.minimum(np.arange(rows), n - 1))
    return spread(full, mesh(jax.local_devices()))[0], n


def _take(tree: PyTree, rows: Int[np.ndarray, " m"]) -> PyTree:
    """Rows of every leaf on the host; all of them in their order are not copied."""

    def one(x):
        host = np.asarray(jax.device_get(x))
        return host if np.array_equal(rows, np.arange(len(host))) else host[rows]

    return jax.tree.map(one, tree)


def fetch(tree: PyTree, n: int) -> PyTree:
    """The first `n` rows of placed arrays, as numpy arrays in every process.

    Every process must call it: where there are several, it is a collective operation.
    """
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda x: x[:n], jax.device_get(tree))


def broadcast(tree: PyTree) -> PyTree:
    """The arrays of process 0 on every host, bit for bit; in the others, of the same shapes."""
    if jax.process_count() == 1:
        return tree

    def one(x):
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        same = np.asarray(multihost_utils.broadcast_one_to_all(raw)).astype(np.uint8)
        return np.ascontiguousarray(same).view(x.dtype).reshape(x.shape)

    return jax.tree.map(one, tree)


def _is_local(mesh: Mesh) -> Bool[np.ndarray, " d"]:
    """Which devices of the mesh belong to this process."""
    return np.array([d.process_index == jax.process_index() for d in mesh.devices.flat])


def _positions(n: int, mesh: Mesh) -> Int[np.ndarray, " m"]:
    """Rows of the filled-up array that this process holds; those from n on are filling."""
    return np.flatnonzero(np.repeat(_is_local(mesh), -(-n // mesh.size)))
