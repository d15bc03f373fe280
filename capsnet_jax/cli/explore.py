"""The command `capsnet explore`: a page in the browser that shows a trained model at work."""

import shlex
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import tyro

from capsnet_jax.data import configured_dataset, existing_path
from capsnet_jax.data.augmentation import Augmentation
from capsnet_jax.errors import UsageError
from capsnet_jax.explore.explorer import Explorer, Images, Labels, mnist_examples, with_routing
from capsnet_jax.explore.server import Server, is_loopback
from capsnet_jax.explore.static_page import check_static, write_static
from capsnet_jax.interchange.state_files import PRETRAINED
from capsnet_jax.nn.model import CapsNet
from capsnet_jax.routing import ROUTINGS
from capsnet_jax.runs.folder import Run, load_run


@dataclass(frozen=True)
class Explore:
    """Draw digits in the browser, and see a trained model route them.

    Opens a page that shows primary capsules, what each class receives from them in every
    routing iteration, and reconstructions. Ctrl-C ends it. --static writes the page into a
    folder instead. Details: docs/explorer.md."""

    run_dir: tyro.conf.Positional[Path] = Path("mnist-dynamic")
    """Folder of the run, or name of a pretrained model."""
    compare: str | None = None
    """Another run to show beside it, or a routing to show with the same weights:
    a name, or your own as package.module:function."""
    port: int = 0
    """Port of the server; 0 for any free one."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this one lets others in the network use the model."""
    browser: bool = True
    """Open the page in the browser."""
    best: bool = False
    """Use the weights that were best on validation images instead of the last ones."""
    trust_code: bool = False
    """Import the routing that the run names, if it is not of this package. That runs code."""
    static: Path | None = None
    """Write the page, the weights and 20 test images into this new folder, for any web host.
    The browser computes the network. For dynamic routing only."""

    def run(self) -> None:
        """Answer the page until Ctrl-C, or write it.

        Raises:
            UsageError: an option is wrong, the port is used, or a model cannot be loaded or shown.
        """
        if self.static is None:
            self._serve()
        else:
            self._write(self.static)

    def _serve(self) -> None:
        with Server(self.host, self.port) as server:
            run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
            models = {str(self.run_dir): model}
            if self.compare is not None:
                if self.compare in models:
                    raise UsageError(f"compare is {self.compare}, the run itself; expected another one, or a routing.")
                models[self.compare] = self._other(self.compare, run, model)
            explorer = Explorer(
                models, run.class_names, labels_per_image=run.labels_per_image, examples=lambda: read_examples(run)
            )
            if not is_loopback(self.host):
                print(f"capsnet: all who reach {self.host} in the network can use the page.", file=sys.stderr)
            print(f"Explore {self.run_dir} at {server.url} (Ctrl-C ends it)", flush=True)
            if self.browser:
                webbrowser.open(server.url)
            try:
                server.serve(explorer)
            except KeyboardInterrupt:
                print()

    def _write(self, folder: Path) -> None:
        """Write the page into a folder."""
        if self.compare is not None:
            raise UsageError(f"compare is {self.compare}; expected none with --static, whose page shows one run.")
        run, model = load_run(self.run_dir, best=self.best, trust_code=self.trust_code)
        check_static(folder, run.config.model)
        explorer = Explorer(
            {self.run_dir.absolute().name: model},  # not its path, which may name its owner
            run.class_names,
            labels_per_image=run.labels_per_image,
            examples=lambda: read_examples(run),
        )
        files = write_static(folder, explorer, model)
        size = sum(path.stat().st_size for path in files) / 1e6
        print(f"{folder}: {len(files)} files, {size:.1f} MB. They run on any web host. To see them on this machine:")
        print(f"python -m http.server --directory {shlex.quote(str(folder))}")

    def _other(self, compare: str, run: Run, model: CapsNet) -> CapsNet:
        """Load the model that is shown beside the one of the run."""
        name, _, _ = compare.partition(",")
        if name in ROUTINGS or ":" in name:
            return with_routing(model, compare)
        if not Path(compare).exists() and compare not in PRETRAINED:
            raise UsageError(f"compare is {compare}; expected a run, or a routing: {', '.join(ROUTINGS)}.")
        other, model = load_run(Path(compare), best=self.best, trust_code=self.trust_code)
        if other.class_names != run.class_names:
            raise UsageError(
                f"The classes of {compare} are {', '.join(other.class_names)}; expected those of {self.run_dir}, "
                f"{', '.join(run.class_names)}."
            )
        return model


def read_examples(run: Run) -> tuple[Images, Labels]:
    """Read the test images of a run from this machine; for MNIST, those that come with the page if there are none.

    Raises:
        UsageError: they cannot be read, would have to be downloaded, or have another shape than the images of the run.
    """
    data = run.config.data
    try:
        if data.data_dir is None and data.dataset != "digits" and existing_path(data.dataset) is None:
            raise UsageError(f"The folder of the test images of {data.dataset} is not known.")
        dataset = configured_dataset(data, test_only=True).cropped(Augmentation.parse(data.augment).crop)
    except UsageError:
        if data.dataset != "mnist" or run.image_shape != (28, 28, 1):
            raise
        return mnist_examples()
    if dataset.image_shape != run.image_shape:
        raise UsageError(f"The test images are of shape {dataset.image_shape}; expected {run.image_shape}.")
    return dataset.test_images, dataset.test_labels
