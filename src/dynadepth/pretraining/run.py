"""One pretraining run: corpus, model, steps that the FLOP budget pays for, checkpoints, and what came of it.

DIR/run.json      the settings, and once finished the result
DIR/corpus        tokenizer and packed tokens
DIR/checkpoints   to resume from
DIR/model         the model and its tokenizer, and `routers` in it where it is routed
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_callback import PrinterCallback

from dynadepth.errors import ConfigError, DataError, TuningError, did_you_mean
from dynadepth.model import attach, save
from dynadepth.pretraining.corpus import Corpus, facts_of, prepare
from dynadepth.pretraining.flops import FlopMeter, executed_of
from dynadepth.pretraining.recipe import PretrainRecipe
from dynadepth.pretraining.scoring import losses
from dynadepth.pretraining.trainer import (
    PretrainTrainer,
    Progress,
    Watcher,
    Windows,
    last_checkpoint,
    load_weights,
)
from dynadepth.provenance import provenance
from dynadepth.recipe_files import difference
from dynadepth.records import plain, read_json, write_json
from dynadepth.routed import is_attached

RUN, MODEL, CORPUS, CHECKPOINTS, ROUTERS = "run.json", "model", "corpus", "checkpoints", "routers"


@dataclass
class Plan:
    """What a budget pays for."""

    steps: int
    flops_per_step: int
    """Forward and backward of one batch; of routers with thresholds, at the start."""
    forward_per_token: float
    """FLOPs of a forward, its share of a token; head included."""
    dense_forward_per_token: float
    """The same, were every token executed everywhere and no router asked."""


@dataclass
class PretrainResult:
    """What a run did. `valid` has the held-out losses by decisions (see `scoring.losses`)."""

    steps: int
    tokens: int
    epochs: float
    """How often the training text was read."""
    flops: int
    """Really spent, forward and backward."""
    plan: dict[str, Any]
    parameters: int
    """All of them, routers included."""
    inner_parameters: int
    """Those of the layers and routers: embeddings and head apart."""
    valid: dict[str, dict[str, Any]]
    history: list[dict[str, Any]]
    losses: list[float]
    """Training loss of each step, nats a token."""
    seconds: float
    """Of training and validation in this process; of a resumed run those since it was resumed."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Tokens of the training and of the scored held-out text."""


def pretrain(
    recipe: PretrainRecipe,
    files: Sequence[Path],
    out: Path,
    *,
    valid: Sequence[Path] = (),
    flops: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> PretrainResult:
    """Trains the recipe's model on the texts until the budget is spent; the folder then holds it.

    `resume` goes on with the run that `out` holds, or begins one; a finished one is read back. Under `accelerate
    launch` each process takes its part of every batch. Raises ConfigError for a budget below one step, for a folder
    that holds a run when `resume` is false, and for one of other settings (saying what differs); DataError for texts
    that cannot be used; TuningError where the loss becomes NaN, after saving the last checkpoint's model.
    """
    from accelerate import PartialState

    state = PartialState()
    budget = recipe.flops if flops is None else flops
    if not 0 < budget < float("inf"):
        raise ConfigError(f"flops must be a number above 0, not {budget}.")
    wanted = plain({"recipe": recipe.to_dict(), "flops": budget, "corpus": facts_of(recipe, files, valid)})
    if state.is_main_process:
        _check_earlier(out, resume, wanted)
    with state.main_process_first():  # one makes the corpus, the others find it
        corpus = prepare(recipe, files, valid, out / CORPUS, _teller(progress))
        if (out / RUN).exists() and (finished := read_json(out / RUN).get("result")):
            return PretrainResult(**finished)
    corpus.check_size(recipe.sequence_length, recipe.batch_size)
    model = build(recipe, corpus)
    plan = planned(model, recipe, corpus, budget)
    document = {"settings": wanted, "provenance": provenance(seed=recipe.seed, dtype=model.dtype)}
    if state.is_main_process:
        write_json(out / RUN, document)
    result = train(model, corpus, recipe, plan, out, progress=progress)
    if state.is_main_process:
        write_json(out / RUN, {**document, "result": asdict(result)})
    return result


def build(recipe: PretrainRecipe, corpus: Corpus) -> PreTrainedModel:
    """The model before training, routers attached, float32. Raises ConfigError for settings that make none."""
    torch.manual_seed(recipe.seed)
    model = _continued(recipe) if recipe.start else _fresh(recipe, corpus)
    config = recipe.depth_config()
    if config is not None:
        attach(model, config)
    return model


def _continued(recipe: PretrainRecipe) -> PreTrainedModel:
    from dynadepth import hub

    return hub.load_model(recipe.start, dtype="float32")


def _fresh(recipe: PretrainRecipe, corpus: Corpus) -> PreTrainedModel:
    settings = copy.deepcopy(recipe.model)
    kind = str(settings.pop("model_type", "llama"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model_type {kind!r} is none of transformers'.{did_you_mean(kind, CONFIG_MAPPING.keys())}")
    end = corpus.tokenizer.eos_token_id
    values = {
        "vocab_size": len(corpus.byte_lengths),
        "max_position_embeddings": max(2048, recipe.sequence_length),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    known = CONFIG_MAPPING[kind]().to_dict()
    for name in settings:
        if name not in known:
            raise ConfigError(f"model of type {kind!r} has no setting {name!r}.{did_you_mean(name, known)}")
        if name == "vocab_size":
            raise ConfigError("The model's vocab_size is the tokenizer's: set the recipe's own vocab_size.")
    try:
        config = AutoConfig.for_model(kind, **{**values, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
    except (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"No model can be made of {recipe.model} ({reason}).") from error
    return model


def planned(model: PreTrainedModel, recipe: PretrainRecipe, corpus: Corpus, budget: float) -> Plan:
    """The steps that the budget pays for. Raises ConfigError where it pays for none.

    What a step costs is counted on a forward of the model as training does it: which tokens run is the method's affair.
    """
    length, rows = recipe.sequence_length, recipe.batch_size
    meter = FlopMeter(model)
    executed: dict[Any, torch.Tensor] = {}
    if is_attached(model):
        ids = torch.from_numpy(corpus.windows(length, length).astype("int64"))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.train()
            executed = executed_of(model(input_ids=ids, labels=ids).depth_trace)
    step = rows * meter.training(1, length, executed)
    steps = int(budget // step)
    if steps < 1:
        raise ConfigError(
            f"A budget of {budget:.3g} FLOPs is below one step of {step:.3g}: give at least that many, or a smaller "
            "model, batch_size or sequence_length."
        )
    dense = meter.dense(length)
    return Plan(steps, step, meter.forward(1, length, executed) / length, dense / length)


def train(
    model: PreTrainedModel,
    corpus: Corpus,
    recipe: PretrainRecipe,
    plan: Plan,
    out: Path,
    *,
    progress: Progress | None = None,
) -> PretrainResult:
    """The steps of the plan, from the last checkpoint in `out` if there is one; then the model is written there."""
    started = time.monotonic()
    args = _arguments(recipe, plan, out)
    windows = corpus.windows(recipe.sequence_length, recipe.validation_tokens)
    step_at = [round(plan.steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations - 1)]

    def evaluate() -> dict[str, Any]:
        return {name: asdict(found) for name, found in losses(model, windows, corpus.byte_lengths).items()}

    watcher = Watcher(progress, {s for s in step_at if 0 < s < plan.steps}, evaluate)
    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=Windows(corpus.train, recipe.sequence_length, plan.steps * recipe.batch_size, recipe.seed),
        callbacks=[watcher],
        meter=FlopMeter(model),
        bf16=recipe.bf16,
        beta2=recipe.beta2,
    )
    watcher.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(out / CHECKPOINTS)
    try:
        with watcher.listening(alone=args.world_size == 1):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except TuningError as error:
        raise TuningError(f"{error} {_rescue(model, corpus, out)}") from None
    if watcher.interrupted:
        export(model, corpus, out / MODEL)
        raise KeyboardInterrupt
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # its balance loss is for training; with a cache it fails
    final: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        final = evaluate()
        trainer.history.append({"step": plan.steps, **final})
        export(model, corpus, out / MODEL)
    tokens = plan.steps * recipe.batch_size * recipe.sequence_length
    embeddings = {id(p): p.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
                  if m is not None for p in m.parameters()}  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    return PretrainResult(
        steps=plan.steps,
        tokens=tokens,
        epochs=tokens / len(corpus.train),
        flops=trainer.spent,
        plan=asdict(plan),
        parameters=total,
        inner_parameters=total - sum(embeddings.values()),
        valid=final,
        history=trainer.history,
        losses=[round(loss, 5) for loss in trainer.losses],
        seconds=time.monotonic() - started,
        sizes={"train": len(corpus.train), "scored": int(windows.size)},
    )


def export(model: PreTrainedModel, corpus: Corpus, folder: Path) -> None:
    """Writes the model, its tokenizer and its routers as a folder for every other command; whole or not at all."""
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(made)
        corpus.tokenizer.save_pretrained(made)
        if is_attached(model):
            save(model, made / ROUTERS)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _rescue(model: PreTrainedModel, corpus: Corpus, out: Path) -> str:
    """Writes the last checkpoint's model; says what is left and what to try."""
    advice = "Try a lower learning_rate, a longer warmup or a smaller gradient_clip, with another --out"
    checkpoint = last_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        return f"There was no checkpoint yet. {advice}."
    load_weights(model, checkpoint)
    export(model, corpus, out / MODEL)
    step = checkpoint.name.rpartition("-")[2]
    return f"The model of step {step} is in {out / MODEL}. {advice}; `start: {out / MODEL}` goes on from there."


def _check_earlier(out: Path, resume: bool, wanted: dict[str, Any]) -> None:
    """Raises ConfigError where `out` holds a run that is not to be gone on with."""
    path = out / RUN
    if not path.exists():
        return
    try:
        before = read_json(path)
    except DataError as error:
        raise ConfigError(f"{error} Give another --out, or remove {out} to begin again.") from error
    if not resume:
        raise ConfigError(f"{out} holds a run already: --resume goes on with it, or give another --out.")
    if differs := difference(before.get("settings", {}), wanted):
        raise ConfigError(
            f"{out} was begun with other settings ({differs}): give another --out, or those settings again."
        )


def _arguments(recipe: PretrainRecipe, plan: Plan, out: Path) -> TrainingArguments:
    cpu = not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        max_steps=plan.steps,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate},
        warmup_steps=round(recipe.warmup * plan.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.gradient_clip,
        seed=recipe.seed,
        logging_strategy="no",
        save_strategy="steps" if recipe.checkpoints else "no",
        save_steps=max(1, plan.steps // max(1, recipe.checkpoints)),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one GPU a process: more, within one, would be a larger batch than was planned
    whole = args.world_size * recipe.gradient_accumulation
    if recipe.batch_size % whole:
        raise ConfigError(
            f"batch_size {recipe.batch_size} cannot be shared by {args.world_size} processes with "
            f"{recipe.gradient_accumulation} micro-batches each: make it a multiple of {whole}."
        )
    args.per_device_train_batch_size = recipe.batch_size // whole
    return args


def _teller(progress: Progress | None) -> Any:
    return (lambda line: None) if progress is None else (lambda line: progress(line, 0, 0, {}))
