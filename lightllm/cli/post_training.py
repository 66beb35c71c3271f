"""What the verb quantize does."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightllm.batch import TextBatch
from lightllm.cli.ledger_report import enter_export
from lightllm.cli.quantize_request import Request
from lightllm.cli.rebuild import load, rebuild_data
from lightllm.compression.fake_quantization import quantization_schemes
from lightllm.compression.post_training import quantize_by_gptq, quantize_to_nearest
from lightllm.compression.schemes import make_scheme
from lightllm.datamodules import ChatData, DocumentData, TextData
from lightllm.export import export, write_gguf
from lightllm.export.compare import outputs, random_rows
from lightllm.export.merge import plain_network
from lightllm.runs import RunFolder


def quantize(request: Request) -> None:
    """Load a model, quantize it, write it, say what became of it, and enter it into a run's ledger.

    Raises:
        ValueError: The model is quantized already, its layers don't fit the scheme, or there is no calibration data.
    """
    target = _target(request)
    scheme = make_scheme(request.scheme, request.group_size, "gguf" if request.format == "gguf" else "torchao")
    loaded = load(request.model, request.checkpoint)
    if quantization_schemes(loaded.network):
        raise ValueError(
            f"{request.model!r} was trained with quantized weights, and rounding them once more would only lose: "
            f"write them as they are with lightllm export {request.model} --format torchao, or --format gguf"
        )
    network = plain_network(loaded.network)
    rows = random_rows(network)
    before = outputs(network, rows)
    leave_out = list(request.leave_out)
    if request.method == "gptq":
        quantize_by_gptq(network, scheme, leave_out, _calibration(request, loaded.tokenizer))
    else:
        quantize_to_nearest(network, scheme, leave_out)
    moved = (outputs(network, rows) - before).abs().max().item()
    print(f"quantized: logits moved by {moved:.2g} at most, {moved / before.abs().max().item():.2%} of the largest")
    if request.format == "gguf":
        report = write_gguf(network, loaded.tokenizer, target)
    else:
        report = export(network, loaded.tokenizer, target, layout=request.format)
    print(report.describe())
    if RunFolder(request.model).exists:
        enter_export(request.model, report.path)


def _target(request: Request) -> Path:
    if request.to is not None:
        return Path(request.to)
    run = RunFolder(request.model)
    if not run.exists:
        raise ValueError(f"{request.model!r} is no run folder: say with --to where to write")
    return run.path / f"{request.scheme}-{request.method}{'.gguf' if request.format == 'gguf' else ''}"


def _calibration(request: Request, tokenizer: PreTrainedTokenizerBase) -> list[TextBatch]:
    """What GPTQ measures a layer's inputs on."""
    if request.documents < 1:
        raise ValueError(f"documents is {request.documents}: give at least 1")
    run = RunFolder(request.model)
    if request.data is not None:
        data = _data(request.data)
        data.tokenizer = tokenizer
        data.prepare_data()
        data.setup("fit")
    elif run.exists:
        data = rebuild_data(run)
    else:
        raise ValueError("gptq calibrates on data: name a file of chats or text with --data, or take --method round")
    return data.calibration_batches(request.documents)


def _data(source: str) -> DocumentData:
    """Text, or else chats."""
    file = Path(source)
    if file.suffix == ".txt":
        return TextData(source)
    if file.suffix == ".jsonl" and file.is_file():
        with file.open(encoding="utf-8") as lines:
            if '"text"' in lines.readline():
                return TextData(source)
    return ChatData(source)
