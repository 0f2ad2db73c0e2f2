# Shares of variance of generalised mixed models by hand from lme4's fits (Nakagawa et al. 2017):
# Rscript tests/reference/explained.R
suppressMessages(library(lme4))
fine <- glmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9))
shares <- function(f, r, d) c(marginal = f / (f + r + d), conditional = (f + r) / (f + r + d))
fixed <- function(m) var(as.vector(model.matrix(m) %*% fixef(m)))
bacteria <- read.csv("tests/reference/glmm/bacteria.csv")
b <- glmer(resp ~ trt + (1 | ID), bacteria, binomial, control = fine)
r <- VarCorr(b)[[1]][1]
p <- plogis(fixef(update(b, . ~ 1 + (1 | ID)))[[1]])
print(shares(fixed(b), r, pi^2 / 3), digits = 8)
print(shares(fixed(b), r, 1 / (p * (1 - p))), digits = 8)
ticks <- read.csv("tests/reference/glmm/grouseticks.csv"); ticks$YEAR <- factor(ticks$YEAR)
t <- glmer(TICKS ~ YEAR + h + (1 | BROOD), ticks, poisson, control = fine)
n <- update(t, . ~ 1 + (1 | BROOD))
mu <- exp(fixef(n)[[1]] + VarCorr(n)[[1]][1] / 2)
for (d in c(log(1 + 1 / mu), trigamma(mu), 1 / mu)) print(shares(fixed(t), VarCorr(t)[[1]][1], d), digits = 8)
# Pearson's statistic over the residual degrees of freedom, and zeros that the fit expects.
print(c(sum(residuals(t, "pearson")^2), sum(residuals(t, "pearson")^2) / df.residual(t), sum(dpois(0, fitted(t))), sum(ticks$TICKS == 0)), digits = 8)
