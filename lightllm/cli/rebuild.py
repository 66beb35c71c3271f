"""A network and its tokenizer again, from a run folder or from anything that `Pretrained` reads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightllm.runs import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lightllm.callbacks.transforming import Transforming
    from lightllm.models import Record
    from lightllm.modules import LanguageModule


class Loaded(NamedTuple):
    """What the plain verbs work on."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    """What the network was made from, if that has a name."""


def load(model: str, checkpoint: str = "best") -> Loaded:
    """The network of a run folder, of a Hugging Face folder, a hub id, a GGUF file or a packaged model.

    Args:
        model: Its path or name.
        checkpoint: Of a run: `best`, `newest`, or a file.

    Raises:
        ValueError: Nothing of this name, or the run has no such checkpoint.
    """
    run = RunFolder(model)
    if run.exists:
        from lightllm.checkpoint_io import read_entry

        file = run.checkpoint(checkpoint)  # before anything is built
        module = rebuild(run, read_entry(file, "transformations", {}))
        restore(module, file)
        assert module.tokenizer is not None
        return Loaded(module.built_network.eval(), module.tokenizer, module.tokenizer_source)
    from lightllm.models import BuildRequest, Pretrained, load_tokenizer

    network = Pretrained(model, attention="sdpa")
    tokenizer = load_tokenizer(model)
    return Loaded(network.build(BuildRequest("causal", tokenizer)).eval(), tokenizer, model)


def rebuild(run: RunFolder, records: dict[str, Record] | None = None) -> LanguageModule:
    """The run's objective with its network built as it was for training: the configuration is read again.

    Args:
        run: The run.
        records: What its transformations did, from the checkpoint that is to be restored.

    Raises:
        ValueError: The run's model is not a `LanguageModule`.
    """
    from jsonargparse import ArgumentParser

    from lightllm.models import load_tokenizer
    from lightllm.modules import LanguageModule

    config = run.read_config()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModule, "model", required=True)
    module = parser.instantiate_classes(parser.parse_object({"model": config["model"]})).model
    assert isinstance(module, LanguageModule)
    if run.tokenizer.is_dir():
        module.tokenizer = load_tokenizer(str(run.tokenizer))
    for callback in _transforming_callbacks(config["trainer"]["callbacks"] or []):
        module.register_transformation(callback.transformation())
    module.records = records or {}
    # Compiling is for thousands of steps, and recomputing for backward passes.
    module.plan = module.plan._replace(compile=False, gradient_checkpointing=False)
    module.configure_model()
    return module


def _transforming_callbacks(configured: list[dict[str, Any]]) -> list[Transforming]:
    """Those of a run's callbacks that change the network, made again; the others have nothing to do here."""
    from jsonargparse import ArgumentParser

    from lightllm.callbacks.transforming import Transforming

    ours = [one for one in configured if issubclass(_class(one["class_path"]), Transforming)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Transforming])
    callbacks: list[Transforming] = parser.instantiate_classes(parser.parse_object({"callbacks": ours})).callbacks
    return callbacks


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    assert isinstance(found, type)
    return found


def restore(module: LanguageModule, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a module whose network is built.

    Raises:
        ValueError: The checkpoint is of another network.
    """
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
