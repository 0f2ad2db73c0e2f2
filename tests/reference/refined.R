# Rscript tests/reference/refined.R
library(lme4)
d <- read.csv("tests/reference/orthodont.csv")
f <- distance ~ age * Sex + (age | Subject)
tight <- list(maxfun = 1e5, FtolAbs = 1e-14, FtolRel = 1e-16, XtolRel = 1e-12)
m <- lmer(f, d, start = getME(lmer(f, d), "theta"),
          control = lmerControl(optimizer = "Nelder_Mead", optCtrl = tight))
cat(sprintf("%.14g\n", logLik(m)))
print(as.data.frame(VarCorr(m)), digits = 10)
print(coef(summary(m)), digits = 10)
print(head(ranef(m)$Subject, 3), digits = 10)
