"""Runs every op's every phase once on small odd shapes and holds the results against the reference on the CPU.

    compute-sanitizer --tool memcheck python scripts/sanitize_ops.py --backend cuda
    python scripts/sanitize_ops.py --backend cpu --device cpu        the same calls without a GPU

Rows of logits are strided and begin off a 16-byte boundary; some are skipped, masked out, NaN or -inf. A row that
refuses a call says so and is counted; a wrong result ends the program.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from igpo import ops

MASK = 3
# below a vector, a prime, and more than one tile with a ragged end
VOCABULARIES = (5, 1031, 8209)
DTYPES = (torch.float32, torch.bfloat16)
Result = tuple[Tensor, ...]


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values; rows one element longer than they need be, the first one element after an aligned address."""
    wide = torch.randn(*shape[:-1], shape[-1] + 1) * 3
    return wide.to(dtype)[..., 1:]


def copied(x: Tensor, device: str) -> Tensor:
    """x on device with the strides and the offset it has; `.to` would make it dense."""
    base = x._base if x._base is not None else x
    return base.to(device)[..., base.shape[-1] - x.shape[-1] :]


def targets_of(*shape: int, vocabulary: int) -> Tensor:
    targets = torch.randint(0, vocabulary, shape)
    targets.view(-1)[::3] = -100
    return targets


def gradients(outputs: Result, leaves: list[Tensor]) -> Result:
    loss = torch.stack([x.float().sum() for x in outputs]).sum()
    return (*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves))


def row_ops(vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[str], Result]]]:
    logits, targets = (
        strided(3, 5, vocabulary, dtype=dtype),
        targets_of(3, 5, vocabulary=vocabulary),
    )
    logits[0, 1, 2] = -torch.inf
    weights = torch.rand(3, 5)

    def logprob(device: str) -> Result:
        leaf = copied(logits, device).requires_grad_()
        return gradients(ops.token_logprob(leaf, targets.to(device), temperature=0.7), [leaf])

    def cross_entropy(device: str) -> Result:
        leaf = copied(logits, device).requires_grad_()
        loss = ops.masked_cross_entropy(leaf, targets.to(device), weights=weights.to(device))
        return gradients((loss,), [leaf])

    yield "token_logprob", logprob
    yield "masked_cross_entropy", cross_entropy


def linear_ops(
    vocabulary: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[str], Result]]]:
    hidden, weight = (torch.randn(n, 24).to(dtype) * 0.3 for n in (11, vocabulary))
    targets = targets_of(11, vocabulary=vocabulary)

    def leaves(device: str) -> list[Tensor]:
        return [x.to(device).requires_grad_() for x in (hidden, weight)]

    def logprob(device: str) -> Result:
        both = leaves(device)
        return gradients(ops.linear_logprob(*both, targets.to(device), chunk_rows=4), both)

    def cross_entropy(device: str) -> Result:
        both = leaves(device)
        loss = ops.linear_masked_cross_entropy(*both, targets.to(device), chunk_rows=4)
        return gradients((loss,), both)

    yield "linear_logprob", logprob
    yield "linear_masked_cross_entropy", cross_entropy


def unmask(vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[str], Result]]]:
    logits = strided(3, 7, vocabulary, dtype=dtype)
    logits[1, 2] = torch.nan
    logits[2, 0] = -torch.inf
    tokens = torch.full((3, 7), MASK)
    tokens[:, 4] = 0
    eligible = torch.ones(3, 7, dtype=torch.bool)
    eligible[0, :3] = False
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.0, "confidence": "margin", "threshold": 0.2},
        {"temperature": 1.2, "confidence": "entropy"},
        {"temperature": 1.2, "sampler": "gumbel", "confidence": "random"},
    ]
    for options in settings:

        def run(device: str, options=options) -> Result:
            step = ops.unmask_step(
                copied(logits, device), tokens.to(device), mask_id=MASK, suppress_tokens=[MASK],
                num_unmask=torch.tensor([1, 2, 9], device=device), eligible=eligible.to(device), seed=5, **options,
            )  # fmt: skip
            # where near-ties may fall either way only the shape of the result is held to the reference
            draws = options["temperature"] > 0 and options.get("sampler") != "gumbel"
            return (step.committed.sum(-1),) if draws else tuple(step)

        yield "unmask_step", run


def token_ops() -> Iterator[tuple[str, Callable[[str], Result]]]:
    shape = (5, 37)
    tokens, hints = torch.randint(4, 99, shape), torch.randint(4, 99, shape)
    tokens[:, ::2] = MASK
    mask, entropy, t = torch.rand(shape) < 0.5, torch.rand(shape), torch.rand(5)
    logp = -torch.rand(shape)
    old, ref, advantages = logp + 0.1, logp - 0.1, torch.randn(5)

    def loss(device: str, ratio: str) -> Result:
        leaf, *others = (x.to(device) for x in (logp, old, advantages, mask))
        leaf.requires_grad_()
        found = ops.policy_loss(leaf, *others, ratio=ratio, ref_logprob=ref.to(device), kl_coef=0.1)
        return (*(x.detach() for x in found), torch.autograd.grad(found.loss, leaf)[0])

    def noise(device: str, exact: bool) -> Result:
        args = (x.to(device) for x in (tokens, mask, t))
        return tuple(ops.forward_mask(*args, mask_id=MASK, seed=3, exact=exact))

    def merge(device: str) -> Result:
        return tuple(ops.merge_hints(*(x.to(device) for x in (tokens, hints, mask)), mask_id=MASK))

    def show(device: str) -> Result:
        lengths = torch.tensor([0, 1, 17, 36, 90], device=device)
        return (ops.sample_hint_mask(lengths, 37, ratio=0.5, seed=3),)

    yield "merge_hints", merge
    yield "keep_top_entropy", lambda d: (ops.keep_top_entropy(entropy.to(d), mask.to(d), 0.3),)
    yield "sample_hint_mask", show
    for exact in (False, True):
        yield "forward_mask", lambda d, exact=exact: noise(d, exact)
    for ratio in ("token", "sequence"):
        yield "policy_loss", lambda d, ratio=ratio: loss(d, ratio)


def calls() -> Iterator[tuple[str, str, torch.dtype, Callable[[str], Result]]]:
    """(op, what of it, dtype, function of the device)."""
    for name, run in token_ops():
        yield name, "", torch.float32, run
    for dtype in DTYPES:
        for vocabulary in VOCABULARIES:
            for make in (row_ops, linear_ops, unmask):
                for name, run in make(vocabulary, dtype):
                    yield name, f"V={vocabulary} {dtype}", dtype, run


def check(what: str, result: Result, truth: Result, dtype: torch.dtype) -> None:
    error = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for i, (a, b) in enumerate(zip(result, truth, strict=True)):
        torch.testing.assert_close(
            a.cpu().double(), b.double(), rtol=error, atol=error, equal_nan=True,
            msg=lambda m, i=i: f"{what}: result {i}: {m}",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    ran: dict[str, int] = dict.fromkeys(ops.OPS, 0)
    refused: dict[str, str] = {}
    for name, what, dtype, run in calls():
        with ops.use_backend("reference"):
            truth = run("cpu")
        try:
            with ops.use_backend(args.backend):
                result = run(args.device)
        except ops.BackendError as reason:
            refused[f"{name} {what}".strip()] = str(reason)
            continue
        check(f"{name} {what}", result, truth, dtype)
        ran[name] += 1
    for call, reason in refused.items():
        print(f"refused: {call}: {reason}")
    print(f"{sum(ran.values())} calls agree with the reference: {ran}")
    return 0 if all(ran.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
