"""`deploy_space`: make or update a Space that serves the app, in one commit, and wait until it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors

from hf_equiv.deployment import KIND, Deployment, SpaceDeployment
from hf_equiv.hubcalls import api_of, check_repo_id, explained, require_token
from hf_equiv.repository import Progress
from hf_equiv.spacefiles import DATASET, MODELS, app_of, datasets_in, models_in
from hf_equiv.spacestage import wait_until_it_runs


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
