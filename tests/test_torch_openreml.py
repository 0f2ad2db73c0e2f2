"""The page for those who come from torch_openreml maps each of its names to one that is there."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "torch_openreml.md").read_text(encoding="utf-8")
#: First and second cell of each row of the tables.
ROWS = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|", PAGE, re.MULTILINE)

MATRIX = """
    shape param_specs param_names free_param_names fixed_param_names free_param_index
    fixed_param_index num_params num_free_params num_fixed_params param_defaults
    free_param_defaults fixed_param_defaults param_trans free_param_trans fixed_param_trans
    repr_dict build_params set_param_specs trans_grad auto_grad manual_grad grad grad_mode
    jacobian_method jacobian_chunk_size cache set_intermediates get_intermediates
    reset_intermediates enable_cache disable_cache get_default_dtype_device
"""
OPERATOR = "operands build_operands operands_grad call_tree grad_tree"
REML = """
    v optimize ai_step update compute_v_dv is_converged history get_theta get_beta blue predict
    residual loglik
"""
#: Public names of version 0.4.0a0, but for those that a class has from its base.
ORIGINAL = [
    *["MarginalREML", "MixedModelREML"],
    *(f"MarginalREML.{name}" for name in REML.split()),
    *(f"MixedModelREML.{name}" for name in ["g", "z", "cp", "v", "random_terms", "error_term"]),
    *["blue", "blup", "marginal_predict", "marginal_residual", "predict", "residual", "loglik"],
    *(
        f"utils.{name}"
        for name in [
            "get_device",
            "get_dtype",
            "numeric_to_design_matrix",
            "augment",
            "interaction",
            "n_distinct",
        ]
    ),
    "example_data.john_alpha",
    *["Matrix", "Operator", "param.simple_param_specs"],
    *(f"Matrix.{name}" for name in MATRIX.split()),
    *(f"Operator.{name}" for name in OPERATOR.split()),
    *(
        f"{name}Matrix"
        for name in [
            "Identity",
            "Scalar",
            "Diagonal",
            "EqualEntry",
            "Equicorrelation",
            "CompoundSymmetric",
            "AR1",
            "Unconstrained",
            "LowerTriangular",
            "Dummy",
            "Simple",
        ]
    ),
    *["EquicorrelationMatrix.rho_min", "CompoundSymmetricMatrix.rho_min", "DummyMatrix.colnames"],
    *["Adapter", "Adapter.adaptee", "Adapter.param_map", "Gram.gram_type"],
    *[
        "Sum",
        "BlockDiagonal",
        "CovariancePropagation",
        "KroneckerProduct",
        "HadamardProduct",
        "Product",
    ],
    *["Transpose", "Gram", "Augment", "Stack", "Inverse"],
    "Transform",
    *(f"Transform.{name}" for name in ["domain", "codomain", "inverse", "grad"]),
    *(
        f"Transform{name}"
        for name in [
            "Identity",
            "Exp",
            "Exp2",
            "Exp10",
            "ExpPow2",
            "Sigmoid",
            "ScaleShift",
            "Pow",
            "Chain",
        ]
    ),
    "TransformChain.chain",
]


def found(path):
    """What stands at a dotted path within the package."""
    value = importlib.import_module("openreml_nn")
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_every_name_of_the_original_is_on_the_page():
    listed = [name.strip("`") for name, _ in ROWS]
    assert sorted(listed) == sorted(ORIGINAL)


@pytest.mark.parametrize(("name", "cell"), ROWS, ids=lambda text: text.strip(" `"))
def test_what_a_name_became_is_there(name, cell):
    for path in re.findall(r"`([^`]*)`", cell):
        assert callable(found(path)) or isinstance(found(path), property), path


def test_names_that_stayed_are_where_the_original_has_them():
    stayed = [(n.strip("`"), c.strip().strip("`")) for n, c in ROWS if c.strip()]
    same = {name for name, path in stayed if path.split(".")[-1] == name.split(".")[-1]}
    assert {"blue", "loglik", "Sum", "Transform.domain", "Matrix.build_params"} <= same
    assert len(same) > 80


@pytest.mark.parametrize("name", ["map_theta_to_v", "map_theta_to_dv"])
def test_names_of_earlier_versions(name):
    assert callable(found(f"covariance.Matrix.{name}"))
    assert name in PAGE
