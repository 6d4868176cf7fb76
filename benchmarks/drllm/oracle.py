"""What routes that were found are worth, on the prompts they were found for: `oracle.py MODEL ROUTES DATA.. [SEED]`.

Rows, each the accuracy on the second half of the prompts (by a seeded shuffle) and the mean layers run:

    dense     every layer once
    oracle    for each prompt the best route that the search kept, dense where it kept none: knows the answer
    static    one route for all: of those kept for the most prompts of the first half, the one most often right there
    shuffled  for each prompt the best route of another one: what fits any prompt
    random    for each prompt a random route with as many skips and repeats as its best one

and `control`: the share of prompts whose search towards a wrong answer got there. `replayed` runs every prompt's best
route once more, alone: the share whose verdict is the recorded one. Prints a JSON document.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

from dynadepth import adapter, hub, route_file
from dynadepth.architectures import decoder_layers
from dynadepth.provenance import provenance
from dynadepth.search.answers import replies
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import load_questions
from dynadepth.search.searcher import grouped
from dynadepth.search.tree import TreeSettings
from dynadepth.statistics import paired_bootstrap

CANDIDATES = 24
"""Static routes that are tried."""


def right(runner, questions, routes):
    """Whether each question is answered rightly under its routes: `routes[key]` is a list of them; by key."""
    out = {}
    for group in grouped(list(questions.values())):
        runner.take([question.row for question in group])
        asked = [(n, counts) for n, q in enumerate(group) for counts in routes[q.source, q.id]]
        for (n, counts), reply in zip(asked, replies(runner, group, asked), strict=True):
            out[group[n].source, group[n].id, counts] = reply.margin(group[n].gold or 0) > 0
    return out


def random_like(counts, draw):
    """A route with as many skips and repeats, of those that the search could have tried."""
    while True:
        drawn = list(counts)
        draw.shuffle(drawn)
        if TreeSettings().allows(tuple(drawn)):
            return tuple(drawn)


def main(model_name, routes_file, *rest):
    seed = int(rest[-1]) if rest[-1].isdigit() else 0
    files = [name for name in rest if not name.isdigit()]
    model, tokenizer = hub.load_model(model_name), hub.load_tokenizer(model_name)
    file = route_file.read(routes_file, adapter.identity(model, decoder_layers(model)))
    prompts = {(prompt.source, prompt.id): prompt for prompt in file.prompts}
    loaded, _ = load_questions(files, tokenizer)
    questions = {(q.source, q.id): q for q in loaded if (q.source, q.id) in prompts}
    keys = sorted(questions)
    draw = random.Random(seed)
    draw.shuffle(keys)
    first, second = keys[: len(keys) // 2], keys[len(keys) // 2 :]

    dense = (1,) * file.header.n_layers
    best = {key: prompts[key].routes[0].counts if prompts[key].routes else dense for key in keys}
    kept = Counter(route.counts for key in first for route in prompts[key].routes)
    candidates = [dense, *(counts for counts, _ in kept.most_common(CANDIDATES))]
    others = dict(zip(second, [*second[1:], second[0]], strict=True))
    drawn = {key: random_like(best[key], draw) for key in second}

    runner = LayerRunner(model)
    tried = right(runner, {key: questions[key] for key in first}, dict.fromkeys(first, candidates))
    static = max(candidates, key=lambda counts: sum(tried[(*key, counts)] for key in first))
    rows = {
        "dense": dict.fromkeys(second, dense),
        "oracle": {key: best[key] for key in second},
        "static": dict.fromkeys(second, static),
        "shuffled": {key: best[others[key]] for key in second},
        "random": drawn,
    }
    wanted = {key: list(dict.fromkeys(row[key] for row in rows.values())) for key in second}
    found = right(runner, {key: questions[key] for key in second}, wanted)
    document = {"prompts": len(second), "static_route": static, "rows": {}}
    scores = {name: [float(found[(*key, row[key])]) for key in second] for name, row in rows.items()}
    # A prompt counts as the oracle's where dense is right, as in the search's own figures.
    scores["oracle"] = [max(pair) for pair in zip(scores["oracle"], scores["dense"], strict=True)]
    for name, row in rows.items():
        document["rows"][name] = {
            "accuracy": sum(scores[name]) / len(second),
            "diff_vs_dense": paired_bootstrap(scores[name], scores["dense"], seed=seed),
            "layers": sum(map(sum, row.values())) / len(second),
        }
    margin = file.header.search["margin"]
    controls = [prompts[key].control for key in second if prompts[key].control is not None]
    document["control"] = sum(c >= margin for c in controls) / len(controls) if controls else None
    same = []
    for key in keys:
        alone = right(runner, {key: questions[key]}, {key: [best[key]]})
        same.append(alone[(*key, best[key])] == (bool(prompts[key].routes) or prompts[key].dense.correct))
    document["replayed"] = {"prompts": len(same), "same": sum(same) / len(same)}
    document["provenance"] = provenance(seed=seed, dtype=model.dtype, model=file.header.model)
    document["provenance"]["command"] = " ".join(["python", "benchmarks/drllm/oracle.py", *sys.argv[1:]])
    document["routes"] = Path(routes_file).name
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
