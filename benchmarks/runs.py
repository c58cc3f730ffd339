"""Recipes of many training runs, and the folders that keep the finished ones.

A recipe is a JSON object: options of a command that all its models share, `seeds`, and `models`, which maps a name to
an entry. The output folder of a recipe holds

    runs/KEY.json   a finished run; the key is a digest of all that decides it, so that it is not run again
    results.json    the summary: recipe, runs, and times, with the environment in which the times were taken
    table.md        the summary as a table; plots beside it
    work/           what the runs write while they train
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import write_json
from lambdabert.command_line import error_line

Recipe = dict[str, Any]
Run = dict[str, Any]


def digest(*values: object) -> str:
    """A name for what depends on these JSON values alone."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr where what the user gave is at fault: a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(error_line(error)) from None


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object: those that it must have, and those that it may have."""

    required: frozenset[str]
    optional: frozenset[str]

    def check(self, given: object, where: str) -> None:
        """Checks an object; `where` says in an error which one it is.

        Raises:
            ValueError: `given` is not an object, lacks a field, or has an unknown one.
        """
        if not isinstance(given, dict):
            raise ValueError(f"{where} should be a JSON object, not {given!r}.")
        if missing := sorted(self.required - set(given)):
            raise ValueError(f"{where} lacks {', '.join(missing)}.")
        if unknown := sorted(set(given) - self.required - self.optional):
            known = ", ".join(sorted(self.required | self.optional))
            raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}; known are {known}.")


def read_recipe(file: Path, fields: Fields, model_fields: Fields) -> Recipe:
    """Reads a recipe.

    Args:
        file: the recipe.
        fields: its own, beside `models` and `seeds`.
        model_fields: those of an entry of `models`.

    Raises:
        ValueError: it cannot be read, a field is missing or unknown, or no seed is given.
    """
    try:
        recipe = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}.") from None
    Fields(fields.required | {"models", "seeds"}, fields.optional).check(recipe, str(file))
    if not isinstance(recipe["models"], dict) or not recipe["models"]:
        raise ValueError(f"{file}: models should map at least one name to an entry.")
    for name, entry in recipe["models"].items():
        Fields(model_fields.required, model_fields.optional | {"seeds"}).check(entry, f"{file}: model {name!r}")
        if not entry.get("seeds", recipe["seeds"]):
            raise ValueError(f"{file}: model {name!r} has no seeds; give at least one.")
    return recipe


def seeds(recipe: Recipe, name: str) -> list[int]:
    """The seeds of a model: its entry's own, or the recipe's."""
    return recipe["models"][name].get("seeds", recipe["seeds"])


class RunFolder:
    """The output folder of one recipe.

    Args:
        path: the folder.
        recipe: what is to run.
        lists: fields of a model's entry that say how often it runs, and not what a run is.

    Raises:
        ValueError: the folder's summary is that of another recipe. A recipe may grow: what is recorded has to be in it.
    """

    def __init__(self, path: Path, recipe: Recipe, lists: Collection[str] = ("seeds",)):
        self.path, self.recipe, self.lists = path, recipe, lists
        self.summary: dict[str, Any] = {}
        file = path / "results.json"
        if file.exists():
            try:
                self.summary = json.loads(file.read_text(encoding="utf-8"))
                recorded = self.summary["recipe"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"output={path}: {file} is not a summary of a recipe; name another folder.") from None
            self._check_recorded(recorded)

    def _check_recorded(self, recorded: Recipe) -> None:
        def differ(what: str) -> ValueError:
            return ValueError(f"output={self.path} holds results of another recipe, whose {what}; name another folder.")

        for field in sorted((set(recorded) | set(self.recipe)) - {"models", "seeds"}):
            if recorded.get(field) != self.recipe.get(field):
                raise differ(f"{field} differs")
        for name, entry in recorded["models"].items():
            if name not in self.recipe["models"]:
                raise differ(f"model {name!r} this one lacks")
            if self._settings(entry) != self.settings(name):
                raise differ(f"model {name!r} has other settings")

    def _settings(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in entry.items() if field not in self.lists}

    def settings(self, name: str) -> dict[str, Any]:
        """What decides a run of a model, of its entry in the recipe."""
        return self._settings(self.recipe["models"][name])

    def selected(self, names: Sequence[str] | None) -> list[str]:
        """The models that a summary is to cover, in the recipe's order: the named ones and those it already has.

        Args:
            names: of models; None for all.

        Raises:
            ValueError: the recipe has no model of that name.
        """
        models = self.recipe["models"]
        if unknown := [name for name in names or () if name not in models]:
            raise ValueError(f"models={', '.join(unknown)}: not in the recipe, which has {', '.join(models)}.")
        wanted = set(models if names is None else names) | set(self.summary.get("runs", ()))
        return [name for name in models if name in wanted]

    def run(
        self, key: str, title: str, train: Callable[[Path], Run], complete: Callable[[Run], bool] = lambda run: True
    ) -> Run:
        """A finished run, trained now unless its record is there.

        Args:
            key: the digest of all that decides the run.
            title: what is printed when it starts.
            train: trains in the given folder and returns the record.
            complete: whether a record has everything that the recipe asks for.
        """
        file = self.path / "runs" / f"{key}.json"
        run = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if run is None or not complete(run):
            print(title, flush=True)
            run = train(self.path / "work" / key)
            write_json(file, run)
        return run

    def write_summary(self, summary: Mapping[str, Any], table: str) -> None:
        """Writes results.json and table.md, and prints the table."""
        write_json(self.path / "results.json", summary)
        (self.path / "table.md").write_text(table, encoding="utf-8")
        print(table)


def write_options(values: Mapping[str, Any], folder: Path) -> str:
    """Writes options of a command as the JSON file that it reads; returns its name."""
    write_json(folder / "recipe.json", values)
    return str(folder / "recipe.json")
