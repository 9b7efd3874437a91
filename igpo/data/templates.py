"""How a problem becomes a prompt, and its solution the completion a policy should give.

The d1 templates follow the protocol of arXiv:2504.12216 (one user turn of instruction, blank line, question; answers in
tags, the first tag already in the prompt) in wording of our own: to compare with published numbers to the point, give
the original wording as a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from igpo.config import DataConfig

from .sources import DataError

PLAIN, D1 = "plain", "d1"
FORMATS = ("marker", "tags", "tags_raw")

_SKELETON = """Give your response in exactly this form:
<reasoning>
The steps that lead to the answer
</reasoning>
<answer>
ANSWER
</answer>"""

_BOXED = _SKELETON.replace("ANSWER", "\\boxed{...}")
_INSTRUCTIONS = {
    "math": "You are an expert in mathematics. Work through the problem step by step and put the final answer into "
    f"\\boxed{{}}.\n{_BOXED}",
    "countdown": "Write an arithmetic expression that equals the target. Use each of the given numbers exactly once, "
    "and the operations +, -, * and / as you need them. Think step by step, and put only the expression, without an "
    f"equals sign and without the target, into \\boxed{{}}.\n{_BOXED}",
    "sudoku": "Solve this 4x4 Sudoku. It is given as 16 digits, row after row, with 0 for an empty cell. Every row, "
    "every column and every 2x2 box of the solution holds each of the digits 1 to 4 once. Answer with the 16 digits of "
    f"the full grid, without spaces.\n{_SKELETON.replace('ANSWER', 'The 16 digits')}",
}


@dataclass(frozen=True)
class Template:
    """prompt: text with {question}.   prefix: what the prompt already holds of the completion.   form: of FORMATS.
    marker: what stands before the answer in the form "marker"."""

    prompt: str
    prefix: str
    form: str
    marker: str

    def fill(self, question: str) -> str:
        # not str.format: questions and instructions hold braces of LaTeX
        return self.prompt.replace("{question}", question)

    def completion(self, solution: str, answer: str | None) -> tuple[str, int]:
        """The completion around a worked solution, and where in it the solution starts."""
        if self.form == "marker":
            return solution + ("" if answer is None else f"\n{self.marker} {answer}"), 0
        head = "\n" if self.prefix else "<reasoning>\n"
        boxed = f"\\boxed{{{answer}}}" if self.form == "tags" else answer
        tail = "" if answer is None else f"\n<answer>\n{boxed}\n</answer>"
        return f"{head}{solution}\n</reasoning>{tail}", len(head)


def template(cfg: DataConfig, kind: str) -> Template:
    """The template of cfg for a dataset of this kind (math, countdown, sudoku).

    Raises:
        DataError: the file is not there or has no {question}, or the form is unknown.
    """
    if cfg.prompt_template == PLAIN:
        chosen = Template("{question}", "", "marker", cfg.answer_marker)
    elif cfg.prompt_template == D1:
        form = "tags_raw" if kind == "sudoku" else "tags"
        prompt = _INSTRUCTIONS[kind] + "\n\n{question}"
        chosen = Template(prompt, "<reasoning>", form, cfg.answer_marker)
    else:
        chosen = Template(_read(cfg.prompt_template), "", "marker", cfg.answer_marker)
    if cfg.response_prefix is not None:
        chosen = replace(chosen, prefix=cfg.response_prefix)
    if cfg.completion_format is not None:
        if cfg.completion_format not in FORMATS:
            raise DataError(
                f"completion_format must be one of {', '.join(FORMATS)}, got {cfg.completion_format!r}."
            )
        chosen = replace(chosen, form=cfg.completion_format)
    return chosen


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"prompt_template must be plain, d1 or a file, got {path!r}: {error.strerror}."
        ) from error
    if "{question}" not in text:
        raise DataError(f"prompt_template: {path} must hold {{question}}, where the problem goes.")
    return text
