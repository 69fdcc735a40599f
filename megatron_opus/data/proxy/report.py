"""What a built proxy is made of: a picture, a text to read, the chosen and the refused documents as JSON lines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opus.data.manifest import Manifest
from megatron_opus.data.proxy.choice import BINS, ProxyChoice, Survey
from megatron_opus.data.proxy.similarity import ProxyError, Scorer
from megatron_opus.files import atomic_file, write_text

_EXCERPT = 400  # characters of a document shown
_SHOWN = 5  # documents of each kind shown


def check_pictures() -> None:
    """Before hours of work: raises ProxyError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ProxyError(f"the report's picture needs matplotlib ({error}): pip install -e '.[proxy]'") from None


def summary(scorer: Scorer, choice: ProxyChoice, found: Survey) -> dict[str, Any]:
    """Plain data for the manifest."""
    by_domain = domain_tokens(scorer, choice)
    items = scorer.scoring.items
    nearest: dict[str, int] = {}
    for row in choice.chosen[choice.chosen["nearest"] >= 0]:
        name = items[row["nearest"]].benchmark
        nearest[name] = nearest.get(name, 0) + int(row["tokens"])
    return {
        "documents": len(choice.chosen),
        "tokens": choice.tokens,
        "cutoff": choice.cutoff,
        "copies_removed": found.copies,
        "with_benchmark_text": found.overlapping,
        "cut_to_window": found.cut,
        "tokens_by_domain": {e.name: int(n) for e, n in zip(scorer.documents.entries, by_domain, strict=True)},
        "tokens_by_nearest_benchmark": nearest,
    }


def domain_tokens(scorer: Scorer, choice: ProxyChoice) -> np.ndarray:
    """[candidate domains] int64: tokens of the proxy that came from each."""
    count = len(scorer.documents.entries)
    return np.bincount(choice.chosen["domain"], choice.chosen["tokens"], minlength=count).astype(np.int64)


def listing(scorer: Scorer, found: np.ndarray) -> Iterator[bytes]:
    """A JSON line per document: where it is in the corpus, its score, its nearest benchmark item."""
    items, entries = scorer.scoring.items, scorer.documents.entries
    for row in found:
        line: dict[str, Any] = {
            "domain": entries[row["domain"]].name,
            "document": int(row["document"]),
            "tokens": int(row["tokens"]),
            "score": round(float(row["score"]), 6),
        }
        for key, field in (("nearest", "nearest"), ("contains", "overlap")):
            if row[field] >= 0:
                item = items[row[field]]
                line[key] = {"benchmark": item.benchmark, "id": item.id}
        yield (json.dumps(line) + "\n").encode()


def write(scorer: Scorer, choice: ProxyChoice, found: Survey, manifest: Manifest, output: Path) -> list[Path]:
    """report.txt, report.png and, where there are any, with_benchmark_text.jsonl in `output`; returns their paths."""
    made = [output / "report.txt"]
    write_text(made[0], text(scorer, choice, found, manifest) + "\n")
    made.append(draw(scorer, choice, found, output / "report.png"))
    if found.overlapping:
        made.append(output / "with_benchmark_text.jsonl")
        with atomic_file(made[-1]) as stream:
            for line in listing(scorer, found.overlapping_rows):
                stream.write(line)
    return made


# --- text -----------------------------------------------------------------------------------------------------------


def text(scorer: Scorer, choice: ProxyChoice, found: Survey, manifest: Manifest) -> str:
    settings = manifest.settings["build_proxy"]
    random = settings["kind"] == "std"
    before, after = found.tokens, domain_tokens(scorer, choice)
    facts = summary(scorer, choice, found)
    lines = [
        f"{settings['kind']} proxy of {scorer.documents.directory}",
        f"  encoder      {settings.get('encoder', 'none: in the order of a hash')}",
        *(f"  benchmark    {name}: {what}" for name, what in settings["benchmarks"].items()),
        f"  budget       {settings['token_budget']:,} tokens",
        f"  proxy        {len(choice.chosen):,} documents, {choice.tokens:,} tokens",
        f"  cut-off      {choice.cutoff:.4f} (best {float(choice.chosen['score'][0]):.4f})",
        f"  candidates   {int(found.documents.sum()):,} documents, {int(before.sum()):,} tokens before; of these left:",
        f"               {len(choice.chosen):,} chosen and {found.copies:,} others with the same text",
    ]
    if scorer.scoring.items:
        lines.append(
            f"  kept out     {found.overlapping:,} documents ({found.overlapping_tokens:,} tokens) contain benchmark "
            "text: never proxy, still candidates"
        )
        short = scorer.overlap.too_short if scorer.overlap else 0
        lines.append(
            f"               ({short:,} of {len(scorer.scoring.items):,} items are too short to be looked for)"
        )
    if not random:
        if found.cut:
            lines.append(f"  cut          {found.cut:,} documents were compared by their beginning only")
        if choice.cutoff <= 0:
            none = int((choice.chosen["score"] <= 0).sum())
            lines.append(
                f"  NOTE         {none:,} chosen documents resemble no benchmark at all: the budget is too large"
            )
    lines += [
        "",
        "tokens by domain",
        f"  {'domain':<24}{'before':>16}{'share':>9}{'proxy':>14}{'share':>9}{'ratio':>8}",
    ]
    shares_before, shares_after = before / before.sum(), after / after.sum()
    for i in np.argsort(-shares_after, kind="stable").tolist():
        ratio = shares_after[i] / shares_before[i]
        lines.append(
            f"  {scorer.documents.entries[i].name:<24}{before[i]:>16,}{shares_before[i]:>9.1%}{after[i]:>14,}"
            f"{shares_after[i]:>9.1%}{ratio:>8.2f}"
        )
    if facts["tokens_by_nearest_benchmark"]:
        lines += ["", "tokens of the proxy by the benchmark of the nearest item"]
        for name, count in sorted(facts["tokens_by_nearest_benchmark"].items(), key=lambda pair: -pair[1]):
            lines.append(f"  {name:<24}{count:>14,}{count / choice.tokens:>9.1%}")
        lines.append(f"  distinct items: {len(np.unique(choice.chosen['nearest'])):,} of {len(scorer.scoring.items):,}")
    if not random:
        lines += ["", "tokens by score (* chosen)", *_bars(found)]
    shown = [("some of the proxy" if random else "best", choice.chosen[:_SHOWN])]
    if not random:
        shown += [
            ("last that were taken", choice.chosen[-_SHOWN:]),
            ("first that were not", choice.next_best[:_SHOWN]),
            ("worst", found.worst[:_SHOWN]),
        ]
    for title, some in (*shown, ("with benchmark text in them", found.overlapping_rows[:_SHOWN])):
        if len(some):
            lines += ["", f"=== {title}", *_excerpts(scorer, some)]
    return "\n".join(lines)


def _bars(found: Survey) -> Iterator[str]:
    bins = np.flatnonzero(found.histogram)
    first, last = int(bins[0]), int(bins[-1])
    step = max(1, -(-(last - first + 1) // 24))
    groups = [(s, min(s + step, BINS)) for s in range(first, last + 1, step)]
    most = max(int(found.histogram[a:b].sum()) for a, b in groups)
    for a, b in groups:
        every, chosen = int(found.histogram[a:b].sum()), int(found.chosen_histogram[a:b].sum())
        width = -(-every * 50 // most)
        stars = min(width, -(-chosen * 50 // most))
        yield f"  {a * 2 / BINS - 1:+.3f} {every:>14,} {'*' * stars}{'-' * (width - stars)}"


def _excerpts(scorer: Scorer, some: Iterable[Any]) -> Iterator[str]:
    documents, items = scorer.documents, scorer.scoring.items
    for row in some:
        name = documents.entries[row["domain"]].name
        yield f"\n{float(row['score']):.4f}  {name}, document {int(row['document'])}, {int(row['tokens']):,} tokens"
        for label, field in (("nearest", "nearest"), ("contains", "overlap")):
            if row[field] >= 0:
                item = items[row[field]]
                question = " ".join(item.text().split())
                yield f"  {label} {item.benchmark} {item.id}: {textwrap.shorten(question, 200, placeholder=' ...')}"
        head = documents.text(documents.one(int(row["domain"]), int(row["document"])), 0, _EXCERPT)
        plain = textwrap.shorten(" ".join(head.split()), _EXCERPT, placeholder=" ...")
        yield textwrap.fill(plain, 110, initial_indent="    ", subsequent_indent="    ")


# --- picture --------------------------------------------------------------------------------------------------------


def draw(scorer: Scorer, choice: ProxyChoice, found: Survey, path: Path) -> Path:
    """Scores with the cut-off, and the shares of the domains before and after, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    before, after = found.tokens / found.tokens.sum(), domain_tokens(scorer, choice) / choice.tokens
    names = [entry.name for entry in scorer.documents.entries]
    order = np.argsort(after, kind="stable")
    height = max(4.2, 1.6 + 0.32 * len(names))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, height), layout="constrained")
    bins = np.flatnonzero(found.histogram)
    first, last = int(bins[0]), int(bins[-1]) + 1
    edges = np.linspace(-1, 1, BINS + 1)[first : last + 1]
    left.stairs(found.histogram[first:last], edges, fill=True, color="#b9c4d0", label="candidates")
    left.stairs(found.chosen_histogram[first:last], edges, fill=True, color="#c8553d", label="proxy")
    left.axvline(choice.cutoff, color="black", linewidth=1, linestyle="--", label=f"cut-off {choice.cutoff:.3f}")
    left.set_yscale("log")
    random = scorer.scoring.encoder is None
    left.set(xlabel="hash of the text" if random else "largest cosine similarity to a benchmark item", ylabel="tokens")
    out = f"; {found.overlapping:,} documents with benchmark text kept out" if found.overlapping else ""
    left.set_title(f"proxy: {len(choice.chosen):,} documents, {choice.tokens:,} tokens{out}", fontsize=10)
    left.legend()
    y = np.arange(len(names))
    right.barh(y + 0.2, before[order] * 100, height=0.38, color="#b9c4d0", label="candidates")
    right.barh(y - 0.2, after[order] * 100, height=0.38, color="#c8553d", label="proxy")
    right.set_yticks(y, [names[i] for i in order])
    right.set(xlabel="share of the tokens, percent", title="domains before and after")
    right.legend(loc="lower right")
    right.grid(axis="x", alpha=0.3)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
    return path
