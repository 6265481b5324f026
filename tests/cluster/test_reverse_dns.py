"""Hundreds of processes that meet wait for no DNS server if their hosts have IPv4 addresses and know each other."""

import hosts
import pytest
import reverse_dns

if reason := hosts.why_not():
    pytest.skip(reason, allow_module_level=True)


def test_rank_0_looks_for_the_names_of_ipv4_hosts_in_its_own_list(two_hosts):
    """Once the first number is 0, torch does so itself, and connection.own_listener has one task less."""
    alpha, _ = two_hosts
    resolver = alpha.folder / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    # It may be a link into /run, which is empty on this host.
    alpha.run("sh", "-ec", 'at=$(readlink -m /etc/resolv.conf); mkdir -p "$(dirname "$at")"; [ -e "$at" ] || : > "$at"')
    alpha.replace("/etc/resolv.conf", resolver)
    for address in (alpha.address, alpha.name):  # by name because the hosts have no IPv6 address
        assert alpha.run("python", reverse_dns.__file__, address).split()[-2:] == [str(reverse_dns.CONNECTIONS), "0"]
