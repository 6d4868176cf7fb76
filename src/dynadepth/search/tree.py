"""Length-aware UCB tree search over layer routes, as in Dr.LLM (arXiv 2510.12773), free of any model.

A route says how often each layer runs: 0 skips it, 1 executes it, 2 repeats it. The root is the dense route; a child
has one more run of layers skipped, or one more layer repeated. The tree is asked for routes and told their rewards:

    while routes := tree.ask():
        tree.tell([reward(route) for route in routes])

Down the tree goes the child with the most  mean reward + c · √(ln N / n) − λ · layers / L,  or, with the probability
of the random prior, any. Where it ends, several children join at once, so that they can be evaluated together. Which
moves these are is learnt within the tree: those that gained wherever they were made come first, those not made yet
next, in random order. A node gets more children as its visits grow (progressive widening): with 50 simulations the
root gets some 24 and its children about as many, so that routes of one and two moves are tried; with more simulations
nodes are kept narrower, and routes of three and more moves come. No route is evaluated twice, and a search with enough
simulations evaluates every allowed route. Where fewer layers are asked for than there are, the root's children are
routes of so few layers at once, and no route runs more.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from dynadepth.errors import ConfigError

Counts = tuple[int, ...]
"""How often each layer runs."""

Move = tuple[int, int]
"""(first layer, n): n layers skipped from there on; n = 0: the layer repeated once more."""


SHORT = 50
"""Simulations of a search that tries single moves and pairs of them; ones with more go deeper."""

DRAWS, BY_CHANCE = 64, 0.5
"""Of routes that are drawn to a budget: tries at once, and the share of their skips that chance chooses, not gains."""

MOST_REPEATS = 8
"""A layer's executions are one digit in a file of routes."""


@dataclass(frozen=True)
class TreeSettings:
    """Defaults are the paper's, section 3.1 and appendix, unless said."""

    simulations: int = 50
    """Routes evaluated at most, the dense one not counted."""

    exploration: float = 1.8
    """c of the UCB formula."""

    length_penalty: float = 3.0
    """λ: what running all layers once costs, in units of reward."""

    random_prior: float = 0.1
    """Probability of a random choice instead of the formula's."""

    max_consecutive_skips: int = 2
    """Longest run of skipped layers."""

    repeats: int = 1
    """How often a layer may run again."""

    max_path: float = 2.0
    """Most layers a route may run, as a multiple of L."""

    siblings: int = 0
    """Children of one node that are evaluated together; 0: 8 for 50 simulations, fewer for more. Ours: the paper
    evaluates one route at a time."""

    widening: float = 0.0
    """A node of n visits gets new children while it has fewer than this × √n; 0: 3 for 50 simulations, less for more,
    so that these go deeper. Ours."""

    def __post_init__(self) -> None:
        more = max(1.0, self.simulations / SHORT)
        if not self.siblings:
            object.__setattr__(self, "siblings", max(2, round(8 / more)))
        if not self.widening:
            object.__setattr__(self, "widening", 3 / more)
        for name, low in (("simulations", 1), ("max_consecutive_skips", 0), ("repeats", 0), ("siblings", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}.")
        if self.repeats > MOST_REPEATS:
            raise ConfigError(f"repeats must be at most {MOST_REPEATS}, not {self.repeats}.")
        if not self.max_consecutive_skips and not self.repeats:
            raise ConfigError("with no skips and no repeats the dense route is the only one: allow one of them.")

    def allows(self, counts: Counts) -> bool:
        """Whether the search may run this route: a layer at least, no long run of skips, no path too long."""
        skipped = 0
        for count in counts:
            skipped = 0 if count else skipped + 1
            if skipped > self.max_consecutive_skips or count > 1 + self.repeats:
                return False
        return 1 <= sum(counts) <= self.max_path * len(counts)

    def fewest(self, n_layers: int) -> int:
        """Layers that the shortest allowed route runs."""
        return max(1, n_layers // (self.max_consecutive_skips + 1))


@dataclass(eq=False)
class _Node:
    counts: Counts
    reward: float
    parent: _Node | None = None
    visits: int = 1
    total: float = 0.0
    """Sum of the rewards in this subtree."""

    children: list[_Node] = field(default_factory=list)
    untried: list[Move] | None = None
    """None until the node is first expanded."""

    @property
    def mean(self) -> float:
        return self.total / self.visits


_Asked = tuple[_Node | None, tuple[Move, ...], Counts]
"""(parent, moves from there, route)"""


class RouteTree:
    """One search for one prompt. `evaluated` grows: every route told, with its reward, in order."""

    def __init__(
        self, n_layers: int, settings: TreeSettings, seed: int | str = 0, most_layers: int | None = None
    ) -> None:
        """`seed`: everything drawn depends on it alone. `most_layers`: but for the dense route, no route runs more."""
        self.n_layers, self.settings = n_layers, settings
        self.most = settings.max_path * n_layers if most_layers is None else most_layers
        self.evaluated: dict[Counts, float] = {}
        self._random = random.Random(seed)
        self._asked: list[_Asked] = []
        self._root: _Node | None = None
        self._closed: set[_Node] = set()
        self._drawn_out = False  # no new route was drawn from the dense one to the most layers
        # Times made, sum of what was gained: reward, and the share of the depth that was saved. (λ would drown the
        # reward here: every skip would come before every untried move.)
        self._gains: dict[Move, tuple[int, float]] = {}

    def ask(self) -> list[Counts]:
        """Routes to be evaluated next; the dense one at first. Empty when the search is over."""
        if self._asked:
            raise AssertionError("the last routes' rewards were not told")
        if self._root is None:
            self._asked = [(None, (), (1,) * self.n_layers)]
        else:
            self._asked = self._expand()
        return [counts for _, _, counts in self._asked]

    def tell(self, rewards: list[float]) -> None:
        """Rewards of the routes just asked for, between 0 and 1, higher for better."""
        asked, self._asked = self._asked, []
        for (parent, moves, counts), reward in zip(asked, rewards, strict=True):
            self.evaluated[counts] = reward
            node = _Node(counts, reward, parent, total=reward)
            if parent is None:
                self._root = node
                continue
            shorter = sum(parent.counts) - sum(counts)
            gain = (reward - parent.reward + shorter / self.n_layers) / len(moves)
            for move in moves:
                made, gained = self._gains.get(move, (0, 0.0))
                self._gains[move] = (made + 1, gained + gain)
            parent.children.append(node)
            above: _Node | None = parent
            while above is not None:
                above.visits += 1
                above.total += reward
                above = above.parent

    @property
    def left(self) -> int:
        """Simulations that are left."""
        return self.settings.simulations - max(0, len(self.evaluated) - 1)

    def _expand(self) -> list[_Asked]:
        """New children of the node that the formula leads to; none when all is tried or spent."""
        while self.left > 0 and self._root not in self._closed:
            node = self._descend()
            self._forget_seen(node)
            n = min(self.settings.siblings, self.left)
            if self._is_long(node):
                children = self._shortened(node, n)
            else:
                children = [(node, (move,), made(node.counts, move)) for move in self._draw(node, n)]
            if children:
                return children
            self._drawn_out |= self._is_long(node)
            self._close(node)
        return []

    def _descend(self) -> _Node:
        assert self._root is not None
        node = self._root
        while True:
            self._forget_seen(node)
            open_children = [child for child in node.children if child not in self._closed]
            wide = len(node.children) >= self.settings.widening * math.sqrt(node.visits)
            more = node.untried or (self._is_long(node) and not self._drawn_out)
            if not open_children or (more and not wide):
                return node
            if self._random.random() < self.settings.random_prior:
                node = self._random.choice(open_children)
            else:
                node = max(open_children, key=self._ucb)

    def _is_long(self, node: _Node) -> bool:
        """Is it the dense route where fewer layers are asked for? Its children are short enough at once."""
        return sum(node.counts) > self.most

    def _shortened(self, node: _Node, n: int) -> list[_Asked]:
        """Up to n new routes of few enough layers: skips are made one after the other, those that gained among them."""
        found: dict[Counts, _Asked] = {}
        for _ in range(DRAWS):
            counts, moves = node.counts, list[Move]()
            while sum(counts) > self.most and (skips := [m for m in moves_of(counts, self.settings) if m[1]]):
                self._random.shuffle(skips)
                moves.append(skips[0] if self._random.random() < BY_CHANCE else max(skips, key=self._gain))
                counts = made(counts, moves[-1])
            if sum(counts) <= self.most and counts not in self.evaluated:
                found[counts] = (node, tuple(moves), counts)
            if len(found) == n:
                break
        return list(found.values())

    def _ucb(self, node: _Node) -> float:
        assert node.parent is not None
        explored = self.settings.exploration * math.sqrt(math.log(node.parent.visits) / node.visits)
        return node.mean + explored - self.settings.length_penalty * sum(node.counts) / self.n_layers

    def _forget_seen(self, node: _Node) -> None:
        """Leaves among a node's moves those to routes that are allowed and in no other place of the tree."""
        if node.untried is None:
            node.untried = []
            if not self._is_long(node):
                moves = moves_of(node.counts, self.settings)
                node.untried = [m for m in moves if m[1] or sum(node.counts) < self.most]
            self._random.shuffle(node.untried)
        node.untried = [move for move in node.untried if made(node.counts, move) not in self.evaluated]

    def _draw(self, node: _Node, n: int) -> list[Move]:
        """Takes up to n untried moves of the node: the best by their gains, some at random."""
        assert node.untried is not None
        ranked = sorted(node.untried, key=self._gain, reverse=True)  # stable: not made yet stay shuffled
        drawn: list[Move] = []
        while ranked and len(drawn) < n:
            by_chance = self._random.random() < self.settings.random_prior
            drawn.append(ranked.pop(self._random.randrange(len(ranked)) if by_chance else 0))
        node.untried = [move for move in node.untried if move not in drawn]
        return drawn

    def _gain(self, move: Move) -> float:
        times, gained = self._gains.get(move, (0, 0.0))
        return gained / times if times else 0.0

    def _close(self, node: _Node) -> None:
        """Marks a node that has nothing left, and those above that lose their last open child with it."""
        closing: _Node | None = node
        while closing is not None:
            if closing.untried or any(child not in self._closed for child in closing.children):
                return
            self._closed.add(closing)
            closing = closing.parent


def made(counts: Counts, move: Move) -> Counts:
    """The route after a move."""
    first, n = move
    if n == 0:
        return (*counts[:first], counts[first] + 1, *counts[first + 1 :])
    return (*counts[:first], *(0,) * n, *counts[first + n :])


def moves_of(counts: Counts, settings: TreeSettings) -> list[Move]:
    """All moves from a route to allowed ones: skips of executed layers, one more run of a layer that runs."""
    found: list[Move] = []
    for first, count in enumerate(counts):
        for n in range(1, settings.max_consecutive_skips + 1):
            if counts[first : first + n] == (1,) * n and settings.allows(made(counts, (first, n))):
                found.append((first, n))
        if 1 <= count <= settings.repeats and settings.allows(made(counts, (first, 0))):
            found.append((first, 0))
    return found
