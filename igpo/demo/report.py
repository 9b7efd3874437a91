"""The demo's self-contained HTML page: the table, the figure, and a few completions in the order they were written."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .plots import COLOURS, LABELS
from .results import ArmResult, Frame

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .note { color: #555; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.trace { margin: .4rem 0; font-family: ui-monospace, monospace; font-size: 13px; }
.trace span { display: inline-block; min-width: 1.6em; text-align: center; padding: .1rem .25rem; margin: 1px;
  border-radius: 3px; } .hint { background: #E69F00; color: #000; } .bad { color: #b00; } .good { color: #070; }
input[type=range] { width: 20rem; vertical-align: middle; }
"""

# moves through the denoise steps of one completion: tokens of later steps are shown as masks
SCRIPT = """
document.querySelectorAll('.player').forEach(function (box) {
  var slider = box.querySelector('input'), label = box.querySelector('output');
  function show() {
    label.textContent = 'after step ' + slider.value;
    box.querySelectorAll('[data-step]').forEach(function (token) {
      var written = Number(token.dataset.step) <= Number(slider.value);
      token.textContent = written ? token.dataset.text : '\\u00b7';
      token.style.opacity = written ? 1 : 0.35;
    });
  }
  slider.addEventListener('input', show); show();
});
"""


def write_report(
    arms: Sequence[ArmResult], figure: Path, path: Path, title: str, notes: Sequence[str]
) -> None:
    """Writes one HTML file that needs nothing else: figure embedded, no network."""
    image = base64.b64encode(figure.read_bytes()).decode()
    paragraphs = "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
    traces = "".join(
        f"<h2>{html.escape(LABELS[arm.name])}: how answers were written</h2>"
        + "".join(map(_trace, arm.frames))
        for arm in arms
        if arm.frames
    )
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{paragraphs}{_table(arms)}"
        f'<img alt="learning curves" src="data:image/png;base64,{image}">{traces}<script>{SCRIPT}</script></html>\n',
        encoding="utf-8",
    )


def _table(arms: Sequence[ArmResult]) -> str:
    heads = ("arm", "accuracy before", "after", "all-wrong groups", "after rescue", "hint success", "rollouts",
             "forwards", "seconds")  # fmt: skip
    rows = []
    for arm in arms:
        swatch = f'<span class=swatch style="background:{COLOURS[arm.name]}"></span>'
        hint = "" if arm.hint_success is None else f"{arm.hint_success:.1%}"
        cells = (
            swatch + html.escape(LABELS[arm.name]), f"{arm.before:.1%}", f"{arm.after:.1%}",
            f"{arm.all_wrong:.1%}", f"{arm.unrescued:.1%}", hint,
            f"{arm.rollouts:,}", f"{arm.forwards:,}", f"{arm.seconds:.0f}",
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _trace(frame: Frame) -> str:
    last = max(frame.step_map, default=0)
    spans = []
    for token, step in zip(frame.tokens, frame.step_map, strict=True):
        # hints in their own colour; generated tokens from light (early) to dark (late)
        look = (
            "class=hint"
            if step < 0
            else f'style="background:hsl(205 70% {92 - 45 * step / max(1, last):.0f}%)"'
        )
        spans.append(
            f'<span {look} data-step="{step}" data-text="{html.escape(token, quote=True)}"></span>'
        )
    verdict = "<b class=good>correct</b>" if frame.correct else "<b class=bad>wrong</b>"
    return (
        f"<div class=player><p>{html.escape(frame.title)}: <code>{html.escape(frame.prompt)}</code> {verdict}</p>"
        f'<input type=range min=-1 max={last} value={last} aria-label="denoise step"> <output></output>'
        f"<div class=trace>{''.join(spans)}</div></div>"
    )
