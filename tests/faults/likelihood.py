"""Faults of the likelihood's solvers."""

from tests.faults.fault import Fault

LOSS = "tests/likelihood/test_loss.py"
DENSE = f"{LOSS} -k 'value_equals or (blocked_equals and auto)'"
BLOCKED = f"{LOSS} -k 'blocked_equals'"
SPECTRAL = "tests/likelihood/test_spectral.py -k 'equals_dense or equal_dense'"
GRID = "tests/likelihood/test_grid.py -k grid_equals"
SPARSE = "tests/likelihood/test_sparse.py -k 'equals_dense or equal_dense'"
KRYLOV = "tests/likelihood/test_krylov.py"
ROOTS = "openreml_nn/likelihood/system/square_root.py"
OF_ROOTS = "tests/likelihood/test_square_root.py"


FAULTS = [
    Fault(
        "the dense score takes V's inverse for P with REML",
        "openreml_nn/likelihood/solvers/dense.py",
        "trace = self._projector() if reml else",
        "trace = self._projector() if not reml else",
        DENSE,
    ),
    Fault(
        "the dense information forgets the fixed effects",
        "openreml_nn/likelihood/solvers/dense.py",
        "return (white.mT @ white - part.mT @ part) / 2",
        "return (white.mT @ white) / 2",
        DENSE,
    ),
    Fault(
        "dense prediction-error variances forget the fixed effects",
        "openreml_nn/likelihood/solvers/dense.py",
        "upper=True), lost], 1)",
        "upper=True), 0 * lost], 1)",
        DENSE,
    ),
    Fault(
        "the restricted likelihood is that of orthonormal columns",
        "openreml_nn/likelihood/problem.py",
        "log_det_x = log_det_x - 2 * self.fixed.log_det",
        "log_det_x = log_det_x - self.fixed.log_det",
        DENSE,
    ),
    Fault(
        "the restricted likelihood has log 2 pi for every row",
        "openreml_nn/likelihood/problem.py",
        "-((self.n - self.p) * log(2 * pi)",
        "-(self.n * log(2 * pi)",
        DENSE,
    ),
    Fault(
        "prediction-error variances lack a factor of the prior",
        "openreml_nn/likelihood/effects.py",
        "g.whole(len(values)), g.multiply(z_p_z)",
        "g.whole(len(values)), z_p_z",
        "tests/likelihood/test_evaluate.py -k indefinite",
    ),
    Fault(
        "the derivative by X is that of ML",
        "openreml_nn/likelihood/problem.py",
        'if self.problem.method == "reml":\n            by_Q',
        'if self.problem.method == "ml":\n            by_Q',
        f"{LOSS} -k gradcheck_in",
    ),
    Fault(
        "a column counts as aliased when a thousandth of it is left",
        "openreml_nn/likelihood/fixed.py",
        "tolerance: float = 1e-7",
        "tolerance: float = 1e-3",
        "tests/likelihood/test_fixed.py",
    ),
    Fault(
        "coefficients lack the least-squares part",
        "openreml_nn/likelihood/fixed.py",
        "return self.T @ gamma + self.offset",
        "return self.T @ gamma",
        "tests/estimation/test_fit.py -k 'closed_form or blues'",
    ),
    Fault(
        "blocked prediction-error variances forget the fixed effects",
        "openreml_nn/likelihood/system/evaluation.py",
        "values[0][:, at : at + w], spread + added @ added.mT",
        "values[0][:, at : at + w], spread",
        BLOCKED,
    ),
    Fault(
        "the score of the other factors is that of ML",
        "openreml_nn/likelihood/system/evaluation.py",
        "S2 = (uu - B + R if reml else uu - B) / 2",
        "S2 = (uu - B) / 2",
        BLOCKED,
    ),
    Fault(
        "the information forgets the factor of the scaled rows",
        "openreml_nn/likelihood/system/evaluation.py",
        "return (total - inner(e1, e1) - own - e3.mT @ e3) / 2",
        "return (total - inner(e1, e1) - own) / 2",
        BLOCKED,
    ),
    Fault(
        "a sparse quadratic form counts its diagonal twice",
        "openreml_nn/likelihood/system/cross.py",
        "return upper + upper.mT - diagonal",
        "return upper + upper.mT",
        "tests/likelihood/test_cross.py",
    ),
    Fault(
        "a dense quadratic form counts its diagonal twice",
        "openreml_nn/likelihood/system/cross.py",
        "torch.diag_embed(Q[0].diagonal() / 2)",
        "torch.diag_embed(Q[0].diagonal() * 0)",
        "tests/likelihood/test_cross.py",
    ),
    Fault(
        "blocks of residuals count once in the determinant",
        "openreml_nn/likelihood/residual.py",
        "2 * (bucket.count * L.diagonal",
        "2 * (1 * L.diagonal",
        f"{LOSS} -k 'structured_residuals and sparse'",
    ),
    Fault(
        "weights do not enter the determinant",
        "openreml_nn/likelihood/residual.py",
        "self.log_det = 2 * self._v.abs().log().sum()",
        "self.log_det = 0 * self._v.abs().log().sum()",
        f"{LOSS} -k 'blocked_equals and auto or structured_residuals and sparse'",
    ),
    Fault(
        "spectral prediction-error variances forget the data",
        "openreml_nn/likelihood/solvers/spectral.py",
        "kept = weight * sigma @ half",
        "kept = weight * sigma + 0 * half",
        SPECTRAL,
    ),
    Fault(
        "the spectral score of a kernel lacks the eigenvalues",
        "openreml_nn/likelihood/solvers/spectral.py",
        "(problem.eigenvalues[:, None, None] * S).sum(0)]",
        "S.sum(0)]",
        SPECTRAL,
    ),
    Fault(
        "grid prediction-error variances forget what is estimated",
        "openreml_nn/likelihood/solvers/grid.py",
        "spread = spread + (term.covariance.multiply(low) ** 2).sum(1)",
        "spread = spread + 0 * (term.covariance.multiply(low) ** 2).sum(1)",
        GRID,
    ),
    Fault(
        "the score of a nugget forgets what is estimated",
        "openreml_nn/likelihood/solvers/grid.py",
        "trace = (1 / self._d).sum() - (low * low).sum()",
        "trace = (1 / self._d).sum()",
        GRID,
    ),
    Fault(
        "the control of a kernel's probes has the wrong sign",
        "openreml_nn/likelihood/solvers/krylov.py",
        "return samples - control.reshape",
        "return samples + control.reshape",
        "tests/likelihood/test_probes.py",
    ),
    Fault(
        "the error of an estimated likelihood is that of one probe",
        "openreml_nn/likelihood/solvers/krylov.py",
        "samples.std() / len(samples) ** 0.5 / 2",
        "samples.std() / 2",
        "tests/likelihood/test_probes.py",
    ),
    Fault(
        "prediction-error variances of relatives forget the fixed effects",
        "openreml_nn/likelihood/system/evaluation.py",
        "own + added @ added.mT",
        "own",
        f"{KRYLOV} -k relatives_by",
    ),
    Fault(
        "probes are solved to two digits",
        "openreml_nn/likelihood/solvers/krylov.py",
        "probe_tolerance: float = 1e-6",
        "probe_tolerance: float = 3e-1",
        f"{KRYLOV} -k accurate",
    ),
    Fault(
        "products of chunks are joined by the first chunk's places",
        "openreml_nn/likelihood/system/products.py",
        "a, b = places[t][a], places[u][b]",
        "a, b = places[t][a], places[t][b]",
        "tests/table/test_stream.py -k chunks_give",
    ),
    Fault(
        "the trace by square roots is that of ML",
        ROOTS,
        'return self._P if self.problem.method == "reml" else self._E',
        "return self._E",
        OF_ROOTS,
    ),
    Fault(
        "the determinant by square roots lacks that of R",
        ROOTS,
        "log_det = 2 * self._L.diagonal().log().sum() + 2 * T",
        "log_det = 2 * T",
        OF_ROOTS,
    ),
    Fault(
        "prediction-error variances by square roots forget the fixed effects",
        ROOTS,
        "torch.cat([half, lost], 1)).to(",
        "half).to(",
        OF_ROOTS,
    ),
    Fault(
        "the average information by square roots lacks its half",
        ROOTS,
        "return (half.mT @ half / 2).to(",
        "return (half.mT @ half).to(",
        OF_ROOTS,
    ),
    Fault(
        "the factor of the coefficients has a negative diagonal",
        ROOTS,
        "basis, C = basis * sign, C * sign[:, None]",
        "basis, C = basis, C",
        OF_ROOTS,
    ),
    Fault(
        "BLUPs by square roots have the wrong sign",
        ROOTS,
        "[-x[:, 0] for x in",
        "[x[:, 0] for x in",
        OF_ROOTS,
    ),
    Fault(
        "the residual's score by square roots lacks its half",
        ROOTS,
        "S = (p_y @ p_y.mT - back @ back.mT) / 2",
        "S = p_y @ p_y.mT - back @ back.mT",
        OF_ROOTS,
    ),
    Fault(
        "the selected inverse has a wrong sign beside its diagonal",
        "openreml_nn/likelihood/system/sparse/factor.py",
        "symm(routines, w, r, -1.0,",
        "symm(routines, w, r, 1.0,",
        "tests/likelihood/test_sparse.py -k 'solves_and_inverts'",
    ),
    Fault(
        "the sparse likelihood forgets the kernels' determinants",
        "openreml_nn/likelihood/system/sparse/evaluation.py",
        "self._factor.log_det - prior",
        "self._factor.log_det - 0 * prior",
        SPARSE,
    ),
    Fault(
        "the sparse score is that of ML",
        "openreml_nn/likelihood/system/sparse/evaluation.py",
        'if self.problem.method == "ml":',
        "if True:",
        SPARSE,
    ),
    Fault(
        "a chain's score counts what stands off the diagonal once",
        "openreml_nn/likelihood/system/sparse/chains.py",
        "np.where(self.row > self.column, 1.0, 0.5)",
        "np.where(self.row > self.column, 0.5, 0.5)",
        SPARSE,
    ),
]
