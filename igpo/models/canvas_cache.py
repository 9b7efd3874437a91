"""Plans over the kept keys and values of whole canvases, of which a call computes a few columns anew.

Keys and values of a column depend on every token of the canvas. What a view leaves as it was is of the canvas as it
stood when it was computed: an approximation (prefix and dual cache of Fast-dLLM, arXiv:2505.22618).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import CanvasView
from .layout import MIN_ROWS, Plan, sdpa


def canvas_plan(view: CanvasView, tokens: Tensor, blocks: Tensor | None, own: Plan) -> Plan:
    """own: of a call without a cache. Raises ValueError; RuntimeError while gradients are recorded."""
    if blocks is not None:
        raise ValueError(
            "CanvasView: the model must have full attention, got a block-causal one. Use its KVCache, it is exact."
        )
    view.store.reserve(view.store.batch, 0)
    if view.columns is None:
        shape, plan = (len(view.slots), view.store.capacity), Storing(view, own)
    else:
        shape, plan = tuple(view.columns.shape), Window(view, view.columns)
    if tuple(tokens.shape) != shape:
        raise ValueError(
            f"CanvasView: tokens must have shape {shape}, that of its columns, got {tuple(tokens.shape)}."
        )
    return plan


class Storing:
    """The plan of a call without a cache, whose keys and values are kept."""

    def __init__(self, view: CanvasView, own: Plan) -> None:
        self.view, self.own = view, own
        self.pack, self.unpack = own.pack, own.unpack

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        slots = slice(0, len(self.view.slots)) if self.view.in_order else self.view.slots
        for kept, new in ((self.view.store.keys, key), (self.view.store.values, value)):
            kept[layer, slots] = self.unpack(new.transpose(1, 2)).transpose(1, 2)
        return self.own.attend(layer, query, key, value)


class Window:
    """Some columns of every canvas, which see all of them.

    As with Packed, what comes out for a canvas on a CPU does not depend on its padding or its company: sequences see
    their own columns alone, and `filler` rows of zeros make MIN_ROWS.
    """

    def __init__(self, view: CanvasView, columns: Tensor) -> None:
        self.view, self.columns = view, columns
        cpu = columns.device.type == "cpu"
        self.filler = max(0, MIN_ROWS - columns.numel()) if cpu else 0
        self.at = view.slots[:, None], columns
        # rows side by side that see the same columns; a sequence of padding sees all: softmax over none would be NaN
        self.runs: list[tuple[int, Tensor | slice]] = [(len(columns), slice(None))]
        self.visible: Tensor | None = None
        if view.real is not None:
            seen = view.real | ~view.real.any(1, keepdim=True)
            if cpu:
                patterns, counts = seen.unique_consecutive(dim=0, return_counts=True)
                pairs = zip(counts.tolist(), patterns, strict=True)
                self.runs = [(count, _places(pattern)) for count, pattern in pairs]
            else:
                self.visible = seen[:, None, None, :]

    def pack(self, x: Tensor) -> Tensor:
        if not self.filler:
            return x
        return torch.cat((x.flatten(0, 1), x.new_zeros(self.filler, *x.shape[2:])))[None]

    def unpack(self, x: Tensor) -> Tensor:
        return x[0, : self.columns.numel()].unflatten(0, self.columns.shape) if self.filler else x

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (self.unpack(x.transpose(1, 2)) for x in (query, key, value))
        seen = []
        for kept, new in ((self.view.store.keys, key), (self.view.store.values, value)):
            kept[layer].transpose(1, 2)[self.at] = new
            seen.append(
                kept[layer, : len(new)] if self.view.in_order else kept[layer, self.view.slots]
            )
        mixed, first = [], 0
        for count, places in self.runs:
            rows = slice(first, first + count)
            keys, values = (x[rows, :, places] for x in seen)
            mixed.append(sdpa(query[rows].transpose(1, 2), keys, values, self.visible))
            first += count
        return self.pack(torch.cat(mixed).transpose(1, 2)).transpose(1, 2)


def _places(pattern: Tensor) -> Tensor | slice:
    """Where (T,) bool is True; a slice where it can be one, which costs no copy of the keys."""
    places = pattern.nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
