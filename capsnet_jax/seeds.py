"""Training from several seeds at once: their states are stacked, and one program steps them side by side."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from capsnet_jax.config import Config
from capsnet_jax.couplings import make_coupling_entropy
from capsnet_jax.data import Dataset
from capsnet_jax.evaluation import Evaluation, evaluate, make_count_correct
from capsnet_jax.model import CapsNet
from capsnet_jax.optimizer import create_optimizer
from capsnet_jax.training import (
    Losses,
    NonFiniteLossError,
    Progress,
    TrainState,
    create_state,
    make_configured_chunk,
    order_of_epoch,
    plan_epoch,
)

COUPLED_IMAGES = 1000  # test images over which the entropy of the couplings is averaged


class DivergedError(NonFiniteLossError):
    """The loss of a seed is not finite.

    Attributes:
        step: number of the first such step, from 1.
    """

    def __init__(self, seed: int, step: int):
        super().__init__(f"The loss of seed {seed} is not finite at step {step}.")
        self.step = step


class Program(NamedTuple):
    """Compiled training of a number of seeds.

    Attributes:
        train_chunk: as `make_train_chunk` gives it, with a leading axis of seeds on all but images and labels.
        memory: bytes that it needs at most, by XLA's own account: the training images, the state and all that lives
            only within a chunk.
    """

    train_chunk: Any
    memory: int


@dataclass
class SeedResult:
    """What came of a seed.

    Attributes:
        seed: the number.
        losses: the total loss of every training step.
        tests: after every epoch, all test images.
        coupling_entropy: of the last capsule layer, with the last epoch's weights; see `couplings.coupling_entropy`.
    """

    seed: int
    losses: list[float] = field(default_factory=list)
    tests: list[Evaluation] = field(default_factory=list)
    coupling_entropy: float = math.nan


class SeedTraining:
    """One config, trained from any seeds. Each seed gets what a run of its own would get: weights, order and shifts.

    Args:
        config: of the run; its seed is not used.
        dataset: training and test images.

    Attributes:
        num_params: number of weights of the model.
        results: of the seeds that were trained.
        images_per_second: training images of all seeds, over the time of the training steps. Compilation is not in
            it, and neither is the first call of a program, unless there was no other.

    Raises:
        UsageError: as `fit`, or the model cannot be built.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.config, self.dataset = config, dataset
        model = nnx.eval_shape(lambda: self.new_model(0))  # the shapes, without weights
        self.num_params = sum(math.prod(param.shape) for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
        self.steps_per_epoch, self.chunk = plan_epoch(model, dataset, config.training)
        model.train()
        self._graphdef = nnx.graphdef(model)
        self._optimizer = create_optimizer(config.training)
        train_chunk = make_configured_chunk(
            self._graphdef,
            self._optimizer,
            config.training,
            shift=config.data.shift,
            shift_pixels=config.data.shift_pixels,
        )
        self._train_chunk = jax.jit(jax.vmap(train_chunk, in_axes=(0, None, None, 0, 0)), donate_argnums=0)
        self._count_correct = make_count_correct(self._graphdef)
        self._coupling_entropy = make_coupling_entropy(self._graphdef)
        self._programs: dict[int, Program] = {}
        self._calls: dict[int, list[tuple[int, float]]] = {}  # images and seconds, by the number of seeds at once
        self.results: list[SeedResult] = []

    @property
    def images_per_second(self) -> float:
        images, seconds = np.sum([call for calls in self._calls.values() for call in calls[1:] or calls], axis=0)
        return float(images / seconds)

    @property
    def memory(self) -> int:
        """Bytes that the largest program needs at most; see `Program`."""
        return max(program.memory for program in self._programs.values())

    def program(self, num_seeds: int) -> Program:
        """The training of so many seeds at once, compiled if it was not."""
        if num_seeds not in self._programs:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds))
            batch = (num_seeds, self.chunk, self.config.training.batch_size)
            compiled = self._train_chunk.lower(
                jax.eval_shape(lambda: self.new_states(range(num_seeds))),
                *map(abstract, (self.dataset.train_images, self.dataset.train_labels)),
                jax.ShapeDtypeStruct(batch, jax.dtypes.canonicalize_dtype(int)),
                keys,
            ).compile()
            self._programs[num_seeds] = Program(compiled, memory_of(compiled))
        return self._programs[num_seeds]

    def how_many_fit(self, num_seeds: int, memory: int | float) -> int:
        """The number of seeds, halved until their program needs no more than these bytes, or is of one seed."""
        # The more the better on CPU, too: three seeds of 144 capsules took 0.45 s a step side by side and 0.53 s one
        # after the other with dynamic routing, 0.90 and 1.21 s with variational; medians on 2 shared cores.
        while num_seeds > 1 and self.program(num_seeds).memory > memory:
            del self._programs[num_seeds]
            num_seeds //= 2
        return num_seeds

    def train(self, seeds: Sequence[int]) -> Iterator[Progress]:
        """Trains these seeds side by side. What it tells is their mean; `results` are for each.

        Raises:
            DivergedError: a loss is not finite.
        """
        training = self.config.training
        program = self.program(len(seeds))
        order_keys, step_keys = zip(*(jax.random.split(jax.random.key(seed)) for seed in seeds), strict=True)
        state, keys = self.new_states(seeds), jnp.stack(step_keys)
        images, labels = jax.device_put((self.dataset.train_images, self.dataset.train_labels))
        results = [SeedResult(seed) for seed in seeds]
        step = 0

        for epoch in range(training.epochs):
            orders = [
                order_of_epoch(key, epoch, num_images=len(images), chunk=self.chunk, batch_size=training.batch_size)
                for key in order_keys
            ]
            sums = np.zeros(len(Losses._fields))
            for indices in zip(*orders, strict=True):
                batches = jax.block_until_ready(jnp.stack(indices))
                start = time.perf_counter()
                state, losses = program.train_chunk(state, images, labels, batches, keys)
                losses = jax.device_get(losses)  # waits for the chunk
                seconds = time.perf_counter() - start
                num_images = len(seeds) * self.chunk * training.batch_size
                self._calls.setdefault(len(seeds), []).append((num_images, seconds))
                check_finite(losses.total, seeds, first_step=step + 1)
                step += self.chunk
                for result, totals in zip(results, losses.total, strict=True):
                    result.losses += totals.tolist()
                sums += np.sum(losses, axis=(1, 2))
                test = None
                if step == (epoch + 1) * self.steps_per_epoch:
                    test = self._evaluate(state, results)
                means = sums / (len(seeds) * (step - epoch * self.steps_per_epoch))
                progress = dict(zip(Losses._fields, means.tolist(), strict=True))
                yield Progress(epoch + 1, step, self.steps_per_epoch, progress, num_images / seconds, test)
        for index, result in enumerate(results):
            coupled_images = self.dataset.test_images[:COUPLED_IMAGES]
            result.coupling_entropy = float(self._coupling_entropy(_weights(state, index), coupled_images))
        self.results += results

    def new_model(self, seed: int) -> CapsNet:
        """The model with the initial weights of a seed."""
        config, dataset = self.config.model, self.dataset
        return CapsNet(dataset.image_shape, dataset.num_classes, **vars(config), rngs=nnx.Rngs(seed))

    def new_states(self, seeds: Sequence[int]) -> TrainState:
        """What training of these seeds starts from, stacked."""
        # One by one, not as a mapped program: that would be compiled again for each routing, ten seconds on CPU.
        states = [create_state(self.new_model(seed), self._optimizer)[1] for seed in seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def _evaluate(self, state: TrainState, results: list[SeedResult]) -> Evaluation:
        for index, result in enumerate(results):
            data = self.dataset.test_images, self.dataset.test_labels
            result.tests.append(evaluate(self._count_correct, _weights(state, index), *data))
        return Evaluation(*np.sum([result.tests[-1] for result in results], axis=0).tolist())


def available_memory() -> int | float:
    """Bytes that the device has for programs and their data, or on CPU what is free now; infinite if it cannot tell."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def memory_of(compiled: Any) -> int:
    """Bytes that a compiled program needs: its arguments, its results where they do not take their place, and more."""
    analysis = compiled.memory_analysis()
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(sizes) - analysis.alias_size_in_bytes


def check_finite(losses: Float[np.ndarray, "seeds steps"], seeds: Sequence[int], *, first_step: int) -> None:
    """Raises a `DivergedError` for the first step at which the loss of any seed is not finite."""
    steps, places = np.nonzero(~np.isfinite(losses.T))
    if steps.size:
        raise DivergedError(seeds[places[0]], first_step + int(steps[0]))


def abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
    """The shape and dtype that an array has on the device."""
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _weights(state: TrainState, index: int) -> nnx.State:
    """The weights, and running means, of one of the seeds."""
    return jax.tree.map(lambda leaf: leaf[index], nnx.merge_state(state.params, state.batch_stats))
