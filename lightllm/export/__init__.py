"""From a network to files that others load: Hugging Face folders, peft adapters, GGUF."""

from lightllm.export.gguf import write_gguf
from lightllm.export.gguf_tensors import GGUF_TYPES, GGUFType
from lightllm.export.merge import merged_network
from lightllm.export.report import ExportReport
from lightllm.export.sentence_files import classifier_of
from lightllm.export.write import Layout, export

__all__ = [
    "GGUF_TYPES",
    "ExportReport",
    "GGUFType",
    "Layout",
    "classifier_of",
    "export",
    "merged_network",
    "write_gguf",
]
