#!/usr/bin/env bash
# Make the virtual environment VENV, or complete an interrupted one: scripts/setup.sh VENV
# A torch that is in it already stays, whatever its version or build. PYTHON: the interpreter to use.
set -euo pipefail

venv=$1
python=${PYTHON:-python3}

fail() {
  echo "setup: $*" >&2
  exit 1
}
has() { "$venv/bin/python" -c "import $1" 2>/dev/null; }
install() { # under constraints.txt without the pins of $unpinned
  grep -vE "^($unpinned)==" constraints.txt >"$venv/constraints.txt"
  "$venv/bin/python" -m pip install --constraint "$venv/constraints.txt" "$@"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "needs Python 3.10 or later, and $python is not; name another: make PYTHON=python3.12 ..."

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -c 'import ensurepip, venv' ||
    fail "$python cannot make environments (on Debian and Ubuntu: install python3-venv)"
  "$python" -m venv "$venv" || fail "could not make $venv; delete it and try again"
fi

# torch comes first, by its exact version: anything else that needs it would take the newest. A CUDA
# build brings the triton that it demands; the pin is for a torch that brings none.
unpinned=triton
has torch || install torch
unpinned=torch
! has triton || unpinned='torch|triton'
install setuptools ninja # to compile the kernels, in the next line
install --no-build-isolation --editable '.[dev]'
