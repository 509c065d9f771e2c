"""How many logits are alive at once while the KL is computed: cost formulas read these."""

from __future__ import annotations

CHUNK = 4096  # tokens whose logits are alive at once (of the PyTorch twin)
MEMORY = 800_000_000  # bytes that the logits of a chunk, and the gradient to a trained head, may take
BLOCK = 2048  # vocabulary entries a program holds at once: 16 bytes of bfloat16 a thread; rows are whole blocks
ROWS = 128  # chunks are multiples of it, the tiles of the matrix units
