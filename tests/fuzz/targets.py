"""What is fuzzed: for each kind of file a valid input, how it is changed, and what must hold of what is taken.

A case returns when its input was taken and what came of it was right, and raises UserError when it was refused.
"""

from __future__ import annotations

from fuzz import commands, files, models, runs
from fuzz.harness import Target

TARGETS = {
    target.name: target
    for target in [
        Target("jsonl", 1610, files.jsonl_seeds, files.jsonl),
        Target("pictures", 1000, files.picture_seeds, files.pictures),
        Target("recipes", 700, files.recipe_seeds, files.recipes),
        Target("tables", 100, files.table_seeds, files.tables),
        Target("configs", 250, models.config_seeds, models.configs),
        Target("checkpoints", 400, models.checkpoint_seeds, models.checkpoints),
        Target("gguf", 250, models.gguf_seeds, models.ggufs),
        Target("tokenizers", 300, models.tokenizer_seeds, models.tokenizers),
        Target("sessions", 200, runs.session_seeds, runs.sessions),
        Target("runs", 40, runs.run_seeds, runs.runs),
        Target("commands", 150, commands.seeds, commands.commands),
    ]
}
