# Rscript tests/reference/inference.R > tests/reference/inference.json
suppressMessages({library(lme4); library(lmerTest); library(pbkrtest); library(emmeans); library(jsonlite)})
dir <- "openreml_nn/datasets/"
sleep <- read.csv(paste0(dir, "sleepstudy.csv")); sleep$Subject <- factor(sleep$Subject)
oats <- read.csv(paste0(dir, "oats.csv"))
pen <- read.csv(paste0(dir, "penicillin.csv"))
fits <- list(
  sleepstudy = lmer(Reaction ~ Days + (Days | Subject), sleep),
  oats = lmer(yield ~ nitro * Variety + (1 | Block/Variety), oats),
  penicillin = lmer(diameter ~ 1 + (1 | plate) + (1 | sample), pen))
# Rows left out, so that no correction vanishes.
lost <- c(1, 5, 9, 20, 33, 50, 51)
fits$oats_unbalanced <- lmer(yield ~ nitro * Variety + (1 | Block/Variety), oats[-lost, ])
fits$sleepstudy_unbalanced <- lmer(Reaction ~ Days + (Days | Subject), sleep[-c(1:8, 15:19, 33, 47, 101:104), ])
tables <- lapply(fits, function(m) {
  one <- function(ddf) {
    t <- coef(summary(m, ddf = ddf))
    data.frame(name = rownames(t), estimate = t[, 1], std_error = t[, 2], df = t[, 3],
               statistic = t[, 4], p = t[, 5])
  }
  list(satterthwaite = one("Satterthwaite"), kenward_roger = one("Kenward-Roger"))
})
# Joint tests of several coefficients.
L <- diag(6)[3:4, ]; L2 <- diag(6)[5:6, ]
joint <- function(L, ddf) { t <- contestMD(fits$oats, L, ddf = ddf)
  list(F = t$`F value`, num_df = t$NumDF, den_df = t$DenDF, p = t$`Pr(>F)`) }
names <- rownames(coef(summary(fits$oats)))
oats_joint <- list(
  list(names = names[3:4], satterthwaite = joint(L, "Satterthwaite"), kenward_roger = joint(L, "Kenward-Roger")),
  list(names = names[5:6], satterthwaite = joint(L2, "Satterthwaite"), kenward_roger = joint(L2, "Kenward-Roger")))
# Likelihood ratios.
ml <- function(f, d) lmer(f, d, REML = FALSE)
a <- as.data.frame(anova(ml(Reaction ~ Days + (1 | Subject), sleep), ml(Reaction ~ Days + (Days | Subject), sleep)))
b <- as.data.frame(anova(ml(Reaction ~ 1 + (Days | Subject), sleep), ml(Reaction ~ Days + (Days | Subject), sleep)))
# Profile intervals.
ci <- confint(fits$sleepstudy, quiet = TRUE)
ci_pen <- confint(fits$penicillin, quiet = TRUE)
# Marginal means.
means <- function(spec, mode) as.data.frame(summary(emmeans(fits$oats, spec, lmer.df = mode)))
pair <- as.data.frame(summary(pairs(emmeans(fits$oats, "Variety", lmer.df = "kenward-roger"))))
cat(toJSON(list(
  versions = list(lme4 = as.character(packageVersion("lme4")), lmerTest = as.character(packageVersion("lmerTest")),
                  pbkrtest = as.character(packageVersion("pbkrtest")), emmeans = as.character(packageVersion("emmeans"))),
  coefficients = tables, joint = oats_joint, anova = list(slopes = a, days = b),
  confint = list(sleepstudy = data.frame(name = rownames(ci), low = ci[, 1], high = ci[, 2]),
                 penicillin = data.frame(name = rownames(ci_pen), low = ci_pen[, 1], high = ci_pen[, 2])),
  emmeans = list(satterthwaite = means("Variety", "satterthwaite"), kenward_roger = means("Variety", "kenward-roger"), pairs = pair)),
  digits = 12, auto_unbox = TRUE, pretty = TRUE))
