"""Send a run to the Hub: one commit a repository, and the tag, which marks the release, once all commits are in.

The Hub changes one repository at a time. So everything large is uploaded first, and every commit is tried on a branch
that nobody reads and compared with its folder; only when all are accepted do the main branches move, one short request
each. New repositories are private until the last tag is set. A release that was interrupted anywhere is not to be seen
by whoever pins the tag, and repeating the command completes it.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, SpaceStage, get_session
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from mllm_msr.hub_cards.cards import TAGS
from mllm_msr.hub_cards.facts import Release, RunFacts, has_head
from mllm_msr.hub_cards.hub_requests import NO_REPLY, UNREADABLE, InvalidCardError, patiently
from mllm_msr.hub_cards.publishing import ALL_CONTENTS, FOLDERS, Contents, Part, built
from mllm_msr.hub_cards.spaces import SPACE_SDKS
from mllm_msr.hub_cards.terms import kept_private, warnings
from mllm_msr.records.public import hide_secrets
from mllm_msr.records.run import RunFolder

REPO_TYPES: dict[Part, str] = {"dataset": "dataset", "metric": "space", "space": "space", "model": "model"}
MADE_BY_THE_HUB = {".gitattributes", "README.md"}  # in a repository that nobody has used yet
STAGE = "release-in-preparation"  # the branch on which a commit is tried
T = TypeVar("T")


@dataclass(frozen=True)
class PublishOptions:
    """What a release is to be.

    Args:
        namespace: user or organisation on the Hub.
        tag: names the release in every repository.
        parts: of "model", "dataset", "metric" and "space"; all if empty.
        contents: of the data set.
        dry_run: show what would be sent, and send nothing.
        collection: also gather the repositories in a collection named for the run and the tag.
        public: make the repositories public, once all are whole, but for those whose source forbids it; new ones are
            private otherwise.
        create_pr: propose the changes as one pull request a repository, with neither tags nor collection.
    """

    namespace: str
    tag: str | None = None
    parts: tuple[Part, ...] = ()
    contents: Contents = ALL_CONTENTS
    dry_run: bool = False
    collection: bool = False
    public: bool = False
    create_pr: bool = False


@dataclass
class Repository:
    """One repository of a release, and the folder that it shall be."""

    part: Part
    repo_id: str
    folder: Path

    def __post_init__(self) -> None:
        self.repo_type: Any = REPO_TYPES[self.part]
        self.name: dict[str, Any] = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        self.files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.revision = "main"
        RepoCard.load(self.folder / "README.md")  # ValueError unless its front matter is YAML

    @cached_property
    def additions(self) -> list[CommitOperationAdd]:
        """Every file, hashed once; the client notes on them what it has uploaded."""
        return [CommitOperationAdd(self.path(file), str(file)) for file in self.files]

    def path(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def publish(run: RunFolder, options: PublishOptions, api: HfApi | None = None, tries: int = 6) -> dict[Part, str]:
    """Show what a release would send and, unless it is a dry run, send it; return each repository's commit, by part.

    Unchanged files are not sent again, files that the release no longer has are deleted, a head that moves meanwhile
    is read again, and repeating after any failure is safe. Credentials come from the environment or the Hub login.

    Raises:
        FileNotFoundError: a stage has not been done yet.
        RuntimeError: the Hub refuses; the message has the remedy.
        ValueError: the run is not as its last report found it, a name or tag is none, or the Hub finds a card invalid;
            nothing has been sent then.
    """
    release = Release.of(run.recipe, options.namespace, options.tag)
    head = ("head",) if has_head(run) else ()
    for stage in ("report", "train", *head):  # all that is published, and that the report is about
        run.require(stage, thoroughly=True)
    with built(run, options.parts or tuple(FOLDERS), release, options.contents) as folders:
        repositories = [Repository(part, getattr(release, part), folder) for part, folder in folders.items()]
        return _publish(run, options, repositories, api or HfApi(), tries)


def _publish(
    run: RunFolder, options: PublishOptions, repositories: list[Repository], api: HfApi, tries: int
) -> dict[Part, str]:
    facts, create_pr, tag = RunFacts.read(run), options.create_pr, options.tag
    closed = kept_private(facts)
    opened = [repository for repository in repositories if options.public and repository.part not in closed]
    for repository in repositories:
        _show(repository, repository in opened)
    for warning in warnings(facts, options.public):
        print(f"warning: {warning}")
    if options.dry_run:
        print("dry run: nothing was sent")
        return {}

    def each(work: Callable[..., T], *arguments: Any, of: list[Repository] = repositories) -> list[T]:
        """``work`` on one repository after the other."""
        step = work.__name__.strip("_").replace("_", " ")
        return [
            patiently(api, partial(work, api, repository, *arguments), f"{repository.repo_id} ({step})", tries)
            for repository in of
        ]

    patiently(api, partial(_check_login, api, options.namespace, create_pr), options.namespace, tries)
    each(_check_card)
    each(_open, tag, create_pr)
    each(_upload, create_pr)
    title = f"Release {tag}" if tag else "Release"
    if not create_pr:
        each(_try_commit, title)
    oids = each(_commit, title, create_pr)
    commits = {repository.part: oid for repository, oid in zip(repositories, oids, strict=True)}
    if not create_pr:
        for repository in repositories if tag else ():
            each(_tag, commits[repository.part], tag, of=[repository])
        try:
            each(_make_public, of=opened)
            each(_wake, of=[repository for repository in repositories if repository.part == "space"])
            if options.collection:
                name = f"{' '.join(run.recipe.name.split())[:40]} {tag or ''}".strip()[:59]
                collect = partial(_collect, api, name, options.namespace, repositories, bool(opened))
                patiently(api, collect, f"collection {name!r}", tries)
        except RuntimeError as error:
            raise RuntimeError(f"everything is released; but {error}; the same command does what is left") from error
    for repository in repositories:
        print(f"{repository.repo_id} ({repository.part}): {commits[repository.part]}")
    return commits


def _check_login(api: HfApi, namespace: str, create_pr: bool) -> None:
    me = api.whoami()
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read" and not create_pr:
        raise RuntimeError(f"the token of {me['name']!r} may only read: make one with write access, `hf auth login`")
    own = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    if namespace not in own and not create_pr:
        raise RuntimeError(
            f"{me['name']!r} may not write to {namespace!r}: choose --namespace among {', '.join(own)}, or propose "
            "the release with --create-pr"
        )


def _check_card(api: HfApi, repository: Repository) -> None:
    """The Hub's own check, of all cards before anything is sent."""
    card = (repository.folder / "README.md").read_text(encoding="utf-8")
    request = {"content": card, "repoType": repository.repo_type}
    reply = get_session().post(f"{api.endpoint}/api/validate-yaml", json=request)
    if reply.status_code == 400:
        reasons = "; ".join(error["message"] for error in reply.json().get("errors", []))
        raise InvalidCardError(f"the Hub finds the card of {repository.repo_id} invalid: {reasons or reply.text}")
    hf_raise_for_status(reply)


def _open(api: HfApi, repository: Repository, tag: str | None, create_pr: bool) -> None:
    """Make the repository unless it exists; refuse one that is another's, or a tag that is taken."""
    taken = f"the name {repository.repo_id} is taken by"
    remedy = "rename or delete that, or give the recipe another `name`"
    try:
        info = api.repo_info(**repository.name)
    except RepositoryNotFoundError:
        try:
            api.create_repo(**repository.name, private=True, space_sdk=SPACE_SDKS.get(repository.part))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
        if not api.repo_exists(**repository.name):
            raise RuntimeError(f"{taken} a {repository.repo_type} that this login cannot see: {remedy}") from None
        info = api.repo_info(**repository.name)
    if info.id != repository.repo_id:
        raise RuntimeError(f"{repository.repo_id} has been renamed {info.id}: name it as before, or {remedy}")
    head = _head(api, repository)
    files = {file.path for file in _tree(api, repository, head)}
    if files - MADE_BY_THE_HUB and not _is_ours(api, repository, head):
        raise RuntimeError(
            f"{taken} a {repository.repo_type} that is no release of mllm-msr, and would be overwritten: {remedy}"
        )
    refs = {ref.name: ref.target_commit for ref in api.list_repo_refs(**repository.name).tags}
    if tag in refs and not create_pr and (refs[tag] != head or _changes(api, repository, head)):
        raise RuntimeError(
            f"{repository.repo_id}: tag {tag!r} already names another release, {refs[tag][:8]}: choose a new --tag"
        )


def _is_ours(api: HfApi, repository: Repository, head: str) -> bool:
    try:
        path = api.hf_hub_download(**repository.name, filename="README.md", revision=head)
        return TAGS[0] in (RepoCard.load(path, ignore_metadata_errors=True).data.get("tags") or [])
    except (RemoteEntryNotFoundError, ValueError):
        return False


def _head(api: HfApi, repository: Repository) -> str:
    return api.repo_info(**repository.name, revision=repository.revision).sha or ""


def _tree(api: HfApi, repository: Repository, head: str) -> Iterator[RepoFile]:
    tree = api.list_repo_tree(**repository.name, recursive=True, revision=head)
    return (entry for entry in tree if isinstance(entry, RepoFile))


def _changes(
    api: HfApi, repository: Repository, head: str
) -> list[CommitOperationAdd | CommitOperationDelete]:  # fmt: skip
    """What makes ``head`` equal to the folder: nothing, if it already is."""
    hashes = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in _tree(api, repository, head)}
    hashes.pop(".gitattributes", None)
    changes: list[CommitOperationAdd | CommitOperationDelete] = []
    for file, addition in zip(repository.files, repository.additions, strict=True):
        hashed = hashes.pop(addition.path_in_repo, "")
        sha256 = addition.upload_info.sha256.hex()
        if hashed != sha256 and not (len(hashed) == 40 and hashed == git_hash(file.read_bytes())):
            changes.append(addition)
    return changes + [CommitOperationDelete(path) for path in sorted(hashes)]


def _upload(api: HfApi, repository: Repository, create_pr: bool) -> None:
    """Send the content of large files, which no commit names yet."""
    changes = _changes(api, repository, _head(api, repository))
    additions = [change for change in changes if isinstance(change, CommitOperationAdd)]
    if additions:
        api.preupload_lfs_files(**repository.name, additions=additions, create_pr=create_pr)


def _try_commit(api: HfApi, repository: Repository, title: str) -> None:
    """Make the commit on a branch of its own, so that what the Hub refuses, it refuses before any main has moved."""
    if STAGE in {branch.name for branch in api.list_repo_refs(**repository.name).branches}:
        api.delete_branch(**repository.name, branch=STAGE)  # an earlier try was interrupted
    head = _head(api, repository)
    if changes := _changes(api, repository, head):
        api.create_branch(**repository.name, branch=STAGE, revision=head)
        tried = _send(api, repository, changes, title, head, revision=STAGE)
        if _changes(api, repository, tried):
            raise RuntimeError(
                f"the Hub has made other files of {repository.repo_id} than were sent; nothing is shown, repeat it"
            )
        api.delete_branch(**repository.name, branch=STAGE)
        if STAGE in {branch.name for branch in api.list_repo_refs(**repository.name).branches}:
            raise LookupError(f"the branch {STAGE} has been deleted, and is there still")


def _send(api: HfApi, repository: Repository, changes: list[Any], title: str, head: str, **where: Any) -> str:
    """One commit on ``head``; of copies, as the client commits an operation only once."""
    operations = [copy.copy(change) for change in changes]
    return api.create_commit(
        **repository.name, operations=operations, commit_message=title, parent_commit=head, **where
    ).oid


def _commit(api: HfApi, repository: Repository, title: str, create_pr: bool) -> str:
    """One commit that makes the repository equal to the folder, on the head that is read now; none if it is so.

    A pull request that an earlier try has opened is found again by its title, so that there is never a second one.
    """
    opens = create_pr
    if create_pr:
        for pull in api.get_repo_discussions(**repository.name, discussion_type="pull_request"):
            if pull.title == title and pull.status in ("open", "draft"):
                repository.revision, opens = pull.git_reference or "main", False
    head = _head(api, repository)
    changes = _changes(api, repository, head)
    if not changes:
        return head
    where: dict[str, Any] = {"create_pr": True} if opens else {"revision": repository.revision}
    return _send(api, repository, changes, title, head, **where)


def _tag(api: HfApi, repository: Repository, commit: str, tag: str) -> None:
    if tag not in {ref.name for ref in api.list_repo_refs(**repository.name).tags}:
        api.create_tag(**repository.name, tag=tag, revision=commit)
    if (named := api.repo_info(**repository.name, revision=tag).sha or "") != commit:
        raise RuntimeError(
            f"{repository.repo_id}: tag {tag!r} names {named[:8]}, which somebody else has released meanwhile: choose "
            "a new --tag"
        )


def _make_public(api: HfApi, repository: Repository) -> None:
    if api.repo_info(**repository.name).private:
        api.update_repo_settings(**repository.name, private=False)
        if api.repo_info(**repository.name).private:  # the reply is not read, so that a proxy's page passes for it
            raise LookupError("it has been made public, and is private still")


def _wake(api: HfApi, repository: Repository) -> None:
    """Start a Space again that has failed: it began before what it shows was tagged, or public.

    What the Hub says of its state decides nothing of the release, so a failure is a warning.
    """
    try:
        if api.get_space_runtime(repository.repo_id).stage == SpaceStage.RUNTIME_ERROR:
            api.restart_space(repository.repo_id)
    except (*NO_REPLY, *UNREADABLE) as error:
        reason = hide_secrets(" ".join(str(error).split()))
        print(f"warning: whether {repository.repo_id} runs could not be seen ({reason}); look at its page")


def _collect(api: HfApi, title: str, namespace: str, repositories: list[Repository], public: bool) -> None:
    collection = api.create_collection(title, namespace=namespace, private=not public, exists_ok=True)
    for repository in repositories:
        api.add_collection_item(collection.slug, repository.repo_id, repository.repo_type, exists_ok=True)
    print(f"collection {collection.slug}")


def _show(repository: Repository, public: bool) -> None:
    sizes = {repository.path(file): file.stat().st_size for file in repository.files}
    seen = "public" if public else "private"
    print(f"\n{repository.part} {repository.repo_id} ({seen}): {len(sizes)} files, {_size(sum(sizes.values()))}")
    for path, size in sizes.items():
        print(f"  {_size(size):>10}  {path}")
    text = (repository.folder / "README.md").read_text(encoding="utf-8")
    print("  card:", *(f"    | {line}" for line in text.strip().splitlines()), sep="\n")


def _size(count: float) -> str:
    """
    >>> _size(512), _size(2_500_000)
    ('512 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
