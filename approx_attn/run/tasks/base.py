"""What all tasks share: the model from plain containers, the loss with its auxiliary part, the optimizer."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from approx_attn.attention import AttentionMechanism
from approx_attn.config.instantiate import build, check_arguments, target_class
from approx_attn.data import IGNORE
from approx_attn.errors import ConfigError
from approx_attn.metrics import MEANS, METRICS, Tally, figures, metric_names
from approx_attn.models.base import SequenceModel
from approx_attn.models.transformer import Positions, auxiliary_loss, require_probability
from approx_attn.run import distributed


class SequenceTask(pl.LightningModule):
    """Trains and tests a model on sequences.

    Both arguments are plain containers and are stored in every checkpoint, so that
    `load_from_checkpoint(path, weights_only=True)` rebuilds the task with nothing else at hand.

    Args:
        config: the resolved configuration of the run; read here are `model`, `optimizer` and `scheduler`
            (may be None), nodes as `approx_attn.config.instantiate.build` takes them, and `metrics`.
        spec: the fields of the `DataSpec` of the data.
        label_smoothing: share of the target probability spread over all classes, 0 to below 1.
        auxiliary_weight: factor on the losses that mechanisms have of their own, at least 0.

    Raises:
        ConfigError: a model that does not fit the data, or an impossible value.
    """

    kind: ClassVar[str] = ""  # the `DataSpec.kind` that the task is for
    figures: ClassVar[tuple[str, ...]] = tuple(f"{stage}/{name}" for stage in ("train", "val") for name in MEANS)

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: Mapping[str, Any],
        *,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.label_smoothing = require_probability("task.label_smoothing", label_smoothing)
        if isinstance(auxiliary_weight, bool) or not isinstance(auxiliary_weight, int | float) or auxiliary_weight < 0:
            raise ValueError(f"task.auxiliary_weight must be a number of at least 0, got {auxiliary_weight!r}.")
        self.auxiliary_weight = float(auxiliary_weight)
        if spec["kind"] != self.kind:
            raise ConfigError(f"task: {type(self).__name__} is for {self.kind} data, got data of kind {spec['kind']}.")
        self.save_hyperparameters()
        self.spec = dict(spec)
        self.config = dict(config)
        self.model = build_model(config["model"], spec)
        # A model whose weights came from elsewhere adds how to build it without that place.
        self.hparams["config"] = {**config, "model": {**config["model"], **self.model.rebuild_options}}
        stages = itertools.product(("val", "test"), MEANS)
        self.means = nn.ModuleDict({f"{stage}_{name}": MeanOverItems() for stage, name in stages})
        """Means over the scored items of an evaluation, of all processes."""
        self.tallies = nn.ModuleDict()
        self.use_metrics(metric_names(config.get("metrics")))
        self.predictions: dict[str, Tensor] | None = None
        """After a test: `prediction`, its `probability` and `label` of every scored item of all processes, in the order
        of the data."""
        self._collected: list[tuple[Tensor, ...]] = []

    def use_metrics(self, names: Sequence[str]) -> None:
        """Compute these metrics in evaluations, besides loss and accuracy.

        Raises:
            ConfigError: one that the task does not have.
        """
        for name in names:
            if METRICS[name].per_class and self.kind != "classification":
                raise ConfigError(f"metrics: {name} is for classification, not for {self.kind} data.")
            if METRICS[name].task not in ("", self.kind):
                raise ConfigError(f"metrics: {name} is for {METRICS[name].task}, not for {self.kind} data.")
        self.metrics = tuple(names)
        counted = any(METRICS[name].compute is not None for name in names)
        stages = ("val", "test") if counted else ()
        self.tallies = nn.ModuleDict({stage: Tally(self.spec["num_classes"]) for stage in stages})

    # -- for tasks to implement --------------------------------------------------------------------

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(items, classes) logits and (items,) labels of everything that is scored in a batch."""
        raise NotImplementedError

    def joint_count(self, count: int) -> float:
        """Scored items of a training batch, averaged over processes, so that gradients averaged over processes are
        those of the mean over all items. Batches of most tasks have equally many everywhere."""
        return count

    # -- the same for all --------------------------------------------------------------------------

    @property
    def mechanisms(self) -> list[AttentionMechanism]:
        """The attention mechanisms of the model, in the order of its layers."""
        return self.model.mechanisms

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of a batch as data modules make them."""
        return self.model(**self.inputs(batch))

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments that the model is called with, taken from a batch."""
        inputs = {key: batch[key] for key in ("tokens", "tokens_b", "pixels") if key in batch}
        for key in ("keep", "keep_b"):
            # Without a padding mask attention takes its faster path; a full one says nothing.
            if key in batch and not bool(batch[key].all()):
                inputs[key] = batch[key]
        return inputs

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Tell mechanisms that change in the course of training, such as `performer`, how far it is."""
        for mechanism in self.mechanisms:
            mechanism.begin_step(self.trainer.global_step)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        loss, logits, labels = self._loss(batch, self.label_smoothing)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        figures = {"train/loss": loss.detach(), "train/accuracy": accuracy}
        self.log_dict(figures, prog_bar=True, batch_size=len(labels), sync_dist=True)
        auxiliary = auxiliary_loss(self.mechanisms)
        if auxiliary is not None:
            self.log("train/auxiliary_loss", auxiliary.detach(), batch_size=len(labels), sync_dist=True)
            loss = loss + self.auxiliary_weight * auxiliary
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        items = self._evaluate(batch, "test")
        scored = (
            (batch["labels"] != IGNORE).flatten(1).sum(1) if batch["labels"].dim() > 1 else batch["labels"] != IGNORE
        )
        self._collected.append(tuple(part.cpu() for part in (*items, scored.long())))

    def on_validation_epoch_start(self) -> None:
        self._reset_tally("val")

    def on_validation_epoch_end(self) -> None:
        self._log_tally("val")

    def on_test_epoch_start(self) -> None:
        self._collected = []
        self._reset_tally("test")

    def on_test_epoch_end(self) -> None:
        self._log_tally("test")
        parts = distributed.gathered(tuple(torch.cat(parts) for parts in zip(*self._collected, strict=True)))
        order = data_order([scored for *_, scored in parts])
        columns = (torch.cat(column)[order] for column in list(zip(*parts, strict=True))[:3])
        self.predictions = dict(zip(("prediction", "label", "probability"), columns, strict=True))
        self._collected = []

    def _reset_tally(self, stage: str) -> None:
        if stage in self.tallies:
            cast(Tally, self.tallies[stage]).reset()

    def _log_tally(self, stage: str) -> None:
        """Log the metrics of an evaluation that has ended; all processes get those of all items."""
        if stage in self.tallies:
            counts = cast(Tally, self.tallies[stage]).compute()
            for name, value in figures(self.metrics, counts, self.spec.get("class_names", ())).items():
                self.log(f"{stage}/{name}", value)

    def _loss(self, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, and the logits and true class of every scored item."""
        logits, labels = self.flat(self(batch), batch["labels"])
        # In float32 also under autocast; a batch without any label gives zero, not NaN.
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
        count = self.joint_count(len(labels)) if self.training else len(labels)
        return total / max(count, 1), logits, labels

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """The predicted and true class of every scored item, and the probability of the former."""
        loss, logits, labels = self._loss(batch)
        predicted = logits.argmax(dim=-1)
        best = logits.gather(-1, predicted[:, None]).squeeze(-1)
        probability = (best.float() - logits.float().logsumexp(dim=-1)).exp()  # (items,)
        if stage in self.tallies:
            cast(Tally, self.tallies[stage]).update(predicted, labels, probability)
        if len(labels) or distributed.is_joined():  # what one process logs, all must
            for name, total in (("loss", loss * len(labels)), ("accuracy", (predicted == labels).sum())):
                mean = cast(MeanOverItems, self.means[f"{stage}_{name}"])
                mean.update(total, len(labels))
                self.log(f"{stage}/{name}", mean, on_step=False, on_epoch=True, prog_bar=name == "accuracy")
        return predicted, labels, probability

    def configure_model(self) -> None:
        """Split the model over processes, where the strategy does: layer by layer, so one is whole at a time."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layers in [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    # -- optimisation ------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        steps = self.trainer.estimated_stepping_batches
        scheduler = self.build_scheduler(optimizer, int(steps) if math.isfinite(steps) else 1)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_optimizer(self) -> Optimizer:
        """The optimizer of `config.optimizer`, over two groups of parameters: with and without weight decay."""
        return build(self.config["optimizer"], "optimizer", Optimizer, params=parameter_groups(self.model))

    def build_scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
        """The schedule of `config.scheduler`, or None."""
        node = self.config.get("scheduler")
        if node is None:
            return None
        return build(node, "scheduler", LRScheduler, optimizer=optimizer, total_steps=total_steps)


class MeanOverItems(Metric):
    """A mean over items, from the sums and counts of batches and processes.

    A NaN stays one: torchmetrics' `MeanMetric` leaves it out, or else leaves out the weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


def data_order(scored: Sequence[Tensor]) -> Tensor:
    """Where the entries of all processes, one process after the other, stand in the order of the data.

    Args:
        scored: for every process, (items,) entries per item; item i of process p is item p + i·processes of the data.

    Returns:
        Indices that put the entries in order.
    """
    positions = [
        torch.repeat_interleave(torch.arange(len(counts)) * len(scored) + process, counts)
        for process, counts in enumerate(scored)
    ]
    return torch.cat(positions).argsort(stable=True)


def build_model(node: Mapping[str, Any], spec: Mapping[str, Any]) -> SequenceModel:
    """The model of a configuration, in the shape of the data.

    Args:
        node: `config.model`.
        spec: the fields of a `DataSpec`.

    Raises:
        ConfigError: the model cannot do what the data needs.
    """
    cls: type[SequenceModel] = target_class(node, "model", SequenceModel)
    accepted = inspect.signature(cls).parameters
    known = ("vocab_size", "num_classes", "max_length", "two_towers", "causal", "pad_id")
    given = {name: spec[name] for name in known if name in accepted}
    if cls.translates != (spec["kind"] == "translation"):
        able = "encoder_decoder" if spec["kind"] == "translation" else "another model"
        raise ConfigError(f"model: {cls.__name__} cannot be used with data of kind {spec['kind']}; choose {able}.")
    for need in ("causal", "two_towers"):
        if spec[need] and need not in accepted:
            raise ConfigError(f"model: {cls.__name__} cannot be used with data that is {need}; choose another model.")
    check_arguments(node, "model", SequenceModel, given)
    return build(node, "model", SequenceModel, **given)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with weight decay (weights of linear layers) and without.

    Decay pulls towards zero, which is not a natural origin of embeddings, norms, biases, or the bases and
    eigenvalues that attention mechanisms learn.
    """
    undecayed: set[int] = set()
    for module in model.modules():
        if isinstance(module, AttentionMechanism | nn.Embedding | nn.LayerNorm | Positions):
            undecayed.update(id(parameter) for parameter in module.parameters())
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() >= 2 and id(parameter) not in undecayed].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
