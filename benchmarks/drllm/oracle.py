"""What routes that were found are worth, on the prompts they were found for: `oracle.py MODEL ROUTES DATA..`.

Of multiple-choice prompts. Rows, each the accuracy on the second half of the prompts (by a seeded shuffle) and the mean
layers run:

    dense     every layer once
    oracle    for each prompt the best route that the search kept, dense where it kept none: knows the answer
    static    one route for all, chosen on the first half (`search.static.best_static`)
    shuffled  for each prompt the best route of another one: what fits any prompt
    random    for each prompt a random route with as many skips and repeats as its best one

`moves`: what single moves gain in reward on the prompts of the file that drew them before their search knew anything
(`search.static.drawn_gains`), the best eight and the worst two: layer, layers skipped (0: repeated), prompts, mean,
and its standard error. `control`: the share of prompts whose search towards a wrong answer got there. `replayed` runs
the best route of `--replay` prompts once more, alone, by the search's runner (`apart`) and as a routed model does
(`attached`, one forward an option): the share whose verdict is the recorded one, and how far the leads are from the
recorded ones, nats. Prints a JSON document.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

from dynadepth import MindSkipConfig, adapter, attach, fixed_routes, hub, route_file
from dynadepth.architectures import decoder_layers
from dynadepth.provenance import provenance
from dynadepth.routed import routing_of
from dynadepth.search.answers import replies
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import load_questions
from dynadepth.search.replay import leads
from dynadepth.search.static import best_static, drawn_gains, ranked_moves
from dynadepth.search.tree import TreeSettings
from dynadepth.statistics import paired_bootstrap, standard_error


def random_like(counts, draw, rules):
    """A route with as many skips and repeats, of those that the search could have tried."""
    while True:
        drawn = list(counts)
        draw.shuffle(drawn)
        if rules.allows(tuple(drawn)):
            return tuple(drawn)


def apart(runner, question, route):
    """The lead of the gold answer under a route, run alone."""
    if route is None:
        return None
    runner.take([question.row])
    return replies(runner, [question], [(0, route.counts)])[0].margin(question.gold or 0)


@torch.no_grad()
def attached(model, question, route):
    """The same from forwards of the routed model, one for each option."""
    if route is None:
        return None
    sums = []
    with fixed_routes(model, {site: route.counts[site.layer] for site in routing_of(model).sites}):
        for tokens in question.continuations:
            ids = torch.tensor([question.context + tokens[:-1]], device=model.device)
            prompt = torch.arange(ids.shape[1], device=model.device)[None] < len(question.context)
            log_probs = model(input_ids=ids, prompt_mask=prompt).logits[0].float().log_softmax(-1)
            places = range(len(question.context) - 1, ids.shape[1])
            sums.append(sum(float(log_probs[at, token]) for at, token in zip(places, tokens, strict=True)))
    return sums[question.gold] - max(total for option, total in enumerate(sums) if option != question.gold)


def compared(routes, found):
    """Of the prompts with a kept route: how many say the same again, and how far the leads are off."""
    pairs = [(routes[key].margin, lead) for key, lead in found.items() if lead is not None]
    off = [abs(before - now) for before, now in pairs]
    if not pairs:
        return None
    return {
        "prompts": len(pairs),
        "same": sum(now > 0 for _, now in pairs) / len(pairs),
        "mean_off": sum(off) / len(off),
        "most_off": max(off),
    }


def moves(prompts):
    """The moves that gain most and least."""
    gains, ranked = drawn_gains(prompts), ranked_moves(prompts)
    rows = [[*move, len(own), sum(own) / len(own), standard_error(own)] for move, own in gains.items()]
    rows.sort(key=lambda row: ranked.index((row[0], row[1])))
    return rows[:8] + rows[-2:]


def main(model_name, routes_file, files, seed, replay):
    file = route_file.read(routes_file)
    model = hub.load_model(model_name, dtype=file.header.search["dtype"])
    tokenizer = hub.load_tokenizer(model_name)
    file.check_model(routes_file, adapter.identity(model, decoder_layers(model)))
    prompts = {(prompt.source, prompt.id): prompt for prompt in file.prompts}
    loaded, _ = load_questions(files, tokenizer)
    questions = {(q.source, q.id): q for q in loaded if q.options is not None and (q.source, q.id) in prompts}
    keys = sorted(questions)
    draw = random.Random(seed)
    draw.shuffle(keys)
    first, second = keys[: len(keys) // 2], keys[len(keys) // 2 :]

    dense = (1,) * file.header.n_layers
    best = {key: prompts[key].routes[0].counts if prompts[key].routes else dense for key in keys}
    others = dict(zip(second, [*second[1:], second[0]], strict=True))
    rules = TreeSettings(**{name: file.header.search[name] for name in ("max_consecutive_skips", "repeats")})
    drawn = {key: random_like(best[key], draw, rules) for key in second}

    runner = LayerRunner(model)
    static = best_static(model, tokenizer, file, among=set(first), seed=seed).counts
    rows = {
        "dense": dict.fromkeys(second, dense),
        "oracle": {key: best[key] for key in second},
        "static": dict.fromkeys(second, static),
        "shuffled": {key: best[others[key]] for key in second},
        "random": drawn,
    }
    wanted = {key: list(dict.fromkeys(row[key] for row in rows.values())) for key in second}
    found = leads(runner, {key: questions[key] for key in second}, wanted)
    document = {
        "prompts": len(second),
        "static_route": static,
        "rows": {},
        "moves": moves([p for p in file.prompts if p.options is not None]),
    }
    scores = {name: [float(found[key, row[key]] > 0) for key in second] for name, row in rows.items()}
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
    top = {key: prompts[key].routes[0] if prompts[key].routes else None for key in keys[:replay]}
    document["replayed"] = {"apart": compared(top, {key: apart(runner, questions[key], top[key]) for key in top})}
    attach(model, MindSkipConfig(target="block", layers="all"))
    again = {key: attached(model, questions[key], top[key]) for key in top}
    document["replayed"]["attached"] = compared(top, again)
    document["provenance"] = provenance(seed=seed, dtype=model.dtype, model=file.header.model)
    document["provenance"]["command"] = " ".join(["python", "benchmarks/drllm/oracle.py", *sys.argv[1:]])
    document["routes"] = Path(routes_file).name
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("routes")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, default=200)
    given = parser.parse_args()
    main(given.model, given.routes, given.data, given.seed, given.replay)
