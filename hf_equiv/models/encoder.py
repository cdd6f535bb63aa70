"""Load a Hub checkpoint as a function f from pixels in [0, 1] to an embedding."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.autograd import forward_ad

from hf_equiv.checks import check_tensor
from hf_equiv.data.image_file import to_image
from hf_equiv.derivatives import PlainStrides
from hf_equiv.formatting import excerpt
from hf_equiv.hub_client import version
from hf_equiv.memory import unless_memory
from hf_equiv.models import wrapping
from hf_equiv.models.checkpoint import Checkpoint, HubFiles, find_checkpoint
from hf_equiv.models.frozen import FrozenEncoder
from hf_equiv.models.loading import LoadedModel, find_device, load_model
from hf_equiv.models.preprocess import Preprocessor, load_preprocessor, normalise
from hf_equiv.models.readouts import Layout, check_size, embed, find_layout, native_size, probe, resolve_readout
from hf_equiv.models.structure import patch_weight
from hf_equiv.models.zero_shot import LabelEmbeddings, embed_labels, embed_texts
from hf_equiv.precision import InFloat64, exact_derivatives, no_autocast, no_tf32

_PACKAGES = ("hf_equiv", "torch", "transformers", "numpy", "pillow")


class Encoder(FrozenEncoder):
    """f: [0, 1]^(3·H·W) → R^D, z = readout(model((x − mean) / std)): one checkpoint, frozen, in eval mode.

    A plain callable: `z = encoder(pixels)` maps (B, 3, H, W) pixels in [0, 1] to (B, D). It normalises inside, is
    differentiable in the pixels, and gives an image the same embedding in every batch (to the bit on a CPU). Build one
    with `Encoder.from_pretrained`.

    Attributes:
        model_id: Hub id, folder or "builtin" that it was loaded from.
        revision: commit sha on the Hub, or "sha256:…" of the weights of a local folder.
        readout: the readout in use, never "auto".
        readouts: every readout of this checkpoint.
        embedding_dim: D.
        input_shape: (3, H, W) of preprocessed images; other sizes work if the model interpolates positions.
        normalize: whether embeddings are scaled to unit L2 norm.
        has_head: whether trained classification weights are in the checkpoint; a regression head has no classes.
        label_names: class names of that head in logit order; None without a head.
        multi_label: whether that head was trained for several labels an image: a sigmoid of each score, no softmax.
        dtype: floating-point type of weights and embeddings.
        device: device of the weights.

    Example:
        >>> import torch
        >>> from hf_equiv import Encoder
        >>> encoder = Encoder.from_pretrained("builtin")
        >>> encoder(torch.full((1, *encoder.input_shape), 0.5)).shape == (1, encoder.embedding_dim)
        True
    """

    def __init__(
        self, checkpoint: Checkpoint, loaded: LoadedModel, preprocessor: Preprocessor, device: torch.device,
        dtype: torch.dtype, *, readout: str, normalize: bool
    ) -> None:  # fmt: skip
        self._checkpoint, self._loaded, self._preprocessor = checkpoint, loaded, preprocessor
        self.model_id, self.revision, self.normalize = checkpoint.model_id, checkpoint.revision, normalize
        self.dtype, self.device = dtype, device
        self._mean, self._std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)
            for values in (preprocessor.scaling.mean, preprocessor.scaling.std)
        )
        self._batch_norm, self._native = loaded.has_batch_norm, native_size(loaded)
        size = preprocessor.size or self._native or (224, 224)
        self._sizes, self.input_shape = {size}, (3, *size)
        grey = torch.full((1, 3, *size), 0.5, dtype=dtype, device=device)
        super().__init__(loaded.model, loaded.attention, grey)
        self._layout = self._find_layout(size)
        self.readouts = self._layout.available
        self.readout = resolve_readout(readout, self._layout, self.model_id)
        with torch.no_grad():
            z = self(grey)
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"'{self.model_id}' must give finite embeddings; that of a grey image holds NaN or infinity in "
                f"{str(dtype).removeprefix('torch.')}. Check the weights, or use another dtype."
            )
        self.embedding_dim = int(z.shape[1])
        config = loaded.model.config
        names, kind = getattr(config, "id2label", None) or {}, getattr(config, "problem_type", None)
        regression = kind == "regression" or (kind is None and len(names) == 1)  # the rule of transformers
        self.has_head = loaded.has_head and not regression
        self.label_names = tuple(str(names[k]) for k in sorted(names)) if self.has_head else None
        self.multi_label = self.has_head and kind == "multi_label_classification"
        self._labels: dict[tuple[str, ...], LabelEmbeddings] = {}
        self._texts: dict[str, Tensor] = {}

    def _find_layout(self, size: tuple[int, int]) -> Layout:
        """Read the layout off one forward pass of two images, or refuse a model that cannot embed them."""
        name = type(self._loaded.backbone).__name__
        try:
            two = self._normalise(self._trial.expand(2, -1, -1, -1))
            outputs = probe(self._loaded, two, self._interpolates(self._trial))
        except unless_memory(Exception) as error:
            raise ValueError(
                f"`model_id` must embed RGB images of {size[0]}×{size[1]}, the size of its image processor; {name} of "
                f"'{self.model_id}' cannot ({excerpt(error)}). Choose an image encoder, or correct its files."
            ) from error
        return find_layout(self._loaded, outputs, size)

    def _normalise(self, pixels: Tensor) -> Tensor:
        x = normalise(pixels, self._mean, self._std)
        return x.flip(1) if self._preprocessor.scaling.flipped else x

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        readout: str = "auto",
        normalize: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> Encoder:
        """Load the image encoder of a checkpoint: one model, with its classification head if the checkpoint has one.

        It takes any vision model of transformers that maps pixels to hidden states, and the vision tower of CLIP and
        SigLIP. Weights are read from safetensors only, and all files belong to one commit.

        Args:
            model_id: Hub id, local folder, or "builtin" (a small ViT that ships with the package).
            readout: "cls", "mean", "pooler", "tokens", "logits", "hidden:K", "projection", or "auto": the image
                embedding for CLIP and SigLIP; else the pooler if its weights are in the checkpoint; else the class
                token; else the mean.
            normalize: whether to scale embeddings to unit L2 norm.
            revision: branch, tag or commit on the Hub; None for the default branch.
            subfolder: folder of the model inside the repository or `model_id`.
            token: Hub access token; None for the stored one.
            cache_dir: cache of Hub files; None for the Hub's default.
            local_files_only: whether to use cached files only.
            trust_remote_code: whether to run Python code that the checkpoint brings.
            dtype: type of weights and embeddings; in half precision, rounding moves an embedding more than 8-bit steps.
            device: device to run on; None for CUDA if present, else the CPU.

        Returns:
            The encoder, frozen and in eval mode.

        Raises:
            TypeError: `dtype` is not a floating-point type.
            ValueError: no image encoder, no such readout or device, or weights missing from the checkpoint.
            FileNotFoundError: the folder, its safetensors or its image processor file is absent.
            OSError: a damaged file, or the Hub's own error (RepositoryNotFoundError, GatedRepoError, no network).
        """
        place = find_device(dtype, device)
        cache = None if cache_dir is None else os.fspath(cache_dir)
        hub = HubFiles(os.fspath(model_id), "", subfolder, token, cache, local_files_only)
        checkpoint = find_checkpoint(hub, revision, trust_remote_code)
        loaded, preprocessor = load_model(checkpoint, dtype, place), load_preprocessor(checkpoint)
        return cls(checkpoint, loaded, preprocessor, place, dtype, readout=readout, normalize=normalize)

    @classmethod
    def wrap(
        cls,
        module: torch.nn.Module,
        *,
        size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        head: torch.nn.Module | None = None,
        labels: Sequence[str] | None = None,
        name: str | None = None,
        normalize: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> Encoder:
        """Make an encoder of any torch module, such as one of timm or torchvision, or your own.

        z = module((x − mean) / std), flattened to (B, D). `preprocess` resizes the short side of a photo to `size`
        (bicubic) and cuts out the centre. The module is copied, frozen and put into eval mode.

        Args:
            module: maps normalised images (B, 3, H, W) to one tensor (B, …).
            size: side or (H, W) of the images; None for that of timm's `pretrained_cfg`, else 224.
            mean: mean of each channel, or of all; None for that of timm's `pretrained_cfg`.
            std: standard deviation, in the same way. A module that normalises by itself takes mean=0 and std=1.
            head: maps embeddings (B, D) to class scores; None if the output of `module` is the scores.
            labels: class names in the order of the scores; None if there are no classes.
            name: name for records; None for the class of `module`.
            normalize: whether to scale embeddings to unit L2 norm.
            dtype: type of weights and embeddings.
            device: device to run on; None for CUDA if present, else the CPU.

        Returns:
            The encoder, with the readout "output" and the SHA-256 of the weights as its revision.

        Raises:
            TypeError: `dtype` is not a floating-point type, or `module` is not a torch module.
            ValueError: `mean` or `std` is unknown or bad, or `labels` do not fit the scores.

        Example:
            >>> import torch
            >>> from hf_equiv import Encoder
            >>> body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(2))
            >>> Encoder.wrap(body, size=16, mean=0.5, std=0.5).embedding_dim
            32
        """
        place = find_device(dtype, device)
        parts = wrapping.wrap_module(module, size, mean, std, head, labels, name, dtype, place)
        encoder = cls(*parts, place, dtype, readout="auto", normalize=normalize)
        if labels is not None:
            wrapping.check_labels(encoder.classify(encoder._trial), labels)
        return encoder

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding z = f(x) of each image, (B, D), differentiable in the pixels.

        Float32 is float32 (TF32 and autocast are off), and float64 and forward mode use an attention kernel that
        supports them. Wrap a double backward in `precision.exact_derivatives` yourself, and a backward pass in
        `no_tf32` and `no_autocast`. Values outside [0, 1] are accepted, since finite differences step over the edge.

        Args:
            pixels: (B, 3, H, W), in [0, 1], on the encoder's device; cast to its dtype.

        Returns:
            (B, D) in the encoder's dtype; with `normalize=True` the rows have unit L2 norm.
        """
        self._check(pixels)
        z = self._embed(pixels, self.readout)
        return z / z.norm(dim=1, keepdim=True) if self.normalize else z

    def _embed(self, pixels: Tensor, readout: str) -> Tensor:
        exact = self.dtype == torch.float64
        # On a CPU, products of all types but float32 round by their number of rows: embed one image at a time, so that
        # an embedding does not depend on the batch.
        alone = self.dtype != torch.float32 or self._layout.alone
        if pixels.shape[0] > 1 and pixels.device.type == "cpu" and alone:
            return torch.cat([self._embed(one, readout) for one in pixels.split(1)])
        with ExitStack() as rules, no_tf32(), no_autocast():
            if exact or forward_ad.unpack_dual(pixels).tangent is not None:
                rules.enter_context(exact_derivatives())
            if exact:
                rules.enter_context(InFloat64())
            if self._batch_norm:
                rules.enter_context(PlainStrides())
            x = self._normalise(pixels.to(self.dtype))
            return embed(self._loaded, self._layout, readout, x, self._interpolates(pixels))

    def _check(self, pixels: Tensor) -> None:
        """Require a float tensor (B, 3, H, W) on this device, with a size that the model takes."""
        check_tensor(pixels, "pixels", "3")
        if pixels.device != self.device:
            raise ValueError(
                f"`pixels` must be on {self.device}; got {pixels.device}. Use `pixels.to(encoder.device)`."
            )
        size = (int(pixels.shape[2]), int(pixels.shape[3]))
        if size not in self._sizes:
            check_size(self._loaded, self._layout, size, self._native or self.input_shape[1:], self._mean)
            self._sizes.add(size)

    def _interpolates(self, pixels: Tensor) -> bool:
        return self._native is not None and tuple(pixels.shape[2:]) != self._native

    def preprocess(self, images: Any) -> Tensor:
        """Return the output of the checkpoint's own image processor before it normalises, (B, 3, H, W).

        It equals bit for bit the processor that transformers selects in this environment; `provenance` records it.

        Args:
            images: one image or a sequence of them: paths, PIL images, arrays (H, W, 3), tensors (3, H, W), or what
                `load_images` gives. Integers are levels from 0 to 255; floating-point values lie in [0, 1] and are
                rounded to the nearest level. Transparent pixels are laid over white.

        Returns:
            (B, 3, H, W) float32 in [0, 1], every value k/255; derivatives in float64 need `.double()` of it.

        Raises:
            ValueError: this environment cannot run the processor (DINOv3's needs torchvision), or split it exactly.
        """
        return self._preprocessor(images)

    def to_pil(self, images: Tensor) -> list[Image]:
        """Return pixels as PIL images, each value rounded to the nearest k/255.

        Args:
            images: (B, 3, H, W) or (3, H, W), in [0, 1].

        Returns:
            One image for each of the batch.
        """
        return [to_image(one) for one in (images if images.ndim == 4 else images[None])]

    def classify(self, pixels: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        """Return class scores s(x) before the softmax, (B, num_classes), for one forward pass.

        Without `labels`, they are the scores of the checkpoint's own head, named by `label_names`. With `labels`,
        zero-shot: s = scale · cos(image embedding, text embedding of "a photo of a {label}.") + bias, for CLIP and
        SigLIP.

        Args:
            pixels: (B, 3, H, W), in [0, 1].
            labels: class names for zero-shot classification; None for the head.

        Returns:
            (B, num_classes), differentiable; SigLIP's scores and those of a `multi_label` head belong to a sigmoid per
            label, all others to a softmax.

        Raises:
            ValueError: the checkpoint has no head (without `labels`) or no text encoder (with `labels`).

        References:
            Radford et al. 2021, arXiv:2103.00020, §3.1; Zhai et al. 2023, arXiv:2303.15343.
        """
        self._check(pixels)
        two_tower = self._loaded.two_tower
        if labels is not None:
            if not two_tower:
                advice = "Leave it out: the checkpoint has a head." if self.has_head else "Use CLIP or SigLIP."
                raise ValueError(f"`labels` must be None for '{self.model_id}': it has no text encoder. {advice}")
            key = tuple(labels)
            if isinstance(labels, str) or key not in self._labels:
                self._labels[key] = embed_labels(self._checkpoint, labels, self.dtype, self.device)
            return self._labels[key].logits(self._embed(pixels, "projection"))
        if not self.has_head:
            advice = "Pass `labels`." if two_tower else "Use a checkpoint fine-tuned for classification."
            if self._loaded.has_head:
                advice = "Its head is one of regression: use readout='logits'."
            raise ValueError(f"`classify` must have a classification head; '{self.model_id}' has none. {advice}")
        return self._embed(pixels, "logits")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the unit text embeddings of a two-tower model, which its image embeddings are compared with.

        They are z/‖z‖ of `get_text_features`: no scaling of single components, which would change their direction.
        Texts that were embedded before cost nothing.

        Args:
            texts: texts as they are, without a prompt around them.

        Returns:
            (B, D), each row of unit L2 norm.

        Raises:
            TypeError: a single string, or no strings.
            ValueError: a model without text encoder, another readout than "projection", or a text that is too long.
            OSError: no tokenizer files, or a text of unknown tokens alone.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("`texts` must be a sequence of strings; got something else. Pass [text].")
        if not texts:
            raise ValueError("`texts` must hold at least one text; got none. Pass [text].")
        loaded = getattr(self, "_loaded", None)  # a joint encoder has none
        if loaded is None or not loaded.two_tower or self.readout != "projection":
            raise ValueError(
                f"texts must come with a model of images and texts, and its readout 'projection'; '{self.model_id}' "
                f"has the readout {self.readout!r}. Use CLIP or SigLIP, or images as targets."
            )
        if new := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            found = embed_texts(self._checkpoint, new, self.dtype, self.device).features
            self._texts |= dict(zip(new, found, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def in_dtype(self, dtype: torch.dtype) -> Encoder:
        """Return the same function in another floating-point type, with weights of its own.

        Args:
            dtype: type of weights and embeddings.

        Returns:
            The copy, on the same device.
        """
        return restated(self, self.readout, self.normalize, dtype, self.device)

    @property
    def pixel_std(self) -> Tensor:
        """The standard deviation (3,) that divides each channel: one normalised-pixel unit in [0, 1]."""
        return self._std.flatten()

    @property
    def patch_weight(self) -> Tensor | None:
        """The weight (D, 3, p, p) of the patch embedding, per pixel in [0, 1]; None for models without one."""
        flipped = self._preprocessor.scaling.flipped
        weight = patch_weight(self._loaded.model, self._std.flip(1) if flipped else self._std)
        return weight.flip(1) if flipped and weight is not None else weight

    @property
    def provenance(self) -> dict[str, str]:
        """The record of the encoder in every row, with the name of a local folder and the digest of its weights."""
        return {
            "model_id": self._checkpoint.name,
            "model_revision": self.revision,
            "readout": self.readout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self._attention,
            "processor": self._preprocessor.record,
            "versions": json.dumps({name: version(name) for name in _PACKAGES}),
        }

    def __repr__(self) -> str:
        """State the checkpoint, the map and the device in one line."""
        size, dtype = "×".join(map(str, self.input_shape)), str(self.dtype).removeprefix("torch.")
        readout = repr(self.readout) + (", normalize=True" if self.normalize else "")
        what = f"{self.model_id!r} @ {self.revision[:14]}: {size} -> {self.embedding_dim}"
        return f"Encoder({what}, readout={readout}, {dtype} on {self.device})"


def restated(
    encoder: Encoder, readout: str, normalize: bool, dtype: torch.dtype, device: str | torch.device | None,
    name: str = "",
) -> Encoder:  # fmt: skip
    """Return a copy of an encoder with other options and, if one is given, another name; "auto" keeps its readout."""
    place = find_device(dtype, device)
    checkpoint = replace(encoder._checkpoint, model_id=name) if name else encoder._checkpoint
    readout = encoder.readout if readout == "auto" else readout
    loaded, preprocessor = encoder._loaded.copied(dtype, place), encoder._preprocessor
    return Encoder(checkpoint, loaded, preprocessor, place, dtype, readout=readout, normalize=normalize)
