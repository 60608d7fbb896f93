"""The checked schema of the YAML configuration files.

One place for every key: its type, default, limits and one sentence that says what it does. The files that
`cisformer generate_default_config` writes, the documentation and the error messages all come from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cisformer.errors import ConfigError, InputError, brief

Modality = Literal["rna", "atac"]
Direction = Literal["atac2rna", "rna2atac"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Preset = Literal["default", "small"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _whole(value: Any) -> Any:
    """Accept 1e4 and "1e4" (PyYAML reads both as not an integer) where an integer is meant."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return value
    return int(number) if number.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole), Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class DataPreprocess(Section):
    """Number of tokens and targets of a cell in one training example. Sampled when a batch is made, not on disk."""

    enc_max_len: WholeNumber | Literal["whole"] = Field(
        description="Maximum number of input tokens (open cCREs or expressed genes) per cell that attention "
        "sees; 'whole' = all. They are sampled again in every epoch. The linear path always sees all."
    )
    dec_max_len: WholeNumber | Literal["whole"] = Field(
        description="Number of targets (genes or cCREs) sampled per cell, multiplied by `multiple`; 'whole' = all. "
        "Prediction always gives all."
    )
    multiple: WholeNumber = Field(
        description="Number of samples of dec_max_len targets per cell in one epoch."
    )


class Model(Section):
    """Shape of the model."""

    total_gene: Positive = Field(
        38244, description="Number of reference genes. Set from the data for references other than human."
    )
    max_express: Positive = Field(
        description="Number of bins of an expression value (log1p, relative to the cell's maximum). "
        "Architecture cis reads RNA in these bins; architecture full predicts them."
    )
    dim: Positive = Field(description="Width of the latent tokens. Architecture full: a multiple of 7.")
    dec_depth: Annotated[int, Field(ge=0, le=1000)] = Field(description="Number of attention blocks.")
    dec_heads: Positive = Field(description="Number of attention heads.")
    dec_ff_mult: Positive = Field(description="Width of the feed-forward layer, in multiples of dim.")
    dec_dim_head: Positive = Field(description="Width of one attention head.")
    dec_emb_dropout: Share = Field(0.1, description="Dropout on token embeddings.")
    dec_ff_dropout: Share = Field(0.1, description="Dropout in feed-forward layers.")
    dec_attn_dropout: Share = Field(0.1, description="Dropout on attention.")
    architecture: Literal["cis", "full"] = Field(
        "cis", description="'cis' (linear start, latent attention, cis attention) or 'full' (as published)."
    )
    num_latents: Positive = Field(16, description="cis: number of latent tokens that summarise a cell.")
    emb_rank: Positive = Field(64, description="cis: width of gene and cCRE embeddings.")
    linear_rank: Positive = Field(
        32, description="cis: maximum number of principal components of the input in the linear path."
    )
    linear_ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="cis: ridge penalty of the closed-form start, in units of the input's variance; 'auto' chooses "
        "the best on validation cells, or in a cross-validation where these are few.",
    )
    cis_window: Annotated[WholeNumber, Field(le=10_000_000)] = Field(
        250_000, description="cis: a gene attends to open cCREs within this many bp of its body."
    )
    mask_padding: bool = Field(
        True, description="full: mask padding in attention; the published tool does not."
    )
    prior: bool = Field(False, description="full: start from the training mean of every target.")


class Training(Section):
    """How the model is trained."""

    SEED: Annotated[int, Field(ge=0, lt=2**63)] = Field(description="Random seed of training.")
    batch_size: Positive = Field(description="Number of cells per training batch and process.")
    num_workers: Annotated[int, Field(ge=0)] = Field(2, description="Number of threads that prepare batches.")
    epoch: Annotated[int, Field(ge=0)] = Field(
        description="Maximum number of epochs; 0 keeps the closed-form start."
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="Initial learning rate.")
    gamma_step: Positive = Field(description="Number of epochs between two reductions of the learning rate.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        description="The learning rate is multiplied by this at each reduction."
    )
    patience: Positive = Field(description="Stop after this many epochs without a better validation loss.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW weight decay.")
    grad_clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Maximum norm of the gradient; larger ones are scaled down."
    )
    fold_in: bool = Field(
        True,
        description="cis: after training, fit the closed form of `best` again with the validation cells added.",
    )
    keep_epochs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Keep the checkpoints of the last N epochs; 0 = of every epoch. The start and `best` are kept.",
    )
    compile: bool = Field(
        False, description="Compile the attention blocks (torch.compile); needs a C++ compiler on a CPU."
    )
    tracker: Literal["none", "tensorboard"] = Field(
        "none", description="Also log to TensorBoard (pip install 'cisformer-links[tensorboard]')."
    )


class Config(Section):
    """A whole task configuration, as one YAML file holds it."""

    datapreprocess: DataPreprocess
    model: Model
    training: Training


_DEFAULTS: dict[Direction, dict[str, dict[str, Any]]] = {
    "atac2rna": {
        "datapreprocess": {"enc_max_len": 10000, "dec_max_len": 3000, "multiple": 1},
        "model": {"max_express": 7, "dim": 280, "dec_depth": 4, "dec_heads": 7, "dec_ff_mult": 4, "dec_dim_head": 140},
        "training": {
            "SEED": 2023, "batch_size": 96, "epoch": 100, "lr": 5e-4, "gamma_step": 4, "gamma": 0.6, "patience": 2,
        },
    },
    "rna2atac": {
        "datapreprocess": {"enc_max_len": 2048, "dec_max_len": 2048, "multiple": 40},
        "model": {"max_express": 64, "dim": 210, "dec_depth": 6, "dec_heads": 6, "dec_ff_mult": 4, "dec_dim_head": 128},
        "training": {
            "SEED": 0, "batch_size": 16, "epoch": 500, "lr": 1e-3, "gamma_step": 5, "gamma": 0.9, "patience": 5,
        },
    },
}  # fmt: skip

_SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 70,
        "dec_depth": 2,
        "dec_heads": 4,
        "dec_ff_mult": 2,
        "dec_dim_head": 16,
        "emb_rank": 32,
    },
    "training": {"batch_size": 32, "epoch": 20, "patience": 3},
}


def _require_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise `InputError` where `value` is none of the choices."""
    if value not in choices:
        raise InputError(f"there is no {what} {value!r}", hint=f"choose {' or '.join(choices)}")


def _sections(direction: Direction) -> dict[str, Any]:
    """Return the defaults of a direction, section by section."""
    _require_choice("direction", direction, DIRECTIONS)
    return {name: dict(values) for name, values in _DEFAULTS[direction].items()}


def default_config(direction: Direction, preset: Preset = "default") -> Config:
    """Return the configuration that `generate_default_config` writes for a direction and preset.

    Parameters
    ----------
    direction
        "rna2atac" or "atac2rna".
    preset
        "default", as documented, or "small", a model that trains in minutes on a laptop.

    Returns
    -------
    Config
        Frozen; `config.model_copy(update=...)` makes another.

    Raises
    ------
    InputError
        If there is no such direction or preset.
    """
    _require_choice("preset", preset, get_args(Preset))
    sections = _sections(direction)
    if preset == "small":
        for name, values in _SMALL.items():
            sections[name] |= values
    return Config.model_validate(sections)


@dataclass(frozen=True)
class TrainingChoice:
    """Options of training that `run` and `complete` offer; checked when the record is made.

    Attributes
    ----------
    preset
        Size of the models.
    epochs
        Maximum number of epochs; `None` takes the preset's.
    seed
        Random seed of the split and of training.
    """

    preset: Preset = "small"
    epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("preset", self.preset, get_args(Preset))
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed}", hint="give a number of 0 or more")

    def config(self, direction: Direction) -> Config:
        """Return the configuration of a direction."""
        content = default_config(direction, self.preset).model_dump()
        content["training"]["SEED"] += self.seed
        if self.epochs is not None:
            content["training"]["epoch"] = self.epochs
        return parse_config(content, direction, source="the options")


def load_config(path: str | Path | None, direction: Direction) -> Config:
    """Read and check a YAML configuration; keys left out take the direction's defaults.

    Parameters
    ----------
    path
        A YAML file; `None` gives the defaults.
    direction
        Direction whose defaults fill in the keys that the file lacks: "rna2atac" or "atac2rna".

    Returns
    -------
    Config
        Frozen and checked.

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or holds an unknown key or a wrong value.
    """
    if path is None:
        return default_config(direction)
    return parse_config(_read_yaml(Path(path)), direction, source=str(path))


def parse_config(content: dict[str, Any], direction: Direction, *, source: str = "config") -> Config:
    """Check a nested mapping of configuration values; see `load_config`."""
    sections = _sections(direction)
    for name, values in content.items():
        if name not in sections:
            raise ConfigError(f"{source}: unknown section {brief(name)}", hint=_nearest(name, sections))
        if values is not None and not isinstance(values, dict):
            raise ConfigError(
                f"{source}: section {brief(name)} holds {brief(values)}",
                hint="write `key: value` lines under it",
            )
        sections[name] |= values or {}
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        raise _explain(error, source) from None
    _check_shapes(config, source)
    return config


def dump_config(config: Config, *, comments: bool = True) -> str:
    """Return a configuration as YAML, with a comment over each key where `comments` is set."""
    lines: list[str] = []
    for name, section in config:
        lines.append(f"{name}:")
        for key, value in section:
            if comments:
                lines.append(f"  # {type(section).model_fields[key].description}")
            lines.append(f"  {key}: {_scalar(value)}")
        lines.append("")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value).splitlines()[0]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(
            f"config file {path} does not exist", hint="make one with `cisformer generate_default_config`"
        )
    return read_yaml(path, "a generated one")


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing.

    Raises
    ------
    ConfigError
        The file cannot be read or holds something else; `example` is what to compare it with.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        Exception
    ) as error:  # PyYAML raises whatever a value comes upon: ValueError, KeyError, RecursionError …
        raise ConfigError(
            f"{path} is not a YAML file: {' '.join(str(error).split())[:300]}",
            hint=f"compare it with {example}",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, not sections of keys",
            hint=f"compare it with {example}",
        )
    return content


def _explain(error: ValidationError, source: str) -> ConfigError:
    """Turn pydantic's first complaint into one line with the next step."""
    first = error.errors()[0]
    section, key = (*map(str, first["loc"][:2]), "")[:2]
    if first["type"] == "extra_forbidden":
        known = type_of_section(section).model_fields
        return ConfigError(f"{source}: unknown key {brief(f'{section}.{key}')}", hint=_nearest(key, known))
    if first["type"] == "missing":
        return ConfigError(f"{source}: key '{section}.{key}' is missing", hint="add it")
    wanted = first["msg"].removeprefix("Input should be ")
    return ConfigError(f"{source}: {section}.{key} is {brief(first['input'])}", hint=f"it should be {wanted}")


def type_of_section(name: str) -> type[Section]:
    """Return the schema class of a section by its YAML name."""
    sections: dict[str, type[Section]] = {
        "datapreprocess": DataPreprocess,
        "model": Model,
        "training": Training,
    }
    return sections[name]


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _check_shapes(config: Config, source: str) -> None:
    if config.model.architecture == "full" and config.model.dim % 7:
        near = max(7, round(config.model.dim / 7) * 7)
        raise ConfigError(
            f"{source}: model.dim is {config.model.dim}, which 7 digits of a cCRE number cannot share evenly",
            hint=f"architecture full needs a multiple of 7, such as {near}",
        )
