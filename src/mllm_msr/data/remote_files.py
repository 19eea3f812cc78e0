"""Files at an address that fsspec knows (``s3://``, ``gs://``, ``https://``, ...), brought to this machine.

Whoever has the right to read them says so as those file systems ask, in the environment or their own files.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from mllm_msr.data.parts import is_hidden, is_of_log
from mllm_msr.data.raw import short
from mllm_msr.data.spool import spool_folder
from mllm_msr.records.storage import digest

STAMPS = ("ETag", "etag", "md5Hash", "checksum", "mtime", "LastModified", "last_modified", "created")


def is_remote(place: Path | str) -> bool:
    """Whether a table's place is an address of fsspec; those of the Hub are read by its own client."""
    return re.match(r"[a-z][a-z0-9+.\-]+:/+", str(place)) is not None and not str(place).startswith("hf:")


def without_user(place: str) -> str:
    """An address as it may be shown and kept: without what stands before the host, or after a question mark."""
    return re.sub(r"(?<=//)[^/@]*@", "", place).partition("?")[0]


@cache
def fetch(place: str) -> Path:
    """A copy of a file or folder, among the system's temporary files, made once by this process.

    Raises:
        FileNotFoundError, OSError: it is not there, or cannot be read.
        ValueError: no file system of this kind is installed.
    """
    files, root = _files(place), spool_folder()
    system = files.pop("")
    if "." in files:  # a file
        target = root / _name(place)
        _get(place, system, files["."]["name"], target)
        return target
    for name, facts in files.items():
        if is_of_log(name):  # which names alone show
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        elif not any(map(is_hidden, name.split("/"))):  # nor .., which would lead out of the folder
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            _get(place, system, facts["name"], root / name)
    return root


def remote_fact(place: str) -> list[str]:
    """The address, and what changes when its files do, which are not read for it."""
    files = _files(place)
    files.pop("")
    stamps = [
        [name, facts["size"], *(str(facts[key]) for key in STAMPS if facts.get(key))] for name, facts in files.items()
    ]
    return [without_user(place), digest(*sorted(stamps))]


def _files(place: str) -> dict[str, Any]:
    """The facts of each file by its name below ``place`` (``"."``: that is the file), and as ``""`` the file system."""
    try:
        system, root = fsspec.url_to_fs(place)
        found = system.find(root, detail=True)
        found = {path: facts for path, facts in found.items() if not path.endswith("/")}  # as consoles mark a folder
        found = {path: facts if "size" in facts else system.info(path) for path, facts in found.items()}
    except (ImportError, ValueError) as error:
        raise ValueError(f"{without_user(place)}: cannot be read here ({short(error)})") from error
    except Exception as error:  # of any library behind a file system
        raise _told(without_user(place), error) from error
    if not found:
        raise FileNotFoundError(f"{without_user(place)}: no such file or folder, or an empty one")
    start = root.rstrip("/")
    names = {path: path.removeprefix(start).lstrip("/") or "." for path in found}
    return {"": system, **{names[path]: {**facts, "name": path} for path, facts in found.items()}}


def _get(place: str, system: Any, path: str, target: Path) -> None:
    try:
        system.get_file(path, str(target))
    except Exception as error:
        raise _told(f"{without_user(place)}: {target.name}", error) from error


def _told(what: str, error: Exception) -> OSError:
    """What went wrong and what to do, without the error's own words, which may hold whatever was sent."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what}: no such bucket, file or folder")
    remedy = "check the address, and the credentials and endpoint, which come from the environment (docs/data.md)"
    return OSError(f"{what}: cannot be read ({type(error).__name__}); {remedy}")


def _name(place: str) -> str:
    return without_user(place).rstrip("/").rpartition("/")[2]
