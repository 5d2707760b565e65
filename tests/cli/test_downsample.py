"""The recipe of smaller pictures by every way to use one: the processor makes them, or it is said why not."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from saved_any_size import saved_any_size, saved_tiles
from test_cli import output, run
from transformers import pipeline
from transformers.cli import serve as command
from transformers.cli.serving import model_manager
from transformers.utils import import_utils

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT
from vlmrewrite.bench import bench
from vlmrewrite.cli.loading import question, read_images, with_processor
from vlmrewrite.passes import DPVR, Downsample
from vlmrewrite.serving import map_rows
from vlmrewrite.training import answered

NAME = "downsample-half"
TOLD = "makes pictures smaller by way of the processor, which apply does not see"
ONE_SIZE = "LlavaForConditionalGeneration does not take smaller pictures: ValueError: Input image size"
FEW = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_any_size(tmp_path_factory.mktemp("sizes"), chats=True)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Of the size that the bundled model takes."""
    Image.new("RGB", (96, 96)).save(tmp_path / "96.png")
    return tmp_path / "96.png"


def question_of(folder: Path, *more: object) -> tuple[object, ...]:
    return "--image", folder / "picture.png", "--prompt", "w10 w20", *more


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before", "after"), [("sizes", 66, 38), ("tiles", 26, 12)])
def test_apply(request: pytest.FixtureRequest, tmp_path: Path, name: str, before: int, after: int) -> None:
    folder = request.getfixturevalue(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the inputs are made as they have to be: nothing is left to be said
        text = output(
            "apply", folder, *question_of(folder, "--recipe", NAME, "--max-new-tokens", 2, "--json", tmp_path / "j")
        )
    assert f"{NAME}  was given smaller pictures: {after} tokens of a prompt in place of {before}" in text
    found = json.loads((tmp_path / "j").read_text())
    assert [one["prompt_tokens"] for one in found["answers"]] == [before, after]
    assert found["report"]["call"]["length"] == after
    assert "Downsample(keep=0.5): matched, BY THE PROCESSOR" in text
    assert "is the processor's part: costs, before and after, are those of the pictures" in " ".join(text.split())
    assert "saves no FLOPs" not in text


@pytest.mark.slow
def test_what_it_answers_is_what_the_model_says_to_smaller_pictures(sizes: Path) -> None:
    found = json.loads(output("apply", sizes, *question_of(sizes, "--recipe", NAME, "--json", "-")))
    model, processor = with_processor(sizes, "cpu", "auto")
    made = vr.Recipe.load(NAME).processor(processor)
    inputs = question(made, "w10 w20", read_images([sizes / "picture.png"]))
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert found["answers"][1]["answer"] == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert found["answers"][0]["answer"] != found["answers"][1]["answer"]


@pytest.mark.slow
def test_bench(sizes: Path, tmp_path: Path) -> None:
    options = ("--repeat", 1, "--new-tokens", 2, "--native", "--json", tmp_path / "j")
    output("bench", sizes, *question_of(sizes, "--recipe", NAME, "--recipe", "stride-half", *options))
    plain, smaller, even = json.loads((tmp_path / "j").read_text())["rows"]
    assert smaller["kv_bytes"] * 66 == 38 * plain["kv_bytes"]
    assert 1.8 < smaller["flop_ratio"] < 2.1 < even["flop_ratio"]
    assert smaller["flops"] * smaller["flop_ratio"] == pytest.approx(plain["flops"])
    assert smaller["native"]["max_logit_error"] < 1e-4
    output("bench", sizes, *question_of(sizes, "--recipe", NAME, *options))
    alone = json.loads((tmp_path / "j").read_text())["rows"]
    assert [row["flops"] for row in alone] == [plain["flops"], smaller["flops"]]


def test_bench_of_inputs_that_are_there(sizes: Path) -> None:
    model, processor = with_processor(sizes, "cpu", "auto")
    inputs = dict(question(processor, "w10", read_images([sizes / "picture.png"])))
    with pytest.raises(
        ValueError, match=rf"recipe '{NAME}' makes .* smaller: expected others={{'{NAME}': its inputs}}"
    ):
        bench(model, inputs, [vr.Recipe.load(NAME)], backend="eager")


def test_what_has_no_pictures_or_one_size(picture: Path, sizes: Path) -> None:
    made_up = run("bench", sizes, "--recipe", "stride-half", "--recipe", NAME)
    assert made_up.exit_code == 2
    assert (
        f"error: recipe '{NAME}' makes pictures smaller, and a made-up prompt has none: expected --image and --prompt"
        in made_up.stderr
    )
    for name in ("apply", "bench"):
        done = run(name, CHECKPOINT, "--recipe", NAME, "--image", picture, "--prompt", "how many digits there")
        assert done.exit_code == 2 and f"error: {ONE_SIZE} (64*64) doesn't match model (96*96)." in done.stderr
    done = run("serve-args", CHECKPOINT, "--recipe", NAME)
    assert done.exit_code == 2 and "give the engine what recipe.processor(processor) returns" in done.stderr


def test_inspect_says_who_makes_them(sizes: Path) -> None:
    text = output("inspect", sizes, "--recipe", NAME, "--image-tokens", 64)
    assert "Downsample(keep=0.5): matched, BY THE PROCESSOR: the graph stays as it is" in text
    assert "note: smaller pictures are shown by --image-size and --image-tokens" in text
    assert "saves no FLOPs" not in text
    assert json.loads(output("inspect", sizes, "--recipe", NAME, "--json", "-"))["passes"][0]["by_processor"] is True


@pytest.mark.slow
@FEW
def test_eval_and_map(tiles: Path, tmp_path: Path) -> None:
    rows = [{"image": str(tiles / "picture.png"), "prompt": f"w{i}"} for i in range(10, 12)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--data", tmp_path / "my.jsonl", "--max-new-tokens", 2, "--json", "-")
    found = json.loads(output("eval", tiles, "--recipe", NAME, "--recipe", "random-half", *given))
    assert not found["failures"] and [row["recipe"] for row in found["rows"]] == ["unmodified", NAME, "random-half"]
    assert found["rows"][1]["kv"] == pytest.approx(11 / 25)
    model, processor = with_processor(tiles, "cpu", "auto")
    done = map_rows(model, processor, tmp_path / "my.jsonl", NAME, output=tmp_path / "out", max_new_tokens=2)
    told = vr.evaluate(model, processor, rows, NAME, max_new_tokens=2).samples
    answers = [json.loads(line)["output"] for line in _lines(done.answers)]
    assert answers == [sample["output"] for sample in told if sample["recipe"] == NAME]


def _lines(answers: Path) -> list[str]:
    if answers.suffix == ".jsonl":
        return answers.read_text().splitlines()
    parquet = pytest.importorskip("pyarrow.parquet")
    return [json.dumps(row) for row in parquet.read_table(answers).to_pylist()]


def test_map_on_a_model_of_one_size(digits: Any, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{NAME}: {ONE_SIZE}"):
        map_rows(*digits, questions, NAME, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_pipeline(sizes: Path) -> None:
    model, processor = with_processor(sizes, "cpu", "auto")
    asks = pipeline("image-text-to-text", model=model, processor=processor)
    asked = {"images": Image.open(sizes / "picture.png"), "text": "<image> w10 w20", "max_new_tokens": 4}
    plain = asks(**asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert vr.apply(asks, NAME) is asks
        small = asks(**asked)
    assert asks.processor is not processor and small != plain
    assert vr.report(asks).call["length"] == 38  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = copy.deepcopy(asks)
    vr.restore(model)  # either of the two
    assert asks.processor is processor and asks(**asked) == plain
    assert copied.processor is not processor
    with vr.applied(asks, NAME):
        assert asks(**asked) == small
    assert asks.processor is processor
    with vr.applied(asks, "stride-half"):
        assert asks.processor is processor


def test_a_pipeline_of_one_size(digits: Any, sizes: Path) -> None:
    model, processor = digits
    asks = pipeline("image-text-to-text", model=model, processor=processor)
    with pytest.raises(ValueError, match=ONE_SIZE):
        vr.apply(asks, NAME)
    assert asks.processor is processor and "forward" not in vars(model)
    with pytest.warns(UserWarning, match=TOLD):
        vr.apply(model, NAME)
    vr.restore(model)


@pytest.mark.slow
def test_the_oracle_and_a_listing_say_so_too(sizes: Path) -> None:
    model, processor = with_processor(sizes, "cpu", "auto")
    inputs = dict(question(processor, "w10", read_images([sizes / "picture.png"])))
    with pytest.warns(UserWarning, match=TOLD):
        assert vr.verify(model, inputs, NAME) < 1e-4
    assert "CHANGES NOTHING: Downsample(keep=0.5)" in str(vr.rewrite(vr.trace(model, inputs), [Downsample(keep=0.5)]))


class Serve:
    """Does with its manager what transformers' server does when it starts."""

    asked: Callable[[Any], None]

    def __init__(self, force_model: str, **_: Any) -> None:
        manager = model_manager.ModelManager(force_model=force_model)
        Serve.asked(manager)
        manager.shutdown()


@pytest.mark.slow
def test_a_server(sizes: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(command, "Serve", Serve)
    lengths = []

    def asked(manager: Any) -> None:
        _, processor = manager.load_model_and_processor(f"{sizes}@main")
        message = {"role": "user", "content": [{"type": "image", "url": str(sizes / "picture.png")}]}
        made = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
        lengths.append(int(made["input_ids"].shape[1]))

    Serve.asked = asked
    output("serve", sizes, "--recipe", NAME)
    output("serve", sizes, "--recipe", "stride-half")
    assert lengths == [36, 64]
    model = tmp_path / "one"
    shutil.copytree(CHECKPOINT, model)
    (model / "chat_template.jinja").write_text("<image>")
    done = run("serve", model, "--recipe", NAME)
    assert done.exit_code == 2 and f"error: {ONE_SIZE}" in done.stderr


@pytest.mark.slow
def test_blocks_are_trained_on_smaller_pictures(sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = with_processor(sizes, "cpu", "auto")
    recipe = vr.Recipe(name="both", passes=(Downsample(keep=0.5), DPVR(at=0.5)))
    model.generation_config.eos_token_id = 2
    rows = [{"id": i, "image": str(sizes / "picture.png"), "prompt": "w10", "answer": "w11"} for i in range(2)]
    seen = list[int]()
    monkeypatch.setattr("vlmrewrite.training.run.answered", _noting(seen))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*recipe.processor")
        vr.train(model, processor, rows, recipe, output=tmp_path / "blocks", steps=1, batch=1, progress=False)
    assert set(seen) == {36 + 1 + 2}  # tokens of the picture, a word, an answer and its end


def _noting(seen: list[int]) -> Any:
    def noted(*args: Any) -> Any:
        made = answered(*args)
        seen.append(int(made["input_ids"].shape[1]))
        return made

    return noted
