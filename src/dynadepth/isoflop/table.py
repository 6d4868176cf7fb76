"""What a study found: one line a cell, the best of every variant, and the questions that the paper answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynadepth.isoflop.recipe import Cell, budget_label

if TYPE_CHECKING:
    from dynadepth.isoflop.recipe import IsoflopRecipe

Document = Mapping[str, Any]

COLUMNS = ("size", "variant", "parameters", "steps", "loss", "causal", "accuracy", "forward FLOPs", "prefill", "decode")
"""Of the table; `loss` by the choice of training, `forward FLOPs` a token, and times as fast as the same size dense."""


def headline(cell: Document) -> float:
    """The held-out loss that variants are compared by, nats a token: with the decisions of training."""
    valid = cell["valid"]
    return float((valid.get("top_k") or valid["causal"])["nats"])


def finished(found: Mapping[Cell, Document]) -> dict[Cell, Document]:
    """Cells that have a loss."""
    return {cell: document for cell, document in found.items() if "failed" not in document}


def learns(document: Document) -> bool:
    """Are its decisions learnt, not noise?"""
    return document["settings"]["recipe"]["method"].get("routing") != "stochastic"


def groups(found: Mapping[Cell, Document]) -> dict[Cell, list[Document]]:
    """Runs that differ in their seed alone, under the cell of seed 0."""
    together: dict[Cell, list[Document]] = {}
    for cell, document in sorted(finished(found).items(), key=lambda pair: pair[0].seed):
        together.setdefault(Cell(cell.budget, cell.size, cell.variant), []).append(document)
    return together


def mean_loss(documents: Sequence[Document]) -> float:
    """Over seeds."""
    return sum(map(headline, documents)) / len(documents)


def best(found: Mapping[Cell, Document], variant: str, budget: float) -> Cell | None:
    """The size with the lowest loss of a variant at a budget, by seed 0."""
    tried = {
        c: headline(d) for c, d in finished(found).items() if (c.variant, c.budget, c.seed) == (variant, budget, 0)
    }
    return min(tried, key=tried.__getitem__, default=None)


def summary(found: Mapping[Cell, Document]) -> list[dict[str, Any]]:
    """One entry a cell, without curves: what the table and the figures are drawn from."""
    entries = []
    for cell, documents in groups(found).items():
        first = documents[0]
        values = [headline(d) for d in documents]
        timing = first["timing"]
        entries.append(
            {
                "budget": cell.budget,
                "size": cell.size,
                "variant": cell.variant,
                "seeds": len(documents),
                "loss": sum(values) / len(values),
                "lowest": min(values),
                "highest": max(values),
                "bits_per_byte": (first["valid"].get("top_k") or first["valid"]["causal"])["bits_per_byte"],
                "causal": sum(d["valid"]["causal"]["nats"] for d in documents) / len(documents),
                "accuracy": (first["valid"].get("top_k") or {}).get("accuracy") if learns(first) else None,
                "executed causally": first["valid"]["causal"]["executed"],
                "parameters": first["parameters"],
                "inner_parameters": first["inner_parameters"],
                "steps": first["steps"],
                "tokens": first["tokens"],
                "flops": first["flops"],
                "forward_per_token": first["plan"]["forward_per_token"],
                "prefill": timing["prefill against own"],
                "decode": timing["decode against own"],
                "prefill against reference": timing["prefill against reference"],
                "kv share": timing["kv share"],
            }
        )
    return sorted(entries, key=lambda e: (e["budget"], e["parameters"]))


def lines(found: Mapping[Cell, Document], budget: float) -> list[list[str]]:
    """The rows of one budget's table, as text."""
    rows = []
    for e in summary(found):
        if e["budget"] != budget:
            continue
        loss = f"{e['loss']:.4f}" + (
            f" ({e['seeds']} seeds, {e['lowest']:.4f}-{e['highest']:.4f})" if e["seeds"] > 1 else ""
        )
        rows.append([
            e["size"], e["variant"], f"{e['parameters'] / 1e6:.2f} M", f"{e['steps']:,}", loss, f"{e['causal']:.4f}",
            "-" if e["accuracy"] is None else f"{100 * e['accuracy']:.1f} %", f"{e['forward_per_token'] / 1e6:.3f} M",
            f"{e['prefill']['times']:.2f}x", f"{e['decode']['times']:.2f}x",
        ])  # fmt: skip
    return rows


def baseline(recipe: IsoflopRecipe, variant: str) -> str | None:
    """What a variant is compared with: the first one before it of the same model type without a method, or else the
    first of all. None of the first."""
    changes = recipe.variants[variant]
    names = list(recipe.variants)
    for name in names[: names.index(variant)]:
        other = recipe.variants[name]
        same = other.get("model", {}).get("model_type") == changes.get("model", {}).get("model_type")
        if same and not other.get("method"):
            return name
    return None if variant == names[0] else names[0]


def questions(recipe: IsoflopRecipe, found: Mapping[Cell, Document]) -> list[str]:
    """The paper's claims at our scale, a sentence each, with both numbers."""
    said: list[str] = []
    together = groups(found)
    for budget in sorted({cell.budget for cell in together}):
        for variant in recipe.variants:
            other = baseline(recipe, variant)
            base = None if other is None else best(found, other, budget)
            cell = best(found, variant, budget)
            if base is None or cell is None:
                continue
            own, loss = mean_loss(together[cell]), mean_loss(together[base])
            said.append(
                f"{budget_label(budget)} FLOPs: the best {variant} ({cell.size}) has a loss of {own:.4f}, "
                f"the best {other} ({base.size}) {loss:.4f}: {100 * (own / loss - 1):+.2f} %."
                f"{_faster(found, variant, budget, base, loss)}"
            )
    return said + _sampling(found)


def markdown(recipe: IsoflopRecipe, found: Mapping[Cell, Document]) -> str:
    """The tables and sentences as a page."""
    parts = []
    for budget in sorted({cell.budget for cell in found}):
        rows = [list(COLUMNS), ["---"] * len(COLUMNS), *lines(found, budget)]
        parts.append(f"## {budget_label(budget)} FLOPs\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    failed = [f"{cell.name} has no loss: {d['failed']}" for cell, d in found.items() if "failed" in d]
    parts.append("\n".join(f"- {sentence}" for sentence in failed + questions(recipe, found)))
    return "\n\n".join(parts) + "\n"


def _faster(found: Mapping[Cell, Document], variant: str, budget: float, base: Cell, loss: float) -> str:
    """How fast the fastest model of a variant is that is no worse than the best of its baseline."""
    together = groups(found)
    equal = [c for c in together if (c.variant, c.budget) == (variant, budget) and mean_loss(together[c]) <= loss]
    if not equal:
        return ""

    def speed(cell: Cell) -> float:
        return float(together[cell][0]["timing"]["prefill against reference"]["times"])

    fastest = max(equal, key=speed)
    forward = [together[c][0]["plan"]["forward_per_token"] for c in (fastest, base)]
    return (
        f" At no higher loss {fastest.size} takes {100 * forward[0] / forward[1]:.0f} % of its FLOPs a forward and its "
        f"prefill is {speed(fastest) / speed(base):.2f} times as fast."
    )


def _sampling(found: Mapping[Cell, Document]) -> list[str]:
    """Causal decisions against the choice of training, over all cells that have both."""
    both = [
        d for d in finished(found).values() if "top_k" in d["valid"] and d["valid"]["top_k"]["accuracy"] is not None
    ]
    learned = [d for d in both if learns(d)]
    if not learned:
        return []
    gaps = [d["valid"]["causal"]["nats"] / d["valid"]["top_k"]["nats"] - 1 for d in learned]
    accuracies = [d["valid"]["top_k"]["accuracy"] for d in learned]
    return [
        f"Over {len(learned)} routed runs, predictor accuracy is {_span(accuracies, '.1f')} % of the tokens at routed "
        f"blocks (paper: 97 to 99 %), and the loss with the decisions of generation is {_span(gaps, '+.2f')} % against "
        "that with those of training (paper: within 0.3 %)."
    ]


def _span(shares: Sequence[float], form: str) -> str:
    """The lowest and the highest, as percentages."""
    low, high = (format(100 * value, form) for value in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"
