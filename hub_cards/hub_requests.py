"""Requests to the Hub: repeated while that may help, and what it refuses as one sentence that says what to do."""

import email.utils
import random
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from mllm_msr.records.public import hide_secrets

SILENCE = 300  # seconds without a byte, after which a connection counts as lost; the client's own default is never
LONGEST_WAIT = 600  # seconds; a Hub that asks for more is asked again by another command
TRANSIENT = {408, 409, 412, 429}  # beside 5xx; 409 and 412: somebody else changes the repository at this moment
NO_REPLY = (HTTPError, ConnectionError, LocalEntryNotFoundError)  # the last: a download that failed
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # what the client makes of a proxy's own page
FULL = ("quota", "storage limit", "out of storage")
REMEDIES = {
    401: "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN",
    402: "the account's plan does not allow this; see its billing page",
    403: "this login may not write here: use a token with write access, or another --namespace",
    404: "the Hub does not have that, or not for this login: was it deleted meanwhile? Repeating is safe",
    409: "somebody else changes the same at this moment: repeat when that has ended, it is safe",
    413: "the account's storage quota is used up: free some space or buy more, then repeat",
}
T = TypeVar("T")


class InvalidCardError(ValueError):
    """The Hub has read a card and finds it wrong."""


def patiently(api: HfApi, work: Callable[[], T], where: str, tries: int) -> T:
    """Do ``work``, again after a stale head, a 5xx, a lost reply or one that is none; it must be safe to repeat.

    Args:
        where: the repository and what is done with it, for the message.
        tries: at most so many; between them as long as the Hub asks for, or some seconds.

    Raises:
        InvalidCardError: as it comes.
        RuntimeError: the Hub refuses, or goes on failing; the message says where, why, and what to do.
    """
    for attempt in range(tries):
        get_session().timeout = SILENCE
        try:
            return work()
        except InvalidCardError:
            raise
        except LocalTokenNotFoundError as error:
            raise RuntimeError("not logged in to the Hub: run `hf auth login` or set HF_TOKEN") from error
        except (*NO_REPLY, *UNREADABLE, RuntimeError) as error:
            cause = _cause(error)
            if cause is None:
                raise
            asked = _asked_wait(cause)
            if attempt == tries - 1 or not _may_pass(api, cause) or asked > LONGEST_WAIT:
                upload = f"{str(error).rstrip('.')}: " if isinstance(error, RuntimeError) else ""  # names its file
                raise RuntimeError(f"{where}: {upload}{_remedy(api, cause, asked)}") from error
            if asked > 10:
                print(f"{where}: the Hub asks to wait for {asked:.0f} seconds")
            time.sleep(asked or min(2**attempt, 8) * random.uniform(0.75, 1.25))  # so that two publishers part
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception | None:
    """What stopped the work on its way; None of an error that is our own."""
    if isinstance(error, RuntimeError):  # of our own, or of a large file's upload
        return error.__cause__ if isinstance(error.__cause__, (*NO_REPLY, *UNREADABLE)) else None
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HTTPError):
        return error.__cause__
    return error


def _from_storage(api: HfApi, error: HfHubHTTPError) -> bool:
    """Whether the server that large files are sent to has answered, not the Hub."""
    return not str(error.response.url).startswith(api.endpoint)


def _may_pass(api: HfApi, error: Exception) -> bool:
    if not isinstance(error, HfHubHTTPError):
        return not _of_the_token(error)
    status = error.response.status_code
    if status == 403 and _from_storage(api, error):
        return True  # the signed address has expired; the next try is given another
    return status >= 500 or status in TRANSIENT or isinstance(error, RevisionNotFoundError)


def _of_the_token(error: Exception) -> bool:
    """Whether the token has a character that no header may have, such as a line break."""
    return isinstance(error, UnicodeEncodeError) or "Illegal header value" in str(error)


def _asked_wait(error: Exception) -> float:
    """Seconds that the Hub asks to wait for; 0 if it does not."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 503):
        return 0.0
    headers = error.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    if after.isdigit():
        return float(after)
    until, now = (email.utils.parsedate_tz(date) for date in (after, headers.get("Date", "")))
    if until is None:
        return 0.0
    clock = email.utils.mktime_tz(now) if now else time.time()  # the Hub's own: this machine's may be wrong
    return max(0.0, email.utils.mktime_tz(until) - clock)


def _remedy(api: HfApi, error: Exception, asked: float) -> str:
    if isinstance(error, HfHubHTTPError):
        return _answer(api, error, asked)
    if _of_the_token(error):
        return f"{REMEDIES[401]}: it has a character that no token has"
    reason = hide_secrets(" ".join(str(error).split()) or type(error).__name__)[:300]
    if _is_full(reason):
        return f"{REMEDIES[413]} ({reason})"
    if isinstance(error, NO_REPLY):
        return f"the Hub at {api.endpoint} cannot be reached ({reason}); try again, it is safe"
    if type(error) is ValueError:  # in words of the client
        return f"the Hub refused ({reason}); repeating is safe"
    kind = type(error).__name__
    return f"{api.endpoint} answers as no Hub does ({kind}: {reason}): is a proxy or its login page in between?"


def _is_full(reason: str) -> bool:
    return any(word in reason.lower() for word in FULL)


def _answer(api: HfApi, error: HfHubHTTPError, asked: float) -> str:
    status = error.response.status_code
    reason = hide_secrets(" ".join(str(error.server_message or error.response.reason_phrase).split()))[:300]
    if _is_full(reason):
        remedy = REMEDIES[413]
    elif status == 403 and _from_storage(api, error):
        remedy = "the Hub's storage refuses this upload; its signed address may have expired. Repeating is safe"
    elif status == 429:
        remedy = f"the Hub asks to slow down: try again {f'in {asked:.0f} seconds' if asked else 'later'}, it is safe"
    elif isinstance(error, RevisionNotFoundError):
        remedy = REMEDIES[404]
    else:
        remedy = REMEDIES.get(status, "the Hub refused; repeating is safe")
    return f"{remedy} ({status}: {reason})"
