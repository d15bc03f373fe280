"""Data parallelism: each device has all weights and its share of every batch; JAX's own runtime joins the hosts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from capsnet_jax.errors import UsageError

DATA = "data"  # the one axis of the mesh


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of a run, before anything else is done with JAX.

    Args:
        coordinator: host:port of process 0; under Slurm, and on clouds that JAX knows, all three are found out.
        num_processes: number of processes.
        process_id: which of them this is, from 0.

    Raises:
        UsageError: not all of the three are given and they cannot be found out, or the others do not come.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"The processes of this run cannot be joined, with coordinator {coordinator}, num_processes "
            f"{num_processes}, process_id {process_id}; outside Slurm all three are needed: {reason}"
        ) from error


def data_mesh(parts: int) -> Mesh:
    """All devices of all processes in a row.

    Args:
        parts: number of images that are gone through at once, of which each device gets the same share.

    Raises:
        UsageError: the devices do not divide them.
    """
    devices = jax.devices()
    if parts % len(devices):
        raise UsageError(
            f"batch_size / accumulate is {parts}, and must be a multiple of the {len(devices)} devices that share it."
        )
    return Mesh(np.array(devices), (DATA,))


def on_all(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along(mesh: Mesh, axis: int) -> NamedSharding:
    """This axis shared out among the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def place(array: Shaped[np.ndarray, "..."], sharding: NamedSharding) -> Shaped[Array, "..."]:
    """An array that every process has, on the devices; each process hands over what its own devices need."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_tree(tree: Any, sharding: NamedSharding) -> Any:
    """The same for a tree of arrays, of which JAX's may be on one device; dtypes stay as they are."""
    return jax.tree.map(lambda leaf: place(np.asarray(leaf), sharding), tree)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Which of the flags are set in any of the processes; all of them have to ask."""
    if jax.process_count() == 1:
        return flags
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


@contextmanager
def failing_together() -> Iterator[None]:
    """Within its block, which all processes have to enter, a mistake or a file that one of them meets ends all."""
    failure = None
    try:
        yield
    except (OSError, UsageError) as error:
        failure = error
    if any_process(failure is not None)[0]:
        raise failure or UsageError("Another process of this run failed, and tells why.")


def same_everywhere(number: int) -> bool:
    """Whether all processes have this number; all of them have to ask."""
    return jax.process_count() == 1 or len(set(multihost_utils.process_allgather(np.array(number)).tolist())) == 1


def wait_for_all(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
