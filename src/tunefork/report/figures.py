"""Plots as inline SVG: text stays text in the page's font, colours are the page's variables (light, dark, print)."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from tunefork import words

# matplotlib is given stand-ins, which become the variables of style.css
_INK, _SOFT, _LINE, _ACCENT = "#010203", "#020304", "#030405", "#040506"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _ACCENT: "--accent"}
_FONT = 11
_POINTS = 72  # an SVG unit is a point, and shown as a CSS pixel
_MOST_POINTS = 400

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval, as one line of a dot plot."""

    name: str
    value: float
    low: float | None
    high: float | None
    ours: bool


def dot_plot(dots: Sequence[Dot], metric: str) -> str:
    """One line a system, the interval as a bar through the dot; this run in the accent colour."""
    figure, axes = _axes(420, 46 + 27 * len(dots), left=186, bottom=34)
    for place, dot in enumerate(reversed(dots)):
        colour = _ACCENT if dot.ours else _INK
        if dot.low is not None and dot.high is not None:
            axes.plot([dot.low, dot.high], [place, place], color=colour, linewidth=3 if dot.ours else 2, alpha=0.55)
        axes.plot(dot.value, place, "o" if dot.ours else "s", color=colour, markersize=8 if dot.ours else 5.5)
    ours = [dot.value for dot in dots if dot.ours]
    axes.axvline(ours[0], color=_ACCENT, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_ylim(-0.6, len(dots) - 0.4)
    axes.set_yticks(range(len(dots)), [dot.name for dot in reversed(dots)])
    axes.tick_params(axis="y", length=0, pad=8, labelcolor=_INK, labelsize=_FONT + 1)  # shown smaller on a phone
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    said = "; ".join(f"{d.name} {words.decimal(d.value)} {words.interval(d.low, d.high)}".strip() for d in dots)
    return _svg(figure, "dots", f"{words.metric_name(metric)} with intervals: {said}")


def smoothed_plot(steps: Sequence[Mapping[str, Any]], name: str) -> str:
    """A number of every step, faint, and its moving average over about a thirtieth of the run."""
    x, y = _series(steps, name)
    figure, axes = _axes(340, 200)
    _faint(axes, x, y)
    smooth = smoothed(y, max(1, len(y) // 30))
    axes.plot(*_thinned(x, smooth), color=_ACCENT, linewidth=1.8, marker=_marker(x))
    _step_axis(axes, x)
    known = smooth[np.isfinite(smooth)]
    return _svg(figure, name, f"{name.replace('_', ' ')} in training from {_ends(known)}")


def look_plot(
    looks: Sequence[Mapping[str, Any]], chosen: int | None, forwards: Mapping[int, float] | None = None
) -> str:
    """The choosing metric on dev at each look; the look whose weights were kept is ringed and named.

    `forwards` says what each step had taken by its end: then the axis counts that.
    """
    x, y = _series(looks, "value")
    if forwards is not None:
        x = np.array([forwards[int(step)] for step in x])
    figure, axes = _axes(340, 200)
    axes.plot(x, y, color=_ACCENT, linewidth=1.8, marker="o", markersize=3.5)
    metric, said = words.metric_name(str(looks[0]["metric"])), _ends(y[np.isfinite(y)])
    axes.margins(x=0.06, y=0.2)
    for at, look in zip(x, looks, strict=True):
        if look["step"] == chosen and look["value"] is not None:
            value = float(look["value"])
            axes.plot(at, value, "o", markersize=10, markerfacecolor="none", markeredgecolor=_INK, markeredgewidth=1.4)
            right = at > (x[0] + x[-1]) / 2
            above = words.higher_is_better(str(look["metric"]))
            axes.annotate(
                words.decimal(value),
                (at, value),
                xytext=(-9 if right else 9, 9 if above else -9),
                textcoords="offset points",
                ha="right" if right else "left",
                va="bottom" if above else "top",
                color=_INK,
                fontsize=_FONT,
            )
            said += f"; weights kept from step {look['step']} at {words.decimal(value)}"
    _step_axis(axes, x)
    return _svg(figure, "looks", f"dev {metric} from {said}")


def scalar_plot(steps: Sequence[Mapping[str, Any]], name: str) -> str:
    """Any number of the steps, as it was."""
    x, y = _series(steps, name)
    figure, axes = _axes(340, 200)
    axes.plot(*_thinned(x, y), color=_ACCENT, linewidth=1.5, marker=_marker(x))
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(y))))
    _step_axis(axes, x)
    if np.nanmax(np.abs(y)) < 0.01:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    return _svg(figure, name, f"{name.replace('_', ' ')} from {_ends(y[np.isfinite(y)])}")


def smoothed(values: Floats, radius: int) -> Floats:
    """Centred mean over `radius` values to each side, fewer at the ends; values that are not known are left out."""
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    reach = np.minimum(radius, np.minimum(place, len(values) - 1 - place))  # symmetric: the ends keep their slope
    first, last = place - reach, place + reach + 1
    n = counts[last] - counts[first]
    return np.divide(totals[last] - totals[first], n, out=np.full(len(values), np.nan), where=n > 0)


def _series(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    values = [math.nan if entry.get(name) is None else float(entry[name]) for entry in entries]
    return np.array([float(entry["step"]) for entry in entries]), np.array(values)


def _faint(axes: Axes, x: Floats, y: Floats) -> None:
    if len(x) <= _MOST_POINTS:
        axes.plot(x, y, color=_SOFT, linewidth=0.8, alpha=0.55)
        return
    parts = [part for part in np.array_split(np.arange(len(x)), _MOST_POINTS) if np.isfinite(y[part]).any()]
    low, high = [np.nanmin(y[p]) for p in parts], [np.nanmax(y[p]) for p in parts]
    axes.fill_between([x[p].mean() for p in parts], low, high, color=_SOFT, alpha=0.3, linewidth=0)


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most _MOST_POINTS points, the last one among them, so that the page stays small."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int))
    return x[kept], y[kept]


def _marker(x: Floats) -> str | None:
    return "o" if len(x) == 1 else None


def _scientific(value: float) -> str:
    """`1.5e−4`: no zero before the exponent, none after the point."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    digits = digits.rstrip("0").rstrip(".")
    return f"{digits}e{int(exponent)}".replace("-", words.MINUS) if value else "0"


def _ends(values: Floats) -> str:
    return f"{values[0]:.4g} to {values[-1]:.4g}" if len(values) else "unknown values"


def _step_axis(axes: Axes, x: Floats) -> None:
    if len(x) == 1:
        axes.set_xticks(x)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    plain = ScalarFormatter(useOffset=False, useMathText=False)
    plain.set_scientific(False)
    axes.yaxis.set_major_formatter(plain)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)


def _axes(width: int, height: int, left: int = 46, bottom: int = 26) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / _POINTS, height / _POINTS))
    figure.patch.set_visible(False)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 12) / width, 1 - (bottom + 10) / height))
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_LINE)
    axes.tick_params(colors=_LINE, labelcolor=_SOFT, labelsize=_FONT, length=3)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, said: str) -> str:
    """The figure as an <svg> element that takes font and colours from the page and says what it shows."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"tunefork-{name}"}):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # matplotlib writes the font in one or in two parts, depending on its version
    text = re.sub(r"\bfont: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"\bfont-family: [^;\"]*;? ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg class="{name}" role="img" aria-label="{html.escape(said)}" {box[0]}>'
    return opening + text[text.index(">") + 1 :].strip()
