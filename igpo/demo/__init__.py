"""The embedded demonstration: GRPO against IGPO on a small task, on a CPU, in minutes."""

from __future__ import annotations

from igpo.options import DemoOptions


def main(options: DemoOptions) -> None:
    """`igpo demo`. What it needs is imported when it runs."""
    from .program import run

    run(options)
