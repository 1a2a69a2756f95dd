"""The options of a training run as a TOML file: read, merged with those of the command line, and written.

Keys are the options' names without the dashes (n_layer for --n-layer). What the command line says goes before the file, the
file before the recipe, and the recipe before the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptfast._files import atomic_write, read_toml
from gptfast._options import default_of, default_text, options_of, values_of
from gptfast._other_names import likely
from gptfast.config import GPTConfig
from gptfast.data.options import DataOptions
from gptfast.training.config import TrainConfig
from gptfast.training.options import DATA, SHAPE, RunOptions, Weights, check_effect, defaults_of
from gptfast.training.recipes import recipe, recipe_options

NAME = "config.toml"
_PLACE = ("resume", "overwrite", "config", "print_config")  # of one start of a run, not of the run
_TABLES: dict[str, tuple[type, tuple[str, ...]]] = {
    "data": (DataOptions, DATA),
    "model": (Weights, tuple(options_of(Weights))),
    "shape": (GPTConfig, SHAPE),
    "training": (TrainConfig, tuple(name for name in options_of(TrainConfig) if name != "block_size")),
    "run": (RunOptions, tuple(name for name in options_of(RunOptions) if name not in _PLACE)),
}
"""The comment above a group of keys, the class that describes them, and the keys."""


def merged_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run: those given, then those of their file (`config`), then those of the recipe.

    Raises:
        OSError, ValueError, TypeError: the file, or a key or value in it, is wrong; an unknown recipe.
    """
    options = dict(given)
    if path := options.pop("config", None):
        options = {**read_options(Path(path)), **options}
    if name := options.get("recipe"):
        options = recipe_options(name, options)
    return options


def read_options(path: Path) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: not TOML, a key that no option has, or an option of one start only, such as resume.
        TypeError: a value of the wrong type.
    """
    found = read_toml(path)
    owners = {name: owner for owner, names in _TABLES.values() for name in names}
    for key, value in found.items():
        if key in _PLACE:
            raise ValueError(f"{path}: {key} is of one start of a run; give `{key}` on the command line")
        if key not in owners:
            near = likely(key, owners)
            hint = f"did you mean {' or '.join(near)}?" if near else "gptfast train --print-config shows all keys"
            raise ValueError(f"{path}: unknown key {key}; {hint}")
        found[key] = _typed(path, key, value, owners[key])
    return found


def _typed(path: Path, key: str, value: Any, owner: type) -> Any:
    """The value in the type of its option: a path for a text, a float for a whole number."""
    types = {"int": int, "float": (int, float), "bool": bool, "str": str, "Path": str, "list": list}
    hint = re.findall("|".join(types), str(owner.__dataclass_fields__[key].type))[0]
    wanted = types[hint]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        name = (
            "list of texts"
            if wanted is list
            else {"str": "text", "Path": "text", "bool": "true or false"}.get(hint, hint)
        )
        raise TypeError(f"{path}: {key} is {value!r}; expected {name}")
    return Path(str(value)) if hint == "Path" else float(value) if hint == "float" else value


def write_options(options: Mapping[str, Any], path: Path) -> None:
    """Write the whole configuration of a run to a file, as `whole_options` has it."""
    atomic_write(path, whole_options(options).encode())


def whole_options(options: Mapping[str, Any]) -> str:
    """Every option of a run as TOML: those given, the defaults, and as comments those without a value.

    Args:
        options: as `merged_options` returns them.
    Raises:
        TypeError, ValueError: an option is wrong, or two contradict each other.
    """
    import tomlkit

    values = _values(options)
    document = tomlkit.document()
    document.add(
        tomlkit.comment(
            "A run of gptfast train: gptfast train --config THIS_FILE. Options given beside it go before it."
        )
    )
    if name := options.get("recipe"):
        for line in (f"Recipe {name}: {recipe(name).source}.", *recipe(name).notes):
            document.add(tomlkit.comment(line))
    for title, (owner, names) in _TABLES.items():
        document.add(tomlkit.nl())
        document.add(tomlkit.comment(f"{title}"))
        for key in names:
            value = values.get(key)
            if value is None:
                document.add(tomlkit.comment(f"{key} = ({default_text(options_of(owner)[key], None) or 'none'})"))
            else:
                document.add(key, str(value) if isinstance(value, Path) else value)
    return tomlkit.dumps(document)


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all keys."""
    chosen = {**defaults_of(options), **options}
    if chosen.get("max_minutes") is not None and "max_steps" not in options:
        chosen["max_steps"] = None
    train = TrainConfig(
        **{name: value for name, value in values_of(TrainConfig, chosen).items() if name != "block_size"}
    )
    RunOptions(**values_of(RunOptions, options))
    check_effect(options)
    if "preset" in options:
        shape = GPTConfig.preset(options["preset"], **{n: options[n] for n in SHAPE if n in options})
        chosen = {**{name: getattr(shape, name, None) for name in SHAPE}, "dropout": shape.resid_pdrop, **chosen}
    elif "init_from" not in options:
        GPTConfig(**{name: chosen[name] for name in SHAPE if name in chosen})
    defaults = {
        name: default_of(owner, name) for owner, names in _TABLES.values() for name in names if owner is not GPTConfig
    }
    return {
        **defaults,
        **chosen,
        **vars(train),
        "min_lr": float(f"{train.lowest_rate:g}"),
        "block_size": chosen.get("block_size"),
    }
