"""What scaling_curves.py measures, in a process of its own for each row: a capsule layer, forward and backward.

Neither framework is loaded before it is known which one is measured.
"""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")
LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of GNU's <malloc.h>
IN_DIM, OUT_CAPSULES, OUT_DIM = 8, 10, 16  # of the reference model, between primary and class capsules


class JaxLayer:
    """`capsnet_jax.nn.layers.CapsuleLayer` on random poses; attributes as those of `Work`."""

    temp_bytes: int | None = None

    def __init__(self, implementation: str):
        import jax

        self._implementation = implementation
        self.platform, self.device = jax.devices()[0].platform, jax.devices()[0].device_kind

    def gradient(self, batch: int, inputs: int, iterations: int) -> Callable[[], Any]:
        """A call that gives output poses, and for a random gradient of them those of weight and poses."""
        import jax
        from flax import nnx

        from capsnet_jax.capsules import Capsules
        from capsnet_jax.nn.layers import CapsuleLayer
        from capsnet_jax.ops import capsule_norm

        layer = CapsuleLayer(
            *(inputs, IN_DIM, OUT_CAPSULES, OUT_DIM),
            num_iterations=iterations,
            implementation=self._implementation,
            rngs=nnx.Rngs(0),
        )
        graphdef, weight = nnx.split(layer)
        poses_key, cotangent_key = jax.random.split(jax.random.key(1))
        poses = jax.random.normal(poses_key, (batch, inputs, IN_DIM))
        cotangent = jax.random.normal(cotangent_key, (batch, OUT_CAPSULES, OUT_DIM))

        @jax.jit
        def gradient(weight: nnx.State, poses: jax.Array, cotangent: jax.Array) -> Any:
            def route(weight: nnx.State, poses: jax.Array) -> jax.Array:
                return nnx.merge(graphdef, weight)(Capsules(poses, capsule_norm(poses))).poses

            routed, pullback = jax.vjp(route, weight, poses)
            return routed, pullback(cotangent)

        compiled = gradient.lower(weight, poses, cotangent).compile()
        analysis: Any = compiled.memory_analysis()
        self.temp_bytes = analysis.temp_size_in_bytes
        return lambda: compiled(weight, poses, cotangent)

    def block(self, result: Any) -> None:
        import jax

        jax.block_until_ready(result)

    def size(self, result: Any) -> int:
        """Bytes of the arrays."""
        import jax

        return sum(leaf.nbytes for leaf in jax.tree.leaves(result))

    def device_memory(self) -> tuple[int, int]:
        """Bytes on the GPU: now, and at most since the process began."""
        import jax

        stats = jax.devices()[0].memory_stats()
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]

    def forget_peak(self) -> None:
        """JAX cannot: the points of a process come in order of size."""


class TorchLayer:
    """`capsnet_torch.layers.CapsuleLayer`, the same."""

    temp_bytes = None

    def __init__(self) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        self.platform, self.device = ("gpu", torch.cuda.get_device_name()) if on_gpu else ("cpu", "cpu")
        torch.set_default_device("cuda" if on_gpu else "cpu")
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it

    def gradient(self, batch: int, inputs: int, iterations: int) -> Callable[[], Any]:
        import torch

        from capsnet_torch.capsules import Capsules
        from capsnet_torch.layers import CapsuleLayer
        from capsnet_torch.ops import capsule_norm

        torch.manual_seed(0)
        layer = CapsuleLayer(inputs, IN_DIM, OUT_CAPSULES, OUT_DIM, num_iterations=iterations)
        poses = torch.randn(batch, inputs, IN_DIM, requires_grad=True)
        cotangent = torch.randn(batch, OUT_CAPSULES, OUT_DIM)
        activations = capsule_norm(poses.detach())

        def call() -> Any:
            routed = layer(Capsules(poses, activations)).poses
            return routed.detach(), *torch.autograd.grad(routed, [*layer.parameters(), poses], cotangent)

        return call

    def block(self, result: Any) -> None:
        import torch

        if self.platform == "gpu":
            torch.cuda.synchronize()

    def size(self, result: Any) -> int:
        return sum(tensor.nbytes for tensor in result)

    def device_memory(self) -> tuple[int, int]:
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()


class Work:
    """What is measured of a row; see `capsnet_benchmark.worker`, whose process it is in.

    Args:
        row: "jax-fused", "jax-votes" or "torch-eager".
        fixed: "batch", "inputs" and "iterations", where they are not what varies.

    Attributes:
        platform: "cpu" or "gpu".
        device: its name, where it is a GPU.
    """

    def __init__(self, *, row: str, fixed: dict[str, int]):
        framework, _, kind = row.partition("-")
        self._layer = JaxLayer(kind) if framework == "jax" else TorchLayer()
        self._fixed = fixed
        self.platform, self.device = self._layer.platform, self._layer.device
        self.block = self._layer.block
        self._extra: int | None = None

    def prepare(self, name: str) -> list[tuple[Callable[[], Any], int]]:
        """The call of a point, such as "batch=64"; the memory that it takes is measured first."""
        axis, _, value = name.partition("=")
        keep_freed(2**16)  # little, or what is taken next would not be seen
        call = self._layer.gradient(**self._fixed | {axis: int(value)})
        self._extra = self._extra_of_gpu(call) if self.platform == "gpu" else self._extra_of_process(call)
        keep_freed(2**25)  # as much as it comes to by itself when large arrays are freed; it is faster so
        return [(call, 1)]

    def free_memory(self) -> int | float:
        """Bytes that could be had, of the GPU or of the machine; only JAX is asked."""
        from capsnet_jax.train.memory import available_memory

        return available_memory()

    def memory(self) -> dict[str, int | None]:
        """Bytes beyond inputs, weight, results and gradients; and those of temporary arrays, as XLA has planned."""
        return {"extra_bytes": self._extra, "xla_temp_bytes": self._layer.temp_bytes}

    def warmed_up(self) -> None:
        """Memory was measured before."""

    def _extra_of_gpu(self, call: Callable[[], Any]) -> int:
        self.block(call())  # what is only set up once does not count
        self._layer.forget_peak()
        before, _ = self._layer.device_memory()
        result = call()
        self.block(result)
        _, peak = self._layer.device_memory()
        return max(peak - before - self._layer.size(result), 0)

    def _extra_of_process(self, call: Callable[[], Any]) -> int | None:
        if not hasattr(LIBC, "mallopt"):
            return None
        self.block(call())
        gc.collect()
        time.sleep(0.1)  # XLA's threads free what was temporary after the result is there
        LIBC.malloc_trim(0)
        PROCESS.joinpath("clear_refs").write_text("5")  # the peak is looked for from here
        before = process_memory("VmRSS")
        result = call()
        self.block(result)
        return max(process_memory("VmHWM") - before - self._layer.size(result), 0)


def keep_freed(size: int) -> None:
    """Has the allocator of GNU's C library, where that is in use, keep freed memory up to this many bytes."""
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, size)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2 * size)


def process_memory(name: str) -> int:
    """Bytes of this process in memory, on Linux: "VmRSS" now, "VmHWM" at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", PROCESS.joinpath("status").read_text())
    assert found is not None
    return 1024 * int(found[1])
