"""Configs make objects of allowed packages only."""

import pytest

from openreml_nn import InputError
from openreml_nn.support.instantiate import build


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.hub.load",
        "torch.os.system",
        "torch.utils.data.dataloader.multiprocessing.Process",
        "openreml_nn.support.files.os.remove",
        "openreml_nn.table.encoder.pd.read_pickle",
        "torch.load",
        "torch.nothing",
        3,
        None,
    ],
)
def test_targets_that_are_not_allowed(target):
    with pytest.raises(InputError, match="_target_"):
        build({"_target_": target}, "thing")
    with pytest.raises(InputError, match="_target_"):
        build({"_target_": "torch.nn.Sequential", "x": [{"_target_": target}]}, "thing")


def test_allowed_targets():
    made = build({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}, "net")
    assert made.weight.shape == (3, 2)
    with pytest.raises(InputError, match="net"):
        build({"_target_": "torch.nn.Linear", "in_features": 2}, "net")
