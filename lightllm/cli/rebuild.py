"""A network and its tokenizer again, from a run folder or from anything that `Pretrained` reads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lightllm.runs import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lightllm.datamodules import DocumentData
    from lightllm.models import Record
    from lightllm.modules import LanguageModule

C = TypeVar("C")


class Loaded(NamedTuple):
    """What the plain verbs work on."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    """What the network was made from, if that has a name."""
    module: LanguageModule | None = None
    """Of a run: the objective that trained it."""


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
        return Loaded(module.built_network.eval(), module.tokenizer, module.tokenizer_source, module)
    from lightllm.export.factored import has_our_code
    from lightllm.models import BuildRequest, Pretrained, load_tokenizer

    trusted = has_our_code(Path(model))
    network = Pretrained(model, attention="sdpa", trust_remote_code=trusted)
    tokenizer = load_tokenizer(model, trusted)
    return Loaded(network.build(BuildRequest("causal", tokenizer)).eval(), tokenizer, model)


def rebuild(run: RunFolder, records: dict[str, Record] | None = None) -> LanguageModule:
    """The run's objective with its network built as it was for training: the configuration is read again.

    Args:
        run: The run.
        records: What its transformations did, from the checkpoint that is to be restored.

    Raises:
        ValueError: The run's model is not a `LanguageModule`.
    """
    module = unbuilt(run)
    module.records = records or {}
    # Compiling is for thousands of steps, and recomputing for backward passes.
    module.plan = module.plan._replace(compile=False, gradient_checkpointing=False)
    module.configure_model()
    return module


def unbuilt(run: RunFolder) -> LanguageModule:
    """The run's objective with its tokenizer and its transformations, whose network is still to be built.

    Raises:
        ValueError: The run's model is not a `LanguageModule`.
    """
    from jsonargparse import ArgumentParser

    from lightllm.callbacks.transforming import Transforming
    from lightllm.models import load_tokenizer
    from lightllm.modules import LanguageModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModule, "model", required=True)
    module = parser.instantiate_classes(parser.parse_object({"model": run.read_config()["model"]})).model
    assert isinstance(module, LanguageModule)
    if run.tokenizer.is_dir():
        module.tokenizer = load_tokenizer(str(run.tokenizer))
    for callback in rebuild_callbacks(run, Transforming):  # type: ignore[type-abstract]  # any of the kind
        module.register_transformation(callback.transformation())
    return module


def rebuild_callbacks(run: RunFolder, kind: type[C]) -> list[C]:
    """Those of a run's callbacks that are of a class, made again."""
    from jsonargparse import ArgumentParser

    configured = run.read_config()["trainer"]["callbacks"] or []
    ours = [one for one in configured if issubclass(_class(one["class_path"]), kind)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[kind])  # type: ignore[valid-type]  # a class that the caller names
    callbacks: list[C] = parser.instantiate_classes(parser.parse_object({"callbacks": ours})).callbacks
    return callbacks


def rebuild_data(run: RunFolder) -> DocumentData:
    """The run's datamodule with the run's tokenizer, set up without a trainer.

    Raises:
        ValueError: The run's data is not a `DocumentData`.
    """
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    from lightllm.datamodules import DocumentData
    from lightllm.models import load_tokenizer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    data = parser.instantiate_classes(parser.parse_object({"data": run.read_config()["data"]})).data
    if not isinstance(data, DocumentData):
        raise ValueError(f"the run's data is a {type(data).__name__}, of which no documents can be chosen")
    if run.tokenizer.is_dir():
        data.tokenizer = load_tokenizer(str(run.tokenizer))
    data.prepare_data()
    data.setup("fit")
    return data


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
    from lightllm.checkpoint_io import read_checkpoint

    state = read_checkpoint(checkpoint)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
