"""The demo's results as one HTML page that needs nothing beside it: inline figures, no scripts, no network.

The page is made from plain data alone. Parts that are missing from it are left out, and every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynadepth.adapter import atomically
from dynadepth.errors import DynadepthError
from dynadepth.report import figures
from dynadepth.report.routes import LEGEND, mean_keep, strip, told
from dynadepth.report.summary import TITLES, VARIANTS, rows, verdict
from dynadepth.routing.decision import Site

TEMPLATE = "page.html.j2"


def require_extra() -> None:
    """Raises `DynadepthError` where matplotlib or jinja2 is missing: said before a long run, not after it."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DynadepthError(
            f"The page needs the extra `report` ({error}): run `pip install 'dynadepth[report]'`."
        ) from error


def write_page(path: Path, results: Mapping[str, Any]) -> Path:
    """Writes the whole page or nothing."""
    return write_text(path, render(results))


def write_text(path: Path, page: str) -> Path:
    """Writes the whole text or nothing. Raises `DynadepthError` where it cannot."""
    try:
        atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise DynadepthError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def rendered(template: str, **values: Any) -> str:
    """A template of this package filled in, every text escaped."""
    require_extra()
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("dynadepth.report", ""), autoescape=True, trim_blocks=True)
    return environment.get_template(template).render(**values)


def render(results: Mapping[str, Any]) -> str:
    """The page of a demo's results (`report.demo.run_demo`), or of any part of them."""
    settings = results.get("settings") or {}
    title = settings.get("model") or "dynadepth"
    if settings.get("budget") is not None:
        title = f"{title}: {settings['budget']:.0%} of the {results.get('target') or 'attention'} sublayers"
    return rendered(
        TEMPLATE,
        title=title,
        subtitle=_subtitle(results),
        verdict=verdict(results),
        variants=VARIANTS,
        titles=TITLES,
        rows=rows(results),
        figures=list(_figures(results)),
        samples=list(_samples(results)),
        legend=LEGEND,
        steps=[{"title": s["title"], "time": _clock(s.get("seconds"))} for s in results.get("steps") or []],
        facts=list(facts(results.get("provenance") or {})),
    )


def _subtitle(results: Mapping[str, Any]) -> str:
    if results.get("granularity") is None:
        return ""
    routed = (
        f"{len(results.get('routed_sites') or [])} of {results.get('layers')} {results.get('target')} sublayers routed"
    )
    unit = "sequence for all of them" if results["granularity"] == "route" else results["granularity"]
    return f"{routed}, one decision a {unit}. The model itself is frozen; only its routers were tuned."


def _figures(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Name, caption and SVG of each figure for which there is data."""
    variants = results.get("variants") or {}
    for key, caption, unit in (
        ("perplexity", "Perplexity on text that tuning never saw (lower is better)", "perplexity"),
        ("kl", "Distance from the dense model (lower is better)", "KL(dense‖routed), nats a token"),
    ):
        values = {name: variants[name][key] for name in VARIANTS if (variants.get(name) or {}).get(key) is not None}
        if len(values) > 1:
            yield _inlined(figures.bars(values, TITLES, unit), key, caption)
    if strips := _strips(results):
        caption = f"Which {results.get('target') or 'attention'} sublayers run: full executed, faint skipped"
        yield _inlined(figures.layer_map(strips), "layers", caption)
    if groups := _speedups(results):
        drawing = figures.grouped(groups, TITLES, "times as fast as dense", 1.0)
        yield _inlined(drawing, "speed", "Speed against the dense model in the same run (higher is better)")
    losses = (results.get("tuning") or {}).get("losses") or []
    if len(losses) > 1:
        yield _inlined(figures.curve(losses, "step", "loss"), "loss", "The routers' loss while tuning")


def _inlined(figure: Any, name: str, caption: str) -> dict[str, str]:
    return {"caption": caption, "svg": figures.inline(figure, name, caption)}


def _strips(results: Mapping[str, Any]) -> list[tuple[str, list[float | None], str]]:
    """The static twin, the routed mean on text, and the route of each sample prompt."""
    n_layers = results.get("layers")
    if not n_layers:
        return []
    strips: list[tuple[str, list[float | None], str]] = []
    routed = {Site.parse(site).layer for site in results.get("routed_sites") or []}
    if (skip := results.get("static_skip")) is not None:
        shares: list[float | None] = [0.0 if layer in skip else 1.0 for layer in range(n_layers)]
        strips.append(("static twin", [s if not s or i in routed else None for i, s in enumerate(shares)], "static"))
    if results.get("site_keep"):
        strips.append(("routed, mean", _by_layer(results["site_keep"], n_layers), "routed"))
    for number, sample in enumerate(results.get("samples") or [], start=1):
        if route := (sample.get("answers") or {}).get("routed", {}).get("route"):
            strips.append((f"prompt {number}", _by_layer(route, n_layers), "routed"))
    return strips


def _by_layer(route: Mapping[str, float], n_layers: int) -> list[float | None]:
    shares = {Site.parse(site).layer: share for site, share in route.items()}
    return [shares.get(layer) for layer in range(n_layers)]


def _speedups(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for name, cells in (results.get("speed") or {}).items():
        for cell in sorted(cells, key=lambda cell: (cell["phase"] != "prefill", cell["context"])):
            if cell.get("speedup"):
                groups.setdefault(f"{cell['phase']} {cell['context']:,}", {})[name] = cell["speedup"]
    return groups


def _samples(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Per prompt the answers of the variants."""
    samples, n_layers = results.get("samples") or [], results.get("layers")
    by_name = {name: [a for s in samples if (a := (s.get("answers") or {}).get(name))] for name in VARIANTS}
    for sample in samples:
        made = []
        for name in VARIANTS:
            answer = (sample.get("answers") or {}).get(name)
            if answer is None:
                continue
            route = answer.get("route")
            words, more = told(answer.get("keep_ratio"), mean_keep(by_name[name]))
            shown = strip(route, n_layers) if route and n_layers else ""
            made.append({"name": name, "text": answer["text"].strip(), "strip": shown, "keep": words, "more": more})
        yield {"prompt": sample["prompt"], "answers": made}


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{seconds % 60:04.1f}"


def facts(provenance: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested dicts as `hardware: cpu`; what is None is left out."""
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            yield from facts(value, f"{prefix}{key}: ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)
