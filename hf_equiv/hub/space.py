"""`deploy_space`: make or update a Space that serves the app, in one commit, and wait until it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, SpaceRuntime, constants
from huggingface_hub import errors as hub_errors

from hf_equiv.hub.repository import Change, Progress, Repository, differing, read_text, read_tree, send
from hf_equiv.hub.space_files import DATASET, MODELS, App, app_of, datasets_in, is_empty, is_ours, models_in, stage
from hf_equiv.hub_client import api_of, brief, check_repo_id, explained, passes, patiently, persist, require_token
from hf_equiv.runs.directory import CARD

# One deployment: make the Space if it is missing, commit until it is done, set what differs, say what was done.


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


# From the commit to a Space that runs: looking at its stage until it does, or cannot.


RUNNING = "RUNNING"


_LOG = {"BUILD_ERROR": "build", "CONFIG_ERROR": "build", "NO_APP_FILE": "build", "RUNTIME_ERROR": "container"}
"""Stages of failure, and the log that says why."""


_ENDS = {RUNNING, *_LOG, "PAUSED", "STOPPED", "DELETING"}
"""Stages that nothing follows upon by itself."""


_POLLS = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0)
"""Seconds between looks; the last stays."""


_GRACE = 20.0
"""Seconds in which the stage may still be that of the commit before."""


class SpaceError(OSError):
    """The files are in the Space, but it does not run.

    Args:
        message: what happened, and where the log is.
        deployment: what was done.
    """

    def __init__(self, message: str, deployment: SpaceDeployment) -> None:
        super().__init__(message)
        self.deployment = deployment


def wait_until_it_runs(job: Deployment, done: SpaceDeployment, timeout: float) -> SpaceDeployment:
    """Look at the Space until it runs what was committed; a Space that sleeps is woken.

    Right after a commit the stage may still be that of the commit before. So an end is believed when the Space names
    the new commit, when another stage has been seen since, or after a while.

    Args:
        job: the deployment.
        done: what it did.
        timeout: seconds to wait.

    Returns:
        The same with the stage.

    Raises:
        SpaceError: it failed, is paused, or did not run in time.
    """
    began, slept, looks, woken = time.monotonic(), 0.0, 0, False
    seen: list[str] = []
    while True:
        runtime = _look(job, done)
        stage = str(runtime.stage)
        now = replace(done, stage=stage)
        if stage not in seen:
            job.say(stage.lower().replace("_", " "))
            seen.append(stage)
        fresh = not done.changed or runtime.raw.get("sha") == done.commit or len(seen) > 1 or slept >= _GRACE
        if stage in ("SLEEPING", "STOPPED") and not woken:
            woken = True
            job.call(lambda: job.api.restart_space(job.repo_id), "waking the Space")
        elif stage in _ENDS and (fresh or stage == "PAUSED"):
            if stage == RUNNING:
                return now
            raise SpaceError(_why(job, stage, str(runtime.raw.get("errorMessage") or "")), now)
        left = timeout - max(slept, time.monotonic() - began)
        if left <= 0:
            raise SpaceError(
                f"'{job.repo_id}' does not run after {timeout:.0f} s (stage {stage}). It goes on by itself; the log is "
                f"at {job.url}?logs=build. Deploy again to wait once more, or raise `timeout`.",
                now,
            )
        pause = min(_POLLS[min(looks, len(_POLLS) - 1)], left)
        time.sleep(pause)
        slept, looks = slept + pause, looks + 1


def _look(job: Deployment, done: SpaceDeployment) -> SpaceRuntime:
    try:
        return job.call(lambda: job.api.get_space_runtime(job.repo_id), "asking whether it runs")
    except Exception as error:
        if not passes(error):
            raise
        raise SpaceError(
            f"'{job.repo_id}' is deployed, but whether it runs could not be asked ({brief(error)}). See {job.url}.",
            done,
        ) from error


def _why(job: Deployment, stage: str, said: str) -> str:
    """A Space that will not run, in words."""
    if stage == "PAUSED":
        return f"'{job.repo_id}' is paused, so it does not run. Restart it at {job.url}/settings."
    if stage not in _LOG:
        return f"'{job.repo_id}' is {stage.lower()}, so it does not run. See {job.url}."
    words = {"BUILD_ERROR": "could not be built", "RUNTIME_ERROR": "could not be started"}
    shown = f": {' '.join(said.split())[:300]}" if said else ""
    return (
        f"'{job.repo_id}' {words.get(stage, 'has no valid configuration')} ({stage}{shown}). The log is at "
        f"{job.url}?logs={_LOG[stage]}."
    )


def deploy_space(
    repo_id: str,
    *,
    dataset: str | None = None,
    models: Sequence[str] = (),
    private: bool | None = None,
    hardware: str | None = None,
    wheel: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    wait: bool = True,
    timeout: float = 600.0,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> SpaceDeployment:
    """Put the app into a Space on the Hub, whole or not at all: in one commit; then wait until it runs.

    The Space is made if it is missing. Of one that is there the app, its requirements and the marked part of README.md
    are brought up to date; other files, text outside the marks and what the owner set in the header stay. If nothing
    has changed, nothing is committed. No secret is ever set.

    What passes is tried again, as when results are published: 409, 412, 429, 5xx and cut connections.

    Args:
        repo_id: `USER/NAME` or `ORGANISATION/NAME`.
        dataset: published matches that the app shows, `USER/NAME` or `USER/NAME@REVISION`. None keeps what the Space
            has, "" shows none.
        models: checkpoints that visitors may choose beside the built-in one. Empty keeps what the Space has.
        private: visibility. None keeps that of an existing Space, and makes a new one private.
        hardware: such as `cpu-basic` or `zero-a10g`. None keeps what the Space has.
        wheel: of hf_equiv, to bring along. None pins the installed version if it came from a package index, and brings
            the installed files along otherwise.
        force: deploy into a Space that holds another app, too.
        dry_run: read, decide and list, but write nothing.
        wait: return when the Space runs.
        timeout: seconds to wait.
        token: of the Hub; by default the one you are logged in with.
        progress: called with (bytes sent, bytes in total, what is being done).

    Returns:
        What was done.

    Raises:
        ValueError: a bad name, no such dataset or model, a Space with another app, or no wheel of this library.
        HfHubHTTPError: no right to write, a token that is not accepted, hardware that must be paid, or a failure that
            did not pass.
        ConnectionError: the Hub is out of reach.
        SpaceError: deployed, but it could not be built or started, or did not run in time.

    Example:
        >>> deploy_space("me/same-embedding", dataset="me/matches").url  # doctest: +SKIP
        'https://huggingface.co/spaces/me/same-embedding'
    """
    name = check_repo_id(repo_id, KIND, otherwise="the app is deployed to a Space")
    given = _given(dataset, models)
    app = app_of(None if wheel is None else Path(wheel))
    api = api_of(token)
    job = Deployment(api, name, app, given, hardware, force, progress or (lambda done, total, what: None))
    with explained(name, kind=KIND, write=True, token=token):
        if not dry_run:
            require_token(token, "deploying a Space")
        there = job.look()
        warnings = _warnings(job)
        if dry_run:
            return job.dry(there, private, warnings)
        done = job.carry_out(there, private, warnings)
        return wait_until_it_runs(job, done, timeout) if wait else done


def _given(dataset: str | None, models: Sequence[str]) -> dict[str, str]:
    """The variables that were asked for."""
    given: dict[str, str] = {}
    if dataset is not None:
        if dataset:
            told, at, revision = dataset.partition("@")
            dataset = check_repo_id(told, "dataset", otherwise="the app shows a dataset", argument="dataset")
            dataset += at + revision
        given[DATASET] = dataset
    if isinstance(models, str) or any(not isinstance(model, str) for model in models):
        raise TypeError(f"`models` must be a sequence of names; got {models!r}. Pass ['USER/NAME'].")
    if models:
        names = [
            check_repo_id(model, "model", otherwise="the app loads models", argument="models")
            for model in models
            if model != "builtin"
        ]
        given[MODELS] = ",".join(dict.fromkeys(names))
    return given


def _warnings(job: Deployment) -> tuple[str, ...]:
    """What the Space will not be able to read; what does not exist is an error."""
    revision = job.given.get(DATASET, "").partition("@")[2] or None
    found = [_closed(job, "dataset", name, revision) for name in datasets_in(job.given)]
    found += [_closed(job, "model", name, None) for name in models_in(job.given)]
    return tuple(text for text in found if text)


def _closed(job: Deployment, kind: str, name: str, revision: str | None) -> str:
    argument = "dataset" if kind == "dataset" else "models"
    try:
        info: Any = job.call(
            lambda: job.api.repo_info(name, repo_type=kind, revision=revision), f"asking for the {kind}"
        )
        closed = "private" if info.private else "gated" if info.gated else ""
    except hub_errors.GatedRepoError:
        closed = "gated"
    except hub_errors.RepositoryNotFoundError:
        raise ValueError(
            f"`{argument}` must be on the Hub; it shows you no {kind} '{name}'. Check the spelling; for a private one "
            "log in with `hf auth login`."
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ValueError(
            f"`{argument}` must name a revision that exists; '{name}' has no {revision!r}. Use a branch, tag or commit."
        ) from None
    if not closed:
        return ""
    return (
        f"the {kind} '{name}' is {closed}: the Space cannot read it without a token. Add a read token as the secret "
        f"HF_TOKEN at {job.url}/settings; whoever can open the Space then sees what it shows of it."
    )
