# Profile likelihood intervals of generalised mixed models by lme4 (1.1-31), of the data of the folder glmm:
# Rscript tests/reference/profiles.R
suppressMessages(library(lme4))
cbpp <- read.csv("tests/reference/glmm/cbpp.csv")
cbpp$period <- factor(cbpp$period)
print(confint(glmer(cbind(incidence, size - incidence) ~ period + (1 | herd), cbpp, binomial),
              method = "profile", quiet = TRUE), digits = 8)
some <- read.csv("tests/reference/glmm/contraception.csv")
some <- some[some$district %in% unique(some$district)[1:20], ]
fine <- glmerControl(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-9))
print(confint(glmer(y ~ urban + age + (1 | district), some, binomial, control = fine),
              method = "profile", quiet = TRUE), digits = 8)
