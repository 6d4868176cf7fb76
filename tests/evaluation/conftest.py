"""Fixtures of the models in eval_models.py."""

from collections.abc import Callable
from typing import Any

import pytest
from eval_models import make_llama, make_tokenizer, route_by_content
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=True)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def routed() -> LlamaForCausalLM:
    """Sequence-level attention routers on layers 1 to 3."""
    return route_by_content(make_llama())


@pytest.fixture
def make_routed() -> Callable[..., Any]:
    """A routed model of another kind: `make_routed(granularity="token", num_hidden_layers=6)`."""

    def make(granularity: str = "sequence", **changes: Any) -> Any:
        return route_by_content(make_llama(**changes), granularity)

    return make
