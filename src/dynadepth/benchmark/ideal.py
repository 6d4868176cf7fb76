"""What a route should save by a model of the machine, to stand beside what it does save.

A prefill is taken to be bound by arithmetic: its time is its FLOPs (`cost.flops_share`). A decode step is taken to be
bound by memory: its time is the bytes that it must read, every weight that any row uses once and every cached key and
value that is looked at. Both leave out what does not shrink with the route (Python, launches, norms, activations), so
that small models save less than this says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from dynadepth.cost import PARTS, flops_share, path_weights, router_flops, sublayer_costs
from dynadepth.routed import routing_of
from dynadepth.routing.decision import Site

Kept = Mapping[Site, Sequence[float]]
"""Per site the executions: 0, 1 or 2 of each row where routes are sticky, else one mean over rows and tokens."""


class Moved(NamedTuple):
    """Bytes read by one decode step."""

    dense: float
    routed: float


def ideal_saving(model: PreTrainedModel, kept: Kept, phase: str, batch: int, context: int, new_tokens: int) -> float:
    """The share of the dense model's time that the route saves by the model above; in the middle of the new tokens."""
    if phase == "prefill":
        keep = {site: sum(shares) / len(shares) for site, shares in kept.items()}
        return 1.0 - flops_share(model, keep, context).model
    moved = bytes_moved(model, kept, batch, context + new_tokens // 2)
    return 1.0 - moved.routed / moved.dense


def bytes_moved(model: PreTrainedModel, kept: Kept, batch: int, length: int) -> Moved:
    """Bytes that one decode step of `batch` rows reads with `length` tokens in the cache, dense and routed.

    By token, rows are taken to decide independently with the mean probability, before and now. Of experts, those
    count that one token is sent to.
    """
    routing, costs, size = routing_of(model), sublayer_costs(model), model.dtype.itemsize
    config, own = routing.config, sublayer_costs(model, adapted=True)
    by_token, project = not routing.granularity.sticky, config.kv_policy == "project"
    head = model.get_output_embeddings()
    dense = 0.0 if head is None else float(head.weight.numel())
    for layer in costs:
        dense += layer["attention"].weights + layer["mlp"].weights + batch * layer["attention"].stored(length)
    # A LoRA beside the routers is read by the routed model alone, and with what it stands in.
    weights = [sum(layer[part].weights for layer in some for part in ("attention", "mlp")) for some in (costs, own)]
    saved = float(weights[0] - weights[1])
    for site, shares in kept.items():
        share = sum(shares) / len(shares)
        # The chance that no row executes, so that weights are not read; less than 0 where one reads them twice.
        unused = (1.0 - share) ** batch if by_token else 1.0 - max(shares)
        for part in PARTS[site.target]:
            cost = own[site.layer][part]
            made = cost.key_value_weights if by_token and project else 0  # keys and values are made all the same
            saved += unused * (cost.weights - made)
            seen = share * (share if by_token and not project else 1.0)
            saved += batch * cost.stored(length) * (1.0 - seen)
        if min(shares) < 1 or by_token:  # a path follows every token where each may skip
            saved -= path_weights(model, site)
    asked = router_flops(model, 1, length) / 2 * 4  # float32
    return Moved(dense * size, (dense - saved) * size + asked)
