"""The configuration schema and the files it writes."""

import pytest
import yaml

from cisformer.config import DIRECTIONS, Config, default_config, dump_config, load_config, parse_config
from cisformer.errors import ConfigError, InputError

SPEC = {
    "atac2rna": {
        "datapreprocess": {"enc_max_len": 10000, "dec_max_len": 3000, "multiple": 1},
        "model": {
            "total_gene": 38244, "max_express": 7, "dim": 280, "dec_depth": 4, "dec_heads": 7, "dec_ff_mult": 4,
            "dec_dim_head": 140, "dec_emb_dropout": 0.1, "dec_ff_dropout": 0.1, "dec_attn_dropout": 0.1,
        },
        "training": {
            "SEED": 2023, "batch_size": 96, "num_workers": 2, "epoch": 100, "lr": 5e-4, "gamma_step": 4,
            "gamma": 0.6, "patience": 2,
        },
    },
    "rna2atac": {
        "datapreprocess": {"enc_max_len": 2048, "dec_max_len": 2048, "multiple": 40},
        "model": {
            "total_gene": 38244, "max_express": 64, "dim": 210, "dec_depth": 6, "dec_heads": 6, "dec_ff_mult": 4,
            "dec_dim_head": 128, "dec_emb_dropout": 0.1, "dec_ff_dropout": 0.1, "dec_attn_dropout": 0.1,
        },
        "training": {
            "SEED": 0, "batch_size": 16, "num_workers": 2, "epoch": 500, "lr": 1e-3, "gamma_step": 5,
            "gamma": 0.9, "patience": 5,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_defaults_are_those_of_the_documentation(direction):
    written = yaml.safe_load(dump_config(default_config(direction)))
    for section, values in SPEC[direction].items():
        assert {key: written[section][key] for key in values} == values


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", ["default", "small"])
def test_a_written_file_reads_back_the_same(direction, preset, tmp_path):
    config = default_config(direction, preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path, direction) == config


def test_every_key_has_a_comment_in_the_file():
    lines = dump_config(default_config("atac2rna")).splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and not line.strip().startswith("#")]
    n_fields = sum(
        len(section.model_fields) for section in map(type, dict(default_config("atac2rna")).values())
    )
    assert len(keys) == n_fields
    assert all(lines[i - 1].strip().startswith("# ") for i in keys)


def test_the_documents_own_yaml_text_is_read_as_numbers():
    text = (
        "training:\n  lr: 5e-4\n  batch_size: 96\ndatapreprocess:\n  enc_max_len: 1e4\n  dec_max_len: whole\n"
    )
    content = yaml.safe_load(text)
    assert content["training"]["lr"] == "5e-4"  # what PyYAML makes of it
    config = parse_config(content, "atac2rna")
    assert config.training.lr == 5e-4
    assert config.datapreprocess.enc_max_len == 10_000
    assert config.datapreprocess.dec_max_len == "whole"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": {"lrr": 1}}, "unknown key 'training.lrr'.*did you mean 'lr'"),
        ({"modle": {}}, "unknown section 'modle'.*did you mean 'model'"),
        ({"model": {"dim": "wide"}}, "model.dim is 'wide'"),
        ({"model": {"dec_ff_dropout": 1.5}}, "dec_ff_dropout is 1.5.*less than 1"),
        ({"datapreprocess": {"enc_max_len": "half"}}, "enc_max_len is 'half'"),
        ({"model": 3}, "section 'model' holds 3"),
        ({"model": {"architecture": "full", "dim": 64}}, "dim is 64.*multiple of 7, such as 63"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(content, "atac2rna")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not a YAML file"), ("- 1", "holds a list"), (None, "does not exist")]
)
def test_an_unreadable_file_is_named(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, "rna2atac")


def test_an_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("")
    assert load_config(path, "rna2atac") == default_config("rna2atac")


def test_an_unknown_preset_or_direction_is_refused():
    with pytest.raises(InputError, match="no preset 'Small'"):
        default_config("rna2atac", "Small")
    for ask in (default_config, lambda direction: parse_config({}, direction)):
        with pytest.raises(InputError, match="no direction 'rna'") as refused:
            ask("rna")
        assert refused.value.hint == "choose atac2rna or rna2atac"


def test_a_config_cannot_be_changed_in_place():
    config = default_config("rna2atac")
    with pytest.raises(ValueError, match="frozen"):
        config.model.dim = 3  # type: ignore[misc]
    assert isinstance(config, Config)
