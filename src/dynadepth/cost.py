"""What sublayers cost, by formula: FLOPs and key-value bytes, read off a model's modules and configuration.

FLOPs are those of matrix products, a multiply-add counted as two, as PyTorch's own counter does; norms, activations,
softmax, rotary embeddings and residual adds are left out. Scores and values are counted as eager attention computes
them: all of the rectangle queries × keys, masked entries included, with the keys that the cache still holds (a sliding
window keeps its last `window - 1`). Of experts those count that a token is sent to. Embedding look-ups are free and
the language-modelling head stands apart.

Legend: `tokens` new tokens of one sequence after `past` cached ones; keys = tokens + cached ones in sight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from dynadepth.architectures import decoder_layers, spec_for
from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.lora import RoutedLora
from dynadepth.routed import routing_of
from dynadepth.routing.decision import Site
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.skip_path import AbstractSkipPath

PARTS = {"attention": ("attention",), "mlp": ("mlp",), "block": ("attention", "mlp"), "expert": ("experts",)}
"""The sublayers of each target; `experts` are those inside an MLP, without their gate."""


class Share(NamedTuple):
    """What routing spends over what the dense model spends: on the routed target's sublayers, and on all the model."""

    target: float
    model: float


@dataclass(frozen=True)
class SublayerCost:
    """One sublayer's sizes; costs are methods of the work at hand. Counts per token are multiply-adds."""

    weights: int
    """Multiply-adds a token through weight matrices."""

    key_value_weights: int = 0
    """Those of them that make keys and values."""

    scores: int = 0
    """Multiply-adds per query and key: heads × (dimension of a key + dimension of a value)."""

    per_key: int = 0
    """Multiply-adds per key, whatever the number of queries: latent attention expands cached states every time."""

    cached: int = 0
    """Elements of keys and values stored a token."""

    window: int | None = None
    """Tokens in sight of a query, itself included; None for all."""

    def keys(self, tokens: float, past: int) -> float:
        """Keys that `tokens` queries are multiplied with."""
        return tokens + (past if self.window is None else min(past, self.window - 1))

    def flops(self, tokens: int, past: int) -> int:
        """Of the dense sublayer."""
        keys = int(self.keys(tokens, past))
        return 2 * (tokens * (self.weights + self.scores * keys) + self.per_key * keys)

    def flops_by_token(self, keep: float, tokens: int, past: int, project: bool) -> float:
        """Expected FLOPs where each token executes with probability `keep`, before and now.

        `project`: the others' keys and values are made too, and seen by those that execute; else they are not there.
        """
        keys = self.keys(tokens, past) * (1.0 if project else keep)
        executed = tokens * keep * (self.weights + self.scores * keys)
        skipped = tokens * (1.0 - keep) * self.key_value_weights if project else 0.0
        expanded = self.per_key * keys * (1.0 - (1.0 - keep) ** tokens)  # if any token executes
        return 2 * (executed + skipped + expanded)

    def stored(self, length: int) -> int:
        """Elements in the cache after `length` tokens."""
        return self.cached * (length if self.window is None else min(length, self.window - 1))


def sublayer_costs(model: PreTrainedModel, adapted: bool = False) -> list[dict[str, SublayerCost]]:
    """`"attention"` and `"mlp"` of every decoder layer, in order, and `"experts"`, those inside the latter; routers
    and skip paths are not in them, a LoRA beside the routers if `adapted` (one that is the user's own always is)."""
    spec, config = spec_for(model), model.config.get_text_config(decoder=True)
    cache: list[Any] = DynamicCache(config=config).layers  # knows each layer's window
    costs = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, held = getattr(layer, spec.attention, None), cache[index]
        window = held.sliding_window if getattr(held, "is_sliding", False) else None
        mlp = SublayerCost(_weights(getattr(layer, spec.mlp), config, adapted=adapted))
        experts = getattr(getattr(layer, spec.mlp), "experts", None)
        inside = SublayerCost(0 if experts is None else _weights(experts, config, adapted=adapted))
        if attention is None:  # what stands in its place in a hybrid model, by its weights
            mixer = _weights(layer, config, adapted=adapted) - mlp.weights
            costs.append({"attention": SublayerCost(mixer), "mlp": mlp, "experts": inside})
            continue
        attended = _attention_cost(attention, config, window, adapted)
        costs.append({"attention": attended, "mlp": mlp, "experts": inside})
    return costs


def flops(model: PreTrainedModel, target: str, layer: int, tokens: int, past: int = 0) -> int:
    """FLOPs of one dense sublayer (both of a layer for `block`) for one sequence. Raises `ConfigError` if unknown."""
    if target not in PARTS:
        raise ConfigError(f"unknown target {target!r}.{did_you_mean(target, PARTS)} Known: {', '.join(PARTS)}")
    costs = sublayer_costs(model)
    if not 0 <= layer < len(costs):
        raise ConfigError(f"layer {layer} does not exist: the model's layers are 0 to {len(costs) - 1}")
    return sum(costs[layer][part].flops(tokens, past) for part in PARTS[target])


def head_flops(model: PreTrainedModel, tokens: int = 1) -> int:
    """FLOPs of the language-modelling head for the `tokens` whose logits are computed (1 in generation)."""
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * tokens * _weights(head, model.config)


def router_flops(model: PreTrainedModel, tokens: int, past: int = 0) -> int:
    """FLOPs of all routers for one sequence: of every token at `token` granularity, else of what is pooled at prefill.

    A router's products with a single weight vector count too (PyTorch's counter has no formula for those).
    """
    routing = routing_of(model)
    decisions = int(past == 0) if routing.granularity.sticky else tokens
    return 2 * decisions * sum(router.windows * _router_weights(router) for router in routing.routers().values())


def _router_weights(router: AbstractRouter) -> int:
    """Multiply-adds a vector: through its matrices and single vectors, biases left out."""
    return sum(p.numel() for name, p in router.named_parameters() if p.dim() and not name.endswith("bias"))


def path_weights(model: PreTrainedModel, site: Site) -> int:
    """Weights of a site's skip path, as many as its multiply-adds a token; 0 of an identity."""
    return _weights(routing_of(model).states[site].skip_path, model.config, skip_own=False)


def flops_share(
    model: PreTrainedModel, keep: Mapping[Site, float], tokens: int, past: int = 0, scored: int = 1
) -> Share:
    """FLOPs of the routed model over those of the dense one, routers, skip paths, LoRA and kept projections included.

    `keep`: mean executions per site, as in `record.site_passes()`; sites not named execute always. `scored`: tokens
    whose logits are computed, for the model's share. At `token` granularity attention is taken as executing each token
    independently with that probability, so that without projected keys both queries and keys shrink.
    """
    routing, costs, own = routing_of(model), sublayer_costs(model), sublayer_costs(model, adapted=True)
    config = routing.config
    by_token, project = config.granularity == "token", config.kv_policy == "project"
    parts = PARTS[config.target]
    dense = {part: sum(cost[part].flops(tokens, past) for cost in costs) for part in ("attention", "mlp", "experts")}
    dense_target = sum(dense[part] for part in parts)
    added = {part: sum(cost[part].flops(tokens, past) for cost in own) - dense[part] for part in dense}  # by the LoRA

    saved = -float(router_flops(model, tokens, past)) - sum(added[part] for part in parts)
    for site, share in keep.items():
        for part in PARTS[site.target]:
            cost = own[site.layer][part]
            full = cost.flops(tokens, past)
            saved += full - (cost.flops_by_token(share, tokens, past, project) if by_token else share * full)
        taken = 1.0 if by_token else 1.0 - share  # by token it follows every token, so that each may take it
        saved -= taken * 2 * tokens * path_weights(model, site)
    dense_model = dense["attention"] + dense["mlp"] + head_flops(model, scored)
    elsewhere = added["attention"] + added["mlp"] - sum(added[part] for part in parts)
    return Share(1.0 - saved / dense_target, 1.0 - (saved - elsewhere) / dense_model)


def kv_bytes(model: PreTrainedModel, layer: int, length: int, batch: int = 1) -> int:
    """Bytes of one dense layer's keys and values after `length` tokens, in the model's dtype."""
    return batch * sublayer_costs(model)[layer]["attention"].stored(length) * model.dtype.itemsize


def kv_share(model: PreTrainedModel, keep: Mapping[Site, float], length: int) -> float:
    """KV bytes of the routed model over those of the dense one; `project` stores all of them at `token` granularity."""
    config = routing_of(model).config
    stored = [cost["attention"].stored(length) for cost in sublayer_costs(model)]
    if config.granularity == "token" and config.kv_policy == "project":
        return 1.0
    saved = sum((1.0 - k) * stored[site.layer] for site, k in keep.items() if "attention" in PARTS[site.target])
    return 1.0 - saved / sum(stored)


def _attention_cost(attention: Any, config: Any, window: int | None, adapted: bool) -> SublayerCost:
    own = getattr(attention, "config", config)
    heads = own.num_attention_heads
    weights = _weights(attention, own, adapted=adapted)
    if getattr(attention, "kv_lora_rank", None):  # multi-head latent attention (DeepSeek) caches compressed states
        expand = _weights(attention.kv_b_proj, own, adapted=adapted)
        scores = heads * (attention.qk_head_dim + attention.v_head_dim)
        cached = attention.kv_lora_rank + attention.qk_rope_head_dim
        compress = own.hidden_size * cached
        return SublayerCost(weights - expand, compress, scores, expand, cached, window)
    key_value_heads = getattr(own, "num_key_value_heads", None) or heads
    sizes = (getattr(holder, name, None) for holder in (attention, own) for name in ("head_dim", "head_size"))
    head_dim = next((size for size in sizes if size), own.hidden_size // heads)
    width = key_value_heads * 2 * head_dim
    key_value_weights = own.hidden_size * width
    if adapted:
        projections = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
        lora = [p for p in projections if isinstance(p, RoutedLora)]
        key_value_weights += sum(_weights(p, own, adapted=True) - _weights(p, own) for p in lora)
    return SublayerCost(weights, key_value_weights, heads * 2 * head_dim, 0, width, window)


def _weights(module: Any, config: Any, skip_own: bool = True, adapted: bool = False) -> int:
    """Multiply-adds a token through the weight matrices of `module` and its children.

    A linear layer (low-rank adapters are made of them) or a gate's matrix is applied to every token; a 3-D stack of
    experts to the `top_k` that the token is sent to. Routers and skip paths inside count only if not `skip_own`, a LoRA
    beside them if `adapted`.
    """
    if isinstance(module, RoutedLora) and not adapted:
        return _weights(module.base_layer, config, skip_own)  # type: ignore[attr-defined]  # PEFT's
    if skip_own and isinstance(module, (AbstractRouter, AbstractSkipPath)):
        return 0
    if isinstance(module, nn.Linear):  # of a quantised one the weight's own shape may be packed
        return module.in_features * module.out_features
    if isinstance(module, nn.Conv1d):  # a mixer's short window, a token at a time
        return module.weight.numel()
    matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    stacks = [p for p in matrices if p.dim() == 3]
    if stacks:  # 2-D parameters beside them are the experts' biases
        top_k = getattr(module, "top_k", None) or config.num_experts_per_tok
        own = sum(top_k * p.shape[1] * p.shape[2] for p in stacks)
    else:
        own = sum(p.numel() for p in matrices)
    return own + sum(_weights(child, config, skip_own, adapted) for child in module.children())
