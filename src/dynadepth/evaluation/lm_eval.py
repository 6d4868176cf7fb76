"""The model of lm-evaluation-harness that tells a router what the prompt is, and the harness's command line with it.

    python -m dynadepth.evaluation.lm_eval --model dynadepth --tasks arc_easy \\
        --model_args pretrained=smollm2-135m,routers=my-routers,budget=0.75,dtype=bfloat16

The harness finds no plugins by itself: this registers `dynadepth` and hands over. `pretrained` is whatever `dynadepth`
takes as a model, `routers` a folder of saved routers (none: the bare model), and every other argument is the harness's.

What a sequence-level router may pool is the context, never the continuation. Where the options of a question differ in
their context (WinoGrande), it is what their contexts have in common, so that a question is scored under one route.

Shape suffixes: B rows, T tokens, N scored positions, P (position, token) pairs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dynadepth import hub
from dynadepth.errors import ConfigError, DataError, DynadepthError
from dynadepth.evaluation.scoring import Scorer, pair_log_probs
from dynadepth.evaluation.tasks import missing_extra
from dynadepth.model import is_attached, load, routing_of, set_budget

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise missing_extra(error) from error

logger = logging.getLogger(__name__)

# By its path, not as a decorator: run with `python -m`, this file is imported twice.
model_registry.register("dynadepth", target="dynadepth.evaluation.lm_eval:DynadepthLM")

Answer = tuple[float, bool]
"""Summed log-probability of a continuation, and whether greedy decoding would write it."""


@dataclass
class Request:
    """A continuation to be scored, in tokens."""

    question: Hashable
    """Requests with the same value belong to one question: they share a route."""

    context: list[int]
    continuation: list[int]
    pooled: int = 0
    """How many tokens of the context a router may see."""

    text: tuple[str, str] | None = None
    """For messages."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model reads: everything but the last token, which is only predicted."""
        return (*self.context, *self.continuation[:-1])


class DynadepthLM(HFLM):
    """`HFLM` for routed models, and as good for models without routers.

    Log-likelihoods are summed in float32, only continuations pass the language model head, and requests that read the same
    tokens (the letters of a multiple choice) are one row of one forward.
    """

    def __init__(
        self,
        pretrained: Any,
        routers: str | None = None,
        budget: float | str | None = None,
        device: str | None = None,
        progress: Callable[[str], object] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained = hub.resolve(pretrained)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        if self.backend != "causal":
            raise ConfigError(f"only causal language models can be routed, not {type(self.model).__name__}.")
        if routers is not None:
            self._model = load(self._model, routers)
            self._model.eval()
        if budget is not None:
            if not is_attached(self._model):
                raise ConfigError(f"budget={budget} needs routers=DIR: the model has none.")
            try:
                share = float(budget)
            except ValueError:
                raise ConfigError(f"budget={budget} is no number: give a share such as 0.75.") from None
            set_budget(self._model, **{routing_of(self._model).config.target: share})
        self.progress = progress
        self.scorer = Scorer(self._model, is_attached(self._model))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """One answer for each of the harness's requests, in their order."""
        rows = []
        for index, request in enumerate(requests):
            context, continuation = self._encode(*request.args[:2])
            asked = (request.task_name, request.doc_id)
            # A request without a context ("unconditional", for mutual information) is no option of the question.
            question = (*asked, request.args[0] == "") if request.doc_id is not None else index
            rows.append(Request(question, context, continuation, text=request.args))
        for options in _grouped(rows, lambda row: row.question):
            self._share_route(options)
        # The harness caches the answers of a finished run. Adding single ones on the way, as HFLM does, could leave half of
        # a question's options in the cache, and the other half without the contexts that their common route depends on.
        return self._score(rows)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """For callers that bring tokens, without questions: `loglikelihood_rolling` above all, whose text is one.

        There the prompt is the first quarter of each window (or its context, where longer). Its tokens are scored too, as the
        harness has it: for a figure without that, use dynadepth's own perplexity.
        """
        rows = []
        for index, (text, context, continuation) in enumerate(requests):
            row = Request(index, list(context), list(continuation), text=text)
            self._share_route([row])
            if text is None:
                row.pooled = max(row.pooled, len(row.tokens) // 4)
            rows.append(row)
        return self._score(rows, override_bs)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)

    def _share_route(self, options: list[Request]) -> None:
        """Sets what a router may see, the same tokens for all options of a question, and fits them to the model's length."""
        for row in options:
            if not row.continuation:
                raise DataError(f"there is nothing to score in {row.text!r}: the continuation adds no token.")
            if len(row.continuation) > self.max_length:
                raise DataError(
                    f"a continuation of {len(row.continuation)} tokens is longer than the {self.max_length} of the model."
                )
        if _common_prefix(options) == 0:
            for row in options:
                row.context = [self.prefix_token_id, *row.context]
        pooled = _common_prefix(options)
        # From the left, as the harness truncates, but the same amount for all: the prompt must stay one.
        excess = max(len(row.tokens) for row in options) - self.max_length
        if excess > 0:
            logger.warning("A question is %d tokens longer than the model's %d: its start is cut.", excess, self.max_length)
        for row in options:
            row.context = row.context[min(max(0, excess), len(row.context) - 1) :]
            row.pooled = max(1, pooled - max(0, excess))

    def _score(self, rows: list[Request], batch_size: int | None = None) -> list[Answer]:
        sharing = _grouped(range(len(rows)), lambda i: (rows[i].tokens, rows[i].pooled))
        sharing.sort(key=lambda group: (-len(rows[group[0]].tokens), rows[group[0]].tokens))
        size = batch_size or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        answers: dict[int, Answer] = {}
        for start in range(0, len(sharing), size):
            batch = sharing[start : start + size]
            scored = self._score_batch([[rows[i] for i in group] for group in batch])
            answers |= dict(zip((i for group in batch for i in group), scored, strict=True))
            if self.progress is not None:
                self.progress(f"{len(answers)} of {len(rows)} continuations")
        return [answers[i] for i in range(len(rows))]

    def _score_batch(self, batch: list[list[Request]]) -> list[Answer]:
        """Answers of one forward: each group of requests reads the same tokens and is one row, padded on the right."""
        lengths = [len(group[0].tokens) for group in batch]
        ids_BT = torch.full((len(batch), max(lengths)), self.tokenizer.pad_token_id or 0)
        places: dict[tuple[int, int], int] = {}  # (row, position) of every scored position, numbered
        pairs: list[tuple[int, int]] = []  # (number of the place, token predicted there)
        spans: list[tuple[int, int]] = []  # of each request, in pairs
        for b, group in enumerate(batch):
            ids_BT[b, : lengths[b]] = torch.tensor(group[0].tokens)
            for row in group:
                spans.append((len(pairs), len(row.continuation)))
                first = lengths[b] - len(row.continuation)
                for offset, token in enumerate(row.continuation):
                    pairs.append((places.setdefault((b, first + offset), len(places)), token))
        device = self.device
        column_T = torch.arange(ids_BT.shape[1])
        mask_BT = column_T < torch.tensor(lengths)[:, None]
        prompt_BT = column_T < torch.tensor([group[0].pooled for group in batch])[:, None]
        with torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
            states = self.scorer(ids_BT.to(device), mask_BT.to(device), prompt_BT.to(device))
            rows_N, columns_N = torch.tensor(list(places), device=device).unbind(1)
            positions_P, tokens_P = torch.tensor(pairs, device=device).unbind(1)
            log_probs_P, top_P = pair_log_probs(
                states.states_BTD[rows_N, columns_N], states.to_logits, positions_P, tokens_P
            )
        log_probs, top = log_probs_P.cpu(), top_P.cpu()
        return [
            (log_probs[at : at + n].sum().item(), bool(top[at : at + n].all()))
            for at, n in spans
        ]


def _common_prefix(options: list[Request]) -> int:
    """Number of tokens with which the contexts of all options begin."""
    shortest, first = min(len(row.context) for row in options), options[0].context
    for i in range(shortest):
        if any(row.context[i] != first[i] for row in options):
            return i
    return shortest


def _grouped(items: Iterable[Any], key: Callable[[Any], Hashable]) -> list[list[Any]]:
    """Lists of the items with equal keys, in the order of their first items."""
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def main() -> None:
    """The harness's command line, with the model `dynadepth` known."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except DynadepthError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
