#!/bin/sh
# Set up .venv with the tested versions: ./setup.sh, or ./setup.sh dev for the tests' tools too.
# Needs Python 3.11 or 3.12 and pip, nothing else. PYTHON=python3.12 ./setup.sh chooses another one.
set -eu
cd "$(dirname "$0")"
test -x .venv/bin/python || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
extra=${1:+[$1]}
# Compiled once here instead of at the first import in every worker.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python \
    --constraint constraints.txt --editable ".$extra"
