"""`python train.py ...` is `capsnet train ...`, for people working in the repository."""

import sys

from capsnet_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
