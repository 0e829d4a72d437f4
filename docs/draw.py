"""Draws docs/images/how-it-works.svg: tokens -> step ids -> gate -> one LoRA, and what step dropout does."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from axolotl_mote.report import step_color

COLORS = [step_color(step) for step in range(4)]  # question, analysis, guidance, response
SHARED = step_color(4)
INK, FAINT = "#222831", "#6b7280"

TOKENS: list[tuple[str, int]] = [
    ("user", 0),
    ("How", 0),
    ("do", 0),
    ("I …", 0),
    ("<|analysis|>", 1),
    ("The", 1),
    ("word …", 1),
    ("<|/analysis|>", 1),
    ("<|guidance|>", 2),
    ("Cover …", 2),
    ("<|/guidance|>", 2),
    ("<|response|>", 3),
    ("From", 3),
    ("inside …", 3),
    ("<|/response|>", 3),
]
LEFT, CELL = 190, 50
WIDTH = LEFT + CELL * len(TOKENS) + 30
HEIGHT = 720


class Canvas:
    """Collects SVG elements."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str, opacity: float = 1.0, stroke: str = "none"
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, text: str, size: int = 13, fill: str = INK, anchor: str = "middle", extra: str = ""
    ) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" {extra}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" stroke-width="1.4" '
            'marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'font-family="Helvetica, Arial, sans-serif">\n'
            "<title>The tokens of a chain give step ids, step ids give a gate, the gate weights one LoRA</title>\n"
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
            f'<path d="M0,0 L6,3 L0,6 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def row_label(c: Canvas, y: float, title: str, hint: str) -> None:
    c.text(20, y, title, 15, anchor="start", extra='font-weight="bold"')
    c.text(20, y + 18, hint, 11, FAINT, anchor="start")


def draw_tokens(c: Canvas, y: float) -> None:
    row_label(c, y + 45, "input_ids", "a chain, as the model reads it")
    for i, (token, step) in enumerate(TOKENS):
        x = LEFT + i * CELL
        c.rect(x + 2, y, CELL - 4, 98, COLORS[step], 0.95 if token.startswith("<") else 0.25)
        fill = "#ffffff" if token.startswith("<") else INK
        cx, cy = x + CELL / 2 + 4, y + 90
        c.text(cx, cy, token, 12, fill, "start", f'transform="rotate(-90 {cx:g} {cy:g})"')


def draw_steps(c: Canvas, y: float) -> None:
    row_label(c, y + 14, "step_ids", "read off the markers alone")
    for i, (_, step) in enumerate(TOKENS):
        c.rect(LEFT + i * CELL + 2, y, CELL - 4, 26, COLORS[step], 0.9)
        c.text(LEFT + i * CELL + CELL / 2, y + 18, str(step), 14, "#ffffff", extra='font-weight="bold"')


def draw_gate(c: Canvas, y: float) -> None:
    row_label(c, y + 46, "gate", "weight of every")
    c.text(20, y + 78, "expert's r ranks", 11, FAINT, anchor="start")
    for row, name in enumerate(["analysis", "guidance", "response", "shared"]):
        top = y + row * 32
        color = SHARED if name == "shared" else COLORS[row + 1]
        c.text(LEFT - 6, top + 19, name, 11, color, "end", 'font-weight="bold"')
        for i, (_, step) in enumerate(TOKENS):
            weight = 0.5 if name == "shared" or step == row + 1 else (0.5 / 3 if step == 0 else 0.0)
            c.rect(LEFT + i * CELL + 2, top, CELL - 4, 28, color, weight * 1.5, stroke="#d5d9e0")
            label = "½" if weight == 0.5 else ("⅙" if weight else "0")
            c.text(LEFT + i * CELL + CELL / 2, top + 19, label, 12, INK if weight else "#b6bcc6")
    c.text(LEFT + 2 * CELL, y + 146, "mean of the experts;", 11, FAINT)
    c.text(LEFT + 2 * CELL, y + 160, "while training, one at random", 11, FAINT)


def draw_lora(c: Canvas, x: float, y: float) -> None:
    c.text(x, y, "One LoRA of rank R = 4 r in every linear layer", 15, anchor="start", extra='font-weight="bold"')
    c.text(x, y + 22, "y = W x + B ( (A x) · gate[step_ids] )", 15, anchor="start", extra='font-family="monospace"')
    mid = y + 130
    c.text(x + 12, mid + 5, "x", 17)
    c.rect(x + 60, mid - 92, 300, 36, "#e5e7eb", 1, INK)
    c.text(x + 210, mid - 69, "W   frozen", 14)
    c.rect(x + 60, mid - 22, 76, 60, "#ffffff", 1, INK)
    c.text(x + 98, mid + 56, "A   (R × D)", 12)
    c.rect(x + 284, mid - 22, 76, 60, "#ffffff", 1, INK)
    c.text(x + 322, mid + 56, "B   (D × R)", 12)
    for k, color in enumerate([*COLORS[1:], SHARED]):
        c.rect(x + 61, mid - 21 + k * 14.6, 74, 14, color, 0.8)
        c.rect(x + 285 + k * 18.6, mid - 21, 18, 58, color, 0.8)
        c.rect(x + 190, mid - 21 + k * 14.6, 40, 14, color, [0.05, 0.05, 0.8, 0.8][k], stroke="#d5d9e0")
    c.text(x + 210, mid + 56, "· gate", 12)
    c.text(x + 210, mid + 74, "(of a response token)", 11, FAINT)
    c.arrow(x + 24, mid, x + 56, mid + 4)
    c.arrow(x + 24, mid - 8, x + 56, mid - 70)
    c.arrow(x + 138, mid + 8, x + 184, mid + 8)
    c.arrow(x + 232, mid + 8, x + 280, mid + 8)
    c.arrow(x + 362, mid - 72, x + 402, mid - 24)
    c.arrow(x + 362, mid + 8, x + 402, mid - 12)
    c.text(x + 414, mid - 12, "+", 20)
    c.arrow(x + 424, mid - 18, x + 452, mid - 18)
    c.text(x + 464, mid - 13, "y", 17)


def draw_mask(c: Canvas, x: float, y: float) -> None:
    c.text(x, y, "Step dropout: here the analysis is dropped", 15, anchor="start", extra='font-weight="bold"')
    c.text(x, y + 20, "which token (row) may attend to which (column)", 11, FAINT, anchor="start")
    sizes, names, unit = [4, 4, 3, 4], ["question", "analysis", "guidance", "response"], 11
    left, top = x + 64, y + 34
    steps = [k for k, size in enumerate(sizes) for _ in range(size)]
    for q, q_step in enumerate(steps):
        for k, k_step in enumerate(steps[: q + 1]):
            dropped = k_step == 1 and q_step > 1
            c.rect(
                left + k * unit, top + q * unit, unit - 1, unit - 1, "#eef0f3" if dropped else COLORS[k_step],
                1.0 if dropped else 0.75,
            )  # fmt: skip
    at = 0
    for name, size, color in zip(names, sizes, COLORS, strict=True):
        c.text(left - 6, top + (at + size / 2) * unit + 4, name, 11, color, "end", 'font-weight="bold"')
        at += size
    positions = ["0–3", "4–7", "4–6", "7–10"]
    at = 0
    c.text(left + 15 * unit + 30, top - 6, "position", 11, FAINT)
    for size, span, color in zip(sizes, positions, COLORS, strict=True):
        c.text(left + 15 * unit + 30, top + (at + size / 2) * unit + 4, span, 12, color, extra='font-weight="bold"')
        at += size
    c.text(x, top + 15 * unit + 22, "Later steps attend and count positions as if it were", 11, FAINT, anchor="start")
    c.text(x, top + 15 * unit + 37, "absent; the analysis itself is still trained.", 11, FAINT, anchor="start")


def draw() -> str:
    c = Canvas()
    c.text(20, 34, "The tokens are the router", 21, anchor="start", extra='font-weight="bold"')
    draw_tokens(c, 56)
    c.arrow(LEFT / 2 - 30, 132, LEFT / 2 - 30, 168)
    draw_steps(c, 178)
    c.arrow(LEFT / 2 - 30, 216, LEFT / 2 - 30, 252)
    draw_gate(c, 232)
    draw_lora(c, 20, 450)
    draw_mask(c, 580, 450)
    return c.svg()


def main() -> None:
    target = Path(__file__).resolve().parent / "images" / "how-it-works.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
