"""The house's rules, checked on the syntax tree: who imports whom, where topology keys may stand, file sizes and names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gemcutter"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part of the package and the parts it may import; `errors` may be imported by all.
MAY_IMPORT = {
    "errors": set(),
    "shard": set(),
    "param_spec": {"shard"},
    "layer_params": {"param_spec", "plan"},  # plan for type checking only
    "plan": {
        "shard",
        "param_spec",
        "layer_params",
        "config",
    },  # config for type checking only, see test_plan_is_standard_library_only
    "config_keys": set(),
    "tower_config": {"config_keys"},
    "tower_plan": {"plan", "param_spec", "tower_config", "config"},  # config for type checking only
    "config": {"config_keys", "tower_config"},
    "native": set(),
    "media": set(),
    "media_parts": {"media", "text"},
    "scoring": {"engine"},
    "media_reader": {"media", "media_parts", "model", "engine", "text", "tower_plan"},
    "sidecar": set(),
    "gc_pause": set(),
    "cores": set(),
    "numa": set(),
    "quant_names": set(),
    "quant": {"native", "numa", "quant_names"},
    "ops": {"shard", "plan", "param_spec", "tower_plan", "quant", "native", "cores"},
    "load_options": {"ops", "quant_names", "engine"},
    "parallel": {"native", "numa", "plan", "shard", "ops", "cache", "model", "quant", "load_options"},
    "rank_process": {"load_options", "loading", "ops", "parallel", "shard"},
    "loading": {
        "shard",
        "parallel",
        "media",
        "load_options",
        "plan",
        "param_spec",
        "tower_plan",
        "checkpoint",
        "engine",
        "model",
        "ops",
        "quant",
    },
    "model": {"plan", "param_spec", "tower_plan", "quant", "ops"},
    "cache": {"plan", "param_spec", "ops"},
    "engine": {"plan", "param_spec", "model", "cache", "ops"},
    "checkpoint": {
        "shard",
        "plan",
        "param_spec",
        "tower_plan",
        "tower_config",
        "config",
        "quant",
        "quant_names",
        "native",
        "sidecar",
    },
    "text": {"sidecar"},
    "generation_config": {"config", "engine", "text"},
    "completion": {"engine", "text"},
    "generate_options": {"engine", "media", "text"},
    "constrained": {"engine", "text"},
    "api": {
        "media",
        "media_parts",
        "media_reader",
        "load_options",
        "loading",
        "checkpoint",
        "engine",
        "model",
        "text",
        "text_assets",
        "vocabulary_cache",
        "completion",
        "constrained",
        "gc_pause",
        "generate_options",
        "scoring",
        "tools",
    },
    "tools": {"text", "completion"},  # completion for type checking only
    "vocabulary_cache": {"checkpoint", "text"},
    "text_assets": {"checkpoint", "text", "generation_config", "sidecar", "vocabulary_cache"},
    "evals": {"api", "completion", "engine", "generate_options", "load_options", "parity", "scoring", "text", "tools"},
    "parity": {"plan", "param_spec", "checkpoint", "quant", "ops", "cache", "engine", "model", "api", "native"},
    "benchmark": {
        "parallel",
        "shard",
        "cores",
        "plan",
        "param_spec",
        "checkpoint",
        "quant",
        "ops",
        "cache",
        "engine",
        "model",
        "load_options",
        "loading",
        "native",
        "config",
    },
    "bench_serve": {"text"},  # for type checking only: a client of servers, which knows no engine
    "cli": {
        "bench_serve",
        "load_options",
        "quant_names",
        "plan",
        "param_spec",
        "tower_plan",
        "checkpoint",
        "ops",
        "text",
        "text_assets",
        "api",
        "parity",
        "benchmark",
        "engine",
        "cores",
        "gc_pause",
        "generate_options",
        "evals",
        "media",
        "media_parts",
        "native",
        "ray",
        "server",
        "tools",
        "parallel",
        "rank_process",
    },
    "server": {"api", "completion", "engine", "generate_options", "media", "media_parts", "text"},
    "ray": {"api", "load_options", "server"},
    "__main__": {"cli"},
    "__init__": {"api", "engine", "completion", "gc_pause", "generate_options", "scoring", "text"},
}
SYNTH = ("synth.py", "synth_assistant.py")  # write configs in the foreign spelling
TOPOLOGY_KEYS = ("num_kv_shared_layers", "attention_k_eq_v", "layer_types", "use_double_wide_mlp", "global_head_dim")
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
VAGUE_CLASSES = ("Manager", "Handler", "Helper", "Impl", "Wrapper", "Base")
BASES = {"Protocol", "Enum", "Exception", "GemcutterError", "Module", "Structure", "TypedDict"}  # a Structure is a C struct
BASES |= {"TemplateError", "Extension", "ImmutableSandboxedEnvironment"}  # how jinja2 is extended
BASES |= {"BaseModel", "SamplingFields", "StreamingResponse", "Server"}  # bodies of requests; starlette's and uvicorn's
BASES |= {"AsyncNetworkBackend"}  # how httpcore is told what to connect to
BASES |= {"TemplateLM"}  # what lm-eval's models are
BASES |= {"ValueError"}  # what callers expect of a bad argument


def part_of(path: Path) -> str:
    """Return the part of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "gemcutter" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("gemcutter.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_house(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part, "errors", "__version__"}
    assert imported_parts(path) <= allowed


def test_formats_know_of_each_other_only_the_plainest() -> None:
    """MLX and compressed-tensors files carry Hugging Face names with other endings; a format's towers may know its decoder."""
    for path in (PACKAGE / "checkpoint" / "formats").glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and "checkpoint.formats" in (node.module or ""):
                own = path.stem.removesuffix("_towers")
                known = {"hf", "hf_towers", own} if own != "gguf" else {"hf", own}
                assert {name.name for name in node.names} <= known or node.module == "gemcutter.checkpoint.formats.hf", path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_topology_keys_stand_in_one_place(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.name in ("config.py", "tower_config.py", "plan.py", *SYNTH) or "formats" in relative.parts:
        return  # synth writes configs in the foreign spelling; towers repeat a key of the decoder
    text = path.read_text()
    assert not [key for key in TOPOLOGY_KEYS if key in text]


@pytest.mark.parametrize("path", sorted([*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]), ids=str)
def test_files_are_short_and_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600
    assert path.stem not in VAGUE_NAMES


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports files without a package by their names alone, and refuses the second of two."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_classes_are_documented_and_plain(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(VAGUE_CLASSES) or node.name == "KernelImpl", node.name
            bases = {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases}
            assert bases <= BASES, f"{node.name} inherits from {bases - BASES}"


def test_transformers_is_never_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("transformers", "mlx", "mlx_lm", "peft", "llama_cpp")], (
                path
            )


@pytest.mark.parametrize(
    "module",
    [
        "gemcutter",
        "gemcutter.plan",
        "gemcutter.tower_plan",
        "gemcutter.config",
        "gemcutter.checkpoint.load.match",
        "gemcutter.ops.registry",
    ],
)
def test_headers_and_plans_need_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("plan.py", {"gemcutter.errors", "gemcutter.layer_params", "gemcutter.param_spec", "gemcutter.shard"}),
        ("layer_params.py", {"gemcutter.param_spec"}),
        ("param_spec.py", {"gemcutter.shard"}),
        ("shard.py", {"gemcutter.errors"}),
        ("tower_plan.py", {"gemcutter.errors", "gemcutter.param_spec", "gemcutter.tower_config"}),
        ("tower_config.py", {"gemcutter.errors", "gemcutter.config_keys"}),
    ],
)
def test_plan_is_standard_library_only(module: str, imported: set[str]) -> None:
    tree = ast.parse((PACKAGE / module).read_text())
    direct = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or "" for node in direct}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"gemcutter"}
    assert {name for name in names if name.startswith("gemcutter")} == imported


PUBLIC = (
    "api.py",
    "completion.py",
    "generate_options.py",
    "engine/request.py",
    "engine/sampling.py",
    "engine/loop.py",
    "engine/engine.py",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_parameter_of_the_public_api_is_of_any_kind(name: str) -> None:
    """Options are typed: neither a public function nor an alias or a TypedDict that it uses says Any."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        said: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            said = [each.annotation for each in every if each is not None]
        elif isinstance(node, ast.ClassDef):
            said = [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("Message", "Prompt"):
            said = [node.value]
        names = {each.id for one in said if one is not None for each in ast.walk(one) if isinstance(each, ast.Name)}
        assert "Any" not in names, f"{name}: {getattr(node, 'name', 'an alias')}"


@pytest.mark.parametrize("name", [path.name for path in sorted((PACKAGE / "engine").glob("*.py"))])
def test_nothing_happens_when_an_object_dies(name: str) -> None:
    """The collector runs anywhere, in the middle of a step too; a finalizer posts a note to the engine's inbox at most."""
    for path in (PACKAGE / "engine" / name, PACKAGE / "completion.py", PACKAGE / "api.py"):
        assert "__del__" not in path.read_text()


# Each package of checkpoint/ and those that it may import, besides itself.
CHECKPOINT_MAY_IMPORT = {
    "container": set(),
    "formats": {"container"},
    "load": {"container", "formats"},
    "write": {"container", "formats", "remote"},  # remote: the demo's folder, whose tokenizer random checkpoints get
    "convert": {"container", "formats", "load", "write"},
    "remote": {"container"},
    "doctor": {"container", "formats", "load", "remote"},
}


@pytest.mark.parametrize("package", CHECKPOINT_MAY_IMPORT)
def test_checkpoint_packages_are_layers(package: str) -> None:
    for path in (PACKAGE / "checkpoint" / package).rglob("*.py"):
        found = {name.split(".")[2] for name, _ in imported_modules(path) if name.startswith("gemcutter.checkpoint.")}
        assert found <= CHECKPOINT_MAY_IMPORT[package] | {package}, path


def imported_modules(path: Path) -> list[tuple[str, bool]]:
    """Return the gemcutter modules that a file imports, each with whether the import runs when the file itself is imported."""
    modules = {module_name(each) for each in FILES}
    found = list[tuple[str, bool]]()

    def visit(node: ast.AST, is_run: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            while name and name not in modules:  # a function or class of a module
                name = name.rpartition(".")[0]
            if name:
                found.append((name, is_run))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            is_run = False
        for child in ast.iter_child_nodes(node):
            visit(child, is_run and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), True)
    return found


def module_name(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for type checking alone are exempt: they do not run when a module is imported."""
    graph = {module_name(path): {name for name, is_run in imported_modules(path) if is_run} for path in FILES}
    for name, found in graph.items():
        found.discard(name)
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"modules that import each other: {sorted(graph)}"


BACKENDS = ("cpu", "triton", "torch")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_backends_are_imported_by_the_registry_alone(path: Path) -> None:
    """Whoever wants kernels asks `registry`; a backend knows its own modules and `ops/torch`, the fallback."""
    relative = path.relative_to(PACKAGE)
    if relative == Path("ops/registry.py"):
        return
    own = relative.parts[1] if relative.parts[0] == "ops" and len(relative.parts) > 2 else None
    found = {name.split(".")[2] for name, _ in imported_modules(path) if name.startswith("gemcutter.ops.")} & set(BACKENDS)
    assert found <= ({own, "torch"} if own else set())


# What decides how layers differ. Elsewhere a layer's own plan is asked: `layer.kind`, `layer.writes`, `layer.drops_rows`.
LAYER_ARITHMETIC = re.compile(
    r"\b(first_reader|last_writer|num_kv_shared_layers)\b|\.index\s*(?:[-+<>]|[!=]=)|len\(\w*\.?layers\)\s*-"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layer_arithmetic_stands_in_the_plan_alone(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    if relative.name in ("plan.py", "config.py") or "formats" in relative.parts or relative.name in SYNTH:
        return  # configs spell what the plan decides; formats and synth write them
    found = [line.strip() for line in path.read_text().splitlines() if LAYER_ARITHMETIC.search(line)]
    assert [line for line in found if line not in ALLOWED_LINES] == []


ALLOWED_LINES = {
    '"first_reader": plan.first_reader,',  # inspect prints it
}
