"""Lines by number against reading the whole file, and what is wrong with files."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.train import records as records_module
from maxlike.train.records import Records, find_files, hold_out
from tests.train.corpora import write_lines

LINES = st.lists(st.sampled_from([b"", b" ", b"\t\r", b"{}", b'{"text": "a"}', b"x" * 40, "é🎉".encode(), b"\xff"]),
                 max_size=12)


@settings(max_examples=50)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]), chunk=st.integers(1, 50), packed=st.booleans())
def test_every_line_by_its_number(tmp_path_factory, lines, end, chunk, packed):
    folder = tmp_path_factory.mktemp("lines")
    content = b"\n".join(lines) + end
    file = folder / ("a.jsonl.gz" if packed else "a.jsonl")
    file.write_bytes(gzip.compress(content) if packed else content)
    expected = [(f"{file}, line {i}", line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "_CHUNK", chunk)
        if not expected:
            with pytest.raises(ValueError, match="no record in"):
                Records([file])
            return
        found = Records([file])
    assert [(record.where, record.line.removesuffix(b"\n")) for record in found] == expected
    assert found.bytes == len(content) and len(found) == len(expected)
    assert found[len(expected) - 1].where == expected[-1][0]
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            found[outside]


def test_several_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    one = write_lines(tmp_path / "b.jsonl", [1, 2])
    two = write_lines(tmp_path / "deep" / "a.jsonl", [3])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "other.txt").write_text("none of it")
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b"4\n5"))
    assert find_files([tmp_path]) == [one, packed, two, tmp_path / "empty.jsonl"]
    assert find_files([f"{tmp_path}/*.jsonl", one]) == [one, tmp_path / "empty.jsonl"]
    assert find_files([two, f"{tmp_path}/**/*.jsonl"])[0] == two
    found = Records([two, tmp_path])
    assert [json.loads(record.line) for record in found] == [3, 1, 2, 4, 5]
    assert [record.where for record in found][-1] == f"{packed}, line 2"


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: there is no such file or folder"):
        Records([tmp_path / "nowhere.jsonl"])
    with pytest.raises(ValueError, match="a folder without a file"):
        Records([tmp_path])
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        Records([tmp_path])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read"):
        Records([tmp_path])


def test_a_file_that_changes_meanwhile(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", range(10, 20))
    records = Records([file])
    file.write_text("10\n")
    with pytest.raises(ValueError, match="line 7 cannot be read any more: the file has become shorter"):
        records[6]
    file.unlink()
    with pytest.raises(ValueError, match="line 1 cannot be read any more"):
        records[0]


def test_what_is_held_out_stays_so(tmp_path):
    records = Records([write_lines(tmp_path / "a.jsonl", range(1000))])
    train, held = hold_out(records, 0.1)
    numbers = [[json.loads(record.line) for record in part] for part in (train, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(1000)) and 60 < len(held) < 140
    assert np.all(np.diff(numbers[1]) > 0)
    more = Records([write_lines(tmp_path / "b.jsonl", range(1300))])
    assert [json.loads(record.line) for record in hold_out(more, 0.1)[1]][: len(held)] == numbers[1]
    half = {json.loads(record.line) for record in hold_out(records, 0.5)[1]}
    assert set(numbers[1]) < half
    for fraction, says in ((0, "between 0 and 1"), (1.0, "between 0 and 1"), (1e-9, "none to validate on")):
        with pytest.raises(ValueError, match=says):
            hold_out(records, fraction)
