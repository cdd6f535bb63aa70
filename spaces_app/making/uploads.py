"""Take photos of visitors: one component, one reader for all formats, and limits of all uploads together."""

from __future__ import annotations

import io
import os
import threading
import time
from abc import ABCMeta
from collections import deque
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL.Image import Image
from shelf import HOUR, file_of, refused
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hf_equiv.data.image_file import RefusedError, open_image
from making.jobs import address_of

LARGEST = 25 * 2**20
MOST_PIXELS = 65_000_000
OF_ADDRESS, OF_ALL = 300 * 2**20, 4 * 2**30
"""Most bytes that one address, and all together, may upload in an hour; files are deleted after an hour."""

_UNSEEN = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"P")
"""First bytes of the files that browsers do not show: TIFF, JPEG 2000, PPM."""


def _path_of(_: gr.Image, payload: ImageData | None) -> str | None:
    return payload.path if payload else None


# A photo of a visitor as the path of the file as it was sent: nothing decodes it before `read_upload`. It is a class,
# since gradio makes the component of a session anew once an answer changes it. gradio's own way to make a class would
# write a stub file beside this one.
Photo = ABCMeta.__new__(
    type(gr.Image), "Photo", (gr.Image,), {"preprocess": _path_of, "is_template": True, "__module__": __name__}
)


def read_upload(path: str | None, label: str) -> Image:
    """Open a visitor's file as an image without metadata; `label` is that of its component."""
    if not path:
        raise refused(f"Choose a photo for “{label}” first.")
    try:
        if os.path.getsize(path) > LARGEST:
            raise refused(f"The photo for “{label}” is larger than 25 MB. Shrink it first.")
        return open_image(Path(path).read_bytes(), label, most_pixels=MOST_PIXELS)
    except OSError as error:
        raise refused(f"The photo for “{label}” is gone: files are deleted after an hour. Choose it again.") from error
    except RefusedError as error:
        told = f"This photo has over {MOST_PIXELS / 1e6:.0f} megapixels, or a rare format. Save it as a smaller JPEG."
        raise refused(told) from error
    except ValueError as error:
        if error.__cause__:
            raise refused("This photo is damaged. Copy or download it again.") from error
        raise refused("This is not a picture. Choose a JPEG, PNG, WebP, GIF, BMP or TIFF file.") from error


def shown(path: str, image: Image) -> str | None:
    """Return a PNG file with the same pixels for formats that browsers do not show; None for the others."""
    with Path(path).open("rb") as file:
        if not file.read(8).startswith(_UNSEEN):
            return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    if buffer.tell() > LARGEST:
        raise refused("The photo takes more than 25 MB without loss. Make it smaller, or save it as JPEG.")
    return file_of(buffer.getvalue(), f"{Path(path).stem[:60]}.png")


class UploadLimit:
    """Refuse uploads beyond the limits of an hour; gradio itself only limits the size of one file."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._lock = app, threading.Lock()
        self._taken: deque[tuple[float, str, int]] = deque()  # time, address, bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on all requests but uploads that are too many or of unknown size."""
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            request = Request(scope)
            size = request.headers.get("content-length", "")
            if not size.isdecimal():
                app = PlainTextResponse("State the size of the upload.", 411)
            elif not self._take(address_of(request), int(size)):
                app = PlainTextResponse("That was a lot of uploads for one hour. Try again later.", 429)
        await app(scope, receive, send)

    def _take(self, address: str, size: int) -> bool:
        now = time.monotonic()
        with self._lock:
            while self._taken and now - self._taken[0][0] > HOUR:
                self._taken.popleft()
            own = sum(taken for _, who, taken in self._taken if who == address)
            free = own + size <= OF_ADDRESS and sum(taken for *_, taken in self._taken) + size <= OF_ALL
            if free:
                self._taken.append((now, address, size))
            return free
