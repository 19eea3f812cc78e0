"""Images of requests: what is too large or none is refused, and no URL leads to an address that is not allowed."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from mllm_msr.serving.images import ImageReader, ImageRefused, is_public

OUTSIDE, INSIDE = "127.0.0.1", "127.0.0.2"  # stand for a public and a private address


def png(size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


class Pages(BaseHTTPRequestHandler):
    """An image, what is none, and ways that lead elsewhere."""

    seen: list[str]

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        port = self.server.server_address[1]
        way, _, target = self.path.partition("/to/")
        bodies = {"/image": png(), "/large": b"x" * 200_000, "/text": b"<html>"}
        if way == "/slowly":
            with suppress(OSError):
                for _ in range(2000):
                    self.wfile.write(b"a")
                    time.sleep(0.05)
        elif target:
            places = {"inside": f"http://{INSIDE}:{port}/image", "file": "file:///etc/passwd", "again": "/to/again"}
            self.send_response(302)
            self.send_header("Location", places.get(target, f"/{target}"))
            self.end_headers()
        elif way in bodies:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bodies[way])
        else:
            self.send_error(404)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def pages() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("0.0.0.0", 0), Pages)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(urls=True, max_bytes=100_000, timeout=60, is_allowed=lambda address: address == OUTSIDE)


def test_a_host_that_talks_too_slowly_is_hung_up_on(pages) -> None:
    reader = ImageReader(urls=True, timeout=0.4, is_allowed=lambda address: True)
    start = time.monotonic()
    with pytest.raises(ImageRefused, match="cannot be fetched"):
        reader.open(f"http://{OUTSIDE}:{pages.server_address[1]}/slowly")
    assert time.monotonic() - start < 50  # half of what it would talk


@pytest.mark.parametrize("way", ["/image", "/to/image"])
def test_an_image_is_fetched_also_by_a_redirect(pages, reader: ImageReader, way: str) -> None:
    assert reader.open(f"http://{OUTSIDE}:{pages.server_address[1]}{way}").size == (40, 40)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (INSIDE + ":{}/image", "private address"),
        (OUTSIDE + ":{}/to/inside", "private address"),
        (OUTSIDE + ":{}/to/file", "not a plain http"),
        (OUTSIDE + ":{}/to/again", "redirected more than 3 times"),
        (OUTSIDE + ":{}/nothing", "status 404"),
        (OUTSIDE + ":{}/large", "more than 100,000 bytes"),
        (OUTSIDE + ":{}/text", "not an image"),
        ("me:secret@" + OUTSIDE + ":{}/image", "not a plain http"),
        ("no-such-host.invalid/", "cannot be fetched"),
        (OUTSIDE + ":1/", r"cannot be fetched \(ConnectionRefusedError\)"),
        (OUTSIDE + ":999999/", "cannot be fetched"),
    ],
)
def test_what_may_not_be_fetched_is_refused(pages, reader: ImageReader, place: str, reason: str) -> None:
    pages.seen.clear()
    with pytest.raises(ImageRefused, match=reason):
        reader.open("http://" + place.format(pages.server_address[1]))
    assert len(pages.seen) <= 4


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"]
)
def test_by_default_this_machine_and_its_network_are_private(pages, host: str) -> None:
    pages.seen.clear()
    with pytest.raises(ImageRefused, match="private address"):
        ImageReader(urls=True).open(f"http://{host}:{pages.server_address[1]}/image")
    assert not pages.seen


def test_urls_are_off_unless_they_are_allowed(pages) -> None:
    with pytest.raises(ImageRefused, match="fetches no URLs"):
        ImageReader(is_allowed=lambda address: True).open(f"http://{OUTSIDE}:{pages.server_address[1]}/image")


@pytest.mark.parametrize(
    "address",
    [
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "fc00::1", "fe80::1%eth0"),
    ],
)
def test_addresses_that_only_look_public(address: str) -> None:
    assert not is_public(address)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(pages, monkeypatch) -> None:
    port = pages.server_address[1]
    answers = iter([OUTSIDE, INSIDE, INSIDE])  # a name that leads elsewhere when it is looked up again
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (next(answers), port))])
    checked: list[str] = []
    reader = ImageReader(urls=True, is_allowed=lambda address: not checked.append(address) and address == OUTSIDE)
    pages.seen.clear()
    assert reader.open(f"http://a.name:{port}/image").size == (40, 40)
    assert checked == [OUTSIDE] and pages.seen == ["/image"]


def test_base64_is_read_and_limited() -> None:
    text = base64.b64encode(png()).decode()
    reader = ImageReader(max_bytes=10_000, max_pixels=2000)
    for way in (text, text.rstrip("="), f"data:image/png;base64,{text}", text.replace("+", "-").replace("/", "_")):
        assert reader.open(way).size == (40, 40)
    for wrong, reason in (
        ("A" * 20_000, "more than 10,000 bytes"),
        (base64.b64encode(png(60)).decode(), "more than 2,000 pixels"),
        ("a", "neither base64"),
        ("", "cannot be used"),
    ):
        with pytest.raises(ImageRefused, match=reason):
            reader.open(wrong)
