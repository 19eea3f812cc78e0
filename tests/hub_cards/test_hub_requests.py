"""What the Hub may answer to a release beside doing it: waited for, done again, or told in words that name it."""

import threading
import time
from email.utils import formatdate

import pytest
from hub_server import Handler, Hub
from hub_storage import Refused

from mllm_msr.hub_cards import hub_requests

MODEL, METRIC, SPACE = (
    ("model", "org/mllm-msr-demo"),
    ("space", "org/ranking_metrics"),
    ("space", "org/mllm-msr-demo-app"),
)
RELEASED = ["Release v1", "initial commit"]


def refuse(status: int, message: str = "no", **headers: str):
    """A fault that answers with this status, these words and these headers."""

    def fault() -> None:
        raise Refused(status, message, headers=headers)

    return fault


@pytest.mark.parametrize("route", ["create", "refs", "commit"])
def test_a_page_in_place_of_a_reply_is_no_reply(release, route):
    """Once it passes; what had been done by then is not done twice."""
    with Hub() as hub:
        hub.faults = [(route, "page")]
        release(hub, parts=("metric",))
        assert hub.faults == [] and hub.history(*METRIC) == RELEASED
    with Hub() as hub:
        hub.faults = [(route, "page")] * 20
        if route != "create":  # whose reply says nothing that is not read again
            words = rf"org.*: {hub.url} answers as no Hub does \(JSONDecodeError: .*prox"
            with pytest.raises(RuntimeError, match=words):
                release(hub, parts=("metric",))


def test_the_state_of_a_space_stops_no_release(release, capsys):
    with Hub() as hub:
        hub.faults = [("runtime", "500")]
        release(hub, parts=("space",), public=True, collection=True)
        assert "refs/tags/v1" in hub.repos[SPACE]["refs"] and len(hub.collections) == 1
    assert "warning: whether org/mllm-msr-demo-app runs could not be seen (" in capsys.readouterr().out


def test_what_is_left_after_the_release_is_told_as_that(release):
    with Hub() as hub:
        hub.faults = [("settings", refuse(403, "your organisation shows nothing"))]
        words = r"everything is released; but org/ranking_metrics \(make public\): this login .* shows nothing\); the"
        with pytest.raises(RuntimeError, match=words):
            release(hub, parts=("metric",), public=True)
        assert "refs/tags/v1" in hub.repos[METRIC]["refs"]


def test_a_repository_made_by_somebody_else_meanwhile_is_used_and_one_out_of_sight_is_not(release):
    with Hub() as hub:
        hub.faults = [("create", lambda: hub.create(*METRIC, private=True))]
        release(hub, parts=("metric",))
        assert hub.history(*METRIC) == RELEASED
    with Hub() as hub:
        hub.faults = [("create", "409")]  # without an address
        with pytest.raises(RuntimeError, match="org/ranking_metrics is taken by a space that this login cannot see"):
            release(hub, parts=("metric",))


def test_a_repository_of_another_name_by_now_is_not_written_to(release):
    with Hub() as hub:
        release(hub, parts=("metric",))
        hub.repos["space", "org/renamed"] = hub.repos.pop(METRIC)
        hub.faults = [("info", refuse(307, Location=f"{hub.url}/api/spaces/org/renamed"))]
        with pytest.raises(
            RuntimeError, match="org/ranking_metrics has been renamed org/renamed: name it as before, or"
        ):
            release(hub, parts=("metric",), tag="v2")


def test_a_tag_that_somebody_else_sets_meanwhile_is_not_taken_for_ours(release):
    def set_elsewhere() -> None:
        repo = hub.repos[METRIC]
        repo["refs"]["refs/tags/v1"] = next(sha for sha, commit in repo["commits"].items() if not commit["parent"])

    with Hub() as hub:
        hub.faults = [("tag", set_elsewhere)]
        with pytest.raises(
            RuntimeError, match=r"org/ranking_metrics: tag 'v1' names .*, which somebody else has released"
        ):
            release(hub, parts=("metric",))


def test_another_publisher_that_deletes_the_branch_in_preparation_costs_a_try(release):
    with Hub() as hub:
        hub.faults = [("commit", lambda: hub.repos[METRIC]["refs"].pop("refs/heads/release-in-preparation"))]
        release(hub, parts=("metric",))
        assert hub.history(*METRIC) == RELEASED and "refs/heads/release-in-preparation" not in hub.repos[METRIC]["refs"]


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "37"}, 37, 37),
        ({"Retry-After": "a date"}, 1, 60),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 56, 56),
    ],
)
def test_a_wait_that_the_hub_asks_for_is_kept(release, monkeypatch, capsys, headers, least, most):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    if headers.get("Retry-After") == "a date":  # of now, not of when tests were collected
        headers = {"Retry-After": formatdate(time.time() + 60, usegmt=True)}
    with Hub() as hub:
        hub.faults = [("commit", refuse(429, "slowly", **headers))]
        release(hub, parts=("metric",))
    assert len(waits) == 1 and least <= waits[0] <= most
    assert (
        f"org/ranking_metrics (try commit): the Hub asks to wait for {waits[0]:.0f} seconds" in capsys.readouterr().out
    )


def test_a_date_to_wait_for_is_read_by_the_hub_s_own_clock(release, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(Handler, "date_time_string", lambda self: "Wed, 01 Jan 2031 00:00:00 GMT")
    with Hub() as hub:
        hub.faults = [("commit", refuse(503, "back soon", **{"Retry-After": "Wed, 01 Jan 2031 00:00:37 GMT"}))]
        release(hub, parts=("metric",))
    assert waits == [37]


@pytest.mark.parametrize("route", ["settings", "branch"])
def test_what_a_proxy_answers_for_the_hub_is_done_again_where_no_reply_is_read(release, route):
    """The page comes in place of the Hub's work, not only of its reply."""
    with Hub() as hub:
        hub.faults = [("branch", lambda: None)] * (route == "branch") + [(route, "login")]
        release(hub, parts=("metric",), public=True)
        assert hub.faults == [] and hub.history(*METRIC) == RELEASED and not hub.repos[METRIC]["private"]
        assert [ref for ref in hub.repos[METRIC]["refs"] if "heads" in ref] == ["refs/heads/main"]
    with Hub() as hub:
        hub.faults = [("settings", "login")] * 20
        with pytest.raises(RuntimeError, match=r"everything is released; but .* \(make public\): .*prox"):
            release(hub, parts=("metric",), public=True)


@pytest.mark.parametrize("route", ["refs", "lfs_batch", "create", "commit", "tag"])
def test_a_reply_that_ends_early_is_asked_for_again(release, route):
    with Hub() as hub:
        hub.faults = [(route, "short")]
        release(hub, parts=("model",))
        assert hub.faults == [] and hub.history(*MODEL) == RELEASED


def test_a_wait_of_hours_is_left_to_the_user(release):
    with Hub() as hub:
        hub.faults = [("refs", refuse(429, "slowly", **{"Retry-After": "7200"}))]
        with pytest.raises(
            RuntimeError, match=r"org/ranking_metrics \(open\): the Hub asks to slow down: try again in 7200"
        ):
            release(hub, parts=("metric",))


def test_a_connection_that_falls_silent_is_made_anew(release, monkeypatch):
    monkeypatch.setattr(hub_requests, "SILENCE", 2)
    given_up = threading.Event()
    with Hub() as hub:
        hub.faults = [("refs", lambda: given_up.wait(60)), ("refs", given_up.set)]
        release(hub, parts=("metric",))
        assert hub.faults == [] and hub.history(*METRIC) == RELEASED


def test_an_upload_that_the_storage_refuses_is_asked_for_anew_and_then_names_its_file(release, monkeypatch):
    monkeypatch.setattr(hub_requests, "_from_storage", lambda api, error: "/store" in str(error.response.url))
    expired = ("store", refuse(403, "Request has expired"))
    with Hub() as hub:
        hub.faults = [expired]
        release(hub, parts=("model",))
        assert hub.history(*MODEL) == RELEASED and hub.count("lfs_batch") == 2
    with Hub() as hub:
        hub.faults = [expired] * 20
        words = (
            r"org/mllm-msr-demo \(upload\): .*'model.safetensors'.*: the Hub's storage refuses this .* \(403: Request"
        )
        with pytest.raises(RuntimeError, match=words):
            release(hub, parts=("model",))
