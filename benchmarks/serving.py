"""What serving costs, over real HTTP on loopback, with real server processes; ratios within one run:

    python benchmarks/serving.py RUN ... --seconds 5 --clients 1 8 32 --output benchmarks/serving.json

Each RUN is a finished run, such as `mllm-msr demo --output RUN --interaction late` makes; it is copied first, and stays
as it is. Measured are, of each run, 100 candidates for a known user beside the same code with batching off and beside a
naive server (``server_processes.py``), for users asked about anew and again; the whole of a catalogue of 100,000 items
by the heads, with the best 100 reranked by the answer; how soon an event shows in the recommendations while 50 others
come in a second; and, of the last run, the server's memory with the state of 100,000 users. `cpu_ms` is what the server
computes for a request, whatever else the machine does. `--only PART` measures less. `--soak MINUTES` does
``serving_soak.py`` in place of all that, and `--flood` sends more requests at once than a server takes.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from server_processes import NAIVE, ONE_AT_A_TIME, OURS, THREADS, Server, Took, load, server
from serving_soak import soak

from mllm_msr.evaluation.loading import is_late, load_catalogue
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES, ITEM_VECTORS, ITEMS
from mllm_msr.serving.store import EVENTS, USERS, StoredItem, open_store

CANDIDATES = 100
WARM = 10  # users of the large catalogue who are asked about after each of their events
AGAIN = 32  # users who are asked about again and again
EVENTS_PER_SECOND = 50
PARTS = ("candidates", "catalogue", "users")
FLOOD = 1000  # requests, of which 512 may be in flight


class Log:
    """Users and items of a run, in a seeded order, and what is asked of them."""

    def __init__(self, run: RunFolder) -> None:
        self.users = run.read(INTERACTIONS, ["user_id"])["user_id"].unique(maintain_order=True).to_list()
        self.items = list(load_catalogue(run))
        rng = np.random.default_rng(0)
        self.drawn = [rng.choice(self.items, min(CANDIDATES, len(self.items)), replace=False) for _ in range(500)]

    def scores(self, users: int | None = None) -> Iterator[tuple[str, Any]]:
        """100 candidates for one user after another; for the first few only, they are asked the same again."""
        for number in itertools.count():
            number = number % users if users else number
            yield "/v1/score", {"user_id": self.user(number), "items": self.drawn[number % len(self.drawn)].tolist()}

    def recommendations(self, rerank: int) -> Iterator[tuple[str, Any]]:
        for number in itertools.count():
            yield f"/v1/users/{self.user(number)}/recommendations", {"n": 10, "rerank": rerank}

    def user(self, number: int) -> str:
        return self.users[number % len(self.users)]


def candidates(run: RunFolder, log: Log, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """100 candidates for a known user, of three servers."""
    found: dict[str, Any] = {}
    for kind in (OURS, ONE_AT_A_TIME, NAIVE):
        with server(kind, run.path, folder / f"{kind}.sqlite") as running:
            requests = log.scores()
            for count in options.clients:
                took = load(running, requests, count, options.seconds)
                found[f"{kind}, {count} clients"] = tell(f"{CANDIDATES} candidates, {kind}, {count}", took.figures())
            if kind == OURS:
                for count in options.clients:
                    took = load(running, log.scores(AGAIN), count, options.seconds / 4, warm=AGAIN)
                    found[f"again, {count} clients"] = tell(f"the same again, {kind}, {count}", took.figures())
    most = max(options.clients)
    for kind in (ONE_AT_A_TIME, NAIVE):
        for ours in (OURS, "again"):
            row = {
                figure: round(found[f"{ours}, {most} clients"][figure] / found[f"{kind}, {most} clients"][figure], 2)
                for figure in ("requests_per_s", "cpu_ms")
            }
            found[f"{ours} / {kind}, {most} clients"] = tell(f"{ours} / {kind}, {most}", row)
    return found


def flood(running: Server, log: Log) -> dict[str, Any]:
    """More requests at once than may be in flight: how many are answered, how many are told to come again and when,
    and how soon a request is answered once it is over."""
    counts, waits, requests = Counter[int](), set[str](), log.scores()

    async def ask(session: aiohttp.ClientSession) -> None:
        path, body = next(requests)
        async with session.post(path, json=body, headers={"X-Deadline-Seconds": "20"}) as response:
            await response.read()
            counts[response.status] += 1
            if response.status == 429:
                waits.add(response.headers["Retry-After"])

    async def everyone() -> float:
        options: Any = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=600)}
        async with aiohttp.ClientSession(base_url=running.url, **options) as session:
            await asyncio.gather(*(ask(session) for _ in range(FLOOD)))
            start = time.perf_counter()
            await ask(session)
            return time.perf_counter() - start

    after = asyncio.run(everyone())
    by_status = {str(status): count for status, count in sorted(counts.items())}
    figures = {"requests": FLOOD + 1, **by_status, "retry_after": sorted(waits), "then_ms": round(1e3 * after, 1)}
    return tell(f"a flood of {FLOOD} requests at once", figures)


def put_items(run: RunFolder, state: str, count: int) -> None:
    """Fill a catalogue with copies of the run's items, each with a vector a little beside the original's."""
    items = run.read(ITEMS).join(run.read(ITEM_SUMMARIES, ["item_id", "summary"]), on="item_id").to_dicts()
    vectors = dict(run.read(ITEM_VECTORS, ["item_id", "vector"]).iter_rows())
    originals = np.array([vectors[item["item_id"]] for item in items], dtype=np.float32)
    rng, made_by, store = np.random.default_rng(0), run.key("head"), open_store(state)
    for start in range(0, count, 2000):
        numbers = np.arange(start, min(start + 2000, count))
        noise = rng.normal(0, 0.1, (len(numbers), originals.shape[1])) * originals.std(0)
        made = (originals[numbers % len(items)] + noise).astype(np.float16)
        store.put([copy_of(items[n % len(items)], n, made_by, vector) for n, vector in zip(numbers, made, strict=True)])
    store.close()


def copy_of(item: dict[str, Any], number: int, made_by: str, vector: np.ndarray) -> StoredItem:
    image = (item["image"] or {}).get("bytes")
    title = f"{item['title']} {number}"
    return StoredItem(f"copy{number}", title, item["text"], item["summary"], image, vector.tobytes(), made_by)


def whole_catalogue(running: Server, log: Log, options: argparse.Namespace) -> dict[str, Any]:
    """The best of all items: of users asked about for the first time, after an event of theirs, and by heads alone."""
    found = {}
    for rerank in (CANDIDATES, 0):
        took = load(running, log.recommendations(rerank), 1, options.seconds)
        found[f"rerank {rerank}"] = tell(f"{options.items:,} items, the best {rerank} reranked", took.figures())
    took = asyncio.run(_after_events(running, log, options.seconds))
    found["after an event"] = tell(f"the same for {WARM} users, each after an event", took.figures())
    return found


async def _after_events(running: Server, log: Log, seconds: float) -> Took:
    """What has been kept of the items is of use then, and nothing that was kept of the user."""
    took = Took()
    async with aiohttp.ClientSession(base_url=running.url) as session:

        async def post(path: str, body: Any) -> float:
            start = time.perf_counter()
            async with session.post(path, json=body) as response:
                await response.read()
                assert response.status == 200, await response.text()
            return time.perf_counter() - start

        async def ask(number: int) -> float:
            path, body = (
                f"/v1/users/{log.user(number % WARM)}",
                {"events": [{"item_id": log.items[number % len(log.items)]}]},
            )
            await post(f"{path}/events", body)
            return await post(f"{path}/recommendations", {"n": 10, "rerank": CANDIDATES})

        for number in range(2 * WARM):
            await ask(number)
        until, computed = time.perf_counter() + seconds, running.cpu_seconds
        while time.perf_counter() < until:
            number += 1
            took.each.append(await ask(number))
    took.whole, took.cpu = sum(took.each), running.cpu_seconds - computed
    return took


def freshness(running: Server, log: Log, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from sending an event to holding recommendations that have changed by it, under a stream of others."""
    took: list[float] = []
    sent = itertools.count()

    async def event(session: aiohttp.ClientSession, user: str, item: str) -> None:
        path = f"{running.url}/v1/users/{user}/events"
        async with session.post(path, json={"events": [{"item_id": item}]}) as response:
            assert response.status == 200, await response.text()

    async def stream(session: aiohttp.ClientSession, until: float) -> None:
        start, tasks = time.perf_counter(), []
        for number in itertools.count():
            due = start + number / EVENTS_PER_SECOND
            if due > until:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            user = f"new{number % 5000}"
            tasks.append(asyncio.create_task(event(session, user, log.items[next(sent) % len(log.items)])))
        await asyncio.gather(*tasks)

    async def best(session: aiohttp.ClientSession, user: str) -> list[str]:
        path, body = f"{running.url}/v1/users/{user}/recommendations", {"n": 10, "rerank": CANDIDATES}
        async with session.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            return [result["item_id"] for result in (await response.json())["results"]]

    async def probe(session: aiohttp.ClientSession, until: float) -> None:
        for number in itertools.count():
            user = log.user(number)
            before = await best(session, user)
            if time.perf_counter() > until:
                return
            start = time.perf_counter()
            await event(session, user, before[0])
            while await best(session, user) == before:
                pass
            took.append(time.perf_counter() - start)

    async def both() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await best(session, log.user(0))
            until = time.perf_counter() + options.seconds
            await asyncio.gather(stream(session, until), probe(session, until))

    asyncio.run(both())
    p50, most = statistics.median(took), max(took)
    figures = {"probes": len(took), "p50_s": round(p50, 3), "longest_s": round(most, 3), "events": next(sent)}
    return tell(f"event to changed recommendation at {EVENTS_PER_SECOND} events/s", figures)


def users_in_state(run: RunFolder, log: Log, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The server's memory while it answers for users of a state of many."""
    found = {}
    for count in (1000, options.users):
        state = str(folder / f"users{count}.sqlite")
        store = open_store(state)
        names = [f"many{number}" for number in range(count)]
        rng = np.random.default_rng(0)
        chosen = rng.integers(0, len(log.items), (count, 2))
        with store.engine.begin() as connection:
            connection.execute(USERS.insert(), [{"user_id": name, "n_events": 2} for name in names])
            events = [
                {"user_id": name, "place": place, "item_id": log.items[item]}
                for name, row in zip(names, chosen, strict=True)
                for place, item in enumerate(row)
            ]
            connection.execute(EVENTS.insert(), events)
        store.close()
        with server(OURS, run.path, state) as running:
            order = rng.permutation(count)

            def requests(order: np.ndarray = order, names: list[str] = names) -> Iterator[tuple[str, Any]]:
                for number in itertools.cycle(order):
                    yield f"/v1/users/{names[number]}/recommendations", {"n": 10, "rerank": 0}

            asked = requests()
            load(running, asked, 8, 3)
            before = running.memory_mb
            took = load(running, asked, 8, options.seconds)
            figures = {"mb_after_warming": round(before), "mb_after": round(running.memory_mb)}
            found[f"{count} users"] = tell(f"{count:,} users", {**figures, "requests": len(took.each)})
    return found


def measure(run: RunFolder, folder: Path, options: argparse.Namespace, last: bool) -> dict[str, Any]:
    """What is asked for of a run."""
    log, found = Log(run), dict[str, Any]()
    if options.soak:
        return {"soak": tell("soak", soak(run, log.items, options.state or folder / "soak.sqlite", options.soak))}
    if options.flood:
        with server(OURS, run.path, folder / "flood.sqlite") as running:
            return {"flood": flood(running, log)}
    if "candidates" in options.only:
        found["candidates"] = candidates(run, log, folder, options)
    if "catalogue" in options.only:
        state = str(folder / "items.sqlite")
        put_items(run, state, options.items)
        with server(OURS, run.path, state) as running:
            found["catalogue"] = whole_catalogue(running, log, options)
            found["freshness, large catalogue"] = freshness(running, log, options)
    if "users" in options.only and last:
        found["users"] = users_in_state(run, log, folder, options)
    return found


def tell(name: str, figures: Any) -> Any:
    print(f"  {name:<60} {json.dumps(figures)}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="of the measurements")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (20)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--items", type=int, default=100_000, help="of the large catalogue (100,000)")
    parser.add_argument("--users", type=int, default=100_000, help="of the large state (100,000)")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="in place of all measurements")
    parser.add_argument("--flood", action="store_true", help="in place of all measurements")
    parser.add_argument("--state", help="database URL for --soak (default: an SQLite file)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "threads": THREADS["OMP_NUM_THREADS"]}
    for path in options.runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(path, folder / "run", ignore=shutil.ignore_patterns("late_items", "state.sqlite*"))
            run = RunFolder.open(folder / "run")
            kind = "late" if is_late(run) else "joint"
            print(f"{path}, {kind}", flush=True)
            results[path.name] = {"interaction": kind, **measure(run, folder, options, last=path == options.runs[-1])}
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
