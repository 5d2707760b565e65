"""Bad input on the command line: a line on stderr for each fault, the exit code 2, nothing on stdout."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlmrewrite.cli.app import app


def refused(*arguments: object) -> list[str]:
    """The lines on stderr, without their ``error:``."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", ": expected JSON: "),
        ("[1]", ": expected a model's configuration with a 'model_type', got [1] (list)"),
        ("{}", ": expected a model's configuration with a 'model_type', got one without it"),
        ('{"model_type": "llama"}', "got model_type 'llama' (str)"),
        ('{"model_type": "llava_nxt"}', "got model_type 'llava_nxt' (str) (did you mean 'llava_next'?)"),
        ('{"model_type": "llava", "vision_config": 3}', "the configuration cannot be used: "),
        ('{"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 30}}', " cannot be used: "),
        ('{"model_type": "qwen2_5_vl"}', "does not say how many tokens an image has"),
    ],
)
def test_configurations_that_are_wrong(config: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", config)
    for path in (tmp_path, file):
        [line] = refused("inspect", path)
        assert message in line
        assert str(file) in line or "--image-tokens" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspekt"], "No such command 'inspekt'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "{folder}", "--sharp"], "No such option: --sharp"),
        (["inspect", "nowhere"], "expected a model folder or a config JSON file, got 'nowhere': it does not exist"),
        (["inspect", "{empty}"], "it holds no config.json"),
        (["inspect", "{folder}", "--recipe", "sts-129"], "unknown recipe 'sts-129', expected one of "),
        (["inspect", "{folder}", "--recipe", "a.yaml"], "expected a recipe file, got 'a.yaml', which is not a file"),
        (["inspect", "{folder}", "--text", "many"], "Invalid value for '--text': "),
        (["inspect", "{folder}", "--text", "1"], "--text: expected more text tokens than images (1), got 1"),
        (["inspect", "{folder}", "--images", "0"], "--images: expected at least 1, got 0"),
        (["inspect", "{folder}", "--rows", "-1"], "--rows: expected at least 1, got -1"),
        (["inspect", "{folder}", "--image-tokens", "0"], "--image-tokens: expected at least 1, got 0"),
        (["inspect", "{folder}", "--dtype", "int8"], "Invalid value for '--dtype': "),
        (["apply", "{folder}", *"--recipe sts-half --prompt p".split()], "Missing option '--image'"),
        (
            ["apply", "{folder}", *"--recipe sts-half --prompt p --image no.png".split()],
            "no.png: expected an image file",
        ),
        (
            ["apply", "{folder}", *"--recipe sts-half --prompt p --image {folder}/config.json".split()],
            "config.json: expected an image file: cannot identify image file",
        ),
        (
            [
                "apply",
                "{folder}",
                *"--recipe sts-half --image {folder}/picture.png --prompt".split(),
                "<image> <image>",
            ],
            "--prompt: expected 1 times '<image>', or none, got 2",
        ),
        (
            ["apply", "{folder}", *"--recipe sts-half --prompt p --image x --max-new-tokens 0".split()],
            "--max-new-tokens: expected at least 1, got 0",
        ),
        (
            ["apply", "{bare}", *"--recipe sts-half --prompt p --image {folder}/picture.png".split()],
            "the processor cannot be used: ",
        ),
        (
            ["apply", "{bare}/config.json", *"--recipe sts-half --prompt p --image {folder}/picture.png".split()],
            "expected a folder that holds a processor, got a file",
        ),
        (["bench", "{bare}", "--recipe", "sts-half"], "expected a folder with weights (*.safetensors or *.bin)"),
        (["bench", "{broken}", "--recipe", "sts-half"], "its weights cannot be used: "),
        (["bench", "{folder}", *"--recipe sts-half --recipe sts-half".split()], "expected recipes with names of their"),
        (["bench", "{folder}", *"--recipe sts-half --repeat 0".split()], "--repeat: expected at least 1, got 0"),
        (
            ["bench", "{folder}", *"--recipe sts-half --new-tokens 1".split()],
            "--new-tokens: expected at least 2, got 1",
        ),
        *(
            (
                [command, "{folder}", *f"{options} --image {{folder}}/picture.png --prompt".split(), prompt],
                f"--prompt: expected a question about the images, got {prompt!r}",
            )
            for command, options in (
                ("apply", "--recipe sts-half"),
                ("bench", "--recipe sts-half"),
                ("inspect", "--profile --prompt w10"),
            )
            for prompt in ("", " ", "\t\n")
        ),
        (
            ["bench", "{folder}", *"--recipe sts-half --native --backend inductor".split()],
            "--native measures an eager loop: expected --backend eager, got inductor",
        ),
        (["bench", *"--kernels --native".split()], "expected --kernels without --native"),
        (["bench", "{folder}", *"--recipe sts-half --prompt p".split()], "expected both --image and --prompt, or"),
        (["apply", "{folder}", *"--recipe STS_hlaf --prompt p --image x".split()], "(did you mean 'sts-half'?)"),
        (
            ["apply", "{folder}", *"--recipe sts-half --prompt p --image x --html no/out.html".split()],
            "--html: expected a file in a folder that exists, got 'no/out.html'",
        ),
        (["bench", *"--kernels --json {empty}".split()], "--json: expected - or a file, got the folder"),
        *(
            ([*arguments.split(), "--json", "no/out.json"], "--json: expected - or a file in a folder that exists, got")
            for arguments in (
                "recipes",
                "passes",
                "families",
                "inspect {folder}",
                "apply {folder} --recipe sts-half --prompt p --image x",
                "bench {folder} --recipe sts-half",
            )
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_arguments_that_are_wrong(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("empty", "bare", "broken")}
    for path in places.values():
        path.mkdir()
    for name in ("bare", "broken"):
        write(places[name] / "config.json", (folder / "config.json").read_text())
    write(places["broken"] / "model.safetensors", "nothing")
    [line] = refused(*(a.format(folder=folder, **places) for a in arguments))
    assert message in line


def test_a_recipe_file_with_several_faults_is_one_line_for_each(folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "name: mine\npasses:\n- stride: {keep: 0}\n- strde: {}\nbackend: cuda\n")
    lines = refused("inspect", folder, "--recipe", mine)
    assert len(lines) == 3
    assert all(line.startswith(f"{mine}: ") for line in lines)
    [line] = refused("inspect", folder, "--recipe", write(tmp_path / "bad.yaml", "name: ["))
    assert "bad.yaml, line 1, column 8: expected valid YAML" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    [line] = refused("bench", folder, "--recipe", "sts-half", "--device", "cuda")
    assert line == "--device cuda: torch sees no GPU here; expected cpu or auto"


def test_inspect_of_a_layer_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "name: mine\npasses:\n- stride: {keep: 8, at: 40}\n")
    [line] = refused("inspect", folder, "--recipe", mine)
    assert line == f"{mine}: passes[0].stride.at: expected a layer in 0 .. 3 (the decoder has 4), got 40"


def test_a_pass_that_fails_is_named_with_its_file(folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "name: mine\npasses:\n- dpvr: {at: 2, fuse: 9}\n")
    picture = folder / "picture.png"
    [line] = refused("apply", folder, "--recipe", mine, "--image", picture, "--prompt", "w10", "--max-new-tokens", 1)
    assert line.startswith("fuse=9 would bring the vision tokens back before layer 2")
    assert "(in pass DPVR(at=2, fuse=9, branch='copy')) " in line
    assert line.endswith(f"(for a decoder of 4 layers, from {mine})")
