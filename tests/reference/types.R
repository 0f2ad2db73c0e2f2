# Rscript tests/reference/types.R > tests/reference/types.json
# Type I, II and III tables of lmerTest, of unbalanced data, and deletion diagnostics of lme4.
suppressMessages({library(lme4); library(lmerTest); library(jsonlite)})
dir <- "openreml_nn/datasets/"
tight <- lmerControl("bobyqa", optCtrl = list(rhoend = 1e-10, maxfun = 1e5))
oats <- read.csv(paste0(dir, "oats.csv"))
lost <- c(1, 5, 9, 20, 33, 50, 51)
oats$dose <- factor(oats$nitro)
sleep <- read.csv(paste0(dir, "sleepstudy.csv")); sleep$Subject <- factor(sleep$Subject)
sleep$late <- factor(ifelse(sleep$Days > 5, "late", "early"))
some <- sleep[-c(1:8, 15:19, 33, 47, 101:104), ]
oats$w <- rep(c("p", "q", "q", "p", "q"), length.out = 72)
fits <- list(
  slopes = lmer(yield ~ nitro * Variety + (1 | Block/Variety), oats[-lost, ], control = tight),
  doses = lmer(yield ~ dose * Variety + (1 | Block/Variety), oats[-lost, ], control = tight),
  three = lmer(yield ~ dose * Variety * w + (1 | Block), oats[-lost, ], control = tight),
  additive = lmer(yield ~ nitro + Variety + (1 | Block), oats[-lost, ], control = tight),
  poly = lmer(Reaction ~ poly(Days, 2) + late + (1 | Subject), some, control = tight))
tables <- lapply(fits, function(m) lapply(c(I = 1, II = 2, III = 3), function(type) {
  a <- as.data.frame(anova(m, type = type))
  data.frame(name = rownames(a), num_df = a$NumDF, den_df = a$DenDF, F = a$`F value`, p = a$`Pr(>F)`)
}))
kr <- as.data.frame(anova(fits$slopes, type = 3, ddf = "Kenward-Roger"))
# Deletion of subjects with the variances estimated again, and leverages.
class_of <- lme4::lmer(Reaction ~ Days + (Days | Subject), some, control = tight)
deleted <- influence(class_of, "Subject")
beta <- deleted$`fixed.effects[-Subject]`
cat(toJSON(list(
  versions = list(lme4 = as.character(packageVersion("lme4")), lmerTest = as.character(packageVersion("lmerTest"))),
  tables = tables,
  kenward_roger = data.frame(name = rownames(kr), num_df = kr$NumDF, den_df = kr$DenDF, F = kr$`F value`, p = kr$`Pr(>F)`),
  leverage = unname(hatvalues(class_of)),
  deleted = list(case = rownames(beta), intercept = beta[, 1], days = beta[, 2])),
  digits = 12, auto_unbox = TRUE))
