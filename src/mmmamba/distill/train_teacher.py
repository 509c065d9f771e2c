"""Training a teacher from scratch, for those who have none: the nano and pico teachers are made this way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mmmamba.checkpoints import save_hovle
from mmmamba.config_files import from_dict
from mmmamba.data.bpe_training import SPECIALS, train_bpe
from mmmamba.data.processor import Processor
from mmmamba.data.sources.primer.corpus import corpus_texts
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.device import pick_device, pick_precision
from mmmamba.distill import processes
from mmmamba.distill.checked_tensors import restore
from mmmamba.distill.objectives import PredictAnswers
from mmmamba.distill.recipe import TeachRecipe, load_recipe
from mmmamba.distill.run_folder import RunFolder, alone
from mmmamba.distill.trainer import train
from mmmamba.distill.training_data import TrainingData
from mmmamba.model.config import ModelConfig
from mmmamba.model.model import Model, compile_layers, initialise


def teach(
    recipe: str = "nano-teacher",
    *,
    out: Path | None = None,
    resume: bool = False,
    set: tuple[str, ...] = (),
    on_bad_sample: Literal["stop", "skip"] | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Path:
    """Train a small HoVLE-like teacher from scratch and save it as a HoVLE folder.

    Example: mmmamba teach nano-teacher --out runs/nano-teacher

    Args:
        recipe: a recipe file, or the name of a built-in one.
        out: the run folder (default: runs/NAME).
        resume: go on with a run that was interrupted.
        set: recipe keys to change, e.g. --set train.steps=100.
        on_bad_sample: stop at the first bad sample, or skip and list them.
        device: auto, cpu, cuda, cuda:1, ….
        precision: fp32, or bf16 passes over fp32 weights; auto picks bf16 on a GPU.

    Returns:
        the folder of the finished teacher, RUN/model.
    """
    loaded = load_recipe(TeachRecipe, recipe, set)
    if on_bad_sample is not None:
        loaded = replace(loaded, data=replace(loaded.data, on_bad_sample=on_bad_sample))
    where = processes.join(pick_device(device))
    run_folder = out or Path("runs") / loaded.name
    with alone(run_folder):
        return _taught(loaded, run_folder, resume, where, pick_precision(precision, where))


def _taught(recipe: TeachRecipe, run_folder: Path, resume: bool, where: torch.device, dtype: torch.dtype) -> Path:
    """Make the whole run, alone in its folder."""
    processor = make_processor(recipe)
    with processes.main_first():
        data = TrainingData(recipe.data, processor, recipe.seed)
        run = RunFolder(run_folder, recipe, {"kind": "teach", "data": data.identity}, resume=resume)
        pictures = run.check_pictures(data.picture_hashes)
        if run.manifest.get("pictures") != pictures:
            run.note(pictures=pictures)
    model = initialise(Model(processor.config), recipe.seed).to(where)
    if recipe.train.compile:
        compile_layers(model)
    if (done := run.result("teach")) is None:
        train(
            PredictAnswers(model),
            recipe.train,
            data.rows(recipe.train, 0),
            run,
            "teach",
            device=where,
            precision=dtype,
        )
        run.finish("teach", dict(model.named_parameters()), steps=recipe.train.steps)
    else:
        restore(dict(model.named_parameters()), done, run.checkpoints / "teach")
    if processes.is_main():
        save_hovle(model, processor, run.model, overwrite=run.replaces_model)
        run.report_skipped()
        print(run.model)
    processes.leave()
    return run.model


def make_processor(recipe: TeachRecipe) -> Processor:
    """Train the tokenizer of a recipe and fill its ids into the model's config."""
    tokenizer = Tokenizer.from_bpe(train_bpe(corpus_texts(recipe.seed), recipe.vocab_size, SPECIALS))
    fields = {
        **recipe.model,
        "vocab_size": tokenizer.vocab_size,
        "img_context_token_id": tokenizer.token_id("<IMG_CONTEXT>"),
    }
    return Processor(tokenizer, from_dict(ModelConfig, fields, where=f"recipe {recipe.name}: model"))
