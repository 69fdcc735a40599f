"""Corpora of the laboratory: made deterministically from the embedded text, or from larger text beside the checkout.

noisy           a useful domain, the target's, as a small part among other domains and corrupted text
clean           several good domains, all of them the target
shift           the target has a benchmark's style that no candidate domain has
near_duplicate  a domain of lightly changed copies of a few target documents, beside the target's own domain
hidden          the parts of `noisy` as one candidate domain, so that no mixture of domains can tell them apart; where a
                document comes from is written beside its text, for the report alone
web             one candidate domain without any part of the target's: of larger text, web pages of every quality

Documents go to validation, proxy or candidates by a hash of their text, before anything is made of them: corrupted
text and copies come from candidate documents alone, benchmark questions from held-out ones alone. So proxy, evaluation
and candidate text are disjoint by construction (and prepare drops what should still coincide).
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megatron_opus.data.manifest import Role
from megatron_opus.data.prepare import stdlib_text
from megatron_opus.data.prepare.embedded import prepare_once, write_parts
from megatron_opus.data.prepare.pipeline import Storage
from megatron_opus.data.prepare.records import text_digest
from megatron_opus.data.prepare.resolve import DatasetSpec
from megatron_opus.data.prepare.tokenize import kept
from megatron_opus.errors import Refusal
from megatron_opus.rows import json_lines

VERSION = 1  # of the recipes below: another one gives another directory
Parts = dict[tuple[str, Role], list[str]]
Domains = Mapping[str, list[str]]
TARGET_SPLIT: dict[Role, tuple[float, float]] = {
    "validation": (0.0, 0.2),
    "proxy": (0.2, 0.4),
    "candidates": (0.4, 1.0),
}
OTHER_SPLIT: dict[Role, tuple[float, float]] = {"validation": (0.0, 0.04), "candidates": (0.04, 1.0)}
COPIED, COPIES, CHANGED = 24, 60, 0.05  # documents that are copied, copies of each, words changed in a copy
HIDDEN, HIDDEN_SHARES = (
    "text",
    (0.1, 0.5, 0.4),
)  # the domain; of its characters, the target's, other text, corrupted text
DOMAIN_CHARACTERS, DOCUMENT_CHARACTERS = 4_000_000, 2500  # of text beside the checkout
# domain -> files; the first is the target
SHARED: dict[str, tuple[str, ...]] = {
    "science": ("openstax_science/*.jsonl",),
    "web": ("pile_domains/pile_cc.jsonl",),
    "forum": ("pile_domains/stackexchange.jsonl",),
    "mathematics": ("pile_domains/dm_mathematics.jsonl",),
}
SHARED_BENCHMARK = ("gsm8k/test.jsonl", "gsm8k/train.jsonl")  # evaluation, proxy


class LabCorpusError(Refusal, ValueError):
    """A corpus that is not known, or text that is not there."""


def prepare_lab(
    kind: str,
    cache_dir: str | Path,
    storage: Storage,
    *,
    shared: Path | None = None,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> Path:
    """The prepared directory of one corpus, made at the first call. `shared`: a folder with the larger text.

    Raises LabCorpusError, StandardLibraryError.
    """
    if kind not in KINDS:
        raise LabCorpusError(f"corpus: expected one of {', '.join(KINDS)}, got {kind!r}")
    if shared is None:
        directory = Path(cache_dir) / "lab" / f"{kind}-v{VERSION}-{_python()}"
    else:
        files = [path for patterns in SHARED.values() for path in _files(shared, patterns)]
        files += _files(shared, SHARED_BENCHMARK)
        sizes = json.dumps([(path.relative_to(shared).as_posix(), path.stat().st_size) for path in files])
        digest = hashlib.sha256(sizes.encode()).hexdigest()[:12]
        directory = Path(cache_dir) / "lab" / f"{kind}-v{VERSION}-shared-{digest}"

    def write_text(folder: Path) -> tuple[DatasetSpec, ...]:
        parts = _hidden_parts(_domains(shared)) if kind == "hidden" else {}
        sources = {text: name for name, texts in parts.items() for text in texts}
        return write_parts(folder, parts_of(kind, shared), sources)

    provenance = {
        "corpus": f"laboratory, {kind}",
        "recipe": VERSION,
        "text": "embedded" if shared is None else "shared",
    }
    return prepare_once(directory, write_text, provenance, storage, progress=progress, log=log)


def parts_of(kind: str, shared: Path | None = None) -> Parts:
    """(domain, role) -> documents of one corpus."""
    benchmark = None
    if kind == "shift" and shared is not None:
        evaluation, proxy = (_questions(shared / name) for name in SHARED_BENCHMARK)
        benchmark = {"validation": evaluation, "proxy": proxy}
    return KINDS[kind](_domains(shared), benchmark)


def _domains(shared: Path | None) -> Domains:
    if shared is None:
        return stdlib_text.documents()
    return {name: list(_shared_documents(shared, patterns)) for name, patterns in SHARED.items()}


def _python() -> str:
    return f"{platform.python_implementation().lower()}-{platform.python_version()}"


# --- the kinds: the first domain of what they are given is the target ------------------------------------------

Benchmark = Mapping[str, list[str]] | None


def noisy(domains: Domains, _: Benchmark) -> Parts:
    parts = _with_target(domains)
    sources = [text for (name, role), texts in parts.items() if role == "candidates" for text in texts[:400]]
    parts["noise", "candidates"] = [corrupted(text) for text in sources]
    return parts


def clean(domains: Domains, _: Benchmark) -> Parts:
    good = list(domains.items())[:3]
    return {(name, role): _split(texts, part) for name, texts in good for role, part in TARGET_SPLIT.items()}


def shift(domains: Domains, benchmark: Benchmark) -> Parts:
    parts = _with_target(domains)
    target = next(iter(domains))
    held: Parts = {}
    for role in ("validation", "proxy"):
        prose = parts.pop((target, role))  # its style is not what is wanted here
        made = [cloze(text) for text in prose] if benchmark is None else benchmark[role]
        held["questions", role] = [text for text in made if text]
    return {**parts, **held}


def near_duplicate(domains: Domains, _: Benchmark) -> Parts:
    parts = _with_target(domains)
    target = next(iter(domains))
    originals = sorted(parts[target, "candidates"], key=lambda text: text_digest(text)[1])[:COPIED]
    parts["copies", "candidates"] = [changed(text, copy) for text in originals for copy in range(COPIES)]
    parts[target, "candidates"] = [text for text in parts[target, "candidates"] if text not in originals]
    return parts


def hidden(domains: Domains, _: Benchmark) -> Parts:
    target = next(iter(domains))
    mixed = [text for texts in _hidden_parts(domains).values() for text in texts]
    return {**_held_out(_with_target(domains), target), (HIDDEN, "candidates"): mixed}


def web(domains: Domains, _: Benchmark) -> Parts:
    target, pages = list(domains)[:2]
    parts = _with_target(domains)
    return {**_held_out(parts, target), (pages, "candidates"): parts[pages, "candidates"]}


def _held_out(parts: Parts, target: str) -> Parts:
    return {(name, role): texts for (name, role), texts in parts.items() if name == target and role != "candidates"}


def _hidden_parts(domains: Domains) -> dict[str, list[str]]:
    """Candidate documents of `noisy` by where they come from, as many of each as HIDDEN_SHARES says by characters."""
    parts = [(name, texts) for (name, role), texts in noisy(domains, None).items() if role == "candidates"]
    target, *others = parts[:-1]
    each = HIDDEN_SHARES[1] / len(others)
    shares = {target[0]: HIDDEN_SHARES[0], **{name: each for name, _ in others}, parts[-1][0]: HIDDEN_SHARES[2]}
    whole = min(sum(map(len, texts)) / shares[name] for name, texts in parts)
    found: dict[str, list[str]] = {}
    for name, texts in parts:
        found[name], left = [], shares[name] * whole
        for text in sorted(texts, key=lambda text: text_digest(text)[1]):
            if left > 0:
                found[name].append(text)
                left -= len(text)
    return found


KINDS: Mapping[str, Callable[[Domains, Benchmark], Parts]] = {
    "noisy": noisy,
    "clean": clean,
    "shift": shift,
    "near_duplicate": near_duplicate,
    "hidden": hidden,
    "web": web,
}


def _with_target(domains: Domains) -> Parts:
    """The first domain in all roles, the others as candidates with a small validation set."""
    parts: Parts = {}
    for number, (name, texts) in enumerate(domains.items()):
        for role, part in (TARGET_SPLIT if number == 0 else OTHER_SPLIT).items():
            parts[name, role] = _split(texts, part)
    return parts


def _split(texts: Iterable[str], part: tuple[float, float]) -> list[str]:
    return [text for text in texts if kept(text_digest(text)[1], part)]


# --- text made of text ----------------------------------------------------------------------------------------------


def _chance(text: str, salt: str) -> random.Random:
    return random.Random(f"{salt} {text_digest(text)[0]}")


def corrupted(text: str) -> str:
    """One of three kinds of damage, by the text itself: words shuffled, their letters shuffled, letters at random."""
    chance = _chance(text, "corrupted")
    words = text.split(" ")
    kind = chance.randrange(3)
    if kind == 0:
        chance.shuffle(words)
        return " ".join(words)
    if kind == 1:
        return " ".join("".join(chance.sample(word, len(word))) for word in words)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 ,.;:-"
    return "".join(c if c == "\n" else chance.choice(letters) for c in text)


def changed(text: str, copy: int) -> str:
    """A near-duplicate: a share of the words left out, doubled or swapped with the next, at places of its own."""
    chance = _chance(text, f"copy {copy}")
    words = text.split(" ")
    for _ in range(max(1, round(CHANGED * len(words)))):
        place = chance.randrange(len(words))
        match chance.randrange(3):
            case 0 if len(words) > 1:
                del words[place]
            case 1:
                words.insert(place, words[place])
            case _:
                other = (place + 1) % len(words)
                words[place], words[other] = words[other], words[place]
    return " ".join(words)


def cloze(text: str) -> str:
    """Multiple-choice questions in a benchmark's form: a sentence with a blank, four words of the text, the answer."""
    chance = _chance(text, "cloze")
    plain = " ".join(text.split())
    pool = sorted(set(re.findall(r"[A-Za-z]{4,}", plain)))
    items = []
    for sentence in re.split(r"(?<=[.!?]) ", plain):
        words = sentence.split(" ")
        places = [i for i, word in enumerate(words) if re.fullmatch(r"[A-Za-z]{4,}", word)]
        if not 8 <= len(words) <= 60 or not places:
            continue
        place = chance.choice(places)
        answer = words[place]
        others = [word for word in pool if word != answer]
        if len(others) < 3:
            continue
        options = [answer, *chance.sample(others, 3)]
        chance.shuffle(options)
        letter = "ABCD"[options.index(answer)]
        blank = " ".join([*words[:place], "____", *words[place + 1 :]])
        choices = "\n".join(f"({name}) {option}" for name, option in zip("ABCD", options, strict=True))
        items.append(f"Passage: {blank}\nQuestion: Which word fills the blank?\n{choices}\nAnswer: ({letter}) {answer}")
    return "\n\n".join(items)


# --- text beside the checkout ---------------------------------------------------------------------------------------


def _files(shared: Path, patterns: Iterable[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        matches = sorted(shared.glob(pattern))
        if not matches:
            raise LabCorpusError(
                f"{shared}: expected {pattern}, found no such file; without --shared the embedded text is used"
            )
        found += matches
    return found


def _rows(path: Path) -> Iterable[dict[str, str]]:
    with path.open("rb") as lines:
        yield from (row for _, row in json_lines(path, lines))


def _shared_documents(shared: Path, patterns: tuple[str, ...]) -> Iterable[str]:
    """Pieces of about DOCUMENT_CHARACTERS, cut between paragraphs, up to DOMAIN_CHARACTERS over all files."""
    files = _files(shared, patterns)
    for path in files:
        left = DOMAIN_CHARACTERS // len(files)
        for row in _rows(path):
            held = ""
            for paragraph in row["text"].split("\n"):
                held += paragraph + "\n"
                if len(held) >= DOCUMENT_CHARACTERS:
                    yield held.strip()
                    left -= len(held)
                    held = ""
            if held.strip():
                yield held.strip()
                left -= len(held)
            if left <= 0:
                break


def _questions(path: Path) -> list[str]:
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in _rows(path)]
