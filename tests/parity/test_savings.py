"""Semantic 6: what is skipped runs no kernel of the base model and stores no keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dynadepth
from dynadepth.architectures import spec_for
from dynadepth.architectures.probe import alone_read
from dynadepth.routing.sublayer import EntryNorm, RoutedNorm
from transfers import host_transfers

from .matrix import BATCH, ONCE, SHORT, TOKENS, Cell, in_chunks, inputs, over, routed
from .models import FAMILIES, LAYERS, tiny
from .oracle import attention_of, layers_of, module_of

EXECUTING = 5  # tokens of each row at a site that executes in part


@contextmanager
def tokens_through(module: nn.Module) -> Iterator[Counter[str]]:
    """Counts the tokens that pass each matrix (and each layer of experts) inside a module, by its name there."""
    counts: Counter[str] = Counter()

    def counter(name: str) -> Any:
        def hook(part: nn.Module, args: Any) -> None:
            counts[name] += args[0].shape[:-1].numel()

        return hook

    matrices = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) or any(p.dim() == 3 for p in part.parameters(recurse=False))
    }
    assert matrices
    handles = [part.register_forward_pre_hook(counter(name)) for name, part in matrices.items()]
    counts.update(dict.fromkeys(matrices, 0))
    yield counts
    for handle in handles:
        handle.remove()


def exact_decisions(cell: Cell) -> dict[Any, Tensor]:
    """Decisions under which every row has equally many executing tokens, none of them padding: nothing is filled up.

    The last layer skips everything, and so does every other token after the prefill.
    """
    given = {}
    for site in cell.sites:
        if cell.sticky:
            given[site] = torch.tensor([site.layer % 2 == 0, site.layer == 1, False])
            continue
        execute = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        execute[:, 4 : 4 + EXECUTING] = True
        execute[:, TOKENS - 1] = True
        given[site] = execute
    given[cell.sites[-1]] = torch.zeros_like(given[cell.sites[-1]])
    return given


@over(ONCE)
def test_skipped_units_run_no_kernel(name: str, cell: Cell) -> None:
    model, batch, given = cell.attach(tiny(name)), inputs(), exact_decisions(cell)
    lengths = (TOKENS - 2, 1, 1)
    with ExitStack() as stack:
        modules = {site: module_of(layers_of(model)[site.layer], cell.target) for site in cell.sites}
        counted = {site: stack.enter_context(tokens_through(module)) for site, module in modules.items()}
        start, cache = 0, None
        for length in lengths:
            for counts in counted.values():
                counts.update({part: -count for part, count in counts.items()})
            stop = start + length
            now = {site: execute if cell.sticky else execute[:, start:stop] for site, execute in given.items()}
            mask = batch["attention_mask"][:, :stop]
            with torch.no_grad(), dynadepth.fixed_routes(model, now):
                out = model(batch["input_ids"][:, start:stop], attention_mask=mask, past_key_values=cache)
            start, cache = stop, out.past_key_values
            for site, counts in counted.items():
                execute = int(now[site].sum()) * (length if cell.sticky else 1)
                for part, count in counts.items():
                    projects = cell.has_policy and cell.kv_policy == "project" and part.endswith(("k_proj", "v_proj"))
                    assert count == (BATCH * length if projects else execute), (site, part, start)


def dense_bytes(model: Any, layer: int, tokens: int) -> int:
    """Bytes of keys and values of one row's `tokens` in one layer of the bare model."""
    config, attention = model.config, attention_of(layers_of(model)[layer])
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(attention, "head_dim", None) or attention.head_size
    window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window and (types is None or types[layer] == "sliding_attention"):
        tokens = min(tokens, window - 1)
    return 2 * heads * width * tokens * 4


@over(ONCE)
def test_skipped_units_store_nothing(name: str, cell: Cell) -> None:
    model, batch, given = tiny(name), inputs(), exact_decisions(cell)
    dense = sum(dense_bytes(model, layer, TOKENS) * BATCH for layer in range(LAYERS))
    bare = model(**batch).past_key_values
    assert sum(part.numel() * 4 for layer in bare.layers for part in (layer.keys, layer.values)) == dense

    cell.attach(model)
    cache = in_chunks(model, batch, (TOKENS - 3, 1, 1, 1), given)[-1].past_key_values
    wanted = dense
    if cell.target != "mlp" and cell.sticky:
        wanted = sum(dense_bytes(model, site.layer, TOKENS) * int(given[site].sum()) for site in cell.sites)
    elif cell.has_policy and cell.kv_policy == "drop":
        wanted = 0
        for site in cell.sites:
            one = dense_bytes(model, site.layer, 1)
            held = dense_bytes(model, site.layer, TOKENS) // one  # tokens that a window still shows
            wanted += one * int(given[site][:, TOKENS - held :].sum())
    assert cache.kv_bytes() == wanted
    assert cache.reserved_bytes() >= wanted
    if not (cell.has_policy and cell.kv_policy == "drop"):
        room = sum(layer.spare_bytes() for layer in cache.layers)
        assert cache.reserved_bytes() == wanted + room


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefill_stores_its_keys_as_the_base_does_and_nothing_larger(name: str) -> None:
    model, batch = tiny(name), inputs()
    dense = model(**batch).past_key_values
    dynadepth.attach(model, dynadepth.StaticConfig(layers="all"))
    cache = model(**batch).past_key_values
    for found, wanted in zip(cache.layers, dense.layers, strict=True):
        for part in ("keys", "values"):
            states = getattr(found, part)
            assert torch.equal(states, getattr(wanted, part))
            if not found.is_sliding:  # those are the base class's own affair
                assert states.untyped_storage().nbytes() == states.nbytes


@over(SHORT)
def test_host_transfers(name: str, cell: Cell) -> None:
    batch = inputs()
    model, last = routed(name, cell, batch), TOKENS - 1
    with torch.no_grad(), host_transfers() as asked:
        cache = model(batch["input_ids"][:, :last], attention_mask=batch["attention_mask"][:, :last]).past_key_values
        assert 1 <= len(asked) <= LAYERS, asked
        asked.clear()
        model(batch["input_ids"][:, last:], attention_mask=batch["attention_mask"], past_key_values=cache)
        assert len(asked) <= (0 if cell.sticky else LAYERS), asked


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norm_before_a_known_skip_is_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dynadepth.attach(tiny(name), dynadepth.StaticConfig(skip=(1,)))
    entry = spec_for(model).attention_norms[0]
    norms = [None if entry is None else getattr(layer, entry) for layer in layers_of(model)]
    assert [isinstance(norm, EntryNorm) for norm in norms] == [False, entry is not None, *[False] * (LAYERS - 2)]
    computed = []
    for base in {type(norm) for norm in norms if norm is not None and not isinstance(norm, EntryNorm)}:
        plain = base.forward

        def counted(self: Any, *args: Any, plain: Any = plain) -> Any:
            computed.append(self)
            return plain(self, *args)

        monkeypatch.setattr(base, "forward", counted)
    model.generate(**inputs(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert all((norm in computed) == (index != 1) for index, norm in enumerate(norms) if norm is not None)
    dynadepth.detach(model)
    assert not any(isinstance(module, EntryNorm) for module in model.modules())


@pytest.mark.parametrize("granularity", ["static", "sequence", "token"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_the_norm_behind_a_skipped_sublayer_is_not_computed(
    name: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros would come out of it as zeros."""
    behind = spec_for(tiny(name)).attention_norms[1]
    assert behind is not None
    config: Any = dynadepth.StaticConfig(skip=(1,))
    if granularity != "static":
        policy = "drop" if granularity == "token" else "project"
        config = dynadepth.MindSkipConfig(layers="all", granularity=granularity, kv_policy=policy)
    model = dynadepth.attach(tiny(name), config)
    norms, computed = [getattr(layer, behind) for layer in layers_of(model)], []
    (base,) = {type(norm).__mro__[2] if isinstance(norm, RoutedNorm) else type(norm) for norm in norms}
    plain = base.forward

    def counted(self: Any, hidden: Any) -> Any:
        computed.append(self)
        return plain(self, hidden)

    monkeypatch.setattr(base, "forward", counted)
    skipping = {dynadepth.Site(1, "attention"): False}
    routes = nullcontext() if granularity == "static" else dynadepth.fixed_routes(model, skipping)
    with routes:
        model.generate(**inputs(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [norm in computed for norm in norms] == [index != 1 for index in range(LAYERS)]


def test_a_norm_that_others_read_too_is_always_computed() -> None:
    model = tiny("llama").eval()
    norms = [layer.input_layernorm for layer in layers_of(model)]
    with torch.no_grad():
        assert alone_read(model, norms, [layer.self_attn for layer in layers_of(model)])
        assert not alone_read(model, norms, [layer.mlp for layer in layers_of(model)])
