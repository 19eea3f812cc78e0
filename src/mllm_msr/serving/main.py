"""`mllm-msr serve`: open a run, and answer over HTTP until told to stop."""

import ctypes
import ipaddress
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mllm_msr.serving.auth import Keys, read_keys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX, KEPT = -1, -3, -8, 2**30  # of glibc's malloc.h; bytes
NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client")


@dataclass(frozen=True)
class ServeOptions:
    """How a run is served.

    Args:
        source: folder of a run; or a released model, as a folder or ``owner/name@revision`` on the Hub.
        dataset: of a released model, if not the one that belongs to it.
        host, port: to listen on; port 0 is any that is free.
        device: of the model; None: an accelerator if there is one.
        state: SQLite file or database URL; None: ``state.sqlite`` in the run's folder, or in this one for a release.
        keys: file of bearer keys; those of the environment count as well.
        open_to_all: listen beyond this machine without any key.
        image_urls: fetch images by URL.
        item_columns: file with further columns of items, to filter by.
        deadline: seconds until a request is given up.
        max_body_mb: of a request.
        memory_gb: that the model may keep of items and users.
        compile: how ``torch.compile`` makes the answers of small requests to a late model; None: not at all.
        log_texts: log paths with their ids, and what errors say.
    """

    source: str
    dataset: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    device: str | None = None
    state: str | None = None
    keys: Path | None = None
    open_to_all: bool = False
    image_urls: bool = False
    item_columns: Path | None = None
    deadline: float = 30.0
    max_body_mb: float = 32.0
    memory_gb: float | None = None
    compile: str | None = None
    log_texts: bool = False


def serve(options: ServeOptions) -> None:
    """Serve until a signal ends it; what has begun is finished first.

    Raises:
        ValueError, FileNotFoundError: something that is asked for cannot be had; before anything is loaded, if it can
            be told.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"{missing[0]} is not installed: `pip install 'mllm-msr[serve]'`")
    keys = read_keys(options.keys)
    check_exposure(options.host, keys, options.open_to_all)
    listener = listen(options.host, options.port)
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in a log
    keep_freed_memory()
    start_log()
    import uvicorn

    from mllm_msr.evaluation.loading import Computing
    from mllm_msr.records.run import RunFolder
    from mllm_msr.serving.app import create_app
    from mllm_msr.serving.door import Limits
    from mllm_msr.serving.images import ImageReader
    from mllm_msr.serving.opening import open_run
    from mllm_msr.serving.released import is_release, open_release
    from mllm_msr.serving.service import Service
    from mllm_msr.serving.store import open_store

    how = Computing(device=options.device, memory_gb=options.memory_gb, compile=options.compile)
    run = Path(options.source)
    released = not (run / "config.yaml").is_file() and is_release(options.source)
    if not released:
        RunFolder.open(run)  # or an error, before anything is made
    store = open_store(options.state or (Path() if released else run) / "state.sqlite")
    if released:
        opened = open_release(options.source, options.dataset, how, options.item_columns)
    else:
        opened = open_run(run, how, options.item_columns)
    limits = Limits(int(options.max_body_mb * 1e6), deadline=options.deadline)
    app = create_app(Service(opened, store), keys, limits, ImageReader(options.image_urls), options.log_texts)
    host, port = listener.getsockname()[:2]
    print(f"{opened.name} {opened.revision}: http://{host}:{port}/docs", flush=True)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=int(options.deadline) + 5,
    )
    uvicorn.Server(config).run(sockets=[listener])


def keep_freed_memory() -> None:
    """Let what a forward frees be there for the next. By default glibc hands large pieces back to the system each time,
    which clears them, page by page, when they are asked for again."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        if mallopt(M_MMAP_THRESHOLD, KEPT):
            mallopt(M_TRIM_THRESHOLD, KEPT)
            mallopt(M_ARENA_MAX, 1)


def start_log() -> None:
    """Our own log and the web server's, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for name in ("mllm_msr", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)


def check_exposure(host: str, keys: Keys, open_to_all: bool) -> None:
    """Raise ValueError if others than this machine could write without a key."""
    if keys.given or open_to_all:
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise ValueError(
            f"--host {host} lets other machines in: give keys by --keys FILE or MLLM_MSR_WRITE_KEYS, or say "
            "--open-to-all if something in front of the server checks who may call"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError if the port cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # named as TCP, or asyncio leaves Nagle's algorithm on for what is accepted: 40 ms a reply
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--host {host} --port {port}: cannot be used ({reason}): name another port") from error
