"""The whole way of a user with HoVLE's folder, a JSONL and one GPU, at HoVLE's own size, on random weights.

    python scripts/gpu/hovle.py WORK --out hovle.json                    # all of it; about 35 GB of disk
    python scripts/gpu/hovle.py WORK --only make check dry-run           # in parts: what is finished is kept
    python scripts/gpu/hovle.py WORK --only resume --kill stage2:5 stage3:5
    python scripts/gpu/hovle.py WORK --geometry nano --device cpu --steps 3 --every 2 --kill stage2:3 --batch-size 2
        --set data.max_length=512            # a try without a GPU, in two minutes

make: a teacher's folder in the published layout, in bfloat16, with nano-teacher's tokenizer, as ``mmmamba inspect``
reads it; pictures of several real sizes, and conversations about one of them, about several or none, some too long.
check, dry-run: the verbs of these names. distil: the recipe with a few steps a stage. resume: the same run, killed by
SIGKILL where ``--kill`` says and gone on with, must log the losses of the first: to 2 % on a GPU, to the bit on a CPU.
chat: the student is asked about a picture (its answer is noise). All but make's files are plain ``mmmamba`` command
lines, printed before they run; their output is in WORK/logs. Prints its table last, of all that ``--out`` holds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mmmamba.checkpoints import resolve
from mmmamba.checkpoints.hovle import config_to_hovle
from mmmamba.checkpoints.layouts import HOVLE, Part, Tensors, skeleton
from mmmamba.checkpoints.write import write_model
from mmmamba.data.chat_template import IMAGE_CONTEXT
from mmmamba.data.processor import Processor
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.device import pick_device, release
from mmmamba.distill.checked_tensors import ABOUT, TENSORS
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model import ModelConfig
from mmmamba.model.geometries import GEOMETRIES, geometry
from mmmamba.report.table import show, table_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"hovle-2.6b": "hovle-2.6b-linear", "nano": "nano-linear"}
TOKENIZER = "nano-teacher"  # whose tokenizer the teacher gets: HoVLE's own is at hand no more than its weights
TRAIN, HELD_OUT = 96, 4  # samples
SIZES = ((448, 448), (640, 480), (1344, 896), (2000, 500), (600, 1200), (224, 224), (800, 600), (1024, 1024))
TOLERANCE = 0.02  # of a resumed run's losses on a GPU, whose sums are not always in one order
WORDS = "a red cup stands on the table left of two blue chairs and there is no dog in the picture".split()


class Way:
    """Where everything lies, and how a command is run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.resolve()
        self.device = pick_device(arguments.device)
        self.recipe: str = arguments.recipe or RECIPES[arguments.geometry]
        few = {"steps": arguments.steps, "batch_size": arguments.batch_size, "checkpoint_every": arguments.every}
        short = [f"stage{n}.{key}={value}" for n in (1, 2, 3) for key, value in {**few, "log_every": 1}.items()]
        self.plan = load_recipe(DistillRecipe, self.recipe, arguments.set)
        self.short = [*short, *arguments.set]
        self.teacher, self.train, self.val = self.work / "teacher", self.work / "train.jsonl", self.work / "val.jsonl"
        self.whole = self.work / "whole"
        self.cut = self.work / "cut" / "run"  # no neighbours: one would lend its stages

    def start(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start ``mmmamba WORDS``, its output in a log of that name."""
        command = list(map(str, words))
        print("+ mmmamba", shlex.join(command), flush=True)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{name}.log").open("wb") as file:
            return subprocess.Popen([sys.executable, "-m", "mmmamba", *command], env=environment,
                                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)  # fmt: skip

    def run(self, name: str, *words: str | Path, lines: int = 0) -> str:
        """``mmmamba WORDS`` to its end; shows the last lines (0: all) and returns the output.

        Raises:
            SystemExit: when it fails.
        """
        process = self.start(name, *words)
        process.wait()
        said = self.said(name)
        print(*said.splitlines()[-lines:], sep="\n", flush=True)
        if process.returncode:
            raise SystemExit(f"mmmamba {words[0]} ended with exit code {process.returncode}")
        return said

    def said(self, name: str) -> str:
        return (self.work / "logs" / f"{name}.log").read_text(errors="replace")

    def distil(self, out: Path, *more: str) -> list[str | Path]:
        """The command line of a short run of the recipe into ``out``."""
        sets = [word for item in self.short for word in ("--set", item)]
        return ["distill", self.recipe, "--teacher", self.teacher, "--data", self.train, "--out", out,
                "--device", self.arguments.device, *sets, *more]  # fmt: skip


# ---------------------------------------------------------------------------------------------- make


def make(way: Way) -> dict[str, Any]:
    """The teacher's folder and the data, unless they are there."""
    tokenizer = Tokenizer.from_folder(resolve(TOKENIZER))
    config = replace(geometry(way.arguments.geometry), img_context_token_id=tokenizer.token_id(IMAGE_CONTEXT))
    wanted = config_to_hovle(config) | {"torch_dtype": "bfloat16"}
    if not (way.teacher / "config.json").is_file() or read_json(way.teacher / "config.json") != wanted:
        write_teacher(way.teacher, config, wanted, tokenizer, way.device)
    if not way.val.is_file():  # written last
        write_data(way, tokenizer)
    way.run("inspect", "inspect", way.teacher, lines=12)
    files = [*way.teacher.glob("*.safetensors")]
    pictures = [*(way.work / "pictures").iterdir()]
    return {
        "teacher_bytes": size_of(way.teacher),
        "seen": f"a teacher of {size_of(way.teacher) / 1e9:.2f} GB in {len(files)} files; {TRAIN} samples and "
        f"{HELD_OUT} held out, {len(pictures)} pictures",
    }


def write_teacher(
    folder: Path, config: ModelConfig, data: dict[str, Any], tokenizer: Tokenizer, device: torch.device
) -> None:
    """Random weights on ``device``, a layer at a time, in the published layout."""
    expected = skeleton(config, folder)
    generator = torch.Generator(device).manual_seed(0)

    def read(part: Part) -> Tensors:
        found = {name: values(name, meta.shape, config, generator) for name, meta in expected[part].items()}
        return {name: tensor.bfloat16().cpu() for name, tensor in found.items()}

    write_model(folder, HOVLE, data, config, read, Processor(tokenizer, config))
    release(device)


def values(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """At the scales of ``mmmamba.model.initialise``, but for the head's: the next token is not all but even."""
    if "norm" in name:
        return torch.ones(shape, device=generator.device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=generator.device)
    tensor = torch.randn(shape, device=generator.device, generator=generator)
    if "embedding" in name and "patch" not in name:
        return tensor
    shrink = (2 * config.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "mlp.down.weight")) else 1.0
    return tensor.mul_(shrink * math.prod(shape[1:]) ** -0.5)


def write_data(way: Way, tokenizer: Tokenizer) -> None:
    """Pictures, and InternVL's kind of conversations about them; lengths are shares of what the recipe takes."""
    random = np.random.default_rng(0)
    (way.work / "pictures").mkdir(parents=True, exist_ok=True)
    pictures: dict[tuple[int, int], list[str]] = {}
    for size in SIZES:
        for number in range(3):
            name = f"pictures/{size[0]}x{size[1]}-{number}.{'png' if number == 2 else 'jpg'}"
            picture(size, random).save(way.work / name)
            pictures.setdefault(size, []).append(name)

    def shown(*sizes: tuple[int, int]) -> list[str]:
        return [str(random.choice(pictures[size])) for size in sizes]

    def text(share: float) -> str:
        """About ``share`` of the longest sample's tokens."""
        sample = " ".join(map(str, random.choice(WORDS, 200)))
        each = len(tokenizer.encode(sample, allow_special=False)) / 200
        return " ".join(map(str, random.choice(WORDS, max(3, round(share * way.plan.data.max_length / each)))))

    def sample(i: int) -> dict[str, Any]:
        wide, tall = (2000, 500), (600, 1200)
        images, answers = [
            (shown((448, 448)), [0.002]),
            (shown((640, 480)), [0.005, 0.01]),
            (shown((1344, 896)), [0.05]),
            (shown(wide), [0.02, 0.02, 0.02]),
            (shown((800, 600), tall), [0.03]),  # two pictures
            ([], [0.01, 0.02]),
            ([], [(0.1, 0.3, 0.6, 0.9)[i // 8 % 4]]),
            (shown((224, 224), (448, 448), (1024, 1024)), [0.01]) if i // 8 % 2 else ([], [0.1, 1.2]),  # too long
        ][i % 8]
        turns = []
        for turn, answer in enumerate(answers):
            marks = "<image>\n" * len(images) if turn == 0 and i % 3 else ""  # else put in front by the reader
            turns += [{"from": "human", "value": f"{marks}What is in the picture, and where?"},
                      {"from": "gpt", "value": text(answer)}]  # fmt: skip
        return {"id": i, "conversations": turns} | (
            {"image": images if len(images) > 1 else images[0]} if images else {}
        )

    samples = [sample(i) for i in range(TRAIN + HELD_OUT)]
    for path, some in ((way.train, samples[:TRAIN]), (way.val, samples[TRAIN:])):
        path.write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")


def picture(size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """A gradient, blocks and some noise."""
    width, height = size
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    channels = [(x * a + y * (1 - a)) for a in random.random(3)]
    blocks = Image.fromarray(random.integers(0, 80, (8, 8, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
    noise = random.integers(0, 16, (height, width, 1))
    pixels = np.stack(channels, -1) * 150 + np.asarray(blocks) + noise
    return Image.fromarray(pixels.astype(np.uint8))


# ---------------------------------------------------------------------------------------------- the verbs


def check(way: Way) -> dict[str, Any]:
    """The data as training will read it."""
    data, out = way.plan.data, way.work / "check"
    tiles = [] if data.max_tiles is None else ["--max-tiles", str(data.max_tiles)]
    way.run("check", "data", "check", way.train, "--teacher", way.teacher, "--max-length", str(data.max_length), *tiles,
            "--out", out)  # fmt: skip
    found = read_json(out / "check.json")
    lengths, cut = found["lengths"], found["cut"]
    if not cut["samples"]:
        raise SystemExit("no sample was cut: the data was made for another data.max_length; give another WORK")
    return {
        "check": {
            key: found[key] for key in ("samples", "bad", "images", "tokens", "lengths", "tiles", "cut", "speed")
        },
        "seen": f"{found['samples']} samples, {found['images']} pictures, {found['tokens']:,} tokens; longest "
        f"{lengths['largest']:,}, {cut['samples']} cut; {found['speed']['samples_a_minute']:,.0f} samples a minute",
    }


def dry_run(way: Way) -> dict[str, Any]:
    """What the recipe, in its own length, needs, and its first steps."""
    sets = [word for item in way.arguments.set for word in ("--set", item)]
    said = way.run("dry-run", "distill", way.recipe, "--teacher", way.teacher, "--data", way.train, "--dry-run",
                   "--device", way.arguments.device, "--gpu", way.arguments.gpu, *sets)  # fmt: skip
    _, _, first = said.partition("First steps on")
    rows = [re.split(r"\s{2,}", line.strip()) for line in first.splitlines()]
    taken = [row for row in rows if re.fullmatch(r"stage\d", row[0]) and len(row) == 7]
    seen = "; ".join(f"{stage} {row[2]} measured, {row[1]} reckoned" for stage, *row in taken)
    unit = (re.findall(r"measured, (\wB)", first) or [""])[0]
    return {"first_steps": taken, "seen": f"peaks in {unit}: {seen}" if seen else "no real step was taken"}


def distil(way: Way) -> dict[str, Any]:
    """The recipe, a few steps a stage."""
    way.run("distil", *way.distil(way.whole, "--resume"), lines=3)
    stages = rates(metrics(way.whole))
    for stage, found in stages.items():
        print(f"{stage}: first step {found['first']:.2f} s, then {found['seconds']:.2f} s a step, "
              f"{found['tokens_per_s']:,.0f} tokens/s, losses {found['losses']}", flush=True)  # fmt: skip
    seen = "; ".join(f"{s} {r['seconds']:.2f} s a step, {r['tokens_per_s']:,.0f} tokens/s" for s, r in stages.items())
    return {"stages": stages, "model_bytes": size_of(way.whole / "model"),
            "seen": f"{seen}; model of {size_of(way.whole / 'model') / 1e9:.2f} GB"}  # fmt: skip


def resume(way: Way) -> dict[str, Any]:
    """The same, killed and gone on with; its losses beside the whole run's."""
    if not (way.whole / "model").is_dir():
        raise SystemExit(f"{way.whole}: there is no finished run to compare with: --only distil first")
    shutil.rmtree(way.cut.parent, ignore_errors=True)
    kills: list[str] = []
    held: dict[str, dict[str, Any]] = {}
    for number, (stage, step) in enumerate(way.arguments.kill):
        process = way.start(f"cut-{number}", *way.distil(way.cut, "--resume"))
        kills.append(kill_at(way, process, f"cut-{number}", stage, step))
        found = {folder.name: holds(folder) for folder in sorted((way.cut / "checkpoints").glob("stage*"))}
        for name, about in found.items():
            print(f"checkpoints/{name}: {about['tensors']} tensors, {about['bytes'] / 1e9:.3f} GB: {about['holds']}")
        if not any("-step" in name for name in found):
            raise SystemExit(f"no checkpoint was there at {stage}:{step}: --every must be less than its step")
        held |= found
    way.run("cut", *way.distil(way.cut, "--resume"), lines=3)
    worst = compare(metrics(way.whole), metrics(way.cut))
    allowed = TOLERANCE if way.device.type == "cuda" else 0.0
    latest = [about for name, about in held.items() if "-step" in name][-1]
    result = {"killed": kills, "checkpoints": held, "worst": worst, "stages": rates(metrics(way.cut)),
             "seen": f"killed at {', '.join(kills)}, resumed: losses within {max(worst.values()):.1e}; checkpoint of "
                     f"{latest['bytes'] / 1e9:.2f} GB"}  # fmt: skip
    if not max(worst.values()) <= allowed:
        said = f"a resumed run's losses differ by {max(worst.values()):.2%}, more than {allowed:.0%}: {worst}"
        return {**result, "failed": said}
    if not way.arguments.keep:
        shutil.rmtree(way.cut.parent)
    return result


def chat(way: Way) -> dict[str, Any]:
    """The student, asked about the first held-out picture."""
    line = json.loads(way.val.read_text(encoding="utf-8").splitlines()[0])
    image = line["image"] if isinstance(line["image"], str) else line["image"][0]
    said = way.run("chat", "chat", way.whole / "model", "What is in the picture?", "--image", way.work / image,
                   "--max-new-tokens", "8", "--device", way.arguments.device)  # fmt: skip
    return {"seen": f"answered {said.strip()[:40]!r}"}


# ---------------------------------------------------------------------------------------------- looking


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics.jsonl, so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each stage: seconds of its first step and of the later ones, their tokens a second (medians), the losses."""
    found: dict[str, Any] = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        mine = [line for line in lines if line["stage"] == stage]
        took = [line["tokens"] / line["tokens_per_s"] for line in mine]
        found[stage] = {
            "first": took[0],
            "seconds": statistics.median(took[1:] or took),
            "tokens_per_s": statistics.median([line["tokens_per_s"] for line in mine[1:] or mine]),
            "losses": [float(f"{line['loss']:.4g}") for line in mine],
        }
    return found


def compare(whole: Sequence[dict[str, Any]], resumed: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The greatest relative difference of each stage's losses; infinite where the lines are not the same steps."""
    steps = [[(line["stage"], line["step"]) for line in lines] for lines in (whole, resumed)]
    if steps[0] != steps[1]:
        return {"steps": math.inf}
    worst: dict[str, float] = {}
    for a, b in zip(whole, resumed, strict=True):
        difference = abs(a["loss"] - b["loss"]) / max(abs(a["loss"]), 1e-30)
        worst[a["stage"]] = max(worst.get(a["stage"], 0.0), difference)
    return worst


def kill_at(way: Way, process: subprocess.Popen[bytes], name: str, stage: str, step: int) -> str:
    """Kill the run once it has logged that step; says where it was.

    Raises:
        SystemExit: when it ended before.
    """
    while process.poll() is None:
        if (stage, step) in [(line["stage"], line["step"]) for line in metrics(way.cut)]:
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed: {stage}, step {step} was logged", flush=True)
            return f"{stage}:{step}"
        time.sleep(0.01)
    print(way.said(name)[-2000:])
    raise SystemExit(f"the run ended, exit code {process.returncode}, before {stage} had logged step {step}")


def holds(folder: Path) -> dict[str, Any]:
    """What a checkpoint's header says, how many tensors it has, and its bytes."""
    with safe_open(folder / TENSORS, "pt") as file:
        about = json.loads(file.metadata()[ABOUT])
        return {**about, "tensors": len(file.keys()), "bytes": size_of(folder)}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def place(text: str) -> tuple[str, int]:
    """``stage2:5`` as (stage, step)."""
    found = re.fullmatch(r"(stage[1-3]):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form stage2:5")
    return found[1], int(found[2])


DO: dict[str, Callable[[Way], dict[str, Any]]] = {
    "make": make, "check": check, "dry-run": dry_run, "distil": distil, "resume": resume, "chat": chat
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for all that is written")
    parser.add_argument("--only", nargs="*", default=list(DO), choices=list(DO), help="steps, in their own order")
    parser.add_argument("--geometry", default="hovle-2.6b", choices=sorted(GEOMETRIES))
    parser.add_argument("--recipe", help="default: hovle-2.6b-linear, or nano-linear for the geometry nano")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys to change, e.g. stage3.recompute=mlp")
    parser.add_argument("--steps", type=int, default=6, help="of each stage")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--kill", nargs="+", type=place, default=[place("stage2:5")], metavar="STAGE:STEP",
                        help="when to kill the run: once it has logged that step")  # fmt: skip
    parser.add_argument("--gpu", default="h200", help="the kind of GPU that the dry run reckons with")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", action="store_true", help="keep the run that was cut")
    parser.add_argument("--out", type=Path, help="JSON; what it holds already is kept")
    arguments = parser.parse_args()
    try:
        way = Way(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    way.work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    results: dict[str, Any] = kept.get("steps", {})
    name = torch.cuda.get_device_name(way.device) if way.device.type == "cuda" else way.device.type
    about = {"device": name, "torch": torch.__version__, "geometry": arguments.geometry, "recipe": way.recipe,
             "set": way.short}  # fmt: skip
    failed = ""
    for step in (step for step in DO if step in arguments.only):
        print(f"=== {step}", flush=True)
        began = time.perf_counter()
        try:
            found = DO[step](way)
        except (SystemExit, UserError) as failure:
            found = {"seen": f"failed: {failure}", "failed": str(failure)}
        results[step] = {"seconds": round(time.perf_counter() - began, 1), **found}
        if arguments.out:
            arguments.out.write_text(json.dumps({"about": about, "steps": results}, indent=1))
        failed = found.get("failed", "")
        if failed:
            break
    rows = [(step, results[step]["seconds"], results[step]["seen"]) for step in DO if step in results]
    show(table_of(f"{arguments.geometry}, {way.recipe}, {name}", ("step", "seconds", "seen"), rows))
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
