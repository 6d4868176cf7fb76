"""Reading tables and texts."""

import gzip
import json
import zlib

import pytest

from dynadepth.errors import DataError
from dynadepth.evaluation.files import read_rows, read_text, stem, with_window


def test_stem_drops_both_suffixes():
    assert [stem("a/arc_easy.jsonl.gz"), stem("b.jsonl"), stem("c.txt")] == ["arc_easy", "b", "c.txt"]


def test_a_window_may_follow_the_name_of_a_text(tmp_path):
    odd = tmp_path / "odd@64"
    odd.write_text("It is called so.")
    (tmp_path / "book.txt").write_text("Once upon a time.")
    assert with_window(tmp_path / "book.txt@4096") == (tmp_path / "book.txt", 4096)
    assert with_window(tmp_path / "book.txt") == (tmp_path / "book.txt", None)
    assert with_window(odd) == (odd, None)
    assert read_text(tmp_path / "book.txt@64") == "Once upon a time."
    assert read_text(odd) == "It is called so."
    with pytest.raises(DataError, match=r"no file .*book\.text\."):
        read_text(tmp_path / "book.text@64")


def test_rows_come_in_order_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_text_of_a_table_is_joined_in_the_order_of_its_ids(tmp_path):
    path = tmp_path / "wiki.jsonl.gz"
    rows = [{"id": "w/010", "text": " = B = \n \n b\n"}, {"id": "w/002", "text": " = A = \n"}]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert read_text(path) == " = A = \n = B = \n \n b\n"


def test_text_keeps_its_line_ends(tmp_path):
    for name, pack in (("a.txt", bytes), ("b.txt.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack("Grüße\r\n\u2028x\n".encode()))
        assert read_text(tmp_path / name) == "Grüße\r\n\u2028x\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "not JSON at line 2"),
        ("a.jsonl", b"[1]\n", "no JSON object at line 1"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl.gz", b'{"a": 1}\n', "cannot be read beyond line"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "cannot be read beyond line"),
        ("a.jsonl", b"\xff\xfe\n", "not UTF-8 at line 1"),
    ],
    ids=["cut off", "no object", "empty", "not packed", "packed and cut off", "not text"],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_damage_inside_a_gzip_file_is_a_data_error(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))

    def broken(*_, **__):
        raise zlib.error("Error -3")

    monkeypatch.setattr(gzip, "open", broken)
    with pytest.raises(DataError, match="cannot be read beyond line"):
        read_rows(path)


def test_a_missing_file_names_a_near_one(tmp_path):
    (tmp_path / "wikitext.txt").write_text("x")
    with pytest.raises(DataError, match=r"Did you mean 'wikitext\.txt'"):
        read_text(tmp_path / "wikitxt.txt")
    with pytest.raises(DataError, match="There is no file"):
        read_text(tmp_path / "none" / "a.txt")


def test_a_table_without_text_names_its_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "?"}\n')
    with pytest.raises(DataError, match="no text field 'text' but 'query'"):
        read_text(path)


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text to score"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b'{"n": ' + b"1" * 5000 + b"}", b"[" * 100_000], ids=["endless", "deep"])
def test_what_json_chokes_on_is_one_sentence(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="not JSON at line 1"):
        read_rows(tmp_path / "a.jsonl")


def test_gzip_is_known_by_its_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n'))
    assert read_rows(tmp_path / "a.jsonl") == [{"a": 1}]
