"""Recurrent language models over characters."""

from __future__ import annotations

from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, Shape, classifier, require_at_least_one


class Recurrent(nn.Module):
    """Embed tokens ``(N, L)`` and return the last layer's hidden state at each position, ``(N, L, D)``."""

    def __init__(self, vocab: int, embedding: int, cell: nn.RNNBase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, embedding)
        self.cell = cell

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.cell(self.embedding(tokens))
        return hidden  # type: ignore[no-any-return]


def char_lstm(
    input_shape: Shape, num_classes: int, *, embedding: int = 8, hidden: int = 256, depth: int = 2
) -> Net:
    """Return the Shakespeare LSTM of McMahan et al. 2017 and LEAF, with an output at every position.

    Int64 ``(N, L)`` to ``(N, L, V)``, any L; V is ``num_classes``. ``torch.func.vmap`` has no rule for
    torch's LSTM and GRU.
    """
    context_length("char_lstm", input_shape)
    require_at_least_one("char_lstm", embedding=embedding, hidden=hidden, depth=depth)
    cell = nn.LSTM(embedding, hidden, depth, batch_first=True)
    return classifier(Recurrent(num_classes, embedding, cell), hidden, num_classes)


def char_gru(
    input_shape: Shape, num_classes: int, *, embedding: int = 8, hidden: int = 256, depth: int = 2
) -> Net:
    """Return ``char_lstm`` with gated recurrent units."""
    context_length("char_gru", input_shape)
    require_at_least_one("char_gru", embedding=embedding, hidden=hidden, depth=depth)
    cell = nn.GRU(embedding, hidden, depth, batch_first=True)
    return classifier(Recurrent(num_classes, embedding, cell), hidden, num_classes)


def context_length(model: str, input_shape: Shape) -> Shape:
    """Return ``input_shape`` if it is ``(L,)``; raises ``ConfigError`` otherwise."""
    if len(input_shape) != 1:
        raise ConfigError(
            f"Model '{model}' takes sequences of token ids of shape (length,), not {input_shape}; choose a "
            "text data set, or an image model such as small_cnn."
        )
    return input_shape
