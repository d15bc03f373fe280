"""Model cards contain the numbers of the run, and nothing that was not measured."""

import dataclasses
import re
from pathlib import Path

import pytest

from capsnet_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from capsnet_jax.interchange.model_card import model_card
from capsnet_jax.presets import PRESETS
from capsnet_jax.runs.folder import Run

CONFIG = Config(
    ModelConfig(
        stem_below=((7, 5),),
        stem_channels=6,
        stem_kernel=3,
        stem_stride=2,
        batch_norm=True,
        primary_groups=4,
        primary_dim=2,
        primary_kernel=9,
        primary_stride=1,
        primary_scale=0.5,
        primary_depthwise=True,
        primary_squash="squash",
        conv_capsules=((11, 12, 13, 14),),
        hidden_capsules=((21, 22),),
        class_dim=23,
        decoder_hidden=(31, 32),
        routing="em,min_variance=0.1",
        num_iterations=4,
        standardize_images=True,
    ),
    DataConfig(dataset="kmnist", augment=("shift=0.1", "flip"), train_limit=1000),
    TrainingConfig(epochs=3, batch_size=17, learning_rate=0.0025, seed=19),
)
RUN = Run(Path("folder/kuzushiji"), CONFIG.with_sizes((40, 41, 3), 3), ("o", "ki", "su"), data_checksum=5)
EPOCHS = [
    {"epoch": epoch, "step": 58 * epoch, "loss": 0.5 / epoch, "test_accuracy": accuracy, "images_per_second": speed}
    | {"peak_memory_bytes": memory}
    for epoch, accuracy, speed, memory in ((1, 0.5, 700.0, None), (2, 0.99, 1234.4, 3e6), (3, 0.87654, 2000.0, 5e6))
]


def card(run: Run = RUN, epochs=EPOCHS) -> str:
    return model_card(
        run.folder.name,
        run.config,
        image_shape=run.image_shape,
        class_names=run.class_names,
        known_data=run.data_checksum != 0,
        num_weights=123456,
        dtype="float64",
        epochs=epochs,
    )


def rows(text: str) -> dict[str, str]:
    """The rows of all tables of a card, by their first column."""
    found = re.findall(r"^\| (.+?) *\| +(.+?) \|$", text, re.MULTILINE)
    return dict(found)


def test_the_header_is_yaml_for_hugging_face():
    yaml = pytest.importorskip("yaml")
    start, header, _ = card().split("---\n", 2)
    assert start == ""
    fields = yaml.safe_load(header)
    assert fields == {
        "library_name": "capsnet-jax",
        "pipeline_tag": "image-classification",
        "tags": ["capsule-network", "jax", "flax"],
        "datasets": ["kmnist"],
        "model-index": [
            {
                "name": "kuzushiji",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "kmnist", "type": "kmnist", "split": "test"},
                        "metrics": [{"type": "accuracy", "value": 0.8765}],
                    }
                ],
            }
        ],
    }


def test_sizes_options_and_metrics_of_the_run():
    text = card()
    assert "\n# kuzushiji\n" in text
    assert "Images of 40 x 41 pixels and 3 channels to 3 classes: o, ki, su. 123,456 weights with running" in text
    assert "Routing: `em,min_variance=0.1`, 4 iterations.\n" in text
    assert text.count("| convolution ") == 2
    assert "7 channels, kernel 5 x 5, stride 1, ReLU, batch normalization" in text
    told = rows(text)
    assert told["convolution"] == "6 channels, kernel 3 x 3, stride 2, ReLU, batch normalization"
    assert told["primary capsules"] == (
        "4 groups of pose size 2, kernel 9 x 9, stride 1, scale 0.5, depthwise, squash 'squash', activation 'norm'"
    )
    assert told["convolutional capsules"] == "11 groups of pose size 12, kernel 13 x 13, stride 14"
    assert told["capsules"] == "21 of pose size 22"
    assert told["class capsules"] == "3 of pose size 23"
    assert told["decoder"] == "hidden layers of 31 and 32, then 40 x 41 x 3 pixels"
    assert (told["dataset"], told["augment"], told["train_limit"]) == ("kmnist", "shift=0.1 flip", "1000")
    assert (told["batch_size"], told["learning_rate"], told["seed"]) == ("17", "0.0025", "19")
    # The metrics of the last epoch, although the epoch before was better.
    assert (told["test accuracy"], told["mean training loss of the last epoch"]) == ("0.8765", "0.1667")
    assert told["training images per second, median of the epochs"] == "1,234"
    assert told["peak memory, MB"] == "5"
    assert "[b 40 41 3]" in text
    assert "poses [b 3 23], activations [b 3]" in text
    assert "The model standardizes each image." in text


def test_the_preset_is_named():
    run = RUN._replace(config=PRESETS["digits"])
    assert "those of the preset `digits`." in card(run)
    assert "preset" not in card()


def test_iterations_are_named_for_routings_that_iterate():
    model = dataclasses.replace(CONFIG.model, routing="self_attention")
    assert "Routing: `self_attention`.\n" in card(RUN._replace(config=dataclasses.replace(CONFIG, model=model)))


def test_a_card_without_metrics():
    text = card(epochs=())
    assert "Nothing was measured: no metrics came with these weights." in text
    assert "accuracy" not in text
    assert rows(text)["dataset"] == "kmnist"


def test_a_card_of_weights_with_unknown_training():
    text = card(RUN._replace(data_checksum=0))
    assert "It is not known here how these weights were trained" in text
    assert "Nothing was measured" in text
    assert "kmnist" not in text
    assert "accuracy" not in text
    assert "capsnet evaluate FOLDER --dataset YOUR_DATA_SET\n" in text


def test_the_header_has_no_result_of_an_unfinished_training():
    text = card(epochs=EPOCHS[:2])
    assert "model-index" not in text
    assert "After epoch 2; training had not ended, and the weights may be of a later step." in text
    assert (rows(text)["epochs"], rows(text)["test accuracy"]) == ("2 of 3", "0.9900")


def test_paths_of_data_are_not_in_the_card():
    data = dataclasses.replace(CONFIG.data, dataset="/somewhere/private/photos", data_dir=Path("/somewhere/private"))
    text = card(RUN._replace(config=dataclasses.replace(CONFIG, data=data)))
    assert "private" not in text
    assert "datasets:" not in text
    assert rows(text)["dataset"] == "photos"


def test_the_python_example_runs(tmp_path):
    """The example of the card, with a real folder and images."""
    import jax.numpy as jnp

    from capsnet_jax.interchange.weights import save_weights
    from tests.conftest import SMALL

    run = Run(tmp_path / "run", Config(ModelConfig((9, 11, 1), 10, **SMALL)), tuple("0123456789"))
    run.write_config()
    save_weights(run.folder / "model.safetensors", run.new_model())
    (lines,) = re.findall(r"```python\n(.+?)```", card(run), re.DOTALL)
    names = {"images": jnp.full((2, 9, 11, 1), 0.5)}
    exec(lines.replace("FOLDER", str(run.folder)), names)
    assert names["capsules"].poses.shape == (2, 10, 5)
    assert "[b 9 11 1]" in card(run)
