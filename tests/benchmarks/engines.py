"""How each program fits a table: scripts that print one line of JSON.

Each is called with the path of the table, the formula and the names of the
factors, reads the table first, and then takes the processor's time from the data frame to
estimates with standard errors.
"""

from __future__ import annotations

__all__ = ["SCRIPTS"]

_START = """
import json, sys, time, warnings
path, formula, factors = sys.argv[1], sys.argv[2], [f for f in sys.argv[3].split(",") if f]
warnings.simplefilter("ignore")
import pandas, torch
torch.set_num_threads(1)
def memory():
    # Not getrusage, whose peak a process inherits from the one that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
def done(log_likelihood, version="", exact=True):
    seconds, peak = time.process_time() - start, memory()
    print(json.dumps({"seconds": seconds, "log_likelihood": float(log_likelihood),
                      "peak_mb": peak, "grown_mb": peak - before, "version": version,
                      "exact": exact}))
"""

_OURS = (
    _START
    + """
from openreml_nn import lmm
table = pandas.read_parquet(path)
fixed = [f for f in factors if f in formula.split("(1")[0]]
before, start = memory(), time.process_time()
result = lmm(formula, table, categorical=fixed, solver="SOLVER")
done(result.log_likelihood, exact=result.plan.exact)
"""
)

_STREAM = (
    _START
    + """
from openreml_nn import fit_stream
before, start = memory(), time.process_time()
done(fit_stream(formula, path, chunk_rows=500_000, progress=False).log_likelihood)
"""
)

_MIXEDLM = (
    _START
    + """
import mixedlm
table = pandas.read_parquet(path)
for f in factors:
    table[f] = table[f].astype(str).astype("category")
before, start = memory(), time.process_time()
value = mixedlm.lmer(formula, table, REML=True).logLik()
done(getattr(value, "value", value), mixedlm.__version__)
"""
)

# The full likelihood, not the restricted one; slopes are not correlated with intercepts.
_GPBOOST = (
    _START
    + """
import re
import gpboost, numpy
table = pandas.read_parquet(path)
bars = re.findall(r"\\(([^|()]*)\\|([^|()]*)\\)", formula)
names = [n.strip() for n in re.sub(r"\\([^)]*\\)", "", formula.split("~")[1]).split("+") if n.strip()]
before, start = memory(), time.process_time()
columns = [numpy.ones(len(table))]
for name in names:
    if name in factors:
        columns += list(pandas.get_dummies(table[name], drop_first=True).to_numpy(float).T)
    elif name != "1":
        columns.append(table[name].to_numpy(float))
groups = [g.strip() for _, g in bars]
slopes = [(i + 1, e.strip()) for i, (e, _) in enumerate(bars) if e.strip() != "1"]
options = {}
if slopes:
    options = {"group_rand_coef_data": table[[e for _, e in slopes]].to_numpy(float),
               "ind_effect_group_rand_coef": [i for i, _ in slopes]}
model = gpboost.GPModel(group_data=table[groups].to_numpy(), likelihood="gaussian",
                        num_parallel_threads=1, **options)
model.fit(y=table["y"].to_numpy(float), X=numpy.column_stack(columns))
model.get_coef(std_err=True)
done(-model.get_current_neg_log_likelihood(), gpboost.__version__)
"""
)

# The full likelihood; neighbours are those of rows, or of places in the latent form.
_GPBOOST_PLACES = (
    _START
    + """
import gpboost, numpy
table = pandas.read_parquet(path)
before, start = memory(), time.process_time()
model = gpboost.GPModel(gp_coords=table[["east", "north"]].to_numpy(), cov_function="matern",
                        cov_fct_shape=1.5, gp_approx="APPROXIMATION", num_neighbors=20,
                        likelihood="gaussian", num_parallel_threads=1)
model.fit(y=table["y"].to_numpy(), X=numpy.column_stack([numpy.ones(len(table)), table["x"]]))
model.get_coef(std_err=True)
done(-model.get_current_neg_log_likelihood(), gpboost.__version__)
"""
)

# Responses that are not Gaussian: our fit with standard errors, GPBoost's without.
_OURS_FAMILY = (
    _START
    + """
from openreml_nn import glmm
table = pandas.read_parquet(path)
before, start = memory(), time.process_time()
done(glmm(formula, table, family="FAMILY", categorical=factors).log_likelihood)
"""
)

_GPBOOST_FAMILY = (
    _GPBOOST.replace('"gaussian"', '"LIKELIHOOD"')
    .replace("model.get_coef(std_err=True)\n", "")
    .replace('table["y"]', 'table[formula.split("~")[0].strip()]')
)

_LME4 = """
a <- commandArgs(TRUE)
suppressMessages(library(lme4))
memory <- function() as.numeric(sub("\\\\D*(\\\\d+).*", "\\\\1",
                                    grep("VmHWM", readLines("/proc/self/status"), value = TRUE)))
d <- read.csv(sub("parquet$", "csv", a[1]))
for (f in strsplit(a[3], ",")[[1]]) d[[f]] <- factor(d[[f]])
before <- memory()
start <- sum(proc.time()[1:2])
m <- lmer(as.formula(a[2]), d)
v <- vcov(m)
seconds <- sum(proc.time()[1:2]) - start
cat(sprintf('{"seconds": %.3f, "log_likelihood": %.6f, "peak_mb": %.0f, "grown_mb": %.0f, "version": "%s"}\\n',
            seconds, logLik(m), memory() / 1024, (memory() - before) / 1024, packageVersion("lme4")))
"""

_GLMER = _LME4.replace("lmer(as.formula(a[2]), d)", "glmer(as.formula(a[2]), d, family = FAMILY)")

_KERNEL = (
    _START
    + """
from tests.benchmarks.tables import kinship
table = pandas.read_parquet(path)
K = kinship(len(table))
y, X = torch.from_numpy(table["y"].to_numpy(copy=True)), torch.ones(len(table), 1).double()
"""
)

_OURS_KERNEL = (
    _KERNEL
    + """
from openreml_nn import fit_reml
from openreml_nn.covariance import KnownMatrix, ScalarMatrix, Sum
before, start = memory(), time.process_time()
V = Sum(kernel=KnownMatrix(K), residual=ScalarMatrix(len(y))).double()
done(fit_reml(V, y, X).log_likelihood)
"""
)

# The marginal likelihood with a constant mean, by 50 steps of Adam; no standard errors.
_GPYTORCH = (
    _KERNEL
    + """
import gpytorch
class Known(gpytorch.kernels.Kernel):
    def forward(self, a, b, diag=False, **options):
        i, j = a[:, 0].long(), b[:, 0].long()
        return K[i, j] if diag else K[i][:, j]
class Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(Known())
    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))
before, start = memory(), time.process_time()
x = torch.arange(len(y)).double()[:, None]
likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
model = Model(x, y, likelihood).double()
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
with gpytorch.settings.fast_computations(False, False, False):
    for _ in range(50):
        optimizer.zero_grad()
        loss = -mll(model(x), y)
        loss.backward()
        optimizer.step()
done(-loss.item() * len(y), gpytorch.__version__)
"""
)

_PYREML_KERNEL = (
    _KERNEL
    + """
import pyreml
table["id"] = [str(i) for i in range(len(table))]
before, start = memory(), time.process_time()
random = pyreml.Random("id", right_hand="str", covariance=K.numpy(), matrix_index=list(table["id"]))
model = pyreml.MixedModel.from_dataframe(table, "y", "1", random)
model.fit()
done(float("nan"), pyreml.__version__ if hasattr(pyreml, "__version__") else "")
"""
)

_PEDIGREE = (
    _START
    + """
import numpy
from openreml_nn.covariance import Pedigree
from tests.benchmarks.tables import parents
table = pandas.read_parquet(path)
names, sires, dams = parents(len(table))
"""
)

_OURS_PEDIGREE = (
    _PEDIGREE
    + """
from openreml_nn import fit_reml
from openreml_nn.covariance import *
before, start = memory(), time.process_time()
P = Pedigree.of(names, sires, dams)
place = {name: i for i, name in enumerate(P.levels)}
codes = torch.tensor([place[name] for name in names])
n = len(names)
y = torch.from_numpy(table["y"].to_numpy(copy=True))
V = Sum(animal=CovariancePropagation(DummyMatrix.from_codes(codes, n), KnownInverseMatrix(P.inverse)),
        residual=ScalarMatrix(n)).double()
done(fit_reml(V, y, torch.ones(n, 1).double()).log_likelihood)
"""
)

_PYREML_PEDIGREE = (
    _PEDIGREE
    + """
import pyreml
before, start = memory(), time.process_time()
table["id"] = names
A = pyreml.A_pedigree(pyreml.prepare_pedigree(
    pandas.DataFrame({"ID": names, "DAM": dams, "SIRE": sires})))
index = list(A.index) if hasattr(A, "index") else names
random = pyreml.Random("id", right_hand="str", covariance=numpy.asarray(A), matrix_index=index)
model = pyreml.MixedModel.from_dataframe(table, "y", "1", random)
model.fit()
done(float("nan"))
"""
)

#: Scripts by engine; of R's, the interpreter is another.
SCRIPTS = {
    "ours": _OURS.replace("SOLVER", "auto"),
    "ours, krylov": _OURS.replace("SOLVER", "krylov"),
    "ours, exact": _OURS.replace("SOLVER", "blocked"),
    "ours, in chunks": _STREAM,
    "ours, kernel": _OURS_KERNEL,
    "ours, pedigree": _OURS_PEDIGREE,
    "mixedlm": _MIXEDLM,
    "gpboost": _GPBOOST,
    "gpboost, places": _GPBOOST_PLACES.replace("APPROXIMATION", "vecchia"),
    "gpboost, places, latent": _GPBOOST_PLACES.replace("APPROXIMATION", "vecchia_latent"),
    "lme4": _LME4,
    **{
        f"{engine}, {family}": script.replace("FAMILY", family).replace("LIKELIHOOD", likelihood)
        for engine, script in (
            ("ours", _OURS_FAMILY),
            ("gpboost", _GPBOOST_FAMILY),
            ("lme4", _GLMER),
        )
        for family, likelihood in (("binomial", "bernoulli_logit"), ("poisson", "poisson"))
    },
    "gpytorch": _GPYTORCH,
    "pyreml, kernel": _PYREML_KERNEL,
    "pyreml, pedigree": _PYREML_PEDIGREE,
}
