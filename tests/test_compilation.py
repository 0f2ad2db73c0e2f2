"""What is compiled says so."""

from types import SimpleNamespace

import pytest

from openreml_nn.likelihood.system.sparse.forest import postorder
from openreml_nn.support.compilation import announcer
from tests.forked import COMPILES


@pytest.mark.parametrize(("after", "said"), [(0.0, COMPILES), (60.0, "")])
def test_it_is_said_once_and_after_a_while(capsys, after, said):
    def begun(function):
        return SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=function)})

    listener = announcer(after)
    listener.on_start(begun(test_it_is_said_once_and_after_a_while))  # somebody else's
    assert capsys.readouterr().err == ""
    for _ in range(2):
        listener.on_start(begun(postorder))
    assert capsys.readouterr().err == said
