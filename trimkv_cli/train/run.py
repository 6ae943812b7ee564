"""A training run from files to a gate folder: find the model, check the data, train, checkpoint, write."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimkv_cli.cache.attention import LongRope
from trimkv_cli.cache.gate_files import gate_files, read_gates, weights_file, write_gates, write_released
from trimkv_cli.cache.gates import activation_name
from trimkv_cli.engine.devices import multiplies_bf16, prepare_training, reads_bf16, take_device
from trimkv_cli.errors import (
    ContextOverflow,
    GateMismatch,
    InputError,
    ModelNotFound,
    Stopped,
    UnsupportedModel,
    UsageError,
)
from trimkv_cli.files import whole_file, writing
from trimkv_cli.loading.loader import load_model, load_text
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source, find_source
from trimkv_cli.model.families import FAMILIES
from trimkv_cli.model.spec import GateSpec, parse_dtype
from trimkv_cli.train.documents import DataFiles, Load, encoder, too_long
from trimkv_cli.train.options import RunFiles, TrainOptions
from trimkv_cli.train.packing import Cursor, Packer, stack
from trimkv_cli.train.teacher import Counts, TeacherBatch, batches_ahead, prefetch
from trimkv_cli.train.trainer import Losses, Trainer, describe_gates, gate_tensors, new_gates

SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step came to; `tokens` and `elapsed_s` count from the start of this process's training."""

    step: int
    steps: int
    losses: Losses
    lr: float
    tokens: int
    elapsed_s: float
    cursor: Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Hear of a run: notes before it, then every step; asked after each step whether to stop."""

    note: Callable[[str], None]
    step: Callable[[StepReport], None]
    should_stop: Callable[[], bool]


def train_gates(engine: EngineOptions, options: TrainOptions, run: RunFiles, listener: Listener) -> None:
    """Train the gates of a model and write their folder, going on from a checkpoint that lies there.

    Raises:
        ModelError: no model of that name, or one that trimkv does not run or train gates for.
        InputError: data files that cannot be read, or bad lines, which are named.
        UsageError: a checkpoint of another run, or an output that would be overwritten.
        ContextOverflow: more positions than the model has.
        Stopped: the listener asked for it; a checkpoint is left.
    """
    _check_output(run)
    source = find_source(engine, weights=True)
    family = FAMILIES[source.spec.model_type]
    if family.sinks or family.hybrid:
        why = "its attention has learned sinks" if family.sinks else "most of its attention is linear"
        raise UnsupportedModel(
            f"gates are not trained for {source.spec.model_type}: {why}",
            hint="--gates streaming runs it without trained ones",
        )
    if options.positions > source.spec.max_positions:
        raise ContextOverflow(
            f"context and position gap come to {options.positions:,} positions, {source.model_id} has "
            f"{source.spec.max_positions:,}",
            hint=f"--context {min(options.context, source.spec.max_positions)} --position-gap 0",
        )
    data = DataFiles(run.data)
    text = load_text(source, trust_remote_code=engine.trust_remote_code)
    if text is None:
        raise ModelNotFound(f"{source.model_id} has no tokenizer", hint="training needs one beside the weights")
    load = encoder(data, text)
    for note in too_long(data, load, context=options.context, most=source.spec.max_positions - options.position_gap):
        listener.note(note)
    trainer = _make_trainer(engine, options, run, source)
    identity = _identity(source, data, options, trainer)
    if not run.resume:
        (run.output / FILE_NAME).unlink(missing_ok=True)
    progress = load_checkpoint(run.output, trainer, identity) or TrainingState()
    resumed = [f"going on from step {trainer.steps_done} of {run.output / FILE_NAME}"] if trainer.steps_done else []
    for note in (*source.notes, *resumed, _described(trainer, data)):
        listener.note(note)
    packer = _make_packer(data, load, options, progress)
    _train(trainer, packer, progress, run, listener, identity)
    _write(trainer, source, data, progress, run)


def _check_output(run: RunFiles) -> None:
    if run.output.exists() and not run.output.is_dir():
        raise UsageError(f"{run.output} is a file", hint="-o takes a folder for the gates")
    if not run.resume or not run.output.is_dir() or (run.output / FILE_NAME).is_file():
        return
    try:
        found = gate_files(run.output)
    except ModelNotFound:
        return
    raise UsageError(f"{found[1]} exists, without a checkpoint to go on from", hint="another -o, or --overwrite")


def _make_trainer(engine: EngineOptions, options: TrainOptions, run: RunFiles, source: Source) -> Trainer:
    device = take_device(engine.device)
    prepare_training(engine.threads)
    autocast = _autocast(engine.dtype, device)
    fast = engine.dtype == "auto" and device.type == "cpu" and autocast is None and reads_bf16()
    weights = torch.bfloat16 if autocast is not None and device.type == "cuda" else torch.float32
    model = load_model(source, weights, device, trust_remote_code=engine.trust_remote_code)
    if LongRope.used_by(model.config):
        LongRope(model, ExitStack()).use(long=options.positions > (source.spec.original_max_positions or 0))
    teacher = deepcopy(model).to(torch.bfloat16) if fast else None
    gate = describe_gates(options, source.spec, source.model_id)
    gates = new_gates(gate, source.spec, options, hidden_act=activation_name(model.config.to_dict()), device=device)
    if options.begin_with is not None:
        _begin(gates, gate, options.begin_with)
    return Trainer(
        model,
        gates,
        source.spec,
        options,
        autocast=autocast,
        teacher=teacher,
        recompute_layers=run.gradient_checkpointing,
    )


def _begin(gates: nn.ModuleList, gate: GateSpec, folder: str) -> None:
    """Give gates the parameters that lie in a folder.

    Raises:
        ModelNotFound: no gates are there.
        GateMismatch: damaged ones, or of another form than the run's.
    """
    found = read_gates(folder)
    parameters = gate_tensors(gates)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if {name: tensor.shape for name, tensor in found.tensors.items()} != shapes:
        wanted = f"{gate.variant}, {gate.hidden} wide"
        raise GateMismatch(
            f"{folder} holds {found.gate.variant} gates, {found.gate.hidden} wide, or for another model: the run trains"
            f" {wanted}",
            hint=f"--gate {found.gate.variant} --hidden {found.gate.hidden}",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found.tensors[name])


def _autocast(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products; `auto` is bf16 where the hardware multiplies it."""
    dtype = parse_dtype(name, "bf16" if device.type == "cuda" or multiplies_bf16() else "fp32")
    if dtype == "fp16":
        raise UsageError("gates are not trained in fp16: gradients underflow", hint="--dtype bf16 or --dtype fp32")
    return torch.bfloat16 if dtype == "bf16" else None


def _identity(source: Source, data: DataFiles, options: TrainOptions, trainer: Trainer) -> dict[str, Any]:
    return {
        **options.identity(),
        "model": source.model_id,
        "model_sha256": _model_hash(source.folder),
        "data_sha256": data.sha256,
        "dtype": _precision(trainer),
        **({"begin_with": _gates_hash(Path(options.begin_with))} if options.begin_with is not None else {}),
    }


def _gates_hash(folder: Path) -> str:
    return sha256(weights_file(folder).read_bytes()).hexdigest()


def _precision(trainer: Trainer) -> str:
    if trainer.autocast is not None:
        return "bf16"
    return "fp32" if trainer.teacher is trainer.model else "fp32, read in bf16"


def _model_hash(files: Path) -> str:
    """Tell one model from another without reading all of it: config, and both ends of each weights file."""
    digest = sha256(b"" if files.is_file() else (files / "config.json").read_bytes())
    for path in [files] if files.is_file() else sorted(files.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _make_packer(data: DataFiles, load: Load, options: TrainOptions, progress: TrainingState) -> Packer:
    return Packer(
        len(data.places),
        load,
        context=options.context,
        seed=options.seed,
        position_gap=options.position_gap,
        cursor=replace(progress.cursor),
    )


def _train(
    trainer: Trainer,
    packer: Packer,
    progress: TrainingState,
    run: RunFiles,
    listener: Listener,
    identity: dict[str, Any],
) -> None:
    options = trainer.options
    started, tokens_before = time.perf_counter(), progress.cursor.tokens
    cursors = deque[Cursor]()
    batches = _teach(trainer, packer, cursors)
    two = trainer.model.device.type == "cpu" and torch.get_num_threads() > 1
    ahead = batches_ahead(trainer.spec, options) if two else 0
    with prefetch(batches, ahead) if ahead else nullcontext(batches) as batches:
        while trainer.steps_done < options.steps:
            lr = options.lr_at(trainer.steps_done)
            losses = trainer.step(islice(batches, options.accumulate))
            progress.recent.append(losses)
            progress.cursor = cursors.popleft()
            step, stop = trainer.steps_done, listener.should_stop()
            if stop or step % run.save_every == 0 or step == options.steps:
                save_checkpoint(run.output, trainer, progress, identity)
            listener.step(
                StepReport(
                    step=step,
                    steps=options.steps,
                    losses=losses,
                    lr=lr,
                    tokens=progress.cursor.tokens - tokens_before,
                    elapsed_s=time.perf_counter() - started,
                    cursor=progress.cursor,
                )
            )
            if stop and step < options.steps:
                raise Stopped(
                    f"stopped after step {step} of {options.steps}", hint="the same command goes on from there"
                )


def _teach(trainer: Trainer, packer: Packer, cursors: deque[Cursor]) -> Iterator[TeacherBatch]:
    """Give the batches of all steps that are left, and `cursors` where the data goes on after each."""
    options, device = trainer.options, trainer.model.device
    for _ in range(trainer.steps_done, options.steps):
        sequences = [packer.next() for _ in range(options.sequences_per_step)]
        starts = range(0, len(sequences), options.batch)
        batches = [stack(sequences[start : start + options.batch], device) for start in starts]
        cursors.append(replace(packer.cursor))
        counts = Counts.of(batches)
        yield from (trainer.teach(batch, counts) for batch in batches)


def _write(trainer: Trainer, source: Source, data: DataFiles, progress: TrainingState, run: RunFiles) -> None:
    gate = describe_gates(trainer.options, source.spec, source.model_id)
    hidden_act = activation_name(trainer.model.config.to_dict())
    tensors = dict(trainer.parameters)
    if run.export != "own":
        tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in tensors.items()}
    if run.export == "released":
        write_released(run.output, gate, tensors, hidden_act=hidden_act)
        return
    record = {
        "base_model": source.model_id,
        "revision": source.folder.name if source.folder.parent.name == "snapshots" else None,
        "model_sha256": _model_hash(source.folder),
        "data": [path.name for path in data.paths],
        "data_sha256": data.sha256,
        "documents": len(data.places),
        **asdict(trainer.options),
        "steps": trainer.steps_done,
        "dtype": _precision(trainer),
        **{name: value for name, value in asdict(progress.cursor).items() if name not in ("document", "piece")},
        "loss": progress.mean_losses(),
    }
    write_gates(run.output, gate, tensors, hidden_act=hidden_act, training=record)


def _described(trainer: Trainer, data: DataFiles) -> str:
    numel = sum(parameter.numel() for parameter in trainer.parameters.values())
    precision = _precision(trainer)
    where = trainer.model.device.type
    return f"{len(data.places):,} documents; {numel:,} gate parameters on {where}, {precision}"


FILE_NAME = "training.safetensors"
FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
RECENT_STEPS = 20


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """What a run carries from step to step beside tensors."""

    cursor: Cursor = field(default_factory=Cursor)
    recent: deque[Losses] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def mean_losses(self) -> dict[str, float]:
        rows = [asdict(losses) for losses in self.recent]
        computed = {name: [row[name] for row in rows if row[name] is not None] for name in (rows[0] if rows else ())}
        return {name: sum(values) / len(values) for name, values in computed.items() if values}


def save_checkpoint(folder: Path, trainer: Trainer, progress: TrainingState, identity: Mapping[str, Any]) -> None:
    """Write the run's state; an earlier one stays until the new one is safe on the disk.

    Raises:
        UsageError: the folder cannot be written.
        TrimkvError: the disk is full.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "steps_done": trainer.steps_done,
        "cursor": asdict(progress.cursor),
        "recent": [asdict(losses) for losses in progress.recent],
        "identity": dict(identity),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / FILE_NAME) as partial:
        save_file(_tensors(trainer), partial, metadata={"trimkv": json.dumps(state)})


def load_checkpoint(folder: Path, trainer: Trainer, identity: Mapping[str, Any]) -> TrainingState | None:
    """Put a run's state into `trainer`; None when there is none to go on from.

    Raises:
        UsageError: the checkpoint is another run's; the fields that differ are named.
        InputError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["trimkv"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_identity(path, state["identity"], identity)
        _restore(trainer, tensors, int(state["steps_done"]))
        recent = (Losses(**losses) for losses in state["recent"])
        return TrainingState(cursor=Cursor(**state["cursor"]), recent=deque(recent, maxlen=RECENT_STEPS))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        hint = "--overwrite trains from the start"
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}", hint=hint) from error


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(wanted))
    differing = [name for name in {**saved, **plain} if saved.get(name) != plain.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {_shown(saved, name)}, now {_shown(plain, name)}" for name in differing)
        raise UsageError(f"{path} is of another run: {changes}", hint="another -o, or --overwrite to start anew")


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = str(values.get(name, "not set"))
    return text if len(text) <= 40 else f"{text[:12]}…"


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in trainer.parameters.items():
        state = trainer.optimizer.state[parameter]
        tensors[name] = parameter.detach().cpu().contiguous()
        tensors |= {f"{moment}.{name}": state[moment].cpu().contiguous() for moment in MOMENTS if moment in state}
    return tensors


def _restore(trainer: Trainer, tensors: Mapping[str, Tensor], steps_done: int) -> None:
    trainer.steps_done = steps_done
    for name, parameter in trainer.parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[name])
        moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS if f"{m}.{name}" in tensors}
        if moments:
            trainer.optimizer.state[parameter] = {"step": torch.tensor(float(steps_done)), **moments}
