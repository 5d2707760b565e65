"""Recipe files that are wrong: one message each, with the file, the key, the value and what was expected."""

import re
from pathlib import Path

import pytest

from vlmrewrite.passes import VISOR, ShortV
from vlmrewrite.recipe import Recipe

KEYS = "name, description, passes, backend, kernels"
ITEM = "expected the name of a pass, or a mapping `name: {option: value}`"
BUDGET = "an int >= 1 (tokens per image) or a float in (0, 1] (fraction of an image's tokens)"
DEPTH = "an int >= 0 (layer) or a float in [0, 1) (fraction of the decoder's depth)"


def refused(folder: Path, text: str | bytes) -> str:
    """The message of the ValueError that reading this text raises, without the file's name."""
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        Recipe.from_yaml(path)
    assert type(caught.value) is ValueError
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    return "\n".join(line.removeprefix(str(path)).removeprefix(": ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"expected a mapping with the keys {KEYS}, got nothing"),
        ("# nothing", "got nothing"),
        ("sts", f"expected a mapping with the keys {KEYS}, got 'sts' (str)"),
        ("- sts", "got ['sts'] (list)"),
        ("name: [", ", line 1, column 8: expected valid YAML: "),
        ("name: a\npasses: [sts}\n", ", line 2, column 13: expected valid YAML: "),
        ("\tname: a", ", line 1, column 1: expected valid YAML: "),
        ("name: a\n---\nname: b", ", line 2, column 1: expected valid YAML: but found another document"),
        (b"\xff\xfe\xff", "expected valid YAML: unacceptable character"),
        ("name: a\x00", "expected valid YAML: unacceptable character"),
        ("[" * 3_000, "expected valid YAML: "),
        ("name: a\nname: b\npasses: []", ", line 2, column 1: expected valid YAML: the key 'name' stands twice"),
        (
            "name: a\npasses:\n- sts: {keep: 1, keep: 2}",
            ", line 3, column 18: expected valid YAML: the key 'keep' stands twice",
        ),
        ("name: a\npasses: [sts: {keep: !!python/name:os.system }]", "could not determine a constructor"),
        ("name: !!binary aaaa\npasses: []", "could not determine a constructor"),
        ("passes: []", "name: required, but missing"),
        ("name: a", "passes: required, but missing"),
        ("name: a\npasses:", "passes: expected a list of passes, got None"),
        ("name: a\npasses: {sts: {}}", "passes: expected a list of passes, got {'sts': {}} (dict)"),
        ("name: a\npasses: sts", "passes: expected a list of passes, got 'sts' (str)"),
        ("name: ''\npasses: []", "name: string should have at least 1 character, got '' (str)"),
        ("name: 3\npasses: []", "name: expected a valid string, got 3"),
        ("name: no\npasses: []", "name: expected a valid string, got False (bool)"),
        ("name: a\npasses: []\ndescription: [x]", "description: expected a valid string, got ['x'] (list)"),
        (
            "name: a\npasses: []\nbackend: cuda",
            "backend: expected 'auto', 'eager', 'inductor' or 'inductor-whole', got 'cuda' (str)",
        ),
        (
            "name: a\npasses: []\nkernels: 1",
            "kernels: expected 'auto', 'reference' or 'triton', got 1",
        ),
        (
            "name: a\npasses: []\nkernel: auto",
            f"kernel: unknown key, expected one of {KEYS} (did you mean 'kernels'?)",
        ),
        ("name: a\npasses: []\n1: 2", f"keys: expected some of {KEYS}, got 1"),
        (
            "name: a\npasses: [stz]",
            "passes[0]: unknown pass 'stz', expected one of ",
        ),
        (
            "name: a\npasses: [sts, 3]",
            f"passes[1]: {ITEM}, got 3",
        ),
        (
            "name: a\npasses: [{sts: {}, stride: {}}]",
            f"passes[0]: {ITEM}, got {{'sts': {{}}, 'stride': {{}}}} (dict)",
        ),
        ("name: a\npasses: [{}]", f"passes[0]: {ITEM}, got "),
        ("name: a\npasses: [null]", f"passes[0]: {ITEM}, got "),
        ("name: a\npasses: [{3: {}}]", f"passes[0]: {ITEM}, got "),
        ("name: a\npasses: &a [*a]", "expected valid YAML: expected the value itself, got the alias *a"),
        ("name: a\npasses: [{sts: }]", "passes[0].sts: expected a mapping of options, got None"),
        ("name: a\npasses: [{sts: 3}]", "passes[0].sts: expected a mapping of options, got 3"),
        ("name: a\npasses: [{sts: &a {keep: *a}}]", "expected the value itself, got the alias *a"),
        ("name: a\npasses: [random]", "passes[0].random.keep: required, but missing"),
        (
            "name: a\npasses: [{sts: {kep: 3}}]",
            "passes[0].sts.kep: unknown key, expected one of keep, refine, at, features, per (did you mean 'keep'?)",
        ),
        ("name: a\npasses: [{sts: {1: 3}}]", "passes[0].sts.1: unknown key, "),
        ("name: a\npasses: [{sts: {name: x}}]", "passes[0].sts.name: unknown key, "),
        (
            "name: a\npasses: [{sts: {keep: 0}}]",
            f"passes[0].sts.keep: expected {BUDGET}, got 0",
        ),
        ("name: a\npasses: [{sts: {keep: 1.5}}]", "got 1.5"),
        ("name: a\npasses: [{sts: {keep: .nan}}]", "got nan"),
        ("name: a\npasses: [{sts: {keep: .inf}}]", "got inf"),
        ("name: a\npasses: [{sts: {keep: true}}]", "got True (bool)"),
        ("name: a\npasses: [{sts: {keep: '192'}}]", "got '192' (str)"),
        ("name: a\npasses: [{sts: {keep: null}}]", "got None"),
        (
            "name: a\npasses: [{sts: {at: 1.0}}]",
            f"passes[0].sts.at: expected {DEPTH}, got 1.0",
        ),
        (
            "name: a\npasses: [{sts: {features: both}}]",
            "passes[0].sts.features: expected 'projected' or 'encoder', got 'both' (str)",
        ),
        (
            "name: a\npasses: [{random: {keep: 1, seed: 1.0}}]",
            "passes[0].random.seed: expected a valid integer, got 1.0",
        ),
        ("name: a\npasses: [{random: {keep: 1, seed: 2020-01-01}}]", "got '2020-01-01' (str)"),
    ],
)
def test_from_yaml_refuses(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = "passes:\n- sts: {keep: 0, refine: 2.0}\n- stride\nbackend: gpu\n"
    keys = [line.split(":")[0] for line in refused(tmp_path, text).splitlines()]
    assert keys == ["passes[0].sts.keep", "passes[0].sts.refine", "passes[1].stride.keep", "name", "backend"]


BOMBS = {
    "option": "name: x\npasses:\n  - stride:\n      keep: &a [1, 1]\n      at: [*a, *a]\n",
    "name": "z: &a [x, x]\nname: *a\npasses: []\n",
    "passes": "name: x\npasses:\n  - &a [x, x]\n  - [*a, *a]\n",
    "merge": "z: &a {a: 1}\nname: x\ny:\n  <<: [*a, *a]\npasses: []\n",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_aliases_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[kind])
    with pytest.raises(
        ValueError, match=r"bomb\.yaml, line \d+, column \d+: .*expected the value itself, got the alias \*a"
    ):
        Recipe.from_yaml(file)


def test_a_file_of_nested_aliases_takes_no_time(tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    levels = "".join(f"z{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    file.write_text(f"z0: &a0 [x, x]\n{levels}name: x\npasses: []\n")  # 9 ** 29 items
    with pytest.raises(ValueError, match=r"got the alias \*a0"):
        Recipe.from_yaml(file)


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("name: x\npasses: []\n" + "#" * 1_000_000)
    with pytest.raises(
        ValueError, match=r"large\.yaml: expected a recipe file of at most 1,000,000 bytes, got 1,000,019"
    ):
        Recipe.from_yaml(file)


def test_what_is_written_has_no_aliases(tmp_path: Path) -> None:
    layers = (0, 1)
    recipe = Recipe(name="twice", passes=(VISOR(self_layers=layers), ShortV(layers=layers)))
    recipe.to_yaml(tmp_path / "twice.yaml")
    assert "*" not in (tmp_path / "twice.yaml").read_text()
    assert Recipe.from_yaml(tmp_path / "twice.yaml") == recipe


@pytest.mark.parametrize(
    ("passes", "problems"),
    [
        ("[fastv: {at: 99}]", ["passes[0].fastv.at: expected a layer in 0 .. 31 (the decoder has 32), got 99"]),
        (
            "[sts, shortv: {layers: [3, 32, 0.5, 40]}]",
            [f"passes[1].shortv.layers[{i}]: expected a layer in 0 .. 31 (the decoder has 32), got {n}" for i, n in
             ((1, 32), (3, 40))],
        ),
        ("[vica: {cross: [50]}, dpvr: {at: 33}]", ["passes[0].vica.cross[0]: expected", "passes[1].dpvr.at: expected"]),
        ("[visor: {self_layers: [1], cross_layers: [64]}]", ["passes[0].visor.cross_layers[0]: expected"]),
        ("[fastv: {at: 31}, shortv: {layers: 1.0}, vica, dpvr: {at: auto}, random: {keep: 99}]", []),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_there(tmp_path: Path, passes: str, problems: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\npasses: {passes}\n")
    recipe = Recipe.load(str(path))
    assert recipe.source == str(path)
    if not problems:
        recipe.check_layers(32)
        return
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        recipe.check_layers(32)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(problems)
    assert all(line.startswith(f"{path}: {problem}") for line, problem in zip(lines, problems, strict=True))
    recipe.check_layers(99_999)


def test_a_layer_that_is_not_there_of_passes_made_in_python() -> None:
    with pytest.raises(ValueError, match=r"^ShortV\.layers\[1\]: expected a layer in 0 \.\. 3 .*, got 8$"):
        Recipe.of([ShortV(layers=[0, 8])]).check_layers(4)


def test_recipes_are_equal_whatever_file_they_are_from(tmp_path: Path) -> None:
    made = Recipe(name="a", passes=(ShortV(layers=(0,)),))
    made.to_yaml(tmp_path / "a.yaml")
    read = Recipe.load(tmp_path / "a.yaml")
    assert read == made and hash(read) == hash(made) and repr(read) == repr(made) and not made.source
    assert read.model_copy(update={"name": "b"}) != made
    assert read != "a"
