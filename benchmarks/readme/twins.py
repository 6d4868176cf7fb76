"""Static and random twins of tuned routers: `python benchmarks/readme/twins.py MODEL ROUTERS OUT COUNT...`.

Writes OUT/static-N and OUT/random-N, routes that skip N sublayers for every input, for each COUNT N. Static: least
important first, by the scores that tuning itself started from (written anew with the recipe's seed).
Random: drawn with seed 0. Both have the routers' own tuned skip paths.
"""

import random
import sys
from pathlib import Path

from dynadepth import StaticConfig, attach, budget, detach, hub, load, routing_of, save
from dynadepth.tuning import Recipe, examples_for
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.start import scores_of


def main(name: str, routers: str, out: str, *counts: str) -> None:
    model, tokenizer = hub.load_model(name), hub.load_tokenizer(name)
    load(model, routers)
    routing = routing_of(model)
    made, target, n_layers = routing.provenance, routing.target.name, routing.n_layers
    detach(model)
    recipe = Recipe(**made["recipe"])
    examples = examples_for("self", model, tokenizer, recipe, seed=made["seed"], cache_dir=Path(routers) / "self-data")
    scores = scores_of(model, examples, pad_token_id(tokenizer), target)
    order = list(range(n_layers))
    random.Random(0).shuffle(order)
    for count in map(int, counts):
        routes = {"static": budget.static_skip(scores, 1 - count / n_layers, n_layers), "random": order[:count]}
        for kind, skip in routes.items():
            path, rank = routing.config.skip_path, routing.config.skip_rank
            attach(model, StaticConfig(target=target, skip=tuple(skip), skip_path=path, skip_rank=rank))
            routing_of(model).take_paths(routing)
            print(save(model, Path(out) / f"{kind}-{count}"), sorted(skip))
            detach(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
