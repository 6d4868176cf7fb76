"""How often a form of a layer is compiled: by a compiler that counts and leaves all as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import dynadepth
from dynadepth import MindSkipConfig, Site, fixed_routes, routing_of
from dynadepth.compiled import linear
from dynadepth.errors import UnsupportedModelError
from parity.models import FAMILIES
from small import ALL, paths, ragged, scatter


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Graphs of each compiled function."""
    found: Counter[int] = Counter()

    def traced(own: Any, fullgraph: bool, options: dict[str, Any]) -> Any:
        number = len(found)
        found[number] = 0

        def counting(graph: Any, inputs: Any) -> Any:
            found[number] += 1
            return graph.forward

        return torch._dynamo.optimize(counting, nopython=fullgraph, guard_filter_fn=options["guard_filter_fn"])(own)

    monkeypatch.setattr(torch, "compile", traced)
    return found


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2)])
def test_batches_of_any_size_compile_a_form_once(family: str, kinds: int, versions: Counter[int]) -> None:
    """One row, up to eight and more are read by other kernels in bfloat16, and so are rows that execute or skip: each
    has a form of its own, instead of all of them sharing one that PyTorch makes anew until it gives up."""
    model: Any = FAMILIES[family]().eval().to(torch.bfloat16)
    model = paths(scatter(dynadepth.attach(model, MindSkipConfig(layers=ALL, skip_path="linear", skip_rank=4))))
    for path in routing_of(model).paths().values():
        path.to(torch.bfloat16)
    dynadepth.compile(model)
    steps = next(m for m in model.modules() if hasattr(m, "compiled_plan")).compiled_plan.steps
    generator = torch.Generator().manual_seed(0)
    for batch in (2, 12, 5, 16, 9, 3, 10, 8, 14, 7):
        for share in (0.3, 0.7):
            decisions = {Site(layer, "attention"): torch.rand(batch, generator=generator) < share for layer in ALL}
            with fixed_routes(model, decisions), torch.no_grad():
                model.generate(**ragged((7,) * batch), max_new_tokens=3, do_sample=False)
    assert not steps.failed
    assert max(versions.values()) <= 2 * kinds, "for the first number of rows, and for all of them"
    assert len(versions) == len(steps._forms)
    assert {"executed", "skipped"} <= {key[0] for key in steps._forms}


def test_layers_in_other_places_of_the_cache_are_refused_by_name() -> None:
    model = FAMILIES["llama"]().eval()
    del model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="layer 1 keeps its keys in place 2 of the cache"):
        dynadepth.compile(model)
    assert not hasattr(model.model.layers[0], "compiled_plan")


def test_weights_that_become_something_else_take_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchao's do, that still say they are bfloat16."""

    class Odd(torch.Tensor):
        pass

    model = FAMILIES["llama"]().eval().to(torch.bfloat16)
    dynadepth.compile(model)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, linear.SmallLinear), "this test needs the kernel"
    row = torch.randn(1, 1, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(row)
        monkeypatch.setattr(torch.ops.dynadepth, "small_linear", lambda *_: pytest.fail("of an odd weight"))
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Odd), requires_grad=False)
        assert type(layer.weight) is Odd
        torch.testing.assert_close(layer(row).as_subclass(torch.Tensor), expected, atol=1e-2, rtol=1e-2)
