"""From scores to budgets: how much each sublayer matters, which ones a static route skips, and which thresholds keep a
share.

Everything here looks at prompts only: `batches` are dicts with `input_ids` and `attention_mask` (`[B, T]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures import ArchitectureSpec, decoder_layers, decoder_of, spec_for
from dynadepth.architectures.probe import quietly
from dynadepth.dial import check_adjustable, set_threshold
from dynadepth.errors import BudgetError
from dynadepth.methods.static import skip_count
from dynadepth.model import disabled
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.calibration import Calibration, CalibrationPoint
from dynadepth.routing.decision import Site
from dynadepth.routing.recorder import recording

Batches = Sequence[dict[str, Tensor]]
Progress = Callable[[int, int], None]

KEEPS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Keep ratios of the routed sites at which `calibrate` measures."""
QUANTILES = 257


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The decoder alone (no vocabulary head) on one batch of prompts, without a cache."""
    decoder = decoder_of(unwrapped(model))
    device = next(decoder.parameters()).device
    return decoder(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
    )


def prompts_to_batches(prompts: Iterable[Sequence[int]], pad: int, batch_size: int = 8) -> Batches:
    """Right-padded batches of token id lists, sorted by length so that little is padded."""
    ordered = sorted((list(ids) for ids in prompts if len(ids)), key=len)
    batches = []
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        width = max(map(len, rows))
        batches.append(
            {
                "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            }
        )
    return batches


def up_to(texts: Iterable[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first texts, whole, up to the one with which they have so many `tokens`; all where they have fewer."""
    chosen, total = [], 0
    for text in texts:
        if total >= tokens:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def joined(texts: Iterable[Sequence[int]], length: int, count: int) -> list[list[int]]:
    """The first `count` windows of `length` tokens of the texts put end to end; one shorter window of texts that fill
    none."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= length * count:
            break
        ids += text
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count] or [ids]


def importance(
    model: nn.Module, batches: Batches, target: str, progress: Callable[[int, int], None] | None = None
) -> dict[Site, float]:
    """1 − cosine of the residual stream before and after each sublayer of a target, mean over real tokens.

    Measured in the dense model, on the residual stream itself (after any post-norm), so that families whose sublayers
    end in a norm are scored alike. Source: block influence (ShortGPT, arXiv 2403.03853, Eq. 1), as LLM-Drop applies it
    to sublayers (arXiv 2406.15786, section 3). Of a hybrid model the layers with attention have scores, no others.
    """
    base = unwrapped(model)
    spec = spec_for(base)
    layers = {i: layer for i, layer in enumerate(decoder_layers(base, spec)) if hasattr(layer, spec.attention)}
    totals = dict.fromkeys(layers, 0.0)
    tokens = 0
    for done, batch in enumerate(batches, 1):
        mask = batch["attention_mask"].bool()
        streams = _residual_streams(model, spec, list(layers.values()), batch)
        for index, (before_layer, after_attention, after_layer) in zip(layers, streams, strict=True):
            before, after = {
                "attention": (before_layer, after_attention),
                "mlp": (after_attention, after_layer),
                "block": (before_layer, after_layer),
            }[target]
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[index] += float(((1 - cosine) * mask.to(cosine.device)).sum())
        tokens += int(mask.sum())
        if progress:
            progress(done, len(batches))
    return {Site(index, target): total / max(tokens, 1) for index, total in totals.items()}


def _residual_streams(
    model: nn.Module, spec: ArchitectureSpec, layers: Sequence[nn.Module], batch: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer the residual stream `[B, T, D]`: before it, with the attention's contribution, and after it."""
    before: list[Tensor] = []
    contributed: list[Tensor] = []
    after: list[Tensor] = []

    def keep(store: list[Tensor], which: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if which == "input" else output
            store.append(value[0] if isinstance(value, tuple) else value)

        return hook

    hooks = []
    for layer in layers:
        contributor = getattr(layer, spec.attention_norms[1] or spec.attention)
        hooks.append(contributor.register_forward_hook(keep(contributed, "output"), with_kwargs=True))
        hooks.append(layer.register_forward_hook(keep(before, "input"), with_kwargs=True))
        hooks.append(layer.register_forward_hook(keep(after, "output"), with_kwargs=True))
    try:
        with quietly(unwrapped(model)), disabled(model):
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    scales = [getattr(layer, spec.residual_scale) if spec.residual_scale else 1.0 for layer in layers]
    mids = [x + c * scale for x, c, scale in zip(before, contributed, scales, strict=True)]
    return list(zip(before, mids, after, strict=True))


def static_skip(scores: dict[Site, float], budget: float, n_layers: int) -> tuple[int, ...]:
    """Layers that a static route skips so that about `budget` of all sublayers execute: the least important ones."""
    count = skip_count(budget, n_layers)
    if count > len(scores):
        raise BudgetError(f"budget {budget} asks to skip {count} sublayers, but only {len(scores)} are scored.")
    return tuple(sorted(in_order(scores)[:count]))


def in_order(scores: Mapping[Site, float]) -> tuple[int, ...]:
    """The layers of scored sites, the least important first: the order in which a static route skips them."""
    return tuple(site.layer for site in sorted(scores, key=lambda site: scores[site]))


def mixture(keep: float, n_layers: int, most: int, tolerance: float = 0.0) -> list[tuple[int, float]]:
    """(count skipped, share of the inputs): the one or two whole counts, at most `most`, whose mean keep ratio of
    `n_layers` sublayers is exactly `keep`; where the nearest count's own is within `tolerance` of that, it alone."""
    skipped = min((1 - keep) * n_layers, float(most))
    if abs(round(skipped) - skipped) <= max(tolerance * n_layers, 1e-3):
        return [(round(skipped), 1.0)]
    low = math.floor(skipped)
    return [(low, low + 1 - skipped), (low + 1, skipped - low)]


def units_needed(shares: int) -> int:
    """Prompts that tell so many shares apart, one between any two of them.

    The sites and tokens of one prompt are not counted apart: what a router answers hangs on its own bias first, so that
    many of one prompt say little about other prompts. Forty prompts met budgets within 0.02 with thirty sites; fewer
    sites, whose every decision weighs more, take more prompts.
    """
    return shares + 1


def check_prompts(model: nn.Module, batches: Batches, shares: int) -> None:
    """Raises BudgetError where the prompts are fewer than `units_needed`, so that the quantiles of some shares would be
    the same."""
    routing = routing_of(model)
    check_adjustable(routing)
    if not shares:
        raise BudgetError("calibration was given no keep ratios: name at least one.")
    prompts, needed = sum(len(b["input_ids"]) for b in batches), units_needed(shares)
    if prompts < needed:
        raise BudgetError(
            f"{prompts} prompts are too few to calibrate {shares} budgets: give at least {needed} beside those that "
            "are tuned on, and about forty for budgets that are met within 0.02."
        )


def calibrate(
    model: nn.Module, batches: Batches, keeps: Sequence[float] = KEEPS, progress: Progress | None = None
) -> Calibration:
    """Measures, on prompts, which threshold keeps which share of the routed units; stores it in the model's routing.

    For each share it searches twice: the quantile of the logits seen under the last threshold, then of those seen under
    the new one, since skipping a lower site changes what the routers above see; once for all where it does not (`route`
    granularity). The routers' thresholds are as before afterwards. Raises BudgetError where there are fewer units than
    shares to tell apart.
    """
    routing = routing_of(model)
    routers = list(routing.routers().values())
    check_prompts(model, batches, len(set(keeps)))
    before = [(router.threshold.clone(), router.asked) for router in routers]
    points, todo = [], sorted({min(max(keep, 0.0), 1.0) for keep in keeps}, reverse=True)
    try:
        with quietly(unwrapped(model)):
            set_threshold(routers, float("-inf"))
            seen = _router_logits(model, batches)
            for done, keep in enumerate(todo):
                if routing.granularity.ahead:
                    kept = (seen >= quantile_threshold(seen, keep)).double().mean().item()
                else:
                    for _ in range(2):
                        set_threshold(routers, quantile_threshold(seen, keep))
                        with recording() as record:
                            seen = _router_logits(model, batches)
                    measured = record.keep_ratio("prefill")
                    assert measured is not None
                    kept = measured.routed
                points.append(CalibrationPoint(kept, _quantiles(seen)))
                if progress:
                    progress(done + 1, len(todo))
    finally:
        for router, (threshold, asked) in zip(routers, before, strict=True):
            router.threshold.copy_(threshold)
            router.asked = asked
    rows = sum(len(batch["input_ids"]) for batch in batches)
    ordered = sorted({point.keep: point for point in points}.values(), key=lambda point: point.keep)
    routing.calibration = Calibration(tuple(ordered), rows)
    return routing.calibration


def pin_threshold(model: nn.Module, batches: Batches, keep: float) -> None:
    """Sets the common threshold that keeps a share of the routed units of `batches`, as the routers answer where
    everything executes."""
    routers = list(routing_of(model).routers().values())
    with quietly(unwrapped(model)):
        set_threshold(routers, float("-inf"))
        set_threshold(routers, quantile_threshold(_router_logits(model, batches), keep))


def quantile_threshold(logits: Tensor, keep: float) -> float:
    """The logit that the share `keep` of the units reaches, halfway between two units' logits."""
    return CalibrationPoint(keep, _quantiles(logits)).threshold(keep)


def _quantiles(logits: Tensor) -> tuple[float, ...]:
    """`QUANTILES` of them, evenly spaced, between the nearest two by distance (`torch.quantile` takes 16 million at
    most)."""
    ordered = logits.double().sort().values
    place = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * (len(ordered) - 1)
    low = place.long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return tuple(torch.lerp(ordered[low], ordered[high], place - low).tolist())


@torch.no_grad()
def _router_logits(model: nn.Module, batches: Batches) -> Tensor:
    """Router logits of all units of all sites, flat; at token granularity each sequence gives equally many."""
    collected = []
    for batch in batches:
        trace = forward(model, batch).depth_trace
        for logits in trace.logits.values():
            if logits.dim() == 1:
                collected.append(logits.cpu())
                continue
            for row, mask in zip(logits.cpu(), batch["attention_mask"].bool(), strict=True):
                values = row[mask].sort().values  # PER_ROW evenly spaced order statistics: sequences count the same
                collected.append(values[torch.linspace(0, len(values) - 1, PER_ROW).round().long()])
    return torch.cat(collected)


PER_ROW = 64
