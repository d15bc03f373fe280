"""Run `capsnet train` from a checkout of the repository: `python train.py ...`."""

import sys

from capsnet_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
