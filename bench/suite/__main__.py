"""``python -m bench.suite``, which ``bench/gpu_suite.sh`` calls."""

import sys

from bench.suite.runner import main

sys.exit(main())
