"""What a network takes and gives as others would use it: loaded by plain transformers, in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightllm.batch import TextBatch
from lightllm.evaluate import evaluate_text
from lightllm.models.progress import no_progress_bars

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
"""Names of the files that hold weights, in an exported folder."""


@dataclass(frozen=True)
class GenerationTest:
    """How generation is measured: one row, greedy, with a cache of keys and values, after a warm-up."""

    prompt: Sequence[int]
    """Token ids to go on from."""
    new_tokens: int = 64
    """Generated each time, whatever the network says; fewer where its positions end."""
    repeats: int = 3
    """The median of so many counts."""


@dataclass(frozen=True)
class Measurement:
    """What was found of a network that was loaded from its files."""

    parameters: int
    nonzero_parameters: int
    loss: float | None
    """Nats per target token; None without batches."""
    target_tokens: int | None
    """What the loss is a mean over."""
    tokens_per_second: float | None
    """None where nothing was generated."""
    peak_memory: int | None
    """Bytes that loading and generating took at most, beyond the interpreter and its libraries; None where it can't be
    told."""
    device: str


class WeightCount(NamedTuple):
    """How many weights, and the bytes that they take in memory."""

    parameters: int
    nonzero_parameters: int
    num_bytes: int


def count_weights(network: nn.Module) -> WeightCount:
    """Count a plain network's weights; one that two layers share counts once."""
    weights = [parameter.detach() for parameter in network.parameters()]
    return WeightCount(
        sum(weight.numel() for weight in weights),
        sum(int(torch.count_nonzero(_dense(weight))) for weight in weights),
        sum(weight.numel() * weight.element_size() for weight in weights),
    )


def _dense(weight: Tensor) -> Tensor:
    """The values of a weight; one of few bits is a tensor of a class of its own."""
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()


def weight_files(path: Path) -> list[Path]:
    """The files of an export, a Hugging Face folder or a GGUF file, that hold its weights."""
    if path.is_file():
        return [path]
    return sorted(file for pattern in WEIGHT_FILES for file in path.glob(pattern))


def measure_file(
    path: Path,
    test: GenerationTest | None = None,
    batches: Sequence[TextBatch] = (),
    trust_remote_code: bool = False,
) -> Measurement:
    """Load an export with plain transformers in a process of its own, and measure it there.

    Args:
        path: A Hugging Face folder or a GGUF file.
        test: How generation is measured; nothing is generated when None.
        batches: What the loss is measured on; it is not when there are none.
        trust_remote_code: Run the code that lies in the folder.

    Raises:
        ValueError: The process failed; the message is its last words.
    """
    with TemporaryDirectory(prefix="lightllm-measure-") as folder:
        torch.save([dict(batch) for batch in batches], Path(folder) / "batches.pt")
        request = {
            "path": str(path.resolve()),
            "test": test and asdict(test),
            "num_threads": torch.get_num_threads(),
            "trust_remote_code": trust_remote_code,
        }
        (Path(folder) / "request.json").write_text(json.dumps(request))
        process = subprocess.run(  # noqa: S603  (this interpreter, with a line of our own)
            [sys.executable, "-c", "from lightllm.measure import answer; answer()", folder],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "HF_MODULES_CACHE": folder,  # where transformers copies a folder's code to
            },
            capture_output=True,
            text=True,
        )
        file = Path(folder) / "answer.json"
        if process.returncode != 0 or not file.is_file():
            last = (process.stderr.strip().splitlines() or [f"it ended with status {process.returncode}"])[-1]
            raise ValueError(f"{str(path)!r} could not be measured: {last}")
        return Measurement(**json.loads(file.read_text()))


def measure_network(
    network: PreTrainedModel,
    test: GenerationTest,
    beside: Path,
    with_code: Callable[[PreTrainedModel, Path], PreTrainedModel] | None = None,
) -> Measurement:
    """Write a network into a folder for a moment, and measure its generation from there.

    Args:
        network: One that transformers can save.
        test: How generation is measured.
        beside: In which folder it is written.
        with_code: Writes the code without which the network could not be loaded into a folder; what it returns is saved
            there.
    """
    folder = beside / ".measured"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    try:
        with no_progress_bars():
            (network if with_code is None else with_code(network, folder)).save_pretrained(folder)
        return measure_file(folder, test, trust_remote_code=with_code is not None)
    finally:
        shutil.rmtree(folder)


def answer() -> None:
    """In the process of its own: do what `request.json` in the folder `argv[1]` asks, and write `answer.json` there."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["num_threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(request["path"])
    _import_all()
    memory = PeakMemory(device)
    network = _loaded(path, device, request["trust_remote_code"])
    speed, peak = None, None
    if request["test"] is not None:
        speed, peak = _tokens_per_second(network, GenerationTest(**request["test"])), memory.read()
    batches = torch.load(folder / "batches.pt", weights_only=True)
    found = evaluate_text(network, None, batches) if batches else None
    count = count_weights(network)
    measured = Measurement(
        parameters=count.parameters,
        nonzero_parameters=count.nonzero_parameters,
        loss=found.loss if found else None,
        target_tokens=found.num_tokens if found else None,
        tokens_per_second=speed,
        peak_memory=peak,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    )
    (folder / "answer.json").write_text(json.dumps(asdict(measured)))


class PeakMemory:
    """The most memory that this process takes from now on, beyond what it holds now.

    Args:
        device: Where the network will be: allocated memory counts there, resident memory on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif platform.system() == "Linux":
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to where the water is
        self._before = self._high_water()

    def read(self) -> int | None:
        """Bytes; None where the operating system does not tell."""
        after = self._high_water()
        return None if after is None or self._before is None else after - self._before

    def _high_water(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if platform.system() == "Linux":  # where getrusage would count what the starting process had taken
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        if platform.system() == "Darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None


def _import_all() -> None:
    """Have everything imported that loading and generating imports, by a network of next to nothing."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    _generate(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).eval(), torch.zeros(1, 1, dtype=torch.int64), 2)


def _loaded(path: Path, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    arguments = {"gguf_file": path.name} if path.is_file() else {"trust_remote_code": trust_remote_code}
    folder = path.parent if path.is_file() else path
    with no_progress_bars():
        network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **arguments).eval().to(device)
    assert isinstance(network, PreTrainedModel)
    return network


def _tokens_per_second(network: PreTrainedModel, test: GenerationTest) -> float:
    """The median speed of generation, the prompt's computation included."""
    rows = torch.tensor([test.prompt], device=network.device)
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    count = test.new_tokens if positions is None else min(test.new_tokens, positions - len(test.prompt))
    _generate(network, rows, count)
    seconds = []
    for _ in range(test.repeats):
        begin = time.perf_counter()
        _generate(network, rows, count)
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return count / statistics.median(seconds)


def _generate(network: Any, rows: Tensor, new_tokens: int) -> None:
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    generated = network.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
    assert generated.shape[1] == rows.shape[1] + new_tokens
