"""From the commit to a Space that runs: looking at its stage until it does, or cannot."""

from __future__ import annotations

import time
from dataclasses import replace

from huggingface_hub import SpaceRuntime

from hf_equiv.deployment import Deployment, SpaceDeployment
from hf_equiv.hubcalls import brief, passes

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
