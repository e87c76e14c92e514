"""``python -m lmdeploy_vico.cli``: the command, where it is not on the path."""

import sys

from lmdeploy_vico.cli import main

sys.exit(main())
