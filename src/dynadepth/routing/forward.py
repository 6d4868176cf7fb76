"""The model's own forward, opened and closed around: inputs become a `ForwardContext`, its trace becomes outputs.

`RoutedModel` is mixed into the model's class, and into its decoder's, so that either may be called; the inner call
finds the context of the outer one. `self.depth_routing` is the attached routing (`dynadepth.model.Routing`).
"""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from dynadepth.errors import ConfigError, UnsupportedCacheError
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.context import (
    ForwardContext,
    carrying_context,
    current,
    entered,
    injections,
    is_choosing,
    is_disabled,
    prompted,
    prompting,
)
from dynadepth.routing.decision import RoutingTrace, Site
from dynadepth.routing.recorder import publish
from dynadepth.routing.routes import RouteBook
from dynadepth.routing.sublayer import SublayerState

WAY_OUT = "use the default cache, or run dense with `with dynadepth.disabled(model):`"


@cache
def _positional(base_class: type) -> tuple[str, ...]:
    """Names of the positional parameters of a class's forward."""
    return tuple(inspect.signature(base_class.forward).parameters)[1:]  # type: ignore[attr-defined]  # mixed into a model's class


class RoutedModel:
    """Mixin put before a model's class."""

    depth_routing: Any

    def forward(self, *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base model's, plus `prompt_mask`: bool `[B, T]`, the tokens that a sequence-level router may pool.

        Without it: the attended tokens before the first label that is not -100 (a content-seeded prefix where there are
        none; it is not scored then), or without labels of tokens to predict all attended tokens. The outputs carry
        `depth_trace`, `depth_logits` and, while training, `depth_loss`, which is part of `loss`.
        """
        base, routing, context = super().forward, self.depth_routing, current()  # type: ignore[misc]  # mixed into a model's class
        if context is not None and context.owner is routing:
            return base(*args, **kwargs)
        if args:
            kwargs.update(zip(_positional(type(self).__mro__[2]), args, strict=False))
        if is_disabled(routing):
            if isinstance(cache_ := kwargs.get("past_key_values"), RoutedCache):
                cache_.release()
            with entered(None):
                return base(**kwargs)
        if _is_captured() and not routing.is_static:
            raise ConfigError(
                "A traced or exported graph would keep the route of the example it was captured with for every input: "
                "capture a static route (`tune --method static`), or the dense model with dynadepth.disabled(model)."
            )
        return_dict = kwargs.pop("return_dict", None)
        context = open_context(self, routing, kwargs, prompt_mask)
        with entered(context):
            outputs = base(**kwargs, return_dict=True)
        close_context(context, routing, outputs, kwargs)
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)  # type: ignore[attr-defined]  # mixed into a model's class
        return outputs.to_tuple() if as_tuple else outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, after refusing what cannot hold a route."""
        if not is_disabled(self.depth_routing):
            config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
            own = self.generation_config  # type: ignore[attr-defined]  # mixed into a model's class

            def option(name: str) -> Any:
                given = kwargs[name] if name in kwargs else getattr(config, name, None)
                return getattr(own, name, None) if given is None else given  # as transformers merges them

            training = self.training  # type: ignore[attr-defined]  # mixed into a model's class
            refuse_unroutable(self.depth_routing, option, training)
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # mixed into a model's class

    @wraps(GenerationMixin._assisted_decoding)  # `generate` reads its signature
    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._record_past(kwargs.get("past_key_values"))
        # The first forward brings the prompt and the assistant's draft together: only the prompt may decide the route.
        with prompting(self.depth_routing, input_ids.shape[1]):
            return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]  # mixed into a model's class

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]  # mixed into a model's class
        if getattr(generation_config, "is_assistant", False):
            self._record_past(model_kwargs.get("past_key_values"))

    def _record_past(self, cache: Any) -> None:
        """Prepares a cache for drafts that are taken back. The base class asks it to record its past before the first
        forward makes it one of ours."""
        if isinstance(cache, DynamicCache) and not is_disabled(self.depth_routing):
            routing = self.depth_routing
            RoutedCache.adopt(cache, routing.n_layers, routing.layout, routing.sparse_layers).activate_past_recording()

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching keeps a paged cache, and runs in threads of its own where nothing is
        disabled."""
        raise UnsupportedCacheError(
            "generate_batch and continuous batching use a paged cache, which cannot hold routes: call generate, or "
            "take the routers off with dynadepth.detach(model)."
        )

    init_continuous_batching = generate_batch

    def enable_input_require_grads(self) -> None:
        """Remembered for `detach`, and not done: only reentrant checkpointing needs it, which trainable routers refuse,
        and with it the layers below the lowest router would run backward."""
        if self.depth_routing.trainable:
            self.depth_routing.input_grads = True
        else:
            super().enable_input_require_grads()  # type: ignore[misc]  # mixed into a model's class

    def disable_input_require_grads(self) -> None:
        self.depth_routing.input_grads = False
        super().disable_input_require_grads()  # type: ignore[misc]  # mixed into a model's class

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Saves the base model alone, exactly as it would be saved unrouted; `dynadepth.save` saves the routers."""
        state = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]  # mixed into a model's class
        state = self.depth_routing.base_state(state)
        return super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)  # type: ignore[misc]  # mixed into a model's class

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        function = gradient_checkpointing_func or torch.utils.checkpoint.checkpoint
        super()._set_gradient_checkpointing(  # type: ignore[misc]  # mixed into a model's class
            enable=enable, gradient_checkpointing_func=carrying_context(function), **kwargs
        )


def _is_captured() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.6 has none
    return torch.jit.is_tracing() or bool(exporting and exporting())


def refuse_unroutable(routing: Any, option: Any, training: bool) -> None:
    """Raises for generation options whose cache cannot hold routed state, and for tokens that would compete while they
    are written; `option(name)` looks one up."""
    implementation = option("cache_implementation")
    if implementation not in (None, "dynamic", "offloaded"):
        raise UnsupportedCacheError(f"cache_implementation={implementation!r} cannot hold routes yet: {WAY_OUT}.")
    if option("use_cache") is False and routing.granularity.sticky:
        raise UnsupportedCacheError(
            "use_cache=False would decide a sequence's route anew at every token, since the route lives in the cache: "
            f"{WAY_OUT}, or route at token granularity."
        )
    if option("use_cache") is False and routing.chooses and training:
        raise ConfigError(
            "use_cache=False in training mode would let every new token compete with those before it: call "
            "model.eval() first."
        )


def open_context(model: Any, routing: Any, kwargs: dict[str, Any], prompt_mask: Tensor | None) -> ForwardContext:
    """Reads one forward's keyword arguments (and sets its cache in them)."""
    source = kwargs.get("input_ids")
    source = kwargs["inputs_embeds"] if source is None else source
    batch, tokens = source.shape[:2]
    cache_, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    text_config = model.config.get_text_config(decoder=True)
    # A mixture's own loss wants the choice of experts of every token: then every token runs.
    experts = kwargs.get("output_router_logits")
    experts = getattr(text_config, "output_router_logits", False) if experts is None else experts
    training = cache_ is None and model.training
    choosing = routing.chooses and (training or is_choosing(routing))
    if choosing:
        _refuse_choosing(cache_, experts)
    masked = choosing or (training and routing.learns)
    masked = masked or (cache_ is None and bool(experts and routing.target.runs_mlp))
    if training or masked:
        kwargs["use_cache"] = False
    elif cache_ is None and (getattr(text_config, "use_cache", False) if use_cache is None else use_cache):
        cache_ = DynamicCache(config=text_config)
    if cache_ is not None:
        cache_ = RoutedCache.adopt(cache_, routing.n_layers, routing.layout, routing.sparse_layers)
        kwargs["past_key_values"] = cache_
    book = RouteBook() if cache_ is None else cache_.book
    book.open(batch)

    mask = kwargs.get("attention_mask")
    token_mask = mask[:, -tokens:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    padding_unknown = mask is not None and token_mask is None and prompt_mask is None
    past = 0 if cache_ is None else cache_.seen
    pool_mask = None
    if routing.granularity.sticky and not book.complete:
        labels = kwargs.get("labels") if routing.predicts else None  # a classifier's are no tokens that could be seen
        pool_mask = _pool_mask(kwargs, source, token_mask, prompt_mask, past, labels)
        prompt_length = prompted(routing)
        if prompt_length is not None:
            given = torch.arange(past, past + tokens, device=source.device).expand(batch, -1) < prompt_length
            pool_mask = given if pool_mask is None else pool_mask & given
    prefill = not book.complete if routing.granularity.sticky else not past or tokens > 1
    attentions = kwargs.get("output_attentions")
    attentions = bool(getattr(text_config, "output_attentions", False) if attentions is None else attentions)
    context = ForwardContext(
        owner=routing,
        trace=RoutingTrace(routing.n_layers, batch, tokens, token_mask, prefill),
        book=book,
        cache=cache_,
        masked=masked,
        grad=masked and torch.is_grad_enabled(),
        choosing=choosing,
        penalised=training or not choosing,
        token_mask=token_mask,
        pool_mask=pool_mask,
        padding_unknown=padding_unknown,
        output_attentions=attentions,
        injected=injections(routing),
    )
    context.resting = _resting(routing, context)
    if routing.granularity.sticky and not (prefill or masked or attentions):
        context.whole, context.idle = book.whole, context.resting
    return context


def _resting(routing: Any, context: ForwardContext) -> frozenset[Site]:
    """See `ForwardContext.resting`."""
    if context.masked or not routing.rests:
        return frozenset()
    if not context.trace.prefill:
        return context.book.resting

    def skips(state: SublayerState) -> bool:
        known = state.known(context)
        return isinstance(known, int) and not known and not any(context.book.routes.get(state.site, ()))

    return frozenset(site for site, state in routing.states.items() if skips(state))


def _refuse_choosing(cache_: Any, experts: Any) -> None:
    """Raises for what a forward whose tokens compete within their sequence cannot have."""
    if cache_ is not None:
        raise UnsupportedCacheError(
            "The choice of a sequence's best tokens needs the whole sequence at once, and a cache brings it in parts: "
            "pass none, or leave `expert_choice` to decide causally, as generate does."
        )
    if experts:
        raise ConfigError(
            "output_router_logits=True asks for the mixture's own balance loss, which wants every token in every layer "
            "while Mixture-of-Depths runs some: turn it off, and use method 'mode' with its own balance loss."
        )


def _pool_mask(
    kwargs: dict[str, Any],
    source: Tensor,
    token_mask: Tensor | None,
    prompt_mask: Tensor | None,
    past: int,
    labels: Tensor | None,
) -> Tensor | None:
    """The tokens that a route may depend on (design, semantic 4): bool `[B, T]`, None for all. `labels`: of tokens.

    `prompt_mask` is of this forward's tokens; or of all from the first on, as `generate` hands it to every part of a
    prefill and to prompts with drafted tokens behind them: what it does not reach is no prompt.
    """
    tokens = source.shape[1]
    if prompt_mask is not None:
        prompt = prompt_mask.bool().to(source.device)
        if prompt.shape[1] != tokens:
            short = max(past + tokens - prompt.shape[1], 0)
            prompt = torch.nn.functional.pad(prompt, (0, short))[:, past : past + tokens]
        return prompt if token_mask is None else prompt & token_mask
    if labels is None:
        return token_mask
    real = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if token_mask is None else token_mask
    scored = (labels != -100) & real
    before = (scored.cumsum(1) == 0) & real
    plain = ~before.any(1, keepdim=True)  # no prompt known: pool a prefix, and do not score what was pooled
    prompt = torch.where(plain, content_prefix(source, real), before)
    kwargs["labels"] = labels.masked_fill(plain & prompt, -100)
    return prompt


def content_prefix(source: Tensor, real: Tensor, seed: int = 0) -> Tensor:
    """A pseudo-random prefix of each row, between an eighth and three quarters of its real tokens: bool `[B, T]`.

    Its length depends on the row's length and on the ids of that first eighth alone: neither batch composition nor
    padding changes it, nor does any token behind the prefix. Rows given as embeddings take half.
    """
    count, rank = real.sum(1, keepdim=True), real.cumsum(1)
    low = (count // 8).clamp(min=1)
    span = (count * 3 // 4 - low).clamp(min=0) + 1
    if source.dim() == 2:
        mixed = (source * (rank * 2654435761 + seed * 40503 + 12345) * (real & (rank <= low))).sum(1, keepdim=True)
        offset = (mixed ^ (mixed >> 15)).remainder(span)
    else:
        offset = (count // 2 - low).clamp(min=0)
    return (rank <= low + offset) & real


def close_context(context: ForwardContext, routing: Any, outputs: Any, kwargs: dict[str, Any]) -> None:
    """Turns the trace into outputs, fixes the routes that were decided, and counts the tokens."""
    trace = context.trace
    if trace.fresh is not None:
        context.book.decided = [old or new for old, new in zip(context.book.decided, trace.fresh, strict=True)]
    if context.cache is not None:
        context.cache.advance(trace.tokens)
    if (context.attention_fixes or context.attention_again) and getattr(outputs, "attentions", None) is not None:
        outputs["attentions"] = _whole_attentions(context, outputs.attentions)
    loss = None
    if context.masked and context.penalised:
        loss = routing.config.depth_loss(trace, row_weights(trace, kwargs if routing.predicts else {}))
        if loss is not None and getattr(outputs, "loss", None) is not None:
            outputs["loss"] = outputs.loss + loss.to(outputs.loss.dtype)
    for name, value in (("depth_trace", trace), ("depth_logits", trace.logits), ("depth_loss", loss)):
        object.__setattr__(outputs, name, value)
    publish(trace, context.book)


def row_weights(trace: RoutingTrace, kwargs: dict[str, Any]) -> Tensor:
    """Weights `[B]` of the rows in the depth loss, on the decisions' device: equal; under gradient accumulation (where
    the trainer gives the number of label tokens of the whole step) by label tokens, so that any division into
    micro-batches adds up to the same loss."""
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if labels is None or items is None:
        decided = next((decision.execute.device for decision in trace.decisions.values()), None)
        return torch.full((trace.batch,), 1 / trace.batch, device=decided)
    return (labels[:, 1:] != -100).sum(1) / items


def _whole_attentions(context: ForwardContext, recorded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One full-batch entry a layer, though a routed block runs its attention for some rows or tokens or not at all."""
    entries = iter(recorded)
    whole = []
    for layer in range(context.trace.n_layers):
        fix = context.attention_fixes.get(layer, _same)
        entry = fix if isinstance(fix, Tensor) else fix(next(entries))
        again = context.attention_again.get(layer)
        whole.append(entry if again is None else again(entry, next(entries)))
    return tuple(whole)


def _same(weights: Tensor) -> Tensor:
    return weights
