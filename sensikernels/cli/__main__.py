"""``python -m sensikernels.cli``."""

from __future__ import annotations

import sys

from sensikernels.cli.app import main

sys.exit(main())
