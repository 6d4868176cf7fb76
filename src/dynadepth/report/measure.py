"""The demo's measurements: each takes a model as it stands and gives plain figures that are means over inputs."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynadepth.cost import flops_share, kv_share
from dynadepth.evaluation import divergence, evaluate
from dynadepth.evaluation.perplexity import WINDOW
from dynadepth.report.twin import Figures
from dynadepth.routing.recorder import recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Detail = Callable[[str], None]
TASK = "questions"


def help_text(seed: int) -> str:
    """The topics of Python's own help (every installation has them) in an order that `seed` decides."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(seed).shuffle(names)
    return "\n\n".join(topics[name].strip() for name in names)


def on_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, windows: int, detail: Detail | None = None
) -> tuple[Figures, Figures, dict[str, float]]:
    """Figures of a routed model on the first windows of a text, those of its dense self, and what ran (per site).

    `nll`, `kl` (nats a token), `agreement`, `keep_routed`, `keep_all`, `flops_share`, `kv_share`, `n_tokens`.
    """
    with recording() as record:
        found = divergence(model, tokenizer, text, max_windows=windows, batch_size=2, progress=detail)
    keep, sites = record.keep_ratio("prefill"), record.site_passes("prefill")
    assert keep is not None, "a routed model"
    routed: Figures = {
        "nll": found.routed.nll,
        "kl": found.kl,
        "agreement": found.agreement,
        "keep_routed": keep.routed,
        "keep_all": keep.all,
        "flops_share": flops_share(model, sites, WINDOW).model,
        "kv_share": kv_share(model, sites, WINDOW),
        "n_tokens": found.n_tokens,
    }
    dense: Figures = {**dict.fromkeys(routed, 1.0), "nll": found.dense.nll, "kl": 0.0, "n_tokens": found.n_tokens}
    return routed, dense, {str(site): share for site, share in sites.items()}


def can_score_tasks() -> bool:
    """Is the extra `eval` installed?"""
    return all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "datasets"))


def on_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    detail: Detail | None = None,
    compare_dense: bool = False,
) -> dict[str, Any]:
    """The `eval` results of the bundled questions."""
    return evaluate(
        model, tokenizer, tasks=[TASK], limit=limit, compare_dense=compare_dense, batch_size=16, progress=detail
    )
