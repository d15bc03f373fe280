"""The command `capsnet convert`: weights from one kind of file to another, without changing a bit."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from flax import nnx

from capsnet_jax.errors import UsageError
from capsnet_jax.files import replace_file
from capsnet_jax.interchange.architecture import infer_architecture
from capsnet_jax.interchange.model_card import model_card
from capsnet_jax.interchange.state_files import CONFIG, WEIGHTS, check_paths, is_folder, named, read_state, write_state
from capsnet_jax.interchange.weights import StateDict, from_torch, weight_table
from capsnet_jax.presets import get_preset
from capsnet_jax.runs.folder import Run, read_run
from capsnet_jax.runs.metrics import METRICS, read_lines

CARD = "README.md"


@dataclass(frozen=True)
class Convert:
    """Converts weights between PyTorch and JAX, safetensors and state_dict, one file and the reference model's two.

    Names are those of the PyTorch model, and no bit of a weight is changed: float64 stays float64, though all other
    commands compute in float32. The model is built and takes the weights before anything is written."""

    source: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of a run; or a file, .safetensors or .pt with a state_dict; or two files, the reference model's encoder
    and decoder. A file of PyTorch is read without running what is in it. Running means count as weights; the number
    of batches that PyTorch counts is left out."""
    to: tuple[Path, ...]
    """What to write: a new .safetensors or .pt file; two, for encoder and decoder; or, by any other name, a folder
    that has no run yet, for config.json, model.safetensors and README.md, a model card of what is known of the run."""
    preset: str | None = None
    """Take what weights do not tell (strides of the stem, scale, squash, routing) from this preset, and not from the
    config.json beside the source. Without either it is readable, the reference model."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and number of channels of the images, for weights without a decoder and without a config.json."""

    def run(self) -> None:
        """Prints a line for each file written.

        Raises:
            UsageError: a source cannot be read or is not of one model, or a target cannot be written.
        """
        check_paths(self.source)
        check_paths(self.to)
        for path in self.to:
            _check_free(path)
        target = self.to[0] if is_folder(self.to[0]) else None
        state = read_state(self.source)
        run, preset = self._find_run(state)
        try:
            model = nnx.eval_shape(run.new_model)  # without drawing initial weights
            from_torch(model, state)
        except UsageError as error:
            raise UsageError(f"{named(self.source)}: {error}") from error
        if preset is not None:
            config = run.config.model
            print(
                f"Scale {config.primary_scale:g}, {config.primary_squash!r} as squash and routing {config.routing} are "
                f"taken from preset {preset}, as weights do not tell them.",
                file=sys.stderr,
            )
        state = {row.name: state[row.name] for row in weight_table(model)}
        for path, part in write_state(state, self.to).items():
            print(f"{path}: {len(part)} entries, {num_weights(part):,} weights in {dtype_of(part)}")
        if target is not None:
            run = run._replace(folder=target)
            card = model_card(
                target.absolute().name,
                run.config,
                image_shape=run.image_shape,
                class_names=run.class_names,
                known_data=run.data_checksum != 0,
                num_weights=num_weights(state),
                dtype=dtype_of(state),
                epochs=self._epochs(),
            )
            replace_file(target / CARD, card)
            print(f"{target / CARD}: model card")
            run.write_config()  # last, as it makes this the folder of a run
            print(f"{target / CONFIG}: options")

    def _find_run(self, state: StateDict) -> tuple[Run, str | None]:
        """The run of the config beside the source; or that which the weights and a preset tell, and the preset."""
        source = self.source[0]
        folder = source if source.is_dir() else source.parent
        if self.preset is None and (source.is_dir() or (folder / CONFIG).exists()):
            run = read_run(folder)
            if self.image_shape not in (None, run.image_shape):
                raise UsageError(
                    f"--image-shape is {self.image_shape}, and in {folder / CONFIG} it is {run.image_shape}; "
                    "expected the same, or --preset to do without that file."
                )
            return run, None
        preset = self.preset or "readable"
        config = get_preset(preset)
        try:
            model = infer_architecture(state, config.model, image_shape=self.image_shape)
        except UsageError as error:
            raise UsageError(f"{named(self.source)}: {error}") from error
        class_names = tuple(map(str, range(model.num_classes)))
        return Run(folder, replace(config, model=model), class_names), preset

    def _epochs(self) -> list[dict[str, Any]]:
        """Metrics of the epochs after which these weights were the last: those of a run, and not of its best ones."""
        source = self.source[0]
        folder = source if source.is_dir() else source.parent
        path = folder / METRICS
        if source not in (folder, folder / WEIGHTS) or not path.exists():
            return []
        return [line for line in read_lines(path)[0] if line.get("kind") == "epoch"]


def num_weights(state: StateDict) -> int:
    """How many numbers there are."""
    return sum(array.size for array in state.values())


def dtype_of(state: StateDict) -> str:
    """The type that all entries have."""
    return str(next(iter(state.values())).dtype)


def _check_free(path: Path) -> None:
    if not is_folder(path):
        if path.exists():
            raise UsageError(f"{path} exists already; expected the name of a new file.")
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; expected the name of a folder, or one that ends in .safetensors or .pt.")
    taken = [name for name in (CONFIG, WEIGHTS, CARD) if (path / name).exists()]
    if taken:
        raise UsageError(f"{path} has a {taken[0]} already; expected a folder without, to write one into.")
