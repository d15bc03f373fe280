"""Model cards: what a model is, how it was trained, what was measured and how to load it."""

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

# The options with the largest effect on training; the config has all of them.
DATA_OPTIONS = ("dataset", "augment", "train_limit", "validation")
TRAINING_OPTIONS = (
    *("epochs", "batch_size", "learning_rate", "schedule", "ema_decay", "precision", "loss"),
    *("reconstruction_weight", "reconstruction_error", "seed"),
)
MOST_NAMES = 20  # of classes in a card
UNKNOWN = (
    "It is not known here how these weights were trained, because they came without a config. Scale, squash, routing "
    "and the strides of the stem were given with the weights, which do not contain them. The sections `data` and "
    f"`training` of `{CONFIG}` are those of a preset."
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
    started_from: str = "",
) -> str:
    """Write the model card of a run in Markdown, with the YAML header that Hugging Face reads.

    Args:
        name: name of the model, used as the title.
        config: config of the run.
        image_shape: height, width and number of channels of the images.
        class_names: names of the classes, in order.
        known_data: whether the config describes how the weights were trained. If not, the card has neither training
            options nor metrics.
        num_weights: number of weights, including running averages.
        dtype: dtype of the weights.
        epochs: metrics of the epochs after which these weights were saved, as in the metrics file; empty if unknown.
        started_from: a sentence about the weights that training started from; empty if they were random.

    Returns:
        The text of the card.
    """
    sections = [
        _header(name, config, epochs, known_data),
        f"# {name}",
        "A capsule network: the capsule of each class has an activation, which says how present the class is, and a "
        "pose, which says what it looks like.",
        f"## Model\n\n{_model(config.model, image_shape, class_names, num_weights, dtype)}",
        f"## Training\n\n{_training(config, started_from) if known_data else UNKNOWN}",
        f"## Results\n\n{_results(epochs, config.training.epochs) if known_data and epochs else NOTHING}",
        f"## Use\n\n{_use(config.model, image_shape, len(class_names), known_data)}",
    ]
    return "\n\n".join(sections) + "\n"


def _header(name: str, config: Config, epochs: Sequence[Mapping[str, Any]], known_data: bool) -> str:
    """The header in YAML, with values as JSON, which YAML includes."""
    dataset = Path(config.data.dataset).name
    fields: dict[str, Any] = {"library_name": "capsnet-jax", "pipeline_tag": "image-classification"}
    fields["tags"] = ["capsule-network", "jax", "flax"]
    if known_data and not Path(config.data.dataset).is_absolute():  # a folder or file of the user's own is private
        fields["datasets"] = [dataset]
    finished = known_data and len(epochs) == config.training.epochs
    if finished and epochs[-1].get("test_accuracy") is not None:
        accuracy = {"type": "accuracy", "value": round(epochs[-1]["test_accuracy"], 4)}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": "test"},
            "metrics": [accuracy],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    lines = [f"{field}: {json.dumps(value, ensure_ascii=False)}" for field, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _model(
    model: ModelConfig, image_shape: tuple[int, int, int], class_names: Sequence[str], num_weights: int, dtype: str
) -> str:
    height, width, channels = image_shape
    num_classes = len(class_names)
    names = ", ".join(class_names[:MOST_NAMES]) + (" ..." if num_classes > MOST_NAMES else "")
    norm, averages = (", batch normalization", " with running averages") if model.batch_norm else ("", "")
    rows = [("layer", "sizes")]
    rows += [
        ("convolution", f"{outputs} channels, kernel {kernel} x {kernel}, stride {stride}, ReLU{norm}")
        for outputs, kernel, stride in model.stem_convolutions
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
        f"classes: {names}. {num_weights:,} weights{averages} in {dtype}.\n\n{markdown_table(rows)}\n\n"
        f"Routing: `{model.routing}`{iterations}.{same}"
    )


def _training(config: Config, started_from: str) -> str:
    options = {name: getattr(config.data, name) for name in DATA_OPTIONS}
    options["dataset"] = Path(config.data.dataset).name  # without the folders of this machine
    options |= {name: getattr(config.training, name) for name in TRAINING_OPTIONS}
    options["augment"] = " ".join(config.data.augment) or None
    options |= {"freeze": " ".join(config.training.freeze)} if config.training.freeze else {}
    rows = [("option", "value"), *((name, "none" if value is None else str(value)) for name, value in options.items())]
    about = f"Trained by `capsnet train` with these options; `{CONFIG}` has all of them. {started_from}"
    return f"{about.rstrip()}\n\n{markdown_table(rows)}"


def _results(epochs: Sequence[Mapping[str, Any]], total: int) -> str:
    last = epochs[-1]
    speeds = [line["images_per_second"] for line in epochs if line.get("images_per_second") is not None]
    memory = [line["peak_memory_bytes"] for line in epochs if line.get("peak_memory_bytes") is not None]
    measured = {
        "epochs": f"{len(epochs)} of {total}",
        "training steps": f"{last['step']:,}",
        "mean training loss of the last epoch": _four_decimals(last.get("loss")),
        "validation accuracy": _four_decimals(last.get("validation_accuracy")),
        "test accuracy": _four_decimals(last.get("test_accuracy")),
        "training images per second, median of the epochs": f"{statistics.median(speeds):,.0f}" if speeds else None,
        "peak memory, MB": f"{max(memory) / 1e6:,.0f}" if memory else None,
    }
    rows = [("measured", "value"), *((name, value) for name, value in measured.items() if value is not None)]
    when = "After the last epoch, even if an earlier one was better."
    if len(epochs) < total:
        when = f"After epoch {len(epochs)}; training had not ended, and the weights may be of a later step."
    return f"{when}\n\n{markdown_table(rows)}"


def _four_decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _use(model: ModelConfig, image_shape: tuple[int, int, int], num_classes: int, known_data: bool) -> str:
    height, width, channels = image_shape
    shape, dim = f"b {height} {width} {channels}", model.class_dim
    evaluate = "capsnet evaluate FOLDER" + ("" if known_data else " --dataset YOUR_DATA_SET")
    predict = "\ncapsnet predict FOLDER image.png" if channels in (1, 3) else ""
    own = " The model standardizes each image." if model.standardize_images else ""
    return f"""```python
import capsnet_jax

model = capsnet_jax.load("FOLDER")
capsules = model.encode(images)  # poses [b {num_classes} {dim}], activations [b {num_classes}]
```

`images` are float32 of shape `[{shape}]`: height, width and channels last, pixels from 0 to 1 (bytes divided by \
255).{own} The predicted class has the largest activation.

```sh
{evaluate}{predict}
capsnet convert FOLDER --to model.pt
```

`{WEIGHTS}` has the names and axes of the PyTorch model's state_dict."""
