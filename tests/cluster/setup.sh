#!/usr/bin/env bash
# tests/cluster/setup.sh: installs the programs that play two hosts on one machine; called by `make test`.
#
# Installs nothing where the tests would skip anyway: without root, or where the kernel allows no namespaces. A failure
# here ends no build, because the tests then skip and say what is missing.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

needed=()
have() { command -v "$1" >/dev/null 2>&1; }
have ip || needed+=(iproute2)
have pdsh || needed+=(pdsh)
have sshd || needed+=(openssh-server)
[ ${#needed[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && have apt-get && unshare --net --mount --pid --fork true 2>/dev/null || exit 0

# The tests start their own sshd. Debian's package would start one open to the network, now and at each boot.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
fi
export DEBIAN_FRONTEND=noninteractive
echo "tests/cluster: installing ${needed[*]}"
if ! said=$( { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${needed[@]}"; } 2>&1); then
  printf '%s\n' "$said" "tests/cluster: could not install ${needed[*]}; its tests will skip" >&2
  exit 0
fi
case " ${needed[*]} " in *openssh-server*) ! have systemctl || systemctl disable -q ssh.service 2>/dev/null || true ;; esac
