"""``python -m flowerbed``: the command line, where the script of that name is not on the path."""

import sys

from flowerbed.experiments.cli import main

sys.exit(main())
