#!/usr/bin/env python3
"""The addresses by which other machines reach this one, and the interface of each. Python's own modules, and no command.

    python addresses.py list                 NAME ADDRESS of every interface that is up, the best for a head first
    python addresses.py head                 ADDRESS of the best; exit status 1 where there is none but loopback
    python addresses.py interface ADDRESS    NAME of the interface that has this address of ours, or that leads to it
    python addresses.py reach HOST PORT      exit status 1, and why, where no connection can be made within five seconds
"""

from __future__ import annotations

import array
import ipaddress
import re
import socket
import struct
import sys
from pathlib import Path

GET_ADDRESSES, ROW = 0x8912, 40  # SIOCGIFCONF, and the bytes of an interface in its answer
FAR = {socket.AF_INET: "8.8.8.8", socket.AF_INET6: "2001:4860:4860::8888"}  # where the default route leads; Ray asks for them too
SECONDS = 5
# What containers and virtual machines of this host alone are behind.
INSIDE = re.compile(
    r"docker|br-[0-9a-f]{12}$|virbr|lxcbr|lxdbr|incusbr|podman|cni|flannel|cali|vxlan|kube|vmnet|vboxnet|nerdctl"
)


def addresses() -> list[tuple[str, str]]:
    """(interface, address), the best for a head first: what the default route starts from, then hardware, then the rest.
    Loopback and IPv6's link-local addresses, which only mean something together with an interface, are left out."""
    # None without a default route.
    routed = [_toward(family, far) for family, far in FAR.items()]

    def rank(pair: tuple[str, str]) -> tuple[bool, bool, bool, bool]:
        name, address = pair
        hardware = Path("/sys/class/net", name, "device").exists()
        return address not in routed, bool(INSIDE.match(name)), not hardware, ":" in address

    return sorted((pair for pair in (*_ipv4(), *_ipv6()) if _reaches_out(pair[1])), key=rank)


def _toward(family: int, address: str) -> str | None:
    """Our address on the way to another. No packet is sent: connecting a datagram socket only looks the route up."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None


def _reaches_out(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return not (ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local))


def _ipv4() -> list[tuple[str, str]]:
    """Of the kernel's answer: rows of a name in 16 bytes and a socket's address, of which bytes 4 to 8 are the IP."""
    import fcntl

    room = array.array("B", b"\0" * ROW * 512)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("iL", len(room), room.buffer_info()[0])
        size = struct.unpack("iL", fcntl.ioctl(any_socket, GET_ADDRESSES, asked))[0]
    rows = [room.tobytes()[start : start + ROW] for start in range(0, size, ROW)]
    names = [row[:16].split(b"\0")[0].decode().partition(":")[0] for row in rows]  # eth0:1 is eth0's second address
    return [(name, socket.inet_ntoa(row[20:24])) for name, row in zip(names, rows, strict=True)]


def _ipv6() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().split("\n")
    except OSError:  # a kernel without it
        return []
    fields = [line.split() for line in lines if line]
    return [(each[5], str(ipaddress.IPv6Address(bytes.fromhex(each[0])))) for each in fields]


def interface(address: str) -> str | None:
    """The interface that carries this address, if it is ours, or the one that leads to it."""
    family, ip = next((each[0], each[4][0]) for each in socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM))
    ours = [name for name, own in (*_ipv4(), *_ipv6()) if own == ip]
    if ours:
        return ours[0]
    start = _toward(family, str(ip))
    return next((name for name, own in (*_ipv4(), *_ipv6()) if own == start), None)


def reach(host: str, port: int) -> str | None:
    """None, or why there is no connection."""
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except ConnectionRefusedError:
        return f"nothing listens there: is the head up (cluster/head.sh), and is {port} its port?"
    except socket.gaierror as error:
        return f"there is no machine of that name ({error.strerror})"
    except (TimeoutError, OSError) as error:
        words = f"no answer within {SECONDS} s" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        mine = ", ".join(f"{name} {address}" for name, address in addresses()) or "loopback only"
        return f"{words}: is the network between the machines open, and is it the head's address on it? This machine has {mine}"
    return None


def main() -> int:
    command, *rest = sys.argv[1:]
    if command == "list":
        print("\n".join(f"{name} {address}" for name, address in addresses()))
        return 0
    if command == "head":
        print(next((address for _, address in addresses()), ""))
        return 0 if addresses() else 1
    if command == "interface":
        print(interface(rest[0]) or "")
        return 0
    problem = reach(rest[0], int(rest[1]))
    if problem is not None:
        print(problem)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
