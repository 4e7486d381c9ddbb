"""Which IP addresses the fetcher may talk to: public unicast ones, and those the operator allowed.

The rules are IANA's special-purpose registries; networks that carry an IPv4 address inside an IPv6
one are judged by what they carry. Knows no names and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_SPECIAL: tuple[Network, ...] = tuple(
    ip_network(cidr)
    for cidr in (
        "168.63.129.16/32",  # Azure's wire server: a public address that answers inside only
        "192.0.0.0/24",  # IETF protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.175.48.0/24",  # AS112
        "::ffff:0:0:0/96",  # IPv4-translated (SIIT)
        "64:ff9b:1::/48",  # local-use NAT64
        "2001::/23",  # IETF protocol assignments, Teredo among them
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fec0::/10",  # site-local
    )
)
_NAT64 = ip_network("64:ff9b::/96")


def allowed(address: Address, exceptions: Iterable[Network] = ()) -> bool:
    """True for public unicast addresses and for members of `exceptions`."""
    return within(address, exceptions) or is_public(address)


def is_public(address: Address) -> bool:
    """True when the address can only be reached across the public internet."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.scope_id is not None:
            return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not within(address, _SPECIAL)


def within(address: Address, networks: Iterable[Network]) -> bool:
    """Whether any of several networks, of either family, holds the address."""
    return any(address.version == n.version and address in n for n in networks)
