"""Measure defences: what a change of every image before the encoder stops, and what it costs.

A defence T is a transformation, or smoothing: the mean of f/‖f‖ under Gaussian noise on the pixels. Everything passes
it, matches and photos alike. A static test puts the stored matches through T. An adaptive one makes new matches, in the
same ball, for the encoder with T in front. Only the second one says what a defence is worth (Tramèr et al. 2020,
arXiv:2002.08347).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.measures import cosine, median_of, open_png, relative_error, top_classes
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.data.image_set import ImageSet
from hf_equiv.defences import attack_smoothed, certified_cosine
from hf_equiv.formatting import finite, read_fraction
from hf_equiv.matching.rounding import round_into_ball
from hf_equiv.precision import no_tf32
from hf_equiv.report import search
from hf_equiv.report.collect import Run, read_pictures
from hf_equiv.report.measure import Tell, keep, place_of, refuse_texts
from hf_equiv.runs.schema import IMAGE_COLUMNS, Row
from hf_equiv.through.match import match_through
from hf_equiv.through.transformations import Transformation, handle, read_transformations

DEFENCE_PAIRS = 5  # pairs of a run that a defence is tried on, by default
CONFIDENCE = 0.999  # of a certificate
_LABELLED = 200  # most labelled photos for the accuracy behind a defence
_EVALS = 600  # evaluations allowed for an adaptive match
_VIEWS = 64  # draws of the noise for a smoothed embedding
_BATCH = 32
_CERTIFIED = 2  # photos whose smoothed embeddings are certified and attacked
_RADII = (0.25, 0.5, 1.0, 2.0)  # of the certificates, over σ
_DRAWS = 1000  # of a certificate
_ATTACK: Row = {"num_steps": 10, "draws": 8, "restarts": 1, "n": 200}
_LEVEL = 1 / 255
_PROBE = Transformation("noise:1/255", "noise", _LEVEL, _LEVEL)
_PROBES = 8  # draws of the detector for an image


@dataclass(frozen=True)
class Smoothing:
    """Smoothing of the embedding by Gaussian noise on the pixels, neither clipped nor rounded."""

    name: str  # as the user states it, such as smooth:0.25
    sigma: float

    def draw(self, generator: torch.Generator) -> _Noise:
        """Draw the noise, for `match_through`."""
        return _Noise(self.sigma, int(torch.randint(2**31, (), generator=generator)))


@dataclass(frozen=True)
class _Noise:
    sigma: float
    seed: int

    def surrogate(self, levels: Tensor) -> Tensor:
        """Add the noise to levels (3, H, W)."""
        noise = torch.randn(levels.shape, generator=torch.Generator().manual_seed(self.seed))
        return levels + 255 * self.sigma * noise.to(levels)


Defence = Transformation | Smoothing


def read_defences(names: Sequence[str]) -> tuple[Defence, ...]:
    """Read defences such as `jpeg:75` or `smooth:0.25`; refuse bad ones."""
    found: dict[str, Defence] = {}
    for name in names:
        kind, _, number = name.partition(":")
        if name in found:
            raise ValueError(f"`defences` must name a defence once; got {name!r} twice. Leave one out.")
        if kind != "smooth":
            try:
                found[name] = read_transformations([name])[0]
            except ValueError as error:
                told = str(error).replace("`through`", "`defences`").replace("name jpeg,", "name smooth, jpeg,")
                raise ValueError(told) from None
            continue
        try:
            sigma = read_fraction(number)
        except ValueError:
            sigma = math.nan
        if not 1e-3 <= sigma <= 10:
            raise ValueError(
                "`defences` must give smooth a standard deviation from 0.001 to 10, where pixels lie in [0, 1]; got "
                f"{name!r}. Write smooth:0.25."
            )
        found[name] = Smoothing(name, sigma)
    return tuple(found.values())


def measure_defences(
    run: Run, encoder: Any, names: Sequence[str], pairs: int, *, labelled: ImageSet | None, cache: Path | None,
    tell: Tell,
) -> Row:  # fmt: skip
    """Measure each defence on the first pairs of a match run, and the detector; each is kept in `cache`."""
    if names:
        refuse_texts(run, "defences")
    tested, done = read_defences(names), iter(range(1, 2 * len(names) + 4))
    step: Callable[[], None] = lambda: tell(next(done), 2 * len(names) + 2)  # noqa: E731
    data = None if labelled is None else [labelled.data_id, labelled.data_revision, len(labelled)]

    def kept(name: str, make: Callable[[list[_Pair]], Row]) -> Row:
        place = place_of(cache, run, "defence", encoder, [name, pairs, data])
        return keep(place, lambda: make(list(_read(run, encoder, pairs))))

    def measured(defence: Defence) -> Row:
        return kept(defence.name, lambda own: _Deployed(encoder, defence, run).measure(own, labelled, step))

    return {
        "defences": [measured(one) for one in tested],
        "detector": kept("detector", lambda own: _detect(encoder, run, own, step)),
    }


@dataclass(frozen=True)
class _Pair:
    name: str
    source: Tensor
    match: Tensor
    target: Tensor


def _read(run: Run, encoder: Any, count: int) -> Iterator[_Pair]:
    ids = [row["pair_id"] for row in run.good][:count]
    for row, _ in read_pictures(run, ids):
        if all(row[name] is not None for name in IMAGE_COLUMNS):
            yield _Pair(row["pair_id"], *(open_png(encoder, row[name]).to(encoder.device) for name in IMAGE_COLUMNS))


class _Deployed:
    """An encoder behind a defence."""

    def __init__(self, encoder: Any, defence: Defence, run: Run) -> None:
        self.smooth, self.encoder = encoder, measures.of_files(encoder)  # for gradients, and as files are seen
        self.defence, self.run = defence, run
        self.labels = run.settings.get("labels")

    def _generator(self, name: str) -> torch.Generator:
        return image_generator(self.run.settings["seed"], f"{name}:{self.defence.name}")

    @torch.no_grad()
    @no_tf32()
    def see(self, image: Tensor, name: str) -> tuple[Tensor, list[int] | None]:
        """Return unit embeddings and labels of an image (3, H, W) after each draw of T; a smoothed one is one draw."""
        views = self._views(image, name)
        z, labels = _unit(self._batched(self.encoder, views)), None
        if self.labels or self.encoder.has_head:
            labels = [k for part in views.split(_BATCH) for k in top_classes(self.encoder, part, self.labels) or ()]
        if not isinstance(self.defence, Smoothing):
            return z, labels
        return _unit(z.mean(dim=0, keepdim=True)), labels and [Counter(labels).most_common(1)[0][0]]

    def _views(self, image: Tensor, name: str) -> Tensor:
        """Return what the encoder sees of an image: draws of T, (n, 3, H, W)."""
        generator, defence = self._generator(name), self.defence
        if not isinstance(defence, Smoothing):
            return torch.stack([handle(image, draw) for draw in defence.draws(generator)])
        noise = torch.stack([torch.randn(image.shape, generator=generator) for _ in range(_VIEWS)])
        return image + defence.sigma * noise.to(image)

    def _batched(self, f: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
        return torch.cat([f(part).double() for part in views.split(_BATCH)])

    def measure(self, pairs: Sequence[_Pair], labelled: ImageSet | None, step: Callable[[], None]) -> Row:
        """Measure static and adaptive matches, and what photos lose."""
        step()
        ends = {kind: [self.see(getattr(one, kind), f"{one.name}:{kind}") for one in pairs] for kind in IMAGE_COLUMNS}
        made = self.adapt(pairs)
        seen = [self.see(image, f"{one.name}:match") for one, image in zip(pairs, made, strict=True)]
        step()
        sees = list(zip(pairs, ends["source"], ends["target"], strict=True))
        old = [self._judge(*own, own[0].match, match) for own, match in zip(sees, ends["match"], strict=True)]
        new = [self._judge(*own, image, match) for own, image, match in zip(sees, made, seen, strict=True)]
        return {
            "name": self.defence.name,
            "static": old,
            "adaptive": new,
            "apart": [cosine(source[0].mean(dim=0), target[0].mean(dim=0)) for _, source, target in sees],
            "kept": self._kept_labels(pairs, ends),
            "accuracy": None if labelled is None else self._accuracy(labelled),
            "smoothing": self._certify(pairs) if isinstance(self.defence, Smoothing) else None,
        }

    def _judge(self, pair: _Pair, source: Any, target: Any, image: Tensor, match: Any) -> Row:
        """Compare a match with its target and source, draw by draw: all three have passed the defence."""
        near, far = ([cosine(m, z) for m, z in zip(match[0], end[0], strict=True)] for end in (target, source))
        taken = [None if None in both else both[0] > both[1] for both in zip(near, far, strict=True)]  # type: ignore[operator]
        same = None if match[1] is None else [m == t for m, t in zip(match[1], target[1], strict=True)]
        apart = target[1] is not None and Counter(target[1]).most_common(1) != Counter(source[1]).most_common(1)
        return {
            "pair_id": pair.name,
            "psnr_db": measures.psnr_db(image, pair.source),
            "cosine_to_target": median_of(near),
            "cosine_to_source": median_of(far),
            "taken": _most(taken),
            "label": _most(same) if apart else None,
        }

    def adapt(self, pairs: Sequence[_Pair]) -> list[Tensor]:
        """Make 8-bit matches of the encoder behind T, within the ball of the run, from the stored ones or as these."""
        radius, norm, made = self.run.settings["radius"], self.run.settings["norm"], []
        change: Any = (self.defence,)
        for one in pairs:  # one at a time: memory, and results that do not depend on their number
            z = self._mean(one.target, one.name, torch.Tensor.double)
            found = match_through(
                self.smooth, one.source[None], z[None], change, [self._generator(f"{one.name}:adaptive")],
                radius=radius, norm=norm, max_evals=_EVALS, itself=False, start=one.match[None],
            )  # fmt: skip
            both = one.match, round_into_ball(found.images[0], one.source, radius, norm)
            near = [cosine(self._mean(image, one.name), z) or -1.0 for image in both]
            made.append(both[near.index(max(near))])
        return made

    @torch.no_grad()
    @no_tf32()
    def _mean(self, image: Tensor, name: str, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the mean of the embeddings behind T, (D,), float64, each at unit length but for another `scale`."""
        return (scale or _unit)(self._batched(self.encoder, self._views(image, f"{name}:goal"))).mean(dim=0)

    def _kept_labels(self, pairs: Sequence[_Pair], ends: Any) -> list[bool] | None:
        """Return whether each different photo keeps the label that it has without the defence."""
        found: dict[bytes, bool] = {}
        for kind in ("source", "target"):
            for one, (_, labels) in zip(pairs, ends[kind], strict=True):
                image = getattr(one, kind)
                plain = top_classes(self.encoder, image[None], self.labels)
                if plain is None or labels is None:
                    return None
                found[image.cpu().numpy().tobytes()] = bool(_most([label == plain[0] for label in labels]))
        return list(found.values())

    def _accuracy(self, labelled: ImageSet) -> Row | None:
        """Return how often photos get their class by the vote of their neighbours, behind the defence and without."""
        plain = search.Gallery(lambda x: _unit(self.encoder(x)))
        behind = search.Gallery(lambda x: self.see(x[0], "photo")[0][:1])
        for n in range(len(labelled))[:: math.ceil(len(labelled) / _LABELLED)]:  # of all classes
            item = labelled[n]
            pixels = self.encoder.preprocess([item.image])[0].to(self.encoder.device)
            for gallery in (plain, behind):
                gallery.add(pixels, item.label)
        known = [search.probe((), gallery) for gallery in (plain, behind)]
        if known[0] is None or known[1] is None:
            return None
        return {"photos": known[0]["photos"], "plain": known[0]["hits"], "behind": known[1]["hits"]}

    def _certify(self, pairs: Sequence[_Pair]) -> Row:
        """Certify smoothed embeddings of a few photos, and attack them."""
        assert isinstance(self.defence, Smoothing)
        sigma = self.defence.sigma
        photos = torch.stack([one.source for one in pairs[:_CERTIFIED]])
        radii = [ratio * sigma for ratio in _RADII]
        proof = certified_cosine(self.smooth, photos, sigma, radii, _DRAWS, CONFIDENCE, progress=False)
        attained = [
            attack_smoothed(self.smooth, photos, sigma, radius, progress=False, **_ATTACK).cosine for radius in radii
        ]
        return {
            "radii": radii,
            "certified": [[finite(value) for value in own] for own in proof.cosine.tolist()],
            "attained": [[finite(value) for value in own] for own in torch.stack(attained, dim=1).tolist()],
        }


@torch.no_grad()
@no_tf32()
def _detect(encoder: Any, run: Run, pairs: Sequence[_Pair], step: Callable[[], None]) -> Row:
    """Measure how far embeddings move by noise of one level: of photos, stored matches, and matches made for it."""
    probed = _Deployed(encoder, _PROBE, run)
    step()
    with torch.enable_grad():
        adapted = probed.adapt(pairs)
    step()

    def moved(image: Tensor, name: str) -> float | None:
        generator = image_generator(run.settings["seed"], f"{name}:detector")
        draws = [_PROBE.draw(generator) for _ in range(_PROBES)]
        z, *noisy = probed.encoder(torch.stack([image, *(handle(image, draw) for draw in draws)]))
        return median_of(relative_error(one, z) for one in noisy)

    photos = {
        getattr(one, kind).cpu().numpy().tobytes(): getattr(one, kind) for one in pairs for kind in ("source", "target")
    }
    return {
        "photos": [moved(image, f"photo {k}") for k, image in enumerate(photos.values())],
        "static": [moved(one.match, one.name) for one in pairs],
        "adaptive": [moved(image, one.name) for one, image in zip(pairs, adapted, strict=True)],
    }


def _unit(z: Tensor) -> Tensor:
    return torch.nn.functional.normalize(z.double(), dim=1, eps=1e-300)


def _most(flags: Sequence[bool | None] | None) -> bool | None:
    """Return whether more than half of the draws are true."""
    if flags is None or None in flags:
        return None
    return sum(map(bool, flags)) > len(flags) / 2
