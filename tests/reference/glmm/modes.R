# Modes of the judges' effects in the model of the wine data and their conditional variances, at the
# estimates of clmm (package ordinal) that are in reference.json, by R's own optimise() and
# numerical second differences: Rscript modes.R > modes.json
wine <- read.csv("wine.csv", colClasses = c(judge = "character"))
cuts <- c(-Inf, -1.62366692406869, 1.51336518291881, 4.22852668849532, 6.08877255848077, Inf)
eta <- 3.06299662584431 * (wine$temp == "warm") + 1.83488492228405 * (wine$contact == "yes")
variance <- 1.27946090925484
value <- function(u, judge) {
  at <- wine$judge == judge
  mean <- eta[at] + u
  y <- wine$rating[at]
  sum(log(plogis(cuts[y + 1] - mean) - plogis(cuts[y] - mean))) + dnorm(u, 0, sqrt(variance), TRUE)
}
judges <- as.character(sort(as.integer(unique(wine$judge))))
modes <- sapply(judges, function(j)
  optimise(value, c(-6, 6), judge = j, maximum = TRUE, tol = 1e-10)$maximum)
h <- 1e-3
curve <- mapply(function(u, j) (value(u + h, j) - 2 * value(u, j) + value(u - h, j)) / h^2, modes, judges)
text <- function(x) paste0("[", paste(format(x, digits = 10), collapse = ", "), "]")
cat(sprintf('{"levels": [%s], "modes": %s, "variances": %s}\n',
  paste0('"', judges, '"', collapse = ", "), text(modes), text(-1 / curve)))
