# Fits of nlme's own data sets with its correlation structures and variance functions:
#   Rscript residuals.R > residuals.json
# The data sets are written beside it.
library(nlme)
for (name in c("Ovary", "BodyWeight", "Dialyzer")) {
  d <- as.data.frame(get(name))
  names(d) <- gsub("[.]", "_", names(d))
  for (f in names(d)) if (is.factor(d[[f]])) d[[f]] <- as.character(d[[f]])
  write.csv(d, paste0(tolower(name), ".csv"), row.names = FALSE)
}
# The wheat trial of the Nebraska Intrastate Nursery in rows and columns of plots, which are 4.3 m long
# and 1.2 m wide.
wheat <- with(as.data.frame(Wheat2), data.frame(
  gen = variety, rep = Block, yield = yield, col = round(longitude / 1.2), row = round(latitude / 4.3)))
write.csv(wheat, "wheat2.csv", row.names = FALSE, quote = FALSE)
Ovary <- transform(as.data.frame(Ovary), s = sin(2 * pi * Time), c = cos(2 * pi * Time))
Ovary$step <- ave(Ovary$Time, Ovary$Mare, FUN = seq_along)
BodyWeight <- as.data.frame(BodyWeight)
Dialyzer <- as.data.frame(Dialyzer)
Orthodont <- as.data.frame(Orthodont)
tight <- list(lme = lmeControl(msTol = 1e-12, tolerance = 1e-10, msMaxIter = 500, maxIter = 500, niterEM = 100),
              gls = glsControl(msTol = 1e-12, tolerance = 1e-10, msMaxIter = 500, maxIter = 500))
out <- list()
note <- function(name, fit, extra = list()) {
  out[[name]] <<- c(list(log_likelihood = as.numeric(logLik(fit)), sigma = fit$sigma,
                         fixed = as.numeric(if (inherits(fit, "lme")) fixef(fit) else coef(fit))), extra)
}
values <- function(fit) as.list(coef(fit$modelStruct, unconstrained = FALSE))
for (method in c("REML", "ML")) {
  m <- tolower(method)
  fit <- function(...) gls(..., method = method, control = tight$gls)
  mix <- function(...) lme(..., method = method, control = tight$lme)
  f <- fit(follicles ~ s + c, Ovary, correlation = corAR1(form = ~ step | Mare))
  note(paste("Ovary ar1", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(follicles ~ s + c, Ovary, correlation = corARMA(form = ~ step | Mare, p = 1, q = 1))
  note(paste("Ovary arma", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- mix(follicles ~ s + c, Ovary, random = ~ 1 | Mare, correlation = corAR1(form = ~ step | Mare))
  note(paste("Ovary lme ar1", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(weight ~ Time * Diet, BodyWeight, correlation = corCAR1(form = ~ Time | Rat))
  note(paste("BodyWeight car1", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(weight ~ Time * Diet, BodyWeight, correlation = corExp(c(50, 0.05), form = ~ Time | Rat, nugget = TRUE))
  note(paste("BodyWeight exp nugget", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(weight ~ Time * Diet, BodyWeight, correlation = corSpher(c(120), form = ~ Time | Rat))
  note(paste("BodyWeight spherical", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- mix(weight ~ Time * Diet, BodyWeight, random = ~ Time | Rat)
  note(paste("BodyWeight lme", m), f)
  f <- fit(rate ~ (pressure + I(pressure^2) + I(pressure^3) + I(pressure^4)) * QB, Dialyzer, weights = varPower(form = ~ pressure))
  note(paste("Dialyzer power", m), f, list(delta = unname(coef(f$modelStruct$varStruct, unconstrained = FALSE))))
  f <- fit(rate ~ (pressure + I(pressure^2) + I(pressure^3) + I(pressure^4)) * QB, Dialyzer, weights = varExp(form = ~ pressure))
  note(paste("Dialyzer exp", m), f, list(delta = unname(coef(f$modelStruct$varStruct, unconstrained = FALSE))))
  f <- fit(rate ~ (pressure + I(pressure^2) + I(pressure^3) + I(pressure^4)) * QB, Dialyzer, weights = varPower(form = ~ pressure), correlation = corAR1(form = ~ index | Subject))
  note(paste("Dialyzer power ar1", m), f, list(delta = unname(coef(f$modelStruct$varStruct, unconstrained = FALSE)), phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- mix(rate ~ (pressure + I(pressure^2) + I(pressure^3) + I(pressure^4)) * QB, Dialyzer, random = ~ 1 | Subject, weights = varPower(form = ~ pressure))
  note(paste("Dialyzer lme power", m), f, list(delta = unname(coef(f$modelStruct$varStruct, unconstrained = FALSE))))
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corSymm(form = ~ 1 | Subject), weights = varIdent(form = ~ 1 | age))
  note(paste("Orthodont us", m), f)
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corAR1(form = ~ 1 | Subject), weights = varIdent(form = ~ 1 | age))
  note(paste("Orthodont hetar1", m), f)
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corCompSymm(form = ~ 1 | Subject))
  note(paste("Orthodont cs", m), f)
  f <- mix(distance ~ Sex * age, Orthodont, random = ~ 1 | Subject, weights = varIdent(form = ~ 1 | Sex))
  note(paste("Orthodont lme diag", m), f)
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corRatio(c(3), form = ~ age | Subject))
  note(paste("Orthodont ratio", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corLin(c(10), form = ~ age | Subject))
  note(paste("Orthodont linear", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
  f <- fit(distance ~ Sex * age, Orthodont, correlation = corGaus(c(3), form = ~ age | Subject))
  note(paste("Orthodont gaussian", m), f, list(phi = unname(coef(f$modelStruct$corStruct, unconstrained = FALSE))))
}
cat("{\n")
shown <- sapply(names(out), function(name) {
  numbers <- sapply(out[[name]], function(x) paste0("[", paste(format(x, digits = 12, trim = TRUE), collapse = ", "), "]"))
  paste0("  \"", name, "\": {", paste0("\"", names(out[[name]]), "\": ", numbers, collapse = ", "), "}")
})
cat(paste(shown, collapse = ",\n"), "\n}\n")
