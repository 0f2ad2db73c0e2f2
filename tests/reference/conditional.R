# Degrees of freedom of the conditional AIC from refits by lme4, one for each row, of counts and of the first
# 16 rows' binary responses:
# Rscript tests/reference/conditional.R > tests/reference/conditional.json
# The rows are of tests/inference/test_conditional_families.py.
suppressMessages(library(lme4))
rows <- read.csv("tests/reference/conditional.csv")
rows$g <- factor(rows$g)
control <- glmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9, maxfun = 1e5), tolPwrss = 1e-14)
fit <- function(formula, family, data) suppressMessages(glmer(formula, data, family, control = control))
eta <- function(model) predict(model, type = "link")
counts <- fit(n ~ x + (1 | g), poisson, rows)
some <- rows[1:16, ]
binary <- fit(b ~ 1 + (1 | g), binomial, some)
df <- c(0, 0)
for (i in seq_len(nrow(rows))) {
  moved <- rows
  if (rows$n[i] > 0) {
    moved$n[i] <- rows$n[i] - 1
    df[1] <- df[1] + rows$n[i] * (eta(counts)[i] - eta(fit(n ~ x + (1 | g), poisson, moved))[i])
  }
}
for (i in seq_len(nrow(some))) {
  moved <- some
  moved$b[i] <- 1 - some$b[i]
  mu <- plogis(eta(binary)[i])
  change <- (eta(binary)[i] - eta(fit(b ~ 1 + (1 | g), binomial, moved))[i]) * (2 * some$b[i] - 1)
  df[2] <- df[2] + mu * (1 - mu) * change
}
likelihood <- c(
  sum(dpois(rows$n, exp(eta(counts)), log = TRUE)),
  sum(dbinom(some$b, 1, plogis(eta(binary)), log = TRUE))
)
cat(sprintf(
  '{"poisson": {"log_likelihood": %.8f, "df": %.8f}, "binomial": {"log_likelihood": %.8f, "df": %.8f}}\n',
  likelihood[1], df[1], likelihood[2], df[2]
))
