"""Errors that say which repository was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError


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
