"""torch.library registration: what lets torch.compile, autograd and opcheck see an op (ARCHITECTURE, rule 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("igpo", "DEF")


def register(
    schema: str,
    run: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Defines torch.ops.igpo.<name> and returns it.

    schema: "name(Tensor x, float y) -> Tensor". run: chooses a backend and computes. fake: output shapes and dtypes.
    backward, setup_context: as torch.library.register_autograd takes them.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"igpo::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"igpo::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.igpo, name).default
