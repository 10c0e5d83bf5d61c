"""The ground: models as functions from tokens to hidden states, and their weights on disk.

The transformer, log-probabilities, low-rank adapters, weights in and out, the bundled model, and the
adapter over ``transformers`` for architectures we do not compute ourselves. Imports nothing of accord but
``errors`` and ``progress``.
"""
