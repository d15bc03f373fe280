"""Data parallelism: each device holds all weights and its share of every batch; JAX connects the processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from capsnet_jax.errors import UsageError

DATA = "data"  # the only axis of the mesh


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connect this process to the others of a distributed run, before any other use of JAX.

    Args:
        coordinator: HOST:PORT of process 0. Under Slurm, and on clouds that JAX knows, all arguments are optional.
        num_processes: number of processes.
        process_id: index of this process, from 0.

    Raises:
        UsageError: arguments are missing and cannot be detected, or the other processes do not connect.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"Cannot connect the processes of this run, with coordinator {coordinator}, num_processes {num_processes}, "
            f"process_id {process_id}; outside Slurm all three are needed: {reason}"
        ) from error


def data_mesh(size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a one-dimensional mesh of devices.

    Args:
        size: number of images in a micro-batch, of which each device gets the same share.
        devices: by default all devices of all processes.

    Raises:
        UsageError: the number of devices does not divide `size`.
    """
    devices = jax.devices() if devices is None else devices
    if size % len(devices):
        raise UsageError(
            f"batch_size / accumulate is {size}, and must be a multiple of the {len(devices)} devices that share it."
        )
    return Mesh(np.array(devices), (DATA,))


def on_all(mesh: Mesh) -> NamedSharding:
    """Sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along(mesh: Mesh, axis: int) -> NamedSharding:
    """Sharding that splits an array along one axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def place_tree(tree: Any, sharding: NamedSharding) -> Any:
    """Put a tree of NumPy or JAX arrays that every process has on the devices; dtypes are kept.

    Each process sends only what its own devices need.
    """

    def place(leaf: Shaped[Array | np.ndarray, "..."]) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set in any process. Every process must call this."""
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


@contextmanager
def failing_together() -> Iterator[None]:
    """If any process raises a `UsageError` or `OSError` inside this block, every process raises.

    Every process must enter the block.
    """
    failure = None
    try:
        yield
    except (OSError, UsageError) as error:
        failure = error
    if any_process(failure is not None)[0]:
        raise failure or UsageError("Another process of this run failed; its output has the reason.")


def same_everywhere(number: int) -> bool:
    """Whether all processes have the same number. Every process must call this."""
    return len(set(multihost_utils.process_allgather(np.array(number)).tolist())) == 1


def wait_for_all(name: str) -> None:
    """Wait until every process is here; the name identifies the place."""
    multihost_utils.sync_global_devices(name)
