"""Draw docs/step.svg, the data flow of a training step: ``python docs/step_picture.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).with_name("step.svg")
WIDTH, HEIGHT = 980, 800

STYLE = """
svg { color-scheme: light dark }
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.code { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #57606a }
.label { font-size: 12px; fill: #57606a }
.number { font-weight: 700; fill: #ffffff }
.paper { fill: #ffffff }
.policy { fill: #ddf4ff; stroke: #0969da }
.critics { fill: #fff1e5; stroke: #bc4c00 }
.batch { fill: #f6f8fa; stroke: #8c959f }
.policy-number { fill: #0969da }
.critics-number { fill: #bc4c00 }
.arrow { fill: none; stroke: #57606a; stroke-width: 1.5 }
.head { fill: #57606a }
.dashed { stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .code, .label { fill: #9ea7b3 }
  .number { fill: #0d1117 }
  .paper { fill: #0d1117 }
  .policy { fill: #0c2d4a; stroke: #58a6ff }
  .critics { fill: #3a2110; stroke: #f0883e }
  .batch { fill: #161b22; stroke: #6e7681 }
  .policy-number { fill: #58a6ff }
  .critics-number { fill: #f0883e }
  .arrow { stroke: #9ea7b3 }
  .head { fill: #9ea7b3 }
}
"""


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture: what happens there, the tensors or rule of it, and the code that does it."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    """``policy``, ``critics`` or ``batch``: whose work it is."""
    title: str
    lines: tuple[str, ...] = ()
    code: str = ""
    number: int | None = None
    """The step of the paper."""

    def svg(self) -> str:
        """Return the box, its text from the top down."""
        middle, y = self.x + self.width / 2, self.y + 22
        parts = [
            f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="8"/>',
            _text(middle, y, self.title, "title"),
        ]
        for line in self.lines:
            y += 19
            parts.append(_text(middle, y, line))
        if self.code:
            parts.append(_text(middle, y + 19, self.code, "code"))
        if self.number is not None:
            parts.append(f'<circle class="{self.kind}-number" cx="{self.x}" cy="{self.y}" r="12"/>')
            parts.append(_text(self.x, self.y + 4.5, str(self.number), "number"))
        return "\n".join(parts)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="arrow{" dashed" if dashed else ""}" d="{path}" marker-end="url(#head)"/>'


LOG_PROBS = ("[B, T]; with a KL penalty the reference's",)
SPLIT = ("each prompt's responses among M critics: shares",)
FIT = ("critic m on its own share: (V_m − R)²",)
VALUE = ("all critics, all responses: V [M, B, T]; V̄, σ [B, T]",)
UPDATE = ("clipped surrogate of the advantages kept by Iᴬ,", "entropy bonus kept by Iᴴ, KL penalty")

BOXES = (
    Box(60, 30, 150, 62, "batch", "Prompts", (), "data/"),
    Box(290, 30, 290, 62, "policy", "Sample G responses a prompt", (), "rollout/"),
    Box(660, 30, 260, 62, "batch", "Reward them", (), "rewards/"),
    Box(60, 142, 860, 62, "batch", "Batch of B responses", ("tokens, reward, mask [B, T] · group [B]",)),
    Box(60, 264, 300, 84, "policy", "Old log-probs, entropy", LOG_PROBS, "linear_logprob"),
    Box(560, 264, 360, 62, "critics", "Split", SPLIT, number=1),
    Box(560, 366, 360, 84, "critics", "Critic update", FIT, "stacked layers, M critics in one pass", 2),
    Box(560, 490, 360, 84, "critics", "Value", VALUE, "ensemble_value", 3),
    Box(560, 634, 170, 84, "critics", "Advantage", ("GAE on V̄, whitened",), "ensemble_gae", 4),
    Box(750, 634, 170, 84, "critics", "Masks", ("of low σ, of high σ",), "agreement_masks", 5),
    Box(60, 628, 360, 96, "policy", "Policy update", UPDATE, "linear_ppo_loss", 6),
)

ARROWS = (
    _arrow((210, 61), (288, 61)),
    _arrow((580, 61), (658, 61)),
    _text(619, 53, "responses", "label"),
    _arrow((790, 92), (790, 140)),
    _arrow((210, 204), (210, 262)),
    _arrow((740, 204), (740, 262)),
    _arrow((740, 326), (740, 364)),
    _arrow((740, 450), (740, 488)),
    _arrow((645, 574), (645, 632)),
    _text(653, 608, "V̄", "label", "start"),
    _arrow((835, 574), (835, 632)),
    _text(843, 608, "σ", "label", "start"),
    _arrow((560, 676), (422, 676)),
    _text(491, 668, "advantage", "label"),
    _arrow((835, 718), (835, 760), (300, 760), (300, 726)),
    _text(567, 753, "Iᴬ, Iᴴ: which tokens count", "label"),
    _arrow((160, 348), (160, 626)),
    _text(168, 490, "log π_old", "label", "start"),
    _arrow((460, 204), (460, 560), (330, 560), (330, 626), dashed=True),
    _text(452, 420, "grpo, rloo, reinforce++: from", "label", "end"),
    _text(452, 437, "rewards alone, without critics", "label", "end"),
    _arrow((60, 690), (24, 690), (24, 14), (435, 14), (435, 28)),
    _text(90, 9, "new weights", "label", "start"),
)


def picture() -> str:
    """Return the picture as SVG, for a light and a dark page."""
    legend = [
        f'<rect class="{kind}" x="{x}" y="{y}" width="14" height="14" rx="3"/>'
        + _text(x + 20, y + 12, name, "label", "start")
        for x, y, kind, name in (
            (60, 776, "policy", "the policy's passes"),
            (240, 776, "critics", "the critics', and what is made of them"),
            (530, 776, "batch", "data"),
        )
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>Data flow of a training step</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="head" d="M0 0 L10 5 L0 10 z"/></marker></defs>',
            f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
            *ARROWS,
            *(box.svg() for box in BOXES),
            *legend,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
