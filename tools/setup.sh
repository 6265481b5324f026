#!/usr/bin/env bash
# tools/setup.sh: everything that lbsgd needs, into .venv; called by `make setup`, which runs it only when something is missing.
#
#   PYTHON=python3.11 tools/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# --- system packages: what FFCV is compiled against, and Python's own headers -------------------------------------------
needed=()
have() { command -v "$1" >/dev/null 2>&1; }
have pkg-config || needed+=(pkg-config)
have c++ || needed+=(g++)
have "$python" || needed+=(python3)
[ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || needed+=(libopencv-imgproc-dev)
[ -e /usr/include/turbojpeg.h ] || needed+=(libturbojpeg0-dev)
[ -e /usr/include/jpeglib.h ] || needed+=(libjpeg-dev)
# opencv-python, which FFCV imports, is linked to these.
library() { [ -n "$(/sbin/ldconfig -p | grep -F "$1")" ]; }
library libGL.so.1 || needed+=(libgl1)
library libgthread-2.0.so.0 || needed+=(libglib2.0-0)
have "$python" && { "$python" -c 'import ensurepip, venv' 2>/dev/null || needed+=(python3-venv); }
have "$python" && { "$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || needed+=(python3-dev); }
if [ ${#needed[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ]; then root=(env DEBIAN_FRONTEND=noninteractive)
  elif have sudo && sudo -n true 2>/dev/null; then root=(sudo env DEBIAN_FRONTEND=noninteractive)
  else
    echo "setup: these system packages are missing: ${needed[*]}; ask an administrator for: apt-get install ${needed[*]}" >&2
    exit 2
  fi
  echo "setup: installing ${needed[*]}"
  "${root[@]}" apt-get update -qq
  "${root[@]}" apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
fi

# --- Python packages ----------------------------------------------------------------------------------------------------
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }
export PIP_CONSTRAINT=$PWD/constraints.txt
pip install setuptools wheel
pip install torch torchvision

# FFCV asks pkg-config for OpenCV and links every library named; it calls only core and imgproc, and its umbrella header
# wants the headers of every module. A description of our own, of those two, spares hundreds of system packages.
if ! .venv/bin/python -m pip show -q ffcv 2>/dev/null; then
  opencv=$(mktemp -d); trap 'rm -rf "$opencv"' EXIT
  mkdir -p "$opencv/include/opencv2"
  printf '#include "opencv2/core.hpp"\n#include "opencv2/imgproc.hpp"\n' > "$opencv/include/opencv2/opencv.hpp"
  printf '%s\n' 'Name: OpenCV' 'Description: the two OpenCV libraries that FFCV calls' 'Version: 4' \
    'Libs: -lopencv_imgproc -lopencv_core' "Cflags: -I$opencv/include -I/usr/include/opencv4" > "$opencv/opencv4.pc"
  PKG_CONFIG_PATH="$opencv" pip install --no-build-isolation --no-deps --no-cache-dir ffcv
fi
pip install -e '.[ffcv,test]'
touch .venv/.complete
