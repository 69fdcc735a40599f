"""The import directions of the rooms, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_opus"
MAX_LINES = 400
LONGER: dict[str, int] = {}  # known exceptions: a limit of their own, so that they do not grow
MAX_TOOL_LINES = 20

# A room may import itself and every room of an earlier line; rooms of one line do not know each other.
ORDER = (
    ("errors",),
    ("files", "nested", "rows"),
    ("config",),
    ("types",),
    ("layout",),
    ("selection", "data"),
    ("scoring", "backends"),
    ("runs", "estimates", "api", "style"),
    ("ranks",),
    ("weights", "report", "cluster", "studies"),
    ("training", "evaluation", "corpus_scores"),
    ("integrations",),
    ("cli",),
)
MAY_IMPORT = {
    room: {room, *(earlier for line in ORDER[:number] for earlier in line)}
    for number, line in enumerate(ORDER)
    for room in line
} | {
    "__init__": {"api"},
    "__main__": {"cli"},
    "data": {"data", "config", "types", "errors", "files", "rows"},
    "scoring": {"scoring", "selection", "layout", "config", "types", "errors"},  # it reads batches, not corpora
}
# Attributes by which the hosts' own engines, optimizers and partitioned parameters are known. Only the engine's folder
# reads them: what else would is the trainer learning again which engine it runs on. A list of names, since the type of
# an object cannot be seen in the source; names that other objects have too (`module`, `optimizer`) are not in it.
HOST_ATTRIBUTES = {
    "deepspeed": {
        *(
            "zero_optimization_stage",
            "gradient_accumulation_steps",
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
        ),
        *("save_checkpoint", "load_checkpoint", "get_lr", "get_global_grad_norm", "was_step_applied", "lr_scheduler"),
        *(
            "train_batch_size",
            "global_steps",
            "skipped_steps",
            "micro_steps",
            "step_settings",
            "deepspeed",
            "bit16_groups",
            "fp32_groups",
        ),
        *("fp32_groups_flat", "single_partition_of_fp32_groups", "params_in_partition", "_hp_mapping"),
        *("ds_id", "ds_shape", "ds_numel", "ds_tensor", "ds_process_group", "use_muon"),
    },
    "megatron": {
        *("chained_optimizers", "model_param_gbuf_map", "gbuf_ranges", "model_param_group_index_map", "main_param"),
        *("float16_groups", "fp32_from_float16_groups", "ddp_config", "main_grad", "bucket_groups", "opt_group_ranges"),
        *("disable_forward_pre_hook", "enable_forward_pre_hook", "finalize_model_grads_func", "grad_sync_func"),
    },
}
HOSTS = ("megatron", "deepspeed")  # one room alone speaks to them, so that a new version of theirs is one room's work
# Training loops that are not ours, and the room that wraps their functions. The layers, optimizers and datasets below
# them are megatron.core's, which stays with backends.
LOOPS = {"integrations": ("megatron.training", "megatron.bridge")}
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}
CONTAINERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "deque", "Counter", "Generator", "default_rng"}


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def attribute_faults(path: tuple[str, ...], tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes of a host's own objects, read as `x.name` or by `getattr(x, "name")`, outside that engine's folder."""
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else ""
        for host, names in HOST_ATTRIBUTES.items():
            if name in names and path[1:4] != ("backends", "engines", host):
                yield node.lineno, f"reads `{name}` of {host}'s engine: only backends/engines/{host} may"


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def import_faults(room: str, tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    if room not in MAY_IMPORT:
        yield 1, f"a new room `{room}`: say in MAY_IMPORT what it may import"
        return
    for line, name in imported(tree, package):
        wrapped = any(under(name, loop) for loop in LOOPS.get(room, ()))
        if any(under(name, host) for host in HOSTS) and room != "backends" and not wrapped:
            yield line, f"{room} imports {name}: only backends may"
        if under(name, "torch.distributed") and room == "selection":
            yield line, f"selection uses {name}: it is plain tensor code"
        if any(under(name, other) for other in ("tools", "tests", "launch")):
            yield line, f"{room} imports {name}: nothing in the package may"
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in MAY_IMPORT[room] | {"__version__"}:
            allowed = ", ".join(sorted(MAY_IMPORT[room] - {room})) or "nothing local"
            yield line, f"{room} imports {name}: it may import {allowed}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The first circle of imports, as the modules along it; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, inside functions and for types too."""
    files = {path.relative_to(root).with_suffix("").parts: path for path in (root / PACKAGE).rglob("*.py")}
    names = {".".join(p[:-1] if p[-1] == "__init__" else p) for p in files}
    graph: dict[str, set[str]] = {}
    for parts, path in files.items():
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = {name for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), list(parts[:-1]))}
        targets = {name if name in names else name.rpartition(".")[0] for name in found}
        graph[module] = {name for name in targets if name in names and name not in (module, PACKAGE)}
    return graph


def state_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`global`, and module-level containers that are lower case, start empty or are changed later (a heuristic)."""
    held: dict[str, int] = {}
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        call = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
        empty = isinstance(value, ast.Dict | ast.List) and not ast.unparse(value).strip("{}[]")
        mutable = isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)
        for target in targets:
            if isinstance(target, ast.Name) and not target.id.startswith("__") and (mutable or call in CONTAINERS):
                held[target.id] = node.lineno
                if empty or call in CONTAINERS or not target.id.isupper():
                    yield node.lineno, f"module-level mutable state `{target.id}`: pass it in, or make it a tuple"
    for inner in ast.walk(tree):
        name = None
        if isinstance(inner, ast.Global):
            yield inner.lineno, f"global {', '.join(inner.names)}: pass it in"
        elif isinstance(inner, ast.Subscript) and isinstance(inner.ctx, ast.Store | ast.Del):
            name = ast.unparse(inner.value)
        elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr in MUTATORS:
            name = ast.unparse(inner.func.value)
        if name in held:
            yield inner.lineno, f"module-level `{name}` is changed here: pass it in"


def faults(root: Path) -> list[str]:
    """Everything under `root` that breaks the house rules, as `file:line: what`."""
    found = []

    def note(path: Path, line: int, what: str) -> None:
        found.append(f"{path.relative_to(root)}:{line}: {what}")

    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found_here = (
            *import_faults(module[1], tree, list(module[:-1])),
            *state_faults(tree),
            *attribute_faults(module, tree),
        )
        for fault in found_here:
            note(path, *fault)
    for path in sorted((root / "tools").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_TOOL_LINES:
            note(path, MAX_TOOL_LINES, f"a tool of more than {MAX_TOOL_LINES} lines: the work belongs in the package")
        for line, name in imported(ast.parse(text), ["tools"]):
            if any(under(name, other) for other in (*HOSTS, "torch.distributed")):
                note(path, line, f"a tool imports {name}: tools are thin, the package does the work")
    if around := circle(import_graph(root)):
        found.append("a circle of imports: " + " -> ".join(around))
    for folder in (PACKAGE, "tools", "tests", "launch"):
        for path in sorted((root / folder).rglob("*")):
            limit = LONGER.get(path.relative_to(root).as_posix(), MAX_LINES)
            if path.suffix in (".py", ".sh") and len(path.read_text(encoding="utf-8").splitlines()) > limit:
                note(path, limit, f"longer than {limit} lines: split it")
    return found


def test_the_checkout_keeps_the_rules() -> None:
    """Guards against a short cut between rooms, which makes the method untestable without the host frameworks."""
    assert not faults(ROOT), "\n" + "\n".join(faults(ROOT))


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("megatron_opus/selection/a.py", "import torch.distributed as dist", "selection uses torch.distributed"),
        ("megatron_opus/selection/a.py", "from torch import distributed", "selection uses torch.distributed"),
        ("megatron_opus/selection/a.py", "import torch\nx = torch.distributed.get_rank()", "a.py:2: selection uses"),
        ("megatron_opus/selection/a.py", "def f():\n    import deepspeed", "a.py:2: selection imports deepspeed"),
        ("megatron_opus/selection/s/a.py", "from ...scoring import capture", "imports megatron_opus.scoring.capture"),
        (
            "megatron_opus/scoring/a.py",
            "from megatron_opus.data import buffer",
            "it may import config, errors, layout, selection",
        ),
        ("megatron_opus/data/a.py", "from megatron.core import datasets", "only backends may"),
        ("megatron_opus/training/a.py", "from deepspeed import comm", "only backends may"),
        ("megatron_opus/training/a.py", "from megatron.training import get_args", "only backends may"),
        ("megatron_opus/integrations/a.py", "from megatron.core import mpu", "only backends may"),
        ("megatron_opus/training/a.py", "from megatron_opus.integrations import b", "megatron_opus.integrations.b: it"),
        ("megatron_opus/training/a.py", "importlib.import_module('megatron.core')", "only backends may"),
        (
            "megatron_opus/backends/a.py",
            "from megatron_opus import training",
            "backends imports megatron_opus.training",
        ),
        (
            "megatron_opus/config/recipe.py",
            "from megatron_opus import types",
            "it may import errors, files",
        ),
        ("megatron_opus/training/a.py", "import tools.report", "nothing in the package may"),
        ("megatron_opus/attic/a.py", "", "a new room `attic`"),
        (
            "megatron_opus/training/a.py",
            "x = 1\nengine.global_steps",
            "a.py:2: reads `global_steps` of deepspeed's engine",
        ),
        ("megatron_opus/scoring/a.py", "getattr(p, 'ds_shape', 0)", "a.py:1: reads `ds_shape` of deepspeed's engine"),
        ("megatron_opus/backends/engines/deepspeed/a.py", "p.main_grad", "reads `main_grad` of megatron's engine"),
        ("megatron_opus/data/a.py", "CACHE = {}", "module-level mutable state `CACHE`"),
        ("megatron_opus/data/a.py", "cache: dict = {'a': 1}", "module-level mutable state `cache`"),
        ("megatron_opus/data/a.py", "RNG = torch.Generator()", "module-level mutable state `RNG`"),
        ("megatron_opus/data/a.py", "T = {'a': 1}\ndef f():\n    T['b'] = 2", "a.py:3: module-level `T` is changed"),
        ("megatron_opus/data/a.py", "T = [1]\ndef f():\n    T.append(2)", "a.py:3: module-level `T` is changed"),
        ("megatron_opus/data/a.py", "N = 0\ndef f():\n    global N\n    N += 1", "a.py:3: global N"),
        ("megatron_opus/data/a.py", "#\n" * 401, "longer than 400 lines"),
        ("tests/a.py", "#\n" * 401, "longer than 400 lines"),
        ("tools/a.py", "#\n" * 21, "the work belongs in the package"),
        ("tools/a.py", "import deepspeed", "tools are thin"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, path: str, source: str, expected: str) -> None:
    """Guards against a checker that finds nothing because it looks at nothing."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert expected in "\n".join(faults(tmp_path))


def test_a_circle_is_caught(tmp_path: Path) -> None:
    """Guards against two files that need each other, one of them perhaps inside a function or for its types only."""
    folder = tmp_path / "megatron_opus" / "data"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from megatron_opus.data import b")
    (folder / "b.py").write_text("def f():\n    from megatron_opus.data.c import g")
    (folder / "c.py").write_text("import megatron_opus.data.a")
    circle = "megatron_opus.data.a -> megatron_opus.data.b -> megatron_opus.data.c -> megatron_opus.data.a"
    assert faults(tmp_path) == [f"a circle of imports: {circle}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_opus/selection/a.py", "import torch\nfrom megatron_opus.config import SelectionConfig"),
        ("megatron_opus/scoring/a.py", "import torch.distributed as dist\nfrom megatron_opus.selection import sketch"),
        ("megatron_opus/backends/a.py", "import deepspeed\nfrom megatron.core import parallel_state"),
        ("megatron_opus/backends/engines/deepspeed/a.py", "engine.global_steps - engine.skipped_steps"),
        ("megatron_opus/data/a.py", "NAMES = ('a', 'b')\nTABLE = {'a': 1}\ndef f(x):\n    x['b'] = TABLE['a']"),
        ("megatron_opus/training/a.py", "from megatron_opus import api\nfrom megatron_opus.backends import layers"),
        ("megatron_opus/integrations/a.py", "import megatron.training.training\nfrom megatron_opus import training"),
        ("tools/a.py", "from megatron_opus.data.prepare.pipeline import prepare"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    """Guards against rules so wide that they forbid what the house is built for."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert not faults(tmp_path)
