"""FLOPs left of all attentions under static twins: `python benchmarks/readme/shares.py MODEL TWINS COUNT...`.

Prints JSON. Reads TWINS/static-N for each COUNT N; skip paths are counted. Contexts of 100 and 1,024 tokens.
"""

import json
import sys
from pathlib import Path

from dynadepth import cost, detach, hub, load, routing_of


def main(name: str, twins: str, *counts: str) -> None:
    model = hub.load_model(name)
    found = []
    for count in counts:
        routing = routing_of(load(model, Path(twins) / f"static-{count}"))
        keep = {site: float(bool(router.constant)) for site, router in routing.routers().items()}
        for tokens in (100, 1024):
            share = cost.flops_share(model, keep, tokens)
            found.append({"skipped": int(count), "context": tokens, "attention": share.target, "model": share.model})
        detach(model)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
