"""A tuning set that needs no data: the dense model answers prompts that ship with the package, and passages ship, too.

Routers tuned on it keep the model's own distribution where the model itself goes, and on text as others write it. Every
random number belongs to one prompt and one step, so an answer depends on its neighbours in the batch, and on other
users of torch's generators, not at all (but for the rounding of a padded batch).
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dynadepth.errors import ConfigError, DataError, TuningError
from dynadepth.routing.sublayer import is_attached_name
from dynadepth.tuning.data import Example, pad_token_id
from dynadepth.tuning.formats import encode_chat
from dynadepth.tuning.sampling import end_ids, sample, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], object]
"""Called with the number of texts that are done and the number of all."""


def self_prompts() -> list[dict[str, str]]:
    """The prompts that ship with the package, each with `id`, `domain` and `prompt`."""
    return _lines("self_prompts.jsonl")


def _lines(name: str) -> list[dict[str, str]]:
    text = (files("dynadepth.tuning") / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def self_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 200,
    max_new_tokens: int = 128,
    seed: int = 0,
    temperature: float = 0.8,
    batch_size: int = 128,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    max_length: int | None = None,
) -> list[Example]:
    """`n` examples in an order that `seed` decides: a prompt of `self_prompts` and the dense model's sampled answer.

    Domains take turns, so that every prefix of the list is balanced; beyond the number of prompts they are answered
    once more. A prompt is set in the chat template where the tokenizer has one, else simply continued. An answer ends
    with an end-of-sequence token or after `max_new_tokens`, and is cut where prompt and answer run over `max_length`;
    prompts that leave no room are dropped with one warning. Routing is switched off meanwhile; the model's mode and
    torch's generators are as before afterwards.

    With `cache_dir` answers are kept there after each batch, and a second call with the same model and arguments
    starts from them: what is lost by an interruption is at most one batch, and the result is the uninterrupted one.
    Raises `ConfigError` for arguments out of range, `TuningError` where the folder cannot be written, `DataError` where
    no prompt leaves room for an answer.
    """
    prompts = _balanced(self_prompts(), n, random.Random(seed))
    jobs = [_Job(f"answer {key}", encode_chat(tokenizer, prompt)) for key, prompt in prompts]
    texts = _continue(model, tokenizer, jobs, max_new_tokens, seed, temperature, batch_size, progress, cache_dir)
    pairs = zip(jobs, texts, strict=True)
    examples = [Example((job.prompt + text)[:max_length], len(job.prompt)) for job, text in pairs]
    fitting = [example for example in examples if len(example.input_ids) > example.prompt_length]
    if not fitting:
        raise DataError(f"None of the {n} prompts leaves room for an answer: raise max_length, which is {max_length}.")
    if len(fitting) < n:
        warnings.warn(
            f"{n - len(fitting)} of {n} prompts leave no room for an answer within max_length={max_length} tokens and "
            "were dropped.",
            stacklevel=2,
        )
    return fitting


def shipped_passages() -> list[dict[str, str]]:
    """The plain texts that ship with the package, written for it, each with `id`, `kind` and `text`."""
    return _lines("passages.jsonl")


def plain_passages(
    tokenizer: PreTrainedTokenizerBase, *, n: int = 64, max_length: int = 512, seed: int = 0
) -> list[Example]:
    """At most `n` of `shipped_passages`, cut at `max_length` tokens, as plain text (`prompt_length` 0).

    Kinds take turns in an order that `seed` decides. A text that the model would not have written itself shows routers
    and skip paths what it is seldom asked for: unusual names, figures, old spelling.
    """
    if min(n, max_length) < 1:
        raise ConfigError(f"n={n} and max_length={max_length} must be at least 1.")
    rows = [{"id": row["id"], "domain": row["kind"], "prompt": row["text"]} for row in shipped_passages()]
    chosen = _balanced(rows, min(n, len(rows)), random.Random(f"passages {seed}"))
    return [Example(list(tokenizer(text)["input_ids"])[:max_length], 0) for _, text in chosen]


def _balanced(rows: Sequence[dict[str, str]], n: int, rng: random.Random) -> list[tuple[str, str]]:
    """(key, prompt) of `n` prompts. In each round every domain gives one, in a new order, until it has no more."""
    chosen: list[tuple[str, str]] = []
    turn = 0
    while rows and len(chosen) < n:
        turn += 1
        domains: dict[str, list[dict[str, str]]] = {}
        for row in rng.sample(rows, len(rows)):
            domains.setdefault(row["domain"], []).append(row)
        while domains:
            for domain in rng.sample(sorted(domains), len(domains)):
                row = domains[domain].pop()
                chosen.append((f"{row['id']} {turn}", row["prompt"]))
            domains = {domain: left for domain, left in domains.items() if left}
    return chosen[:n]


@dataclass(frozen=True)
class _Job:
    """A text to go on from."""

    key: str
    """Unique in its list; the text's random numbers hang on it."""

    prompt: list[int]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: list[_Job],
    max_new_tokens: int,
    seed: int,
    temperature: float,
    batch_size: int,
    progress: Progress | None,
    cache_dir: Path | None,
) -> list[list[int]]:
    """What the dense model writes behind each job's prompt, batch after batch, the kept ones not again."""
    if min(len(jobs), max_new_tokens, batch_size) < 1 or not temperature > 0:
        raise ConfigError(
            f"n={len(jobs)}, max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1, and "
            f"temperature={temperature} above 0."
        )
    store = None
    if cache_dir is not None:
        settings = (max_new_tokens, seed, temperature, batch_size, len(jobs))
        store = _Store(Path(cache_dir) / f"self-{_digest(fingerprint(model), *settings)}.jsonl")
    written = store.read(jobs) if store else {}
    if written and progress:
        progress(len(written), len(jobs))
    ends = end_ids(model, tokenizer)
    for batch in _batches(jobs, batch_size):
        if all(job.key in written for job in batch):
            continue
        draws = torch.stack([uniforms(_digest(seed, job.key), max_new_tokens) for job in batch])
        texts = sample(model, [job.prompt for job in batch], draws, temperature, ends, pad_token_id(tokenizer))
        new = {job.key: text for job, text in zip(batch, texts, strict=True)}
        if store:
            store.append([(job, new[job.key], str(tokenizer.decode(new[job.key]))) for job in batch])
        written.update(new)
        if progress:
            progress(len(written), len(jobs))
    return [written[job.key] for job in jobs]


def _batches(jobs: list[_Job], batch_size: int) -> Iterator[list[_Job]]:
    """Equal batches of prompts of similar length, the longest first: running out of memory is seen at once."""
    queue = sorted(jobs, key=lambda job: (-len(job.prompt), job.key))
    count = -(-len(queue) // batch_size)
    bounds = [len(queue) * i // count for i in range(count + 1)]
    for start, stop in pairwise(bounds):
        yield queue[start:stop]


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the model's weights but ours: names, shapes, dtypes and 64 values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_attached_name(name):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // 64)].tolist()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {values}\n".encode())
    return digest.hexdigest()[:16]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class _Store:
    """Texts that were written already, one JSON object a line; a line that was cut short counts as absent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, jobs: list[_Job]) -> dict[str, list[int]]:
        """Texts by key, of those jobs whose prompt is still the same."""
        prompts = {job.key: job.prompt for job in jobs}
        texts: dict[str, list[int]] = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                if prompts.get(entry["key"]) == entry["prompt_ids"]:
                    texts[entry["key"]] = [int(token) for token in entry["ids"]]
            except (ValueError, KeyError, TypeError):
                continue
        return texts

    def append(self, written: list[tuple[_Job, list[int], str]]) -> None:
        """Adds a batch, behind a line break in case that the last line has none."""
        lines = [
            json.dumps({"key": job.key, "prompt_ids": job.prompt, "ids": ids, "text": text})
            for job, ids, text in written
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(("\n" + "\n".join(lines) + "\n").encode())
        except OSError as error:
            raise TuningError(
                f"The model's own answers cannot be kept in {self.path}: {error.strerror or error}; "
                "free some space or choose another folder."
            ) from error
