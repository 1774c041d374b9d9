"""Draws the pictures of docs/zeroth_order.md: `python docs/make_pictures.py [FOLDER]`. The same bits every time."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("pictures")
INK, SOFT, LINE, PAPER = "#1d2430", "#5c6675", "#d4d9e0", "#ffffff"
EPS, ETA, MINUS, TIMES, PLUS_MINUS = "\u03b5\u03b7\u2212\u00d7\u00b1"
BLUE, ORANGE, GREEN = "#1f5fbf", "#c8501e", "#23804a"
Point = tuple[float, float]


class Picture:
    """An SVG, from the top left, on a paper of its own so that it can be read in the dark."""

    def __init__(self, width: int, height: int, says: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" '
            f'font-size="14"><title>{escape(says)}</title>',
            f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
        ]

    def path(
        self, points: Iterable[Point], colour: str, width: float = 2.0, dash: str = "", arrow: bool = False
    ) -> None:
        placed = list(points)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{dashed}/>'
        )
        if arrow:
            (x0, y0), (x, y) = placed[-2:]
            angle = math.atan2(y - y0, x - x0)
            wings = [(x - 9 * math.cos(angle + a), y - 9 * math.sin(angle + a)) for a in (0.45, -0.45)]
            corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in [(x, y), *wings])
            self.parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def text(
        self, x: float, y: float, said: str, colour: str = INK, anchor: str = "middle", small: bool = False
    ) -> None:
        """`_` lowers and `^` raises the letter after it, which must be the last one."""
        for mark, shift in (("_", 4), ("^", -6)):
            said = re.sub(rf"\{mark}(.)$", rf'<tspan dy="{shift}" font-size="75%">\1</tspan>', said)
        size = ' font-size="12.5"' if small else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{size}>{said}</text>')

    def dot(self, x: float, y: float, colour: str, radius: float = 5) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, edge: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="{fill}" '
            f'stroke="{edge}" stroke-width="1.5"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def slope() -> Picture:
    """A loss along one direction: two evaluations, the chord between them, and the step that follows."""

    def loss(t: float) -> float:
        return 0.55 + 0.30 * (t + 0.9) ** 2 / 2 + 0.16 * math.sin(1.9 * t + 0.4) - 0.05 * t

    def place(t: float, value: float) -> Point:
        return 360 + 165 * t, 290 - 195 * value

    here, epsilon = 0.55, 0.62
    says = "The loss along a direction: its values a little to either side give a slope, and the step goes down it."
    picture = Picture(720, 330, says)
    picture.path([place(-1.9, 0.08), place(1.95, 0.08)], LINE, 1.5, arrow=True)
    picture.text(702, place(0, 0.08)[1] + 19, "direction z", SOFT, "end")
    picture.path([place(t / 50, loss(t / 50)) for t in range(-92, 84)], INK, 2.4)
    picture.text(*place(-1.8, 0.84), "loss", INK, "start")
    plus, minus = (place(here + side * epsilon, loss(here + side * epsilon)) for side in (1, -1))
    g = (loss(here + epsilon) - loss(here - epsilon)) / (2 * epsilon)
    chord = [place(here + t, loss(here - epsilon) + g * (t + epsilon)) for t in (-1.05, 0.95)]
    picture.path(chord, BLUE, 1.8, "6 4")
    for (x, y), name in ((plus, "L+"), (minus, f"L{MINUS}")):
        picture.path([(x, y), (x, place(0, 0.08)[1])], LINE, 1.2)
        picture.dot(x, y, BLUE, 6)
        picture.text(x + (18 if name == "L+" else -8), y + (8 if name == "L+" else -12), name, BLUE)
    zero = place(here, 0.08)
    picture.path([place(here, loss(here)), zero], LINE, 1.2)
    picture.dot(*place(here, loss(here)), INK)
    for side, name in (
        (-1, f"W {MINUS} {EPS}z"),
        (0, "W"),
        (1, f"W + {EPS}z"),
    ):
        picture.text(zero[0] + 165 * side * epsilon, zero[1] + 19, name, INK if not side else BLUE)
    picture.text(42, 40, f"g = (L+ {MINUS} L{MINUS}) / 2{EPS}", BLUE, "start")
    picture.text(42, 62, "two passes forward, one number", SOFT, "start")
    down = here - 0.75
    picture.path([(zero[0], zero[1] + 32), (place(down, 0)[0], zero[1] + 32)], ORANGE, 2.4, arrow=True)
    picture.text(place(down, 0)[0] - 8, zero[1] + 37, f"step {MINUS}{ETA} g z", ORANGE, "end")
    return picture


def low_rank() -> Picture:
    """Where a direction of low rank is added: to what a layer gives, not to its weights."""
    says = "A layer: frozen weights, learned change and probe each make their part of the output of one input."
    picture = Picture(720, 310, says)
    left, right, middle = 92.0, 600.0, (78.0, 170.0, 262.0)
    picture.text(38, middle[1] - 12, "x")
    for y in (middle[0], middle[2]):
        picture.path([(left - 26, middle[1]), (left - 26, y), (left + 64, y)], INK, 2, arrow=True)
    picture.path([(30, middle[1]), (left + 64, middle[1])], INK, 2, arrow=True)
    picture.box(left + 66, 30, 330, 96, "#eef0f3", SOFT)
    picture.text(left + 231, 74, "W  frozen, as stored", INK)
    picture.text(left + 231, 95, "4 bit, 16 bit or 32 bit; never written", SOFT)
    for y, colour, name, first, second, what, why in (
        (middle[1], GREEN, "learned", "V", "U^T", "all R columns of U, in fp32", "the only thing that changes"),
        (middle[2], BLUE, "probe", "V_k", "u^T", "r signs an output, made from the seed", "drawn anew each step"),
    ):
        tall = 58 if name == "learned" else 30
        picture.box(left + 66, y - tall / 2, 92, tall, "#e9f1fb" if colour == BLUE else "#e8f4ec", colour)
        picture.text(left + 112, y + 5, first, colour)
        picture.path([(left + 158, y), (left + 196, y)], colour, 2, arrow=True)
        start = left + 196
        if name == "probe":
            picture.text(start + 24, y + 5, f"{TIMES} {PLUS_MINUS}{EPS}", ORANGE)
            picture.path([(start + 48, y), (start + 66, y)], colour, 2, arrow=True)
            start += 68
        end = left + 396
        picture.box(start + 2, y - tall / 2, end - start - 2, tall, "#e9f1fb" if colour == BLUE else "#e8f4ec", colour)
        picture.text((start + end) / 2 + 1, y + 5, second, colour)
        picture.text(end + 10, y - 8, name, colour, "start")
        picture.text(left + 231, y + tall / 2 + 17, f"{what}; {why}", SOFT, small=True)
    for y in middle:
        ends = (right, middle[1] - 12) if y < middle[1] else (right, middle[1] + 12)
        corner = [(right, y), ends] if y != middle[1] else [(right - 12, y)]
        picture.path([(left + 396, y), *corner], INK, 2, arrow=True)
    picture.parts.append(
        f'<circle cx="{right:.1f}" cy="{middle[1]:.1f}" r="12" fill="{PAPER}" stroke="{INK}" stroke-width="2"/>'
    )
    picture.text(right, middle[1] + 5, "+")
    picture.path([(right + 12, middle[1]), (right + 72, middle[1])], INK, 2, arrow=True)
    picture.text(right + 62, middle[1] - 12, "y")
    return picture


def bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to bfloat16, to the nearest and at ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


class InPlace:
    """MeZO's published step on a bfloat16 matrix: + eps z, - 2 eps z, + eps z, - lr g z, each of them rounded."""

    def __init__(self, weights: np.ndarray) -> None:
        self.start = self.weights = bf16(weights)
        self.intended = np.zeros(weights.shape)

    def step(self, random: np.random.Generator, epsilon: float, lr: float, g: float) -> None:
        z = bf16(random.standard_normal(self.weights.shape).astype(np.float32))
        for sign in (1, -2, 1):
            self.weights = bf16(self.weights + bf16(bf16(sign * z) * np.float32(epsilon)))
        self.weights = bf16(self.weights - bf16(np.float32(lr) * bf16(np.float32(g) * z)))
        self.intended -= lr * g * z

    def change(self) -> np.ndarray:
        return (self.weights - self.start).astype(np.float64)


class Beside:
    """Tunefork's: signs v of a pool of bases, fp32 factors u beside weights that are only read."""

    def __init__(self, weights: np.ndarray, random: np.random.Generator, rank: int = 4, bases: int = 8) -> None:
        rows, columns = weights.shape
        self.rank, self.bases = rank, bases
        self.v = random.choice(np.float32([-1, 1]), (bases, rank, columns))
        self.u = np.zeros((bases, rank, rows), dtype=np.float32)
        self.intended, self.steps = np.zeros(weights.shape), 0

    def step(self, random: np.random.Generator, epsilon: float, lr: float, g: float) -> None:
        u = random.choice(np.float32([-1, 1]), self.u.shape[1:])
        k = self.steps % self.bases
        self.u[k] += np.float32(-lr * g / math.sqrt(self.rank)) * u
        self.intended -= lr * g * (u.T.astype(np.float64) @ self.v[k]) / math.sqrt(self.rank)
        self.steps += 1

    def change(self) -> np.ndarray:
        return np.einsum("kro,krc->oc", self.u.astype(np.float64), self.v)


STEPS, EPSILON, LR, SLOPE, SPREAD = 20_000, 1e-3, 1e-6, 20.0, 0.02


def drift(steps: int = STEPS, size: int = 48) -> dict[str, list[Point]]:
    """By method: (steps, distance from the start without learning), and (steps, cosine to what was meant with it).

    Weights of standard deviation 0.02, epsilon 1e-3, lr 1e-6, slopes of size 20: those of the paper's runs. Distances
    are in standard deviations of the weights.
    """
    random = np.random.Generator(np.random.PCG64(0))
    weights = (SPREAD * random.standard_normal((size, size))).astype(np.float32)
    still, published, ours = InPlace(weights), InPlace(weights), Beside(weights, random)
    found: dict[str, list[Point]] = {name: [] for name in ("drift", "published", "ours")}
    for step in range(1, steps + 1):
        g = SLOPE * float(random.standard_normal())
        still.step(random, EPSILON, 0.0, 0.0)
        published.step(random, EPSILON, LR, g)
        ours.step(random, EPSILON, LR, g)
        if step % (steps // 40) == 0:
            found["drift"].append((step, float(np.sqrt(np.mean(still.change() ** 2))) / SPREAD))
            for name, method in (("published", published), ("ours", ours)):
                found[name].append((step, cosine(method.change(), method.intended)))
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def exactness() -> Picture:
    """What 20,000 steps leave in a bfloat16 matrix, written in place and beside it."""
    found = drift()
    far, near, exact = (found[name][-1][1] for name in ("drift", "published", "ours"))
    says = f"After {STEPS:,} steps in bfloat16: drift {far:.2f}, cosine {near:.2f} and {exact:.2f}."
    picture = Picture(720, 330, says)
    still = [(x, 0.0) for x, _ in found["drift"]]
    panel(
        picture,
        70,
        0.6,
        "Nothing learned: how far weights wander",
        "in standard deviations of the weights",
        -9,
        {("in place", ORANGE): [(0.0, 0.0), *found["drift"]], ("beside", GREEN): still},
    )
    panel(
        picture,
        430,
        1.0,
        "Learning: is the change what was meant?",
        "cosine of the two",
        18,
        {("in place", ORANGE): found["published"], ("beside", GREEN): found["ours"]},
    )
    return picture


def panel(
    picture: Picture,
    x: float,
    top: float,
    title: str,
    unit: str,
    below: float,
    lines: Mapping[tuple[str, str], Sequence[Point]],
) -> None:
    """A plot over steps, with each line named at its end; `below` is where the lower name stands."""

    def place(step: float, value: float) -> Point:
        return x + 250 * step / STEPS, 270 - 180 * value / top

    picture.text(x - 36, 32, title, anchor="start")
    picture.text(x - 36, 54, unit, SOFT, "start", small=True)
    for tick in (0, top / 2, top):
        picture.path([place(0, tick), place(STEPS, tick)], LINE, 1)
        picture.text(x - 8, place(0, tick)[1] + 5, f"{tick:g}", SOFT, "end", small=True)
    for step in (0, STEPS // 2, STEPS):
        picture.text(place(step, 0)[0], 292, f"{step:,}", SOFT, small=True)
    picture.text(place(STEPS / 2, 0)[0], 314, "steps", SOFT, small=True)
    for (name, colour), line in lines.items():
        picture.path([place(*point) for point in line], colour, 2.4)
        end = place(*line[-1])
        picture.text(end[0], end[1] + (below if name == "beside" else -9), name, colour, "end")


PICTURES: dict[str, Callable[[], Picture]] = {"slope": slope, "low_rank": low_rank, "exactness": exactness}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
