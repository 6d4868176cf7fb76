"""The trainer of routers, skip paths and a LoRA where asked for, on `transformers.Trainer`: the backbone is frozen,
checkpoints hold what is tuned and optimiser state."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from dynadepth.architectures import decoder_layers, decoder_of
from dynadepth.errors import ConfigError, DataError, TuningError, did_you_mean
from dynadepth.model import save
from dynadepth.records import read_json, write_json
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.sublayer import PATH, ROUTER
from dynadepth.tuning.controller import QuantileController, RouteController
from dynadepth.tuning.data import Collator, Example
from dynadepth.tuning.objectives import OBJECTIVES
from dynadepth.tuning.recipe import Recipe
from dynadepth.tuning.resuming import CHECKPOINTS, restore, restore_from, snapshot
from dynadepth.tuning.start import keep_of

LEG = "leg.json"
"""In a checkpoint: what its run took up to there."""

BESIDE = ("paths", "lora")
"""Kinds of parameters that are not the routers' (`_kind`)."""

Progress = Callable[[str, int, int, dict[str, float]], None]
"""`progress(stage, done, total, figures)`."""

LARGEST_STEP = 0.03
"""Of a skip path's tensor, beside its root mean square: the largest step of the optimiser."""


class RouterTrainer(Trainer):
    """A Trainer whose checkpoints hold routers, and that stops at the first bad loss."""

    model: Any

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # ask for the number of label tokens of the whole step
        self.losses: list[float] = []
        """One a step."""
        self.keeps: list[float] = []
        self.started, self.before = time.monotonic(), 0.0
        self._step = -1
        self.last_good = snapshot(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if model.training:
            rest_backbone(self.model)
        loss, outputs = OBJECTIVES[self.recipe.objective](self.model, inputs, num_items_in_batch, self.recipe.kl_share)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # frozen routers let everything execute: nothing to learn in this step
        self.note_keep(outputs.depth_trace)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            restore(self.model, self.last_good)
            raise TuningError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}; the routers are those of the "
                "last good step. Try a lower learning_rate, or bfloat16 instead of float16."
            )
        self.last_good = snapshot(self.model)
        if self.state.global_step != self._step:
            self._step = self.state.global_step
            self.losses.append(0.0)
        self.losses[-1] += loss.item()  # a micro-batch's loss is its share of the whole step's
        return loss

    def note_keep(self, trace: Any) -> None:
        """Remembers the hard keep ratio of a training batch."""
        executed = [d.execute[trace.token_mask] if d.execute.dim() == 2 and trace.token_mask is not None else d.execute
                    for d in trace.decisions.values()]  # fmt: skip
        if executed:  # constant routers decide nothing
            self.keeps.append(float(torch.cat([e.flatten() for e in executed]).float().mean()))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"others": self.args.learning_rate, "paths": self.recipe.path_learning_rate}
            rates["lora"] = self.recipe.lora_learning_rate
            bias_rate = self.recipe.bias_learning_rate
            rates["biases"] = self.args.learning_rate if bias_rate is None else bias_rate
            parameters: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameters[_kind(name)].append(parameter)
            groups = [{"params": parameters[kind], "lr": rate} for kind, rate in rates.items() if kind != "paths"]
            groups += [{"params": [tensor], "lr": path_rate(tensor, rates["paths"])} for tensor in parameters["paths"]]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.args.weight_decay)
        return self.optimizer

    def go_on(self, checkpoint: Path, state: TrainerState) -> None:
        """Trains the steps that are left from a checkpoint on. Where none are (the run was stopped later on),
        transformers would train one step more."""
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state

    def check_finite(self) -> None:
        """After the last step, which no loss looks at: the last good parameters, and a TuningError, if it was bad."""
        if not all(
            value.isfinite().all() for name, value in snapshot(self.model).items() if not name.endswith("threshold")
        ):
            restore(self.model, self.last_good)
            raise TuningError(
                f"What is tuned is not finite after step {self.state.global_step}; the routers are those of the last "
                "good step. Try a lower learning_rate, or bfloat16 instead of float16."
            )

    @property
    def seconds(self) -> float:
        """Since the run began, earlier legs of an interrupted one included."""
        return self.before + time.monotonic() - self.started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        save(self.model, folder)
        write_json(Path(folder) / LEG, {"seconds": self.seconds, "losses": self.losses})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with suppress(DataError, KeyError, TypeError):  # of an older version, or damaged: this leg alone is told of
            leg = read_json(Path(resume_from_checkpoint) / LEG)
            self.before, self.losses = float(leg["seconds"]), [float(loss) for loss in leg["losses"]]
        restore_from(self.model, Path(resume_from_checkpoint))


def path_rate(tensor: Tensor, rate: float) -> float:
    """The learning rate of a skip path's tensor: `rate`, but at most `LARGEST_STEP` of its root mean square as fitted.

    Adam's steps are as large as the rate, whatever the tensor's scale, which follows that of the model's states: the
    rows that read Gemma-3-270M's embeddings are thirty times and more smaller than those of attention 2 and above.
    """
    size = float(tensor.detach().float().square().mean().sqrt())
    return min(rate, LARGEST_STEP * size) if size > 0 else rate


def rest_backbone(model: nn.Module) -> None:
    """Dropout and the like of the frozen sublayers as at inference: a teacher and a student that drop different units
    are apart before anything is skipped. What is tuned keeps its mode, and so do the model and its layers, which
    gradient checkpointing asks."""
    base = unwrapped(model)
    for module in base.modules():
        module.training = False
    routing = routing_of(model)
    tuned = [*routing.routers().values(), *routing.paths().values()]
    if routing.lora is not None:
        tuned += routing.lora.parts()
    for module in chain((base, decoder_of(base), *decoder_layers(base)), *(part.modules() for part in tuned)):
        module.training = True


class _Phases(TrainerCallback):
    """Routers learn in the recipe's first share of steps; then they are frozen and skip paths learn alone."""

    def __init__(self, model: nn.Module, joint: float) -> None:
        self.routers, self.joint = list(routing_of(model).routers().values()), joint

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for router in self.routers:
            router.requires_grad_(state.global_step < round(self.joint * state.max_steps))


class _Report(TrainerCallback):
    """Hands the trainer's steps to a progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.trainer: RouterTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and self.trainer and self.trainer.losses:
            recent, keeps = self.trainer.losses[-8:], self.trainer.keeps[-8:]
            figures = {"loss": sum(recent) / len(recent)}
            if keeps:
                figures["keep"] = sum(keeps) / len(keeps)
            self.progress("tune", state.global_step, state.max_steps, figures)


def _kind(name: str) -> str:
    """Which learning rate a parameter has."""
    if f".{PATH}." in name:
        return "paths"
    if ".lora_" in name:
        return "lora"
    return "biases" if name.endswith(f"{ROUTER}.bias") else "others"


def moved(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    """Root mean square change of the router parameters between two snapshots."""
    routers = [name for name in now if not name.endswith("threshold") and _kind(name) not in BESIDE]
    changes = [(now[name] - before[name]).flatten() for name in routers]
    return float(torch.cat(changes).square().mean().sqrt()) if changes else 0.0


def check_trainable(recipe: Recipe) -> None:
    """Raises ConfigError for settings that transformers' trainer does not know, before anything is measured."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_utils import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if recipe.lr_scheduler not in known:
        near = did_you_mean(recipe.lr_scheduler, known)
        raise ConfigError(f"lr_scheduler must be one of {', '.join(known)}, not {recipe.lr_scheduler!r}.{near}")
    try:
        get_reporting_integration_callbacks(list(recipe.report_to))
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from error


def check_device(model: nn.Module) -> None:
    """Raises ConfigError for a model whole on another GPU than the first, to which transformers' trainer would move
    it."""
    base = unwrapped(model)
    device = next(base.parameters()).device
    if device.type == "cuda" and device.index not in (None, 0) and not getattr(base, "hf_device_map", None):
        raise ConfigError(
            f"The model is on {device}, and tuning runs on the first visible GPU: start Python with "
            f"CUDA_VISIBLE_DEVICES={device.index}, or move the model to cuda:0."
        )


def trainer_for(
    model: nn.Module,
    training: list[Example],
    collator: Collator,
    recipe: Recipe,
    out: Path,
    budget: float,
    seed: int,
    progress: Progress | None,
) -> RouterTrainer:
    """The trainer of a routed model, by the recipe."""
    device = next(unwrapped(model).parameters()).device
    steps = recipe.max_steps
    per_step = recipe.batch_size * recipe.gradient_accumulation
    total = steps if steps > 0 else max(1, round(recipe.epochs * len(training) / per_step))
    args = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=round(recipe.warmup * total),
        weight_decay=recipe.weight_decay,
        num_train_epochs=recipe.epochs,
        max_steps=steps,
        seed=seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        average_tokens_across_devices=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one GPU, however many are visible: more would be a larger batch
    report = _Report(progress)
    routing = routing_of(model)
    served = recipe.budgets or (budget,)
    keeps = [keep_of(model, b) for b in served]
    controllers: list[TrainerCallback] = []
    if routing.is_static:
        controllers = [RouteController(model, served, seed)]
    elif recipe.controller == "quantile":
        controllers = [QuantileController(model, keeps, seed)]
    trainer = RouterTrainer(
        model=model,
        args=args,
        train_dataset=training,
        data_collator=collator,
        callbacks=[_Phases(model, recipe.joint), *controllers, report],
        recipe=recipe,
    )
    report.trainer = trainer
    trainer.remove_callback(_printer())
    return trainer


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
