"""What a training run depends on: read from YAML, checked, and written back whole.

A configuration has some or all of four sections, each with some or all of its settings:

    data: {source: mols.csv, targets: {gap: {unit: eV}, mu: {readout: dipole}}}
    split: {kind: scaffold}
    model: {preset: tiny, num_layers: 6}
    training: {epochs: 200, batch_size: 64}
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from .presets import PRESETS

QM9 = ("qm9", "qm9-sample")
"""Sources of data that are no files."""

# Targets of QM9: read-out and reference, where they are not those of any other target.
_QM9_TARGETS = {
    "mu": {"readout": "dipole"},
    **{name: {"readout": "sum", "reference": "published"} for name in ("U0", "U", "H", "G")},
}

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[FiniteFloat, Field(gt=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class SettingsError(ValueError):
    """Settings cannot be used; the message is one line that names the setting."""


class Section(BaseModel):
    """Settings that belong together; they cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class TargetSettings(Section):
    """How one property is learned.

    Attributes:
        unit: Of its values; None: what the data say.
        reference: What is taken off first, the sum over the atoms of a number for each element:
            "none", "fitted" to the training molecules, or "published" (QM9's atoms).
        readout: From atoms to the molecule: "pooled", "sum", "mean" or "dipole", as
            `geot_model.readout.Readout` says.
    """

    unit: str | None = None
    reference: Literal["none", "fitted", "published"] = "none"
    readout: Literal["pooled", "sum", "mean", "dipole"] = "mean"


class DataSettings(Section):
    """The molecules, and what is to be learned of them.

    Attributes:
        source: A file as `geot_model.readers.read` takes it, "qm9" (needs qm9pack), or
            "qm9-sample", the 3,000 molecules of it that ship with the package. A relative path
            begins at the folder of the configuration.
        targets: Properties, by name; in YAML also a list of names.
        smiles: Column of the SMILES; None: the one called so.
        name: Column of the names; None: the one called so, else file and row.
        molecules: How many to draw at random, by the seed of the split; None for all.
    """

    source: str = "qm9-sample"
    targets: dict[str, TargetSettings] = {
        name: TargetSettings() for name in ("homo", "lumo", "gap")
    }
    smiles: str | None = None
    name: str | None = None
    molecules: _Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Give each target what is usual for it, and make the path absolute."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        source = values.get("source", cls.model_fields["source"].default)
        if isinstance(source, (str, Path)) and str(source) not in QM9:
            values["source"] = os.path.abspath(source)
        targets = _by_name(values.get("targets", cls.model_fields["targets"].default))
        if isinstance(targets, dict):
            usual = _QM9_TARGETS if source in QM9 else {}
            targets = {
                name: usual.get(name, {}) | (given or {}) if _is_section(given) else given
                for name, given in targets.items()
            }
        return values | {"targets": targets}


class SplitSettings(Section):
    """Which molecules train, which choose the best epoch, which measure.

    Attributes:
        kind: "random", "scaffold" (Bemis-Murcko), "file", or "published", that of all of QM9.
        fractions: Of training, validation and test, where the kind is random or scaffold.
        seed: Of the split, and of the molecules drawn.
        file: Of the kind "file", as `geot_model.splits.split` reads it.
    """

    kind: Literal["random", "scaffold", "file", "published"] = "random"
    fractions: tuple[_Share, _Share, _Share] = (0.85, 0.05, 0.10)
    seed: _Seed = 0
    file: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> SplitSettings:
        if abs(sum(self.fractions) - 1) > 1e-9:
            raise ValueError(f"fractions: expected three with sum 1, got {self.fractions}")
        if (self.kind == "file") != (self.file is not None):
            got = "none" if self.file is None else self.file
            raise ValueError(f"file: expected one for the kind 'file' alone, got {got}")
        return self


class BasisSettings(Section):
    """Gaussians of the distance: `geot_kernels.radial.GaussianBasis`.

    Attributes:
        num_basis: How many, evenly spaced from 0 to `r_max`.
        r_max: Where the last one is, Å.
        gamma: Of `exp(-gamma (d - d_k)²)`, Å⁻²; None: from the spacing.
    """

    num_basis: _Count
    r_max: _Positive
    gamma: _Positive | None = None


class ModelSettings(Section):
    """A preset, and arguments of `geot_model.GeoT` that are different.

    Attributes:
        preset: "tiny", "base" or "published". All others have its values unless given.
    """

    preset: str = "tiny"
    embed_dim: _Count = 64
    num_heads: _Count = 4
    num_layers: _Count = 4
    ffn_dim: _Count | None = None
    readout_dim: _Count = 64
    parallel: bool = False
    attention_scale: bool = False
    atom_embedding: bool = False
    basis: BasisSettings = BasisSettings(num_basis=300, r_max=29.9, gamma=10.0)
    filter_hidden: _Count = 64
    r_max: _Positive = 31.0
    num_knots: Annotated[int, Field(ge=5)] = 2048
    radial: Literal["table", "exact"] = "table"
    score: Literal["filter", "bias"] = "filter"
    normalizer: Literal["linear", "softmax"] = "linear"

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Put in the values of the preset."""
        if not isinstance(values, dict):
            return values
        name = values.get("preset", cls.model_fields["preset"].default)
        if not isinstance(name, str) or name not in PRESETS:
            names = ", ".join(PRESETS)
            raise ValueError(f"preset: expected one of {names}, got {_shown(name)}")
        return merge(PRESETS[name], values)

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads={self.num_heads}, "
                f"got {self.embed_dim}"
            )
        return self

    def arguments(self) -> dict[str, Any]:
        """Arguments of `GeoT` as plain values, as a `Card` has them."""
        return self.model_dump(exclude={"preset"})


class TrainingSettings(Section):
    """How long and how fast the network learns, and on what.

    Attributes:
        epochs: Passes over the training molecules.
        batch_size: Molecules in a step, of all devices together.
        bucket: Batches whose molecules are sorted by size together before they are cut apart;
            1: batches are random. More makes sizes in a batch alike and errors larger.
        learning_rate: The highest, after the warm-up.
        warm_up: Steps of the linear rise of the learning rate; below 1: their share of all.
        decay: What is left of the learning rate at the end of its exponential fall.
        weight_decay: Of AdamW; 0: Adam.
        ema: Decay of the exponential moving average of the weights, which is what is validated
            and kept; 0: none.
        clip: Largest norm of a step's gradient; 0: any.
        precision: "32", or "bf16-mixed": bfloat16 where it is safe, on GPUs and CPUs.
        early_stopping: Stop after so many epochs without a better validation error; 0: never.
        devices: Processes, each with a device, among which every batch is divided.
        accelerator: "gpu", "cpu", or "auto": GPUs where there are any.
        seed: Of the weights and of the order of the molecules.
        max_minutes: Stop after an epoch if the next one would end later; None: never.
        log_every: Epochs from one printed line to the next; None: some twenty lines in all.
    """

    epochs: _Count = 100
    batch_size: _Count = 32
    bucket: _Count = 1
    learning_rate: _Positive = 1e-3
    warm_up: Annotated[FiniteFloat, Field(ge=0)] = 0.05
    decay: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.01
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    ema: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.999
    clip: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    precision: Annotated[Literal["32", "bf16-mixed"], BeforeValidator(str)] = "32"
    early_stopping: Annotated[int, Field(ge=0)] = 0
    devices: _Count = 1
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    seed: _Seed = 0
    max_minutes: Annotated[FiniteFloat, Field(ge=0)] | None = None
    log_every: _Count | None = None


class Settings(Section):
    """What a training run depends on; the same settings give the same model.

    Arguments are sections, as mappings: `Settings(training={"epochs": 10})`.

    Raises:
        SettingsError: A setting is unknown, out of its range, or contradicts another.
    """

    data: DataSettings = Field(default_factory=DataSettings)
    split: SplitSettings = Field(default_factory=SplitSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    def __init__(self, **sections: Any) -> None:
        try:
            super().__init__(**sections)
        except ValidationError as error:
            raise SettingsError(_one_line(error)) from None

    @classmethod
    def read(cls, path: str | Path, *changes: Mapping[str, Any]) -> Settings:
        """Read a configuration.

        Args:
            path: YAML, some or all of the sections.
            changes: What is different, nested as the file is, one after the other as `change`
                makes them.

        Raises:
            SettingsError: The file is not YAML, or a setting is wrong.
            OSError: The file cannot be read.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            place = getattr(error, "problem_mark", None)
            line = "" if place is None else f":{place.line + 1}"
            raise SettingsError(f"{path}{line}: expected YAML: {_reason(error)}") from None
        values = {} if values is None else values
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise SettingsError(
                f"{path}: expected YAML with sections ({', '.join(cls.model_fields)})"
            )
        given = {section: part for section, part in values.items() if part is not None}
        return cls(**_merge_all(_from_folder(given, path.absolute().parent), changes))

    @classmethod
    def of(cls, *changes: Mapping[str, Any]) -> Settings:
        """Make settings of the defaults and of changes, one after the other, as for `read`.

        Raises:
            SettingsError: A setting is wrong.
        """
        return cls(**_merge_all({}, changes))

    def write(self, path: str | Path) -> None:
        """Write all settings, the defaults too; `read` gives the same ones again."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    def change(self, **sections: Mapping[str, Any]) -> Settings:
        """Make settings of which some are different.

        Of another preset come all values of the model that are not given with it. Targets as a
        list replace all there are; a mapping changes some, or adds to them.

        Raises:
            SettingsError: A setting is wrong.
        """
        return Settings(**_merge_all(self.model_dump(), [sections]))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes into nested mappings, of which both stay as they are."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def _merge_all(base: Mapping[str, Any], changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put changes into sections, as `Settings.change` says."""
    merged = dict(base)
    for change in changes:
        if "preset" in (change.get("model") or {}):
            merged.pop("model", None)
        data = merged.get("data")
        if isinstance(data, Mapping) and "targets" in data:
            merged["data"] = {**data, "targets": _by_name(data["targets"])}
        merged = merge(merged, change)
    return merged


def parse_assignment(text: str) -> dict[str, Any]:
    """Read `section.key=value`, the value as YAML, into nested mappings.

    Raises:
        SettingsError: It is not of that form.
    """
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) < 2 or not all(parts):
        raise SettingsError(f"--set: expected section.key=value, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"--set: expected a value in YAML, got {text!r}") from None
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)


def _by_name(targets: Any) -> Any:
    """Targets as a mapping, if they are a list of names, or names with commas between."""
    if isinstance(targets, str):
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    if isinstance(targets, (list, tuple)) and all(isinstance(name, str) for name in targets):
        if len(set(targets)) < len(targets):
            raise ValueError(f"targets: expected different ones, got {', '.join(targets)}")
        targets = {name: {} for name in targets}
    if isinstance(targets, dict) and not targets:
        raise ValueError("targets: expected one or several, got none")
    return targets


def _is_section(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _from_folder(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Values whose relative paths begin at a folder."""
    values = dict(values)
    for section, key in (("data", "source"), ("split", "file")):
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key] not in QM9:
            values[section] = part | {key: os.path.join(folder, part[key])}
    return values


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")


_EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "model_type": "a section of settings",
    "dict_type": "names, or a mapping of names to settings",
    "tuple_type": "a list",
    "missing": "a value",
}
# Beginnings of the kinds of errors.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
}


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, as a line that a user can act on."""
    problem = error.errors()[0]
    kind, place, context = problem["type"], problem["loc"], problem.get("ctx", {})
    where = ".".join(map(str, place))
    if kind == "value_error":
        return f"{where}.{context['error']}" if where else str(context["error"])
    if kind == "extra_forbidden":
        known = _known(place[:-1])
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(known)}"
        return f"{where}: no such setting; {hint}"
    if kind == "literal_error":
        expected = f"one of {context['expected']}".replace(" or ", ", ").replace("'", "")
    elif kind in _EXPECTED:
        limits = {name: _shown(value) for name, value in context.items()}
        expected = _EXPECTED[kind].format(**limits)
    else:
        named = (text for beginning, text in _KINDS.items() if kind.startswith(beginning))
        expected = next(named, problem["msg"])
    return f"{where}: expected {expected}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value) if isinstance(value, str) else "none" if value is None else str(value)


def _known(place: Iterable[int | str]) -> list[str]:
    """Names of the settings at a place."""
    found: Any = Settings
    for part in place:
        if get_origin(found) is dict:  # of names
            found = get_args(found)[1]
        else:
            found = found.model_fields[str(part)].annotation
    return list(found.model_fields)
