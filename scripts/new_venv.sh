#!/usr/bin/env bash
# Create a virtual environment with the first suitable Python: $PYTHON, or one of 3.10-3.13 on the PATH.
set -euo pipefail
target=$1

suitable() {  # it runs, has the right version and can make environments (Debian splits that off)
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

for python in ${PYTHON:-python3.12 python3.11 python3.13 python3.10 python3 python}; do
    if suitable "$python"; then
        echo "Creating $target with $("$python" --version)"
        exec "$python" -m venv --clear "$target"
    fi
done
echo "No Python 3.10-3.13 with the venv module found${PYTHON:+ (PYTHON=$PYTHON)}. Install one (on Debian or Ubuntu: apt-get install python3-venv) or pass PYTHON=/path/to/python." >&2
exit 1
