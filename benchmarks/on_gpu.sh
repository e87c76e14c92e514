#!/bin/bash
# "python -m benchmarks on-gpu" for a machine on which nothing is set up: finds the interpreter and this checkout.
# "benchmarks/on_gpu.sh --help" lists parts, options and variables.
set -eu
root=$(realpath "$(dirname "$0")/..")
python=${PYTHON:-.venv/bin/python}
[[ $python != */* || $python == /* ]] || python=$root/$python
command -v "$python" >/dev/null || python=python3
export PYTHON=$python PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks on-gpu "$@"
