import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_networks import TEXT, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightllm.batch import IGNORE_INDEX, PADDING_DOCUMENT, TextBatch
from lightllm.evaluate import evaluate_tasks, evaluate_text

DOCUMENTS = {7: TEXT[:60], 3: TEXT[60:90], 5: "東京の海, 🐋🐳"}


def packed(*rows: list[int]) -> TextBatch:
    """Rows of whole documents, each predicting its own tokens, padded at the end to the longest row."""
    columns: list[dict[str, list[int]]] = []
    for row in rows:
        column: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
        for document in row:
            ids = tiny_tokenizer()(DOCUMENTS[document]).input_ids
            column["input_ids"] += ids
            column["labels"] += [*ids[1:], IGNORE_INDEX]
            column["position_ids"] += range(len(ids))
            column["document_ids"] += [document] * len(ids)
        columns.append(column)
    length = max(len(column["input_ids"]) for column in columns)
    padding = {"input_ids": 1, "labels": IGNORE_INDEX, "document_ids": PADDING_DOCUMENT}
    tensors = {}
    for name in columns[0]:
        missing = [length - len(column[name]) for column in columns]
        pads = [list(range(count)) if name == "position_ids" else [padding[name]] * count for count in missing]
        tensors[name] = torch.tensor([column[name] + pad for column, pad in zip(columns, pads, strict=True)])
    return TextBatch(**tensors)  # type: ignore[typeddict-item]


def one_by_one(network: LlamaForCausalLM, document: int) -> tuple[Tensor, Tensor, list[int]]:
    """A document alone: its tokens' losses, whether each was the likeliest, and its targets."""
    ids = torch.tensor([tiny_tokenizer()(DOCUMENTS[document]).input_ids])
    with torch.no_grad():
        logits = network(ids).logits[0, :-1]
    targets = ids[0, 1:]
    return (
        nn.functional.cross_entropy(logits, targets, reduction="none"),
        logits.argmax(-1) == targets,
        targets.tolist(),
    )


def test_a_text_is_measured_per_token_and_per_byte() -> None:
    network, tokenizer = tiny_llama(vocab=330), tiny_tokenizer()
    alone = [one_by_one(network, document) for document in DOCUMENTS]
    losses, correct = torch.cat([losses for losses, _, _ in alone]), torch.cat([right for _, right, _ in alone])
    num_bytes = sum(len(DOCUMENTS[document].encode()) for document in DOCUMENTS)
    num_bytes -= sum(len(tokenizer.tokenize(text)[0]) for text in DOCUMENTS.values())  # a character is a byte
    network.train()
    found = evaluate_text(network, tokenizer, [packed([7, 3]), packed([5])])
    assert network.training
    assert found.num_tokens == len(losses)
    assert found.num_bytes == num_bytes
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / num_bytes, rel=1e-5)
    assert found.token_accuracy == correct.float().mean().item()


def test_right_guesses_are_counted_among_targets_alone() -> None:
    network, batch = tiny_llama(), packed([3])
    with torch.no_grad():
        best = network(batch["input_ids"]).logits.argmax(-1)
    batch["labels"] = (best + 1) % 320
    batch["labels"][:, 2:5] = best[:, 2:5]
    batch["labels"][:, 10:] = IGNORE_INDEX
    assert evaluate_text(network, tiny_tokenizer(), [batch]).token_accuracy == 0.3


def test_how_documents_are_cut_into_batches_changes_nothing() -> None:
    network, tokenizer = tiny_llama(), tiny_tokenizer()
    together = evaluate_text(network, tokenizer, [packed([7, 5], [3])])
    apart = evaluate_text(network, tokenizer, [packed([7]), packed([3]), packed([5])])
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)
    assert together.num_bytes == apart.num_bytes


def test_nothing_to_evaluate_is_an_error() -> None:
    batch = packed([3])
    batch["labels"].fill_(IGNORE_INDEX)
    with pytest.raises(ValueError, match="no batch has a target"):
        evaluate_text(tiny_llama(), tiny_tokenizer(), [batch])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_lm_eval_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'lightllm\[evaluate\]'"):
        evaluate_tasks(tmp_path, ["mini"])


TASK = """
task: mini
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `evaluate`")
@pytest.mark.filterwarnings("default")
def test_tasks_run_on_an_exported_folder(tmp_path: Path) -> None:
    rows = [{"question": "Call", "choices": [" me", " x"], "answer": index % 2} for index in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mini.yaml").write_text(TASK.format(file=data))
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = evaluate_tasks(folder, ["mini"], include_path=tmp_path / "tasks", limit=6)
    assert found["mini"]["acc,none"] == 0.5
    with pytest.raises(ValueError, match="knows no task other"):
        evaluate_tasks(folder, ["other"], include_path=tmp_path / "tasks")
