"""Benchmark files of generated questions, and log-likelihoods by hand: `transformers` alone, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "module",
    "returns",
    "a",
    "list of strings",
    "the",
    "value",
    "None when it is absent",
    "object",
    "error",
    "file",
)


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 31 + i * i + i * seed) % len(WORDS)] for i in range(count))


def rows(benchmark: str, count: int = 6) -> list[dict[str, Any]]:
    """Choices of very different lengths: by sum, by character and by token another one is best."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        kinds = [f"qx{i}vz", "the list of the value of the object in the file", words(i, 3), words(i + 7, 6)]
        choices = kinds[i % 4 :] + kinds[: i % 4]
        if benchmark == "mmlu":
            row = {
                "question": words(i, 9) + "?",
                "choices": choices,
                "answer": i % 4,
                "subject": ("law", "logic")[i % 2],
            }
        elif benchmark == "winogrande":
            sentence = f"{words(i, 5)} so _ gave {words(i + 3, 4)}."
            row = {"sentence": sentence, "option1": "Ann", "option2": "the reader", "answer": str(i % 2 + 1)}
        elif benchmark == "piqa":
            row = {"goal": words(i, 6), "sol1": choices[0], "sol2": choices[3] + " ", "label": i % 2}
        else:
            row = {"query": f"Question: {words(i, 8)}?\nAnswer:", "choices": choices, "gold": (i + 1) % 4}
        found.append(row)
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


class ByHand:
    """Log-likelihoods of a model directory, without lm-eval."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    @torch.no_grad()
    def __call__(self, context: str, continuation: str, keep: int | None = None) -> tuple[float, int]:
        """(sum of log p of the continuation's tokens, their number); `keep`: the last so many tokens are read."""
        before = self.tokenizer.encode(context, add_special_tokens=False)
        whole = self.tokenizer.encode(context + continuation, add_special_tokens=False)
        scored = len(whole) - len(before)
        ids = torch.tensor([whole[-keep:] if keep else whole])
        logs = self.model(ids[:, :-1]).logits.double().log_softmax(-1)
        found = logs.gather(2, ids[:, 1:, None])[0, -scored:, 0]
        return float(found.sum()), scored
