"""Find the photo nearest to another whose view by an image processor is a given 8-bit image, byte for byte.

The view is two resamplings, so the photo is found in two passes, backwards: first the columns y of the image between
both whose levels are the match, then the rows x of the photo whose levels are y. Each pass is the same problem for many
lines at once, with A (m, n) of `Axis`, lines x₀ (n, L) and levels k (m, L):

    minimise ‖x − x₀‖²  over integers x in 0…255  with  ⌊Ax + ½⌋ = k.

Without "integer" it is a projection, solved in its dual: x = clip(x₀ + Aᵀλ), with λ by accelerated proximal steps. Its
result x* is rounded pixel by pixel from the last to the first, and each rounding error is cancelled by the pixels that
follow: with RᵀR = AᵀA + εI, pixel j is rounded at x*_j − Σ_{l>j} (R_jl / R_jj)(x_l − x*_l) (the nearest plane method).
Where that misses a level, the K best roundings are kept instead of one, and fewer of them miss for a smaller ε.

A level that no photo has next to its neighbours, such as black beside bright, is missed.

Beck, Teboulle (2009), SIAM J. Imaging Sci. 2:183 (accelerated proximal steps). Babai (1986), Combinatorica 6:1 (nearest
plane). Guo, Nilsson (2006), IEEE J. Sel. Areas Commun. 24:491 (K best).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hf_equiv.data.resampling import Axis, View

_SLACK = 0.2, 0.35  # distance from the levels, of 0.5, at which sums before rounding are near: in columns, in rows
_ROUNDS = ((0.1, 1, 1.0), (0.1, 16, 0.5), (0.03, 64, 0.1))  # ε (n/m)², K, and the share of the slack
_STEPS, _CHECK = 60, 10  # most proximal steps, and after how many the lines that are done are left out
_NEAR = 0.1  # distance from the slack at which a line is done
_NUMBERS = 2**24  # of lines worked on at once
_MISSED = 10.0, 100.0  # cost of a level that is missed, in squared levels, and of each unit by which it is


def back_project(photo: Tensor, view: View, match: Tensor) -> Tensor:
    """Return the photo nearest to another whose view is a match; only pixels that the view sees differ.

    Args:
        photo: (H, W, 3) uint8.
        view: of photos of this size, by `follow`.
        match: levels (h, w, 3) uint8.

    Returns:
        (H, W, 3) uint8; its `view.levels` differ from the match where no photo near has its levels.
    """
    across, down = view.across, view.down
    count = max(1, _NUMBERS // (3 * across.n))  # rows worked on at once
    between = [across.apply(_lines(part)).view(-1, len(part), 3) for part in photo.split(count)]
    columns = _lines(torch.cat(between, dim=1))  # (H, w·3)
    columns = _invert(down, columns, match.flatten(1).float(), _SLACK[0]).view(down.n, -1, 3)
    result = photo.clone()
    for start in range(down.span.start, down.span.stop, count):
        rows = slice(start, min(start + count, down.span.stop))
        lines = _invert(across, _lines(photo[rows]), _lines(columns[rows]), _SLACK[1])
        result[rows] = lines.view(across.n, -1, 3).transpose(0, 1).to(torch.uint8)
    return result


def _lines(image: Tensor) -> Tensor:
    """Return the rows of each channel of an image (H, W, 3) as lines (W, H·3)."""
    return image.transpose(0, 1).flatten(1).float()


def _invert(axis: Axis, start: Tensor, levels: Tensor, slack: float) -> Tensor:
    """Return the integers (n, L) nearest to lines that the axis makes into levels (m, L), if there are any."""
    result, todo = torch.empty_like(start), torch.arange(start.shape[1])
    for ridge, kept, share in _ROUNDS:
        for part in todo.split(max(1, _NUMBERS // (axis.n * kept))):
            near = _nearest(axis, start[:, part], levels[:, part], share * slack)
            result[:, part] = _round(axis, near, levels[:, part], ridge, kept)
        todo = todo[(axis.levels(result[:, todo]) != levels[:, todo]).any(dim=0)]
        if not len(todo):
            break
    return result


def _nearest(axis: Axis, start: Tensor, levels: Tensor, slack: float) -> Tensor:
    """Return the lines in 0…255 nearest to others with sums within `slack` of the levels, or as near as a few steps."""
    lower = torch.where(levels == 0, -math.inf, levels - slack)
    upper = torch.where(levels == 255, math.inf, levels + slack)
    gram = (axis.matrix @ axis.matrix.T) / 2.0**44
    length = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    sums = axis.apply(start)
    at = torch.cholesky_solve((sums.clamp(lower, upper) - sums).double(), torch.linalg.cholesky(gram)).float()
    result, part = torch.empty_like(start), torch.arange(start.shape[1])
    ahead, momentum = at, 1.0
    for step in range(_STEPS + 1):
        if step % _CHECK == 0:
            result[:, part] = x = (start[:, part] + axis.transpose(at)).clamp(0, 255)
            sums = axis.apply(x)
            left = ((sums - sums.clamp(lower, upper)).abs() > _NEAR).any(dim=0)
            part, at, ahead, lower, upper = part[left], at[:, left], ahead[:, left], lower[:, left], upper[:, left]
            if not len(part):
                break
        v = ahead - length * axis.apply((start[:, part] + axis.transpose(ahead)).clamp(0, 255))
        new = v + length * (-v / length).clamp(lower, upper)
        momentum, before = (1 + math.sqrt(1 + 4 * momentum**2)) / 2, momentum
        at, ahead = new, new + (before - 1) / momentum * (new - at)
    return result


@lru_cache(maxsize=4)
def _factor(axis: Axis, ridge: float) -> tuple[Tensor, Tensor]:
    """Return R_jl / R_jj (n, n) and R_jj² (n,) of RᵀR = AᵀA + εI with ε = `ridge` (m/n)², float32."""
    A = axis.matrix / 2.0**22
    R = torch.linalg.cholesky(A.T @ A + ridge * (axis.m / axis.n) ** 2 * torch.eye(axis.n, dtype=A.dtype)).mT
    scale = R.diagonal()
    return (R / scale[:, None]).float(), scale.square().float()


def _round(axis: Axis, x: Tensor, levels: Tensor, ridge: float, kept: int) -> Tensor:
    """Return integers (n, L) near x, by the K best roundings of the pixels seen so far, from the last to the first."""
    (n, L), (R, scale) = x.shape, _factor(axis, ridge)
    reach = max(w.stop - w.start for w in axis.windows)
    complete: dict[int, list[int]] = {}  # the outputs whose last pixel to be rounded is j
    for i, w in enumerate(axis.windows):
        complete.setdefault(w.start, []).append(i)
    off = axis.apply(x) - levels
    lower, upper = torch.where(levels == 0, -math.inf, -0.5), torch.where(levels == 255, math.inf, 0.5)
    errors = x.new_empty((n, L, kept))  # of each pixel, on the ways that are kept so far
    cost = x.new_full((L, kept), math.inf)
    cost[:, 0] = 0
    parents = torch.zeros((n, L, kept), dtype=torch.uint8)
    for j in range(n - 1, -1, -1):
        after = errors[j + 1 : j + 1 + reach]
        wanted = x[j, :, None] - torch.tensordot(R[j, j + 1 : j + 1 + len(after)], after, dims=1)
        near = wanted.round()
        choices = [near, near + torch.where(wanted >= near, 1.0, -1.0)] if kept > 1 else [near]
        trials = torch.stack(choices, dim=-1).clamp(0, 255)  # (L, K, 1 or 2)
        error, costs = trials - x[j, :, None, None], (trials - wanted[..., None]).square() * scale[j]
        for i in complete.get(j, ()):
            band = axis.bands[i]
            total = torch.tensordot(band[1:], after[: len(band) - 1], dims=1) + off[i, :, None]
            total = total[..., None] + band[0] * error
            bounds = lower[i, :, None, None], upper[i, :, None, None]
            missed = (total - total.clamp(*bounds)).abs()
            costs = costs + torch.where(missed > 0, _MISSED[0] + _MISSED[1] * missed, 0.0)
        errors[j] = error[..., 0]
        if kept > 1:
            cost, index = (cost[..., None] + costs).flatten(1).topk(kept, dim=1, largest=False)
            parents[j] = index // 2
            after.copy_(after.gather(2, (index // 2).expand(len(after), -1, -1)))
            errors[j] = error.flatten(1).gather(1, index)
    if kept > 1:
        path = cost.argmin(dim=1, keepdim=True)
        for j in range(n):  # pixels are in the order of the step that saw them last
            rows = slice(j + reach if j else 0, j + reach + 1)
            errors[rows, :, :1] = errors[rows].gather(2, path.expand(len(errors[rows]), -1, -1))
            path = parents[j].gather(1, path).long()
    return (x + errors[:, :, 0]).round()
