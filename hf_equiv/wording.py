"""Messages of the Python interface in the words of the command line: `max_evals` becomes --max-evals."""

from __future__ import annotations

import re
import shlex

NAMES = (
    "source", "target", "data", "pairs", "solver", "radius", "norm", "rtol", "max_evals", "labels", "out", "overwrite",
    "seed", "revision", "readout", "normalize", "device", "dtype", "batch_size", "image_column", "label_column",
    "cache_dir", "local_files_only", "limit", "k", "vectors", "directions", "radii", "regional", "linearity", "heading",
    "step", "num_steps", "stop", "create_pr", "license", "i_have_the_right", "withhold_photos", "collection",
    "compile", "streaming",
    "transfer", "label_data", "dataset", "hardware", "wheel", "force", "timeout", "host", "port",
)  # fmt: skip
"""Keywords that are flags with the same name."""

_FLAGS = {name: "--" + name.replace("_", "-") for name in NAMES} | {
    "model_id": "MODEL",
    "repo_id": "USER/NAME",
    "models": "--model",
}
_PHRASES = (
    (" must be None", " must be left out"),
    (", or pass `token=False`", ""),
    ("pass `token`", "set HF_TOKEN"),
    (" and `subfolder`", ""),
    ("`trust_remote_code` must be True for", "remote code would have to be on for"),
    ("then pass `trust_remote_code=True`", "then load it from Python"),
    ("Pass pixels (B", "From Python, pass pixels (B"),
)
"""What the command line says otherwise, or has no flag for."""

_KEYWORD = re.compile(r"`(\w+)`|(?<![\w?&/.=-])`?(\w+)=(?:'([^'`]*)'|([^\s'`,;)]*[^\s'`,;).]))`?")


def in_flags(message: str) -> str:
    """Return `message` with flags in place of keywords in backticks or with a value.

    Args:
        message: of an error or a status.

    Returns:
        The same for the command line.

    Example:
        >>> in_flags("`model_id` must be cached for `local_files_only=True`. Raise `max_evals` or use device='cpu'.")
        'MODEL must be cached for --local-files-only. Raise --max-evals or use --device cpu.'
    """

    def flag(found: re.Match[str]) -> str:
        name, keyword, quoted, plain = found.groups()
        value = quoted if quoted is not None else plain
        told = _FLAGS.get(name or keyword)
        if told is None:
            return found.group()
        return told if value in (None, "True") else f"{told} {value}"

    for python, here in _PHRASES:
        message = message.replace(python, here)
    return _KEYWORD.sub(flag, message)


def verify_command(folder: object, model: str, revision: str) -> str:
    """Return the command that checks a run directory; it names a local checkpoint, whose path no run records.

    Args:
        folder: run directory.
        model: the checkpoint as the user named it.
        revision: of the checkpoint; "sha256:…" for a local folder.

    Returns:
        The command line.
    """
    local = revision.startswith("sha256:") and model != "builtin"
    return shlex.join(["hf-equiv", "verify", str(folder), *(["--model", model] if local else [])])
