"""`lbsgd check --fix` changes values in a file, and keeps the layout that a person gave it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbsgd.commands.main import main
from lbsgd.config.json_layout import with_values

THEIRS = """
{
    "train_batch_size"  : 2.56e2,
    "betas": [0.9,
              0.999],

    "zero_optimization": { "stage": 1, "overlap_comm": true },
    "name": "r\\u00e9sum\\u00e9 \\" , }"
}  """


def changed(text, **values):
    return with_values(text, {**json.loads(text), **values})


def without(text, key):
    return with_values(text, {name: value for name, value in json.loads(text).items() if name != key})


def test_equal_values_leave_every_character():
    assert with_values(THEIRS, json.loads(THEIRS)) == THEIRS


@pytest.mark.parametrize(
    "values, old, new",
    [
        ({"train_batch_size": 512}, "2.56e2", "512"),
        ({"train_batch_size": 256}, "2.56e2", "256"),  # 256.0 before
        ({"betas": []}, "[0.9,\n              0.999]", "[]"),
        ({"zero_optimization": {"stage": 0, "overlap_comm": True}}, '"stage": 1', '"stage": 0'),
        ({"zero_optimization": {"stage": 1}}, ', "overlap_comm": true', ""),
        ({"zero_optimization": {"overlap_comm": True}}, '"stage": 1, ', ""),
        ({"zero_optimization": {}}, '{ "stage": 1, "overlap_comm": true }', "{}"),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": True, "fast": {"a": {}}}},
            '"overlap_comm": true',
            '"overlap_comm": true, "fast": {"a": {}}',
        ),
        ({"fp16": {"enabled": True}}, ', }"', ', }",\n    "fp16"  : {"enabled": true}'),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}},
            ', }"',
            ', }",\n    "scheduler"  : {\n        "type": "WarmupLR",\n        "params": {}\n    }',
        ),
    ],
)
def test_only_what_differs_is_written_anew(values, old, new):
    assert THEIRS.count(old) == 1
    assert changed(THEIRS, **values) == THEIRS.replace(old, new)


def test_a_deleted_key_takes_its_line_along_wherever_it_stands():
    lines = THEIRS.splitlines(keepends=True)
    assert without(THEIRS, "train_batch_size") == "".join(lines[:2] + lines[3:])
    assert without(THEIRS, "zero_optimization") == "".join(lines[:5] + lines[7:])
    assert without(THEIRS, "name") == "".join(lines[:6]) + lines[6].replace(" },", " }") + lines[8]


@pytest.mark.parametrize(
    "before, after",
    [
        ('{"a":1,"b":2}', '{"a":1,"b":2,"c":3}'),
        ('{ "a" : 1 }', '{ "a" : 1, "c" : 3 }'),
        ('{\n\t"a": 1\n}', '{\n\t"a": 1,\n\t"c": 3\n}'),
        ('{\r\n  "a": 1\r\n}\r\n', '{\r\n  "a": 1,\r\n  "c": 3\r\n}\r\n'),
        ('{\n  "a": 1\n, "b": 2\n}', '{\n  "a": 1\n, "b": 2\n, "c": 3\n}'),
    ],
)
def test_a_new_key_is_written_like_those_beside_it(before, after):
    assert changed(before, c=3) == after and without(after, "c") == before


def test_the_command_keeps_the_layout(tmp_path, capsys):
    path = tmp_path / "ds.json"
    text = '{"train_batch_size": 8,\r\n\r\n "optimizer": {"type": "sgd",\r\n   "params": {"lr": 1e-1}}}'
    path.write_bytes(text.encode())
    assert main(["check", "--fix", str(path)]) == 0
    assert path.read_bytes().decode() == text.replace('"sgd"', '"SGD"')
    assert (tmp_path / "ds.json.orig").read_bytes().decode() == text
    assert "layout" not in capsys.readouterr().out


SCALARS = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(' {}",:\\\n\u00e9\ud800', max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=2) | st.dictionaries(st.sampled_from("abcd"), each, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from("abcdef"), VALUES, max_size=5)
INDENTS = st.sampled_from([None, 0, 1, 4, "\t"])


@given(OBJECTS, OBJECTS, INDENTS, st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_text_holds_the_values_in_any_layout(before, after, indent, separators, ascii_only):
    text = json.dumps(before, indent=indent, separators=separators, ensure_ascii=ascii_only)
    written = with_values(text, after)
    assert json.dumps(json.loads(written)) == json.dumps(after)
    assert with_values(written, after) == written
    mixed = {**before, **after}
    parts = with_values(text, mixed)
    assert json.dumps(json.loads(parts)) == json.dumps(mixed)
