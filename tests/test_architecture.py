"""Imports point one way: commands, interpretation or distillation, training, text, model; and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"run_language_modeling", "distill_from_bert", "interpret_lambdas", "export_model"}
PARTS = tuple(f"lambdabert.{part}" for part in ("text", "training", "distillation", "interpretation", "deployment"))
# what each part must not know of
ABOVE = {
    "lambdabert.command_line": (*PARTS, "lambdabert.saved_models"),
    "lambdabert.saved_models": PARTS,
    "lambdabert.text": PARTS[1:],
    "lambdabert.training": PARTS[2:],
    "lambdabert.distillation": PARTS[3:],
    "lambdabert.interpretation": ("lambdabert.training", "lambdabert.distillation", "lambdabert.deployment"),
    "lambdabert.deployment": (
        "lambdabert.text",
        "lambdabert.training",
        "lambdabert.distillation",
        "lambdabert.interpretation",
    ),
}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in [*ROOT.glob("*.py"), *(ROOT / "lambdabert").rglob("*.py")]}


def imports_of(module):
    """The modules of the project that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                file = MODULES[module].relative_to(ROOT)
                source = ".".join([*file.parts[: -node.level], *filter(None, [node.module])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {module}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - COMMANDS))
def test_imports_point_one_way(module):
    imported = imports_of(module)
    assert not imported & COMMANDS
    if not module.startswith("lambdabert"):
        assert not any(name.startswith("lambdabert") for name in imported), "a saved model carries no package"
    for part, above in ABOVE.items():
        if module.startswith(part):
            assert not any(name.startswith(above) for name in imported)


def test_no_circle_of_imports():
    done, ongoing = set(), []

    def visit(module):
        assert module not in ongoing, " -> ".join([*ongoing[ongoing.index(module) :], module])
        if module not in done:
            ongoing.append(module)
            for name in sorted(imports_of(module)):
                visit(name)
            done.add(ongoing.pop())

    for module in MODULES:
        visit(module)
    assert done == MODULES.keys()
