"""Develop language models from the first token to the exported file, on PyTorch Lightning.

Importing this package imports nothing heavy: take the parts from where they live, `lightllm.modules`,
`lightllm.datamodules`, `lightllm.callbacks`, `lightllm.models`, `lightllm.losses`.
"""

__version__ = "0.1.0"
