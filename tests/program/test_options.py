"""Options: what has no effect in a run is refused, by the keys that the run reads."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from openreml_nn import InputError
from openreml_nn.program.fit import prepared
from openreml_nn.program.main import config_folder
from openreml_nn.program.options import Options, flags_first, quoted, references
from tests.forked import program


def composed(*overrides):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("config", list(map(quoted, overrides)))


def options_of(*arguments):
    """Options as the program has them."""
    groups = [a for a in arguments if a.startswith(("data=", "model="))]
    if any("experiment=neural" in a for a in arguments):
        groups = ["model=neural", "data=growth"]
        arguments += ("callbacks=default", "~callbacks.stop")
    return Options(composed(*arguments, "logger=none"), composed(*groups))


CHUNKS = ["data.chunk_rows=50"]
NEURAL = ["experiment=neural_longitudinal", "trainer.max_epochs=1", "model.width=4"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*CHUNKS, "optimizer=adam"], ["optimizer=torch.optim.Adam"]),
        ([*CHUNKS, "optimizer.tolerance=1e-3"], ["optimizer.tolerance=0.001"]),
        ([*CHUNKS, "experiment=gradient_descent"], ["optimizer=torch.optim.Adam"]),
        ([*CHUNKS, "model.solver=dense"], ["model.solver=dense"]),
        ([*CHUNKS, "data.validation=0.5"], ["data.validation=0.5"]),
        ([*CHUNKS, "profile=true"], ["profile=True"]),
        ([*CHUNKS, "resume=nothing.ckpt"], ["resume=nothing.ckpt"]),
        ([*CHUNKS, "model.residual=cs(Subject)"], ["model.residual=cs(Subject)"]),
        ([*CHUNKS, "callbacks=neural"], ["callbacks.trace", "callbacks.checkpoint"]),
        ([*CHUNKS, "trainer.devices=2"], ["trainer.devices=2"]),
        (
            [*CHUNKS, "optimizer=adam", "data.validation=0.5", "model.solver=dense", "resume=a"],
            ["optimizer=", "data.validation=0.5", "model.solver=dense", "resume=a"],
        ),
        (["data.split=group"], ["data.split=group"]),
        (["data.split_by=Subject"], ["data.split_by=Subject"]),
        (["data.separator=;"], ["data.separator=;"]),
        (["data.missing=[x]"], ["data.missing=['x']"]),
        ([*NEURAL, "~model.network", "+model.network={_target_: torch.nn.Tanh}"], ["width=4"]),
        (["data=table", "data.path=t.csv", "data.formula=y ~ x", "model.formula=y ~ 1"],
         ["data.formula=y ~ x"]),
        (["data.name=oats", "data.path=t.csv", "model.formula=y ~ x"], ["data.name=oats"]),
        (["+unheard=1"], ["unheard=1"]),
        (["+data.unheard=1"], ["data.unheard=1"]),
        (["+model.unheard=1"], ["model.unheard=1"]),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused_by_name(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("y,x\n1,2\n")
    with pytest.raises(InputError, match=r"^no effect ") as caught:
        prepared(options_of(*arguments))
    for name in named:
        assert name in str(caught.value)


@pytest.mark.parametrize("training", ["full", "parts", "null"])
def test_a_linear_model_is_told_how_it_is_trained(training):
    prepared(options_of(f"model.training={training}"))


def test_the_program_refuses_them_in_one_line(tmp_path):
    done = program(*CHUNKS, "resume=none.ckpt", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: no effect with data.chunk_rows=50: resume=none.ckpt; leave it out\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [*CHUNKS, "seed=7", "logger=none", "plots=false", "trainer.enable_progress_bar=false"],
        [*CHUNKS, "optimizer=aireml", "data.validation=0", "resume=null", "model.solver=blocked",
         "plots=false"],
        ["data=growth", "data.validation=0", "model.method=reml", "logger=none", "plots=false"],
    ],
)  # fmt: skip
def test_what_every_run_takes_and_what_is_given_its_default(tmp_path, arguments):
    done = program(*arguments, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
    assert not (tmp_path / "run" / "plots").exists()


def test_a_section_that_is_read_is_read_with_all_that_it_refers_to():
    config = composed("model=neural", "model.width=5", "model.features=6")
    options = Options(config, composed("model=neural"))
    with pytest.raises(InputError, match=r"^no effect here: model.width=5, model.features=6;"):
        options.check_all_read("here")
    assert options["model.network"]["_args_"][0]["out_features"] == 5
    options.check_all_read("here")


def test_a_value_is_given_where_what_it_refers_to_is():
    pristine = composed()
    assert not Options(composed(), pristine).is_given("model.formula")
    assert Options(composed("data.formula='y ~ x'"), pristine).is_given("model.formula")
    assert Options(composed("model.formula='y ~ x'"), pristine).is_given("model.formula")


@pytest.mark.parametrize("key", ["data", "model", "optimizer", "seed", "trainer"])
def test_what_every_run_needs_cannot_be_taken_out(key):
    with pytest.raises(InputError, match=rf"^~{key} leaves the run without {key}: expected {key}="):
        Options(composed(f"~{key}"), composed())


def test_references():
    assert references("${a.b} and ${ c }", "x.y") == ["a.b", "c"]
    assert references("${.b}", "x.y") == ["x.b"]
    assert references("${..b}", "x.y") == ["b"]
    assert references("${oc.env:HOME} ${now:%Y}", "x") == []
    assert references("${oc.decode:${a}}", "x") == ["a"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.formula=y ~ x + (1 | g)", "model.formula='y ~ x + (1 | g)'"),
        ("model.formula='y ~ x'", "model.formula='y ~ x'"),
        ('model.formula="y ~ x","y ~ z"', 'model.formula="y ~ x","y ~ z"'),
        ("model.formula=y ~ C(f, Treatment('a'))", r"model.formula='y ~ C(f, Treatment(\'a\'))'"),
        ("+model.formula=y ~ x", "+model.formula='y ~ x'"),
        ('model.formula=choice("y ~ x","y ~ (1 | g)")', 'model.formula="y ~ x","y ~ (1 | g)"'),
        ("data.path=a.csv,b.csv", "data.path=a.csv,b.csv"),
        ("data.path=a (1).csv", "data.path='a (1).csv'"),
        ("model.residual={_target_: torch.nn.Tanh}", "model.residual={_target_: torch.nn.Tanh}"),
        ("model.residual={x}", "model.residual='{x}'"),
        ("model.residual=ar1(t | g)", "model.residual='ar1(t | g)'"),
        ("seed=1,2", "seed=1,2"),
        ("-m", "-m"),
    ],
)
def test_free_text_is_quoted_for_hydra(argument, expected):
    assert quoted(argument) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job"],
        ["-c", "job", "-p", "model"],
        ["--cfg=job"],
        ["--info"],
        ["--info", "seed=1"],
        ["-i", "defaults"],
        ["-cd", ".", "-cn", "mine", "seed=1", "-m"],
        ["--config-dir=.", "--resolve"],
        ["~callbacks.stop", "+a=b", "a@b=c", "seed=1,2"],
    ],
)
def test_what_hydra_takes_is_taken(arguments):
    assert sorted(flags_first(arguments)) == sorted(arguments)


def test_flags_may_stand_between_overrides():
    typed = ["seed=1", "-m", "data=oats", "--config-dir", ".", "profile=true", "--info", "a=b"]
    overrides = [text for text in typed if "=" in text]
    assert flags_first(typed) == ["-m", "--config-dir", ".", "--info", *overrides]


@pytest.mark.parametrize("argument", ["job", "=3", "+", "seed=[1", "--nothing", "-x", ""])
def test_what_nobody_takes_is_named(argument):
    with pytest.raises(InputError, match=r"^option "):
        flags_first([argument])


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["-c", "job"], ["--cfg=job", "-p", "model"]])
def test_the_options_of_a_command_are_printed(tmp_path, flags):
    done = program(*flags, "model.method=ml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert OmegaConf.create(done.stdout)["method" if "-p" in flags else "model"]
    assert not list(tmp_path.iterdir())


def test_a_folder_of_ones_own_configs(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\nmodel:\n  method: ml\nlogger: {}\n"
    )
    done = program("-cd", ".", "-cn", "mine", "plots=false", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "method: ml" in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\ndata:\n  chunk_rows: 50\n  validation: 0.5\n"
    )
    done = program("-cd", ".", "-cn", "mine", "hydra.run.dir=run", cwd=tmp_path)
    assert (done.returncode, "data.validation=0.5" in done.stderr) == (2, True)
