"""From plain configuration to objects, without trusting the configuration.

A configuration may come from a checkpoint that a stranger made. So a `_target_` is followed only into packages that
are trusted (see `config.trust`), only to a class of the kind that is expected there, and only with arguments that the
class has; everything else is refused with one sentence that names the key.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from approx_attn.attention import AttentionMechanism, available_attention
from approx_attn.attention.registry import REPLACED_CLASSES, SHAPE_ARGUMENTS, without_replaced
from approx_attn.config.moved import present_places
from approx_attn.config.trust import OWN_PACKAGES, how_to_trust, is_trusted, plugins
from approx_attn.errors import ConfigError, suggestion

# Nodes inside other nodes: what may stand there, and which arguments others decide.
NESTED_KINDS: dict[str, tuple[type, Collection[str]]] = {"attention": (AttentionMechanism, SHAPE_ARGUMENTS)}


# Parts of this package whose classes check their arguments, in words of their own.
CHECKED_BY_THEMSELVES = ("approx_attn.attention", "approx_attn.data", "approx_attn.models", "approx_attn.run.tasks")


def build(node: Mapping[str, Any], key: str, kind: type, **given: Any) -> Any:
    """Build what a configuration node describes.

    Args:
        node: `_target_`: dotted path of a class; `_partial_: true`: return a factory instead; the rest are
            its keyword arguments. Nodes in it are built first.
        key: where the node stands in the configuration, for messages.
        kind: the class must be a subclass of this.
        given: arguments that the caller knows; the node may not set them.

    Raises:
        ConfigError: anything that the node says wrongly, down to values that the class refuses.
    """
    cls = target_class(node, key, kind)
    check_arguments(node, key, kind, given)
    node = _without_replaced(node, cls)
    check_types(node, key, cls)
    arguments = {name: _built(value, name, key) for name, value in node.items() if not _is_directive(name)}
    if node.get("_partial_"):
        return functools.partial(cls, **arguments, **given)
    try:
        return cls(**arguments, **given)
    except ConfigError:
        raise
    except ImportError:  # the caller knows what is to be installed
        raise
    except Exception as error:  # libraries refuse values with exceptions of their own
        raise ConfigError(sentence(error, key)) from error


def target_class(node: Mapping[str, Any], key: str, kind: type) -> type:
    """The class that `_target_` names.

    Raises:
        ConfigError: no such class, one outside the trusted packages, or one of another kind.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ConfigError(f"{key} must hold a _target_, the dotted path of a {kind.__name__}, got {node!r}.")
    found = _locate(target, key)
    trusted = isinstance(found, type) and is_trusted(found.__module__)
    if not trusted or not issubclass(found, kind):
        raise ConfigError(f"{key}._target_ must name a {kind.__name__}, got {target!r}.")
    return found


def check_arguments(node: Mapping[str, Any], key: str, kind: type, given: Iterable[str] = ()) -> None:
    """Refuse keys of a node that its class does not take, or that the caller decides."""
    cls = target_class(node, key, kind)
    parameters = inspect.signature(cls).parameters
    accepted = [
        name
        for name, parameter in parameters.items()
        if name not in given and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in _without_replaced(node, cls):
        if _is_directive(name) or name in accepted:
            continue
        if name in given or not takes_any:
            raise ConfigError(f"{key}.{name} is not an option of {display_name(cls)}{suggestion(name, accepted)}")


def require_plain_name(key: str, value: Any) -> str:
    """A value that becomes the name of a file or folder.

    Raises:
        ConfigError: it would lead to another folder.
    """
    name = str(value)
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or not name.isprintable():
        raise ConfigError(f"{key} must be a plain name, not a path, got {name!r}.")
    return name


def refuse_paths_outside(node: Mapping[str, Any], key: str) -> None:
    """Refuse options by which a callback or a logger would write outside the folder of its run.

    Raises:
        ConfigError: an absolute path, a local address, or a path that goes up.
    """
    for name, value in node.items():
        if not isinstance(value, str) or _is_directive(name):
            continue
        path = PurePath(value.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or value.startswith(("~", "file:")):
            raise ConfigError(f"{key}.{name} must stay inside the folder of the run, got {value!r}.")


def check_types(node: Mapping[str, Any], key: str, cls: type) -> None:
    """Refuse values of a type that a class does not expect; models, data and tasks of this package say more.

    Raises:
        ConfigError: names the key, what it got and what it accepts.
    """
    if cls.__module__.startswith(CHECKED_BY_THEMSELVES):
        return
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # annotations that name what is not imported
        return
    for name, value in node.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(f"{key}.{name} must be {_type_name(hints[name])}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand for an annotation; what is not plain is left to the class."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if isinstance(hint, type) and origin is None and hint is not object:
        return isinstance(value, hint)
    return isinstance(value, list | dict | tuple) or origin is None


def _type_name(hint: Any) -> str:
    """An annotation in the words of a configuration."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(each) for each in typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    words = {type(None): "null", float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def display_name(cls: type) -> str:
    """The name by which users know a class: its registry name if it is a mechanism."""
    return getattr(cls, "name", "") or cls.__name__ if issubclass(cls, AttentionMechanism) else cls.__name__


def sentence(error: BaseException, key: str) -> str:
    """The message of an error on one line, with the key in front unless it names one already."""
    text = " ".join(str(error).split()) or type(error).__name__
    group = key.split(".")[0]
    names_its_key = text.startswith((f"{group}.", f"{group}=", f"{group}:", "attention", "model.", "data."))
    return text if names_its_key else f"{key}: {text}"


def _built(value: Any, name: str, parent: str) -> Any:
    """An argument: nodes become objects, other containers are taken as they are."""
    if not isinstance(value, Mapping) or "_target_" not in value:
        return value
    if name not in NESTED_KINDS:
        raise ConfigError(f"{parent}.{name} may not hold a _target_, got {value['_target_']!r}.")
    kind, decided_by_others = NESTED_KINDS[name]
    check_arguments(value, name, kind, decided_by_others)
    return build(value, name, kind)


def _without_replaced(node: Mapping[str, Any], cls: type) -> Mapping[str, Any]:
    """A node without the options of earlier versions of its mechanism."""
    if not issubclass(cls, AttentionMechanism):
        return node
    try:
        return without_replaced(cls.name, node)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _locate(target: str, key: str) -> Any:
    if not is_trusted(target):
        allowed = ", ".join((*OWN_PACKAGES, *plugins()))
        how = how_to_trust(target.partition(".")[0])
        raise ConfigError(f"{key}._target_ must lie in one of the packages {allowed}, got {target!r}; {how}.")
    if target in REPLACED_CLASSES:
        name = REPLACED_CLASSES[target]
        raise ConfigError(f"attention={name} is unknown{suggestion(name, available_attention())}")
    for place in present_places(target):
        module, _, name = place.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ConfigError(f"{key}._target_ names nothing that can be imported, got {target!r}.")


def _is_directive(name: str) -> bool:
    return name in ("_target_", "_partial_")
