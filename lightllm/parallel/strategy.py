"""ParallelStrategy: data, sharded and tensor parallelism in any product, on one device mesh."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightllm.models.adapters import Adapter
from lightllm.models.network import weights_come_later
from lightllm.models.transformation import Transformation
from lightllm.parallel.clipping import clip_to, gradient_norm
from lightllm.parallel.composition import check_composition
from lightllm.parallel.data_ranks import sampler_arguments
from lightllm.parallel.degrees import Degrees, device_mesh
from lightllm.parallel.parallelize import Spread, parallelize
from lightllm.parallel.sharding import Sharding, reshard
from lightllm.parallel.spreading import SpreadsWeights
from lightllm.parallel.states import gathered, load_optimizer, load_weights, read_checkpoint
from lightllm.sharded_checkpoint import write_sharded


class ParallelStrategy(ModelParallelStrategy, SpreadsWeights):
    """Trains one network on several ranks, each of which holds a part of it.

    Args:
        replicate: Copies of the sharded weights.
        shard: Ranks that share one copy of weights, gradients and optimizer state; `auto` takes what the other degrees
            leave of all ranks.
        tensor: Ranks that share the matrices of a layer, by the network's own plan.
        tensor_plan: Another plan: styles (`colwise`, `rowwise`, …) by names of layers, with `*` for a number.
        sharding: How weights are sharded.
        save_full: Gather each checkpoint into one file, as one process would write it; else it is a folder, into which
            every rank writes its part.
        timeout: How long a rank waits for the others before it gives up.

    Raises:
        ValueError: A degree is less than 1.
    """

    gathers_network = True

    def __init__(
        self,
        replicate: int = 1,
        shard: Literal["auto"] | int = "auto",
        tensor: int = 1,
        tensor_plan: dict[str, str] | None = None,
        sharding: Sharding | None = None,
        save_full: bool = False,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(save_distributed_checkpoint=not save_full, timeout=timeout)
        self.degrees = Degrees(replicate, shard, tensor)
        self.spread = Spread(sharding or Sharding(), tensor_plan)
        self._spread_module: nn.Module | None = None
        self._first_rank_loads = False

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return dict(sampler_arguments(self.device_mesh))

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def check_composition(self, adapter: Adapter, transformations: Sequence[Transformation]) -> None:
        check_composition(self.degrees, adapter, transformations)
        # Transformations look at weights. Ranks of a tensor group must draw the same random numbers, loading included.
        self._first_rank_loads = not transformations and self.degrees.tensor == 1

    @override
    def clip_gradients(self, parameters: Iterable[nn.Parameter], largest_norm: float) -> None:
        parameters = list(parameters)
        clip_to(parameters, largest_norm, gradient_norm(parameters))

    @override
    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        return gradient_norm(parameters)

    @override
    def setup_environment(self) -> None:
        self.degrees = self.degrees.resolved(self.world_size)  # before ranks wait for each other
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = device_mesh(self.degrees, self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        # The others have no weights before they have their parts.
        with weights_come_later(self._first_rank_loads and not self.is_global_zero):
            yield

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.lightning_module)
        if self._spread_module is not self.lightning_module:
            parallelize(self.lightning_module, self.device_mesh, self.spread, self.root_device)
            self._spread_module = self.lightning_module
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        self._reshard()
        super().setup_optimizers(trainer)

    @override
    def model_to_device(self) -> None:
        if not self.spread.sharding.cpu_offload:
            super().model_to_device()

    def _reshard(self) -> None:
        assert self.lightning_module is not None
        reshard(self.lightning_module)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, of which sharded tensors are what this rank has."""
        assert self.lightning_module is not None
        self._reshard()
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            write_sharded(checkpoint, path, self.barrier)
            return
        whole = gathered(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options=storage_options)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        self._reshard()
        return read_checkpoint(Path(self.broadcast(checkpoint_path)), self.lightning_module, self.optimizers)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self._reshard()
        load_weights(self.lightning_module, checkpoint["state_dict"])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(optimizer, state)
