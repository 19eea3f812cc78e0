"""Users of published tables under keyed hashes, the same in every table and release; the key never leaves the run."""

import hashlib
import hmac
import os
import secrets

import polars as pl

from mllm_msr.records.run import RunFolder
from mllm_msr.records.storage import write_bytes

KEY_BYTES = 32
HASH_DIGITS = 20


def user_key(run: RunFolder) -> bytes:
    """The key of this run's user hashes; made once.

    Raises:
        ValueError: the file of the key is no plain file of 32 bytes as hexadecimal digits.
    """
    path = run.user_hash_key
    if not os.path.lexists(path):
        with run.lock(f"mllm-msr publish {run.path}"):
            if not os.path.lexists(path):  # another process may have made it meanwhile
                write_bytes(path, secrets.token_hex(KEY_BYTES).encode(), mode=0o600)
    problem = "is not a plain file"
    if path.is_file() and not path.is_symlink():
        try:
            key = bytes.fromhex(path.read_text(encoding="ascii"))
        except ValueError:
            problem = "is not written in hexadecimal digits"
        else:
            if len(key) == KEY_BYTES and len(set(key)) > 1:
                return key
            problem = f"has {len(key)} bytes, not {KEY_BYTES}" if len(key) != KEY_BYTES else "is one byte over and over"
    raise ValueError(
        f"the key of the user hashes, {path}, {problem}: put back the one that earlier releases were made with, or "
        "remove it if there are none"
    )


def hash_users(frame: pl.DataFrame, key: bytes | None) -> pl.DataFrame:
    """``user_id`` and ``task_id`` (which may name the user) replaced by keyed hashes; as they are without a key."""
    if key is None:
        return frame

    def hashed(value: str) -> str:
        return hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:HASH_DIGITS]

    for column in ("user_id", "task_id"):
        if column in frame.columns:
            names = frame[column].unique()
            hashes = pl.Series([hashed(name) for name in names], dtype=pl.String)
            frame = frame.with_columns(pl.col(column).replace_strict(names, hashes, return_dtype=pl.String))
    return frame
