#!/usr/bin/env bash
# tools/setup.sh: install everything that lbsgd needs into .venv. `make setup` calls it only when something is missing.
#
#   PYTHON=python3.11 CUDA=12 tools/setup.sh
#
# CUDA is the version of torch's build: 13 by default, or the one that .venv has. 12 also supports V100, and drivers
# before 580. Each step prints one line with its time. The output of apt, pip and the compiler goes into .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
log=.venv/setup.log
if [[ $PWD == *[[:space:]]* ]]; then
  echo "setup: neither pip's constraints nor the deepspeed command may lie in a path with a space, and this is $PWD;" \
    "rename the folder" >&2
  exit 2
fi
have() { command -v "$1" > /dev/null 2>&1; }

# --- Python ----------------------------------------------------------------------------------------------------------
oldest=$(sed -n 's/^python_requires = >=//p' setup.cfg)
require_python() {
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, sys.argv[1].split("."))))' "$oldest" \
    2> /dev/null && return
  echo "setup: lbsgd needs Python $oldest or newer, and $python is $("$python" --version 2>&1 | head -n 1); name a newer" \
    "one: PYTHON=python$oldest make setup" >&2
  exit 2
}
if have "$python"; then require_python; fi

there=$(cat .venv/.complete 2> /dev/null || true)
cuda=${CUDA:-${there:-13}}
case $cuda in
  12 | 13) ;;
  *) echo "setup: CUDA=$cuda is no build of torch that was tried; give 12 or 13" >&2; exit 2 ;;
esac
# NVIDIA's packages for CUDA 12 and 13 have files with the same names, which pip would mix.
[ "${there:-$cuda}" = "$cuda" ] || rm -rf .venv
mkdir -p .venv
rm -f .venv/.complete
: > "$log"
cp constraints.txt .venv/constraints.txt
if [ "$cuda" = 12 ]; then
  # The last torch with CUDA 12 on PyPI, which itself requires exact versions of NVIDIA's packages and triton.
  sed -i -E '/^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/d' .venv/constraints.txt
  printf '%s\n' torch==2.10.0 torchvision==0.25.0 >> .venv/constraints.txt
fi
export PIP_CONSTRAINT=$PWD/.venv/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

step() {  # step WHAT COMMAND...: run a command silently, and show the end of the log if it fails
  local what=$1 began=$SECONDS code=0 said
  shift
  printf 'setup: %s ... ' "$what"
  printf '\n== %s\n' "$what" >> "$log"
  "$@" >> "$log" 2>&1 || code=$?
  [ "$code" = 0 ] && { echo "$((SECONDS - began)) s"; return; }
  echo "failed after $((SECONDS - began)) s"
  said=$(tac "$log" | sed '/^== /q' | tac | grep -v '^WARNING:')  # only this step's lines
  if [[ $said == *"No space left on device"* ]]; then
    echo "setup: the disk is full: $PWD/.venv takes 6 GB, and ${TMPDIR:-/tmp} up to 3 GB meanwhile. Free some, and run" \
      "this again" >&2
  else
    tail -n 20 <<< "$said" >&2
    echo "setup: $what failed (exit code $code); the whole output is in $PWD/$log" >&2
  fi
  exit 2
}
pip() { .venv/bin/python -m pip "$@"; }
can() { have "$python" && "$python" -c "$1" 2> /dev/null; }
library() { [ -n "$(/sbin/ldconfig -p | grep -F "$1")" ]; }

# --- system packages: what FFCV is compiled against, and Python's own headers ----------------------------------------
needed=()
have pkg-config || needed+=(pkg-config)
have c++ || needed+=(g++)
have "$python" || needed+=(python3)
[ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || needed+=(libopencv-imgproc-dev)
[ -e /usr/include/turbojpeg.h ] || needed+=(libturbojpeg0-dev)
[ -e /usr/include/jpeglib.h ] || needed+=(libjpeg-dev)
# FFCV imports opencv-python, which links these two.
library libGL.so.1 || needed+=(libgl1)
library libgthread-2.0.so.0 || needed+=(libglib2.0-0)
can 'import ensurepip, venv' || needed+=(python3-venv)
header='sysconfig.get_path("include") + "/Python.h"'
can "import os, sysconfig; assert os.path.exists($header)" || needed+=(python3-dev)
if [ ${#needed[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ]; then root=(env DEBIAN_FRONTEND=noninteractive)
  elif have sudo && sudo -n true 2> /dev/null; then root=(sudo env DEBIAN_FRONTEND=noninteractive)
  else
    echo "setup: system packages are missing; ask an administrator for: apt-get install ${needed[*]}" >&2
    exit 2
  fi
  step "list of system packages" "${root[@]}" apt-get update
  step "system packages: ${needed[*]}" "${root[@]}" apt-get install -y --no-install-recommends "${needed[@]}"
  require_python    # it may have been installed just now
fi

# --- Python packages -------------------------------------------------------------------------------------------------
# FFCV asks pkg-config for OpenCV and links every library listed there, though it calls only core and imgproc. Its
# umbrella header needs the headers of every module. Our own description of those two saves hundreds of packages.
install_ffcv() {
  local opencv=$1
  mkdir -p "$opencv/include/opencv2"
  printf '#include "opencv2/core.hpp"\n#include "opencv2/imgproc.hpp"\n' > "$opencv/include/opencv2/opencv.hpp"
  printf '%s\n' 'Name: OpenCV' 'Description: the two OpenCV libraries that FFCV calls' 'Version: 4' \
    'Libs: -lopencv_imgproc -lopencv_core' "Cflags: -I$opencv/include -I/usr/include/opencv4" > "$opencv/opencv4.pc"
  PKG_CONFIG_PATH="$opencv" pip install --no-build-isolation --no-deps --no-cache-dir ffcv
}

echo "setup: 2 to 5 minutes in all on an idle machine with a fast network; details in $log"
[ -x .venv/bin/python ] || step "virtual environment" "$python" -m venv .venv
step "setuptools and wheel" pip install setuptools wheel
step "torch and torchvision (2 GB with CUDA $cuda, the longest step)" pip install torch torchvision
if ! pip show -q ffcv > /dev/null 2>&1; then
  opencv=$PWD/.venv/opencv  # a TMPDIR may have a space, which ends a flag
  trap 'rm -rf "$opencv"' EXIT
  step "ffcv, compiled here" install_ffcv "$opencv"
fi
step "lbsgd with its kernels, deepspeed, and what the tests need" pip install -e '.[ffcv,detection,test]'
echo "$cuda" > .venv/.complete
echo "setup: done in $SECONDS s"
