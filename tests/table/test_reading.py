"""Files as they come, whole and in chunks, and what is written for a spreadsheet."""

import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openreml_nn import InputError, fit_stream, lmm
from openreml_nn.table import Encoder, TableFile, read_table, write_table

TABLE = pd.DataFrame(
    {
        "y": [1.0, 2.0, 3.0, 5.0, 4.0, 7.0],
        "x": [0.0, 1.0, 2.0, 3.0, 4.0, 6.5],
        "f": ["u", "v v", "w", "u", "v v", 'a "w"'],
        "k": [1, 2, 1, 2, 1, 2],
        "b": [True, False, True, True, False, True],
    }
)


def in_chunks(path, rows=2, **options):
    file = TableFile(path, **options)
    parts = list(file.chunks(rows, file.columns()))
    assert all(len(part) == rows for part in parts[:-1])
    return pd.concat(parts, ignore_index=True)


def same(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


SUFFIXES = [".csv", ".csv.gz", ".parquet", ".tsv", ".txt", ".csv.xz", ".csv.zip", ".tsv.bz2"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        TABLE.to_parquet(path)
    else:
        TABLE.to_csv(path, index=False, sep="," if ".csv" in suffix else "\t")
    same(read_table(path), TABLE)
    same(in_chunks(path), TABLE)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("missing.csv", None, "does not exist"),
        ("table.xlsx", b"x", "expected a name ending in"),
        ("empty.csv", b"", "cannot be read"),
        ("header.csv", b"y,x\n", "has no rows"),
        ("bytes.csv", bytes(range(128, 256)), "cannot be read.*encoding"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("broken.csv.gz", gzip.compress(b"y,x\n1,2\n", mtime=0)[:-9], "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("t.csv", ["1,a", '2,"b', "3,a", "4,b"], "row 2 .*: unexpected end of data"),
        ("t.csv", ["1,a", '2,"b', '3,"a', "4,b"], "row 2 .*: ',' expected after"),
        ("t.csv", ["1,a", "2,b", "3,a", '4,"b'], "row 4 .*: unexpected end of data"),
        ("t.txt", ["1 a", "2 b", '3 "a', "4 b"], "row 3 .*: unexpected end of data"),
    ],
)
def test_a_stray_quote_that_joins_rows_is_refused(tmp_path, name, rows, message):
    path = tmp_path / name
    path.write_text("\n".join(["y g" if name == "t.txt" else "y,g", *rows]) + "\n")
    with pytest.raises(InputError, match=f"the quotes of {message}"):
        read_table(path)
    with pytest.raises(InputError, match=f"the quotes of {message}"):
        list(TableFile(path).chunks(2, ["y"]))  # a column beside the one that is broken


def test_quotes_within_fields_and_lines_within_quotes_are_kept(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('y,g\n1,"a\nb"\n2,"say ""hi"""\n\n3,5" pipe\n4,"c, d"\n')
    expected = ["a\nb", 'say "hi"', '5" pipe', "c, d"]
    assert read_table(path)["g"].tolist() == expected
    assert [g for chunk in TableFile(path).chunks(3, ["g"]) for g in chunk["g"]] == expected


@pytest.mark.parametrize("content", ["", "y,g\n"])
def test_a_file_without_rows_is_said_to_have_none_in_chunks_too(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=r"t\.csv'(:| has) (there are )?no rows"):
        fit_stream("y ~ 1 + (1 | g)", tmp_path / "t.csv", chunk_rows=5)


def test_a_directory_is_not_a_table(tmp_path):
    with pytest.raises(InputError, match="is a directory: expected Parquet files"):
        read_table(tmp_path)


OPTIONS = {
    "semicolons": ({"sep": ";", "decimal": ","}, {"separator": ";", "decimal": ","}),
    "latin": ({"encoding": "latin-1"}, {"encoding": "latin-1"}),
    "utf-16": ({"encoding": "utf-16"}, {"encoding": "utf-16"}),
    "bom": ({"encoding": "utf-8-sig"}, {}),
    "pipes": ({"sep": "|"}, {"separator": "|"}),
    "crlf": ({"lineterminator": "\r\n"}, {}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_text(tmp_path, case):
    write, read = OPTIONS[case]
    table = TABLE.assign(f=["Köln", "a,b", "c;d", "e", "line\nbreak", "#1"])
    table.to_csv(tmp_path / "t.csv", index=False, **write)
    same(read_table(tmp_path / "t.csv", **read), table)
    same(in_chunks(tmp_path / "t.csv", **read), table)


def test_long_text_in_utf_16_is_read_as_short_text_is(tmp_path):
    table = pd.DataFrame({"a": range(9000), "b": "é"}).assign(c="0")
    table.loc[8999, "c"] = "07"  # a late leading zero, beyond the rows that types are guessed from
    table.to_csv(tmp_path / "t.csv", index=False, encoding="utf-16")
    same(read_table(tmp_path / "t.csv", encoding="utf-16"), table)
    same(in_chunks(tmp_path / "t.csv", encoding="utf-16"), table)


def test_points_are_no_decimal_commas(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n2,5;1,5\n1.234;2\n")
    for read in (read_table, in_chunks):
        found = read(tmp_path / "t.csv", separator=";", decimal=",")
        assert found["a"].tolist() == ["2,5", "1.234"]  # 1234 in German: it was 1.234 before
        assert found["b"].tolist() == [1.5, 2]


def test_comments_headers_and_marks(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('# exported\ny, x ,g\n1,2,"a # b"\n# between\n3,.,b # later\n5,-,NA\n')
    for read in (read_table, in_chunks):
        found = read(path, comment="#", missing=[".", "-"])
        assert list(found) == ["y", "x", "g"]
        assert found["x"].tolist()[0] == 2
        assert found["x"].isna().tolist() == [False, True, True]
        assert found["g"].tolist()[:2] == ["a # b", "b"]
        assert found["g"].isna().tolist() == [False, False, True]


def test_r_writes_names_of_rows_and_blanks(tmp_path):
    path = tmp_path / "t.txt"
    expected = {"y": [1.5, 2.5], "g": ["Block 1", "Block 2"]}
    path.write_text('"y" "g"\n"1" 1.5  "Block 1"\n"2" 2.5 "Block 2"\n')
    for read in (read_table, in_chunks):
        assert read(path).to_dict("list") == expected
    path.write_text("y\tg\n1.5\tBlock 1\n2.5\tBlock 2\n")
    for read in (read_table, in_chunks):
        assert read(path).to_dict("list") == expected


KINDS = [
    (["None", "S1", "N/A", "NA", ""], ["None", "S1", "N/A", None, None], "a"),
    (["1", "2", "N/A", "NA", ""], [1, 2, None, None, None], 1),
    (["1.5", "NULL", "NaN", "2", " 3"], [1.5, None, None, 2, 3], 1),
    (["007", "1", "2", "3", "NA"], ["007", "1", "2", "3", None], "5"),
    (["0", "10", "0.5", "-0.5", "1e3"], [0, 10, 0.5, -0.5, 1000], 1),
    (["1", "2", "3", "x4", "5"], ["1", "2", "3", "x4", "5"], "5"),
    (["TRUE", "FALSE", "NA", "TRUE", "TRUE"], [True, False, None, True, True], True),
    (["True", "1", "0", "1", "1"], ["True", "1", "0", "1", "1"], "5"),
    (["9007199254740993", "NA", "2", "3", "4"], [9007199254740993, None, 2, 3, 4], 1),
    (["18446744073709551617", "1", "2", "3", "4"], ["18446744073709551617", *"1234"], "5"),
    (["-1", "+2", "3", "4", "5"], [-1, 2, 3, 4, 5], 1),
    (["'=1+1", "''=x", "'a", "-5x", "'-5x"], ["=1+1", "'=x", "'a", "-5x", "-5x"], "a"),
    (["NA", "NA", "", "NA", "NA"], [None] * 5, None),
]


@pytest.mark.parametrize(("values", "expected", "filler"), KINDS)
@pytest.mark.parametrize("padding", [0, 20_000])
def test_kinds_of_columns_are_settled_by_all_values(tmp_path, values, expected, filler, padding):
    """In whole and in chunks, also where the first rows of a long file are of another kind."""
    path = tmp_path / "t.csv"
    written = "" if filler is None else str(filler)
    lines = [f"{i},{v}" for i, v in enumerate([*[written] * padding, *values])]
    path.write_text("\n".join(["row,v", *lines]) + "\n")
    for found in (read_table(path), in_chunks(path, 5000 if padding else 2)):
        column = found["v"].to_numpy(dtype=object, na_value=None)
        assert column.tolist() == [*[filler] * padding, *expected]


def test_numbers_are_rounded_correctly(tmp_path):
    x = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-100, 100).repeat(10)
    path = tmp_path / "t.csv"
    pd.DataFrame({"x": x, "k": 1}).to_csv(path, index=False)
    assert (read_table(path)["x"] == x).all()
    assert (in_chunks(path, 300)["x"] == x).all()


def test_folders_and_uris(tmp_path):
    folder = tmp_path / "table"
    for part in ("a", "b"):
        (folder / f"part={part}").mkdir(parents=True)
        TABLE.to_parquet(folder / f"part={part}" / "0.parquet")
    found = read_table(folder)
    assert len(found) == 12
    assert sorted(set(found["part"])) == ["a", "b"]
    assert len(in_chunks(folder)) == 12
    TABLE.to_parquet(tmp_path / "t.parquet")
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    for name in ("t.parquet", "t.csv"):
        for read in (read_table, in_chunks):
            same(read((tmp_path / name).as_uri()), TABLE)


def test_parquet_keeps_what_it_holds(tmp_path):
    big = 2**62 + 1
    table = pa.table(
        {
            "id": pa.array([big, None, 3], pa.int64()),
            "small": pa.array([1, 2, 3], pa.int8()),
            "price": pa.array([Decimal("1.50"), None, Decimal("2.25")], pa.decimal128(10, 2)),
            "key": pa.array([Decimal(10**20), Decimal(1), Decimal(2)], pa.decimal128(25, 0)),
            "flag": pa.array([True, None, False]),
            "tags": pa.array([["a"], [], ["b"]]),
            "y": [1.0, 2.0, 4.0],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    for found in (read_table(tmp_path / "t.parquet"), in_chunks(tmp_path / "t.parquet")):
        assert found["id"][0] == big
        assert found["id"].isna().tolist() == [False, True, False]
        assert found["price"].tolist()[::2] == [1.5, 2.25]
        assert int(found["key"][0]) == 10**20
        with pytest.raises(InputError, match="'tags' holds a ndarray in each row"):
            Encoder("y ~ tags").fit(found)
        assert Encoder("y ~ 1").fit(found).names == ("(Intercept)",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": ";;"}, "`separator` is ';;'"),
        ({"decimal": "x"}, "`decimal` is 'x'"),
        ({"encoding": "nonsense"}, "`encoding` is 'nonsense'"),
        ({"comment": ""}, "`comment` is empty"),
    ],
)
def test_options_that_are_none(tmp_path, options, message):
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.csv", **options)
    TABLE.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="is no text"):
        read_table(tmp_path / "t.parquet", separator=";")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y;x\n1,5;2\n2,5;3\n", r"another `separator` \(data\.separator\)"),
        ("# a comment\ny,x\n1,2\n", r"or a `comment` \(data\.comment\) before the header"),
        ("y,x\n1,2\n1\n", "cannot be read"),
        ("y,x\n1,2\n1,2,3\n", "cannot be read"),
    ],
)
def test_text_that_is_otherwise_says_what_to_try(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize(
    ("mark", "name"), [(";", "t.csv"), ("\t", "t.csv"), ("|", "t.csv"), (",", "t.tsv")]
)
def test_a_file_of_another_separator_says_which(tmp_path, mark, name, chunk_rows):
    (tmp_path / name).write_text(f"y{mark}x\n1{mark}2\n2{mark}4\n3{mark}5\n")
    with pytest.raises(InputError) as caught:
        lmm("y ~ x", tmp_path / name, chunk_rows=chunk_rows)
    assert f"read it with `separator` {mark!r} (data.separator)" in str(caught.value)


ESCAPED = {
    "=1+1": "'=1+1",
    "+cmd": "'+cmd",
    "-x": "'-x",
    "@SUM(A1)": "'@SUM(A1)",
    "\tx": "'\tx",
    "'=x": "''=x",
    "'quoted": "'quoted",
    "-5": "-5",
    "+3e4": "+3e4",
    "plain": "plain",
}


def test_what_a_spreadsheet_would_run_is_text(tmp_path):
    table = pd.DataFrame({"=name": list(ESCAPED), "n": np.arange(10) - 5.0})
    path = tmp_path / "t.csv"
    write_table(table, path)
    written = path.read_text().splitlines()
    assert written[0] == "'=name,n"
    fields = [line.rpartition(",")[0].strip('"') for line in written[1:]]
    assert fields == list(ESCAPED.values())
    assert written[1].endswith(",-5.0")
    for found in (read_table(path), in_chunks(path, 3)):
        assert list(found) == ["=name", "n"]
        assert found["=name"].tolist() == list(ESCAPED)


def test_a_path_is_a_table(tmp_path):
    table = pd.DataFrame({"y": np.random.default_rng(0).normal(size=60), "g": np.arange(60) % 6})
    table.to_csv(tmp_path / "t.csv", index=False, sep=";")
    expected = lmm("y ~ 1 + (1 | g)", table)
    file = TableFile(tmp_path / "t.csv", separator=";")
    for found in (lmm("y ~ 1 + (1 | g)", file), lmm("y ~ 1 + (1 | g)", file, chunk_rows=7)):
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-10)
    with pytest.raises(InputError, match=r"file .*t.csv.* has no column 'z'"):
        lmm("z ~ 1 + (1 | g)", tmp_path / "t.csv")
