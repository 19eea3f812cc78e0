"""What a server keeps of users and items: events, preferences, and the items that clients have put.

Any database that SQLAlchemy knows holds it; SQLite (in WAL mode, synced at every commit) is the default. Whatever a
method returns is committed. Several servers may share one database: a user's events are numbered under a lock on the
user, items under a lock on one counter, and who condenses a history holds a lease on it.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnection

from mllm_msr.modeling.preference import whole_blocks

FORMAT = 1  # of the tables below
ID = String(512)
TABLES = MetaData()
USERS = Table("users", TABLES, Column("user_id", ID, primary_key=True), Column("n_events", Integer, nullable=False))
EVENTS = Table(
    "events",
    TABLES,
    Column("user_id", ID, primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("item_id", ID, nullable=False),
    Column("timestamp", BigInteger),
    Column("key_hash", String(64)),
    Index("events_by_key", "user_id", "key_hash", unique=True),
)
PREFERENCES = Table(
    "preferences",
    TABLES,
    Column("user_id", ID, primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("rests_on", String(64), nullable=False),
    Column("preference", Text, nullable=False),
)
DUE = Table(  # users with a history block that is not condensed yet
    "due",
    TABLES,
    Column("user_id", ID, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("until", Float, nullable=False),
)
FORGOTTEN = Table("forgotten", TABLES, Column("user_hash", String(64), primary_key=True))
ITEMS = Table(
    "items",
    TABLES,
    Column("item_id", ID, primary_key=True),
    Column("version", BigInteger, nullable=False, index=True),
    Column("deleted", Boolean, nullable=False),
    Column("title", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("image", LargeBinary),
    Column("summary", Text, nullable=False),
    Column("vector", LargeBinary),
    Column("made_by", String(64), nullable=False),
    Column("columns", JSON, nullable=False),
)
COUNTERS = Table("counters", TABLES, Column("name", String(32), primary_key=True), Column("value", BigInteger))


class StoreUnavailable(RuntimeError):
    """The database does not answer: the same request may be sent again."""


class KeyReused(ValueError):
    """An idempotency key that another event of the user has."""


@dataclass(frozen=True)
class Event:
    """A user's choice.

    Args:
        item_id: what was chosen.
        timestamp: when, in seconds; kept, and of no influence: histories are in the order in which events arrive.
        key: an event whose key the user has already is not applied again.
    """

    item_id: str
    timestamp: int | None = None
    key: str | None = None


@dataclass(frozen=True)
class Appended:
    """How many events of a request are new, how many were there already, and how many the user has now."""

    added: int
    duplicates: int
    total: int


@dataclass(frozen=True)
class StoredItem:
    """An item that a client has put, or the mark that one is deleted.

    Args:
        image: encoded, as :func:`mllm_msr.data.images.normalise` writes it; read apart, see :meth:`Store.image`.
        vector: (F,) float16 bytes; None without a head.
        made_by: what vectors depend on beside their item.
        columns: further values to filter by.
    """

    item_id: str
    title: str = ""
    text: str = ""
    summary: str = ""
    image: bytes | None = None
    vector: bytes | None = None
    made_by: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    deleted: bool = False
    version: int = 0


@dataclass(frozen=True)
class Claim:
    """The right to condense a user's history until the lease ends."""

    user_id: str
    version: int


def open_store(state: Path | str) -> "Store":
    """The store in an SQLite file, or in the database of a URL such as ``postgresql+psycopg://user@host/name``.

    Raises:
        ValueError: a URL that SQLAlchemy does not know, a database that cannot be reached, or one of another format;
            never with the password of the URL.
    """
    text = str(state)
    if "://" not in text:
        try:
            Path(text).resolve().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--state {text}: its folder cannot be made ({error.strerror}): name another") from error
        text = f"sqlite:///{Path(text).resolve()}"
    try:
        url = make_url(text)
        shown = url.render_as_string(hide_password=True)
    except SQLAlchemyError as error:
        raise ValueError("--state: neither a file nor a database URL such as postgresql+psycopg://host/name") from error
    try:
        return Store(url)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ValueError(f"--state {shown}: its driver is not installed ({error})") from error
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--state {shown}: the database cannot be opened ({cause})") from error


class Store:
    """See the module; make one by :func:`open_store`. Methods may be called from any thread."""

    def __init__(self, url: Any) -> None:
        self.engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=30)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _durable)
        try:
            TABLES.create_all(self.engine)
        except DBAPIError:  # another server has just made them
            TABLES.create_all(self.engine)
        with self.engine.begin() as connection:
            for name, value in (("format", FORMAT), ("items", 0)):
                _lock(connection, COUNTERS, {"name": name}, {"value": value})
            found = connection.execute(select(COUNTERS.c.value).where(COUNTERS.c.name == "format")).scalar_one()
        if found != FORMAT:
            raise ValueError(f"the state has format {found}, this version of mllm-msr has {FORMAT}: name another state")

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except NoConnection as error:
            raise StoreUnavailable("all connections to the database are in use: try again") from error
        except DBAPIError as error:
            if isinstance(error, IntegrityError):
                raise
            raise StoreUnavailable(f"the database did not answer ({type(error.orig).__name__}): try again") from error

    def ping(self) -> None:
        """Raise :class:`StoreUnavailable` unless the database answers."""
        with self._transaction() as connection:
            connection.execute(select(COUNTERS.c.value).where(COUNTERS.c.name == "format"))

    # ---- users -------------------------------------------------------------------------------------------------

    def append(self, user_id: str, events: Sequence[Event], before: int, block_size: int) -> Appended:
        """Append events to a user's history.

        Args:
            before: items of the user's history that are not in the store; with them, a full history block of
                ``block_size`` items makes the user due for condensing.

        Raises:
            KeyReused: a key that another event of the user has, of another item; nothing is appended then.
        """
        hashes = [None if each.key is None else _hash(each.key) for each in events]
        with self._transaction() as connection:
            _lock(connection, USERS, {"user_id": user_id}, {"n_events": 0})
            total = connection.execute(select(USERS.c.n_events).where(USERS.c.user_id == user_id)).scalar_one()
            mine = EVENTS.c.user_id == user_id
            query = select(EVENTS.c.key_hash, EVENTS.c.item_id).where(mine, EVENTS.c.key_hash.in_(filter(None, hashes)))
            known = {key: item for key, item in connection.execute(query)}
            rows: list[dict[str, Any]] = []
            for each, key in zip(events, hashes, strict=True):
                if key is not None and key in known:
                    if known[key] != each.item_id:
                        raise KeyReused(f"the key {each.key!r} is that of another event of this user, of another item")
                    continue
                if key is not None:
                    known[key] = each.item_id
                row = {"user_id": user_id, "place": total + len(rows), "item_id": each.item_id}
                rows.append({**row, "timestamp": each.timestamp, "key_hash": key})
            if rows:
                connection.execute(insert(EVENTS), rows)
                count = total + len(rows)
                connection.execute(update(USERS).where(USERS.c.user_id == user_id).values(n_events=count))
                if whole_blocks(before + count, block_size) > whole_blocks(before + total, block_size):
                    _mark_due(connection, user_id)
            return Appended(len(rows), len(events) - len(rows), total + len(rows))

    def history(self, user_id: str) -> list[str]:
        """The items of the user's events, oldest first."""
        query = select(EVENTS.c.item_id).where(EVENTS.c.user_id == user_id).order_by(EVENTS.c.place)
        with self._transaction() as connection:
            return list(connection.execute(query).scalars())

    def preferences(self, user_id: str) -> dict[int, tuple[str, str]]:
        """By step, what each preference rests on and its text."""
        query = select(PREFERENCES.c.step, PREFERENCES.c.rests_on, PREFERENCES.c.preference)
        with self._transaction() as connection:
            rows = connection.execute(query.where(PREFERENCES.c.user_id == user_id))
            return {step: (rests_on, text) for step, rests_on, text in rows}

    def forget(self, user_id: str, leave_mark: bool) -> bool:
        """Delete everything of a user; whether there was anything.

        ``leave_mark``: keep a hash of the id, so that what a run has of the user is not used either.
        """
        with self._transaction() as connection:
            counts = [
                connection.execute(delete(table).where(table.c.user_id == user_id)).rowcount
                for table in (USERS, DUE, EVENTS, PREFERENCES)
            ]
            if leave_mark:
                _lock(connection, FORGOTTEN, {"user_hash": _hash(user_id)}, {})
            return any(counts)

    def is_forgotten(self, user_id: str) -> bool:
        query = select(FORGOTTEN.c.user_hash).where(FORGOTTEN.c.user_hash == _hash(user_id))
        with self._transaction() as connection:
            return connection.execute(query).first() is not None

    # ---- condensing --------------------------------------------------------------------------------------------

    def claim(self, owner: str, lease: float) -> Claim | None:
        """A user whose history is to be condensed by ``owner`` alone for ``lease`` seconds; None if there is none."""
        with self._transaction() as connection:
            now = time.time()
            query = select(DUE.c.user_id, DUE.c.version, DUE.c.until).where(DUE.c.until < now).order_by(DUE.c.until)
            for user_id, version, until in connection.execute(query.limit(8)).all():
                same = (DUE.c.user_id == user_id) & (DUE.c.until == until)
                taken = connection.execute(update(DUE).where(same).values(owner=owner, until=now + lease))
                if taken.rowcount:
                    return Claim(user_id, version)
        return None

    def renew(self, claim: Claim, owner: str, lease: float) -> bool:
        """Make the lease ``lease`` seconds from now; False if it is another's by now."""
        mine = (DUE.c.user_id == claim.user_id) & (DUE.c.owner == owner)
        with self._transaction() as connection:
            return bool(connection.execute(update(DUE).where(mine).values(until=time.time() + lease)).rowcount)

    def add_preference(self, claim: Claim, owner: str, step: int, rests_on: str, text: str) -> bool:
        """Keep the preference after a history block; False if the lease is another's by now, or the user forgotten."""
        key = {"user_id": claim.user_id, "step": step}
        with self._transaction() as connection:
            mine = (DUE.c.user_id == claim.user_id) & (DUE.c.owner == owner)
            if not connection.execute(update(DUE).where(mine).values(owner=owner)).rowcount:
                return False
            _lock(connection, PREFERENCES, key, {"rests_on": rests_on, "preference": text})
            values = {"rests_on": rests_on, "preference": text}
            connection.execute(update(PREFERENCES).where(_where(PREFERENCES, key)).values(values))
            return True

    def done(self, claim: Claim) -> None:
        """The history is condensed as far as it went when it was claimed; a newer block keeps the user due."""
        same = DUE.c.user_id == claim.user_id
        with self._transaction() as connection:
            if not connection.execute(delete(DUE).where(same, DUE.c.version == claim.version)).rowcount:
                connection.execute(update(DUE).where(same).values(until=0.0))

    def due(self) -> int:
        """How many users have a history block that is not condensed yet."""
        with self._transaction() as connection:
            return connection.execute(select(func.count()).select_from(DUE)).scalar_one()

    # ---- items -------------------------------------------------------------------------------------------------

    def put(self, items: Sequence[StoredItem]) -> None:
        """Put or mark as deleted; each gets a version above all before."""
        with self._transaction() as connection:
            counter = COUNTERS.c.name == "items"
            connection.execute(update(COUNTERS).where(counter).values(value=COUNTERS.c.value + len(items)))
            last = connection.execute(select(COUNTERS.c.value).where(counter)).scalar_one()
            connection.execute(delete(ITEMS).where(ITEMS.c.item_id.in_([item.item_id for item in items])))
            versions = range(last - len(items) + 1, last + 1)
            rows = [{**vars(item), "version": version} for item, version in zip(items, versions, strict=True)]
            connection.execute(insert(ITEMS), rows)

    def items_since(self, version: int) -> list[StoredItem]:
        """Items put or deleted after ``version``, in order, without their images."""
        columns = [column for column in ITEMS.c if column.name != "image"]
        query = select(*columns).where(ITEMS.c.version > version).order_by(ITEMS.c.version)
        with self._transaction() as connection:
            return [StoredItem(**row) for row in connection.execute(query).mappings()]

    def image(self, item_id: str) -> bytes | None:
        """The encoded image of an item."""
        with self._transaction() as connection:
            return connection.execute(select(ITEMS.c.image).where(ITEMS.c.item_id == item_id)).scalar()


def _durable(connection: Any, record: Any) -> None:
    """A commit is on the disk when it returns; readers do not wait for the writer."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=20000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _lock(connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Hold the row of ``key`` until the transaction ends; it is made of ``values`` if it is not there."""
    name = next(iter(key))
    touch = update(table).where(_where(table, key)).values({name: key[name]})
    if connection.execute(touch).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(insert(table).values(**key, **values))
    except IntegrityError:  # another server has just made it
        connection.execute(touch)


def _mark_due(connection: Connection, user_id: str) -> None:
    _lock(connection, DUE, {"user_id": user_id}, {"version": 0, "owner": "", "until": 0.0})
    connection.execute(update(DUE).where(DUE.c.user_id == user_id).values(version=DUE.c.version + 1))


def _where(table: Table, key: Mapping[str, Any]) -> Any:
    return and_(*(table.c[name] == value for name, value in key.items()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
