#!/usr/bin/env bash
# Sets up an environment and runs kvopt in it. Safe to run twice and from any directory.
#
#   ./run.sh quick           the main job: quantise, evaluate, benchmark, draw (a few minutes)
#   ./run.sh test [ARG …]    the tests; arguments go to pytest
#   ./run.sh build           only set up and install
#   ./run.sh doctor          what is here, what is missing
#   ./run.sh exp NAME [N]    one experiment, at most N documents
#
# An active environment that has torch is used as it is (virtual environment, conda, Colab); otherwise .venv is made here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
here=$PWD
cd "$root"

say() { printf 'kvopt: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }
has_torch() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.12 python3.13 python3.11 python3.14 python3.10 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python >= 3.10 was found; install one or name it: PYTHON=/path/to/python ./run.sh …"
}

choose_environment() {
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} options=()
  if [ -n "$active" ] && [ -x "$active/bin/python" ] && has_torch "$active/bin/python"; then
    python=$active/bin/python
    say "using the active environment $active"
    return
  fi
  python=$(find_python)
  if [ ! -x .venv/bin/python ] && has_torch "$python"; then
    local managed
    managed=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))')
    if [ ! -e "$managed" ]; then
      say "using $python, which has torch"
      return
    fi
    options=(--system-site-packages)  # the system's Python wants no packages of ours, but its torch serves
  fi
  if [ ! -x .venv/bin/python ]; then
    say "making .venv with $python"
    "$python" -m venv ${options[@]+"${options[@]}"} .venv ||
      { rm -rf .venv; die "python -m venv failed; on Debian or Ubuntu: apt install python3-venv"; }
  fi
  python=$root/.venv/bin/python
}

# Installs torch where there is none, then kvopt if the sources changed since the last time.
install() {
  local stamp hash
  command -v "${CXX:-c++}" >/dev/null || die "no C++ compiler was found; on Debian or Ubuntu: apt install g++"
  if ! has_torch "$python"; then
    say "installing torch"
    "$python" -m pip install --quiet -c constraints.txt torch
  fi
  hash=$(find csrc cmake python pyproject.toml CMakeLists.txt README.md -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z |
         xargs -0 sha256sum | cat - <(echo "${KVOPT_CUDA:-} ${KVOPT_CUDA_ARCHS:-} $python") | sha256sum | cut -c1-16)
  stamp=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kvopt/.installed-from
  if [ -f "$stamp" ] && [ -f "${stamp%/*}/__init__.py" ] && [ "$(cat "$stamp")" = "$hash" ]; then
    return
  fi
  say "building and installing kvopt (a minute or two)"
  "$python" -m pip install --quiet -c constraints.txt .
  echo "$hash" > "$stamp"
}

# Runs from the caller's folder, so that relative paths mean what they say, and never imports the sources.
in_environment() { cd "$here" && "$python" "$@"; }

command=${1:-help}
[ $# -gt 0 ] && shift
case "$command" in
  quick)
    choose_environment; install
    in_environment -m kvopt.cli run --quick "$@" ;;
  test)
    choose_environment; install
    "$python" -c "import pytest, pandas, xdist" 2>/dev/null || "$python" -m pip install --quiet pytest pandas pytest-xdist
    # Workers share the processors, so idle OpenMP threads must not spin.
    [ $# -gt 0 ] || set -- -n "$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')"
    cd "$root" && OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} "$python" -m pytest "$@" ;;
  build)
    choose_environment; install ;;
  doctor)
    choose_environment; install
    in_environment -m kvopt.cli doctor "$@" ;;
  exp)
    [ $# -ge 1 ] || die "usage: ./run.sh exp NAME [LIMIT]"
    choose_environment; install
    in_environment -m kvopt.cli run --experiments "$1" ${2:+--limit "$2"} ;;
  help|-h|--help)
    sed -n '2,10s/^# \{0,1\}//p' "$root/run.sh" ;;
  *)
    die "unknown command '$command'; possible: quick, test, build, doctor, exp" ;;
esac
