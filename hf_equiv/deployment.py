"""One deployment: make the Space if it is missing, commit until it is done, set what differs, say what was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors

from hf_equiv.hubcalls import patiently, persist
from hf_equiv.localrun import CARD
from hf_equiv.repository import Change, Progress, Repository, differing, read_text, read_tree, send
from hf_equiv.spacefiles import DATASET, MODELS, App, is_empty, is_ours, stage

T = TypeVar("T")
KIND = "space"


@dataclass(frozen=True, slots=True)
class SpaceDeployment:
    """What `deploy_space` did, or with `dry_run` would do.

    Attributes:
        repo_id: the Space.
        url: its page.
        made: whether it is new.
        changed: whether there was anything to commit or to set.
        commit: the commit that holds the app; None in a dry run.
        private: visibility afterwards.
        hardware: what was asked for, now or earlier; None where the Hub does not say.
        variables: of the app, as they are afterwards.
        library: where the Space has hf_equiv from, in words.
        files: number of files of the deployment.
        uploaded: (path, bytes) of those that were not there yet.
        deleted: paths of an earlier copy of the library that the commit removes.
        warnings: what will not work as it stands, and the cure.
        stage: of the Space when it was last looked at; None in a dry run and without waiting.
        dry_run: whether nothing was written.
    """

    repo_id: str
    url: str
    made: bool
    changed: bool
    commit: str | None
    private: bool
    hardware: str | None
    variables: dict[str, str]
    library: str
    files: int
    uploaded: tuple[tuple[str, int], ...]
    deleted: tuple[str, ...]
    warnings: tuple[str, ...]
    stage: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class There:
    """A Space as it stands.

    Attributes:
        repository: its files, and its README.md if there is an app.
        made: whether it was made here.
        private: its visibility.
        variables: those of the app.
        asked: hardware that was asked for.
    """

    repository: Repository
    made: bool = False
    private: bool = True
    variables: dict[str, str] = field(default_factory=dict)
    asked: str | None = None


@dataclass(frozen=True)
class Deployment:
    """One app on its way into one Space.

    Attributes:
        api: client.
        repo_id: `USER/NAME`.
        app: what is deployed.
        given: variables that were asked for; an empty one is to be removed.
        hardware: what was asked for.
        force: replace another app.
        progress: called with (bytes sent, bytes in total, what is being done).
    """

    api: HfApi
    repo_id: str
    app: App
    given: Mapping[str, str]
    hardware: str | None
    force: bool
    progress: Progress

    @property
    def url(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/spaces/{self.repo_id}"

    def say(self, text: str) -> None:
        """Report what is being done."""
        self.progress(0, 0, text)

    def call(self, what: Callable[[], T], name: str) -> T:
        """Make a call that may be repeated."""
        return patiently(what, self.say, name)

    # --- what is there, and what is to change ---

    def look(self) -> There | None:
        """The Space as it is now; None if there is none."""
        try:
            info = self.call(lambda: self.api.space_info(self.repo_id), "asking for the Space")
        except hub_errors.RepositoryNotFoundError:
            return None
        head = str(info.sha)
        files = self.call(lambda: read_tree(self.api, self.repo_id, head, KIND), "reading the Space")
        readme = None
        if CARD in files:
            readme = self.call(lambda: read_text(self.api, self.repo_id, CARD, head, KIND), "reading the Space")
        if not is_ours(readme):
            if not is_empty(files) and not self.force:
                raise ValueError(
                    f"`repo_id` must be a new Space or one that hf_equiv has deployed; '{self.repo_id}' holds another "
                    f"app (sdk {info.sdk}). Choose another name, or pass `force=True` to replace its app."
                )
            readme = None if is_empty(files) else readme
        asked = None if info.runtime is None else info.runtime.requested_hardware
        return There(Repository(self.repo_id, head, files, {}, readme), private=bool(info.private), asked=asked)

    def with_variables(self, there: There) -> There:
        """The same with the variables of the app; only who may write may read them."""
        kept = self.call(lambda: self.api.get_space_variables(self.repo_id), "reading the variables")
        return replace(there, variables={key: kept[key].value for key in (DATASET, MODELS) if key in kept})

    def wanted(self, there: There | None) -> dict[str, str]:
        """The variables as they are to be."""
        merged = {**(there.variables if there else {}), **self.given}
        return {key: value for key, value in merged.items() if value}

    def plan(self, there: There | None) -> Change:
        """What a deployment adds, changes and removes."""
        held = there.repository if there else Repository(self.repo_id, None, {}, {}, None)
        before = there.variables if there else {}
        files, deleted = stage(self.app, held.card, held.files, self.wanted(there), before)
        return Change("", {}, tuple(files), tuple(differing(files, held.files)), tuple(deleted), bool(held.card))

    # --- doing it ---

    def carry_out(self, there: There | None, private: bool | None, warnings: tuple[str, ...]) -> SpaceDeployment:
        """Make the Space if it is missing, commit, set what differs."""
        made = there is None
        if there is None:
            hidden = private is not False
            variables = [{"key": key, "value": value} for key, value in self.wanted(None).items()]
            self.call(
                lambda: self.api.create_repo(
                    self.repo_id, repo_type=KIND, private=hidden, exist_ok=True, space_sdk="gradio",
                    space_hardware=self.hardware, space_variables=variables or None,  # type: ignore[arg-type]
                ),
                "creating",
            )  # fmt: skip
        elif private and not there.private:
            self.visible(False, "making private")
        first, change, commit, fresh = self.commit()
        now = replace(first, made=made)
        altered = self.set_variables(now)
        if not made and self.hardware is not None and now.asked != self.hardware:
            hardware: Any = self.hardware
            self.call(lambda: self.api.request_space_hardware(self.repo_id, hardware), "asking for the hardware")
            altered = True
        if private is False and now.private:
            self.visible(True, "opening")
            now = replace(now, private=False)
        done = self.result(now, change, now.private, warnings)
        return replace(done, commit=commit, changed=fresh or altered or made)

    def visible(self, public: bool, what: str) -> None:
        """Set the visibility."""
        self.call(lambda: self.api.update_repo_settings(self.repo_id, private=not public, repo_type=KIND), what)

    def commit(self) -> tuple[There, Change, str, bool]:
        """Commit until it is done; returns (what was there, change, commit, whether anything was to do)."""
        tried: Change | None = None

        def look() -> There:
            there = self.look()
            if there is None:
                raise ValueError(f"the Space '{self.repo_id}' has just been deleted. Deploy again.")
            return self.with_variables(there)

        def attempt(there: There) -> tuple[There, Change, str, bool]:
            nonlocal tried
            change = self.plan(there)
            if not change.added and not change.deleted:  # nothing to do, or done by a try whose answer was lost
                return there, tried or change, str(there.repository.head), tried is not None
            tried = change
            title = f"{'Update' if change.update else 'Add'} the app of {self.app.library.split(',')[0]}"
            made = send(
                self.api, there.repository, change, message=title, description="", revision="main", create_pr=False,
                progress=self.progress, kind=KIND,
            )  # fmt: skip
            return there, change, made.oid, True

        return persist(look, attempt, self.say, "deploying")

    def set_variables(self, there: There) -> bool:
        """Bring the variables of the app up to date, after the commit that links what they name."""
        wanted, altered = self.wanted(there), False
        for key in (DATASET, MODELS):
            value = wanted.get(key)
            if value == there.variables.get(key):
                continue
            altered = True
            if value is None:
                self.call(partial(self.api.delete_space_variable, self.repo_id, key), "removing a variable")
            else:
                self.call(partial(self.api.add_space_variable, self.repo_id, key, value), "setting a variable")
        return altered

    # --- after ---

    def dry(self, there: There | None, private: bool | None, warnings: tuple[str, ...]) -> SpaceDeployment:
        """What would be done."""
        if there is not None:
            try:
                there = self.with_variables(there)
            except hub_errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403):
                    raise  # else they are not ours to read: taken to be unset
        return self.result(there, self.plan(there), private, warnings, dry_run=True)

    def result(
        self, there: There | None, change: Change, private: bool | None, warnings: tuple[str, ...], *,
        dry_run: bool = False,
    ) -> SpaceDeployment:  # fmt: skip
        """The record of what was done, or would be."""
        seen = there.private if there is not None and private is None else private is not False
        differs = there is None or self.wanted(there) != there.variables or seen != there.private
        return SpaceDeployment(
            repo_id=self.repo_id, url=self.url, made=there is None or there.made,
            changed=bool(change.added or change.deleted) or differs, commit=None, private=seen,
            hardware=self.hardware or ("cpu-basic" if there is None else there.asked),
            variables=self.wanted(there), library=self.app.library, files=len(change.files),
            uploaded=tuple((file.path, file.size) for file in change.added), deleted=change.deleted,
            warnings=warnings, dry_run=dry_run,
        )  # fmt: skip
