"""Files are written whole or not at all."""

import pytest

from openreml_nn import InputError, datasets, lmm
from openreml_nn.support.files import replacing, write_text


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails():
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_suffix_of_the_temporary_file_is_that_of_the_target(tmp_path):
    with replacing(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")
    assert (tmp_path / "plot.png").read_bytes() == b"x"


def test_a_result_goes_where_a_file_can_be(tmp_path):
    result = lmm("Reaction ~ Days + (1 | Subject)", datasets.sleepstudy())
    with pytest.raises(InputError, match=r"`path` is .*: the folder '.*none' does not exist"):
        result.to_json(tmp_path / "none" / "x.json")
    with pytest.raises(InputError, match=r"`path` is .*, a folder: expected the name of a file"):
        result.to_json(tmp_path)
