"""Faults of networks with random effects and of their training, and of the metrics."""

from tests.faults.fault import Fault

MODEL = "openreml_nn/model/mixed_model.py"
MEANS = "openreml_nn/model/means.py"
PREDICTOR = "openreml_nn/model/predictor.py"
RESIDUAL = "openreml_nn/model/residual.py"
PREDICTION = "openreml_nn/result/prediction.py"
JOINT = "openreml_nn/result/joint.py"
WAYS = "openreml_nn/lightning/ways.py"
CONDITIONAL = "openreml_nn/lightning/conditional.py"
SUMS = "openreml_nn/lightning/sums.py"
ESTIMATES = "openreml_nn/lightning/estimates.py"
TABLE = "openreml_nn/lightning/table.py"
MODULE = "openreml_nn/lightning/module.py"
METRICS = "openreml_nn/metrics/predictions.py"
EXPLAINED = "openreml_nn/metrics/explained.py"
COMPONENTS = "openreml_nn/metrics/components.py"

OF_MODEL = "tests/test_model.py -k 'not linear_mixed_model'"
OF_TRAINING = "tests/test_neural.py"

FAULTS = [
    Fault(
        "the variance of gls coefficients is zero",
        PREDICTION,
        'found = torch.einsum("np,pq,nq->n", X, spread.to(X), X)',
        "found = X.new_zeros(len(X))",
        "tests/test_joint.py -k independent",
    ),
    Fault(
        "the variance by a sparse factor leaves out the covariance of coefficients with BLUPs",
        "openreml_nn/result/factored.py",
        "d = _numbers(X) @ self._basis - np.asarray(w.T @ self._S)",
        "d = _numbers(X) @ self._basis",
        "tests/test_factored.py",
    ),
    Fault(
        "the variance of a prediction leaves out the covariance of coefficients with BLUPs",
        JOINT,
        "cross = -T @ spread",
        "cross = 0 * T @ spread",
        "tests/test_joint.py",
    ),
    Fault(
        "the variance of a prediction leaves out the covariance of BLUPs of different factors",
        JOINT,
        "by = (z[row] * joint.entries[place]).sum(1)",
        "by = 0 * (z[row] * joint.entries[place]).sum(1)",
        "tests/test_joint.py",
    ),
    Fault(
        "a residual network's variance is halved in the exponent",
        RESIDUAL,
        "self._log_variance(batch, n).exp()",
        "(self._log_variance(batch, n) / 2).exp()",
        OF_MODEL,
    ),
    Fault(
        "a residual network yields log-deviations in the loss",
        RESIDUAL,
        "(self._log_variance(batch, n) / 2).exp()",
        "self._log_variance(batch, n).exp()",
        OF_MODEL,
    ),
    Fault(
        "the prior of related levels is that of the first",
        PREDICTION,
        "dim2=2).mean(-1)",
        "dim2=2)[..., 0]",
        OF_MODEL,
    ),
    Fault(
        "the prior of related levels is that of all of them",
        PREDICTION,
        "return blocks.unflatten(0, (levels, effects)).diagonal(dim1=0, dim2=2).mean(-1)",
        "return blocks.unflatten(0, (levels, effects)).mean((0, 2))",
        OF_MODEL,
    ),
    Fault(
        "a level that was not seen has the first one's BLUP",
        PREDICTION,
        "torch.where(known, self.values[self.codes.clamp(min=0)].to(z), 0)",
        "self.values[self.codes.clamp(min=0)].to(z)",
        OF_MODEL,
    ),
    Fault(
        "a level that was not seen has the first one's variance",
        PREDICTION,
        "design_of(torch.where(unseen, -1, effect.codes), z, len(effect.values))",
        "design_of(effect.codes.clamp(min=0), z, len(effect.values))",
        "tests/test_joint.py",
    ),
    Fault(
        "a coefficient of a dropped column moves the ones after it",
        "openreml_nn/model/posterior.py",
        "index_copy(0, at, fixed.estimate.to(aliases))",
        "index_copy(0, torch.arange(len(at)), fixed.estimate.to(aliases))",
        OF_MODEL,
    ),
    Fault(
        "head gls is fitted by maximum likelihood",
        MODEL,
        'method = "reml" if head == "gls" and family is None else "ml"',
        'method = "ml"',
        "tests/test_model.py -k 'linear_mixed_model and (sleep or pastes)'",
    ),
    Fault(
        "dropout differs between the two passes in parts",
        MEANS,
        "with torch.no_grad(), torch.random.fork_rng(devices):",
        "with torch.no_grad():",
        "tests/test_model.py -k parts",
    ),
    Fault(
        "a network is trained on what its random effects explain",
        CONDITIONAL,
        "e = _unexplained(effects, coded, e, handed)",
        "pass",
        "tests/test_training.py -k 'weights_count'",
    ),
    Fault(
        "what a network cannot yield is left to it for good",
        WAYS,
        "part = torch.where(kept & (before != 0), part / 2, (2 * part).clamp(max=1))",
        "part = torch.ones_like(part)",
        "tests/test_training.py -k 'cannot_yield_stays'",
    ),
    Fault(
        "a network for the residual does not hear of the BLUPs' variance",
        CONDITIONAL,
        "square if spread is None else square + (spread / R).sum()",
        "square",
        "tests/test_training.py -k 'fisher'",
    ),
    Fault(
        "a row of no known level weighs as much as the others",
        CONDITIONAL,
        "R = R if unknown is None else R + unknown.to(e)",
        "pass",
        "tests/test_training.py -k 'fisher'",
    ),
    Fault(
        "processes with fewer rows count as much as the others",
        WAYS,
        "return found * (processes() / (2 * total(count, output.device))), output",
        "return found / (2 * count), output",
        f"{OF_TRAINING} -k 'two_processes and alternating'",
    ),
    Fault(
        "rows of no known level share one",
        SUMS,
        "codes.index_copy(0, absent, effect.levels + torch.arange(len(absent)))",
        "codes.index_fill(0, absent, effect.levels)",
        "tests/test_sums.py -k unknown",
    ),
    Fault(
        "unknown levels of two sums are the same ones",
        SUMS,
        "theirs.append(torch.cat([torch.arange(q), q + a + torch.arange(b)]))",
        "theirs.append(torch.cat([torch.arange(q), q + torch.arange(b)]))",
        "tests/test_sums.py -k small_sums",
    ),
    Fault(
        "a known part of the mean is left in the sums",
        SUMS,
        "y = adjusted(batch, n, self.model.responses).double()",
        'y = batch["y"].double()',
        "tests/test_sums.py -k weights",
    ),
    Fault(
        "a network ends with the covariance of its last epoch but one",
        ESTIMATES,
        "self.history += climb(gathered.objective, most)",
        "pass",
        f"{OF_TRAINING} -k 'every_way and alternating'",
    ),
    Fault(
        "a validation moves what is trained",
        ESTIMATES,
        "            self.load(self._training)\n            self._training = None",
        "            self._training = None",
        "tests/test_training.py -k leave_training",
    ),
    Fault(
        "a checkpoint holds the BLUPs of training",
        MODULE,
        'checkpoint["state_dict"] |= {f"model.{k}": v for k, v in settled.items()}',
        "pass",
        "tests/test_training.py -k 'every_checkpoint and alternating'",
    ),
    Fault(
        "a resumed run goes on from what was validated",
        MODULE,
        "self._known.load(self._resumed_state)",
        "pass",
        f"{OF_TRAINING} -k resumed",
    ),
    Fault(
        "a random network's numbers are not resumed",
        MODULE,
        'self._random_numbers = checkpoint.get("random_numbers", {})',
        "pass",
        f"{OF_TRAINING} -k resumed",
    ),
    Fault(
        "a table's rows are in the order of the first epoch",
        "openreml_nn/lightning/data.py",
        "manual_seed(self._seed * 1_000_003 + epoch)",
        "manual_seed(self._seed * 1_000_003)",
        "tests/test_tabular.py -k order",
    ),
    Fault(
        "whole groups are cut",
        "openreml_nn/lightning/batches.py",
        "order = place[sets].argsort(stable=True)",
        "order = torch.randperm(n, generator=generator)",
        f"{OF_TRAINING} -k cut_none",
    ),
    Fault(
        "the response is not scaled back",
        TABLE,
        "return self.y_center + self.y_scale * found.to(self.y_scale.dtype)",
        "return self.y_center + found.to(self.y_scale.dtype)",
        "tests/test_tabular.py -k 'truth or checkpoint or units'",
    ),
    Fault(
        "columns are scaled by their variance",
        TABLE,
        "scale = X.std(0, correction=0)",
        "scale = X.var(0, correction=0)",
        "tests/test_tabular.py -k 'truth or units'",
    ),
    Fault(
        "a formula in Lightning forgets the basis of its slopes",
        TABLE,
        "labels[name]._replace(basis=B)",
        "labels[name]",
        "tests/test_lightning.py -k far_off",
    ),
    Fault(
        "rows to predict have the levels of their own table",
        "openreml_nn/lightning/data.py",
        'if stage != "fit" and hasattr(module, "model"):',
        "if False:",
        "tests/test_lightning.py -k encoded_by",
    ),
    Fault(
        "a misspelt key of a batch is not seen",
        "openreml_nn/model/batch.py",
        "if not batch.keys() <= _KNOWN:",
        "if False:",
        "tests/test_lightning.py -k nothing_reads",
    ),
    Fault(
        "a row's place is that of another level",
        TABLE,
        "design.relation.coordinates[design.codes]",
        "design.relation.coordinates.flip(0)[design.codes]",
        "tests/test_tabular.py -k 'field'",
    ),
    Fault(
        "every level that is held out loses its rows",
        "openreml_nn/lightning/split.py",
        "np.minimum(np.round(self.validation * size), size - 1)",
        "np.round(self.validation * size)",
        "tests/test_tabular.py -k held_out",
    ),
    Fault(
        "log density lacks the variance's logarithm",
        METRICS,
        "log(2 * pi) + variance.log() +",
        "log(2 * pi) +",
        "tests/test_metrics.py -k density",
    ),
    Fault(
        "intervals are one-sided",
        METRICS,
        "torch.tensor((1 + level) / 2, dtype",
        "torch.tensor(level, dtype",
        "tests/test_metrics.py",
    ),
    Fault(
        "batches of different means have the variance within them",
        EXPLAINED,
        "+ (moments[:, 0] * (moments[:, 1] - mean) ** 2).sum()",
        "",
        "tests/test_metrics.py -k r2",
    ),
    Fault(
        "the standard error of heritability takes the total for known",
        COMPONENTS,
        "slope = -share.repeat(k)",
        "slope = 0 * share.repeat(k)",
        "tests/test_metrics.py -k heritability",
    ),
    Fault(
        "the last batch counts as much as a full one",
        METRICS,
        "self.add(_sum_of_covered(mean, variance, target, self.level), len(mean))",
        "self.add(interval_coverage(mean, variance, target, self.level), 1)",
        "tests/test_metrics.py -k batches",
    ),
    Fault(
        "the weights of rows do not count for coefficients",
        "openreml_nn/result/equations.py",
        "return [_times(white.design(d), scale, f) for d in designs], scale * white.rows(f), log_det",
        "return [_times(white.design(d), scale, f) for d in designs], white.rows(f), log_det",
        "tests/test_joint.py",
    ),
    Fault(
        "the variance of a prediction has other factors without a prior",
        JOINT,
        "inner = inner + torch.eye(q, dtype=S.dtype, device=S.device)",
        "inner = inner + 0.1 * torch.eye(q, dtype=S.dtype, device=S.device)",
        "tests/test_joint.py",
    ),
    Fault(
        "a row's cells are those after its level's",
        JOINT,
        "- lengths.cumsum(0) + lengths",
        "- lengths.cumsum(0)",
        "tests/test_joint.py",
    ),
    Fault(
        "sums of several processes are added up on different scales of the fixed effects",
        SUMS,
        "theirs_now = other.scaled(self.scale).statistics",
        "theirs_now = other.statistics",
        "tests/test_neural.py -k 'two_processes and linear'",
    ),
    Fault(
        "the pull-back of a summand takes rows of different levels together",
        "openreml_nn/terms/covariance.py",
        "return z.mT @ (together * cotangent) @ z",
        "return z.mT @ cotangent @ z",
        "tests/covariance/test_terms.py -k pull_back",
    ),
    Fault(
        "a row of no known level has no random effect in the likelihood",
        "openreml_nn/model/random_effect.py",
        "if len(codes) and int(codes.min()) < 0:",
        "if False:",
        "tests/test_model.py -k no_known_level",
    ),
    Fault(
        "weights multiply the residual variance of a new observation",
        RESIDUAL,
        "variances / weights.to(variances)",
        "variances * weights.to(variances)",
        "tests/test_predict.py -k dense_formula",
    ),
    Fault(
        "an offset is not in the predictions",
        PREDICTOR,
        "population = population + offset.to(population)",
        "population = population + 0 * offset.to(population)",
        "tests/test_predict.py -k dense_formula",
    ),
    Fault(
        "the interval has half of the error probability on each side of it",
        PREDICTION,
        "torch.tensor((1 + level) / 2",
        "torch.tensor(level",
        "tests/test_predict.py -k dense_formula",
    ),
]
