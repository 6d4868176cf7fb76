"""A file of searched routes for a saved tiny model, and prompts that its tokenizer knows."""

from __future__ import annotations

from pathlib import Path

from dynadepth import adapter, hub
from dynadepth.architectures import decoder_layers
from dynadepth.route_file import Answer, Header, PromptRoutes, Route, RouteWriter
from dynadepth.search.searcher import SearchSettings
from saved_model import N_LAYERS, WORDS


def text(number: int) -> str:
    """Six words."""
    return " ".join(WORDS[(number + 5 * i) % len(WORDS)] for i in range(6))


def save_routes(path: Path, model_folder: str | Path, counts: tuple[int, ...] = (1, 0, 2, 1), n: int = 12) -> Path:
    """`n` prompts that all have one route."""
    model = hub.load_model(str(model_folder))
    route = Route(True, 1.0, counts)
    with RouteWriter(path) as writer:
        writer.start(Header(adapter.identity(model, decoder_layers(model)), N_LAYERS, SearchSettings().to_dict(), {}))
        for number in range(n):
            answer = Answer(True, 1.0)
            writer.append(
                [PromptRoutes(str(number), "t", text(number), (" a", " of"), 0, " a", answer, (route,), None, 4, 4, 4)]
            )
    return path
