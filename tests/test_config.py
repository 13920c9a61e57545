"""Options at the border: one line for every fault, and a recipe that survives its own file."""

import dataclasses
import json
import tomllib
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from scl_defense import ComponentError, UserError
from scl_defense.config import TrainConfig, as_dict, construct, make, options_of, read_toml, to_toml, train_config
from scl_defense.plugins import default_host
from scl_defense.types import Eps, component


@component
class Sample:
    steps: Annotated[int, Field(ge=1, le=50, description="gradient steps")] = 10
    mode: Annotated[Literal["one", "both"], Field(description="which")] = "one"
    weights: Annotated[tuple[float, ...], Field(description="several")] = (1.0,)
    rate: Annotated[float | None, Field(gt=0, description="maybe")] = None
    flag: bool = False
    eps: Eps = "8/255"


@component
class Demanding:
    path: Annotated[str, Field(description="where")]


def test_strings_become_the_types_of_the_fields():
    built = construct(Sample, {"steps": "7", "mode": "both", "weights": "1+0.5", "rate": "2e-3", "flag": "true"}, "x")
    assert built == Sample(steps=7, mode="both", weights=(1.0, 0.5), rate=2e-3, flag=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stps": 3}, "no option 'stps'; did you mean 'steps'"),
        ({"qqq": 3}, r"no option 'qqq' \(options: steps, mode"),
        ({"steps": "x"}, "'steps' should be a valid integer"),
        ({"steps": "99"}, "less than or equal to 50, not '99'"),
        ({"steps": 0}, "greater than or equal to 1, not 0"),
        ({"mode": "two"}, "'one' or 'both', not 'two'"),
        ({"eps": "-1"}, "eps '-1' is not a radius"),
        ({"weights": "1+x"}, "'weights'"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_remedy(options, message):
    with pytest.raises(UserError, match=message) as error:
        construct(Sample, options, "generator 'sample'")
    assert str(error.value).startswith("generator 'sample': ") and "\n" not in str(error.value)


def test_a_required_option_is_asked_for():
    with pytest.raises(UserError, match="option 'path' is required; give it as path=VALUE"):
        construct(Demanding, {}, "dataset 'x'")


def test_a_class_that_is_no_component_is_the_authors_fault():
    class Plain:
        def __init__(self):
            self.x = 1

    with pytest.raises(ComponentError, match="not a component"):
        options_of(Plain)
    with pytest.raises(ComponentError, match="component"):
        construct(Plain, {"steps": 1}, "generator 'plain'")


def test_options_are_listed_with_type_range_default_and_description():
    rows = {option.name: option for option in options_of(Sample)}
    assert rows["steps"].type == "int [1, 50]" and rows["steps"].default == 10
    assert rows["mode"].type == "one|both" and rows["weights"].type == "list of float"
    assert rows["rate"].type == "float (0, )|none" and rows["steps"].description == "gradient steps"
    assert {option.name: option.default for option in options_of(Demanding)} == {"path": "required"}


def test_every_registered_component_lists_its_options_and_describes_them():
    host, seen = default_host(), 0
    for kind in ("generator", "trainer", "model", "dataset", "logger", "attack"):
        for entry in host[kind]:
            cls = entry.load()
            assert cls.__doc__, entry.name
            for option in options_of(cls):
                seen += 1
                assert option.description, f"{entry.kind} {entry.name}: option {option.name} has no description"
    assert seen > 30


def test_make_builds_by_name():
    assert make(default_host(), "generator", "pgd", {"steps": "3"}).steps == 3
    with pytest.raises(UserError, match=r"generator 'pgd': there is no option 'step'; did you mean 'steps'"):
        make(default_host(), "generator", "pgd", {"step": "3"})


texts = st.text(max_size=20).filter(lambda s: "\x00" not in s and not any(0xD800 <= ord(c) < 0xE000 for c in s))


numbers = st.one_of(st.integers(-(2**60), 2**60), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


@given(st.dictionaries(texts, st.one_of(numbers, texts), max_size=4), st.floats(1e-9, 1e9), texts.filter(bool))
def test_a_recipe_survives_its_own_toml(options, lr, data):
    config = TrainConfig(lr=lr, data=data, generator_options=options, logger=("jsonl", "tensorboard"))
    assert train_config(tomllib.loads(to_toml(as_dict(config)))) == config


def test_the_recipe_is_plain_data():
    assert json.loads(json.dumps(as_dict(TrainConfig()))) == as_dict(TrainConfig())
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(as_dict(TrainConfig()))
    assert all(option.description for option in options_of(TrainConfig))


def test_bad_recipe_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(UserError, match="is not TOML"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not TOML"):
        read_toml(tmp_path / "binary.toml")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        train_config({"epoch": 3})
