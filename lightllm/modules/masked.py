"""Masked language modelling: tokens are hidden in the text, and predicted from both sides."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightllm.batch import IGNORE_INDEX, TextBatch
from lightllm.losses import linear_cross_entropy, linear_log_probabilities, linear_token_statistics
from lightllm.masking import PLANES, MaskedVocabulary, Masking, fixed_uniforms, mask_batch
from lightllm.models.adapters import Adapter
from lightllm.models.anatomy import output_head, transformers_network, vocabulary_size
from lightllm.models.encoder_states import check_encoder, encoder_states
from lightllm.models.head_transform import states_for_head
from lightllm.models.network import Network, Task
from lightllm.models.word_starts import word_starts
from lightllm.modules.base import LanguageModule, Loss
from lightllm.modules.build import on_meta
from lightllm.modules.sentence_head import SentenceHead, document_labels, document_numbers, token_types
from lightllm.modules.token_metrics import sum_dtype


class MaskedBatch(TextBatch):
    """A batch with masked tokens, whose labels are those tokens."""

    sentence_labels: Tensor
    """Of each document as `document_numbers` counts them, whether its second text is another than what follows its
    first, int64 `[documents]`; `IGNORE_INDEX` where nothing is said."""


class MaskedMetrics(Metric):
    """What is found behind the masks, exact over unequal batches and ranks.

    loss                    mean over masked tokens of -log p(token)    (nats)
    perplexity              exp(loss)
    masked_accuracy         share of masked tokens that have the highest probability
    most_frequent_accuracy  the same share, were the most frequent of the masked tokens always named
    sentence_accuracy       share of pairs that the second head tells rightly, if there is one
    sentence_loss           its mean cross-entropy                      (nats)
    """

    full_state_update = False
    higher_is_better = False

    sums: Tensor
    sentence_sums: Tensor
    tokens: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=sum_dtype()), dist_reduce_fx="sum")
        self.add_state("sentence_sums", torch.zeros(3, dtype=sum_dtype()), dist_reduce_fx="sum")
        self.add_state("tokens", [], dist_reduce_fx="cat")

    def update(self, loss_sum: Tensor, num_correct: Tensor, tokens: Tensor) -> None:
        """Add a batch: two sums over its masked tokens, and those tokens, `[masked]`."""
        count = torch.tensor(len(tokens), device=tokens.device)
        # Not in place: `Trainer.validate` resets the sums in inference mode, and `fit` goes on with them out of it.
        self.sums = self.sums + torch.stack([loss_sum, num_correct, count])
        self.tokens.append(tokens)

    def add_sentences(self, loss_sum: Tensor, num_correct: Tensor, count: Tensor) -> None:
        """Add a batch's pairs: the sum of their losses, and how many of them were right."""
        self.sentence_sums = self.sentence_sums + torch.stack([loss_sum, num_correct, count])

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name; those of pairs only if there were any."""
        tokens = dim_zero_cat(self.tokens)
        loss, accuracy = (self.sums[:2] / self.sums[2]).float()
        values = {"loss": loss, "perplexity": loss.exp(), "masked_accuracy": accuracy}
        values["most_frequent_accuracy"] = tokens.bincount().max() / len(tokens)
        if self.sentence_sums[2] > 0:
            sentence_loss, sentence_accuracy = (self.sentence_sums[:2] / self.sentence_sums[2]).float()
            values |= {"sentence_accuracy": sentence_accuracy, "sentence_loss": sentence_loss}
        return values


class MaskedPretraining(LanguageModule):
    """Predict masked tokens, new ones every time a text is read; what data gives as labels is not looked at.

    The head is applied to masked positions only. Validation and test mask a document always alike.

    Args:
        network: An encoder: `FromConfig` for a new one, `Pretrained` to go on with one.
        adapter: What of it trains.
        masking: How much is masked, and how.
        sentence_loss: Weight of a second head's loss, which tells whether the second text of a pair follows the first
            (`SentencePairData`); 0 is no such head. A pair counts as often as it has masked tokens.
        common: The other fields of `LanguageModule`.

    Raises:
        ValueError: The weight is negative.
    """

    task: ClassVar[Task] = "masked"

    special_tokens: Tensor
    word_starts: Tensor

    def __init__(
        self,
        network: Network,
        adapter: Adapter | None = None,
        *,
        masking: Masking | None = None,
        sentence_loss: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(network, adapter, **common)
        if not sentence_loss >= 0:
            raise ValueError(f"sentence_loss is {sentence_loss}: give a weight of at least 0")
        self.masking = masking or Masking()
        self.sentence_loss = sentence_loss
        self.sentence_head: SentenceHead | None = None

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        network = self.built_network
        if not on_meta(network):
            check_encoder(network, self._rows_are_packed())
        if self.tokenizer is None or self.tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token: name an encoder's, or train one with "
                "`tokenizer: {vocab_size: 4096, encoder: true}`"
            )
        size = vocabulary_size(network)
        special = torch.arange(size) >= len(self.tokenizer)  # rows that the network has and the tokenizer has not
        special[self.tokenizer.all_special_ids] = True
        self.register_buffer("special_tokens", special, persistent=False)
        self.register_buffer("word_starts", word_starts(self.tokenizer, size), persistent=False)
        if self.sentence_loss and self.sentence_head is None:
            self.sentence_head = SentenceHead(transformers_network(network).config.hidden_size)

    @override
    def forward(self, batch: TextBatch) -> Tensor:
        assert self.tokenizer is not None
        types = None if self.sentence_head is None else token_types(batch, self.tokenizer.sep_token_id)
        return encoder_states(self.built_network, batch, types)

    @override
    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        uniforms = torch.rand(PLANES, *batch["input_ids"].shape, device=batch["input_ids"].device)
        return super().training_step(self.masked(batch, uniforms), batch_idx)

    def masked(self, batch: TextBatch, uniforms: Tensor) -> MaskedBatch:
        """The batch with tokens masked by uniform numbers `[PLANES, batch, seq]`, and with those tokens as labels."""
        assert self.tokenizer is not None
        vocabulary = MaskedVocabulary(self.tokenizer.mask_token_id, self.special_tokens, self.word_starts)
        masked = mask_batch(batch, self.masking, vocabulary, uniforms)
        labels = batch["labels"].new_empty(0) if self.sentence_head is None else document_labels(batch)
        return MaskedBatch(**masked, sentence_labels=labels)

    @override
    def criterion(self, hidden: Tensor, batch: TextBatch) -> Loss:
        targets = batch["labels"] != IGNORE_INDEX
        states = states_for_head(self.built_network, hidden[targets])
        head = output_head(self.built_network)
        total = linear_cross_entropy(states, labels=batch["labels"][targets], **head._asdict())
        if self.sentence_head is not None:
            labels, logits = self._sentences(self.sentence_head, hidden, batch)
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
            counts = torch.bincount(document_numbers(batch)[targets], minlength=len(labels))
            total = total + self.sentence_loss * (losses * counts).sum()
        return Loss(total, targets.sum())

    def _sentences(self, head: SentenceHead, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Labels `[documents]` and logits `[documents, 2]`."""
        return cast(MaskedBatch, batch)["sentence_labels"], head(hidden[batch["position_ids"] == 0]).float()

    @override
    def new_metrics(self) -> Metric:
        return MaskedMetrics()

    @override
    def measure(self, batch: TextBatch) -> None:
        masked = self.masked(batch, fixed_uniforms(batch))
        hidden, targets = self(masked), masked["labels"] != IGNORE_INDEX
        states = states_for_head(self.built_network, hidden[targets])
        tokens = masked["labels"][targets]
        statistics = linear_token_statistics(states, labels=tokens, **output_head(self.built_network)._asdict())
        assert isinstance(self.metrics, MaskedMetrics)
        self.metrics.update(statistics.loss_sum, statistics.num_correct, tokens)
        if self.sentence_head is not None:
            labels, logits = self._sentences(self.sentence_head, hidden, masked)
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            self.metrics.add_sentences(loss, (logits.argmax(1) == labels).sum(), (labels != IGNORE_INDEX).sum())

    @override
    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Log probability of every token that validation would mask, `[batch, seq]`, 0 elsewhere; in nats."""
        masked = self.masked(batch, fixed_uniforms(batch))
        hidden, targets = self(masked), masked["labels"] != IGNORE_INDEX
        states = states_for_head(self.built_network, hidden[targets])
        head = output_head(self.built_network)
        found = linear_log_probabilities(states, labels=masked["labels"][targets], **head._asdict())
        batch["labels"] = masked["labels"]  # whoever reads the predictions finds there what they are of
        return torch.zeros(targets.shape, dtype=found.dtype, device=found.device).masked_scatter(targets, found)
