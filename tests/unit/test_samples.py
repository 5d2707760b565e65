"""Rows of data as samples: all forms that are taken, and one line for each that is not."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmrewrite.evaluate import Sample, read_data
from vlmrewrite.evaluate.data import fingerprint

PICTURE = Image.new("RGB", (3, 2), (200, 10, 10))


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a b.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:40])
    (tmp_path / "words.txt").write_text("words")
    return tmp_path / "my.jsonl"


def read(file: Path, *rows: Any) -> list[Sample]:
    file.write_text("\n\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows) + "\n")
    return read_data(file)


ROW = {"image": "pictures/a b.png", "prompt": "what ?"}


def test_forms_of_images(file: Path) -> None:
    url = (file.parent / "pictures" / "a b.png").as_uri()
    inline = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    found = read(file, ROW, {"images": [url, inline], "prompt": "both ?"})
    assert [len(s.pictures()) for s in found] == [1, 2]
    assert {p.getpixel((0, 0)) for s in found for p in s.pictures()} == {(200, 10, 10)}
    images = [png(), PICTURE, {"bytes": png(), "path": None}, {"path": str(file.parent / "pictures" / "a b.png")}]
    for sample in read_data([{"image": image, "prompt": "?", "other": 1} for image in images]):
        assert sample.pictures()[0].size == (3, 2)


def test_references(file: Path) -> None:
    answers: list[dict[str, Any]] = [
        {"answer": 3},
        {"answers": ["a", 1.5]},
        {"answer": [1, 2, 3, 4]},
        {"choices": ["x", "y"], "answer": "y"},
        {"choices": ["x", "y"], "answer": 1},
        {"choices": ["x", "y"], "answer": "B"},
        {"choices": [1, 0], "answer": 0},
        {"choices": ["1", "2", "4"], "answer": 1},
        {"answer": 5.0},
        {"choices": [1.0, 2.5], "answer": 1},
    ]
    found = read(file, *(ROW | a for a in answers))
    assert [s.answers for s in found] == [
        ("3",),
        ("a", "1.5"),
        ("[1, 2, 3, 4]",),
        ("y",),
        ("y",),
        ("y",),
        ("0",),
        ("2",),
        ("5",),
        ("1",),
    ]
    assert [s.id for s in found] == [*range(10)]
    [named] = read(file, ROW | {"id": "q7", "kind": "count", "answer": None})
    assert (named.id, named.kind, named.answers) == ("q7", "count", ())


def test_chats(file: Path) -> None:
    image = {"type": "image"}
    [one] = read(file, {"image": "pictures/a b.png", "messages": [{"role": "user", "content": "what ?"}]})
    assert one.messages == ({"role": "user", "content": [image, {"type": "text", "text": "what ?"}]},)
    assert one.question() == "what ?"
    parts = [{"type": "text", "text": "this"}, {"type": "image", "url": "pictures/a b.png"}]
    [two] = read(file, {"messages": [{"role": "user", "content": parts}]})
    assert two.messages == ({"role": "user", "content": [parts[0], image]},)
    assert two.images == (file.parent / "pictures" / "a b.png",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "expected JSON: "),
        ("[1]", "expected a mapping with image, prompt and answer, got [1] (list)"),
        ({"prompt": "?"}, "expected an 'image' or 'images', got none"),
        (ROW | {"images": []}, "expected 'image' or 'images', got both"),
        (ROW | {"image": "no.png"}, "no.png: No such file or directory"),
        (ROW | {"image": "broken.png"}, "expected an image file, got "),
        (ROW | {"image": "words.txt"}, "words.txt: of no format that Pillow knows"),
        (ROW | {"image": ""}, "image: expected a path, got an empty text"),
        (ROW | {"image": "data:image/png;base64,@@@"}, "image: expected a data: URL in base64, got 'data:image/png;"),
        (ROW | {"image": "data:image/png;base64,AAAA"}, "expected an image file, got 3 bytes: of no format that Pil"),
        ({"video": "a.mp4", "prompt": "?"}, "got videos, which are not read: give frames as 'images'"),
        (ROW | {"image": "https://example.org/a.png"}, "image: expected one on disk, got 'https://example.org/a.png'"),
        (ROW | {"image": 3}, "image: expected a path, bytes or a PIL image, got 3"),
        ({"image": "pictures/a b.png"}, "expected 'prompt' or 'messages', got neither"),
        (ROW | {"prompt": " "}, "prompt: expected a question, got ' ' (str)"),
        (ROW | {"messages": []}, "expected 'prompt' or 'messages', got both"),
        ({"image": "pictures/a b.png", "messages": [{"role": "user"}]}, "expected mappings with 'role' and 'content'"),
        (
            {"images": ["pictures/a b.png"] * 2, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages: expected an image part for each of 2 images, or none, got 1",
        ),
        (ROW | {"answer": ""}, "answer: expected a reference (text, a number, or a box of four), got '' (str)"),
        (ROW | {"answers": []}, "answers: expected a list of at least one reference, got [] (list)"),
        (ROW | {"answer": "a", "answers": ["a"]}, "expected 'answer' or 'answers', got both"),
        (ROW | {"choices": ["x", "y"], "answer": "z"}, "answer: expected one of the choices 'x', 'y', got 'z' (str)"),
        (ROW | {"answer": float("nan")}, "answer: expected a reference (text, a number, or a box of four), got nan"),
        (ROW | {"choices": [1, 2], "answer": 0}, "answer: expected one of the choices '1', '2', got 0"),
        (
            ROW | {"choices": ["x", "X "], "answer": "x"},
            "choices: expected options that differ but for case and spaces",
        ),
        (ROW | {"choices": ["x", "y"], "answer": [1]}, "answer: expected one of the choices 'x', 'y', got [1] (list)"),
        (ROW | {"choices": ["x", "y"], "answer": 2}, "answer: expected one of the choices 'x', 'y', got 2"),
        (ROW | {"choices": ["x", "y"]}, "expected an 'answer' beside 'choices', got none"),
        (ROW | {"choices": ["x"], "answer": "x"}, "choices: expected a list of at least two options"),
        (ROW | {"id": [1]}, "id: expected text or an integer, got [1] (list)"),
        (ROW | {"id": 0, "answer": "a"}, "id: expected one of its own, got 0, which "),
        (ROW, "expected an 'answer', as other rows have, got none"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rows_that_are_wrong(file: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(file, ROW | {"answer": "a"}, row)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{file} line 3: ")


def test_many_rows_that_are_wrong_are_counted(file: Path) -> None:
    with pytest.raises(ValueError, match="expected an 'image'") as caught:
        read(file, *[{"prompt": "?"}] * 50)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 30 more rows that cannot be used"


def test_data_that_is_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected a file with data, got 'no.jsonl', which is not a file"):
        read_data("no.jsonl")
    with pytest.raises(ValueError, match=r"words\.txt: expected a file that ends in \.jsonl or \.parquet"):
        read_data(file.parent / "words.txt")
    with pytest.raises(ValueError, match=r"expected at least one sample, got none from .*my\.jsonl, which holds none$"):
        read(file, "")
    with pytest.raises(ValueError, match=r"my\.jsonl: expected JSON Lines, .* got a list: write a row a line$"):
        read(file, json.dumps([ROW, ROW], indent=1))
    file.write_bytes(json.dumps(ROW).encode() + b"\n\xe9\n")
    with pytest.raises(ValueError, match=r"my\.jsonl: expected text in UTF-8: .* byte 0xe9"):
        read_data(file)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())  # as Windows writes it
    assert len(read_data(file)) == 1
    with pytest.raises(TypeError, match="expected the path of a .jsonl or .parquet file, or rows, got 3"):
        read_data(3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (file.parent / "my.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"my\.parquet: Parquet needs pyarrow, which is not installed: pip install"):
        read_data(file.parent / "my.parquet")


def test_parquet(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": png(), "path": None}, "prompt": "what ?", "answer": str(i)} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
    found = read_data(file.with_suffix(".parquet"))
    assert [(s.answers, s.pictures()[0].size) for s in found] == [((str(i),), (3, 2)) for i in range(3)]
    data = bytearray(file.with_suffix(".parquet").read_bytes())
    data[4:40] = b"\xff" * 36  # the head of the first page
    file.with_suffix(".parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"my\.parquet: expected a Parquet file that is whole: "):
        read_data(file.with_suffix(".parquet"))


def test_the_fingerprint_sees_pixels(file: Path) -> None:
    before = fingerprint(read(file, ROW))
    assert before == fingerprint(read(file, ROW)) != fingerprint(read(file, ROW | {"kind": "a"}))
    Image.new("RGB", (3, 2)).save(file.parent / "pictures" / "a b.png")
    assert fingerprint(read(file, ROW)) != before
