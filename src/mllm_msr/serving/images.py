"""Images that requests bring: as base64, or from a URL, if the server may fetch any, and then never a private one.

The address that is checked is the one that is connected to, at every redirect, so that a name which is looked up twice
with two results gains nothing.
"""

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from PIL import Image

from mllm_msr.data.images import BrokenImage, decode
from mllm_msr.records.sections import MAX_EDGE
from mllm_msr.serving.client import CLIENT

REDIRECTS = 3
TRANSLATED = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class ImageRefused(ValueError):
    """An image that a request may not bring, with the reason and what to do."""


def is_public(address: str) -> bool:
    """Whether an address is of the open internet, neither private nor a way to what is.

    >>> [is_public(a) for a in ("8.8.8.8", "127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.0.1")]
    [True, False, False, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if any(found in net for net in TRANSLATED):
            return False
        found = found.ipv4_mapped or found
    return found.is_global and not found.is_multicast and not found.is_reserved


@dataclass(frozen=True)
class ImageReader:
    """Opens the images of requests.

    Args:
        urls: whether URLs are fetched.
        max_bytes, max_pixels: of an image.
        timeout: seconds that a fetch may take, redirects included.
        is_allowed: which addresses may be connected to.
        trust: the certificates of https; None: those of the system.
    """

    urls: bool = False
    max_bytes: int = 10_000_000
    max_pixels: int = 25_000_000
    timeout: float = 10.0
    is_allowed: Callable[[str], bool] = is_public
    trust: ssl.SSLContext | None = None

    def open(self, text: str, until: float = float("inf")) -> Image.Image:
        """The image that a URL, a ``data:`` URL or base64 text stands for.

        Raises:
            ImageRefused: it is none, or one that may not be.
            TimeoutError: it is ``until`` already, on the monotonic clock.
        """
        CLIENT.get().check()
        if time.monotonic() > until:
            raise TimeoutError("the images were not read in time: send fewer")
        content = (
            self.fetch(text, until) if text[:8].lower().startswith(("http://", "https://")) else self._inline(text)
        )
        if len(content) > self.max_bytes:
            raise ImageRefused(f"it has more than {self.max_bytes:,} bytes: send a smaller image")
        try:
            return decode(content, self.max_pixels, MAX_EDGE)
        except BrokenImage as error:
            raise ImageRefused(f"it cannot be used ({error}): send a PNG or JPEG") from error

    def _inline(self, text: str) -> bytes:
        head, comma, body = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
        if len(body) * 3 // 4 > self.max_bytes + 3:
            raise ImageRefused(f"it has more than {self.max_bytes:,} bytes: send a smaller image")
        if comma and not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        try:
            return base64.b64decode("".join(body.split()).translate(str.maketrans("-_", "+/")) + "==", validate=False)
        except (binascii.Error, ValueError) as error:
            raise ImageRefused("it is neither base64, nor a data: or http(s) URL") from error

    def fetch(self, url: str, until: float = float("inf")) -> bytes:
        """The bytes behind a URL; :class:`ImageRefused` says why there are none."""
        if not self.urls:
            raise ImageRefused("this server fetches no URLs: send it as base64 or as a data: URL")
        until = min(until, time.monotonic() + self.timeout)
        for _ in range(REDIRECTS + 1):
            try:
                with self._get(url, until) as reply:
                    if reply.status not in (301, 302, 303, 307, 308):
                        return self._body(reply, until)
                    url = urljoin(url, reply.getheader("Location", ""))
            except ImageRefused:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:  # what a host says is not passed on
                raise ImageRefused(f"its URL cannot be fetched ({type(error).__name__}): send it as base64") from error
        raise ImageRefused(f"its URL is redirected more than {REDIRECTS} times: give the final one")

    @contextmanager
    def _get(self, url: str, until: float) -> Iterator[http.client.HTTPResponse]:
        """The reply to a request at an address that was checked; ``until`` then, however slowly a host talks."""
        parts = urlsplit(url)
        host, secure = parts.hostname, parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise ImageRefused("its URL is not a plain http(s) URL")
        port = parts.port or (443 if secure else 80)
        addresses = list(dict.fromkeys(info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        if not addresses or not all(self.is_allowed(str(address)) for address in addresses):
            raise ImageRefused("its URL leads to a private address, which this server does not fetch")
        channel: Any = socket.create_connection((str(addresses[0]), port), timeout=_left(until))
        if secure:
            trust = self.trust or ssl.create_default_context()
            channel = trust.wrap_socket(channel, server_hostname=host, do_handshake_on_connect=False)
        hang_up = threading.Timer(_left(until), _shut, [channel])  # a timeout of the socket is for each byte anew
        hang_up.start()
        try:
            if secure:
                channel.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = channel
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "mllm-msr", "Accept": "image/*"})
            yield connection.getresponse()
        finally:
            hang_up.cancel()
            channel.close()

    def _body(self, reply: http.client.HTTPResponse, until: float) -> bytes:
        if reply.status != 200:
            raise ImageRefused(f"its URL answers with status {reply.status}")
        content = bytearray()
        while block := reply.read1(65536):
            content += block
            if len(content) > self.max_bytes:
                raise ImageRefused(f"it has more than {self.max_bytes:,} bytes: send a smaller image")
            _left(until)
        return bytes(content)


def _shut(channel: socket.socket) -> None:
    with suppress(OSError):  # it may be closed by now
        socket.socket.shutdown(channel, socket.SHUT_RDWR)


def _left(until: float) -> float:
    """Seconds that are left; TimeoutError if none is."""
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left
