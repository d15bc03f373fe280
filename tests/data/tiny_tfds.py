"""A data set of tensorflow-datasets that can be prepared without TensorFlow. This imports tensorflow-datasets."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_metadata

COUNTS = {"train": 50, "test": 13}


def examples(split: str) -> Iterator[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(len(split))
    for _ in range(COUNTS[split]):
        yield rng.integers(0, 256, (12, 10, 3), dtype=np.uint8), int(rng.integers(4))


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Random images of 12 x 10 in four classes."""

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def get_metadata(cls):
        """Return metadata that the library would otherwise read from files beside the module."""
        return dataset_metadata.DatasetMetadata(description="", citation="", tags=[])

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(12, 10, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cat", "dog"]),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for number, (image, label) in enumerate(examples(split)):
            yield number, {"image": image, "label": label}
