"""The Trainer of pretraining: one order of windows for any number of processes, every FLOP counted, and a stop at the
first loss that is no number."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from dynadepth.errors import TuningError
from dynadepth.pretraining.flops import FlopMeter, executed_of
from dynadepth.records import read_json, write_json

Progress = Callable[[str, int, int, dict[str, float]], None]
"""`progress(stage, done, total, figures)`."""

WEIGHTS, STATE = "weights.safetensors", "pretraining.json"


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of all steps, in their order: the whole text in a new random order again and again."""

    def __init__(self, tokens: np.ndarray, length: int, count: int, seed: int) -> None:
        self.tokens, self.length, self.count, self.seed = tokens, length, count, seed
        self.whole = len(tokens) // length
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.whole)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.whole)
        start = int(self._order[place]) * self.length
        ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class PretrainTrainer(Trainer):
    """Trains the whole model; losses and FLOPs are those of the global batch, on every process alike."""

    model: Any

    def __init__(self, *args: Any, meter: FlopMeter, bf16: bool, beta2: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # rows are equally long: means of micro-batches add up to the mean
        self.meter, self.autocast, self.beta2 = meter, bf16, beta2
        self.losses: list[float] = []
        """The language-modelling loss of each step, nats a token."""
        self.spent = 0
        """FLOPs, forward and backward, over all processes."""
        self.history: list[dict[str, Any]] = []
        """Held-out losses on the way: `step` and what was measured."""
        self._step = -1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast):
            outputs = model(**inputs)
        self._note(outputs, inputs["input_ids"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _note(self, outputs: Any, ids: Tensor) -> None:
        """Adds up what this micro-batch did; raises TuningError where its loss is no number."""
        language = outputs.loss.detach()
        if (own := getattr(outputs, "depth_loss", None)) is not None:
            language = language - own.detach()
        if (balance := getattr(outputs, "aux_loss", None)) is not None:  # of a mixture of experts
            language = language - self.model.config.router_aux_loss_coef * balance.detach()
        executed = executed_of(getattr(outputs, "depth_trace", None))
        flops = self.meter.training(ids.shape[0], ids.shape[1], executed)
        mean, whole = language.double(), torch.tensor(float(flops), dtype=torch.float64, device=ids.device)
        if self.args.world_size > 1:
            mean = self.accelerator.reduce(mean, "mean")
            whole = self.accelerator.reduce(whole, "sum")
        if not torch.isfinite(mean):
            raise TuningError(f"The loss became {float(mean)} at step {self.state.global_step + 1}.")
        if self.state.global_step != self._step:
            self._step = self.state.global_step
            self.losses.append(0.0)
        self.losses[-1] += float(mean) / self.args.gradient_accumulation_steps
        self.spent += round(float(whole))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in learning if p.dim() > 1], "weight_decay": self.args.weight_decay},
                {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=self.args.learning_rate, betas=(0.9, self.beta2)
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        assert isinstance(self.train_dataset, Windows)
        return SequentialSampler(self.train_dataset)  # `Windows` are in their order already

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        from safetensors.torch import save_model

        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / WEIGHTS))  # routers, too; tied weights once

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))
        state = read_json(Path(resume_from_checkpoint) / STATE)
        self.losses, self.spent, self.history = list(state["losses"]), int(state["spent"]), list(state["history"])


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """A checkpoint's weights, routers included."""
    from safetensors.torch import load_model

    load_model(model, str(checkpoint / WEIGHTS))


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Watcher(TrainerCallback):
    """Tells of steps, evaluates on the way, marks checkpoints as complete, and stops between two steps on Ctrl-C."""

    def __init__(self, progress: Progress | None, evaluate_at: set[int], evaluate: Callable[[], dict[str, Any]]):
        self.progress, self.evaluate_at, self.evaluate = progress, evaluate_at, evaluate
        self.interrupted = False
        self.trainer: PretrainTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        step = state.global_step
        if step in self.evaluate_at and state.is_world_process_zero:
            self.trainer.history.append({"step": step, **self.evaluate()})
        recent = self.trainer.losses[-20:]
        if self.progress is not None:
            self.progress("train", step, state.max_steps, {"loss": sum(recent) / len(recent)})
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A bad gradient is met before it is in the weights, so that no checkpoint holds it."""
        assert self.trainer is not None
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise TuningError(f"The gradient became {norm} at step {state.global_step + 1}.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.is_world_process_zero:
            written: dict[str, Any] = {"losses": self.trainer.losses, "spent": self.trainer.spent}
            written["history"] = self.trainer.history
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, written)

    @contextmanager
    def listening(self, alone: bool) -> Iterator[None]:
        """The first Ctrl-C lets the step end and saves it, a second one stops at once; several processes stop at once,
        since they would not stop at the same step."""
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
