"""The demo's story: tune routers for a small model, then show what was gained and what was lost.

It ends with one plain dict (`results.json`), from which the terminal's table (`summary.py`) and the page (`html.py`)
are made. Everything runs on bundled questions, the model's own answers and Python's own help texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth import hub
from dynadepth.benchmark import cut_prompts, run
from dynadepth.methods.static import skip_count
from dynadepth.model import disabled
from dynadepth.report import measure
from dynadepth.report.samples import answers
from dynadepth.report.stamp import stamp
from dynadepth.report.tuned import tuned_routers
from dynadepth.report.twin import Figures, StaticTwins
from dynadepth.routed import routing_of
from dynadepth.tuning import examples_for, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Write a Python function that reverses a string.",
    "Translate into French: Good morning, how are you?",
)
STEPS = 7


@dataclass(frozen=True)
class Settings:
    """What a demo runs; the defaults take some minutes on two cores."""

    model: str = "smollm2-135m"
    recipe: str = "default"
    budget: float = 0.75
    seed: int = 0
    max_samples: int | None = 150
    """Tuning samples, None: the recipe's. A third of the default recipe's keep the story within ten minutes."""
    windows: int = 6
    """Of 1,024 tokens, for perplexity."""
    questions: int | None = None
    """Rows of the bundled task, None: all."""
    prompts: tuple[str, ...] = PROMPTS
    answer_tokens: int = 64
    contexts: tuple[int, ...] = (512, 2048)
    new_tokens: int = 16
    repeats: int = 3


@dataclass
class Teller:
    """Where the story goes: `step(number, title)` once a step, `detail(line)` as often as there is news."""

    step: Callable[[int, str], None] = lambda number, title: None
    detail: Callable[[str], None] = lambda line: None
    times: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def telling(self, title: str) -> Iterator[Callable[[str], None]]:
        """One step, timed."""
        self.step(len(self.times) + 1, title)
        started = time.monotonic()
        self.times.append({"title": title, "seconds": None})
        yield self.detail
        self.times[-1]["seconds"] = time.monotonic() - started


def run_demo(out: Path, settings: Settings, teller: Teller) -> dict[str, Any]:
    """Runs the story with routers in `out/routers`; see the keys of the dict at the end.

    Routers that an earlier run completed with the same model, recipe, budget, seed and code are used again.
    """
    started = time.monotonic()
    with teller.telling(f"Fetching {settings.model}"):
        hub.resolve(settings.model)
        tokenizer = hub.load_tokenizer(settings.model)
        model = hub.load_model(settings.model, device="cuda" if torch.cuda.is_available() else None)
    with teller.telling("The model answers prompts to tune on") as detail:
        recipe = load_recipe(settings.recipe)
        examples = examples_for(
            "self",
            model,
            tokenizer,
            recipe,
            max_samples=settings.max_samples,
            seed=settings.seed,
            cache_dir=out / "self-data",
            progress=lambda done, total: detail(f"{done} of {total} answers"),
        )
    with teller.telling("Tuning the routers, the model frozen") as detail:
        tuning: dict[str, Any] = {"recipe": recipe.name, "data_seconds": teller.times[1]["seconds"]}
        tuning |= tuned_routers(
            out / "routers",
            model,
            tokenizer,
            examples,
            recipe,
            name=settings.model,
            budget=settings.budget,
            seed=settings.seed,
            detail=detail,
        )
        routing = routing_of(model)
        twins = StaticTwins(model, tuning["order"])

    with teller.telling("Perplexity and KL on text") as detail:
        text = measure.help_text(settings.seed)
        variants, sites = _on_text(model, tokenizer, twins, text, settings.windows, detail)
    with teller.telling("Accuracy on questions") as detail:
        _add_accuracy(variants, model, tokenizer, twins, settings.questions, detail)
    with teller.telling("Sample answers") as detail:
        static = twins.nearest(settings.budget)
        samples = _samples(model, static, tokenizer, settings)
    with teller.telling("Timing") as detail:
        prompts = cut_prompts(tokenizer, count=1, length=max(settings.contexts) + settings.new_tokens)
        speed = {}
        for name, timed in (("routed", model), ("static", static)):
            speed[name] = run(
                timed,
                prompts,
                batches=[1],
                contexts=settings.contexts,
                new_tokens=settings.new_tokens,
                repeats=settings.repeats,
                variants=["routed"],
                progress=detail,
            )
    routing = routing_of(model)
    return {
        "settings": asdict(settings),
        "target": routing.target.name,
        "granularity": routing.config.granularity,
        "layers": routing.n_layers,
        "routed_sites": [str(site) for site in routing.sites],
        "static_skip": list(twins.skipped(skip_count(settings.budget, routing.n_layers))),
        "tuning": tuning,
        "variants": variants,
        "site_keep": sites,
        "samples": samples,
        "speed": speed,
        "steps": teller.times,
        "seconds": time.monotonic() - started,
        "provenance": stamp(settings.model, model, routers=out / "routers", seed=settings.seed),
    }


def _on_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    twins: StaticTwins,
    text: str,
    windows: int,
    detail: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    routed, dense, sites = measure.on_text(model, tokenizer, text, windows, lambda line: detail(f"routed: {line}"))

    def static(twin: PreTrainedModel) -> Figures:
        return measure.on_text(twin, tokenizer, text, windows, lambda line: detail(f"static twin: {line}"))[0]

    figures = {"dense": dense, "routed": routed, "static": twins.matched(float(routed["keep_all"] or 0), static)}
    return {name: {**values, "perplexity": exp(values["nll"] or 0)} for name, values in figures.items()}, sites


def _add_accuracy(
    variants: dict[str, dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    twins: StaticTwins,
    limit: int | None,
    detail: Callable[[str], None],
) -> None:
    """Adds `accuracy`, `keep_questions` and, for the routed model, `accuracy_difference` (95 % against dense)."""
    if not measure.can_score_tasks():
        detail("left out: it needs `pip install 'dynadepth[eval]'`")
        return
    found = measure.on_questions(model, tokenizer, limit, lambda line: detail(f"dense and routed: {line}"), True)
    keep = found["keep_ratio"]["all"]

    def static(twin: PreTrainedModel) -> Figures:
        results = measure.on_questions(twin, tokenizer, limit, lambda line: detail(f"static twin: {line}"))
        return {"accuracy": results["average"], "keep_questions": results["keep_ratio"]["all"]}

    task = found["tasks"][measure.TASK]
    variants["dense"] |= {"accuracy": found["dense"]["average"], "keep_questions": 1.0}
    variants["routed"] |= {"accuracy": found["average"], "keep_questions": keep, "questions": task["n"]}
    variants["routed"]["accuracy_difference"] = task.get("diff_vs_dense")
    variants["static"] |= twins.matched(keep, static)


def _samples(
    model: PreTrainedModel, static: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, Any]]:
    """One entry a prompt: `prompt`, and the `generate` output of each variant."""
    with disabled(model):
        dense = answers(model, tokenizer, settings.prompts, settings.answer_tokens)
    routed = answers(model, tokenizer, settings.prompts, settings.answer_tokens)
    fixed = answers(static, tokenizer, settings.prompts, settings.answer_tokens)
    return [
        {"prompt": d["prompt"], "answers": {"dense": d, "routed": r, "static": s}}
        for d, r, s in zip(dense, routed, fixed, strict=True)
    ]
