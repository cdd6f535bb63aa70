"""Spectra, constants and moves along a direction as charts with a sentence: what `svgcharts` draws of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_equiv.along import Stop
from hf_equiv.showviews import class_bars, picture
from hf_equiv.svgcharts import Axis, Series, chart

Row = Mapping[str, Any]

_NARROW = 440
_STYLES = {"random": "one", "top": "two", "row": "three", "gradient": "four", "toward": "four", "match": "four"}
_ALOFT = 2.1
"""Relative distance that a chart reaches at least: unrelated embeddings are 1 to 2 apart."""


def along_view(stop: Stop, profile: Sequence[Stop], name: str) -> str:
    """The image at one step, its classes, and how far the embedding moves over the whole way.

    Args:
        stop: where to look.
        profile: the way, in order.
        name: what the picture shows.

    Returns:
        HTML.
    """
    moved = stop.distance or 0.0
    foretold = f" (the Jacobian alone foretells {_percent(stop.first_order)})" if stop.first_order else ""
    curve = chart(
        f"Distance of the embedding: {name}",
        [
            Series(
                "foretold by the Jacobian",
                [(p.step, p.first_order) for p in profile if p.first_order is not None and p.first_order <= _ALOFT],
                "limit",
            ),
            Series("distance of the embedding", [(p.step, p.distance) for p in profile if p.distance is not None]),
        ],
        Axis("step h (L2, pixels in [0, 1])", low=profile[0].step, high=profile[-1].step),
        Axis("‖f(x+hv) − f(x)‖ / ‖f(x)‖", low=0.0, high=max([_ALOFT, moved, *(p.distance or 0.0 for p in profile)])),
        mark=(stop.step, moved),
    )
    text = f"h = {stop.step:.3g}: the embedding has moved by {_percent(moved)} of its length{foretold}."
    return (
        f'<div class="live"><div>{picture(stop.png, name, text)}</div>'
        f'<div>{curve}<h2 class="block-title">What the classifier sees</h2>{class_bars(stop.classes)}</div></div>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 10 else f"{100 * share:.3g} %"


def ladder_view(row: Row) -> str:
    """The secants of one direction over the radii, with the noise floor and the plateau: a lipschitz row."""
    radii = row["radii"]
    series = [
        Series("float noise", [(r, n) for r, n in zip(radii, row["noise_floor"], strict=True) if n], "quiet"),
        Series("|Jv|", [(r, row["jvp"]) for r in (radii[0], radii[-1])], "limit"),
        Series("secants", [(r, s) for r, s in zip(radii, row["secants"], strict=True) if s], "one", dots=True),
    ]
    if row["plateau"]:
        low, high = row["plateau"][0], row["plateau"][-1]
        inside = [(r, s) for r, s in zip(radii, row["secants"], strict=True) if s and low <= r <= high]
        series.append(Series("plateau", inside, "two", dots=True))
    name = f"{row['direction']} {row['index']}"
    drawn = chart(
        f"Secants along {name} at {row['image_id']}", series, Axis("radius h (L2)", log=True),
        Axis("‖f(x+hv) − f(x−hv)‖ / 2h", log=True), width=_NARROW,
    )  # fmt: skip
    if row["value"] is not None:
        said = f"Resolved: the constant is {row['value']:.4g}, the exact derivative |Jv| {row['jvp']:.4g}."
    else:
        said = f"Undetermined: float noise hides it, so no number is given. The exact derivative is {row['jvp']:.1e}."
    return f"{drawn}<p>{said}</p>"


def constants_view(rows: Sequence[Row]) -> str:
    """The constants of one image by kind of direction: lipschitz rows; rings where no constant can be read."""
    kinds = list(dict.fromkeys(row["direction"] for row in rows))
    known: list[Series] = []
    unknown: list[tuple[float, float]] = []
    for k, kind in enumerate(kinds):
        own = [row for row in rows if row["direction"] == kind]
        places = [(k + (0.28 * ((7 * i) % 11 - 5) / 5 if len(own) > 1 else 0.0), row) for i, row in enumerate(own)]
        dots = [(x, row["value"]) for x, row in places if row["value"] is not None]
        known.append(Series("", dots, _STYLES.get(kind, "one"), line=False, dots=True))
        unknown += [(x, row["jvp"]) for x, row in places if row["value"] is None and row["jvp"]]
    rings = Series("|Jv| where noise hides the constant", unknown, "quiet", line=False, dots=True, hollow=True)
    drawn = chart(
        f"Lipschitz constants at {rows[0]['image_id']} by kind of direction",
        [*known, *([rings] if unknown else [])],
        Axis("kind of direction", names=kinds), Axis("constant", log=True), width=_NARROW,
    )  # fmt: skip
    values = [row["value"] for row in rows if row["value"] is not None]
    span = f"From {min(values):.2g} to {max(values):.3g}, by direction alone." if values else "None can be read."
    return f"{drawn}<p>{span}</p>"


def spectrum_view(row: Row) -> str:
    """The singular values of one image with the rank threshold and the named zeros: a spectrum row."""
    values, rank = row["singular_values"], row["rank"]
    causes = [zero["cause"] for zero in [*row["structural_zeros"], *row["near_structural"]]]
    rest = [(k + 1, value) for k, value in enumerate(values) if k >= rank]
    series = [
        Series("rank threshold", [(1, row["rank_threshold"]), (len(values), row["rank_threshold"])], "limit"),
        Series("singular values", [(k + 1, value) for k, value in enumerate(values[:rank])]),
        Series(f"zero: {', '.join(causes)}" if causes else "below it", rest, "two", line=False, dots=True),
    ]
    drawn = chart(
        f"Singular values of the Jacobian at {row['image_id']}", [s for s in series if s.points],
        Axis("number", low=0.0), Axis("σ", log=True), width=_NARROW,
    )  # fmt: skip
    said = f"Rank {rank} of {len(values)}: along {row['nullity']:,} pixel directions the embedding does not move"
    return f"{drawn}<p>{said}, to first order.</p>"
