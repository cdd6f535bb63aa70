"""Make or update a Space that serves the app, whole or not at all, in one commit, and wait until it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors

from hf_equiv.hub.repository import Change, Progress, Remote, Snapshot, commit_until_done, send
from hf_equiv.hub.space_files import DATASET, INITIAL, MODELS, App, app_of, datasets_in, is_ours, models_in, stage
from hf_equiv.hub_client import WAITS, api_of, brief, check_repo_id, explained, require_token
from hf_equiv.runs.directory import CARD

# Stages that do not change by themselves, each with the rest of the sentence about the Space.
_FAILED = {
    "BUILD_ERROR": "could not be built (BUILD_ERROR{said}). The log is at {url}?logs=build.",
    "CONFIG_ERROR": "has no valid configuration (CONFIG_ERROR{said}). The log is at {url}?logs=build.",
    "NO_APP_FILE": "has no valid configuration (NO_APP_FILE{said}). The log is at {url}?logs=build.",
    "RUNTIME_ERROR": "could not be started (RUNTIME_ERROR{said}). The log is at {url}?logs=container.",
    "PAUSED": "is paused, so it does not run. Restart it at {url}/settings.",
    "STOPPED": "is stopped, so it does not run. See {url}.",
    "DELETING": "is deleting, so it does not run. See {url}.",
}
_POLL = 3.0  # seconds between looks
_GRACE = 20.0  # seconds in which the stage may still belong to the previous commit


@dataclass(frozen=True, slots=True)
class SpaceDeployment:
    """The result of `deploy_space`, or with `dry_run` its plan.

    Attributes:
        repo_id: the Space, USER/NAME.
        url: page of the Space.
        made: whether it is new.
        changed: whether there was anything to commit or to set.
        commit: the commit that holds the app; None in a dry run.
        private: visibility afterwards.
        hardware: the hardware that was asked for, now or earlier; None if the Hub does not say.
        variables: the variables of the app afterwards.
        library: the source of hf_equiv in the Space, in words.
        files: number of files of the deployment.
        uploaded: (path, bytes) of the files that were new or had changed.
        deleted: paths of an earlier copy of the library that the commit removes.
        warnings: sets and models that the Space cannot read, and the cure.
        stage: the last stage that was seen; None in a dry run and without waiting.
        dry_run: whether nothing was written.
        unchecked: in a dry run, the reason why the Hub was not asked; the plan is then that of a new Space.
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
    unchecked: str | None = None


class SpaceError(OSError):
    """The files are in the Space, but it does not run; `deployment` says what was done."""

    def __init__(self, message: str, deployment: SpaceDeployment) -> None:
        super().__init__(message)
        self.deployment = deployment


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
    """Put the app into a Space on the Hub, in one commit; then wait until it runs. No secret is ever set.

    A missing Space is made. In an existing one the app, its requirements and the marked part of README.md are brought
    up to date; other files, text outside the marks and the owner's settings in the header stay.

    Args:
        repo_id: `USER/NAME` or `ORGANISATION/NAME`.
        dataset: published matches to show, `USER/NAME` or `USER/NAME@REVISION`. None keeps those of the Space, "" shows
            none.
        models: checkpoints that visitors may choose beside the built-in one. Empty keeps the choice of the Space.
        private: visibility. None does not change an existing Space, and makes a new one private.
        hardware: hardware such as `cpu-basic` or `zero-a10g`. None keeps the hardware of the Space.
        wheel: wheel of hf_equiv to bring along. None pins the installed version if it came from a package index, and
            brings the installed files along otherwise.
        force: deploy even into a Space that holds another app.
        dry_run: read, decide and list, but write nothing.
        wait: return when the Space runs.
        timeout: seconds to wait.
        token: token of the Hub; by default the one you are logged in with.
        progress: called with (bytes sent, bytes in total, what is being done).

    Returns:
        The result.

    Raises:
        ValueError: a bad name, a Space with another app, or no wheel of this library.
        HfHubHTTPError: no such dataset or model, no right to write, hardware that must be paid, or a failure that did
            not pass.
        ConnectionError: the Hub is out of reach.
        SpaceError: deployed, but it could not be built or started, or did not run in time.
    """
    name = check_repo_id(repo_id, "space", otherwise="the app is deployed to a Space")
    tell = progress or (lambda done, total, what: None)
    remote = Remote(api_of(token), name, "space", tell, () if dry_run else WAITS)
    app = app_of(None if wheel is None else Path(wheel))
    job = Deployment(remote, app, _given(dataset, models), private, hardware, force)
    if not dry_run:
        require_token(token, "deploying a Space")
    elif (unchecked := remote.why_unchecked()) is not None:
        return replace(_result(job, Space(), _plan(job, Space())), dry_run=True, unchecked=unchecked)
    warnings = _warnings(job)
    with explained(name, kind="space", write=True, dry_run=dry_run, token=token):
        first = _look(job)
        if dry_run:
            return replace(_result(job, first, _plan(job, first)), warnings=warnings, dry_run=True)
        done = replace(_carry_out(job, first), warnings=warnings)
        return _wait_until_it_runs(remote, done, timeout) if wait else done


@dataclass(frozen=True, slots=True)
class Deployment:
    """An app on its way into a Space."""

    remote: Remote
    app: App
    given: Mapping[str, str]  # variables that were asked for; an empty one is to be removed
    private: bool | None
    hardware: str | None
    force: bool  # replace another app

    def variables(self, there: Space) -> dict[str, str]:
        """Return the planned variables of a Space."""
        return {key: value for key, value in {**there.variables, **self.given}.items() if value}


@dataclass(frozen=True, slots=True)
class Space(Snapshot):
    """A Space at a commit, or a Space that does not exist yet; without an app it has no card."""

    private: bool = True
    hardware: str | None = "cpu-basic"
    variables: Mapping[str, str] = field(default_factory=dict)


def _given(dataset: str | None, models: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    if dataset is not None:
        name, at, revision = dataset.partition("@")
        if dataset:
            name = check_repo_id(name, "dataset", otherwise="the app shows a dataset", argument="dataset")
        given[DATASET] = name + at + revision
    if isinstance(models, str) or any(not isinstance(model, str) for model in models):
        raise TypeError(f"`models` must be a sequence of names; got {models!r}. Pass ['USER/NAME'].")
    if models:
        check = partial(check_repo_id, kind="model", otherwise="the app loads models", argument="models")
        given[MODELS] = ",".join(dict.fromkeys(check(model) for model in models if model != "builtin"))
    return given


def _warnings(job: Deployment) -> tuple[str, ...]:
    """Return a sentence for each dataset or model that the Space cannot read; a missing one is an error."""
    remote, revision = job.remote, job.given.get(DATASET, "").partition("@")[2] or None
    named = [("dataset", name, revision) for name in datasets_in(job.given)]
    named += [("model", name, None) for name in models_in(job.given)]
    found = []
    for kind, name, at in named:
        try:
            with explained(name, kind=kind, revision=at, token=remote.api.token):
                info = replace(remote, repo_id=name, kind=kind).info(at)
            closed = "private" if info.private else "gated" if info.gated else ""
        except hub_errors.GatedRepoError:
            closed = "gated"
        if closed:
            found.append(
                f"the {kind} '{name}' is {closed}: the Space cannot read it without a token. Add a read token as the "
                f"secret HF_TOKEN at {remote.url}/settings; then everyone who can open the Space sees what it shows of "
                "it."
            )
    return tuple(found)


def _look(job: Deployment) -> Space:
    """Return the Space as it is now. Variables that the user may not read count as unset."""
    remote = job.remote
    info = remote.find()
    if info is None:
        return Space()
    head, hardware = str(info.sha), info.runtime and info.runtime.requested_hardware
    files = remote.files(head)
    card = remote.text(CARD, head) if CARD in files else None
    if not is_ours(card) and set(files) <= INITIAL:
        card = None
    elif not is_ours(card) and not job.force:
        found = f"'{remote.repo_id}' holds another app (sdk {info.sdk})"
        cure = "Choose another name, or pass `force=True` to replace its app."
        raise ValueError(f"`repo_id` must be a new Space or one that hf_equiv has deployed; {found}. {cure}")
    kept: Mapping[str, Any] = {}
    try:
        kept = remote.call("reading the variables", remote.api.get_space_variables, remote.repo_id)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
    variables = {key: kept[key].value for key in (DATASET, MODELS) if key in kept}
    return Space(head, files, card, private=bool(info.private), hardware=hardware, variables=variables)


def _plan(job: Deployment, there: Space) -> Change[Space]:
    files, deleted = stage(job.app, there.card, there.files, job.variables(there), there.variables)
    title = f"{'Update' if there.card else 'Add'} the app of {job.app.library.split(',')[0]}"
    return Change(there, files, sorted(deleted), title)


def _result(job: Deployment, first: Space, change: Change[Space]) -> SpaceDeployment:
    """Return the result of a change to a Space that was `first` before."""
    made, variables, hardware = first.head is None, job.variables(first), job.hardware or first.hardware
    private = first.private if job.private is None else job.private
    set_anew = (private, hardware, variables) != (first.private, first.hardware, first.variables)
    return SpaceDeployment(
        repo_id=job.remote.repo_id, url=job.remote.url, made=made, changed=not change.empty or made or set_anew,
        commit=None, private=private, hardware=hardware, variables=variables, library=job.app.library,
        files=len(change.files), uploaded=tuple((file.path, file.size) for file in change.added),
        deleted=tuple(change.deleted), warnings=(),
    )  # fmt: skip


def _carry_out(job: Deployment, first: Space) -> SpaceDeployment:
    """Make the Space if it is missing, commit, then set the visibility, hardware and variables that differ."""
    remote, api, name, private = job.remote, job.remote.api, job.remote.repo_id, job.private
    if first.head is None:
        variables = [{"key": key, "value": value} for key, value in job.variables(first).items()]
        remote.call(
            "making the Space", api.create_repo, name, repo_type="space", space_sdk="gradio", exist_ok=True,
            private=private is not False, space_hardware=job.hardware, space_variables=variables or None,
        )  # fmt: skip
    elif private and not first.private:
        remote.set_private(True)

    done = commit_until_done(partial(_look, job), partial(_plan, job), partial(send, remote), remote.say)
    there = done.change.there
    wanted = job.variables(there)
    for key in (DATASET, MODELS):
        if key in wanted and wanted[key] != there.variables.get(key):
            remote.call("setting a variable", api.add_space_variable, name, key, wanted[key])
        elif key in there.variables and key not in wanted:
            remote.call("removing a variable", api.delete_space_variable, name, key)
    if first.head is not None and job.hardware not in (None, there.hardware):
        remote.call("asking for the hardware", api.request_space_hardware, name, job.hardware)
    if private is False and there.private:
        remote.set_private(False)
    return replace(_result(job, first, done.change), commit=done.commit)


def _ask(remote: Remote, done: SpaceDeployment, what: str, call: Callable[..., Any]) -> Any:
    try:
        return remote.call(what, call, remote.repo_id)
    except Exception as error:
        told = f"is deployed, but whether it runs could not be asked ({brief(error)}). See {remote.url}."
        raise SpaceError(f"'{remote.repo_id}' {told}", done) from error


def _wait_until_it_runs(remote: Remote, done: SpaceDeployment, timeout: float) -> SpaceDeployment:
    """Look at the Space until it runs the commit, or cannot; a Space that sleeps is woken."""
    # Right after a commit the stage may still belong to the previous commit; `HfApi.wait_for_space` would return it. A
    # final stage counts once the Space names the new commit, after another stage, or after `_GRACE` seconds.
    waited, url, asleep = 0.0, remote.url, {"SLEEPING", "STOPPED"}
    seen: set[str] = set()
    while True:
        runtime = _ask(remote, done, "asking whether it runs", remote.api.get_space_runtime)
        stage = str(runtime.stage)
        now = replace(done, stage=stage)
        if stage not in seen:
            remote.say(stage.lower().replace("_", " "))
        wake = stage in asleep and not asleep & seen
        seen.add(stage)
        fresh = not done.changed or runtime.raw.get("sha") == done.commit or len(seen) > 1 or waited >= _GRACE
        if wake:
            _ask(remote, done, "waking the Space", remote.api.restart_space)
        elif stage == "RUNNING" and fresh:
            return now
        elif stage in _FAILED and (fresh or stage == "PAUSED"):
            said = " ".join(str(runtime.raw.get("errorMessage") or "").split())[:300]
            told = _FAILED[stage].format(said=f": {said}" if said else "", url=url)
            raise SpaceError(f"'{remote.repo_id}' {told}", now)
        if waited >= timeout:
            raise SpaceError(
                f"'{remote.repo_id}' does not run after {timeout:.0f} s (stage {stage}). It goes on by itself; the log "
                f"is at {url}?logs=build. Deploy again to wait once more, or raise `timeout`.",
                now,
            )
        pause = min(_POLL, timeout - waited)
        time.sleep(pause)
        waited += pause
