"""Make or update a Space that serves the app, whole or not at all, in one commit, and wait until it runs.

A missing Space is made. In an existing one the app, its requirements and the marked part of README.md are brought up to
date; other files, text outside the marks and the owner's settings in the header stay. If nothing has changed, nothing
is committed. Failures that may pass are tried again, as in `publish_results`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors

from hf_equiv.hub.repository import Change, Progress, Remote, change_of, commit_until_done, send
from hf_equiv.hub.space_files import DATASET, MODELS, App, app_of, datasets_in, is_empty, is_ours, models_in, stage
from hf_equiv.hub_client import api_of, brief, check_repo_id, explained, passes, require_token
from hf_equiv.runs.directory import CARD

_LOG = {"BUILD_ERROR": "build", "CONFIG_ERROR": "build", "NO_APP_FILE": "build", "RUNTIME_ERROR": "container"}
"""Stages of failure, and the log that says why."""

_ENDS = {"RUNNING", *_LOG, "PAUSED", "STOPPED", "DELETING"}
"""Stages that do not change by themselves."""

_POLL = 3.0
"""Seconds between looks."""

_GRACE = 20.0
"""Seconds in which the stage may still be that of the commit before."""


@dataclass(frozen=True, slots=True)
class SpaceDeployment:
    """The result of `deploy_space`, or with `dry_run` its plan.

    Attributes:
        repo_id: the Space.
        url: its page.
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
        warnings: what will not work as it stands, and the cure.
        stage: the last stage of the Space that was seen; None in a dry run and without waiting.
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


class SpaceError(OSError):
    """The files are in the Space, but it does not run.

    Args:
        message: what happened, and where the log is.
        deployment: what was done.
    """

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

    Args:
        repo_id: `USER/NAME` or `ORGANISATION/NAME`.
        dataset: published matches to show, `USER/NAME` or `USER/NAME@REVISION`. None keeps those of the Space, "" shows
            none.
        models: checkpoints that visitors may choose beside the built-in one. Empty keeps those of the Space.
        private: visibility. None keeps that of an existing Space, and makes a new one private.
        hardware: such as `cpu-basic` or `zero-a10g`. None keeps that of the Space.
        wheel: of hf_equiv, to bring along. None pins the installed version if it came from a package index, and brings
            the installed files along otherwise.
        force: deploy even into a Space that holds another app.
        dry_run: read, decide and list, but write nothing.
        wait: return when the Space runs.
        timeout: seconds to wait.
        token: of the Hub; by default the one you are logged in with.
        progress: called with (bytes sent, bytes in total, what is being done).

    Returns:
        The result.

    Raises:
        ValueError: a bad name, no such dataset or model, a Space with another app, or no wheel of this library.
        HfHubHTTPError: no right to write, hardware that must be paid, or a failure that did not pass.
        ConnectionError: the Hub is out of reach.
        SpaceError: deployed, but it could not be built or started, or did not run in time.
    """
    name = check_repo_id(repo_id, "space", otherwise="the app is deployed to a Space")
    remote = Remote(api_of(token), name, "space", progress or (lambda done, total, what: None))
    job = Deployment(remote, app_of(None if wheel is None else Path(wheel)), _given(dataset, models), hardware, force)
    with explained(name, kind="space", write=True, token=token):
        if not dry_run:
            require_token(token, "deploying a Space")
        there = _look(job)
        warnings = _warnings(job)
        if dry_run:
            return replace(_plan_only(job, there, private), warnings=warnings)
        done = replace(_carry_out(job, there, private), warnings=warnings)
        return _wait_until_it_runs(remote, done, timeout) if wait else done


@dataclass(frozen=True, slots=True)
class Deployment:
    """An app on its way into a Space."""

    remote: Remote
    app: App
    given: Mapping[str, str]  # variables that were asked for; an empty one is to be removed
    hardware: str | None
    force: bool  # replace another app


@dataclass(frozen=True, slots=True)
class Space:
    """A Space as it is at a commit."""

    head: str
    files: Mapping[str, str]  # as from `Remote.files`
    card: str | None  # README.md, if there is an app
    private: bool
    hardware: str | None
    variables: Mapping[str, str] = field(default_factory=dict)


def _given(dataset: str | None, models: Sequence[str]) -> dict[str, str]:
    """Return the variables that were asked for."""
    given: dict[str, str] = {}
    if dataset is not None:
        told, at, revision = dataset.partition("@")
        if dataset:
            told = check_repo_id(told, "dataset", otherwise="the app shows a dataset", argument="dataset")
        given[DATASET] = told + at + revision
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
    """Return what the Space will not be able to read; what does not exist is an error."""
    revision = job.given.get(DATASET, "").partition("@")[2] or None
    named = [("dataset", "dataset", name, revision) for name in datasets_in(job.given)]
    named += [("model", "models", name, None) for name in models_in(job.given)]
    closed = [(kind, name, _closed(replace(job.remote, repo_id=name, kind=kind), argument, at))
              for kind, argument, name, at in named]  # fmt: skip
    return tuple(
        f"the {kind} '{name}' is {why}: the Space cannot read it without a token. Add a read token as the secret "
        f"HF_TOKEN at {job.remote.url}/settings; then everyone who can open the Space sees what it shows of it."
        for kind, name, why in closed
        if why
    )


def _closed(remote: Remote, argument: str, revision: str | None) -> str:
    kind, name = remote.kind, remote.repo_id
    try:
        info = remote.info(revision)
    except hub_errors.GatedRepoError:
        return "gated"
    except hub_errors.RepositoryNotFoundError:
        raise ValueError(
            f"`{argument}` must be on the Hub; it shows you no {kind} '{name}'. Check the spelling; for a private one "
            "log in with `hf auth login`."
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ValueError(
            f"`{argument}` must name a revision that exists; '{name}' has no {revision!r}. Use a branch, tag or commit."
        ) from None
    return "private" if info.private else "gated" if info.gated else ""


# --- the commit ---


def _look(job: Deployment) -> Space | None:
    """Return the Space as it is now, without its variables; None if there is none."""
    remote = job.remote
    info = remote.find()
    if info is None:
        return None
    head, hardware = str(info.sha), info.runtime and info.runtime.requested_hardware
    files = remote.files(head)
    card = remote.text(CARD, head) if CARD in files else None
    if not is_ours(card) and is_empty(files):
        card = None
    elif not is_ours(card) and not job.force:
        raise ValueError(
            f"`repo_id` must be a new Space or one that hf_equiv has deployed; '{remote.repo_id}' holds another "
            f"app (sdk {info.sdk}). Choose another name, or pass `force=True` to replace its app."
        )
    return Space(head, files, card, bool(info.private), hardware)


def _with_variables(remote: Remote, there: Space) -> Space:
    """Add the variables of the app, which only those who may write can read."""
    kept = remote.call(lambda: remote.api.get_space_variables(remote.repo_id), "reading the variables")
    return replace(there, variables={key: kept[key].value for key in (DATASET, MODELS) if key in kept})


def _plan_only(job: Deployment, there: Space | None, private: bool | None) -> SpaceDeployment:
    """Return the plan of a deployment; variables that the user may not read count as unset."""
    try:
        there = there and _with_variables(job.remote, there)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
    return replace(_deployment(job, there, _plan(job, there), private), dry_run=True)


def _wanted(job: Deployment, there: Space | None) -> dict[str, str]:
    merged = {**(there.variables if there else {}), **job.given}
    return {key: value for key, value in merged.items() if value}


def _plan(job: Deployment, there: Space | None) -> Change:
    card, held, before = (there.card, there.files, there.variables) if there else (None, {}, {})
    files, deleted = stage(job.app, card, held, _wanted(job, there), before)
    title = f"{'Update' if card else 'Add'} the app of {job.app.library.split(',')[0]}"
    return change_of(there.head if there else None, held, files, deleted, title)


def _carry_out(job: Deployment, first: Space | None, private: bool | None) -> SpaceDeployment:
    """Make the Space if it is missing, commit, then set what differs."""
    remote, hardware = job.remote, job.hardware
    api, name = remote.api, remote.repo_id
    if first is None:
        variables: Any = [{"key": key, "value": value} for key, value in _wanted(job, None).items()]
        create: Any = partial(api.create_repo, name, repo_type="space", space_sdk="gradio", exist_ok=True)
        remote.call(
            lambda: create(private=private is not False, space_hardware=hardware, space_variables=variables or None),
            "making the Space",
        )
    elif private and not first.private:
        remote.set_private(True)

    def look() -> Space:
        there = _look(job)
        if there is None:
            raise ValueError(f"the Space '{name}' has just been deleted. Deploy again.")
        return _with_variables(remote, there)

    done = commit_until_done(look, partial(_plan, job), lambda change: send(remote, change), remote.say)
    there = done.there
    altered = _set_variables(remote, there.variables, _wanted(job, there))
    if first is not None and hardware is not None and there.hardware != hardware:
        remote.call(lambda: api.request_space_hardware(name, hardware), "asking for the hardware")  # type: ignore[arg-type]
        altered = True
    if private is False and there.private:
        remote.set_private(False)
        there = replace(there, private=False)
    result = _deployment(job, there, done.change, there.private)
    changed = done.sent or altered or first is None or there.private != first.private
    return replace(result, made=first is None, commit=done.commit, changed=changed)


def _set_variables(remote: Remote, there: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Bring the variables of the app up to date; tell whether any differed."""
    altered = [key for key in (DATASET, MODELS) if wanted.get(key) != there.get(key)]
    for key in altered:
        if key in wanted:
            call = partial(remote.api.add_space_variable, remote.repo_id, key, wanted[key])
        else:
            call = partial(remote.api.delete_space_variable, remote.repo_id, key)
        remote.call(call, "setting a variable")
    return bool(altered)


def _deployment(job: Deployment, there: Space | None, change: Change, private: bool | None) -> SpaceDeployment:
    seen = there.private if there and private is None else private is not False
    wanted = _wanted(job, there)
    differs = there is None or wanted != there.variables or seen != there.private
    return SpaceDeployment(
        repo_id=job.remote.repo_id, url=job.remote.url, made=there is None, changed=not change.empty or differs,
        commit=None, private=seen, hardware=job.hardware or (there.hardware if there else "cpu-basic"),
        variables=wanted, library=job.app.library, files=len(change.files),
        uploaded=tuple((file.path, file.size) for file in change.added), deleted=change.deleted, warnings=(),
    )  # fmt: skip


# --- until it runs ---


def _wait_until_it_runs(remote: Remote, done: SpaceDeployment, timeout: float) -> SpaceDeployment:
    """Look at the Space until it runs the commit, or cannot; a Space that sleeps is woken."""
    # Right after a commit the stage may be that of the commit before, which `HfApi.wait_for_space` would return. Here
    # an end is believed when the Space names the new commit, after another stage, or after `_GRACE` seconds.
    waited, woken = 0.0, False
    seen: list[str] = []
    while True:
        runtime = _runtime(remote, done)
        stage = str(runtime.stage)
        now = replace(done, stage=stage)
        if stage not in seen:
            remote.say(stage.lower().replace("_", " "))
            seen.append(stage)
        fresh = not done.changed or runtime.raw.get("sha") == done.commit or len(seen) > 1 or waited >= _GRACE
        if stage in ("SLEEPING", "STOPPED") and not woken:
            woken = True
            remote.call(lambda: remote.api.restart_space(remote.repo_id), "waking the Space")
        elif stage in _ENDS and (fresh or stage == "PAUSED"):
            if stage == "RUNNING":
                return now
            raise SpaceError(_why(remote, stage, str(runtime.raw.get("errorMessage") or "")), now)
        if waited >= timeout:
            raise SpaceError(
                f"'{remote.repo_id}' does not run after {timeout:.0f} s (stage {stage}). It goes on by itself; the log "
                f"is at {remote.url}?logs=build. Deploy again to wait once more, or raise `timeout`.",
                now,
            )
        pause = min(_POLL, timeout - waited)
        time.sleep(pause)
        waited += pause


def _runtime(remote: Remote, done: SpaceDeployment) -> Any:
    try:
        return remote.call(lambda: remote.api.get_space_runtime(remote.repo_id), "asking whether it runs")
    except Exception as error:
        if not passes(error):
            raise
        raise SpaceError(
            f"'{remote.repo_id}' is deployed, but whether it runs could not be asked ({brief(error)}). See "
            f"{remote.url}.",
            done,
        ) from error


def _why(remote: Remote, stage: str, said: str) -> str:
    if stage == "PAUSED":
        return f"'{remote.repo_id}' is paused, so it does not run. Restart it at {remote.url}/settings."
    if stage not in _LOG:
        return f"'{remote.repo_id}' is {stage.lower()}, so it does not run. See {remote.url}."
    words = {"BUILD_ERROR": "could not be built", "RUNTIME_ERROR": "could not be started"}
    shown = f": {' '.join(said.split())[:300]}" if said else ""
    return (
        f"'{remote.repo_id}' {words.get(stage, 'has no valid configuration')} ({stage}{shown}). The log is at "
        f"{remote.url}?logs={_LOG[stage]}."
    )
