"""What a completion looks like while it is denoised: colours by step, and an HTML page that plays the steps."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from .types import Canvas

MASKED = "\u2591"


def colour(step: int, num_steps: int) -> str:
    """ "#rrggbb" of the tokens committed at a step: blue for the first, over green to red for the last."""
    share = min(1.0, step / max(1, num_steps - 1))
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(0.6 * (1 - share), 0.75, 0.9))
    return f"#{red:02x}{green:02x}{blue:02x}"


@dataclass
class Trace:
    """The first completion of a canvas, step by step; give `see` to denoise as on_step, or call it with every step.

    tokens: the completion as it stands.   when: the step that committed each token, -1 where masked or given.
    frames: (step, [(position, token), …]) for every step, what changed.
    """

    canvas: Canvas
    prompt: str
    num_steps: int
    tokens: list[int] = field(init=False)
    when: list[int] = field(init=False)
    frames: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = self.canvas.completion[0].tolist()
        self.when = [-1] * len(self.tokens)

    def see(self, step: int, tokens: Tensor) -> None:
        row = tokens[0, self.canvas.prompt_length :].tolist()
        changes = [
            (i, now)
            for i, (now, then) in enumerate(zip(row, self.tokens, strict=True))
            if now != then
        ]
        for i, now in changes:
            self.tokens[i] = now
            self.when[i] = -1 if now == self.canvas.mask_id else step
        self.frames.append((step, changes))

    def text(self, tokenizer: Any) -> Text:
        """Masked tokens as dim blocks, hints in yellow, the others in the colour of their step, the newest bold."""
        text, frozen = Text(), self.canvas.frozen[0].tolist()
        newest = self.frames[-1][0] if self.frames else -1
        for token, when, hint in zip(self.tokens, self.when, frozen, strict=True):
            if token == self.canvas.mask_id:
                text.append(MASKED, "dim")
            elif token != self.canvas.eos_id:
                style = colour(when, self.num_steps)
                bold = "bold " if when == newest else ""
                text.append(tokenizer.decode([token]), "yellow" if hint else bold + style)
        return text


def write_page(path: Path, traces: Sequence[Trace], tokenizer: Any) -> None:
    """One HTML page without outside parts: every trace with a slider over its steps and a play button."""
    data = [_data(trace, tokenizer) for trace in traces]
    # a script element ends at its first "</": none may stand in the data
    body = json.dumps(data).replace("<", "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.replace("__DATA__", body), encoding="utf-8")


def _data(trace: Trace, tokenizer: Any) -> dict[str, Any]:
    canvas = trace.canvas

    def shown(token: int) -> str | None:
        if token == canvas.mask_id:
            return None
        return "\u00b7" if token == canvas.eos_id else tokenizer.decode([token])

    return {
        "prompt": trace.prompt,
        "start": [shown(token) for token in canvas.completion[0].tolist()],
        "frames": [
            {
                "step": step,
                "colour": colour(step, trace.num_steps),
                "set": [[i, shown(token)] for i, token in changes],
            }
            for step, changes in trace.frames
        ],
    }


_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Denoising, step by step</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
.canvas {{ white-space: pre-wrap; font-family: ui-monospace, monospace; border: 1px solid #bbb; padding: 1em }}
.masked {{ color: #bbb }} .given {{ background: #ffeb9c }} .new {{ font-weight: bold; text-decoration: underline }}
.prompt {{ white-space: pre-wrap; color: #555 }} input {{ width: 60% }}
</style></head><body>
<script type="application/json" id="data">__DATA__</script>
<script>
for (const trace of JSON.parse(document.getElementById("data").textContent)) {{
  const add = (tag, name, parent) => {{
    const e = document.createElement(tag); e.className = name; parent.appendChild(e); return e;
  }};
  const section = add("section", "", document.body);
  add("p", "prompt", section).textContent = trace.prompt;
  const play = add("button", "", section), slider = add("input", "", section), label = add("span", "", section);
  const canvas = add("div", "canvas", section);
  const spans = trace.start.map(() => add("span", "", canvas));
  play.textContent = "play";
  slider.type = "range"; slider.min = 0; slider.max = trace.frames.length;
  const show = (count) => {{
    const write = (i, text, name, colour) => {{
      spans[i].textContent = text === null ? "{MASKED}" : text;
      spans[i].className = text === null ? "masked" : name; spans[i].style.color = text === null ? "" : colour;
    }};
    trace.start.forEach((text, i) => write(i, text, "given", ""));
    trace.frames.slice(0, count).forEach((frame, k) =>
      frame.set.forEach(([i, text]) => write(i, text, "", frame.colour)));
    if (count) for (const [i, text] of trace.frames[count - 1].set) if (text !== null) spans[i].className = "new";
    label.textContent = count ? " after step " + trace.frames[count - 1].step : " before the first step";
  }};
  slider.value = trace.frames.length; show(trace.frames.length);
  slider.oninput = () => show(Number(slider.value));
  let timer = null;
  const stop = () => {{ clearInterval(timer); timer = null; play.textContent = "play"; }};
  play.onclick = () => {{
    if (timer) return stop();
    if (Number(slider.value) === trace.frames.length) slider.value = 0;
    play.textContent = "stop"; show(Number(slider.value));
    timer = setInterval(() => {{
      if (Number(slider.value) === trace.frames.length) return stop();
      slider.value = Number(slider.value) + 1; show(Number(slider.value));
    }}, 150);
  }};
}}
</script></body></html>
"""
