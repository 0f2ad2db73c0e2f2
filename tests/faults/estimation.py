"""Faults of the fit, its result and inference from it."""

from tests.faults.fault import Fault

FIT = "tests/estimation/test_fit.py"
OF_RESULT = "tests/estimation/test_result.py"
INFERENCE = "tests/inference/test_inference.py"
COEFFICIENTS = f"{INFERENCE} -k 'coefficients_equal or joint_tests'"
JOINT = "tests/inference -k joint"
MEANS = f"{INFERENCE} openreml_nn/inference/means.py -k means"

STEP = "openreml_nn/estimation/step.py"
SAFEGUARD = "openreml_nn/estimation/safeguard.py"
RESULT = "openreml_nn/result/values.py"
OUTCOME = "openreml_nn/estimation/outcome.py"
DEGREES = "openreml_nn/inference/degrees.py"
RATIO = "openreml_nn/inference/likelihood_ratio.py"
BOOTSTRAP = "openreml_nn/inference/resampling.py"
COORDINATES = "openreml_nn/estimation/coordinates.py"
CURVATURE = "openreml_nn/estimation/curvature.py"
GLS = "openreml_nn/estimation/gls.py"
STARTS = "openreml_nn/estimation/starts.py"
CONSTRAINED = "openreml_nn/inference/constrained.py"

OF_GLS = "tests/estimation/test_gls.py"
OF_STARTS = "tests/estimation/test_battery.py -k one_optimum"
PROFILES = "tests/inference/test_corners.py -k 'other_sign or correlation_of_one'"


FAULTS = [
    Fault(
        "a step that lowers the likelihood is taken",
        SAFEGUARD,
        "return reached if reached >= least else None",
        "return reached",
        "tests/estimation/test_result.py -k never",
    ),
    Fault(
        "a fit does not leave zero where the likelihood rises",
        STEP,
        "escaped = guard.escape(is_flat=norm < max(1e-3, c.resolution))",
        "escaped = None",
        f"{FIT} -k leaves_zero",
    ),
    Fault(
        "tied parameters move by one likelihood's score",
        "openreml_nn/estimation/curvature.py",
        "self.score += weight * score\n",
        "self.score = weight * score\n",
        f"{FIT} -k tied",
    ),
    Fault(
        "exact steps begin where approximate ones have lost a variance",
        "openreml_nn/estimation/fit.py",
        "gone[j] = bool(slope > 0)",
        "gone[j] = False",
        FIT,
    ),
    Fault(
        "the moment start does not follow the response",
        "openreml_nn/estimation/fit.py",
        "covariance.moment_start(scale * one)",
        "covariance.moment_start(one)",
        FIT,
    ),
    Fault(
        "standard errors are those of the observed information",
        OUTCOME,
        "Spread(curvature.information, bool",
        "Spread(curvature.hessian, bool",
        OF_RESULT,
    ),
    Fault(
        "the standard error of a variance is that of its coordinate",
        OUTCOME,
        "std_error = float(_slope(e.trans.at_coordinate, coordinate) * spread)",
        "std_error = float(spread)",
        OF_RESULT,
    ),
    Fault(
        "the standard error of a stored value is that of its coordinate",
        OUTCOME,
        "stored_error = float(_slope(e.trans.from_coordinate, coordinate) * spread)",
        "stored_error = float(spread)",
        OF_RESULT,
    ),
    Fault(
        "the singular threshold is 10,000 times too large",
        OUTCOME,
        "SINGULAR = 1e-4",
        "SINGULAR = 1.0",
        OF_RESULT,
    ),
    Fault(
        "the singular threshold compares a variance with a deviation",
        OUTCOME,
        "float(least) < SINGULAR**2 * residual",
        "float(least) < SINGULAR * residual",
        OF_RESULT,
    ),
    Fault(
        "a fit far from its optimum counts as converged",
        "openreml_nn/estimation/curvature.py",
        "CONVERGED = 1e-3",
        "CONVERGED = 1.0",
        OF_RESULT,
    ),
    Fault(
        "AIC counts covariance parameters only",
        RESULT,
        "return self.deviance + 2 * (len(self.fixed.names) + self.num_params)",
        "return self.deviance + 2 * self.num_params",
        f"{FIT} -k criteria",
    ),
    Fault(
        "BIC takes the rows of every effect",
        RESULT,
        "log(self.rows) * (len",
        "log(self.rows - 1) * (len",
        f"{FIT} -k criteria",
    ),
    Fault(
        "the residual variance is that of the first stratum",
        RESULT,
        "return sum(float((c if c.dim() == 1 else c.diagonal()).mean()) for c in found)",
        "return sum(float((c if c.dim() == 1 else c.diagonal())[0]) for c in found)",
        OF_RESULT,
    ),
    Fault(
        "a component of related levels is that of the first",
        OUTCOME,
        "return blocks.diagonal(dim1=0, dim2=2).mean(-1)",
        "return blocks.diagonal(dim1=0, dim2=2)[..., 0]",
        OF_RESULT,
    ),
    Fault(
        "Satterthwaite's joint degrees of freedom are halved",
        "openreml_nn/inference/satterthwaite.py",
        "return 2 * expected / (expected - len(each))",
        "return expected / (expected - len(each))",
        JOINT,
    ),
    Fault(
        "Satterthwaite's joint degrees of freedom are the mean of those of each",
        "openreml_nn/inference/satterthwaite.py",
        "if max(each) - min(each) < 1e-8 * max(each) or",
        "if True or",
        JOINT,
    ),
    Fault(
        "Satterthwaite's degrees of freedom lack their 2",
        "openreml_nn/inference/satterthwaite.py",
        "return 2 * float(variance) ** 2 / noise",
        "return float(variance) ** 2 / noise",
        COEFFICIENTS,
    ),
    Fault(
        "Satterthwaite's degrees of freedom take the average for the observed information",
        "openreml_nn/inference/satterthwaite.py",
        "observed_spread(curvature))\n",
        "torch.linalg.inv(curvature.information))\n",
        COEFFICIENTS,
    ),
    Fault(
        "Kenward and Roger's correction is added once",
        "openreml_nn/inference/kenward_roger.py",
        "corrected = phi + 2 * phi @ gain @ phi",
        "corrected = phi + phi @ gain @ phi",
        COEFFICIENTS,
    ),
    Fault(
        "Kenward and Roger's F is not scaled",
        "openreml_nn/inference/kenward_roger.py",
        "F = scale * self._f(L, beta)",
        "F = self._f(L, beta)",
        JOINT,
    ),
    Fault(
        "p values of coefficients are one-sided",
        DEGREES,
        '"p": 2 * stats.t.sf(abs(statistic), df)',
        '"p": stats.t.sf(abs(statistic), df)',
        COEFFICIENTS,
    ),
    Fault(
        "intervals of coefficients have half their error",
        DEGREES,
        "stats.t.ppf((1 + level) / 2, df)",
        "stats.t.ppf(level, df)",
        f"{INFERENCE} -k 'means_equal or asymptotic_intervals'",
    ),
    Fault(
        "marginal means are of one cell",
        "openreml_nn/inference/nesting.py",
        ".index_add(0, codes, X) / count[:, None]",
        ".index_copy(0, codes, X)",
        "tests/inference/test_means.py",
    ),
    Fault(
        "Tukey's statistic lacks the root of 2",
        "openreml_nn/inference/means.py",
        'spread = np.sqrt(2) * found["statistic"].abs()',
        'spread = found["statistic"].abs()',
        MEANS,
    ),
    Fault(
        "a boundary variance counts as an ordinary parameter",
        RATIO,
        "comb(boundary, j) / 2**boundary",
        "float(j == boundary)",
        f"{INFERENCE} -k mixture",
    ),
    Fault(
        "the statistic of a likelihood ratio lacks its 2",
        RATIO,
        "max(0.0, 2 * (large.log_likelihood - small.log_likelihood))",
        "max(0.0, large.log_likelihood - small.log_likelihood)",
        f"{INFERENCE} -k anova",
    ),
    Fault(
        "models compared by anova keep their restricted likelihood",
        "openreml_nn/inference/tables.py",
        'return Refit(result).fit("ml")',
        'return Refit(result).fit("reml")',
        f"{INFERENCE} -k anova",
    ),
    Fault(
        "zeta lacks its 2",
        "openreml_nn/inference/curves.py",
        "found = (2 * max(best - at(new), 0.0)) ** 0.5",
        "found = max(best - at(new), 0.0) ** 0.5",
        f"{INFERENCE} -k 'profile and penicillin or dense_one'",
    ),
    Fault(
        "a bootstrap test has no sample of its own",
        BOOTSTRAP,
        "return (1 + reached) / (1 + samples)",
        "return reached / samples",
        f"{INFERENCE} -k test_by_simulation",
    ),
    Fault(
        "the bootstrap's bias has the wrong sign",
        BOOTSTRAP,
        "(self.samples.mean() - self.estimate)",
        "(self.estimate - self.samples.mean())",
        "tests/inference/test_bootstrap.py",
    ),
    Fault(
        "simulated responses have the covariance for its root",
        BOOTSTRAP,
        "term.covariance.root().multiply(noise)",
        "term.covariance.multiply(noise)",
        f"{INFERENCE} -k simulated_responses",
    ),
    Fault(
        "fits in a batch drop the offset of the fixed effects",
        "openreml_nn/inference/batched.py",
        "numbers[:, first:] += offset @ self.fixed.T.mT",
        "numbers[:, first:] += 0 * offset @ self.fixed.T.mT",
        f"{INFERENCE} -k in_a_batch",
    ),
    Fault(
        "the standard error of a share takes the total for known",
        "openreml_nn/inference/shares.py",
        "(eye - value[:, None] / total) / total",
        "eye / total",
        f"{INFERENCE} openreml_nn/inference/shares.py -k shares",
    ),
    Fault(
        "random slopes have the variance of their intercept",
        "openreml_nn/inference/row_variance.py",
        "return (values[:, None] @ block @ values[..., None]).mean()",
        "return block[:, 0, 0].mean()",
        f"{INFERENCE} -k 'random_slopes or shares'",
    ),
    Fault(
        "a row's fitted value lacks its random effects",
        OUTCOME,
        "fitted = fitted + term.design.matmul(effects.values.reshape(-1, 1))[:, 0]",
        "fitted = fitted + 0 * term.design.matmul(effects.values.reshape(-1, 1))[:, 0]",
        OF_RESULT,
    ),
    Fault(
        "a constrained step goes away from the value that is held",
        CONSTRAINED,
        "(a @ inverse @ score - gap)",
        "(a @ inverse @ score + gap)",
        PROFILES,
    ),
    Fault(
        "a profile of a correlation is in its angle",
        CONSTRAINED,
        "return cos(t) if self.angle else t",
        "return t",
        PROFILES,
    ),
    Fault(
        "a profile starts at a boundary and stays there",
        CONSTRAINED,
        "self.v[j] = edge + sign * away",
        "self.v[j] = edge",
        PROFILES,
    ),
    Fault(
        "a standard deviation that falls to zero leaves it at every step",
        CONSTRAINED,
        "stays = self._is_size & (self.v == 0) & (score < 0)",
        "stays = self._is_size & (self.v == 0) & (score > 0)",
        PROFILES,
    ),
    Fault(
        "a standard deviation below zero turns the sign of its correlation",
        CONSTRAINED,
        "torch.where(self._is_size, moved.clamp(min=0), moved)",
        "torch.where(self._is_size, moved, moved)",
        PROFILES,
    ),
    Fault(
        "the information of several likelihoods forgets their weights",
        CURVATURE,
        "self.information += weight * information",
        "self.information += information",
        "tests/estimation/test_optimizer.py -k weights",
    ),
    Fault(
        "the curvature of the covariances has the wrong sign",
        CURVATURE,
        "weight * (information - share",
        "weight * (information + share",
        FIT,
    ),
    Fault(
        "a tied parameter is a coordinate for each likelihood",
        COORDINATES,
        "if key not in place:",
        "if key:",
        f"{FIT} -k tied",
    ),
    Fault(
        "a frozen parameter is estimated",
        COORDINATES,
        "if e.tensor.requires_grad and (wanted",
        "if (wanted",
        "tests/estimation/test_optimizer.py -k frozen",
    ),
    Fault(
        "a network of any size is estimated with the covariances",
        COORDINATES,
        "if len(self) + loose.tensor.numel() >",
        "if len(self) - loose.tensor.numel() >",
        "tests/estimation/test_trainable_designs.py -k too_large",
    ),
    Fault(
        "a field beside a nugget has one start",
        STARTS,
        "return any(reaching)",
        "return False",
        OF_STARTS,
    ),
    Fault(
        "BLUPs at a given covariance are of the response",
        GLS,
        "torch.cholesky_solve(self.residual[:, None], L)",
        "torch.cholesky_solve(self.y[:, None], L)",
        OF_GLS,
    ),
    Fault(
        "an aliased column has the coefficient zero",
        GLS,
        "fit.beta.new_full((fit.p,), torch.nan)",
        "fit.beta.new_zeros(fit.p)",
        OF_GLS,
    ),
    Fault(
        "Z and G are taken at the present parameters, V at theta",
        GLS,
        "    with V.given(theta):\n        return {name: m() if",
        "    with V.given(theta):\n        value = V()\n    if value is not None:\n        return {name: value if m is V else m() if",
        OF_GLS,
    ),
    Fault(
        "standard errors of slopes far from zero are of the basis of the fit",
        "openreml_nn/estimation/outcome.py",
        "moved = self._moved({estimate.name: estimate for estimate in found})",
        "moved: dict[str, Estimate] = {}",
        "tests/test_linear.py -k 'slopes or basis'",
    ),
    Fault(
        "BLUPs of slopes far from zero are of the basis of the fit",
        "openreml_nn/estimation/outcome.py",
        "random = [self._in_user_basis(effects) for effects in random]",
        "random = list(random)",
        "tests/test_linear.py -k 'slopes or basis'",
    ),
    Fault(
        "weights do not count in the log-likelihood of a stream",
        "openreml_nn/likelihood/solvers/blocked.py",
        "white.log_det = white.log_det + statistics.log_det",
        "white.log_det = white.log_det + 0 * statistics.log_det",
        "tests/table/test_stream.py -k options",
    ),
]
