#!/usr/bin/env bash
# Build, prove, measure and draw on this machine: bash bench/gpu_suite.sh [--quick] [--device cpu|cuda]
# [--output DIR]. No network, no virtual environment: PYTHON, else .venv, else python3 runs it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || { echo "gpu_suite.sh: no $PYTHON; set PYTHON" >&2; exit 2; }
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m bench.suite "$@"
