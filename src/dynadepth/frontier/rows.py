"""The methods of a frontier as data: a new one is one more entry of `ROWS` (its kind is in makers.py, static.py or
shuffled.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.frontier.makers import Beside, Dense, Maker, PositionsOf, RandomPerInput, Tuned, TwinOf
from dynadepth.frontier.searched import BestStatic, Oracle, RandomBeside, Searched, StaticBeside
from dynadepth.frontier.shuffled import Shuffled
from dynadepth.frontier.static import Static
from dynadepth.report.cells import DENSE


@dataclass(frozen=True)
class Row:
    """A method of the frontier."""

    name: str
    description: str
    maker: Maker

    @property
    def of(self) -> str | None:
        """The row that this one is compared with, whose cells are measured before."""
        return self.maker.of if isinstance(self.maker, Beside) else None

    @property
    def reads_data(self) -> bool:
        """Has it tuning data of its own, or texts that it is measured on beforehand?"""
        return self.of is None and not isinstance(self.maker, Dense | RandomPerInput)

    @property
    def needs(self) -> str | None:
        """The row whose own data (`--data NAME=FILE`) this one cannot do without."""
        if isinstance(self.maker, Searched | Oracle):
            return self.name
        return None if self.of is None else row_named(self.of).needs


DEFAULT, DRLLM = Tuned("default"), Searched("drllm-paper")
BY_TOKEN = Tuned("default", method={"granularity": "token"})
ROWS = (
    Row(DENSE, "the model itself: everything executes", Dense()),
    Row("static", "skips the sublayers with the lowest 1 − cosine, the same for every input", Static("cosine")),
    Row(
        "static-alone",
        "skips the sublayers whose removal, each alone, harms the model the least (KL), the same for every input",
        Static("alone"),
    ),
    Row(
        "static-greedy",
        "skips sublayers chosen one after the other, each time the one that adds the least harm (KL) to those before",
        Static("greedy"),
    ),
    Row(
        "static-linear",
        "the route of static, with the default recipe's skip paths fitted in closed form and not tuned",
        Static("cosine", fitted=True),
    ),
    Row(
        "static-damage",
        "as static-linear, skipping first what harms the model the least (KL), each alone, its skip path in its place",
        Static("damage", fitted=True),
    ),
    Row("static-deepest", "skips the deepest sublayers but the last, the same for every input", Static("deepest")),
    Row("random", "skips sublayers drawn once, the same for every input", Static("random")),
    Row("random-per-input", "skips sublayers drawn anew for each input", RandomPerInput()),
    Row("mindskip-paper", "MindSkip with Router-Tuning as published, at the budget it gives", Tuned("mindskip-paper")),
    Row("default", "routers tuned once by the default recipe, serving every budget", DEFAULT),
    Row(
        "identity",
        "the default recipe without skip paths: what is skipped contributes nothing",
        Tuned("default", {"joint": 1.0}, {"skip_path": "identity"}),
    ),
    Row(
        "default-lora",
        "the default recipe with a LoRA of rank 16 tuned beside the routers",
        Tuned("default", {"lora": {"rank": 16}}),
    ),
    Row("default-static", "the static twin of default: a fixed route, the same keep ratio", TwinOf("default", DEFAULT)),
    Row(
        "default-shuffled",
        "the routers of default, every input under the route that they chose for another one",
        Shuffled("default", DEFAULT),
    ),
    Row(
        "default-token",
        "the default recipe at token granularity; skipped tokens keep their keys and values",
        BY_TOKEN,
    ),
    Row(
        "default-token-static",
        "the static twin of default-token: each attention executes the same share of tokens, at fixed positions",
        PositionsOf("default-token", BY_TOKEN),
    ),
    Row("drllm", "Dr.LLM: layers skipped, executed or repeated, by routers tuned on searched routes", DRLLM),
    Row(
        "drllm-static",
        "the static route that runs as many layers as drllm, without those that it runs least",
        StaticBeside("drllm", DRLLM),
    ),
    Row(
        "drllm-best-static",
        "the one route that serves the prompts of drllm's data best, with no more layers than dense",
        BestStatic("drllm", DRLLM),
    ),
    Row("drllm-random", "each input runs random layers, as many as drllm", RandomBeside("drllm", DRLLM)),
    Row(
        "drllm-shuffled",
        "the routers of drllm, every input under the route that they chose for another one",
        Shuffled("drllm", DRLLM),
    ),
    Row("oracle", "every searched prompt under the first route kept for it, others dense: knows the answers", Oracle()),
)
"""In the order of the table."""


def row_named(name: str) -> Row:
    """Raises `ConfigError` with the near names for an unknown one."""
    known = {row.name: row for row in ROWS}
    if name not in known:
        raise ConfigError(f"There is no method {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]


def chosen(names: Iterable[str]) -> list[Row]:
    """The rows of these names, with dense and what they are compared with, in the order of the table."""
    wanted = {DENSE}
    for name in names:
        wanted |= {name} if (of := row_named(name).of) is None else {name, of}
    return [row for row in ROWS if row.name in wanted]
