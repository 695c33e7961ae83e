"""The command `python -m bbkit.study`."""

import sys

from bbkit.study import runner

sys.exit(runner.main())
