"""What a layer says about itself, as data: read from TOML and checked without importing the layer."""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any

API = 1  # the manifest format this layerzoo reads; a manifest that says more needs a newer layerzoo

DTYPES = ("float64", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# TOML has no null, so an option whose type includes "none" defaults to None when it states no default.
TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: isinstance(value, Integral) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, Real) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list | tuple),
    "none": lambda value: value is None,
}

_WORD = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
_NAME = re.compile(r"[a-z][a-z0-9_]*[/:][a-z][a-z0-9_]*", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DIM = re.compile(r"[A-Za-z_]\w*|[1-9][0-9]*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class ManifestError(ValueError):
    """A card or a manifest breaks the contract; the message names the key, what is allowed and what was got."""


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a layer comes from; ``catalogue`` is the paper's number in docs/catalogue.tsv, if it has one."""

    title: str
    year: int
    catalogue: int | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One constructor argument: ``type`` is one of TYPES or several joined by ``|``; ``default`` ... means required."""

    type: str
    default: Any = ...
    choices: tuple[Any, ...] = ()
    summary: str = ""

    @property
    def required(self) -> bool:
        return self.default is ...

    def accepts(self, value: Any) -> bool:
        """Whether the value is of an allowed type, and, if it is a string among choices, one of them."""
        fits = any(TYPES[kind](value) for kind in self.type.split("|"))
        return fits and (not self.choices or value in self.choices)

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        return f"one of {', '.join(map(repr, self.choices))}" if self.choices else self.type.replace("|", " or ")


@dataclass(frozen=True, slots=True)
class Sample:
    """What the conformance kit builds: a small configuration, and sizes for dimensions that it does not fix."""

    config: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCard:
    """A layer as data.

    ``name`` is ``family/name`` (core and notebooks) or ``plugin:name``; ``target`` is the import string
    ``package.module:Class`` (empty only until ``register`` fills it). ``inputs`` and ``outputs`` map tensor names to
    named dimensions, in call order; a dimension is an option of ``config``, a key of ``sample.dims`` or a number.
    Every layer also takes ``device=`` and ``dtype=``, which the schema leaves out.

    Raises:
        ManifestError: a value is not allowed; the message names the layer and the key.
    """

    name: str
    domain: str
    family: str
    summary: str
    licence: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    target: str = ""
    paper: Paper | None = None
    differs: str = ""
    config: Mapping[str, Option] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    kernels: tuple[str, ...] = ()
    example: str = ""
    sample: Sample = field(default_factory=Sample)

    def __post_init__(self) -> None:
        self._match("name", self.name, _NAME, "family/name or plugin:name in lower case")
        self._match("domain", self.domain, _WORD, "a lower-case word")
        self._match("family", self.family, _WORD, "a lower-case word")
        if self.target:
            self._match("target", self.target, _TARGET, "package.module:Class")
        for key, allowed in (("dtypes", DTYPES), ("devices", DEVICES)):
            for value in getattr(self, key):
                self._check(value in allowed, key, "among " + ", ".join(allowed), value)
        for key, option in self.config.items():
            self._match("config", key, _IDENTIFIER, "named like arguments")
            types = set(option.type.split("|"))
            self._check(types <= TYPES.keys(), f"config.{key}.type", f"{'|'.join(TYPES)}", option.type)
            stated = () if option.required else (option.default,)
            for value in (*stated, *option.choices):
                self._check(option.accepts(value), f"config.{key}", option.allowed, value)
        for key in ("inputs", "outputs"):
            self._check(bool(getattr(self, key)), key, "at least one tensor", "none")
            for tensor, dims in getattr(self, key).items():
                self._match(key, tensor, _IDENTIFIER, "tensors named like arguments")
                for dim in dims:
                    self._match(f"{key}.{tensor}", dim, _DIM, "dimension names or numbers")
                    known = dim.isdecimal() or dim in self.config or dim in self.sample.dims
                    self._check(known, f"{key}.{tensor}", "dimensions found in config or in sample.dims", dim)
        self.check_config(self.sample.config, "sample")

    def _check(self, right: bool, key: str, allowed: str, got: Any) -> None:
        if not right:
            raise ManifestError(f"{self.name}: {key} must be {allowed}, got {got!r}")

    def _match(self, key: str, value: str, pattern: re.Pattern[str], allowed: str) -> None:
        self._check(bool(pattern.fullmatch(value)), key, allowed, value)

    def check_config(self, config: Mapping[str, Any], caller: str = "create") -> None:
        """Check constructor arguments against the schema, without importing the layer.

        Raises:
            ValueError: an unknown or missing argument, or a value that is not among the choices.
            TypeError: a value of the wrong type.
        """
        for key, value in config.items():
            if key in ("device", "dtype"):
                continue
            if key not in self.config:
                raise ValueError(f"{caller}: {self.name} has no option {key!r}{did_you_mean(key, self.config)}")
            option = self.config[key]
            if not option.accepts(value):
                message = f"{caller}: {self.name}: {key} must be {option.allowed}, got {value!r}"
                raise (ValueError if option.choices else TypeError)(message)
        missing = [key for key, option in self.config.items() if option.required and key not in config]
        if missing:
            raise ValueError(f"{caller}: {self.name} needs {', '.join(missing)}")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Every dimension name with its size: the sample's, then the integer options of the configuration."""
        options = {key: config.get(key, option.default) for key, option in self.config.items()}
        return {**self.sample.dims, **{key: value for key, value in options.items() if TYPES["int"](value)}}

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-able data."""
        data = asdict(self)
        for key, option in self.config.items():
            data["config"][key]["required"] = option.required
            if option.required:
                del data["config"][key]["default"]
        return data


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: close matches, or else all that exists."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there is {', '.join(choices) if choices else 'none'}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a package brings: layers, and the module that holds its benchmark cases, or ""."""

    cards: tuple[LayerCard, ...]
    bench: str = ""


def parse_manifest(text: str, plugin: str | None) -> Manifest:
    """Reads a manifest; ``plugin`` is the name that prefixes its layers, None for the core's own.

    Raises:
        ManifestError: the text is not TOML, or a key is unknown, missing or wrong; the message names it.
    """
    try:
        manifest = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ManifestError(f"not TOML: {error}") from error
    api = manifest.get("api")
    if type(api) is not int:  # a TOML boolean is an int to isinstance
        raise ManifestError(f"api must be an integer, got {api!r}")
    if api != API:
        advice = "upgrade layerzoo" if api > API else "upgrade the plugin"
        raise ManifestError(f"the manifest speaks api {api}, this layerzoo reads api {API}: {advice}")
    _fields(manifest, "manifest", _MANIFEST)
    bench = manifest.get("bench", "")
    if bench and not _MODULE.fullmatch(bench):
        raise ManifestError(f"manifest.bench must be a module like package.bench, got {bench!r}")
    return Manifest(tuple(_card(key, table, plugin) for key, table in manifest["layers"].items()), bench)


# A schema: key -> (kind, required). The kinds are the keys of _KINDS.
_MANIFEST = {"api": ("an integer", True), "layers": ("a table", True), "bench": ("text", False)}
_LAYER = {
    "target": ("text", True),
    "domain": ("text", True),
    "family": ("text", True),
    "summary": ("text", True),
    "licence": ("text", True),
    "inputs": ("a table", True),
    "outputs": ("a table", True),
    "paper": ("a table", False),
    "differs": ("text", False),
    "config": ("a table", False),
    "dtypes": ("a list of texts", False),
    "devices": ("a list of texts", False),
    "kernels": ("a list of texts", False),
    "example": ("text", False),
    "sample": ("a table", False),
}
_PAPER = {"title": ("text", True), "year": ("an integer", True), "catalogue": ("an integer", False)}
_OPTION = {
    "type": ("text", True),
    "default": ("a value", False),
    "choices": ("a list", False),
    "summary": ("text", False),
}
_SAMPLE = {"config": ("a table", False), "dims": ("a table", False)}


def _is_text(value: Any) -> bool:
    # Cards are printed: control characters could rewrite the terminal.
    return isinstance(value, str) and bool(value.strip()) and all(c.isprintable() or c in "\n\t" for c in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "an integer": TYPES["int"],
    "a list": lambda value: isinstance(value, list),
    "a list of texts": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "a table": lambda value: isinstance(value, dict),
    "a value": lambda value: _is_text(value) or isinstance(value, bool | int | float | list),
}


def _fields(table: Any, where: str, schema: Mapping[str, tuple[str, bool]]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ManifestError(f"{where} must be a table, got {table!r}")
    for key, value in table.items():
        if key not in schema:
            raise ManifestError(f"{where} has an unknown key {key!r}{did_you_mean(key, schema)}")
        kind, _ = schema[key]
        if not _KINDS[kind](value):
            raise ManifestError(f"{where}.{key} must be {kind}, got {value!r}")
    missing = [key for key, (_, required) in schema.items() if required and key not in table]
    if missing:
        raise ManifestError(f"{where} lacks {', '.join(missing)}")
    return table


def _card(key: str, table: Any, plugin: str | None) -> LayerCard:
    where = f"layers.{key}"
    if not _WORD.fullmatch(key):
        raise ManifestError(f"{where}: a layer's name must be a lower-case word, got {key!r}")
    values = dict(_fields(table, where, _LAYER))
    values["name"] = f"{values['family']}/{key}" if plugin is None else f"{plugin}:{key}"
    values["config"] = {
        name: _option(_fields(option, f"{where}.config.{name}", _OPTION))
        for name, option in values.get("config", {}).items()
    }
    for side in ("inputs", "outputs"):
        for tensor, dims in values[side].items():
            if not _KINDS["a list of texts"](dims):
                raise ManifestError(f"{where}.{side}.{tensor} must be a list of texts, got {dims!r}")
        values[side] = {tensor: tuple(dims) for tensor, dims in values[side].items()}
    for name in ("dtypes", "devices", "kernels"):
        if name in values:
            values[name] = tuple(values[name])
    if "paper" in values:
        values["paper"] = Paper(**_fields(values["paper"], f"{where}.paper", _PAPER))
    if "sample" in values:
        sample = _fields(values["sample"], f"{where}.sample", _SAMPLE)
        for dim, size in sample.get("dims", {}).items():
            if not TYPES["int"](size) or size < 1:
                raise ManifestError(f"{where}.sample.dims.{dim} must be a positive integer, got {size!r}")
        values["sample"] = Sample(**sample)
    return LayerCard(**values)


def _option(table: dict[str, Any]) -> Option:
    default = table.get("default", None if "none" in table["type"].split("|") else ...)
    return Option(table["type"], default, tuple(table.get("choices", ())), table.get("summary", ""))
