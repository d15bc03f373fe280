"""The model card: what the model is, how it was trained, what was measured, and how to load it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsnet_jax.config import Config, ModelConfig
from capsnet_jax.interchange.state_files import CONFIG, WEIGHTS
from capsnet_jax.presets import PRESETS
from capsnet_jax.routing import get_routing
from capsnet_jax.tables import markdown_table

# Of the options, those that change what is learnt in most trainings; all of them are in the config.
TOLD = {
    "data": ("dataset", "augment", "train_limit", "validation"),
    "training": (
        *("epochs", "batch_size", "learning_rate", "schedule", "ema_decay", "precision", "loss"),
        *("reconstruction_weight", "reconstruction_error", "seed"),
    ),
}
MOST_NAMES = 20  # classes; of more, only the first so many are told
UNKNOWN = (
    "It is not known here how these weights were trained: they came without a config. Of the model, scale, squash, "
    "strides of the stem and routing are what was given with them, and not told by the weights; the sections `data` "
    f"and `training` of `{CONFIG}` are those of a preset."
)
NOTHING = "Nothing was measured: no metrics came with these weights."


def model_card(
    name: str,
    config: Config,
    *,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    known_data: bool,
    num_weights: int,
    dtype: str,
    epochs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the model card of a run: Markdown, with the header that Hugging Face reads.

    It tells nothing that is not in its arguments.

    Args:
        name: of the model, its title.
        config: of the run.
        image_shape: height, width and number of channels of the images.
        class_names: of the classes, in order.
        known_data: whether the config tells how the weights were trained, and on what. If not, no training is told,
            and no metrics.
        num_weights: number of weights, and running means.
        dtype: their type.
        epochs: metrics of the epochs that these weights were trained for, as in a file of metrics; empty if not known.
    """
    finished = known_data and len(epochs) == config.training.epochs
    accuracy = epochs[-1].get("test_accuracy") if finished else None
    sections = [
        _header(name, config, accuracy, known_data),
        f"# {name}",
        "A capsule network: the capsule of each class has an activation, which tells how present the class is, and a "
        "pose, which tells what it looks like.",
        f"## Model\n\n{_model(config.model, image_shape, class_names, num_weights, dtype)}",
        f"## Training\n\n{_training(config) if known_data else UNKNOWN}",
        f"## Results\n\n{_results(epochs, config.training.epochs) if known_data and epochs else NOTHING}",
        f"## Use\n\n{_use(config.model, image_shape, len(class_names), known_data)}",
    ]
    return "\n\n".join(sections) + "\n"


def _header(name: str, config: Config, accuracy: float | None, known_data: bool) -> str:
    """YAML; strings are quoted as JSON has them, which YAML reads alike."""
    lines = ["---", "library_name: capsnet-jax", "pipeline_tag: image-classification"]
    lines += ["tags:", "- capsule-network", "- jax", "- flax"]
    dataset = json.dumps(Path(config.data.dataset).name)
    if known_data and not Path(config.data.dataset).is_absolute():  # by its name; a folder or file is the user's own
        lines += ["datasets:", f"- {dataset}"]
    if accuracy is not None:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
        lines += ["  - task:", "      type: image-classification", "    dataset:", f"      name: {dataset}"]
        lines += [f"      type: {dataset}", "      split: test", "    metrics:", "    - type: accuracy"]
        lines.append(f"      value: {accuracy:.4f}")
    return "\n".join([*lines, "---"])


def _model(
    model: ModelConfig, image_shape: tuple[int, int, int], class_names: Sequence[str], num_weights: int, dtype: str
) -> str:
    height, width, channels = image_shape
    num_classes = len(class_names)
    names = ", ".join(class_names[:MOST_NAMES]) + (" ..." if num_classes > MOST_NAMES else "")
    norm = ", batch normalisation" if model.batch_norm else ""
    running = ", running means among them," if model.batch_norm else ""
    stem = [(*below, 1) for below in model.stem_below] + [(model.stem_channels, model.stem_kernel, model.stem_stride)]
    rows = [("layer", "sizes")]
    rows += [
        ("convolution", f"{outputs} channels, kernel {kernel} x {kernel}, stride {stride}, ReLU{norm}")
        for outputs, kernel, stride in stem
    ]
    kernel = model.primary_kernel
    details = f"kernel {kernel} x {kernel}, stride {model.primary_stride}, scale {model.primary_scale:g}"
    details += ", depthwise" if model.primary_depthwise else ""
    details += "" if model.primary_squash == "none" else f", squash {model.primary_squash!r}"
    details += f", activation {model.primary_activation!r}"
    rows.append(("primary capsules", f"{model.primary_groups} groups of pose size {model.primary_dim}, {details}"))
    rows += [
        ("convolutional capsules", f"{groups} groups of pose size {size}, kernel {kernel} x {kernel}, stride {stride}")
        for groups, size, kernel, stride in model.conv_capsules
    ]
    rows += [("capsules", f"{count} of pose size {size}") for count, size in model.hidden_capsules]
    rows.append(("class capsules", f"{num_classes} of pose size {model.class_dim}"))
    if model.decoder_hidden is not None:
        widths = " and ".join(map(str, model.decoder_hidden))
        rows.append(("decoder", f"hidden layers of {widths}, then {height} x {width} x {channels} pixels"))
    options = dict(get_routing(model.routing, num_iterations=model.num_iterations).options)
    iterations = f", {options['num_iterations']} iterations" if "num_iterations" in options else ""
    presets = [name for name, preset in PRESETS.items() if preset.model == model]
    same = f" The options of the model are those of the preset `{presets[0]}`." if presets else ""
    return (
        f"Images of {height} x {width} pixels and {channels} channel{'s' if channels > 1 else ''} to {num_classes} "
        f"classes: {names}. {num_weights:,} weights{running} in {dtype}.\n\n{markdown_table(rows)}\n\n"
        f"Routing: `{model.routing}`{iterations}.{same}"
    )


def _training(config: Config) -> str:
    rows = [("option", "value")]
    for section, names in TOLD.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            value = Path(value).name if name == "dataset" else value  # the path is of a machine that readers lack
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            rows.append((name, "none" if value is None else text or "none"))
    return f"Trained by `capsnet train` with these options; `{CONFIG}` has all.\n\n{markdown_table(rows)}"


def _results(epochs: Sequence[Mapping[str, Any]], total: int) -> str:
    last = epochs[-1]
    rows = [("measured", "value"), ("epochs", f"{len(epochs)} of {total}"), ("training steps", f"{last['step']:,}")]
    for name, title, decimals in (
        ("loss", "mean training loss of the last epoch", 4),
        ("validation_accuracy", "validation accuracy", 4),
        ("test_accuracy", "test accuracy", 4),
    ):
        if last.get(name) is not None:
            rows.append((title, f"{last[name]:.{decimals}f}"))
    speeds = [line["images_per_second"] for line in epochs if line.get("images_per_second") is not None]
    if speeds:
        rows.append(("training images per second, median of the epochs", f"{statistics.median(speeds):,.0f}"))
    memory = [line["peak_memory_bytes"] for line in epochs if line.get("peak_memory_bytes") is not None]
    if memory:
        rows.append(("peak memory, MB", f"{max(memory) / 1e6:,.0f}"))
    when = "After the last epoch, whatever was best on the way."
    if len(epochs) < total:
        when = f"After epoch {len(epochs)}; training had not ended, and the weights may be of a later step."
    return f"{when}\n\n{markdown_table(rows)}"


def _use(model: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, known_data: bool) -> str:
    height, width, channels = image_shape
    shape, dim = f"b {height} {width} {channels}", model.class_dim
    evaluate = "capsnet evaluate FOLDER" + ("" if known_data else " --dataset YOUR_DATA_SET")
    predict = "\ncapsnet predict FOLDER image.png" if channels in (1, 3) else ""
    own = " Each image is standardised in the model." if model.standardize_images else ""
    return f"""```python
import capsnet_jax

model = capsnet_jax.load("FOLDER")
capsules = model.encode(images)  # poses [b {num_classes} {dim}], activations [b {num_classes}]
```

`images` are float32 of shape `[{shape}]`: height, width and channels last, pixels from 0 to 1 (bytes divided by \
255).{own} The predicted class is the one of the largest activation.

```sh
{evaluate}{predict}
capsnet convert FOLDER --to model.pt
```

`{WEIGHTS}` has the names and axes of the PyTorch model's state_dict."""
