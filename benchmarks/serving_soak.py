"""Minutes of abuse: clients that die in mid-request and a database that hangs up; nothing acknowledged may be lost."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from server_processes import OURS, Server, server
from sqlalchemy import create_engine, text

from mllm_msr.records.run import RunFolder

WRITERS, READERS, DYING = 4, 2, 2  # clients of each kind
BETWEEN_KILLS = 5.0  # seconds
WARMING = 60.0  # seconds before memory is looked at
KEPT_GB = "0.25"  # of users and items, full by then: what grows beyond it leaks


def soak(run: RunFolder, items: list[str], state: Path | str, minutes: float) -> dict[str, Any]:
    """What became of all events, and how memory went.

    Writers append events and repeat each, under its key, until it is acknowledged; each user's history must then be
    what was sent, every event once and in order.
    """
    with server(OURS, run.path, state, "--memory-gb", KEPT_GB) as running:
        found = asyncio.run(_soak(running, items, str(state), 60 * minutes))
        assert running.process.poll() is None, "the server has ended"
    return found


async def _soak(running: Server, items: list[str], state: str, seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    sent: dict[str, list[str]] = {}
    counts = dict.fromkeys(("acknowledged", "repeated", "answers", "refused", "aborted", "database_kills"), 0)
    memory: list[tuple[float, float]] = []
    kill = _killer(state)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(base_url=running.url, timeout=timeout) as session:

        async def post(path: str, body: Any) -> int:
            try:
                async with session.post(path, json=body) as response:
                    await response.read()
                    return response.status
            except (aiohttp.ClientError, TimeoutError):
                return 0

        async def write(number: int) -> None:
            rng = random.Random(number)
            for turn in itertools.count():
                if time.monotonic() > until:
                    return
                user, item = f"writer{number}-{turn // 40}", rng.choice(items)
                history = sent.setdefault(user, [])
                body = {"events": [{"item_id": item, "idempotency_key": f"{user}-{len(history)}"}]}
                history.append(item)
                while await post(f"/v1/users/{user}/events", body) != 200:
                    counts["repeated"] += 1
                    await asyncio.sleep(0.1)
                counts["acknowledged"] += 1
                await asyncio.sleep(0.05)

        async def read(number: int) -> None:
            rng = random.Random(-number)
            while time.monotonic() < until:
                body = {"history": rng.sample(items, 5), "n": 5, "rerank": 20}
                status = await post("/v1/recommendations", body)
                counts["answers" if status == 200 else "refused"] += 1

        async def die(number: int) -> None:
            rng = random.Random(1000 + number)
            parts = urlsplit(running.url)
            while time.monotonic() < until:
                body = json.dumps({"history": rng.sample(items, 5), "n": 5, "rerank": 50}).encode()
                head = ["POST /v1/recommendations HTTP/1.1", "Host: x", "Content-Type: application/json"]
                whole = "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
                await asyncio.sleep(rng.random() / 5)
                writer.transport.abort()
                counts["aborted"] += 1
                await asyncio.sleep(0.2)

        async def hang_up() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(BETWEEN_KILLS)
                await asyncio.to_thread(kill)
                counts["database_kills"] += 1

        async def watch() -> None:
            while time.monotonic() < until:
                memory.append((time.monotonic(), running.memory_mb))
                await asyncio.sleep(1)

        kinds = ((write, WRITERS), (read, READERS), (die, DYING))
        await asyncio.gather(*(kind(n) for kind, count in kinds for n in range(count)), hang_up(), watch())
        wrong = []
        for user, history in sent.items():
            async with session.get(f"/v1/users/{user}") as response:
                if (await response.json()).get("history") != history:
                    wrong.append(user)
    begin = memory[0][0] + min(WARMING, seconds / 4)
    later = [mb for moment, mb in memory if moment >= begin]
    third = max(1, len(later) // 3)
    means = [round(sum(part) / len(part)) for part in (later[:third], later[-third:])]
    figures = {"users": len(sent), "histories_that_differ": len(wrong), "mb_first_third": means[0]}
    return {**counts, **figures, "mb_last_third": means[1], "minutes": round(seconds / 60, 1)}


def _killer(state: str) -> Callable[[], None]:
    """What takes the database away from the server: its connections, or for SQLite the right to write for a second."""
    if "://" not in state:
        engine = create_engine(f"sqlite:///{state}")

        def lock() -> None:
            with engine.connect() as connection:
                raw: Any = connection.connection.driver_connection
                raw.execute("BEGIN IMMEDIATE")
                time.sleep(1)
                raw.rollback()

        return lock
    engine = create_engine(state, isolation_level="AUTOCOMMIT")
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )

    def terminate() -> None:
        with engine.connect() as connection:
            connection.execute(text(others))

    return terminate
