"""PipelineParallelStrategy: a network cut at its blocks into stages, on as many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.batch import TextBatch
from lightllm.models.adapters import Adapter
from lightllm.models.transformation import Transformation
from lightllm.parallel.clipping import clip_to, gradient_norm
from lightllm.parallel.composition import check_composition
from lightllm.parallel.data_ranks import sampler_arguments
from lightllm.parallel.degrees import Degrees, device_mesh
from lightllm.parallel.layout import find_layout
from lightllm.parallel.microbatches import check_rows
from lightllm.parallel.schedules import Plan, ScheduleName, make_plan
from lightllm.parallel.sharding import reshard
from lightllm.parallel.spread_stages import spread_stages
from lightllm.parallel.spreading import SpreadsWeights
from lightllm.parallel.stage_gradients import StageGradients
from lightllm.parallel.stage_states import (
    load_own_optimizer_state,
    load_own_weights,
    own_optimizer_state,
    own_weights,
    put_together,
)
from lightllm.parallel.staged_network import Cut, StagedNetwork
from lightllm.parallel.staged_objective import StagedObjective, check_objective
from lightllm.parallel.states import read_checkpoint

TIMEOUT = timedelta(minutes=10)
"""After which a rank gives up waiting for another."""


class PipelineParallelStrategy(ModelParallelStrategy, SpreadsWeights):
    """Cuts the network into stages of consecutive blocks, each on a rank of its own, for a model too large for one.

    A batch is cut by rows into micro-batches, which go through the stages one behind another; only hidden states and
    their gradients go from rank to rank. Ranks beyond `pipeline` (times `tensor`) are further pipelines, which take
    other batches. The gradients are those of one device: of the mean over all target tokens, whatever is cut how.

    What `trainer.accumulate_grad_batches` does for a single device, more micro-batches do here at less cost: a batch
    of more rows. A stage's weights, gradients and optimizer state are on its rank only; checkpoints hold the whole
    network by its own names, so that a run goes on under any other strategy.

    Args:
        pipeline: Ranks of a pipeline.
        microbatches: Into how many parts a batch is cut. A batch has at least as many rows, or parts are padding.
        schedule: Who works when, see `lightllm.parallel.schedules`.
        stages_per_rank: More than 1 for schedules that interleave; their usual number when None.
        cut: `flops` or `parameters`, of which every stage gets as much as can be, or the blocks of each stage.
        shard: Ranks that share one copy of each stage's weights, gradients and optimizer state, and take other batches.
        tensor: Ranks that share the matrices of each stage, by the network's own plan.
        timeout: After which a rank gives up waiting for another.

    Raises:
        ValueError: The schedule does not work with these numbers.
    """

    gathers_network = False

    def __init__(
        self,
        pipeline: int,
        microbatches: int,
        schedule: ScheduleName = "1f1b",
        stages_per_rank: int | None = None,
        cut: Cut = "flops",
        shard: int = 1,
        tensor: int = 1,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.plan: Plan = make_plan(schedule, pipeline, microbatches, stages_per_rank)
        self.cut = cut
        self.degrees = Degrees(shard=shard, tensor=tensor, pipeline=pipeline)
        self._staged: StagedNetwork | None = None
        self._gradients: StageGradients | None = None
        self._sum: Tensor | None = None

    @property
    def staged(self) -> StagedNetwork:
        """The stages of this rank, from `setup` on."""
        assert self._staged is not None, "the network is cut in setup"
        return self._staged

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return sampler_arguments(self.device_mesh)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def check_composition(self, adapter: Adapter, transformations: Sequence[Transformation]) -> None:
        check_objective(self._module, adapter, self.plan.splits_backward)
        check_composition(self.degrees, adapter, transformations)
        if self._module.trainer.state.fn == TrainerFn.PREDICTING:
            raise ValueError(
                "a pipeline does not predict, since only its last stage knows what: add --trainer.strategy auto "
                "--trainer.devices 1, for checkpoints hold the whole network"
            )
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            check_rows(getattr(self._module.trainer, "datamodule", None), self.plan.microbatches)

    @override
    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
        clip_to(self.staged.parameters, largest_norm, self.gradient_norm(parameters))

    @override
    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        wanted = {id(one) for one in parameters}
        norm = gradient_norm(one for one in self.staged.counted_once if id(one) in wanted)
        square = norm.square().to(self.root_device)  # where a rank has no such gradient, its norm is on the CPU
        torch.distributed.all_reduce(square, group=self._pipeline_group)
        return square.sqrt()

    @override
    def setup_environment(self) -> None:
        self._setup_distributed()
        self.degrees = _with_replicas(self.degrees, self.world_size)
        self._device_mesh = device_mesh(self.degrees, self.root_device.type)

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self._cut_network()
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    @override
    def model_to_device(self) -> None:
        module = self._module
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.root_device))
        _update_properties(module, device=self.root_device)

    @override
    def training_step(self, batch: TextBatch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self._gradients is not None
        self._gradients.begin(first=batch_idx % self._module.trainer.accumulate_grad_batches == 0)
        loss_sum, weight = self.staged.train(batch, self._objective.criterion)
        self._gradients.put_aside()
        # The backward pass is done, as far as this sum; Lightning asks for the rest of it when it knows the loss.
        self._sum = loss_sum.float().requires_grad_()
        return self._objective.training_output(self._sum, weight.float())

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._gradients is not None
        assert self._sum is not None
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        (factor,) = torch.autograd.grad(loss, self._sum)
        self._sum = None
        self._gradients.give_back()
        if not self._module.trainer.fit_loop._should_accumulate():
            self._gradients.complete(factor)
        return self.precision_plugin.post_backward(loss, self._module)

    @override
    def validation_step(self, batch: TextBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        for hidden, rows in self.staged.evaluate(batch):
            with self.precision_plugin.forward_context():
                self._objective.measure_tokens(hidden, rows)
        if not self.staged.has_last:
            # Another rank has added the batch; sums over all ranks are right with nothing from this one.
            self._objective.metrics.update(*torch.zeros(4, device=self.root_device))
        return None

    @override
    def test_step(self, batch: TextBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self.validation_step(batch)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._reshard()
        return put_together(own_weights(self._module), self._pipeline_group)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._reshard()
        load_own_weights(self._module, checkpoint["state_dict"])

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = own_optimizer_state(optimizer)
        return {**state, "state": put_together(state["state"], self._pipeline_group)}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_own_optimizer_state(optimizer, state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # The file stays on the disk but for what this rank takes from it.
        return read_checkpoint(Path(self.broadcast(checkpoint_path)), self._module, self.optimizers)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        self._reshard()
        super().setup_optimizers(trainer)

    def _reshard(self) -> None:
        """Have parameters be what this rank has of them: gathered ones stay so after a forward pass."""
        for stage in () if self._staged is None else self._staged.stages:
            reshard(stage)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _objective(self) -> StagedObjective:
        module = self._module
        assert isinstance(module, StagedObjective), "check_composition refuses others"
        return module

    @property
    def _pipeline_group(self) -> ProcessGroup:
        return self.device_mesh["pipeline"].get_group()

    def _cut_network(self) -> None:
        network = self._objective.network
        assert network is not None, "configure_model builds it"
        if self._staged is None or self._staged.network is not network:
            layout = find_layout(network, self.precision_plugin.forward_context)
            self._staged = StagedNetwork(self.plan, layout, self.cut, self._pipeline_group)
            spread_stages(self._staged, self.device_mesh)
        self._gradients = StageGradients(
            self._staged.parameters,
            self._staged.shared,
            self._staged.other_end,
            self._pipeline_group,
            self.device_mesh["replicate"].get_group() if self.degrees.shard == 1 else None,
        )


def _with_replicas(degrees: Degrees, world_size: int) -> Degrees:
    """The degrees with as many copies of the pipeline as there are ranks for.

    Raises:
        ValueError: The ranks do not make whole pipelines.
    """
    assert isinstance(degrees.shard, int)
    size = degrees.pipeline * degrees.shard * degrees.tensor
    if world_size % size:
        raise ValueError(
            f"{world_size} ranks are not a multiple of pipeline {degrees.pipeline} x shard {degrees.shard} x tensor "
            f"{degrees.tensor}: set trainer.devices x trainer.num_nodes to one"
        )
    return replace(degrees, replicate=world_size // size).resolved(world_size)
