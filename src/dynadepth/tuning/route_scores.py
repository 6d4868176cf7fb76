"""How well actions are predicted: macro-F1 and per-class figures, beside predictors that look at no prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynadepth.methods.drllm import ACTIONS


@dataclass(frozen=True)
class ClassScore:
    """One action, over all (example, layer) pairs."""

    precision: float
    """Share of the pairs predicted so that are so; 0 where none is predicted."""
    recall: float
    """Share of the pairs that are so and are predicted so; 0 where none is."""
    f1: float
    support: int
    """Pairs that are so."""
    predicted: int


@dataclass(frozen=True)
class ActionScores:
    """Of one predictor."""

    macro_f1: float
    """Mean F1 of the actions that the labels have: the same ones for every predictor."""
    accuracy: float
    classes: dict[str, ClassScore]


def action_scores(predicted: Tensor, wanted: Tensor) -> ActionScores:
    """Of predicted actions against those wanted, int64 of one shape, at least one pair."""
    classes = {}
    for number, name in enumerate(ACTIONS):
        told, so = predicted == number, wanted == number
        both, n_told, n_so = int((told & so).sum()), int(told.sum()), int(so.sum())
        f1 = 2 * both / (n_told + n_so) if n_told + n_so else 0.0
        classes[name] = ClassScore(both / n_told if n_told else 0.0, both / n_so if n_so else 0.0, f1, n_so, n_told)
    occurring = [score.f1 for score in classes.values() if score.support]
    accuracy = float((predicted == wanted).double().mean())
    return ActionScores(sum(occurring) / len(occurring), accuracy, classes)


def always_execute(wanted: Tensor) -> Tensor:
    """The predictions of the dense model."""
    return torch.ones_like(wanted)


def commonest(training: Tensor, wanted: Tensor) -> Tensor:
    """The predictions of a static route: each layer's commonest action in training, `[N, L]` both."""
    return training.mode(0).values.expand_as(wanted)
