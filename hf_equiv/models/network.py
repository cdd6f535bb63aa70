"""Map raw pixels through the network of a checkpoint: normalisation inside, every readout, true float32."""

from __future__ import annotations

import json
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_equiv.hub_client import version
from hf_equiv.models.loading import LoadedModel
from hf_equiv.models.preprocess import Preprocessor, normalise
from hf_equiv.models.readouts import check_pixels, check_size, embed, find_layout, native_size, probe
from hf_equiv.precision import exact_derivatives, float64_softmax, no_autocast, no_tf32

_PACKAGES = ("hf_equiv", "torch", "transformers", "numpy", "pillow")


class Network:
    """(x, readout) → z = readout(model((x − mean) / std)) for x (B, 3, H, W) in [0, 1], in one dtype on one device.

    It makes a model a function that can be analysed: an embedding does not depend on the batch, TF32 and autocast are
    off, and float64 and forward mode use an attention kernel that supports them.
    """

    def __init__(
        self, loaded: LoadedModel, preprocessor: Preprocessor, dtype: torch.dtype, device: torch.device
    ) -> None:
        loaded.to(device)
        self.loaded, self.preprocessor, self.dtype = loaded, preprocessor, dtype
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)
            for values in (preprocessor.mean, preprocessor.std)
        )
        self._native = native_size(loaded)
        size = preprocessor.size or self._native or (224, 224)
        self._sizes = {size}
        self.grey = torch.full((1, 3, *size), 0.5, dtype=dtype, device=device)
        outputs = probe(loaded, normalise(self.grey, self.mean, self.std), interpolate=self._interpolates(self.grey))
        self.layout = find_layout(loaded, outputs, size)

    def __call__(self, pixels: Tensor, readout: str) -> Tensor:
        """Return the embeddings (B, D) of checked pixels (B, 3, H, W), differentiable in them."""
        exact = self.dtype == torch.float64
        # On a CPU, products of all types but float32 round by their number of rows: embed one image at a time, so that
        # an embedding does not depend on the batch.
        alone = self.dtype != torch.float32 or self.layout.alone
        if pixels.shape[0] > 1 and pixels.device.type == "cpu" and alone:
            return torch.cat([self(one, readout) for one in pixels.split(1)])
        with ExitStack() as rules:
            rules.enter_context(no_tf32())
            rules.enter_context(no_autocast())
            if exact or forward_ad.unpack_dual(pixels).tangent is not None:
                rules.enter_context(exact_derivatives())
            if exact and self.loaded.attention == "eager":
                rules.enter_context(float64_softmax())
            x = normalise(pixels.to(self.dtype), self.mean, self.std)
            return embed(self.loaded, self.layout, readout, x, self._interpolates(pixels))

    def check(self, pixels: Tensor) -> None:
        """Require a float tensor (B, 3, H, W) on this device, of a size that the model takes."""
        check_pixels(pixels, self.grey.device)
        size = (int(pixels.shape[2]), int(pixels.shape[3]))
        if size not in self._sizes:
            check_size(self.loaded, self.layout, size, self._native or tuple(self.grey.shape[2:]), self.mean)
            self._sizes.add(size)

    @property
    def record(self) -> dict[str, str]:
        """Facts that decide the last digits: type, attention kernel, image processor, versions."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.loaded.attention,
            "processor": self.preprocessor.record,
            "versions": json.dumps({name: version(name) for name in _PACKAGES}),
        }

    def in_dtype(self, dtype: torch.dtype) -> Network:
        """Return the same map in another type; float64 keeps the weights exactly."""
        return Network(self.loaded.in_dtype(dtype), self.preprocessor, dtype, self.grey.device)

    def _interpolates(self, pixels: Tensor) -> bool:
        return self._native is not None and tuple(pixels.shape[2:]) != self._native
