"""What routers take of a generation: `router_time.py MODEL ROUTERS [PROMPT_TOKENS NEW_TOKENS [REPEATS]]` (64, 256, 5).

Each repeat generates greedily after a prompt of the model's own data, with the routers at work. Timed are the whole of
`generate()` and, within it, everything between the hidden states that reach a site and its route: pooling, the router,
the action, the transfer to the host, the note in the cache. For routes that stick to a sequence. Prints a JSON document
with the median share and the spread.
"""

import json
import statistics
import sys
import time

from dynadepth import hub, load
from dynadepth.benchmark import cut_prompts
from dynadepth.provenance import provenance
from dynadepth.routed import routing_of
from dynadepth.routing.granularity import PerSequence
from dynadepth.routing.whole_route import PerRoute


def timed(route, spent):
    """The method, noting the seconds it takes."""

    def noted(*args):
        started = time.perf_counter()
        route(*args)
        spent.append(time.perf_counter() - started)

    return noted


def main(name, routers, prompt_tokens=64, new_tokens=256, repeats=5):
    model, tokenizer = hub.load_model(name).eval(), hub.load_tokenizer(name)
    load(model, routers)
    spent = []
    for granularity in (PerSequence, PerRoute):
        granularity._route = timed(granularity._route, spent)
    ids = cut_prompts(tokenizer, count=1, length=prompt_tokens)[0].reshape(1, -1).to(model.device)
    runs = []
    for number in range(repeats + 1):
        spent.clear()
        started = time.perf_counter()
        written = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        total = time.perf_counter() - started
        assert written.shape[1] == prompt_tokens + new_tokens
        assert spent, "these routers decide nothing a sequence"
        if number:  # the first one warms up
            runs.append({"seconds": total, "routers": sum(spent), "decisions": len(spent)})
    shares = [run["routers"] / run["seconds"] for run in runs]
    document = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "sites": len(routing_of(model).sites),
        "share": statistics.median(shares),
        "lowest": min(shares),
        "highest": max(shares),
        "decisions": runs[0]["decisions"],
        "provenance": provenance(dtype=model.dtype),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
