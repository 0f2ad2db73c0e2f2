# Prior weights in lme4: proportions with their trials, and weights that multiply log-densities.
# Rscript weights.R, in this folder, writes weights.json.
library(lme4)
figures <- function(fit) list(
  log_likelihood = as.numeric(logLik(fit)),
  fixed = unname(fixef(fit)),
  std_error = unname(sqrt(diag(as.matrix(vcov(fit))))),
  variance = as.numeric(VarCorr(fit)[[1]][1, 1])
)
control <- glmerControl(optimizer = "bobyqa", tolPwrss = 1e-12, optCtrl = list(rhoend = 1e-9, maxfun = 1e5))
cbpp <- read.csv("cbpp.csv")
cbpp$share <- cbpp$incidence / cbpp$size
epil <- read.csv("epil.csv")
epil$w <- 1 + (seq_len(nrow(epil)) - 1) %% 3
found <- list(
  proportions = figures(glmer(share ~ factor(period) + (1 | herd), cbpp, binomial,
                              weights = size, control = control)),
  counts = figures(glmer(y ~ lage + (1 | subject), epil, poisson, weights = w, control = control))
)
line <- function(f) sprintf(
  '{"log_likelihood": %.10f, "fixed": [%s], "std_error": [%s], "variance": %.10f}', f$log_likelihood,
  paste(sprintf("%.9f", f$fixed), collapse = ", "), paste(sprintf("%.9f", f$std_error), collapse = ", "), f$variance)
cat(sprintf('{"proportions": %s,\n "counts": %s}\n', line(found$proportions), line(found$counts)), file = "weights.json")
