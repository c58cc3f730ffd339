"""Options as JSON: recipes, the types of their values, and the objects that single options hold."""

import json
import types
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

NAMED_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
# a string that is not a JSON object names a file of one
OBJECTS_IN_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
OBJECTS_IN_TEXT = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


class Option(NamedTuple):
    """What is known of an option.

    Attributes:
        type: its type hint.
        default: its value where it is not given.
        choices: the strings that it is limited to; empty: its type alone decides.
    """

    type: Any
    default: Any
    choices: tuple[str, ...]


def read_recipe(file: str, options: dict[str, Option]) -> dict[str, Any]:
    """Reads the options of a JSON file; null stands for an option that is not given, if it may be None.

    Args:
        file: path of the recipe.
        options: the options of the command, by name.

    Raises:
        ValueError: the file cannot be read, names an unknown option or one twice, or a value is of another type.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice")
        return dict(pairs)

    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object; it should map option names to values.")
    unknown = sorted(set(values) - set(options))
    if unknown:
        raise ValueError(f"{file} has unknown options: {', '.join(unknown)} (--help lists all options).")
    for name, value in values.items():
        option = options[name]
        if not fits(value, option.type):
            raise ValueError(
                f"{file}: {name} is {json.dumps(value)}, but it takes {name_type(option.type)}; correct or drop it."
            )
        if option.choices and value is not None and value not in option.choices:
            raise ValueError(f"{file}: {name} is {json.dumps(value)}; use one of {', '.join(option.choices)}.")
    return {name: as_list(value, options[name].type) for name, value in values.items() if value is not None}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list


def as_list(value: Any, hint: Any) -> Any:
    """A single string as a list, where an option takes nothing but lists."""
    only_lists = isinstance(value, str) and str not in _alternatives(hint) and any(map(_is_list, _alternatives(hint)))
    return [value] if only_lists else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type that a dataclass names."""
    if len(_alternatives(hint)) > 1:
        return any(fits(value, alternative) for alternative in _alternatives(hint))
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if _is_list(hint):
        return isinstance(value, str) or (
            isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [choice.value for choice in hint]
    return isinstance(value, get_origin(hint) or hint)


def name_type(hint: Any) -> str:
    """A type as people call its JSON values."""
    names = []
    for alternative in _alternatives(hint):
        if _is_list(alternative):
            names.append("a list of strings")
        elif (get_origin(alternative) or alternative) is dict:
            names.append("an object")
        else:
            names.append(NAMED_TYPES.get(alternative, "a string"))
    names = list(dict.fromkeys(name for name in names if name != "null"))
    return " or ".join(names)


def floats_in(value: Any) -> Iterable[float]:
    """All numbers within a JSON value but whole ones, which are finite."""
    if isinstance(value, float):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from floats_in(item)


def read_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that an option holds as text or names as a file.

    Raises:
        ValueError: there is no such object.
    """
    kind = "a JSON object or a file of one" if name in OBJECTS_IN_FILES else "a JSON object"
    try:
        is_file = not text.startswith("{") and name in OBJECTS_IN_FILES
        value = json.loads(Path(text).read_text(encoding="utf-8") if is_file else text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}={text!r} must be {kind} ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r} must be {kind}.")
    return value


def parse_overrides(overrides: str | dict[str, Any] | None) -> dict[str, Any]:
    """Turns "a=1,b=rms,c=None" into a dict; a value that is not JSON stays a string.

    Raises:
        ValueError: an item is not of the form "field=value", or names a field a second time.
    """
    if not isinstance(overrides, str):
        return dict(overrides or {})
    values: dict[str, Any] = {}
    for item in filter(None, overrides.split(",")):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not name:
            raise ValueError(
                f'config_overrides: {item!r} is not of the form "field=value"; separate several with commas.'
            )
        if name in values:
            raise ValueError(f"config_overrides: {name} is given twice; keep one.")
        try:
            values[name] = json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
        except ValueError:
            values[name] = text
    return values
