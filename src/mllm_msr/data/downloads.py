"""Images by URL, fetched once into a folder: at preparation, never in training."""

import hashlib
import json
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
GIVE_UP_AFTER = 32  # URLs, if not one image has ever come


@dataclass
class Downloads:
    """A folder of fetched files and a manifest of what became of each URL; interrupted work goes on where it stopped.

    ``manifest.jsonl`` has a line ``{"url", "file", "error", "lasting"}`` an attempt: a file that is there is not
    fetched again, a URL that is gone for good (404 and the like) is not asked again; what failed in passing is.
    """

    folder: Path
    workers: int = 8
    per_second: float = 20.0  # requests, over all workers
    tries: int = 4
    pause: float = 1.0  # seconds before the second try, doubled each time; the server's Retry-After comes first
    timeout: float = 20.0
    max_bytes: int = 20_000_000
    _slot: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def fetch(self, urls: Iterable[str]) -> dict[str, Path | str]:
        """Fetch what is not there yet; returns url -> path of the file, or the reason why there is none.

        Raises ConnectionError if none of the first URLs could be reached and no file is there: this machine is offline.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.jsonl"
        gone = _gone(manifest)
        fetched: dict[str, Path | str] = {}
        missing = []
        for url in dict.fromkeys(urls):
            path = self.folder / hashlib.sha256(url.encode()).hexdigest()[:32]
            if path.is_file():
                fetched[url] = path
            elif url in gone:
                fetched[url] = gone[url]
            else:
                missing.append((url, path))
        if not missing:
            return fetched
        answered = bool(fetched)
        with (
            manifest.open("a", encoding="utf-8") as log,
            ThreadPoolExecutor(self.workers) as pool,
            tqdm(total=len(missing), desc="downloads", unit="file", leave=False) as bar,
        ):
            for part in (missing[:GIVE_UP_AFTER], missing[GIVE_UP_AFTER:]):
                for (url, path), (error, lasting) in zip(part, pool.map(self._fetch, part), strict=True):
                    fetched[url] = error or path
                    line = {"url": url, "file": None if error else path.name, "error": error, "lasting": lasting}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.update()
                    answered = answered or error is None or lasting
                if len(part) == GIVE_UP_AFTER and not answered:
                    raise ConnectionError(
                        f"images: none of the first {len(part)} could be fetched ({error}, {urlsplit(url).hostname}); "
                        "run the same command again where they can be reached, or leave the images out of the catalogue"
                    )
        return fetched

    def _fetch(self, task: tuple[str, Path]) -> tuple[str | None, bool]:
        """Fetch one file; returns (error or None, whether asking again is no use)."""
        url, path = task
        error = ""
        for attempt in range(self.tries):
            wait = self.pause * 2**attempt
            self._take_turn()
            try:
                if not url.lower().startswith(("http://", "https://")):
                    return "no http(s) URL", True
                with urlopen(Request(url, headers={"User-Agent": "mllm-msr"}), timeout=self.timeout) as reply:
                    data = reply.read(self.max_bytes + 1)
                    expected = reply.headers.get("Content-Length")
                if expected is not None and len(data) < min(int(expected), self.max_bytes):
                    raise HTTPException("the reply was cut short")
            except HTTPError as reason:
                error = f"HTTP {reason.code}"
                if reason.code not in TRANSIENT:
                    return error, True
                asked = reason.headers.get("Retry-After", "")
                wait = min(float(asked), 60.0) if asked.isdigit() else wait
            except (OSError, HTTPException) as reason:
                error = f"no connection ({type(reason).__name__})"
            except ValueError:  # an URL that is none, or a header that is no number
                return "bad URL or reply", True
            else:
                if len(data) > self.max_bytes:
                    return f"more than {self.max_bytes:,} bytes", True
                partial = path.with_suffix(".partial")
                partial.write_bytes(data)
                partial.replace(path)
                return None, False
            if attempt + 1 < self.tries:
                time.sleep(wait)
        return error, False

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._slot = max(self._slot + 1 / self.per_second, now)
            delay = self._slot - now
        time.sleep(delay)


def _gone(manifest: Path) -> dict[str, str]:
    gone = {}
    if manifest.is_file():
        for line in manifest.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["lasting"]:
                    gone[row["url"]] = row["error"]
            except (ValueError, TypeError, KeyError):  # the last line of an interrupted run
                continue
    return gone
