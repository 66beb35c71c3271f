"""Which layers of a network are split over the tensor axis, and how: transformers' plan, or a user's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from lightllm.models.anatomy import input_embedding, unwrapped
from lightllm.parallel.tensor_layers import STYLES, embedding, gathered_colwise, replicated


def split_layers(network: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str] | None = None) -> None:
    """Split a network's layers over a mesh, in place; every parameter becomes a DTensor on it.

    The vocabulary is split where its size allows it: then the table of embeddings and the head keep the same rows, tied
    or not, and the losses over the vocabulary take the head in its parts.

    Args:
        network: Built and adapted.
        mesh: The tensor axis.
        plan: Styles by names of layers, with `*` for the number of a layer: `{model.layers.*.mlp.up_proj: colwise}`;
            None is transformers' own plan of the architecture.

    Raises:
        ValueError: There is no plan, it names an unknown layer or style, or a layer cannot be split so many ways.
    """
    base = unwrapped(network)
    styles = _by_layer(base, plan if plan is not None else _own_plan(base))
    _check_sizes(base, styles, mesh.size())
    done: set[nn.Module] = set()
    for name, style in styles.items():
        layer = base.get_submodule(name)
        STYLES[style](layer, mesh)
        done.update(layer.modules())
    done |= _split_vocabulary(base, mesh)
    for module in network.modules():
        if module not in done and any(True for _ in module.parameters(recurse=False)):
            replicated(module, mesh)


def _own_plan(base: nn.Module) -> dict[str, str]:
    plan = dict(base.tp_plan) if isinstance(base, PreTrainedModel) else {}
    if not plan:
        raise ValueError(
            f"{type(base).__name__} has no plan of its own for tensor parallelism: give trainer.strategy.init_args."
            "tensor_plan, such as {model.layers.*.mlp.up_proj: colwise, model.layers.*.mlp.down_proj: rowwise}, "
            "or leave tensor at 1"
        )
    return plan


def _by_layer(base: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The plan with one entry a layer; the vocabulary's, which are found otherwise, left out."""
    vocabulary = _vocabulary(base)
    styles: dict[str, str] = {}
    modules = dict(base.named_modules())
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        found = [name for name in modules if expression.fullmatch(name)]
        if not found:
            raise ValueError(f"the tensor plan names {pattern!r}, and {type(base).__name__} has no such layer")
        found = [name for name in found if modules[name] not in vocabulary]
        if found and style not in STYLES:
            raise ValueError(
                f"the tensor plan splits {pattern!r} by {style!r}, which is not known here: {', '.join(STYLES)}; give "
                "a plan of your own in tensor_plan, or leave tensor at 1"
            )
        styles |= dict.fromkeys(found, style)
    return styles


def _check_sizes(base: nn.Module, styles: Mapping[str, str], size: int) -> None:
    """Refuse what does not divide; a layer of attention by its heads, of which a rank needs whole ones."""
    for name, style in styles.items():
        layer = base.get_submodule(name)
        for axis in ("out_features",) if "colwise" in style else ("in_features",) if style == "rowwise" else ():
            width = getattr(layer, axis, None)
            if width is None or width % size:
                raise ValueError(f"{name} has {axis} {width}, which cannot be split over {size} ranks: lower tensor")
    config = getattr(base, "config", None)
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % size and any("attn" in name or "attention" in name for name in styles):
            raise ValueError(f"{field} is {heads}, which cannot be split over {size} ranks: lower tensor")


def _vocabulary(base: nn.Module) -> set[nn.Module]:
    """The table of embeddings and the head, where there is one."""
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return {input_embedding(base), *([head] if isinstance(head, nn.Module) else [])}


def _split_vocabulary(base: nn.Module, mesh: DeviceMesh) -> set[nn.Module]:
    """Split embedding and head by tokens, if they are as many on every rank; what was split."""
    table = input_embedding(base)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if table.num_embeddings % mesh.size() or not (head is None or isinstance(head, nn.Linear)):
        return set()
    tied = head is not None and head.weight is table.weight
    embedding(table, mesh)
    if head is None:
        return {table}
    if tied:
        head.weight = table.weight
    gathered_colwise(head, mesh)
    return {table, head}
