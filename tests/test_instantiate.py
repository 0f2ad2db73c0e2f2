"""Configs make what their place wants, and nothing else is called."""

import subprocess
import sys

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from openreml_nn import InputError
from openreml_nn.covariance import MaternMatrix, Matrix
from openreml_nn.support.instantiate import build

PROCESS = {
    "_target_": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "entrypoint": "/usr/bin/touch",
    "args": ["PWNED"],
    "env": {},
    "stdout": None,
    "stderr": None,
    "local_rank_id": 0,
    "numa_options": None,
}
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
#: What a stranger may name: functions, modules' own imports, classes that start processes, read
#: or write files, or import code, and classes that are right in another place.
ATTACKS = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "eval",
    "torch.hub.load",
    "torch.load",
    "torch.jit.load",
    "torch.os.system",
    "torch.nn.modules.module.torch.load",
    "torch.utils.data.dataloader.multiprocessing.Process",
    "openreml_nn.support.files.os.remove",
    "openreml_nn.table.encoder.pd.read_pickle",
    "openreml_nn.table.TableFile",
    "openreml_nn.__main__.main",
    "openreml_nn.lightning.MixedModelDataModule",
    "torch.package.PackageImporter",
    "torch.utils.tensorboard.SummaryWriter",
    "torch.utils.cpp_extension.BuildExtension",
    "torch.utils._triton.X",
    "torch.nn.parallel.DistributedDataParallel",
    "torch.nn.modules.linear.__builtins__",
    "torch.jit.ScriptModule",
    "torch.fx.GraphModule",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.Trainer",
    "torch.nothing",
    "torch..nn.Linear",
    "torch",
    "",
    3,
    None,
    ["torch.nn.Linear"],
]


@pytest.mark.parametrize("wants", [nn.Module, torch.optim.Optimizer, LRScheduler, Matrix, Callback])
@pytest.mark.parametrize("target", ATTACKS)
def test_a_class_is_what_its_place_wants(target, wants):
    with pytest.raises(InputError, match=r"^config 'thing': `_target_`"):
        build({"_target_": target}, "thing", wants)


@pytest.mark.parametrize("target", [*ATTACKS, "openreml_nn.estimation.AIREML"])
@pytest.mark.parametrize(
    "around",
    [
        lambda node: {"_target_": "torch.nn.Sequential", "_args_": [LINEAR, node]},
        lambda node: {"_target_": "torch.nn.Sequential", "x": [{"y": node}]},
        lambda node: {**LINEAR, "dtype": node},
    ],
)
def test_so_is_each_of_its_arguments(target, around):
    with pytest.raises(InputError, match=r"^config 'net': `_target_`"):
        build(around({"_target_": target}), "net", nn.Module)


def test_nothing_is_made_before_all_is_checked(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda self, *_, **__: made.append(self))
    with pytest.raises(InputError, match="SubprocessHandler"):
        build({"_target_": "torch.nn.Sequential", "_args_": [LINEAR, PROCESS]}, "net", nn.Module)
    assert not made


def test_a_class_that_starts_a_process_starts_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wants in (nn.Module, Callback, Logger, lightning.Trainer):
        with pytest.raises(InputError, match="SubprocessHandler"):
            build(PROCESS, "callbacks.x", wants, nested=(Callback, Logger, Strategy))
    assert not list(tmp_path.iterdir())


def test_what_is_not_of_the_package_is_not_imported():
    code = (
        "import sys\nfrom torch import nn\nfrom openreml_nn.support.instantiate import build\n"
        "for module in ('antigravity', 'torch.utils.bottleneck', 'openreml_nn.__main__'):\n"
        "    assert module not in sys.modules\n"
        "    try: build({'_target_': module + '.X'}, 'net', nn.Module)\n"
        "    except ValueError: pass\n"
        "    assert module not in sys.modules, module\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"_partial_": True}, "`_partial_` is True"),
        ({"_recursive_": False}, "`_recursive_` is False"),
        ({"_convert_": "none"}, "`_convert_` is 'none'"),
        ({"_args_": "ab"}, "`_args_` is 'ab'"),
        ({3: 4}, "3 is no name"),
    ],
)
def test_words_of_hydra(extra, named):
    with pytest.raises(InputError, match=named):
        build({**LINEAR, **extra}, "net", nn.Module)


def test_hydras_words_that_say_what_is_done_anyway():
    plain = {"_partial_": False, "_recursive_": True, "_convert_": "all"}
    assert build({**LINEAR, **plain}, "net", nn.Module).weight.shape == (3, 2)


def test_text_is_not_resolved_in_a_plain_config():
    with pytest.raises(InputError, match=r"Softmax: .*|oc.env"):
        build({"_target_": "${oc.env:HOME}"}, "net", nn.Module)
    made = build({"_target_": "torch.nn.Softmax", "dim": "${oc.env:HOME}"}, "net", nn.Module)
    assert made.dim == "${oc.env:HOME}"


def test_a_config_has_bounds():
    deep = LINEAR
    for _ in range(60):
        deep = {"_target_": "torch.nn.Sequential", "_args_": [deep]}
    around = {"_target_": "torch.nn.Sequential"}
    around["x"] = around
    wide = [1]
    for _ in range(30):
        wide = [wide, wide]
    for config in (deep, around, {"_target_": "torch.nn.Sequential", "_args_": wide}):
        with pytest.raises(InputError, match="too large"):
            build(config, "net", nn.Module)


@pytest.mark.parametrize("config", [None, 3, "torch.nn.Linear", {}, {"in_features": 2}, [LINEAR]])
def test_what_is_no_config(config):
    with pytest.raises(InputError, match=r"config 'net' is .* `_target_`"):
        build(config, "net", nn.Module)


def test_allowed_targets():
    made = build(OmegaConf.create({"_target_": "torch.nn.Sequential", "_args_": [LINEAR]}), "net",
                 nn.Module)  # fmt: skip
    assert made[0].weight.shape == (3, 2)
    optimizer = build({"_target_": "torch.optim.SGD", "lr": 0.1}, "o", torch.optim.Optimizer,
                      made.parameters())  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.1
    schedule = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}
    assert build(schedule, "s", LRScheduler, optimizer).step_size == 3
    aireml = {"_target_": "openreml_nn.estimation.AIREML"}
    assert build(aireml, "o", torch.optim.Optimizer, [nn.Parameter(torch.zeros(1))]).param_groups
    kernel = {"_target_": "openreml_nn.covariance.MaternMatrix"}
    assert isinstance(build(kernel, "k", Matrix, torch.zeros(2, 2)), MaternMatrix)
    assert isinstance(
        build({"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}, "c", Callback),
        Callback,
    )
    strategy = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "start_method": "popen"}
    trainer = {"_target_": "lightning.Trainer", "accelerator": "cpu", "strategy": strategy,
               "logger": False, "enable_progress_bar": False}  # fmt: skip
    made = build(trainer, "trainer", lightning.Trainer, nested=(Strategy,), max_epochs=7)
    assert (made.max_epochs, type(made.strategy).__name__) == (7, "DDPStrategy")
    with pytest.raises(InputError, match="DDPStrategy"):
        build(trainer, "trainer", lightning.Trainer)


def test_what_the_class_refuses_is_one_line_with_its_name():
    with pytest.raises(InputError, match=r"^config 'net': Linear: .*out_features"):
        build({"_target_": "torch.nn.Linear", "in_features": 2}, "net", nn.Module)
