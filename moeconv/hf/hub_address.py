"""The Hub's address, and whether the token may go there.

A token goes to the Hub over https, to this very machine, or over https to another host that the
user named (`--endpoint`, HF_ENDPOINT), and to no other host.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import constants

from moeconv.errors import UsageError

# Of Hugging Face itself, as huggingface_hub knows them (utils/_http.py, `_HUB_ORIGINS`).
_HUB = ("huggingface.co", "hf.co", "hub-ci.huggingface.co")
_PORTS = {"http": 80, "https": 443}
# Scheme, a name or number of a host, port, path: no user, blank, backslash, or letter beyond ASCII.
_ADDRESS = re.compile(r"\w+://(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?(?:/[\w.~/-]*)?", re.ASCII)

Origin = tuple[str, str, int]


@dataclass(frozen=True)
class Address:
    """A Hub.

    Attributes:
        url: Without a slash at its end.
        origin: Scheme, host and port.
        loopback: It is this machine.
        hub: It is Hugging Face's own.
    """

    url: str
    origin: Origin
    loopback: bool
    hub: bool

    @property
    def host(self) -> str:
        """For people."""
        return self.origin[1]

    def takes_token(self, scheme: str, host: str, port: int | None) -> bool:
        """Returns True if a request to this place may carry the token."""
        asked = (scheme, host.lower(), port or _PORTS.get(scheme, 0))
        return asked == self.origin or (self.hub and _is_hub(asked))

    def may_be_asked(self, scheme: str, host: str) -> bool:
        """Returns True if a request may go there: without encryption only to this machine."""
        return scheme == "https" or (scheme == "http" and self.loopback and is_loopback(host))


def read_address(endpoint: str | None) -> Address:
    """Reads the Hub's address; None is huggingface_hub's own (HF_ENDPOINT).

    Raises:
        UsageError: It is no address, or would get the token unencrypted.
    """
    named = "HF_ENDPOINT" if endpoint is None else "--endpoint"
    text = str(constants.ENDPOINT if endpoint is None else endpoint).rstrip("/")
    begin = f"{named} {text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in _PORTS or not _ADDRESS.fullmatch(text):
        raise UsageError(
            f"{begin} is not an address such as https://huggingface.co (a name and password, a "
            "query, and letters beyond ASCII have no place in it)"
        )
    origin = (parts.scheme, host, _PORTS[parts.scheme] if port is None else port)
    loopback = is_loopback(host)
    if parts.scheme == "http" and not loopback:
        raise UsageError(f"{begin} would get the token unencrypted; give an https address")
    return Address(text, origin, loopback, _is_hub(origin))


def other_host_warning(address: Address) -> str | None:
    """A warning, if the token goes to a host that is neither the Hub nor this machine."""
    if address.hub or address.loopback:
        return None
    return (
        f"the token goes to {address.host}, which is not the Hugging Face Hub; it does so because "
        "--endpoint or HF_ENDPOINT names it"
    )


def is_loopback(host: str) -> bool:
    """Returns True if a host is this machine: the name localhost, or an address of the loopback."""
    if host.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _is_hub(origin: Origin) -> bool:
    scheme, host, port = origin
    return scheme == "https" and host in _HUB and port == _PORTS["https"]
