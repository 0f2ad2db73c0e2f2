# Rscript tests/reference/corners.R > tests/reference/corners.json
# Singular fits, cells that cannot be estimated, nested factors, and random terms left out.
suppressMessages({library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(jsonlite)})
options(warn = -1); emm_options(msg.nesting = FALSE, msg.interaction = FALSE, lmer.df = "satterthwaite")
dir <- "tests/reference/"
tight <- lmerControl(optimizer = "nloptwrap", calc.derivs = FALSE, check.conv.singular = "ignore",
                     optCtrl = list(xtol_abs = 1e-12, ftol_abs = 1e-14, maxeval = 20000))
tables <- read.csv(paste0(dir, "singular.csv")); tables$a <- factor(tables$a); tables$b <- factor(tables$b)
formulas <- c("y ~ x + (1 | a/b)", "y ~ x + (x | a)", "y ~ x + (x || a)")
rows <- list()
for (set in unique(tables$set)) for (f in formulas) for (method in c("reml", "ml")) {
  d <- tables[tables$set == set, ]
  m <- lmer(as.formula(f), d, REML = method == "reml", control = tight)
  t <- coef(summary(m))
  row <- list(set = set, formula = f, method = method, singular = isSingular(m),
              log_likelihood = as.numeric(logLik(m)), names = rownames(t), estimate = t[, 1],
              std_error = t[, 2], df = t[, 3])
  if (method == "reml") {
    k <- coef(summary(m, ddf = "Kenward-Roger"))
    row$kenward_roger <- list(std_error = k[, 2], df = k[, 3])
  } else if (set < 3) {
    ci <- tryCatch(suppressMessages(confint(m, quiet = TRUE, oldNames = FALSE)), error = function(e) NULL)
    if (!is.null(ci)) row$confint <- data.frame(name = rownames(ci), low = ci[, 1], high = ci[, 2])
  }
  rows[[length(rows) + 1]] <- row
}
# Marginal means.
cells <- read.csv(paste0(dir, "cells.csv"), stringsAsFactors = TRUE)
table_of <- function(e) { t <- as.data.frame(summary(e)); list(level = apply(t[, 1:(which(names(t) == "emmean") - 1), drop = FALSE], 1, paste, collapse = ", "),
  estimate = t$emmean, std_error = t$SE, df = t$df) }
gap <- subset(cells, !(a == "q" & b == "w"))
m1 <- lmer(y ~ a * b + (1 | g), gap, control = tight)
m2 <- lmer(y ~ type + variety + season + (1 | g), cells, control = tight)
m3 <- lmer(y ~ type + type:variety + season + (1 | g), cells, control = tight)
pairs_of <- function(e) { t <- as.data.frame(summary(pairs(e))); list(name = t$contrast, estimate = t$estimate, df = t$df, p = t$p.value) }
means <- list(
  gap = list(cells = table_of(emmeans(m1, c("a", "b"))), a = table_of(emmeans(m1, "a")), b = table_of(emmeans(m1, "b")),
             pairs = pairs_of(emmeans(m1, "b"))),
  nested = list(type = table_of(emmeans(m2, "type")), variety = table_of(emmeans(m2, "variety")), season = table_of(emmeans(m2, "season")),
                both = table_of(emmeans(m2, c("type", "variety")))),
  within = list(type = table_of(emmeans(m3, "type")), season = table_of(emmeans(m3, "season"))))
# Random terms left out, by lmerTest's ranova.
sleep <- read.csv("openreml_nn/datasets/sleepstudy.csv"); sleep$Subject <- factor(sleep$Subject)
r <- as.data.frame(ranova(lmer(Reaction ~ Days + (Days | Subject), sleep)))[2, ]
cat(toJSON(list(
  versions = list(lme4 = as.character(packageVersion("lme4")), lmerTest = as.character(packageVersion("lmerTest")),
                  pbkrtest = as.character(packageVersion("pbkrtest")), emmeans = as.character(packageVersion("emmeans"))),
  fits = rows, means = means, ranova = list(statistic = r$LRT, df = r$Df, p = r$`Pr(>Chisq)`)),
  digits = 12, auto_unbox = TRUE, pretty = TRUE, na = "null"))
