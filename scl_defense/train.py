"""The straight line of training: config -> data -> views -> generator -> adversarial -> trainer.step -> checkpoint.

Read :func:`train`, then :class:`Run` from top to bottom. The loop calls the generator, so adversarial training and
its relatives are only other (generator, trainer) pairs. Every random draw comes from a stream derived from (seed,
purpose, epoch, step): a resumed run needs no hidden state and ends with exactly the same weights.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from scl_defense import checkpoint, logs, probe, runstate, runtime
from scl_defense.compose import make_generator
from scl_defense.config import TrainConfig, as_dict, make, to_toml, train_config, with_generator
from scl_defense.data import Augment, open_data
from scl_defense.errors import ComponentError, Interrupted, PeerFailed, SclDefenseError, UserError
from scl_defense.folding import plan
from scl_defense.generation import generate, saved_encoder
from scl_defense.guard import global_random_state
from scl_defense.models import Network, Twin, to_channels_last
from scl_defense.optim import adversarial_weights, make_optimizer
from scl_defense.passes import counted
from scl_defense.plugins import PluginHost, default_host
from scl_defense.recovery import BATCH_FILE, MOST_SKIPPED, Made, NotFinite, gradient_norm, joined, save_batch
from scl_defense.runstate import Progress
from scl_defense.runtime import (
    NO_MEMORY,
    NOT_FINITE,
    OK,
    StopRequest,
    autocast,
    derive_seed,
    deterministic,
    out_of_memory,
    ranks,
    repeatable,
    select_device,
    stop_on_signal,
    stream,
)
from scl_defense.schedules import learning_rate, radius_at, strength_at
from scl_defense.sharing import (
    Lot,
    Piece,
    norms_shared,
    own_views,
    passes_shared,
    statistics_joined,
    with_shared_norms,
)
from scl_defense.threat import ThreatModel
from scl_defense.trained import TrainResult
from scl_defense.types import Context, StepOutput

CALIBRATION = 256  # images that model-free generators may measure their feature space on
Event = Callable[[Mapping[str, Any]], None]


@overload
def train(
    config: TrainConfig | None = None,
    *,
    resume: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    host: PluginHost | None = None,
    on_event: Event | None = None,
    dry_run: Literal[False] = False,
    **options: Any,
) -> TrainResult: ...
@overload
def train(config: TrainConfig | None = None, *, dry_run: Literal[True], **options: Any) -> dict[str, Any]: ...
@overload
def train(config: TrainConfig | None = None, *, dry_run: bool, **options: Any) -> Any: ...
def train(
    config: TrainConfig | None = None,
    *,
    resume: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    host: PluginHost | None = None,
    on_event: Event | None = None,
    dry_run: bool = False,
    **options: Any,
) -> TrainResult | dict[str, Any]:
    """Train one network; the command ``scl-defense train`` is this call.

    Give a :class:`TrainConfig`, or its fields as keywords (``train(generator="pgd", epochs=5)``), or ``resume`` with
    the folder of an interrupted run (its own recipe is used; nothing else may be given). Returns a
    :class:`TrainResult`; with ``dry_run`` a dict with the plan and the estimated time, and nothing is written.
    ``on_event`` is told of every step and epoch. SIGINT and SIGTERM save first and raise :class:`Interrupted`.
    Raises :class:`UserError` for a wrong recipe, :class:`ComponentError` when a component breaks its contract.

    Under ``torchrun`` every process makes this call, with the same arguments; together they are one run with the same
    batches (see docs/distributed.md). Process 0 alone writes, logs and is told of events; all return the result.

    >>> import scl_defense
    >>> run = scl_defense.train(trainer="cross-entropy", generator="pgd", generator_options={"steps": 1}, epochs=1,
    ...                         limit=64, batch_size=32, val_limit=32, val_steps=1)
    >>> run.best.name, [line["epoch"] for line in run.history()]
    ('best.pt', [0])
    """
    host = host or default_host(plugins)
    state = None
    if resume is not None:
        if config is not None or options:
            raise UserError("--resume takes the run's own recipe; leave all other training options out")
        run_dir, state = runstate.read(Path(resume))
        config = train_config(json.loads(state["config"]))
    elif config is None:
        config = train_config(options)
    elif options:
        raise UserError("give either a TrainConfig or keywords, not both")
    exact = deterministic(config.deterministic)
    joined = runtime.joined(select_device(config.device))
    with global_random_state(), repeatable(config.precision), exact, joined as everybody:
        run = Run(config, host, on_event if on_event and everybody.leads else (lambda event: None))
        if state is not None:
            runstate.restore(run, state)
        elif config.init is not None:
            run.start_from(config.init)
        if dry_run:
            return run.plan()
        above = logs.missing_parents(config.out)
        if state is None:
            run_dir = everybody.from_first(lambda: logs.new_run_dir(config.out, config.name, run.default_name()))
        try:
            with logs.locked(run_dir) if everybody.leads else nullcontext(), stop_on_signal() as stop:
                return run.run(run_dir, stop)
        finally:
            if state is None and everybody.leads:  # a resumed run's folder is never taken away
                logs.remove_if_empty(run_dir, above)


class Run:
    """One run, built in the order in which its parts depend on each other."""

    def __init__(self, config: TrainConfig, host: PluginHost, on_event: Event):
        # Names and options first: a misspelt one must not cost the reading of the data.
        self.trainer = make(host, "trainer", config.trainer, config.trainer_options)
        config = with_generator(config, host)
        self.config, self.host, self.on_event, self.progress = config, host, on_event, Progress()
        self.generator = make_generator(host, str(config.generator), config.generator_options)
        model = make(host, "model", config.model, config.model_options)
        self.loggers = [make(host, "logger", name) for name in config.logger]
        self.device = select_device(config.device)
        self.ranks = ranks()
        self.data = self.ranks.in_turn(
            lambda: open_data(config.data, root=config.data_root, options=config.data_options, host=host)
        )
        eps = self.data.budgets.get(config.norm) if config.eps is None else config.eps
        if eps is None:
            raise UserError(f"no usual {config.norm} radius is known for '{config.data}'; give one with --eps 8/255")
        self.threat = ThreatModel(config.norm, eps)
        self.threat.check_fits(self.data.image_shape)
        if hasattr(self.generator, "prepare"):
            self.generator.prepare(self.data, self.threat)
        self.train_split = self.data.split(
            "train", val_fraction=config.val_fraction, limit=config.limit, device=self.device
        )
        self.val_split = self.data.split(
            "val", val_fraction=config.val_fraction, limit=config.val_limit, device=self.device
        )
        self.batch_size = min(config.batch_size, len(self.train_split))
        if self.batch_size < 2 * self.ranks.world > 2:
            raise UserError(
                f"a batch of {self.batch_size} images is too small for {self.ranks.world} processes: each needs 2; "
                "start fewer, or give a larger --batch-size (of all processes together)"
            )
        self.steps = len(self.train_split) // self.batch_size  # the rest of each permutation waits for the next epoch
        self.augment = Augment(
            config.augment, strength=config.strength, flip=self.data.flip, image_shape=self.data.image_shape
        )
        self.mean, self.std = self.data.mean, self.data.std
        torch.manual_seed(derive_seed(config.seed, "init"))
        encoder = model(self.data.image_shape)
        self.network: Network = self.trainer.build(encoder, self.data.num_classes, self.mean, self.std)
        self.network.to(self.device)
        sample = self.train_split.float_images(slice(0, 8))
        to_channels_last(self.network, sample)
        self.folding = plan(self.network, sample[:4], Network.features)
        with_shared_norms(self.network, config.sync_bn)
        self.ranks.as_first([*self.network.parameters(), *self.network.buffers()])
        self.by_row = {
            "generator_by_row": bool(getattr(self.generator, "by_row", False)),
            "trainer_by_row": bool(getattr(self.trainer, "by_row", False)),
        }
        self.frozen_encoder = bool(getattr(self.trainer, "frozen_encoder", False))
        if self.frozen_encoder:
            self.network.requires_grad_(False)
            self.network.classifier.requires_grad_(True)
        momentum = getattr(self.generator, "ema", 0.0) if "embed" in self.generator.needs else 0.0
        self.twin = Twin(self.network, momentum) if momentum else None
        self.average = Twin(self.network, config.average, "averaged") if config.average else None
        self.optimizer = make_optimizer(self.network, config)
        chosen = torch.randperm(len(self.train_split), generator=stream(config.seed, "calibration"))[:CALIBRATION]
        self.calibration = self.train_split.float_images(chosen.to(self.device))
        self.cache: dict[Any, Any] = {}
        self.run_dir: Path | None = None

    def default_name(self) -> str:
        config = self.config
        name = f"{config.trainer}-{config.generator}-{Path(config.data).stem}-s{config.seed}"
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:150]

    def start_from(self, path: str) -> None:
        """Take the encoder and its normalisation from a checkpoint; the classifier is a probe on its features."""
        content, _ = checkpoint.read(path)
        if (content["model"], content["image_shape"]) != (self.config.model, list(self.data.image_shape)):
            raise UserError(
                f"'{path}' holds a {content['model']} for images {content['image_shape']}, this run builds a "
                f"{self.config.model} for {list(self.data.image_shape)}; give the same --model and data"
            )
        parts = {name: value for name, value in content["network"].items() if not name.startswith("classifier.")}
        ours = self.network.state_dict()
        fitting = {name: v for name, v in parts.items() if name in ours and ours[name].shape == v.shape}
        missing = [name for name in ours if name.startswith("encoder.") and name not in fitting]
        if missing:
            raise UserError(f"'{path}' does not fit this model: {missing[0]} differs; give its options with -m")
        self.network.load_state_dict({**ours, **fitting})
        self.mean, self.std = tuple(content["mean"]), tuple(content["std"])
        probe.fit_probe(self.network, self.train_split)
        for twin in (self.twin, self.average):
            if twin is not None:
                twin.network.load_state_dict(self.network.state_dict())

    # -- the loop

    def run(self, run_dir: Path, stop: StopRequest) -> TrainResult:
        self.run_dir = run_dir
        loggers = self.loggers if self.ranks.leads else []
        log = logs.RunLog(loggers, run_dir, as_dict(self.config), self.progress.epoch)
        recipe = to_toml(as_dict(self.config)).encode()
        self.ranks.from_first(lambda: checkpoint.atomic_write_bytes(run_dir / "config.toml", recipe))
        try:
            while self.progress.epoch < self.config.epochs and not self.progress.stopped:
                if not self.train_epoch(stop):
                    self.save(run_dir / "last.pt")
                    command = f"scl-defense train --resume {shlex.quote(str(run_dir))}"
                    raise Interrupted(f"stopped and saved; go on with: {command}", stop.signum or 15)
                record = self.finish_epoch(run_dir, log)
                self.on_event({"event": "epoch", "epochs": self.config.epochs, **record})
        finally:
            log.close()
        best = self.progress.best
        return TrainResult(
            run_dir, run_dir / "best.pt", run_dir / "last.pt", self.progress.epoch, int(best["epoch"]), best["clean"],
            best["robust"], self.threat, self.progress.seconds, *self.progress.passes,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Written by one process; none goes on, or away, before it is there."""
        self.ranks.from_first(lambda: runstate.save(self, path), patience=runtime.LONG)

    def train_epoch(self, stop: StopRequest) -> bool:
        """The rest of the current epoch; False when a stop was asked for (the progress then says where)."""
        progress, epoch = self.progress, self.progress.epoch
        order = torch.randperm(len(self.train_split), generator=stream(self.config.seed, "order", epoch))
        self.training_mode()
        while progress.step < self.steps:
            started = time.perf_counter()
            chosen = order[progress.step * self.batch_size : (progress.step + 1) * self.batch_size].to(self.device)
            for name, value in self.train_step(chosen, epoch, progress.step).items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            progress.step += 1
            progress.seconds += time.perf_counter() - started
            self.on_event({"event": "step", "epoch": epoch, "epochs": self.config.epochs, "step": progress.step,
                           "steps": self.steps, "loss": self.mean_loss(),
                           "images_per_s": self.batch_size / (time.perf_counter() - started)})  # fmt: skip
            stop.signum = self.ranks.most(stop.signum or 0) or None  # told to one, all stop at the same step
            if stop:
                return False
        return True

    def mean_loss(self) -> float:
        """Of this epoch so far."""
        return self.progress.sums.get("loss", 0.0) / max(1, self.progress.step - self.progress.skipped_now)

    def training_mode(self) -> None:
        self.network.train()
        if self.frozen_encoder:
            self.network.encoder.eval()

    def train_step(self, chosen: Tensor, epoch: int, step: int) -> dict[str, float]:
        """images -> views -> adversarial -> loss -> backward -> optimizer."""
        encoders = [self.network.encoder, *([] if self.twin is None else [self.twin.network.encoder])]
        with counted(*encoders) as passes:
            lot = Lot(
                self.train_split,
                chosen,
                self.trainer.views,
                replace(self.augment, strength=strength_at(self.config, epoch)),
                lambda number: stream(self.config.seed, "augment", epoch, step, number),
                **self.by_row,
            )
            done, steps = epoch * self.steps + step, self.config.epochs * self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, done, steps)
            perturb = bool(self.config.awp) and done >= self.config.awp_after * steps
            output, adversarial = self.gradients(lot, epoch, step, perturb)
            if output is None:
                return {}
            if self.config.clip:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)  # here: the generator finds no gradients that it could disturb
            statistics_joined(self.network, self.config.sync_bn)
            if self.twin is not None:
                with norms_shared(self.twin.network, self.config.sync_bn):
                    self.twin.update(self.network, lot.own_part(self.progress.parts))
                statistics_joined(self.twin.network, self.config.sync_bn)
            if self.average is not None:
                self.average.update(self.network, lot.chosen)  # its statistics are averages: it looks at no image
        metrics = {name: float(value) for name, value in output.metrics.items()}
        spent = self.ranks.sum(torch.tensor([passes.forwards, passes.backwards])).tolist()
        cost = {"forwards": spent[0] / len(lot), "backwards": spent[1] / len(lot)}
        loss = float(output.loss.detach())
        return {"loss": loss, "adversarial_views": float(len(adversarial)), **cost, **metrics}

    def gradients(self, lot: Lot, epoch: int, step: int, perturb: bool) -> tuple[Any, Tensor]:
        """The trainer's output and the adversarial views; gradients are in the parameters. ``None``: a batch left out.

        When memory runs out, the same images are taken in twice as many parts, from here on. Gradients add up to one
        step, so that the schedule stays; what a loss compares are then the images of a part. What happens to one of
        several processes happens to all of them.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        made = Made([])
        while True:
            made.parts.clear()
            trouble, what = OK, "loss or gradient of another process is not finite"
            try:
                for number, piece in enumerate(lot.pieces(self.progress.parts)):
                    made.parts.append((piece, self.generate(lot, piece, epoch, step, number)))
                output = self.perturbed(made, epoch, step) if perturb else self.backward(made, epoch, step)
                if not math.isfinite(norm := gradient_norm(self.network)):
                    raise NotFinite(f"gradient of trainer '{self.config.trainer}' is {norm}")
                self.ranks.most()
                return output, made.adversarial
            except PeerFailed as error:
                if error.code not in (NOT_FINITE, NO_MEMORY):
                    raise
                trouble = error.code
            except NotFinite as error:
                trouble, what = self.ranks.trouble(NOT_FINITE), error.what
            except Exception as error:
                if not out_of_memory(error):
                    raise
                error.__traceback__ = None  # it holds the tensors that did not fit
                trouble = self.ranks.trouble(NO_MEMORY)
            self.forget(buffers)
            if trouble not in (NOT_FINITE, NO_MEMORY):
                raise PeerFailed(trouble)
            if trouble == NOT_FINITE:
                self.not_finite(what, lot, made, epoch, step)
                return None, made.adversarial
            self.take_less(len(lot))

    def forget(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """As if the step had not been begun: no gradients, the buffers (batch-norm statistics) as they were."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    def take_less(self, images: int) -> None:
        """Twice as many parts a batch, said once."""
        parts = 2 * self.progress.parts
        if images < 2 * parts * self.ranks.world:
            raise SclDefenseError(
                f"memory ran out with {-(-images // self.progress.parts)} images at a time, and fewer cannot be "
                "compared; the last checkpoint is kept; choose a smaller model or a cheaper generator"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.progress.parts == 1:
            self.on_event({"event": "note", "text": f"memory ran out with {images} images at a time: a step takes them "
                           "in parts from here on, and a loss compares the images of a part (a smaller --batch-size "
                           "compares as few)"})  # fmt: skip
        self.progress.parts = parts

    def not_finite(self, what: str, lot: Lot, made: Made, epoch: int, step: int) -> None:
        """Stop with the batch saved for inspection, or count it as left out, as the recipe says."""
        progress, config = self.progress, self.config
        where, kept = f"at epoch {epoch}, step {step}", ""
        if self.run_dir is not None and made.parts:
            rate = float(self.optimizer.param_groups[0]["lr"])
            parts = [self.whole_views(piece, adversarial) for piece, adversarial in made.parts]
            path = self.run_dir / BATCH_FILE
            if self.ranks.leads:
                save_batch(self.run_dir, lot.whole(), torch.cat(parts, 1), what=what, epoch=epoch, step=step,
                           lr=rate, seed=config.seed, trainer=config.trainer,
                           generator=str(config.generator))  # fmt: skip
            kept = f"; its batch is in '{path}'"
        spent = progress.skipped >= MOST_SKIPPED or progress.skipped_now + 1 >= self.steps
        if config.on_nan == "stop" or spent:
            also = f" ({progress.skipped} batches were left out before)" if progress.skipped else ""
            raise ComponentError(
                f"the {what} {where}{also}; the last checkpoint is kept{kept}; try a lower --lr than {config.peak_lr:g}"
            )
        progress.skipped, progress.skipped_now = progress.skipped + 1, progress.skipped_now + 1
        text = f"the {what} {where}: this batch is left out, number {progress.skipped} of at most {MOST_SKIPPED}{kept}"
        self.on_event({"event": "note", "text": text})

    def backward(self, made: Made, epoch: int, step: int) -> StepOutput:
        """The trainer's loss, checked, and its gradients."""
        apart = (self.ranks.rank,) if self.ranks.rank else ()
        torch.manual_seed(derive_seed(self.config.seed, "network", epoch, step, *apart))  # dropout, if there is any
        images, outputs = sum(piece.whole for piece, _ in made.parts), []
        for piece, adversarial in made.parts:
            with (
                passes_shared(self.network, piece, by_row=self.by_row["trainer_by_row"], training=True),
                norms_shared(self.network, self.config.sync_bn),
            ):
                with autocast(self.device, self.config.precision):
                    output = self.trainer.step(self.network, piece.seen, own_views(adversarial, piece, **self.by_row))
                loss = float(output.loss.detach())
                if not math.isfinite(loss):
                    raise NotFinite(f"loss of trainer '{self.config.trainer}' is {loss}")
                share = piece.whole / images
                (share * output.loss).backward()
            outputs.append((share, StepOutput(output.loss.detach(), output.metrics)))
        self.ranks.average([p.grad for p in self.network.parameters() if p.grad is not None])
        return joined(outputs)

    def perturbed(self, made: Made, epoch: int, step: int) -> StepOutput:
        """Gradients at weights moved up the loss (AWP); batch-norm statistics see the batch once."""
        before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        self.backward(made, epoch, step)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        with adversarial_weights(self.network, self.config.awp):
            return self.backward(made, epoch, step)

    def generate(self, lot: Lot, piece: Piece, epoch: int, step: int, part: int = 0) -> Tensor:
        """(A, N, C, H, W) adversarial views, made with what the generator declared and checked on every batch.

        A generator ``by_row`` makes those of this process's images, from its rows of what would be drawn for all.
        """
        counters = (epoch, step, part) if part else (epoch, step)
        by_row, alone = self.by_row["generator_by_row"], self.ranks.world == 1
        start = piece.first + piece.rows.start * by_row
        rows = slice(start, start + len(piece.given.labels))
        rng = stream(self.config.seed, "generator", *counters)
        context = Context(
            threat=radius_at(self.config, self.threat, epoch * self.steps + step, self.config.epochs * self.steps),
            rng=rng,
            calibration=self.calibration,
            epoch=epoch,
            step=step,
            cache=self.cache,
            streams=lambda purpose, *counters: stream(self.config.seed, f"generator {purpose}", *counters),
            generator=f"generator '{self.config.generator}'",
            reaugment=lambda images, view: lot.view(images, view, rows),
            first=piece.rows.start if by_row else 0,
            gather=lambda values: self.ranks.gathered(values, self.ranks.sizes(piece.whole)) if by_row else values,
        )
        encoder = self.network if self.twin is None else self.twin.network

        def saved(path: str) -> nn.Module:
            return saved_encoder(path, self.data.image_shape, self.device, host=self.host)

        with ExitStack() as stack:
            if by_row:
                stack.enter_context(self.ranks.lockstep(piece.rows, piece.whole, rng))
            elif not alone:
                for network in {id(one): one for one in (self.network, encoder)}.values():
                    stack.enter_context(passes_shared(network, piece, by_row=False, training=False))
            return generate(
                self.generator, piece.given, context, network=self.network, encoder=encoder,
                precision=self.config.precision, folding=self.folding, saved=saved,
            )  # fmt: skip

    def whole_views(self, piece: Piece, adversarial: Tensor) -> Tensor:
        """Adversarial views (A, N, C, H, W) of all processes' images."""
        by_row = self.by_row["generator_by_row"]
        return own_views(adversarial, piece, generator_by_row=by_row, trainer_by_row=False)

    def finish_epoch(self, run_dir: Path, log: logs.RunLog) -> dict[str, Any]:
        """Validate, keep the best checkpoint (see :meth:`is_better`), log the epoch, save the last checkpoint.

        In this order: a run that is killed in between does this epoch again, and its loggers drop what they have of it.
        """
        progress, epoch = self.progress, self.progress.epoch
        started = time.perf_counter()
        kept = self.kept()
        if self.trainer.head == "probe":
            probe.fit_probe(kept, self.train_split)
        clean, robust = probe.accuracy(
            kept,
            self.val_split,
            self.threat,
            steps=self.config.val_steps,
            rng=stream(self.config.seed, "val", epoch),
            folding=self.folding,
        )
        record = {name: value / (self.steps - progress.skipped_now) for name, value in progress.sums.items()}
        better = self.is_better(clean, robust)
        if better:
            progress.best = {"epoch": epoch, "clean": clean, "robust": robust, "images": len(self.val_split)}
        progress.passes = (record["forwards"], record["backwards"])
        progress.epoch, progress.step, progress.sums, progress.skipped_now = epoch + 1, 0, {}, 0
        progress.stopped = bool(self.config.patience) and epoch - progress.best["epoch"] >= self.config.patience
        progress.seconds += time.perf_counter() - started
        if better:
            self.save(run_dir / "best.pt")
        rate = self.optimizer.param_groups[0]["lr"]
        record |= {"val_clean": clean, "val_robust": robust, "seconds": round(progress.seconds, 3), "lr": rate}
        record = {"epoch": epoch, **record}
        log.log(record)
        self.save(run_dir / "last.pt")
        return record

    def kept(self) -> Network:
        """The network that is validated and saved: the one in training, or its weight average."""
        return self.network if self.average is None else self.average.network

    def is_better(self, clean: float, robust: float) -> bool:
        """Whether this epoch's network is the one to keep, by validation accuracies (Rice et al. 2020).

        ``auto`` is the mean of clean and robust: by robust accuracy alone, where a method brings little of it, a
        network wins that is half trained and not yet confident. For the same reason a run without adversarial views
        goes by clean accuracy: the plain baseline must not be represented by that.
        """
        best, rule = self.progress.best, self.config.select
        if rule == "auto":
            rule = "mean" if self.progress.sums.get("adversarial_views") else "clean"

        def rank(clean: float, robust: float) -> tuple[float, float]:
            return {"mean": (clean + robust, robust), "robust": (robust, clean), "clean": (clean, robust)}[rule]

        return not best or rule == "last" or rank(clean, robust) > rank(best["clean"], best["robust"])

    def plan(self) -> dict[str, Any]:
        """Two real steps (the first one warms up), timed on the second; nothing is kept or written."""
        self.training_mode()
        for _ in range(2):
            started = time.perf_counter()
            self.train_step(torch.arange(self.batch_size, device=self.device), 0, 0)
            seconds = time.perf_counter() - started
        return {
            "train_images": len(self.train_split), "val_images": len(self.val_split), "classes": self.data.num_classes,
            "image_shape": list(self.data.image_shape), "threat": str(self.threat), "device": str(self.device),
            "parameters": sum(p.numel() for p in self.network.parameters()), "steps": self.steps * self.config.epochs,
            "seconds_per_step": seconds, "estimated_seconds": seconds * self.steps * self.config.epochs,
            "config": as_dict(self.config),
        }  # fmt: skip


class _CallableModule(ModuleType):
    """Importing this module sets ``scl_defense.train`` to it; calling that name must stay what is documented."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _CallableModule
