"""The model of lm-evaluation-harness that tells a router what the prompt is, and the harness's command line with it.

    python -m dynadepth.evaluation.lm_eval --model dynadepth --tasks arc_easy \\
        --model_args pretrained=smollm2-135m,routers=my-routers,budget=0.75,dtype=bfloat16

The harness finds no plugins by itself: this registers `dynadepth` and hands over. `pretrained` is whatever `dynadepth`
takes as a model, `routers` a folder of saved routers (none: the bare model), and every other argument is the harness's.

What a sequence-level router may pool is the context, never the continuation. Where the options of a question differ in
their context (WinoGrande), it is what their contexts have in common, so that a question is scored under one route.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from dynadepth import hub
from dynadepth.dial import set_budget
from dynadepth.errors import ConfigError, DataError, DynadepthError
from dynadepth.evaluation.continuations import Answer, ContinuationScorer, Request, common_prefix
from dynadepth.evaluation.tasks import missing_extra
from dynadepth.model import load
from dynadepth.routed import is_attached, routing_of

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise missing_extra(error) from error

logger = logging.getLogger(__name__)

# By its path, not as a decorator: run with `python -m`, this file is imported twice.
model_registry.register("dynadepth", target="dynadepth.evaluation.lm_eval:DynadepthLM")


class DynadepthLM(HFLM):
    """`HFLM` for routed models, and as good for models without routers.

    Log-probabilities are float32 whatever the model's dtype, only continuations pass the language model head, and the
    prompt that the options of a question share is read once.
    """

    def __init__(
        self,
        pretrained: Any,
        routers: str | None = None,
        budget: float | str | None = None,
        device: str | None = None,
        progress: Callable[[str], object] | None = None,
        bars: bool = True,
        **kwargs: Any,
    ) -> None:
        """`progress` is given a line after each batch; `bars` shows the harness's progress bars."""
        if isinstance(pretrained, str):
            pretrained = hub.resolve(pretrained)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        if self.backend != "causal":
            raise ConfigError(f"only causal language models can be routed, not {type(self.model).__name__}.")
        model = self.model
        if routers is not None:
            load(model, routers).eval()  # in place
        if budget is not None:
            if not is_attached(model):
                raise ConfigError(f"budget={budget} needs routers=DIR: the model has none.")
            try:
                share = float(budget)
            except ValueError:
                raise ConfigError(f"budget={budget} is no number: give a share such as 0.75.") from None
            set_budget(model, **{routing_of(model).config.target: share})
        self.progress, self.bars = progress, bars
        self.scorer = ContinuationScorer(model, self.tokenizer.pad_token_id or 0)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """One answer for each of the harness's requests, in their order."""
        questions: dict[Any, list[Request]] = {}
        rows = []
        for index, request in enumerate(requests):
            context, continuation = self._encode(*request.args[:2])
            row = Request(context, continuation, len(context))
            # A request without a context ("unconditional", for mutual information) is no option of the question.
            question = (request.task_name, request.doc_id, not request.args[0])
            questions.setdefault(index if request.doc_id is None else question, []).append(row)
            rows.append(row)
        for options in questions.values():
            self._share_prompt(options)
        # The harness caches the answers of a finished run. Adding single ones on the way, as HFLM does, could leave
        # half of a question's options in the cache, and the other half without the contexts that their common prompt
        # depends on.
        return self._score(rows, bar=not disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """For callers that bring tokens, without questions: `loglikelihood_rolling` above all, whose text is None.

        There the prompt is the first quarter of each window (or its context, where longer). These tokens are scored
        too, as the harness has it: for a figure without that, use dynadepth's own perplexity.
        """
        rows = []
        for text, context, continuation in requests:
            row = Request(list(context), list(continuation), len(context))
            self._share_prompt([row])
            if text is None and len(row.tokens) // 4 > row.pooled:
                row.pooled = len(row.tokens) // 4
            rows.append(row)
        return self._score(rows, override_bs)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)

    def _share_prompt(self, options: list[Request]) -> None:
        """Gives all options of a question the same prompt, and cuts them to the model's length."""
        for row in options:
            if not row.continuation:
                raise DataError(
                    f"nothing to score after the context that ends in {self.tok_decode(row.context[-9:])!r}."
                )
            if len(row.continuation) > self.max_length:
                raise DataError(
                    f"a continuation has {len(row.continuation)} tokens, the model reads {self.max_length}."
                )
        pooled = common_prefix([row.context for row in options])
        if pooled == 0:  # as the harness does where there is no context at all
            pooled = 1
            for row in options:
                row.context = [self.prefix_token_id, *row.context]
        # From the left, as the harness does, but the same amount for all: the prompt must stay one.
        excess = max(len(row.tokens) for row in options) - self.max_length
        if excess > 0:
            logger.warning(
                "A question is %d tokens too long for the model's %d: its start is cut.", excess, self.max_length
            )
            for row in options:
                row.context = row.context[min(excess, len(row.context) - 1) :]
            pooled = max(1, pooled - excess)
        for row in options:
            row.pooled = pooled

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`: the prompts are padded on the left, and each row's prefill decides its route."""
        answers: list[str] = super().generate_until(requests, disable_tqdm or not self.bars)
        return answers

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        written: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        if self.progress is not None:
            self.progress(f"{len(context)} more answers of up to {written.shape[1] - context.shape[1]} tokens")
        return written

    def _score(self, rows: list[Request], batch_size: int | None = None, bar: bool = False) -> list[Answer]:
        size = batch_size or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with (
            tqdm(total=len(rows), desc="Scoring continuations", disable=not (bar and self.bars)) as shown,
            torch.autocast(kind, dtype, enabled=dtype is not None),
        ):

            def progress(done: int) -> None:
                shown.update(done - shown.n)
                if self.progress is not None:
                    self.progress(f"{done} of {len(rows)} continuations")

            return self.scorer(rows, size, progress)


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
