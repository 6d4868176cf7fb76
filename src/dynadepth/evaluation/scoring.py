"""Log-probabilities of chosen tokens, without a `[B, T, V]` tensor ever existing.

With vocabularies of 49k to 262k entries the logits dwarf the model, and scoring looks at few of them. So the language
model head runs apart from the backbone: a forward keeps the hidden states that enter the head, and the head is then
applied to the scored positions alone, a chunk at a time, and what it gives is summed in float32.

Shape suffixes: B rows, T tokens, D features entering the head, V vocabulary, N scored positions, P (position, token)
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynadepth.vocabulary import HeadTap, ToLogits, few_rows, find_finish, log_sums, logit_chunks


@dataclass(frozen=True)
class States:
    """What one forward leaves behind: `states_BTD`, and the function that turns rows of it into logits `[.., V]`."""

    states_BTD: Tensor
    to_logits: ToLogits
    cache: Any = None
    """Keys and values, where they were asked for."""


class DenseStates:
    """What the bare model makes of windows, kept for the routed ones that are compared with it one after another.

    Belongs to one model, whose weights stay as they are. At most `most` bytes are kept, on the model's device; windows
    beyond run anew each time.
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self._kept: dict[tuple[int, tuple[int, ...], bytes], States] = {}
        self._room = most

    def of(self, ids_BT: Tensor, prompt: int, run: Callable[[], States]) -> States:
        """The states of these windows behind prompts of this length; `run` makes them where they are not kept."""
        key = prompt, tuple(ids_BT.shape), ids_BT.cpu().numpy().tobytes()
        if key in self._kept:
            return self._kept[key]
        states = run()
        if states.states_BTD.nbytes <= self._room:
            self._room -= states.states_BTD.nbytes
            self._kept[key] = states
        return states


class Scorer:
    """Runs a causal language model for its states.

    What the model does to the head's output (nothing, a soft cap, a scale) is not trusted to a name: the first forward
    compares the candidates with the model's own logits bit for bit, and where none fits, whole logits are taken.
    """

    def __init__(self, model: Any, takes_prompt_mask: bool) -> None:
        self.model = model
        self.takes_prompt_mask = takes_prompt_mask
        """Whether the model is routed: only then its forward knows `prompt_mask`."""
        self._finish: ToLogits | None = None
        self._whole_logits = False

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, mask_BT: Tensor, prompt_BT: Tensor | None, **inputs: Any) -> States:
        """`mask_BT` bool: real tokens (with a cache, those in it first); `prompt_BT` bool: the tokens that a
        sequence-level router may pool, None where its route is in the cache. `inputs` go to the model as they are."""
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "use_cache": False, **inputs}
        if self.takes_prompt_mask and prompt_BT is not None:
            inputs["prompt_mask"] = prompt_BT
        head = self.model.get_output_embeddings()
        if head is not None and not self._whole_logits:
            with HeadTap(head) as tap:
                outputs = self.model(**inputs)
            if self._finish is None and tap.raw is not None:
                self._finish = find_finish(self.model.config, tap.raw, outputs.logits)
            if self._finish is not None and tap.entered is not None:
                finish = self._finish
                return States(tap.entered, lambda states: finish(head(states)), outputs.past_key_values)
        self._whole_logits = True
        outputs = self.model(**inputs)
        return States(outputs.logits, lambda states: states, outputs.past_key_values)


def log_prob_chunks(states_ND: Tensor, to_logits: ToLogits) -> Iterator[tuple[int, Tensor]]:
    """Yields (first position, float32 log-probabilities `[n, V]`) over all N positions, a few at a time; to the digit
    those of `pair_log_probs`."""
    for start, chunk_NV in logit_chunks(states_ND, to_logits):
        for (few_NV,) in few_rows(chunk_NV):
            yield start, few_NV.float() - log_sums(few_NV)[:, None]
            start += len(few_NV)


@torch.no_grad()
def pair_log_probs(
    states_ND: Tensor, to_logits: ToLogits, positions_P: Tensor, tokens_P: Tensor
) -> tuple[Tensor, Tensor]:
    """For each pair (position in `states_ND`, token): its log-probability, float32 `[P]`, and whether no token beats
    it, bool `[P]`. A position may stand in several pairs, and costs once."""
    order_P = positions_P.argsort()
    sorted_P = positions_P[order_P]
    log_probs_P = torch.empty(len(tokens_P), dtype=torch.float32, device=states_ND.device)
    top_P = torch.empty(len(tokens_P), dtype=torch.bool, device=states_ND.device)
    for start, chunk_NV in logit_chunks(states_ND, to_logits):
        bounds = torch.tensor([start, start + len(chunk_NV)], device=positions_P.device)
        first, last = torch.searchsorted(sorted_P, bounds).tolist()
        chosen = order_P[first:last]
        rows, tokens = positions_P[chosen] - start, tokens_P[chosen]
        log_probs_P[chosen] = chunk_NV[rows, tokens].float() - log_sums(chunk_NV)[rows]
        top_N = torch.cat([few_NV.float().argmax(-1) for (few_NV,) in few_rows(chunk_NV)])
        top_P[chosen] = top_N[rows] == tokens
    return log_probs_P, top_P
