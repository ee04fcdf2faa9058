"""``python -m bench.aot``."""

import sys

from bench.aot.gate import main

if __name__ == "__main__":
    sys.exit(main())
