"""Which commit of a repository is loaded, and errors that say which repository was asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RevisionResolutionError
from safetensors import SafetensorError

OFFLINE = "with HF_HUB_OFFLINE=1 what the cache has of it is used"


def pinned(id_or_path: object, revision: str | None = None, repo_type: str | None = None, **hub: Any) -> str | None:
    """The commit that a revision names at this moment, so that all files of one load are of one commit.

    Offline, or while the Hub does not answer, that is the commit in the cache; the client then warns of it.

    Args:
        id_or_path: a Hub id, or a folder, whose `revision` comes back as it is.
        hub: of the arguments of `from_pretrained`, `token`, `cache_dir` and `local_files_only` count.

    Raises:
        OSError: the Hub has no such repository or revision for this login, even if the cache has what it once had; or
            it does not answer, and the cache has none.
    """
    if id_or_path is None or os.path.exists(str(id_or_path)):
        return revision
    offline = hub.get("local_files_only") or is_offline_mode()
    how = {"repo_type": repo_type, "revision": revision, "cache_dir": hub.get("cache_dir"), "token": hub.get("token")}
    api, at = HfApi(), f"{id_or_path}@{revision}" if revision else id_or_path
    try:
        return api.resolve_revision(str(id_or_path), local_files_only=offline, **how).resolved
    except HFValidationError as error:  # no name that the Hub could have
        raise OSError(f"{at}: there is no such folder, and {' '.join(str(error).split())}") from error
    except (HTTPError, RevisionResolutionError, OSError) as error:
        reason = " ".join(str(error).split())
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status not in (401, 403, 404):
            raise OSError(f"{at}: its commit cannot be asked for ({reason}): {OFFLINE}, or try again") from error
        raise OSError(
            f"{at}: the Hub does not give it to this login ({reason}). Was it renamed, deleted, made private or gated? "
            f"Check the name and log in by `hf auth login`; {OFFLINE}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:  # of a reply that is none
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"{at}: {api.endpoint} answers as no Hub does ({reason}): is a proxy or its login page in between?"
        ) from error


@contextmanager
def naming(id_or_path: object) -> Iterator[None]:
    """Let an OSError from within name what was to be loaded: libraries do not when the Hub cannot be reached.

    What they do not name either becomes one: damaged weights, and a connection that breaks off.
    """
    try:
        yield
    except OSError as error:
        if str(id_or_path) in str(error):
            raise
        raise OSError(f"{id_or_path}: {error}") from error
    except HTTPError as error:
        raise OSError(f"{id_or_path} cannot be fetched from the Hub ({error}): do it again") from error
    except SafetensorError as error:
        raise OSError(f"{id_or_path}: its weights are damaged ({error}): save or download them again") from error
