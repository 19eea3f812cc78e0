"""Publishing over real HTTP: whole or absent whatever fails, nothing twice, and no token where it must not be."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hub_run import SECRETS, change_recipe
from hub_server import Hub
from hub_storage import OTHER, READ, WRITE

MODEL, DATA, METRIC, SPACE = (
    ("model", "org/mllm-msr-demo"),
    ("dataset", "org/mllm-msr-demo-data"),
    ("space", "org/ranking_metrics"),
    ("space", "org/mllm-msr-demo-app"),
)
ALL = (MODEL, DATA, METRIC, SPACE)
FOLDERS = {MODEL: "model", DATA: "dataset", METRIC: "ranking_metrics", SPACE: "space"}
SERVED: tuple = ("commit", lambda: None)  # no fault: this one is let through
COMMIT_TITLES = ["Release v1", "initial commit"]


def assert_whole(hub: Hub, send, titles=COMMIT_TITLES, repositories=ALL) -> None:
    """Every repository equals its folder, in one commit that bears the tag; and no token went astray."""
    for repository in repositories:
        assert visible(hub, repository, "v1") == built(send, repository)
        assert hub.history(*repository) == titles
        refs = hub.repos[repository]["refs"]
        assert refs["refs/heads/main"] == refs["refs/tags/v1"]
        assert [ref for ref in refs if ref.startswith("refs/heads/")] == ["refs/heads/main"]
    assert hub.leaks == []


def visible(hub: Hub, repository: tuple[str, str], revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.files(*repository, revision).items() if path != ".gitattributes"}


def built(send, repository: tuple[str, str]) -> dict[str, bytes]:
    folder = send.run.hub / FOLDERS[repository]
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_one_commit_a_repository_and_repeating_it_sends_nothing(release):
    with Hub() as hub:
        commits = release(hub, collection=True)
        assert_whole(hub, release)
        assert all(hub.repos[repository]["private"] for repository in ALL)
        (collection,) = hub.collections.values()
        assert collection["private"] and {(item["type"], item["id"]) for item in collection["items"]} == set(ALL)
        sent = Counter(route for route, _, _ in hub.log)
        assert release(hub, collection=True) == commits
        again = Counter(route for route, _, _ in hub.log)
        assert [again[name] - sent[name] for name in ("commit", "store", "preupload", "tag")] == [0, 0, 0, 0]
        assert len(collection["items"]) == 4 and len(hub.collections) == 1


def test_only_what_is_named_goes_and_only_on_request_is_it_public(release):
    with Hub() as hub:
        release(hub, parts=("model",), public=True)
        assert list(hub.repos) == [MODEL]
        assert not hub.repos[MODEL]["private"]
        release(hub, parts=("dataset",))
        assert hub.repos[DATA]["private"]


def test_a_changed_run_is_a_second_commit_of_what_has_changed(release):
    with Hub() as hub:
        release(hub, parts=("model",))
        stored = hub.count("store")
        (release.run.model / "chat_template.jinja").unlink()
        release.change("tokenizer.json", '{"version": 2}')
        with pytest.raises(RuntimeError, match=r"tag 'v1' already names another release, .*: choose a new --tag"):
            release(hub, parts=("model",))
        assert hub.history(*MODEL) == COMMIT_TITLES
        release(hub, parts=("model",), tag="v2")
        assert hub.history(*MODEL) == ["Release v2", *COMMIT_TITLES]
        assert hub.count("store") == stored  # the weights were there
        assert "chat_template.jinja" not in hub.files(*MODEL)
        assert "chat_template.jinja" in hub.files(*MODEL, "v1")


@pytest.mark.parametrize(
    "faults",
    [
        [("commit", "503")] * 3,
        [("commit", "lose")] * 2,
        [("create", "lose"), ("create", "500"), ("info", "502"), ("tree", "503")],
        [("store", "cut")] * 2 + [("store", "lose"), ("lfs_batch", "503"), ("preupload", "503")],
        [("tag", "lose"), ("tag", "503"), ("settings", "lose"), ("collections", "lose"), ("collection", "503")],
    ],
    ids=lambda faults: " ".join(dict.fromkeys(f"{route} {action}" for route, action in faults)),
)
def test_whatever_fails_on_the_way_the_release_is_whole_and_single(release, faults):
    with Hub() as hub:
        hub.faults = list(faults)
        release(hub, public=True, collection=True)
        assert hub.faults == []
        assert_whole(hub, release)
        assert len(hub.collections) == 1 and not any(repo["private"] for repo in hub.repos.values())


def test_a_head_that_moves_meanwhile_is_read_again(release):
    with Hub() as hub:
        hub.faults = [SERVED] * 4 + [("commit", lambda: hub.push(*DATA, "notes.txt", b"in between"))]
        release(hub)
        assert Counter(status for route, _, status in hub.log if route == "commit") == {412: 1, 200: 8}
        assert_whole(hub, release, ["Release v1", "by somebody else", "initial commit"], [DATA])
        assert_whole(hub, release, repositories=[MODEL, METRIC, SPACE])


def test_what_gives_up_between_repositories_shows_no_release_and_is_completed_later(release):
    with Hub() as hub:
        hub.faults = [SERVED] * 4 + [("commit", "lose"), *[("commit", "503")] * 9]
        with pytest.raises(RuntimeError, match="the Hub refused; repeating is safe"):
            release(hub, tries=4, public=True)
        assert hub.history(*DATA) == COMMIT_TITLES  # its reply was lost; yet it is not public, and nothing has the tag
        assert all(repo["private"] and not any("tags" in ref for ref in repo["refs"]) for repo in hub.repos.values())
        hub.faults = []
        release(hub, public=True)
        assert_whole(hub, release)


def test_no_main_branch_moves_before_every_commit_has_been_tried(release):
    """A public release follows another; its second trial is refused, and then all goes well."""
    with Hub() as hub:
        release(hub, tag="v0", public=True)
        before = {repository: visible(hub, repository) for repository in ALL}
        release.change("tokenizer.json", '{"version": 2}')
        hub.faults = [SERVED, ("commit", "403 Private repository storage limit reached")]
        with pytest.raises(RuntimeError, match="storage quota is used up"):
            release(hub)
        assert {repository: visible(hub, repository) for repository in ALL} == before
        assert not any("refs/tags/v1" in repo["refs"] for repo in hub.repos.values())
        start = len(hub.log)
        release(hub)
        assert_whole(hub, release, ["Release v1", "Release v0", "initial commit"], [MODEL, DATA, SPACE])
        assert visible(hub, METRIC, "v1") == before[METRIC]  # nothing of it has changed: a tag, and no commit
        log = [(route, path) for route, path, _ in hub.log[start:]]
        moved = [place for place, (route, path) in enumerate(log) if route == "commit" and "/commit/main" in path]
        tried = [place for place, (route, path) in enumerate(log) if route == "commit" and "/commit/main" not in path]
        assert len(moved) == len(tried) == 3 and max(tried) < min(moved)
        last = max(place for place, (route, _) in enumerate(log) if route == "tag")
        assert {route for route, _ in log[min(moved) : last]} <= {"info", "tree", "validate", "commit", "refs", "tag"}


def test_a_commit_that_does_not_hold_what_was_sent_moves_nothing(release):
    with Hub() as hub:

        def lose_a_file():
            (tried,) = (
                repo["refs"][ref] for repo in hub.repos.values() for ref in repo["refs"] if "preparation" in ref
            )
            hub.repos[DATA]["commits"][tried]["files"].pop("recipe.yaml")

        hub.faults = [("tree", lambda: None)] * 9 + [
            ("tree", lose_a_file)
        ]  # the tree of the first commit that is tried
        with pytest.raises(RuntimeError, match="has made other files of org/mllm-msr-demo-data than were sent"):
            release(hub)
        assert hub.faults == [] and all(hub.history(*repository) == ["initial commit"] for repository in ALL)
        release(hub)
        assert_whole(hub, release)


def test_a_space_that_started_before_its_model_was_there_is_started_again(release):
    with Hub() as hub:
        release(hub)
        for stage, then in (("RUNTIME_ERROR", "BUILDING"), ("RUNNING", "RUNNING")):
            hub.repos[SPACE]["stage"] = stage
            release(hub)
            assert hub.repos[SPACE]["stage"] == then


def test_public_does_not_open_the_histories_of_a_source_that_forbids_it(release, capsys):
    release.run = change_recipe(release.run, source={"type": "movielens"})
    with Hub() as hub:
        release(hub, public=True, collection=True)
        assert {name for name, repo in hub.repos.items() if repo["private"]} == {DATA, SPACE}
    output = capsys.readouterr().out
    assert "dataset org/mllm-msr-demo-data (private)" in output and "model org/mllm-msr-demo (public)" in output
    assert "warning: dataset and space stay private: they show histories of MovieLens" in output


@pytest.mark.parametrize(("route", "number"), [("store", 2), ("commit", 2), ("commit", 5), ("tag", 2)])
def test_killed_and_started_again_the_release_is_whole(release, tmp_path, route, number):
    """That request of the route kills the client in its midst; but for the uploads, with a public release before it."""
    script = (
        "from mllm_msr.hub_cards.release import PublishOptions, publish\nfrom mllm_msr.records.run import RunFolder\n"
        "import pathlib, sys; publish(RunFolder.open(pathlib.Path(sys.argv[1])), PublishOptions('org', tag='v1'))"
    )
    environment = {"HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    with Hub() as hub:
        before = {}
        if route != "store":
            release(hub, tag="v0", public=True)
            before = {repository: visible(hub, repository) for repository in ALL}
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(release.run.path)],
            env={**os.environ, **environment, "HF_ENDPOINT": hub.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        kill = (route, lambda: (process.send_signal(signal.SIGKILL), process.wait()))
        hub.faults = [(route, lambda: None)] * (number - 1) + [kill]
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL and hub.faults == []
        tagged = [name for name, repo in hub.repos.items() if "refs/tags/v1" in repo["refs"]]
        assert MODEL not in tagged and (route == "tag" or not tagged)  # the model's is the last
        now = {repository: visible(hub, repository) for repository in before}
        new = [repository for repository in before if now[repository] != before[repository]]
        assert all(now[repository] == built(release, repository) for repository in new)  # each whole, at any moment
        assert bool(new) == (number > 2 or route == "tag")
        release(hub)
        titles = ["Release v1", *(["Release v0"] if before else []), "initial commit"]
        assert_whole(hub, release, titles, [MODEL, DATA, SPACE])
        assert visible(hub, METRIC, "v1") == built(release, METRIC)
        assert WRITE.encode() not in output
    left = [path for place in (tmp_path, release.run.path) for path in place.rglob("*") if path.is_file()]
    assert left and not [path for path in left if WRITE.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("options", "faults", "message"),
    [
        ({"token": None}, [], "not logged in to the Hub: run `hf auth login` or set HF_TOKEN"),
        ({"token": "hf_unknown"}, [], "does not accept the token: run `hf auth login`"),
        ({"token": "hf_\n"}, [], "does not accept the token: .* it has a character that no token has"),
        ({"token": "hf_ü"}, [], "does not accept the token: .* it has a character that no token has"),
        ({"token": READ}, [], "may only read: make one with write access"),
        ({"token": OTHER}, [], "'mallory' may not write to 'org': choose --namespace among mallory"),
        ({}, [("create", "403 no")], r"org/mllm-msr-demo-data \(open\): this login may not write here: use a token"),
        ({}, [("lfs_batch", "403 Private repository storage limit reached")], "storage quota is used up"),
        ({}, [("store", "413")], "storage quota is used up"),
        ({}, [("info", "429")] * 9, "asks to slow down: try again later"),
    ],
)
def test_what_the_hub_refuses_is_output_with_its_remedy(release, options, faults, message):
    with Hub() as hub:
        hub.faults = list(faults)
        with pytest.raises(RuntimeError, match=message):
            release(hub, **options)
        assert hub.count("commit") == 0 and hub.leaks == []


def test_a_repository_of_something_else_is_not_overwritten(release):
    with Hub() as hub:
        hub.create("model", MODEL[1], private=True)
        hub.push(*MODEL, "thesis.txt", b"the only copy")
        with pytest.raises(RuntimeError, match="the name org/mllm-msr-demo is taken by a model that is no release"):
            release(hub)
        assert hub.files(*MODEL)["thesis.txt"] == b"the only copy" and hub.count("commit") == 0


def test_a_card_the_hub_finds_invalid_stops_the_release_before_anything_is_sent(release):
    with Hub() as hub:
        hub.faults = [("validate", lambda: None), ("validate", "400")]
        with pytest.raises(ValueError, match="the Hub finds the card of org/ranking_metrics invalid"):
            release(hub)
        assert hub.repos == {} and hub.count("store") == 0


def test_pull_requests_are_proposed_once_and_change_nothing_else(release):
    with Hub() as hub:
        release(hub)
        release.change("tokenizer.json", '{"version": 2}')
        hub.faults = [("commit", "lose")]
        for _ in range(2):
            release(hub, create_pr=True, tag="v2")
        assert [pull["title"] for pull in hub.repos[MODEL]["pulls"]] == ["Release v2"]
        assert hub.history(*MODEL) == COMMIT_TITLES
        assert b'"version": 2' in hub.files(*MODEL, "refs/pr/1")["tokenizer.json"]
        assert not any("refs/tags/v2" in repo["refs"] for repo in hub.repos.values())


def test_the_folders_carry_no_secret_of_the_machine(release):
    with Hub() as hub:
        release(hub)
        sent = [content for repository in ALL for content in hub.files(*repository).values()]
    assert not [secret for secret in SECRETS if any(secret.encode() in content for content in sent)]
    assert json.loads((release.run.hub / "space/space.json").read_text())["revision"] == "v1"
    assert not list(Path(release.run.path).rglob("*.partial"))
