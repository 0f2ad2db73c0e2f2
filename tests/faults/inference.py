"""Faults of what is told from a fit: tests, heritability, deletion, scans."""

from tests.faults.fault import Fault

HYPOTHESES = "openreml_nn/inference/hypotheses.py"
GENETIC = "openreml_nn/inference/genetic.py"
DELETION = "openreml_nn/inference/deletion.py"
SCANNING = "openreml_nn/inference/scanning.py"
RATIO = "openreml_nn/inference/likelihood_ratio.py"
PROFILING = "openreml_nn/inference/profiling.py"

OF_FAMILIES = "tests/inference/test_families.py"
OF_TYPES = "tests/inference/test_anova.py"
OF_GENES = "tests/inference/test_genetic.py"
OF_CASES = "tests/inference/test_influence.py"
OF_MARKERS = "tests/inference/test_scan.py"
OF_RATIOS = "tests/inference/test_likelihood_ratio.py"

FAULTS = [
    Fault(
        "type 3 weighs levels by the first one alone",
        HYPOTHESES,
        "levels.mean(0, keepdim=True)",
        "levels[:1]",
        OF_TYPES,
    ),
    Fault(
        "type 2 tests a term after those that contain it",
        HYPOTHESES,
        "order = [*others, *own, *after]",
        "order = [*others, *after, *own]",
        OF_TYPES,
    ),
    Fault(
        "a covariate contains the factors that it is crossed with",
        HYPOTHESES,
        "coding.levels is not None for coding in more",
        "True for coding in more",
        OF_TYPES,
    ),
    Fault(
        "type 1 takes terms in the reverse order",
        HYPOTHESES,
        "order = [j for at in places for j in at]",
        "order = [j for at in reversed(places) for j in at]",
        OF_TYPES,
    ),
    Fault(
        "a contrast of three variables has its rows in another order than its columns",
        HYPOTHESES,
        "grid.permute(*rest, *wanted, len(names))",
        "grid.permute(*range(len(names)), len(names))",
        OF_TYPES,
    ),
    Fault(
        "Cullis's heritability is of BLUPs and not of their differences",
        GENETIC,
        "return float(2 * (covariance.diagonal().sum() - covariance.sum() / m) / (m - 1))",
        "return float(2 * covariance.diagonal().mean())",
        OF_GENES,
    ),
    Fault(
        "the generalised heritability divides by all levels",
        GENETIC,
        "values[kept].sum() / kept.sum()",
        "values[kept].sum() / len(kept)",
        OF_GENES,
    ),
    Fault(
        "reliability forgets inbreeding",
        GENETIC,
        "found.append((part * g.multiply(part)).sum(0))",
        "found.append(0 * part.sum(0) + g.matrix[0, 0])",
        OF_GENES,
    ),
    Fault(
        "accuracy is reliability",
        GENETIC,
        '"accuracy": share[:, j].clamp(min=0).sqrt(),',
        '"accuracy": share[:, j].clamp(min=0),',
        OF_GENES,
    ),
    Fault(
        "a refit solves for columns in an orthonormal basis and does not return from it",
        "openreml_nn/inference/refit.py",
        "found.append(solved @ (fixed.Q.mT @ Q) @ R)",
        "found.append(solved @ R)",
        f"{OF_GENES} -k solves",
    ),
    Fault(
        "without a case the covariance of coefficients is that with it",
        DELETION,
        "self.covariance + toward @ self.moves[at]",
        "self.covariance",
        OF_CASES,
    ),
    Fault(
        "the leverage takes residuals for independent",
        DELETION,
        "leverage[at] = 1 - left[at, torch.arange(len(at), device=y.device)]",
        "leverage[at] = 1 - P[at, torch.arange(len(at), device=y.device)]",
        f"{OF_CASES} -k leverage",
    ),
    Fault(
        "Cook's distance is not divided by the coefficients",
        DELETION,
        "float(change @ solve_named(phi, change, what)) / p",
        "float(change @ solve_named(phi, change, what))",
        OF_CASES,
    ),
    Fault(
        "a fit again has all rows",
        DELETION,
        "keep=(self.codes != case).nonzero()[:, 0]",
        "keep=(self.codes != -1).nonzero()[:, 0]",
        f"{OF_CASES} -k again",
    ),
    Fault(
        "a marker's scale is that without it",
        SCANNING,
        "(y_p_y - m_p_y**2 / m_p_m)",
        "(y_p_y + 0 * m_p_m)",
        OF_MARKERS,
    ),
    Fault(
        "markers are not projected off the fixed effects",
        SCANNING,
        "M -= Q @ (Q.mT @ M)",
        "M -= 0 * Q @ (Q.mT @ M)",
        OF_MARKERS,
    ),
    Fault(
        "fits with other weights compare",
        RATIO,
        "if abs(float(ratio[row] / ratio[0]) - 1) > 1e-8:",
        "if abs(float(ratio[row] / ratio[0]) - 1) > 1e8:",
        OF_RATIOS,
    ),
    Fault(
        "a unit of the weights is a difference of them",
        RATIO,
        "row = int((ratio / ratio[0] - 1).abs().argmax())",
        "ratio[0] = 1; row = int((ratio - 1).abs().argmax())",
        OF_RATIOS,
    ),
    Fault(
        "a profile does not tell of points that are no maximum",
        PROFILING,
        "if not ascent.arrived:",
        "if ascent.arrived is None:",
        "tests/inference/test_inference.py -k approximate",
    ),
    Fault(
        "Pearson's statistic of successes does not count trials",
        "openreml_nn/inference/checking.py",
        "** 2 * trials * count / of_rows.variance(eta)",
        "** 2 * count / of_rows.variance(eta)",
        f"{OF_FAMILIES} -k trials",
    ),
    Fault(
        "a mean on the scale of the response has the error of the link's",
        "openreml_nn/inference/response.py",
        'table["std_error"] * slope.abs().numpy(force=True)',
        'table["std_error"]',
        f"{OF_FAMILIES} -k both_scales",
    ),
    Fault(
        "a bootstrap sample that is separated counts",
        "openreml_nn/inference/laplace_refit.py",
        "if least < _LITTLE * fit.count:",
        "if least < -1:",
        f"{OF_FAMILIES} -k separated",
    ),
    Fault(
        "an effect of each row is one of the model",
        "openreml_nn/inference/shares.py",
        "of_rows = [term.design.shape[1] == len(mean) for term in terms]",
        "of_rows = [False for term in terms]",
        f"{OF_FAMILIES} -k each_row",
    ),
    Fault(
        "simulated responses lack the offset",
        "openreml_nn/inference/resampling.py",
        "return _drawn(refit, n, seed) + offset[:, None]",
        "return _drawn(refit, n, seed) + 0 * offset[:, None]",
        "tests/inference/test_inference.py -k offset",
    ),
]
