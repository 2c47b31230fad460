"""Where arrays live: one mesh axis over all devices of all processes, rows spread along it.

Rows are episodes in training and images in encoding and scoring; params is copied to every device.
The rest of the program is written for one device and jitted with the placements given here.
Row i of n belongs to device i // ceil(n / devices); what is missing at the end is filled with
copies of the last row, which are finite and of the right kind, and marked as not valid.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from medclip_jax.errors import ConfigError

AXIS = "rows"
A_DAY = 86400  # seconds


def start(
    distributed: bool,
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Join the other processes of the run; nothing to do if not `distributed`.

    Call it once, before anything else touches JAX. `coordinator` is "host:port" of process 0,
    `processes` their number, `process` which one this is; leave all three out on Cloud TPU, SLURM
    or Open MPI, where the environment tells them. `timeout`: seconds to wait for the others to
    come; `heartbeat`: seconds of silence after which a process counts as dead and ends the others.
    Raises ConfigError if only some of the three are given, if they contradict one another, or if
    the environment does not tell them.
    """
    given = (coordinator, processes, process)
    if not distributed:
        if any(v is not None for v in given):
            raise ConfigError("coordinator, processes and process need distributed=True: set it")
        return
    if any(v is None for v in given) and any(v is not None for v in given):
        raise ConfigError(
            f"coordinator={coordinator}, processes={processes}, process={process}: "
            "give all three, or none where TPU, SLURM or Open MPI tells them"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"process={process} of processes={processes}: count from 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=A_DAY,  # the others wait while process 0 writes the report
        )
    except ValueError as error:
        # JAX's way to say that no address was given and none was found.
        raise ConfigError(
            f"distributed=True could not start ({error}): give coordinator, processes and process"
        ) from error


def is_main() -> bool:
    """True in the one process that writes files."""
    return jax.process_index() == 0


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis over `devices` (all of all processes if None), those of a process side by side.

    Raises ValueError if there are none.
    """
    devices = jax.devices() if devices is None else devices
    if not devices:
        raise ValueError("a mesh needs at least one device")
    # jax.make_mesh may reorder devices; shares of the rows must be contiguous in every process.
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
    # jax.device_put would not do: even with may_alias=False the copy on the array's own device
    # shares its buffer, and donation then deletes the original (jax 0.10.2).
    return jax.tree.map(lambda x: _global(x, replicated(mesh), np.shape(x)), tree)


def share(n: int, mesh: Mesh) -> Int[np.ndarray, " m"]:
    """Which of `n` rows this process holds, in order.

    Where n does not divide by the devices, the index n - 1 is repeated to fill the last ones.
    Raises ValueError if n < 1: no row could fill the shape.
    """
    return np.minimum(_positions(n, mesh), n - 1)


def valid(n: int, mesh: Mesh) -> Bool[Array, " m"]:
    """Which rows of a placed array are real when `n` were put; placed like the rows."""
    return place(_positions(n, mesh) < n, mesh)


def place(local: PyTree, mesh: Mesh) -> PyTree:
    """Join the rows of every process (those that `share` named, on the host) to global arrays.

    Leaves are arrays with rows on axis 0, all of the same length; PRNG keys are allowed. The result
    may share their memory: do not change them, nor donate it.
    """
    here = int(_mine(mesh).sum())

    def one(x):
        if x.shape[0] % here:
            raise ValueError(
                f"{x.shape[0]} rows do not spread over {here} devices: take those of share()"
            )
        shape = (x.shape[0] // here * mesh.size, *x.shape[1:])
        return _global(x, by_rows(mesh), shape, copied=False)

    return jax.tree.map(one, local)


def put(tree: PyTree, mesh: Mesh) -> tuple[PyTree, Bool[Array, " n"]]:
    """Spread axis 0 over all devices; every process passes the same, whole tree.

    Returns the tree with its rows filled up to a multiple of the devices, and which rows are valid.
    To read only a part in each process, use `share` and `place`.
    Raises ValueError if leaves differ in their number of rows, or have none.
    """
    counts = {np.shape(x)[:1] for x in jax.tree.leaves(tree)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"leaves must agree in their number of rows, but have {sorted(counts)}")
    (n,) = counts.pop()
    rows = share(n, mesh)
    return place(jax.tree.map(lambda x: _take(x, rows), tree), mesh), valid(n, mesh)


def fetch(tree: PyTree, n: int) -> PyTree:
    """The first `n` rows of placed arrays, as numpy arrays in every process.

    Every process must call it: where there are several, it is a collective operation.
    """
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda x: x[:n], jax.device_get(tree))


def _mine(mesh: Mesh) -> Bool[np.ndarray, " d"]:
    """Which devices of the mesh belong to this process."""
    return np.array([d.process_index == jax.process_index() for d in mesh.devices.flat])


def _positions(n: int, mesh: Mesh) -> Int[np.ndarray, " m"]:
    """Rows of the filled-up array that this process holds; those from n on are filling."""
    if n < 1:
        raise ValueError(f"{n} rows cannot be placed: at least 1 is needed")
    return np.flatnonzero(np.repeat(_mine(mesh), -(-n // mesh.size)))


def _is_key(x) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _take(x, rows):
    """Rows of one leaf, on the host (keys stay keys)."""
    if _is_key(x):
        data = jax.device_get(jax.random.key_data(x))[rows]
        return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(x))
    return np.asarray(jax.device_get(x))[rows]


def _global(x, sharding: NamedSharding, shape: tuple[int, ...], copied: bool = True):
    """One global array of this shape from what this process holds of it."""
    if _is_key(x):
        data = jax.random.key_data(x)
        whole = _global(data, sharding, (*shape, data.shape[-1]))
        return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(x))
    held = jax.device_get(x)
    held = np.array(held) if copied else np.asarray(held)
    return jax.make_array_from_process_local_data(sharding, held, shape)
