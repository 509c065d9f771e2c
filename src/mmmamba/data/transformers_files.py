"""Writes the files that transformers needs beside config and weights to load our folders. transformers is not needed.

These are ``generation_config.json``, ``processor_config.json`` and ``preprocessor_config.json``,
``chat_template.jinja``, and the tokenizer's two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmmamba.config_files import to_dict
from mmmamba.data.added_tokens import CONFIG_FILE
from mmmamba.data.chat_template import Template
from mmmamba.data.sample import IMAGE_MARK
from mmmamba.data.tiling import IMAGENET_MEAN, IMAGENET_STD
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.tokenizer_template import PLAIN, JinjaTemplate
from mmmamba.jsonfile import read_json
from mmmamba.model.config import ModelConfig

PROCESSOR_CLASS = "MMMambaProcessor"
IMAGE_PROCESSOR_CLASS = "MMMambaImageProcessor"

#: With these settings, transformers loads any of our tokenizers from ``tokenizer.json`` alone, and pads for generation.
TOKENIZER_SETTINGS: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": PROCESSOR_CLASS,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def write_transformers_files(
    folder: str | Path,
    tokenizer: Tokenizer,
    template: Template | JinjaTemplate,
    config: ModelConfig,
    stop_token_ids: Sequence[int],
) -> None:
    """Write all files of a folder that transformers can load, except ``config.json`` and the weights.

    Args:
        folder: where to write. It is made if it is not there.
        tokenizer, template, config, stop_token_ids: those of the model's processor.
    """
    folder = Path(folder)
    tokenizer.save(folder)
    settings = read_json(folder / CONFIG_FILE)
    if 0 <= config.img_context_token_id < tokenizer.vocab_size:
        settings["image_token"] = tokenizer.decode([config.img_context_token_id], skip_special=False)
    settings.pop("auto_map", None)  # names code to download, which we never need
    settings.pop("chat_template", None)  # it has a file of its own
    _write(folder / CONFIG_FILE, {**settings, **TOKENIZER_SETTINGS})
    images = image_settings(config)
    _write(folder / "preprocessor_config.json", images)
    _write(
        folder / "processor_config.json",
        {"processor_class": PROCESSOR_CLASS, "image_processor": images, "model": to_dict(config)},
    )
    _write(folder / "generation_config.json", generation_settings(config, stop_token_ids))
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer, template, config), encoding="utf-8")


def generation_settings(config: ModelConfig, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Settings for generation: what ends an answer, what pads a batch, and which token an answer may not contain.

    That token is the image position: it represents pixels, and an answer has none.
    """
    tokens = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    settings: dict[str, Any] = {name: token for name, token in tokens.items() if token >= 0}
    if stops := [token for token in stop_token_ids if token >= 0]:
        settings["eos_token_id"] = stops
    if 0 <= config.img_context_token_id < config.vocab_size:
        settings["suppress_tokens"] = [config.img_context_token_id]
    return settings


def image_settings(config: ModelConfig) -> dict[str, Any]:
    """How a picture becomes tiles. ``image_size`` is null for a model that reads text only."""
    return {
        "image_processor_type": IMAGE_PROCESSOR_CLASS,
        "image_size": None if config.vision is None else config.vision.image_size,
        "max_side": None if config.vision is None else config.vision.max_side,
        "dynamic_image_size": config.dynamic_image_size,
        "use_thumbnail": config.use_thumbnail,
        "min_dynamic_patch": config.min_dynamic_patch,
        "max_dynamic_patch": config.max_dynamic_patch,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def chat_template(tokenizer: Tokenizer, template: Template | JinjaTemplate, config: ModelConfig) -> str:
    """The template in Jinja: messages of ``role`` and ``content`` (text, or a list of parts) → the prompt.

    A picture becomes an ``<image>`` mark, on a separate line if something follows it. ``{% generation %}`` marks
    answers with their end marks, for losses on answers only.
    """
    if isinstance(template, JinjaTemplate):
        return _of_tokenizer(tokenizer, config.system_message)
    message = template.system_message if config.system_message is None else config.system_message
    bos = tokenizer.decode([config.bos_token_id], skip_special=False) if config.bos_token_id >= 0 else ""
    names = {
        "BOS": bos,
        "SYSTEM": template.start + template.system_role,
        "USER": template.start + template.user_role,
        "ASSISTANT": template.start + template.assistant_role,
        "END": template.end,
        "MESSAGE": message,
        "IMAGE": IMAGE_MARK,
    }
    lines = "".join(line.strip() for line in _TEMPLATE.splitlines())
    return re.sub("@([A-Z]+)@", lambda name: _literal(names[name[1]]), lines)


# The lines are joined without white space, so that Jinja's settings for white space do not matter.
_TEMPLATE = """
{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] }}
            {%- elif part['type'] in ['image', 'image_url'] -%}{{ @IMAGE@ if loop.last else @IMAGE@ ~ '\\n' }}
            {%- else -%}{{ raise_exception('a part of a message must be text or image, got ' ~ part['type']) }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ @BOS@ }}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = text(messages[0]['content']) -%}{%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = @MESSAGE@ -%}{%- set turns = messages -%}
{%- endif -%}
{%- if system -%}{{ @SYSTEM@ ~ system ~ @END@ }}{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] == 'user' -%}{{ @USER@ ~ text(turn['content']) ~ @END@ }}
    {%- elif turn['role'] == 'assistant' -%}
        {{ @ASSISTANT@ }}{%- generation -%}{{ text(turn['content']) ~ @END@ }}{%- endgeneration -%}
    {%- else -%}{{ raise_exception('a role must be user or assistant (or system, first), got ' ~ turn['role']) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ @ASSISTANT@ }}{%- endif -%}
"""


def without_generation(source: str) -> str:
    """One of our templates as earlier versions wrote it, without the marks around answers."""
    return source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def _of_tokenizer(tokenizer: Tokenizer, system_message: str | None) -> str:
    """The tokenizer's chat template (or else the plain one), with the config's system message, if there is one."""
    source = tokenizer.chat_template
    if source is None:
        said = "{{ 'Assistant:\n' + message.content + eos_token + '\n\n' }}"
        marked = "{{ 'Assistant:\n' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\n\n' }}"
        source = (PLAIN if tokenizer.adds_bos else PLAIN.removeprefix("{{ bos_token }}")).replace(said, marked)
    if system_message is None:
        return source
    default = f"[{{'role': 'system', 'content': {_literal(system_message)}}}]"
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = {default} + messages -%}}"
        "{%- endif -%}" + source
    )


def _literal(text: str) -> str:
    """``text`` as a Jinja string. Jinja's escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
