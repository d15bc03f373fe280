"""Run the command `capsnet` as `python -m capsnet_jax`."""

import sys

from capsnet_jax.cli.main import main

sys.exit(main())
