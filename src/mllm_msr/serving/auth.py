"""Who may call: bearer keys, those that may read apart from those that may write."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Access = Literal["read", "write"]
SHORTEST = 16  # characters of a key
VARIABLES: dict[Access, str] = {"read": "MLLM_MSR_READ_KEYS", "write": "MLLM_MSR_WRITE_KEYS"}


@dataclass(frozen=True)
class Keys:
    """Hashes of keys; one that may write may read as well. Without any key everyone may do everything."""

    read: Sequence[bytes] = ()
    write: Sequence[bytes] = ()

    @property
    def given(self) -> bool:
        return bool(self.read or self.write)

    def allows(self, header: str | None, access: Access) -> bool | None:
        """Whether the header ``Authorization`` gives an access; None if it holds no key that is known.

        Every key is compared in whole, so that the time taken says nothing of how much of a key was right.
        """
        if not self.given:
            return True
        scheme, _, key = (header or "").partition(" ")
        given = _hash(key.strip()) if scheme.lower() == "bearer" else b""
        reads = [hmac.compare_digest(given, known) for known in self.read]
        writes = [hmac.compare_digest(given, known) for known in self.write]
        if not any(reads + writes):
            return None
        return access == "read" or any(writes)


def read_keys(path: Path | None) -> Keys:
    """The keys of a file, each on a line as ``read KEY`` or ``write KEY``, and those of the environment.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line of another form, or a key of less than 16 characters; never with the key.
    """
    found: dict[Access, list[str]] = {"read": [], "write": []}
    for access, variable in VARIABLES.items():
        found[access] += [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
        if any(len(key) < SHORTEST for key in found[access]):
            raise ValueError(
                f"{variable}: a key has less than {SHORTEST} characters: make one by `openssl rand -hex 24`"
            )
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"--keys {path}: there is no such file")
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            name, _, key = line.strip().partition(" ")
            if not line.strip() or line.startswith("#"):
                continue
            if name not in VARIABLES or len(key.strip()) < SHORTEST:
                raise ValueError(
                    f"--keys {path}, line {number}: is not `read KEY` or `write KEY` with a key of {SHORTEST} "
                    "characters or more"
                )
            found["write" if name == "write" else "read"].append(key.strip())
        if not any(found.values()):
            raise ValueError(f"--keys {path}: holds no key")
    return Keys(*([_hash(key) for key in found[access]] for access in ("read", "write")))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
