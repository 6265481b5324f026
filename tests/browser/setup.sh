#!/usr/bin/env bash
# tests/browser/setup.sh: Debian's headless Chromium, in which tests/test_page.py looks at pages; called by `make test`.
set -euo pipefail
command -v chromium-headless-shell >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ]; then root=(env DEBIAN_FRONTEND=noninteractive)
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then root=(sudo env DEBIAN_FRONTEND=noninteractive)
else
  echo "tests/browser: chromium-headless-shell is missing; ask an administrator for: apt-get install chromium-headless-shell" >&2
  exit 2
fi
echo "tests/browser: installing chromium-headless-shell"
if ! said=$( { "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq --no-install-recommends \
    chromium-headless-shell; } 2>&1); then
  printf '%s\n' "$said" "tests/browser: could not install chromium-headless-shell" >&2
  exit 2
fi
