"""Perplexity of a text, and how far routing moves the model from itself: KL(dense‖routed) and top-1 agreement.

The protocol: the text is cut into consecutive windows of `window` tokens. The first `prompt` of a window are its
prompt: a sequence-level router may pool them, and they are not scored; the `window - prompt` after them are. Every
variant, the dense model included, thus scores the same tokens after the same contexts. What is left after the last
whole window is not used. A tokenizer that starts every text with special tokens (Gemma's `<bos>`) starts every window
with them, inside its prompt: such models are lost without.

Windows are 1,024 tokens long and their prompts 256. Where a length is asked for (`FILE@4096`), the last quarter of each
window is scored: what a long context is worth.

Shape suffixes: B windows of a batch, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadepth.architectures import positions_of
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation.scoring import DenseStates, Scorer, States, log_prob_chunks, pair_log_probs
from dynadepth.model import disabled
from dynadepth.routed import is_attached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW, PROMPT = 1024, 256
CHARACTERS = 8
"""A token has fewer characters than this on average: how much text is read at first for `max_windows`."""
MARGIN = 64
"""So many tokens before the end of a piece of text, its ids are those of the whole text."""
SHORTEST = 8
"""Fewer tokens than this are no text to score."""

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Perplexity:
    """Of the scored tokens: `ppl` = exp(`nll`), `nll` in nats a token, and their number."""

    ppl: float
    nll: float
    n_tokens: int
    rows: tuple[float, ...] = ()
    """`nll` of each window, in their order: for paired comparisons."""

    @classmethod
    def of(cls, rows: Sequence[float], n_tokens: int) -> Perplexity:
        """From the windows' own negative log-likelihoods (nats a token; all windows score equally many tokens)."""
        nll = sum(rows) / len(rows)
        return cls(math.inf if nll >= 700 else math.exp(nll), nll, n_tokens, tuple(rows))

    def as_dict(self) -> dict[str, Any]:
        """The fields of the JSON contract."""
        return {"ppl": self.ppl, "nll": self.nll, "n_tokens": self.n_tokens}


@dataclass(frozen=True)
class Divergence:
    """Routed against dense on the same scored tokens."""

    kl: float
    """KL(dense‖routed), nats a token."""

    agreement: float
    """Share of the tokens where both find the same next token most likely."""

    n_tokens: int
    routed: Perplexity
    dense: Perplexity
    rows: tuple[float, ...] = ()
    """`kl` of each window, in their order."""


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = WINDOW,
    prompt: int = PROMPT,
    batch_size: int = 4,
    max_windows: int | None = None,
    exact: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `text` under `model` as it stands: routed where routers are attached and enabled, else dense.

    `max_windows` takes the first windows only; `progress` is given a line after each batch. A text shorter than one
    window is one shorter window with a prompt shortened alike, which a warning says, or with `exact` a `DataError`.
    Raises `DataError` for fewer than 8 tokens, `ConfigError` for a window or prompt that makes no sense.
    """
    windows_NT, prompt = cut(tokenizer, text, window, prompt, max_windows, positions_of(model), exact)
    rows: list[float] = []
    count = 0
    with _eval_mode(model):
        scorer = Scorer(model, is_attached(model))
        for ids_BT in _batches(windows_NT, batch_size, progress):
            ids_BT = ids_BT.to(model.device)
            states = _run(scorer, ids_BT, prompt)
            targets_N = ids_BT[:, prompt:].flatten()
            log_probs_N, _ = pair_log_probs(
                states.states_BTD, states.to_logits, torch.arange(len(targets_N), device=ids_BT.device), targets_N
            )
            rows += _by_window(-log_probs_N, len(ids_BT))
            count += len(targets_N)
    return Perplexity.of(rows, count)


@torch.no_grad()
def divergence(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = WINDOW,
    prompt: int = PROMPT,
    batch_size: int = 4,
    max_windows: int | None = None,
    exact: bool = False,
    progress: Progress | None = None,
    dense_states: DenseStates | None = None,
) -> Divergence:
    """KL, agreement, and both perplexities of a routed model, each forward made once; arguments as for `perplexity`.

    With `dense_states`, kept between calls for one model, the dense forwards are made once for all of them. A model
    without routers is its own dense model: KL 0, agreement 1.
    """
    if not is_attached(model):
        alone = perplexity(
            model,
            tokenizer,
            text,
            window=window,
            prompt=prompt,
            batch_size=batch_size,
            max_windows=max_windows,
            exact=exact,
            progress=progress,
        )
        return Divergence(0.0, 1.0, alone.n_tokens, alone, alone, (0.0,) * len(alone.rows))
    windows_NT, prompt = cut(tokenizer, text, window, prompt, max_windows, positions_of(model), exact)
    rows: dict[str, list[float]] = {"routed": [], "dense": [], "kl": []}
    agree = count = 0
    kept = DenseStates(0) if dense_states is None else dense_states
    with _eval_mode(model):
        scorer = Scorer(model, True)
        for ids_BT in _batches(windows_NT, batch_size, progress):
            ids_BT = ids_BT.to(model.device)
            routed = _run(scorer, ids_BT, prompt)
            dense = kept.of(ids_BT, prompt, partial(_dense, model, scorer, ids_BT, prompt))
            targets_N = ids_BT[:, prompt:].flatten()
            pairs = zip(
                log_prob_chunks(routed.states_BTD, routed.to_logits),
                log_prob_chunks(dense.states_BTD, dense.to_logits),
                strict=True,
            )
            found: dict[str, list[Tensor]] = {name: [] for name in rows}
            for (start, routed_NV), (_, dense_NV) in pairs:
                targets_N1 = targets_N[start : start + len(routed_NV), None]
                found["routed"].append(-routed_NV.gather(1, targets_N1)[:, 0])
                found["dense"].append(-dense_NV.gather(1, targets_N1)[:, 0])
                found["kl"].append((dense_NV.exp() * (dense_NV - routed_NV)).sum(-1))
                agree += int((routed_NV.argmax(-1) == dense_NV.argmax(-1)).sum())
            for name, chunks in found.items():
                rows[name] += _by_window(torch.cat(chunks), len(ids_BT))
            count += len(targets_N)
    routed_figures, dense_figures = (Perplexity.of(rows[name], count) for name in ("routed", "dense"))
    kl = sum(rows["kl"]) / len(rows["kl"])
    return Divergence(kl, agree / count, count, routed_figures, dense_figures, tuple(rows["kl"]))


def cut(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int = WINDOW,
    prompt: int = PROMPT,
    max_windows: int | None = None,
    positions: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, int]:
    """The windows of `text`, int64 `[windows, window]`, and the length of their prompts.

    Where the text is shorter than a window or the model has fewer `positions`, both lengths shrink, with a warning;
    with `exact` a DataError says so.
    """
    if not 0 < prompt < window:
        raise ConfigError(f"a window of {window} tokens cannot have a prompt of {prompt}: use 0 < prompt < window.")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows must be at least 1, got {max_windows}.")
    probe = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    special = probe[0][: len(probe[0]) - len(probe[1])] if probe[0][-len(probe[1]) :] == probe[1] else []
    ids = _first_ids(tokenizer, text, None if max_windows is None else max_windows * window)
    longest = min(len(ids) + len(special), positions or window)
    if longest < SHORTEST:
        raise DataError(f"the text has {longest} tokens, too few to score: give at least {SHORTEST}.")
    if longest < window:
        why = "the model has no more positions" if longest == positions else "the text has no more tokens"
        if exact:
            raise DataError(
                f"windows of {window} tokens were asked for, but {why} than {longest}: ask for @{longest}, or for none."
            )
        prompt = max(1, longest * prompt // window)
        warnings.warn(
            f"windows of {longest} tokens with a prompt of {prompt} are scored instead of {window}: {why}.",
            stacklevel=3,
        )
        window = longest
    step = window - len(special)
    starts = range(0, len(ids) - step + 1, step)[:max_windows]
    return torch.tensor([special + ids[start : start + step] for start in starts]), prompt


def protocol(window: int | None) -> dict[str, Any]:
    """`window`, `prompt`, `exact` of `perplexity` for a text whose name asks for windows of a length, or for none."""
    if window is None:
        return {"window": WINDOW, "prompt": PROMPT}
    if window < SHORTEST:
        raise ConfigError(f"windows of {window} tokens are too short to score: give at least {SHORTEST}.")
    return {"window": window, "prompt": window - window // 4, "exact": True}


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, n: int | None) -> list[int]:
    """The ids of the text; where only the first `n` are wanted, no more of a long text is read than that takes."""
    end = len(text)
    if n is not None:
        end = _line_end(text, round(n * CHARACTERS))
    while True:
        ids: list[int] = tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]
        # The last ids of a piece may be others than in the whole text.
        if end >= len(text) or n is None or len(ids) >= n + MARGIN:
            return ids
        end = _line_end(text, 2 * end)


def _line_end(text: str, near: int) -> int:
    """The end of the line in which character `near` stands."""
    found = text.find("\n", near)
    return len(text) if found < 0 else found + 1


def _run(scorer: Scorer, ids_BT: Tensor, prompt: int) -> States:
    """States of the positions that predict the scored tokens, flattened to `[N, D]`."""
    prompt_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    prompt_BT[:, :prompt] = True
    states = scorer(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), prompt_BT)
    return States(states.states_BTD[:, prompt - 1 : -1].flatten(0, 1), states.to_logits)


def _dense(model: Any, scorer: Scorer, ids_BT: Tensor, prompt: int) -> States:
    with disabled(model):
        return _run(scorer, ids_BT, prompt)


def _by_window(values_N: Tensor, windows: int) -> list[float]:
    """The mean of each window's values."""
    means: list[float] = values_N.double().view(windows, -1).mean(1).tolist()
    return means


def _batches(windows_NT: Tensor, batch_size: int, progress: Progress | None) -> Iterator[Tensor]:
    for start in range(0, len(windows_NT), batch_size):
        yield windows_NT[start : start + batch_size]
        if progress is not None:
            progress(f"{min(start + batch_size, len(windows_NT))} of {len(windows_NT)} windows")


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Without dropout and on the sparse path; the mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
