"""Join several encoders into one, so that a match has an error for each of them, and a spectrum belongs to all."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_equiv.checks import check_tensor
from hf_equiv.data.back_projection import back_project
from hf_equiv.data.resampling import View, view_of
from hf_equiv.formatting import JOINED
from hf_equiv.geometry.zeros import LeftRelation
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.frozen import FrozenEncoder
from hf_equiv.precision import no_autocast, no_tf32


class JointEncoder(Encoder):
    """z = (f₁(R₁x)/s₁, f₂(R₂x)/s₂, …): the embeddings of one image by several encoders, one after the other.

    The image has the largest input size among the models. A model of that size sees the image itself (R = identity); a
    smaller one sees it as its own image processor sees a file of that size. The s are norms of embeddings of random
    colours, so that no model outweighs another. It has the attributes of an `Encoder`, and works wherever one does.

    Calling it is smooth: R resizes without rounding to 8 bit. `of_files` rounds as the processors do.

    Args:
        encoders: at least two different ones, on one device and of one dtype.

    Attributes:
        parts: the encoders.
        views: R of each; None for the identity.
        scales: s of each.

    Raises:
        ValueError: fewer than two encoders, one twice, different devices, dtypes or `normalize`, no input size that is
            the largest in height and width, or an image processor that does more than to resize and crop.

    Example:
        >>> from hf_equiv import Encoder, JointEncoder
        >>> both = JointEncoder([Encoder.from_pretrained(name) for name in ("builtin", "builtin-64")])
        >>> both.input_shape, both.embedding_dim
        ((3, 224, 224), 384)
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        self.parts = tuple(part for one in encoders for part in getattr(one, "parts", (one,)))
        self._check_parts()
        first = self._first = max(self.parts, key=lambda one: math.prod(one.input_shape))
        self.input_shape = first.input_shape
        self.device, self.dtype, self.normalize = first.device, first.dtype, first.normalize
        self.views = tuple(self._view_of(one) for one in self.parts)
        self.sizes = [one.embedding_dim for one in self.parts]
        self.embedding_dim = sum(self.sizes)
        self.model_id, self.revision = (
            JOINED.join(str(getattr(one, name)) for one in self.parts) for name in ("model_id", "revision")
        )
        self.readout = _joined(one.readout for one in self.parts)
        self.readouts = tuple(name for name in first.readouts if all(name in one.readouts for one in self.parts))
        self._headed = next((one for one in self.parts if one.has_head), first)
        self.has_head, self.label_names = self._headed.has_head, self._headed.label_names
        self.multi_label = self._headed.multi_label
        self._exact = False
        grey = torch.full((1, *self.input_shape), 0.5, dtype=self.dtype, device=self.device)
        FrozenEncoder.__init__(self, first._network, _joined(one._attention for one in self.parts), grey)
        self.scales = [_scale(one) for one in self.parts]

    def _check_parts(self) -> None:
        wanted = "`encoders` must be at least two different encoders"
        if len(self.parts) < 2 or not all(isinstance(one, Encoder) for one in self.parts):
            raise ValueError(f"{wanted}; got {list(self.parts)!r:.160}. Use `Encoder` for one.")
        kinds = [(one.revision, one.readout, one.input_shape) for one in self.parts]
        if twice := next((one for k, one in enumerate(self.parts) if kinds[k] in kinds[:k]), None):
            raise ValueError(f"{wanted}; got '{twice.model_id}' twice. Name each model once.")
        for name in ("device", "dtype", "normalize"):
            if len(values := {str(getattr(one, name)) for one in self.parts}) > 1:
                raise ValueError(
                    f"`encoders` must have one `{name}`; got {', '.join(sorted(values))}. Load them alike."
                )
        sides = [max(one.input_shape[axis] for one in self.parts) for axis in (1, 2)]
        if not any(list(one.input_shape[1:]) == sides for one in self.parts):
            sizes = ", ".join(f"{one.input_shape[1]} × {one.input_shape[2]} ('{one.model_id}')" for one in self.parts)
            raise ValueError(
                f"`encoders` must have an input size that is the largest in height and width; got {sizes}. Leave one "
                "of them out."
            )

    def _view_of(self, one: Encoder) -> View | None:
        return None if one.input_shape == self.input_shape else view_of(one, *self.input_shape[:0:-1])

    @classmethod
    def from_pretrained(
        cls, model_id: str | os.PathLike[str] | Sequence[str], *, readout: str = "auto", revision: str | None = None,
        **options: Any,
    ) -> JointEncoder:  # fmt: skip
        """Load several checkpoints, each as `Encoder.from_pretrained` does.

        Args:
            model_id: Hub ids, local folders or names of built-in checkpoints, in a sequence or joined by " + ".
            readout: readout of all, or one for each, joined by " + ".
            revision: revision of each, joined by " + ", "sha256:…" for a local folder; None for the usual ones.
            options: other options of `Encoder.from_pretrained`, for all.

        Returns:
            The joint encoder.
        """
        names = os.fspath(model_id).split(JOINED) if isinstance(model_id, str | os.PathLike) else model_id
        readouts = each("readout", readout, len(names))
        revisions = each("revision", revision or "sha256:", len(names), alike=revision is None)
        made = [
            Encoder.from_pretrained(name, readout=one, revision=None if sha.startswith("sha256:") else sha, **options)
            for name, one, sha in zip(names, readouts, revisions, strict=True)
        ]
        return cls(made)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the joint embedding of each image, (B, D), differentiable in the pixels unless `of_files` made it.

        Args:
            pixels: (B, 3, H, W), in [0, 1], of `input_shape`.

        Returns:
            (B, D) in the dtype of the encoders.
        """
        seen = self.seen(pixels)
        parts = zip(self.parts, seen, self.scales, strict=True)
        return torch.cat([one(x) / scale for one, x, scale in parts], dim=1)

    def seen(self, pixels: Tensor) -> list[Tensor]:
        """Return the images that the models see, (B, 3, h, w) each.

        Args:
            pixels: (B, 3, H, W), in [0, 1].

        Returns:
            One batch for each model.
        """
        self._check(pixels)
        x = pixels.to(self.dtype)
        with no_tf32(), no_autocast():
            return [x if view is None else view.levels_of(x) if self._exact else view.smooth(x) for view in self.views]

    def _check(self, pixels: Tensor) -> None:
        check_tensor(pixels, "pixels", "3")
        if tuple(pixels.shape[1:]) != tuple(self.input_shape):
            raise ValueError(
                f"`pixels` must have the shape (B, {', '.join(map(str, self.input_shape))}) of this joint encoder; got "
                f"{tuple(pixels.shape)}. Use `encoder.preprocess(...)`."
            )

    def with_views(self, pixels: Tensor, seen: Sequence[Tensor | None]) -> Tensor:
        """Return the nearest 8-bit image in which smaller models see given 8-bit images, where there is one.

        Args:
            pixels: (3, H, W), in [0, 1].
            seen: for each model the image (3, h, w) on k/255 that it is to see; None for any.

        Returns:
            (3, H, W) on k/255. With views of several sizes, it is exact for the last one alone.
        """
        levels = (255 * pixels.double()).round().to("cpu", torch.uint8).permute(1, 2, 0)
        for view, x in zip(self.views, seen, strict=True):
            if view is not None and x is not None:
                levels = back_project(levels, view, (255 * x.double()).round().to("cpu", torch.uint8).permute(1, 2, 0))
        return (levels.permute(2, 0, 1).double() / 255).to(pixels)

    def split(self, z: Tensor) -> list[Tensor]:
        """Return the embeddings (…, D_i) of each model in a joint one (…, D), in its own units.

        Args:
            z: joint embeddings.

        Returns:
            One tensor for each model.
        """
        return [part * scale for part, scale in zip(z.split(self.sizes, dim=-1), self.scales, strict=True)]

    def joint_rtol(self, z: Tensor, rtol: float) -> float:
        """Return the error of a joint embedding up to which the error of each model is at most `rtol`.

        Args:
            z: the target, (D,).
            rtol: embedding error of each model.

        Returns:
            rtol · min_i ‖z_i‖ / ‖z‖.
        """
        return rtol * float(
            torch.stack([part.double().norm() for part in z.split(self.sizes)]).min() / z.double().norm()
        )

    def of_files(self) -> JointEncoder:
        """Return the map of 8-bit images as the models see their files: each smaller image is rounded to 8 bit.

        Returns:
            The same encoder where all models have one input size. It has no derivatives where they do not.
        """
        return self._like(self.parts, exact=True)

    def _like(self, parts: Sequence[Encoder], *, exact: bool) -> JointEncoder:
        """Return a copy with the same embeddings by other copies of the models."""
        made = copy.copy(self)
        made.parts, made._first, made._twin = tuple(parts), parts[self.parts.index(self._first)], None
        made._headed, made._exact, made.admitted = parts[self.parts.index(self._headed)], exact, {}
        made.dtype, made.device = made._first.dtype, made._first.device
        made._trial = self._trial.to(made.device, made.dtype)
        return made

    def in_dtype(self, dtype: torch.dtype) -> JointEncoder:
        """Return the same function in another floating-point type, with weights of its own.

        Args:
            dtype: type of weights and embeddings.

        Returns:
            The copy, on the same device.
        """
        return self._like([one.in_dtype(dtype) for one in self.parts], exact=self._exact)

    def preprocess(self, images: Any) -> Tensor:
        """Return images as the processor of the model with the largest input gives them: see `Encoder.preprocess`.

        Args:
            images: one image or a sequence of them.

        Returns:
            (B, 3, H, W) float32 in [0, 1], every value k/255.
        """
        return self._first.preprocess(images)

    def classify(self, pixels: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        """Return class scores of the first model that has a head, or zero-shot ones of the first that can.

        Args:
            pixels: (B, 3, H, W), in [0, 1].
            labels: class names for zero-shot classification; None for the head.

        Returns:
            (B, num_classes), as `Encoder.classify` returns them.
        """
        two_towers = [one for one in self.parts if one._loaded.two_tower]
        used = self._headed if labels is None or not two_towers else two_towers[0]
        return used.classify(self.seen(pixels)[self.parts.index(used)], labels)

    def left_relations(self, image: Tensor) -> tuple[LeftRelation, ...]:
        """Return the relations of each model, with zeros for the others, and rows drawn back to the joint image.

        Args:
            image: (3, H, W), in [0, 1].

        Returns:
            The relations, exact zeros first.
        """
        exact, near, start = dict[str, list[Tensor]](), list[LeftRelation](), 0
        x = image[None].detach().double().requires_grad_(True)
        for one, view, scale in zip(self.parts, self.views, self.scales, strict=True):
            seen = x if view is None else view.smooth(x)
            for relation in one.left_relations(seen[0].detach().to(image)):
                left = relation.left.new_zeros((self.embedding_dim, relation.left.shape[1]))
                left[start : start + one.embedding_dim] = relation.left
                if relation.rows is None:
                    exact.setdefault(relation.cause, []).append(left)
                    continue
                rows = relation.rows.to(x) / scale
                if view is not None:
                    drawn = [torch.autograd.grad(seen, x, row.view_as(seen), retain_graph=True)[0] for row in rows]
                    rows = torch.stack(drawn).flatten(1)
                near.append(LeftRelation(relation.cause, left, rows))
            start += one.embedding_dim
        return *(LeftRelation(cause, torch.cat(left, dim=1)) for cause, left in exact.items()), *near

    def least_errors(self, image: Tensor, z: Tensor) -> Tensor:
        """Return ‖y − z‖ / ‖z‖ of the nearest joint embedding y that the last layers allow: no image comes nearer.

        Args:
            image: (3, H, W), in [0, 1].
            z: joint embeddings, (B, D).

        Returns:
            (B,) float64; 0 where nothing is known.
        """
        parts = zip(self.parts, self.seen(image[None]), self.split(z), self.scales, strict=True)
        squares = [
            (one.least_errors(x[0], own) * own.double().norm(dim=1) / scale).square() for one, x, own, scale in parts
        ]
        return torch.stack(squares).sum(dim=0).sqrt() / z.double().norm(dim=1)

    @property
    def pixel_std(self) -> Tensor:
        """The standard deviation (3,) of the model with the largest input."""
        return self._first.pixel_std

    @property
    def patch_weight(self) -> None:
        """None: there is no one patch embedding."""
        return None

    @property
    def provenance(self) -> dict[str, str]:
        """The record of all models in every row: names, revisions and readouts, joined by " + "."""
        own = [one.provenance for one in self.parts]
        processors = [json.loads(one["processor"]) for one in own]
        processor = {key: [one.get(key) for one in processors] for key in ("image_mean", "image_std")}
        joined: dict[str, Callable[..., str]] = {"model_id": JOINED.join, "model_revision": JOINED.join}
        return {key: joined.get(key, _joined)([one[key] for one in own]) for key in own[0]} | {
            "processor": json.dumps(processor | {"models": processors}, sort_keys=True)
        }

    def __repr__(self) -> str:
        """State the models, the map and the device in one line."""
        size, dtype = "×".join(map(str, self.input_shape)), str(self.dtype).removeprefix("torch.")
        names = JOINED.join(repr(one.model_id) for one in self.parts)
        return f"JointEncoder({names}: {size} -> {self.embedding_dim}, {dtype} on {self.device})"


def _scale(one: Encoder) -> float:
    """Return the usual norm of an embedding, to two digits, so that it is the same on every machine."""
    colours = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(colours, one.input_shape[1:], mode="bilinear")
    with torch.no_grad():
        size = float(one(images.to(one.device, one.dtype)).norm(dim=1).mean())
    return float(f"{size:.2g}") or 1.0


def _joined(values: Any) -> str:
    """Join texts, one for each model; equal ones are stated once."""
    values = [str(value) for value in values]
    return values[0] if len(set(values)) == 1 else JOINED.join(values)


def each(name: str, text: str, count: int, *, alike: bool = True) -> list[str]:
    """Return the option of each of several models, from one text for each, or if they may be `alike` one for all."""
    values = text.split(JOINED)
    if len(values) == 1 and alike:
        return values * count
    if len(values) != count:
        told = f"`{name}` must be one for each of the {count} models, joined by '{JOINED}'"
        raise ValueError(
            f"{told}{', or one for all' if alike else ''}; got {text!r}. Leave it out, or state one for each."
        )
    return values
